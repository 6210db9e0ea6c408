"""The layer in torch: a module for weights of Hugging Face, over two operators that torch.compile and graphs take.

`flashmoe::moe(x, handle)` has the gate inside, `flashmoe::moe_routed(x, topk_idx, topk_weights, handle)` gets the
experts and weights of each token from outside. A handle is a `MoE` module's number while that module lives. Both run on
the current stream and wait for nothing. They compute no gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashmoe.hf import TORCH_DTYPES, read_block, read_state
from flashmoe.hw import DeviceLayer, Layer, PackedWeights
from flashmoe.hw.tensors import check_tensor, current_stream, pointer_of
from flashmoe.hw.tuned import choose
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.routing import Routing
from flashmoe.tasks import Tiling
from flashmoe.trace import Trace
from flashmoe.weights import Weights

__all__ = ["MoE"]


class MoE(nn.Module):
    """One mixture-of-experts layer for inference, on a GPU or, for tests, on CPU threads.

    On a GPU the expert weights are packed once, in place where they are contiguous: the tensors given then hold packed
    weights and are of no other use (copy=True keeps them, for as much memory again). Besides them the layer takes
    `workspace_bytes`, which `print(module)` shows, and while packing one expert's larger matrix. On a CPU the tensors
    are used as they are.

    Calls share a workspace: they must follow each other, on one stream or ordered by events; so must those of different
    modules, unless `workers` leaves room for both on the card. The module keeps the device and the dtype of its
    weights; `state_dict` has nothing of it, as packed weights are no checkpoint.

    Nothing is waited for, so a launch that could not go on (a deadline passed) is not seen by the call: its output is
    undefined, as are those after it, until `check` is called. Do that wherever the host waits for the GPU anyway.
    """

    def __init__(
        self,
        model: MoEModel,
        gate: Tensor,
        gate_up: Tensor,
        down: Tensor,
        *,
        max_tokens: int = 1024,
        policy: str | Policy = "tuned",
        tiling: Tiling | None = None,
        workers: int | None = None,
        deadline_s: float = 60.0,
        trace: bool = False,
        copy: bool = False,
    ) -> None:
        """gate: (num_experts, d_model); gate_up: (num_experts, 2 d_ff, d_model), an expert's gate rows first; down:
        (num_experts, d_model, d_ff). All of the model's dtype and on one device; bfloat16 on a GPU.

        max_tokens: the most of one call, at most 1024 on a GPU. policy, tiling, workers, deadline_s: as in
        `flashmoe.run`; "tuned" goes by the tokens of each call. trace: record the tasks of each call (`last_trace`).
        Raises: ValueError naming what does not fit; BuildError and DeviceError as `flashmoe.run`.
        """
        super().__init__()
        experts, rows, columns = model.num_experts, model.d_model, model.d_ff
        shapes = {"gate": (experts, rows), "gate_up": (experts, 2 * columns, rows), "down": (experts, rows, columns)}
        weights = []
        for (name, shape), tensor in zip(shapes.items(), (gate, gate_up, down), strict=True):
            check_tensor(name, tensor, shape, TORCH_DTYPES[model.dtype])
            if tensor.device != gate.device:
                raise ValueError(f"{name} is on {tensor.device} and gate on {gate.device} (must be the same)")
            weights.append(tensor.detach().clone() if copy else tensor.detach().contiguous())
            self.register_buffer(name, weights[-1], persistent=False)
        if gate.device.type not in ("cpu", "cuda"):  # cuda is AMD's cards, too
            raise ValueError(f"the weights are on {gate.device} (accepted: cpu, cuda)")
        self.model, self.max_tokens, self.device = model, max_tokens, gate.device
        runner = _CpuRunner if gate.device.type == "cpu" else _CardRunner
        self._runner: _CpuRunner | _CardRunner = runner(
            model,
            weights,
            ep_size=1,
            max_tokens=max_tokens,
            policy=policy,
            tiling=tiling,
            deadline_s=deadline_s,
            trace=trace,
            **({} if workers is None else {"workers": workers}),
        )
        self.handle = next(_handles)
        _runners[self.handle] = self._runner

    @classmethod
    def from_hf(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        top_k: int | None = None,
        norm_topk_prob: bool | None = None,
        copy: bool = False,
        **options: Any,
    ) -> MoE:
        """Take the weights of a Qwen3MoeSparseMoeBlock of transformers, or of its state dict.

        Experts may be fused (transformers 5) or a list (4); a list is stacked, which takes new memory. Fused ones are
        packed in place on a GPU unless copy: a block's own are then empty, so that it can no longer be called; a state
        dict's hold packed weights.
        top_k, norm_topk_prob: needed with a state dict, which does not have them. options: as `MoE`.
        Raises: ValueError naming what is missing or does not fit.
        """
        if isinstance(source, nn.Module):
            model, weights = read_block(source)
        elif top_k is None or norm_topk_prob is None:
            raise ValueError(f"top_k={top_k}, norm_topk_prob={norm_topk_prob} (a state dict needs both)")
        else:
            model, weights = read_state(source, top_k, norm_topk_prob)
        made = cls(model, *weights, copy=copy, **options)
        if isinstance(source, nn.Module) and made.device.type != "cpu":
            mine = {buffer.data_ptr() for name, buffer in made.named_buffers() if name != "gate"}
            for parameter in source.parameters():
                if parameter.data_ptr() in mine:
                    parameter.data = parameter.data.new_empty(0)
        return made

    def forward(self, x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        """x: (..., d_model), of the weights' dtype and device. Returns: the same shape.

        topk_idx, topk_weights: (..., top_k) integers and floats, the experts of each token and their weights; -1 drops
        a slot. None: the gate decides.
        Raises: ValueError naming what does not fit.
        """
        rows = x.reshape(-1, x.shape[-1])
        if topk_idx is None and topk_weights is None:
            out: Tensor = torch.ops.flashmoe.moe(rows, self.handle)
        elif topk_idx is not None and topk_weights is not None:
            idx = topk_idx.reshape(-1, topk_idx.shape[-1]).to(torch.int32)
            weights = topk_weights.reshape(-1, topk_weights.shape[-1]).to(torch.float32)
            out = torch.ops.flashmoe.moe_routed(rows, idx, weights, self.handle)
        else:
            raise ValueError("one of topk_idx and topk_weights (accepted: both or neither)")
        return out.view(x.shape)

    @property
    def workspace_bytes(self) -> int:
        """Memory besides the weights."""
        return self._runner.layer.workspace_bytes

    def check(self) -> None:
        """Wait for the device. Raises: LaunchError when a call could not go on; the next one can again."""
        self._runner.check()

    def last_trace(self) -> Trace:
        """Wait for the device; the trace of the last call, or of the last replay of a graph that holds it.

        Raises: LaunchError as `check`; ValueError without trace=True, or when there was no call.
        """
        return self._runner.last_trace()

    def extra_repr(self) -> str:
        model = self.model
        return (
            f"d_model={model.d_model}, d_ff={model.d_ff}, num_experts={model.num_experts}, top_k={model.top_k}, "
            f"max_tokens={self.max_tokens}, device={self.device}, workspace={self.workspace_bytes / 2**20:.1f} MiB"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        for name, held in self.named_buffers(recurse=False):
            moved = fn(held)
            if (moved.data_ptr(), moved.dtype, moved.device) != (held.data_ptr(), held.dtype, held.device):
                raise ValueError(f"{name} stays on {held.device} as {held.dtype} (make the MoE where it shall run)")
        return self


class _CpuRunner:
    """The CPU backend on tensors, without copies of the weights."""

    def __init__(self, model: MoEModel, weights: list[Tensor], **options: Any) -> None:
        chosen = choose(options.pop("policy"), options["max_tokens"])
        self._model, self._trace = model, options["trace"]
        self.layer = Layer(model, Weights(*map(_to_numpy, weights)), policy=chosen, **options)
        self._last: Trace | None = None

    def run(self, x: Tensor, topk_idx: Tensor | None, topk_weights: Tensor | None) -> Tensor:
        check_tensor("x", x, ("num_tokens", self._model.d_model), TORCH_DTYPES[self._model.dtype])
        routing = None
        if topk_idx is not None and topk_weights is not None:
            given = (topk_idx.numpy(),), (topk_weights.numpy(),)
            routing = Routing(*given, num_experts=self._model.num_experts, name="given")
        result = self.layer([_to_numpy(x)], routing=routing)
        self._last = result.trace
        return _to_torch(result.outputs[0])

    def check(self) -> None:
        """A call on the CPU has raised its error itself."""

    def last_trace(self) -> Trace:
        return _traced(self._trace, self._last)


class _CardRunner:
    """A device layer on tensors, on torch's current stream."""

    def __init__(self, model: MoEModel, weights: list[Tensor], **options: Any) -> None:
        self._model, self._trace, self._device = model, options["trace"], weights[0].device
        backend = "hip" if torch.version.hip else "cuda"
        with torch.cuda.device(self._device):
            packed = PackedWeights.in_place(model, *weights, backend=backend)
            self.layer = DeviceLayer(model, packed, backend=backend, **options)

    def run(self, x: Tensor, topk_idx: Tensor | None, topk_weights: Tensor | None) -> Tensor:
        if x.device != self._device:
            raise ValueError(f"x is on {x.device} (the weights are on {self._device})")
        x = x.contiguous()
        given: dict[str, list[int]] = {"x": [pointer_of("x", x, ("num_tokens", self._model.d_model))]}
        num_tokens, out = x.shape[0], x.new_empty(x.shape)
        if topk_idx is not None and topk_weights is not None:
            shape = (num_tokens, self._model.top_k)
            # kept until the launch: then their memory is the stream's
            topk_idx, topk_weights = topk_idx.contiguous(), topk_weights.contiguous()
            given["topk_idx"] = [pointer_of("topk_idx", topk_idx, shape, "int32")]
            given["topk_weights"] = [pointer_of("topk_weights", topk_weights, shape, "float32")]
        if num_tokens > 0:
            with torch.cuda.device(self._device):
                self.layer.launch(out=[out.data_ptr()], num_tokens=[num_tokens], stream=current_stream(x), **given)
        return out

    def check(self) -> None:
        with torch.cuda.device(self._device):
            self.layer.check()

    def last_trace(self) -> Trace:
        with torch.cuda.device(self._device):
            return _traced(self._trace, self.layer.last_run()[0] if self._trace else None)


