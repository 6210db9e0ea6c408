"""transformers' own Qwen3-MoE block, on the weights of a layer."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.model import MoEModel

torch = pytest.importorskip("torch", reason="install flashmoe[test] for the comparison with transformers")
qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")


def to_torch(array: NDArray[Any]) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def make_block(model: MoEModel, gate: Any, gate_up: Any, down: Any) -> Any:
    """The block on tensors of these shapes, wherever they are; it copies none of them."""
    config = qwen.Qwen3MoeConfig(
        hidden_size=model.d_model,
        moe_intermediate_size=model.d_ff,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.norm_topk_prob,
    )
    config._experts_implementation = "eager"  # the plain loop over experts
    with torch.device("meta"):
        block = qwen.Qwen3MoeSparseMoeBlock(config)
    tensors = {"gate.weight": gate, "experts.gate_up_proj": gate_up, "experts.down_proj": down}
    block.load_state_dict(tensors, assign=True)
    return block
