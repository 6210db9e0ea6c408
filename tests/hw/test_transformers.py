"""The layer against transformers' own Qwen3-MoE block, on the same weights."""

import ml_dtypes
import numpy as np
import pytest
from layers import tokens

from flashmoe.hw import run
from flashmoe.model import MoEModel
from flashmoe.reference import gate_logits, relative_error
from flashmoe.routing import Routing
from flashmoe.tasks import Tiling
from flashmoe.weights import Weights

torch = pytest.importorskip("torch", reason="install flashmoe[test] for the comparison with transformers")
qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")

ERROR = {"f32": 1e-5, "bf16": 1e-2}
ODD = {"d_model": 96, "d_ff": 40, "num_experts": 6, "top_k": 2}
EVEN = {"d_model": 64, "d_ff": 48, "num_experts": 6, "top_k": 4}


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def make_block(model, weights):
    config = qwen.Qwen3MoeConfig(
        hidden_size=model.d_model,
        moe_intermediate_size=model.d_ff,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.norm_topk_prob,
    )
    config._experts_implementation = "eager"  # the plain loop over experts
    block = qwen.Qwen3MoeSparseMoeBlock(config).to(to_torch(weights.gate).dtype)
    block.load_state_dict(
        {
            "gate.weight": to_torch(weights.gate),
            "experts.gate_up_proj": to_torch(weights.gate_up),
            "experts.down_proj": to_torch(weights.down),
        }
    )
    return block


def from_transformers(model, weights, x):
    """The block's outputs, float32, cut like x; all PEs' tokens as one batch."""
    with torch.no_grad():
        outputs = make_block(model, weights)(to_torch(np.concatenate(x))[None])
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    cuts = np.cumsum([len(rows) for rows in x])[:-1]
    return np.split(outputs[0].float().numpy(), cuts)


def tokens_without_ties(model, weights, counts):
    """Tokens whose last chosen and first refused expert are far enough apart that rounding cannot swap them.

    In bf16 logits are rounded to 8 bits, so two experts are equal now and then; which one is chosen then depends on
    the order in which a product was summed. That is no error, and another expert is another result.
    """
    for seed in range(200):
        x = tokens(model, counts, seed)
        logits = -np.sort(-gate_logits(model, weights, np.concatenate(x)), axis=1)
        gap = logits[:, model.top_k - 1] - logits[:, model.top_k]
        # two steps of bf16 at this size; many times the noise of a float32 sum
        if (gap > 2**-6 * np.abs(logits).max(axis=1)).all():
            return x
    raise AssertionError("no seed without near-ties")


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
    block = make_block(model, weights)
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
