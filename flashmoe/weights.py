"""The weights of one layer as three arrays: given, drawn at random, or read from a checkpoint folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from flashmoe.model import NUMPY_DTYPES, MoEModel
from flashmoe.placement import Placement

Progress = Callable[[int, int], None]  # called with (experts done, experts in all)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of one layer; E experts, d_model H, d_ff I.

    gate: (E, H), the router.
    gate_up: (E, 2 I, H), an expert's gate rows first, then its up rows.
    down: (E, H, I).
    All float32 or all ml_dtypes.bfloat16, C-contiguous (copied only if they are not).
    Raises: ValueError naming the array and the shape or dtype that does not fit.
    """

    gate: NDArray[Any]
    gate_up: NDArray[Any]
    down: NDArray[Any]

    def __post_init__(self) -> None:
        accepted = tuple(NUMPY_DTYPES.values())
        for field, ndim in (("gate", 2), ("gate_up", 3), ("down", 3)):
            array = getattr(self, field)
            if not isinstance(array, np.ndarray) or array.dtype not in accepted:
                kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"{field} is {kind} (accepted: numpy float32 or ml_dtypes.bfloat16)")
            if array.dtype != self.gate.dtype:
                raise ValueError(f"{field} is {array.dtype} and gate {self.gate.dtype} (must be the same)")
            if array.ndim != ndim or 0 in array.shape:
                raise ValueError(f"{field} has shape {array.shape} (must have {ndim} dimensions, none 0)")
            object.__setattr__(self, field, np.ascontiguousarray(array))
        num_experts, d_model = self.gate.shape
        d_ff = self.down.shape[2]
        _check_shape("gate_up", self.gate_up.shape, (num_experts, 2 * d_ff, d_model))
        _check_shape("down", self.down.shape, (num_experts, d_model, d_ff))

    @classmethod
    def random(cls, model: MoEModel, seed: int = 0, progress: Progress | None = None) -> Weights:
        """Draw uniform weights in +-sqrt(3 / fan_in): variance 1 / fan_in keeps outputs near inputs in size.

        The same sizes and seed give the same numbers, in bf16 the rounded ones, on any number of cores.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} (must be at least 0)")
        weights = _empty(model.num_experts, model.d_model, model.d_ff, model.numpy_dtype)

        def draw(expert: int) -> None:
            # A stream per expert: threads may fill them in any order.
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(expert,)))
            for array in (weights.gate, weights.gate_up, weights.down):
                _fill_uniform(array[expert], rng)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for done, _ in enumerate(pool.map(draw, range(model.num_experts)), start=1):
                if progress is not None:
                    progress(done, model.num_experts)
        return weights

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], layer: int = 0, progress: Progress | None = None
    ) -> Weights:
        """Read one layer of a Hugging Face Qwen3-MoE folder, and nothing but that layer's tensors.

        Takes model.safetensors or the shards of model.safetensors.index.json, experts one by one (what
        save_pretrained writes) or fused, names with or without "model." in front.
        BF16 stays; F16, F32 or a mixture becomes float32, which holds them all exactly.
        Raises: ValueError when a file or the layer is missing, the layer is dense, or a tensor is missing,
        unknown, of another type or of the wrong shape.
        Source: Qwen3MoeExperts and its weight conversion in transformers 5.
        """
        with ExitStack() as files:
            tensors = _layer_tensors(Path(folder), layer, files)
            num_experts, d_model = _sizes(tensors, "gate.weight", 2)
            fused = "experts.gate_up_proj" in tensors or "experts.down_proj" in tensors
            names = ["gate.weight"]
            if fused:
                names += ["experts.gate_up_proj", "experts.down_proj"]
            else:
                for part in ("gate", "up", "down"):
                    names += [f"experts.{e}.{part}_proj.weight" for e in range(num_experts)]
            dtype = _common_dtype(tensors, names)
            unknown = sorted(set(tensors) - set(names))
            if unknown:  # a shared expert, a bias, a scale: leaving it out would give wrong results
                raise ValueError(f"{folder}: layer {layer} has mlp.{unknown[0]}, which is no part of a Qwen3-MoE layer")
            d_ff = _sizes(tensors, names[-1], 3 if fused else 2)[-1]  # names ends with a down projection
            weights = _empty(num_experts, d_model, d_ff, dtype)
            _read(tensors, "gate.weight", None, weights.gate)
            for e in range(num_experts):
                if fused:
                    _read(tensors, "experts.gate_up_proj", e, weights.gate_up[e])
                    _read(tensors, "experts.down_proj", e, weights.down[e])
                else:
                    _read(tensors, f"experts.{e}.gate_proj.weight", None, weights.gate_up[e, :d_ff])
                    _read(tensors, f"experts.{e}.up_proj.weight", None, weights.gate_up[e, d_ff:])
                    _read(tensors, f"experts.{e}.down_proj.weight", None, weights.down[e])
                if progress is not None:
                    progress(e + 1, num_experts)
            return weights

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.gate.nbytes + self.gate_up.nbytes + self.down.nbytes

    def check(self, model: MoEModel) -> None:
        """Raise ValueError when the shapes are not the model's; the dtype is `cast`'s matter."""
        _check_shape("gate", self.gate.shape, (model.num_experts, model.d_model))
        _check_shape("gate_up", self.gate_up.shape, (model.num_experts, 2 * model.d_ff, model.d_model))

    def cast(self, dtype: str) -> Weights:
        """Return the weights as "bf16" or "f32": themselves, not a copy, when they are that already."""
        if dtype not in NUMPY_DTYPES:
            raise ValueError(f"dtype={dtype!r} (accepted: {', '.join(NUMPY_DTYPES)})")
        wanted = NUMPY_DTYPES[dtype]
        if self.gate.dtype == wanted:
            return self
        return Weights(self.gate.astype(wanted), self.gate_up.astype(wanted), self.down.astype(wanted))

    def placed(self, placement: Placement) -> Weights:
        """Return the weights with each expert, and its row of the router, in its slot: the same layer, renamed.

        Outputs are the same but for the order of sums where an executor adds by expert or PE, and for experts with
        equal logits: the router then takes the lower slot instead of the lower expert.
        Raises: ValueError when the placement is for another number of experts.
        """
        if placement.num_experts != len(self.gate):
            raise ValueError(f"placement is for {placement.num_experts} experts (the weights have {len(self.gate)})")
        if placement == Placement.linear(placement.num_experts):
            return self
        experts = placement.experts
        return Weights(self.gate[experts], self.gate_up[experts], self.down[experts])


def _empty(num_experts: int, d_model: int, d_ff: int, dtype: np.dtype[Any]) -> Weights:
    return Weights(
        gate=np.empty((num_experts, d_model), dtype),
        gate_up=np.empty((num_experts, 2 * d_ff, d_model), dtype),
        down=np.empty((num_experts, d_model, d_ff), dtype),
    )


def _check_shape(field: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f"{field} has shape {shape} (must be {wanted})")


def _fill_uniform(out: NDArray[Any], rng: np.random.Generator) -> None:
    # 2**16 even steps, four to a random word: a random float for each weight would take twice as long.
    words = rng.integers(0, 2**64, size=-(-out.size // 4), dtype=np.uint64)
    steps = words.view(np.int16)[: out.size].reshape(out.shape)
    fan_in = out.shape[-1]
    out[...] = steps * np.float32(np.sqrt(3 / fan_in) / 2**15)


# ---- checkpoints. safe_open's tensors and slices come untyped; bf16 works with framework="np" because
# importing ml_dtypes (in flashmoe.model) teaches numpy the name "bfloat16".


def _layer_tensors(folder: Path, layer: int, files: ExitStack) -> dict[str, Any]:
    """Return the part of a tensor's name after "layers.<layer>.mlp." -> a slice, which reads nothing yet."""
    tensor_files = _tensor_files(folder)
    found: dict[int, dict[str, str]] = {}  # layer -> short name -> full name
    for name in tensor_files:
        match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.mlp\.(.+)", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = name
    moe_layers = [n for n in sorted(found) if any(short.startswith("experts.") for short in found[n])]
    if layer not in moe_layers:
        problem = "is dense" if layer in found else "is missing"
        raise ValueError(f"{folder}: layer {layer} {problem} (layers with experts: {_spans(moe_layers)})")
    opened: dict[Path, Any] = {}
    tensors = {}
    for short, name in found[layer].items():
        path = tensor_files[name]
        if path not in opened:
            opened[path] = files.enter_context(_open(path))
        try:
            tensors[short] = opened[path].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path} lacks {name}, which the index says it has ({error})") from error
    return tensors


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> the file that holds it; a whole file goes before shards, as in transformers."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        with _open(whole) as file:
            return dict.fromkeys(file.keys(), whole)
    if not index.is_file():
        problem = "lacks" if folder.is_dir() else "is no folder with"
        raise ValueError(f"{folder} {problem} {whole.name} or {index.name}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r})") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} as safetensors ({error})") from error


