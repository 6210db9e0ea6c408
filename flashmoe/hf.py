"""The weights of a Qwen3-MoE block of transformers. Its experts are fused (transformers 5) or a list (4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashmoe.model import MoEModel

TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}

Tensors = tuple[Tensor, Tensor, Tensor]  # gate, gate_up, down


def read_block(block: nn.Module) -> tuple[MoEModel, Tensors]:
    """Sizes and tensors of a Qwen3MoeSparseMoeBlock; fused experts are not copied.

    Raises: ValueError when it is another kind of module.
    """
    found = {}
    for name in ("top_k", "norm_topk_prob"):
        # of the router in transformers 5, of the block in 4
        owners = [owner for owner in (block, getattr(block, "gate", None)) if hasattr(owner, name)]
        if not owners:
            raise ValueError(f"{type(block).__name__} has no {name} (accepted: Qwen3MoeSparseMoeBlock, a state dict)")
        found[name] = getattr(owners[0], name)
    probe = torch.linspace(-4, 4, 9)  # the class of the activation has changed with transformers' version
    for module in block.modules():
        activation = getattr(module, "act_fn", None)
        if activation is not None and not torch.allclose(activation(probe), nn.functional.silu(probe)):
            raise ValueError(f"the experts' activation is {activation} (accepted: SiLU)")
    return read_state(block.state_dict(), int(found["top_k"]), bool(found["norm_topk_prob"]))


def read_state(state: Mapping[str, Tensor], top_k: int, norm_topk_prob: bool) -> tuple[MoEModel, Tensors]:
    """As `read_block`, from the block's state dict: gate.weight, experts.gate_up_proj, experts.down_proj; or
    gate.weight, experts.0.gate_proj.weight, ...

    Raises: ValueError naming a tensor that is missing, unknown, or of a type that no layer has.
    """
    gate = _get(state, "gate.weight")
    fused = "experts.gate_up_proj" in state or "experts.down_proj" in state
    names = {"gate.weight"}
    if fused:
        names |= {"experts.gate_up_proj", "experts.down_proj"}
        gate_up, down = _get(state, "experts.gate_up_proj"), _get(state, "experts.down_proj")
    else:
        parts = {
            part: [f"experts.{expert}.{part}_proj.weight" for expert in range(len(gate))]
            for part in ("gate", "up", "down")
        }
        names |= {name for of_part in parts.values() for name in of_part}
        pairs = zip(parts["gate"], parts["up"], strict=True)
        gate_up = torch.stack([torch.cat((_get(state, g), _get(state, u))) for g, u in pairs])
        down = torch.stack([_get(state, name) for name in parts["down"]])
    if unknown := sorted(set(state) - names):  # a shared expert, a bias: leaving it out would give wrong results
        raise ValueError(f"{unknown[0]} is no part of a Qwen3-MoE layer")
    by_torch = {name: ours for ours, name in TORCH_DTYPES.items()}
    dtype = str(gate.dtype).removeprefix("torch.")
    if dtype not in by_torch:
        raise ValueError(f"gate.weight is {gate.dtype} (accepted: {', '.join(by_torch)})")
    model = MoEModel(
        d_model=gate.shape[1],
        d_ff=down.shape[-1],
        num_experts=len(gate),
        top_k=top_k,
        dtype=by_torch[dtype],
        norm_topk_prob=norm_topk_prob,
        name="hugging face",
    )
    return model, (gate, gate_up, down)


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the layer has no {name} (is it a Qwen3-MoE block?)")
    return state[name]
