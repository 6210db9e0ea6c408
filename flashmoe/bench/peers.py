"""Other implementations of the layer: each a function that makes a callable for one layer's weights.

The callable takes x and, where the routing is given, topk_idx and topk_weights; it can be captured in a CUDA graph.
A peer that cannot be had raises an ImportError with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashmoe.model import MoEModel

if TYPE_CHECKING:  # their names are wanted where there is no torch
    from flashmoe.bench.inputs import LayerWeights, Tensor

Forward = Callable[..., Any]  # (x, topk_idx=None, topk_weights=None) -> (num_tokens, d_model)


def torch_grouped(model: MoEModel, weights: LayerWeights) -> Forward:
    """torch's grouped GEMM over tokens sorted by expert."""
    import torch
    import torch.nn.functional as F

    if not hasattr(F, "grouped_mm"):
        raise ImportError(f"torch {torch.__version__} has no grouped_mm (2.10 has)")
    up, down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)
    experts = torch.arange(model.num_experts, dtype=torch.int32, device=weights.gate.device)

    def forward(x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        if topk_idx is None or topk_weights is None:
            topk_weights, topk_idx = F.linear(x, weights.gate).softmax(-1, dtype=torch.float32).topk(model.top_k)
            topk_idx = topk_idx.int()
            if model.norm_topk_prob:
                topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        expert, order = topk_idx.reshape(-1).sort()
        ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
        hidden = F.grouped_mm(x[order // model.top_k], up, offs=ends)
        gate, linear = hidden.chunk(2, dim=-1)
        sorted_results = F.grouped_mm(F.silu(gate) * linear, down, offs=ends)
        results = torch.empty_like(sorted_results).index_copy_(0, order, sorted_results)  # by token again
        results = results.view(len(x), model.top_k, model.d_model)
        return torch.bmm(topk_weights.to(x.dtype).unsqueeze(1), results).squeeze(1)

    return forward


def transformers_block(model: MoEModel, weights: LayerWeights) -> Forward:
    """Qwen3MoeSparseMoeBlock of transformers with its grouped GEMM; its own loop over experts cannot be captured."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=model.d_model,
        moe_intermediate_size=model.d_ff,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.norm_topk_prob,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    if not hasattr(getattr(block, "experts", None), "gate_up_proj"):
        raise ImportError("this transformers keeps a matrix for each expert (5.0 has them in one tensor)")

    def parameter(tensor: Tensor) -> Any:
        return torch.nn.Parameter(tensor, requires_grad=False)

    block.gate.weight = parameter(weights.gate)
    block.experts.gate_up_proj, block.experts.down_proj = parameter(weights.gate_up), parameter(weights.down)

    def forward(x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        if topk_idx is None or topk_weights is None:
            return block(x.unsqueeze(0)).squeeze(0)
        return block.experts(x, topk_idx, topk_weights.to(x.dtype))

    return forward


def vllm_experts(model: MoEModel, weights: LayerWeights) -> Forward:
    """vLLM's Triton experts, with its own tuned file for the card if it has one, and its router."""
    import torch.nn.functional as F
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk

    config = VllmConfig()

    def forward(x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        with set_current_vllm_config(config):
            if topk_idx is None or topk_weights is None:
                logits = F.linear(x, weights.gate)
                # a third result in some versions
                topk_weights, topk_idx = fused_topk(x, logits, model.top_k, model.norm_topk_prob)[:2]
            return fused_experts(x, weights.gate_up, weights.down, topk_weights, topk_idx)

    return forward


PEERS: dict[str, Callable[[MoEModel, LayerWeights], Forward]] = {
    "vllm": vllm_experts,
    "torch": torch_grouped,
    "transformers": transformers_block,
}
