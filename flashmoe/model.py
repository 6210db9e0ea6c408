"""The sizes of one mixture-of-experts layer: all that tasks and cost models need to know of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}

# Sizes as in config.json of Qwen/Qwen3-30B-A3B and Qwen/Qwen3-235B-A22B on huggingface.co.
MODEL_PRESETS: dict[str, dict[str, int]] = {
    "qwen3-30b-a3b": {"d_model": 2048, "d_ff": 768, "num_experts": 128, "top_k": 8},
    "qwen3-235b-a22b": {"d_model": 4096, "d_ff": 1536, "num_experts": 128, "top_k": 8},
}


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """One mixture-of-experts layer with SwiGLU experts, as in Qwen3-MoE.

    Raises: ValueError naming the size that is out of range, or the unknown dtype.
    """

    d_model: int
    d_ff: int  # of one expert
    num_experts: int  # over all PEs
    top_k: int  # experts per token
    dtype: str = "bf16"  # of weights and activations; sums are always float32
    norm_topk_prob: bool = True  # the chosen experts' weights are scaled to sum to 1
    name: str = "custom"

    def __post_init__(self) -> None:
        for field in ("d_model", "d_ff", "num_experts", "top_k"):
            value = getattr(self, field)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} (must be an integer of at least 1)")
            object.__setattr__(self, field, int(value))  # numpy integers would not go into JSON
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} (must be in 1..num_experts={self.num_experts})")
        if self.dtype not in NUMPY_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} (accepted: {', '.join(NUMPY_DTYPES)})")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MoEModel:
        """Return a known layer; overrides replace single fields, e.g. dtype="f32"."""
        if name not in MODEL_PRESETS:
            raise ValueError(f"model {name!r} is unknown (presets: {', '.join(MODEL_PRESETS)})")
        return cls(**{"name": name, **MODEL_PRESETS[name], **overrides})

    @classmethod
    def load(cls, model: str | MoEModel) -> MoEModel:
        """A model as it is, a preset's name, or the folder of a checkpoint."""
        if isinstance(model, MoEModel):
            return model
        is_folder = model not in MODEL_PRESETS and Path(model).is_dir()
        return cls.from_checkpoint(model) if is_folder else cls.preset(model)

    @classmethod
    def from_checkpoint(cls, folder: str | PathLike[str]) -> MoEModel:
        """Read the sizes from config.json of a Hugging Face Qwen3-MoE folder.

        float16 becomes "f32", which holds it exactly. No dtype means float32, as in transformers.
        Raises: ValueError when the file is missing or unreadable, or describes another kind of model.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path} ({error})") from error
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "qwen3_moe":
            raise ValueError(f"{path}: model_type={kind!r} (accepted: 'qwen3_moe')")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: hidden_act={config['hidden_act']!r} (accepted: 'silu')")
        # transformers 5 writes num_local_experts and dtype, transformers 4 num_experts and torch_dtype.
        fields = {
            "d_model": ("hidden_size",),
            "d_ff": ("moe_intermediate_size",),
            "num_experts": ("num_experts", "num_local_experts"),
            "top_k": ("num_experts_per_tok",),
        }
        sizes: dict[str, Any] = {}
        for field, keys in fields.items():
            found = [config[key] for key in keys if key in config]
            if not found:
                raise ValueError(f"{path} has no {' or '.join(keys)}")
            sizes[field] = found[0]
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        known = {"bfloat16": "bf16", "float32": "f32", "float16": "f32"}
        if dtype not in known:
            raise ValueError(f"{path}: dtype={dtype!r} (accepted: {', '.join(known)})")
        return cls(
            **sizes,
            dtype=known[dtype],
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),  # false is transformers' default
            name=path.parent.resolve().name,
        )

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of weights and activations: ml_dtypes.bfloat16 or float32."""
        return NUMPY_DTYPES[self.dtype]

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation: 2 or 4."""
        return self.numpy_dtype.itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices: gate and up projection, down projection."""
        return 3 * self.d_model * self.d_ff * self.element_bytes

    @property
    def gate_bytes(self) -> int:
        """Bytes of the router's matrix."""
        return self.num_experts * self.d_model * self.element_bytes

    def experts_per_pe(self, ep_size: int) -> int:
        """Return how many experts a PE owns: PE r has experts r*n .. (r+1)*n - 1.

        Raises: ValueError when ep_size does not divide num_experts.
        """
        if ep_size < 1 or self.num_experts % ep_size:
            divisors = [str(n) for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(f"ep_size={ep_size} (must divide num_experts={self.num_experts}: {', '.join(divisors)})")
        return self.num_experts // ep_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; MoEModel(**d) is the same model."""
        return asdict(self)
