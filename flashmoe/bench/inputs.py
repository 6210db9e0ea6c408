"""What is computed: weights, tokens and routing, drawn on the device, and the right answer in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.bench.result import whole
from flashmoe.model import MoEModel
from flashmoe.routing import Routing

Tensor = Any  # torch.Tensor, of which mypy knows nothing

ROTATED_BYTES = 2_000_000_000  # layers one after the other read weights from at least so many: no cache has them


def num_weight_sets(model: MoEModel) -> int:
    """How many layers' weights make ROTATED_BYTES; at least 2, so that no layer follows itself."""
    return max(2, math.ceil(ROTATED_BYTES / (model.num_experts * model.expert_bytes)))


@dataclass(frozen=True)
class LayerWeights:
    """bf16. gate: (num_experts, d_model); gate_up: (num_experts, 2 d_ff, d_model), an expert's gate rows first;
    down: (num_experts, d_model, d_ff)."""

    gate: Tensor
    gate_up: Tensor
    down: Tensor


class WeightSets:
    """Random weights of several layers; those of all experts in one piece of memory."""

    def __init__(self, model: MoEModel, num_sets: int, device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        up_shape = (model.num_experts, 2 * model.d_ff, model.d_model)
        down_shape = (model.num_experts, model.d_model, model.d_ff)
        up_size, down_size = math.prod(up_shape), math.prod(down_shape)
        self.all = torch.empty(num_sets * (up_size + down_size), dtype=torch.bfloat16, device=device)
        self.layers: list[LayerWeights] = []
        for piece in self.all.chunk(num_sets):
            gate_up, down = piece[:up_size].view(up_shape), piece[up_size:].view(down_shape)
            for matrix in (gate_up, down):
                bound = math.sqrt(3 / matrix.shape[-1])  # variance 1 / inputs: values keep their size
                matrix.uniform_(-bound, bound, generator=generator)
            gate = torch.randn(model.num_experts, model.d_model, device=device, generator=generator)
            self.layers.append(LayerWeights((gate / math.sqrt(model.d_model)).bfloat16(), gate_up, down))

    def __getitem__(self, layer: int) -> LayerWeights:
        """Of a layer of the graph: the sets take turns."""
        return self.layers[layer % len(self.layers)]


@dataclass(frozen=True)
class LayerInput:
    """x: (num_tokens, d_model) bf16. topk_idx: (num_tokens, top_k) int32; topk_weights: float32 of the same shape.
    wanted: the layer's output in float32."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Cell:
    """One number of tokens with one kind of routing: an input for each layer of the graph."""

    tokens: int
    routing: str
    layers: list[LayerInput]
    distinct: list[int]  # experts of each layer that have a token


def make_cell(model: MoEModel, sets: WeightSets, tokens: int, routing: str, num_layers: int, seed: int) -> Cell:
    """routing: "gate", `hot:N` with fewer than top_k experts, or what `Routing.layers` takes.

    Raises: ValueError for a routing that is none of these.
    """
    device = sets.all.device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + tokens)
    given = None if whole(routing) == "gate" else make_routing(model, routing, tokens, num_layers, seed)
    layers = []
    for number in range(num_layers):
        weights = sets[number]
        if given is None:
            x = draw_tokens(model, weights.gate, tokens, generator)
            idx, scales = route(model, weights.gate, x)
        else:
            x = torch.randn(tokens, model.d_model, device=device, generator=generator).bfloat16()
            idx, scales = (torch.from_numpy(np.array(array)).to(device) for array in given[number])
        layers.append(LayerInput(x, idx, scales, reference(weights, x, idx, scales)))
    return Cell(tokens, routing, layers, [layer.topk_idx.unique().numel() for layer in layers])


def draw_tokens(model: MoEModel, gate: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, d_model) normal tokens, none with two logits so close at the edge of its top k that rounding decides.

    So everybody chooses the same experts, and one right answer serves all.
    """
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        x = torch.randn(2 * count, model.d_model, device=gate.device, generator=generator).bfloat16()
        if model.top_k < model.num_experts:
            edge = (x.float() @ gate.float().T).topk(model.top_k + 1).values[:, -2:]
            # bf16 has 8 bits: a rounded logit is off by at most 2^-9 of it, or 2^-8 just above a power of two
            x = x[edge[:, 0] - edge[:, 1] > 2**-6 * edge.abs().amax(1)]
        kept.append(x)
    return torch.cat(kept)[:count].contiguous()


def route(model: MoEModel, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """topk_idx int32 and topk_weights float32, (num_tokens, top_k): softmax over bf16 logits, as in transformers."""
    logits = (x.float() @ gate.float().T).bfloat16().float()
    scales, idx = logits.softmax(-1).topk(model.top_k)
    if model.norm_topk_prob:
        scales = scales / scales.sum(-1, keepdim=True)
    return idx.int().contiguous(), scales.contiguous()


def make_routing(
    model: MoEModel, routing: str, tokens: int, num_layers: int, seed: int
) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """For each layer topk_idx and topk_weights, (tokens, top_k). Raises: ValueError as `Routing.layers`."""
    number = routing.removeprefix("hot:")
    if number != routing and number.isdecimal() and 0 < int(number) < model.top_k:
        return _with_hot_experts(model, int(number), tokens, num_layers, seed)
    drawn = Routing.layers(routing, model, tokens, 1, seed, num_layers=num_layers)
    return [(layer.topk_idx[0], layer.topk_weights[0]) for layer in drawn]


def _with_hot_experts(
    model: MoEModel, num_hot: int, tokens: int, num_layers: int, seed: int
) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Every token takes the same num_hot experts, and its others evenly from all."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in Routing.layers("uniform", model, tokens, 1, seed, num_layers=num_layers):
        hot = rng.choice(model.num_experts, num_hot, replace=False).astype(np.int32)
        rows = [[*hot, *(e for e in row if e not in hot)][: model.top_k] for row in layer.topk_idx[0]]
        layers.append((np.array(rows, np.int32).reshape(tokens, model.top_k), layer.topk_weights[0]))
    return layers


def reference(weights: LayerWeights, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """The layer in float32, expert by expert: (num_tokens, d_model)."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_idx.unique().tolist():
        token, slot = (topk_idx == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ weights.gate_up[expert].float().T).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ weights.down[expert].float().T
        out.index_add_(0, token, result * topk_weights[token, slot, None])
    return out


def relative_error(outputs: Sequence[Tensor], layers: Sequence[LayerInput]) -> float:
    """The largest of all layers: Frobenius norm of the difference over that of the right answer; NaN if one is."""
    errors = [
        ((out.float() - layer.wanted).norm() / layer.wanted.norm()).item()
        for out, layer in zip(outputs, layers, strict=True)
    ]
    return float(np.max(errors))  # NaN wins, unlike in max()
