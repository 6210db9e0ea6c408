"""The layer against transformers' own Qwen3-MoE block, on the same weights."""

import numpy as np
import pytest
from layers import ERROR, tokens, tokens_without_ties
from qwen import make_block, to_torch, torch

from flashmoe.hw import run
from flashmoe.model import MoEModel
from flashmoe.reference import relative_error
from flashmoe.routing import Routing
from flashmoe.tasks import Tiling
from flashmoe.weights import Weights

ODD = {"d_model": 96, "d_ff": 40, "num_experts": 6, "top_k": 2}
EVEN = {"d_model": 64, "d_ff": 48, "num_experts": 6, "top_k": 4}


def block_of(model, weights):
    return make_block(model, to_torch(weights.gate), to_torch(weights.gate_up), to_torch(weights.down))


def from_transformers(model, weights, x):
    """The block's outputs, float32, cut like x; all PEs' tokens as one batch."""
    with torch.no_grad():
        outputs = block_of(model, weights)(to_torch(np.concatenate(x))[None])
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    cuts = np.cumsum([len(rows) for rows in x])[:-1]
    return np.split(outputs[0].float().numpy(), cuts)


@pytest.mark.parametrize("counts", [[7], [4, 3], [1, 0, 5], [1, 0, 2, 0, 3, 1]], ids=lambda counts: f"{len(counts)}pe")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_gate_inside(dtype, sizes, norm, counts):
    model = MoEModel(**sizes, dtype=dtype, norm_topk_prob=norm)
    weights = Weights.random(model, seed=11)
    x = tokens_without_ties(model, weights, counts)
    theirs = from_transformers(model, weights, x)
    for policy, tiling in (("ancestor", None), ("ticket", None), ("push", Tiling(down="rows"))):
        result = run(model, weights, x, policy=policy, tiling=tiling, workers=3, deadline_s=30)
        assert relative_error(result.outputs, theirs) < ERROR[dtype], policy


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_routing_from_transformers_own_router(dtype, norm):
    model = MoEModel(**ODD, dtype=dtype, norm_topk_prob=norm)
    weights = Weights.random(model, seed=12)
    x = tokens(model, [6, 0, 3], seed=1)  # near-ties do not matter here: both use one choice
    block = block_of(model, weights)
    with torch.no_grad():
        _, scores, chosen = block.gate(to_torch(np.concatenate(x)))
    cuts = np.cumsum([len(rows) for rows in x])[:-1]
    routing = Routing(
        tuple(np.split(chosen.numpy().astype(np.int32), cuts)),
        tuple(np.split(scores.float().numpy(), cuts)),
        model.num_experts,
    )
    theirs = from_transformers(model, weights, x)
    for tiling in (Tiling(), Tiling(down="rows", experts_per_pick=1), Tiling(granularity="token")):
        result = run(model, weights, x, tiling=tiling, routing=routing, workers=2, deadline_s=30)
        assert relative_error(result.outputs, theirs) < ERROR[dtype]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_token_on_the_same_experts(dtype):
    model = MoEModel(**ODD, dtype=dtype)
    drawn = Weights.random(model, seed=13)
    gate = np.zeros_like(drawn.gate)
    gate[1], gate[4] = 1, 0.5  # the sum of a token decides: experts 1 and 4 for positive, never 0, 2, 3, 5
    weights = Weights(gate, drawn.gate_up, drawn.down)
    x = [np.abs(rows) for rows in tokens(model, [5, 4], seed=2)]
    result = run(model, weights, x, workers=4, deadline_s=30)
    assert {tuple(row) for idx in result.routing.topk_idx for row in idx.tolist()} == {(1, 4)}
    assert relative_error(result.outputs, from_transformers(model, weights, x)) < ERROR[dtype]