def _found(tensors: dict[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ValueError(f"the checkpoint's layer has no mlp.{name} (is it complete?)")
    return tensors[name]


def _sizes(tensors: dict[str, Any], name: str, ndim: int) -> list[int]:
    shape: list[int] = _found(tensors, name).get_shape()
    if len(shape) != ndim:
        raise ValueError(f"mlp.{name} has shape {tuple(shape)} (must have {ndim} dimensions)")
    return shape


def _common_dtype(tensors: dict[str, Any], names: Iterable[str]) -> np.dtype[Any]:
    dtypes = set()
    for name in names:
        dtype = _found(tensors, name).get_dtype()
        if dtype not in ("BF16", "F16", "F32"):
            raise ValueError(f"mlp.{name} is {dtype} (accepted: BF16, F16, F32)")
        dtypes.add(dtype)
    return NUMPY_DTYPES["bf16" if dtypes == {"BF16"} else "f32"]


def _read(tensors: dict[str, Any], name: str, expert: int | None, out: NDArray[Any]) -> None:
    """Copy a tensor, or one expert of a fused one, into out; numpy would broadcast a wrong shape."""
    tensor = tensors[name]
    shape = tuple(tensor.get_shape())
    wanted = out.shape if expert is None else (shape[0], *out.shape)
    _check_shape(f"mlp.{name}", shape, wanted)
    out[...] = tensor[:] if expert is None else tensor[expert]


def _spans(numbers: list[int]) -> str:
    """Write sorted numbers with runs shortened: [0, 1, 2, 5] -> "0..2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