_handles = itertools.count()
_runners: WeakValueDictionary[int, _CpuRunner | _CardRunner] = WeakValueDictionary()


def _runner(handle: int) -> _CpuRunner | _CardRunner:
    runner = _runners.get(handle)
    if runner is None:
        raise ValueError(f"handle={handle} (accepted: the handle of a MoE module that still lives)")
    return runner


def _moe(x: Tensor, handle: int) -> Tensor:
    return _runner(handle).run(x, None, None)


def _moe_routed(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: int) -> Tensor:
    return _runner(handle).run(x, topk_idx, topk_weights)


def _like_x(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _no_gradients(*_: Any, **__: Any) -> None:
    raise ValueError("x requires grad (flashmoe computes no gradients: call it under torch.inference_mode or no_grad)")


# plain definitions: torch.library.custom_op would take twice the host's time for a call
_LIBRARY = torch.library.Library("flashmoe", "DEF")
for _name, _kernel, _schema in (
    ("moe", _moe, "(Tensor x, int handle) -> Tensor"),
    ("moe_routed", _moe_routed, "(Tensor x, Tensor topk_idx, Tensor topk_weights, int handle) -> Tensor"),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmoe::{_name}", _like_x, lib=_LIBRARY)
    torch.library.register_autograd(f"flashmoe::{_name}", _no_gradients, setup_context=_no_gradients, lib=_LIBRARY)


def _traced(on: bool, trace: Trace | None) -> Trace:
    if not on or trace is None:
        raise ValueError("no trace (accepted: trace=True, after a call)")
    return trace


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory; numpy has bfloat16 by ml_dtypes only."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: NDArray[Any]) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
