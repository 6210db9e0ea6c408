"""The reference layer against numbers by hand and against transformers' own Qwen3MoeSparseMoeBlock."""

import math
import re

import ml_dtypes
import numpy as np
import pytest

from flashmoe.model import MoEModel
from flashmoe.reference import gate_logits, moe_layer, relative_error, route
from flashmoe.weights import Weights

TINY = MoEModel(d_model=1, d_ff=1, num_experts=4, top_k=2, dtype="f32")


def tiny_weights(dtype=np.float32):
    """Return four experts of one number each: gate rows all 1, up rows 1..4, down 10, 100, 1000, 10000."""
    gate_up = np.array([[[1], [up]] for up in (1, 2, 3, 4)], dtype=dtype)
    down = np.array([[[scale]] for scale in (10, 100, 1000, 10000)], dtype=dtype)
    return Weights(gate=np.array([[1], [2], [3], [4]], dtype=dtype), gate_up=gate_up, down=down)


# ---- route


def test_route_takes_the_largest_in_descending_order():
    # exp of the logits: 1, 4, 2, 3, so probabilities 0.1, 0.4, 0.2, 0.3.
    logits = np.log(np.array([[1, 4, 2, 3]], dtype=np.float32))
    model = MoEModel(**{**TINY.to_dict(), "top_k": 3})
    idx, weights = route(logits, model)
    assert idx.dtype == np.int32 and idx.tolist() == [[1, 3, 2]]
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [[4 / 9, 3 / 9, 2 / 9]], rtol=1e-6)
    _, unscaled = route(logits, MoEModel(**{**model.to_dict(), "norm_topk_prob": False}))
    np.testing.assert_allclose(unscaled, [[0.4, 0.3, 0.2]], rtol=1e-6)


def test_route_breaks_ties_towards_the_lower_expert():
    logits = np.array([[0, 5, -1, 5], [2, 2, 2, 2], [-0.0, 0.0, 0.0, -1]], dtype=np.float32)
    idx, weights = route(logits, TINY)
    assert idx.tolist() == [[1, 3], [0, 1], [0, 1]]
    np.testing.assert_array_equal(weights, np.full((3, 2), 0.5, dtype=np.float32))
    many = MoEModel(**{**TINY.to_dict(), "num_experts": 128, "top_k": 8})  # short rows sort stably anyhow
    assert route(np.arange(128, dtype=np.float32)[None] % 2, many)[0].tolist() == [[*range(1, 17, 2)]]


def test_route_survives_large_logits_and_no_tokens():
    idx, weights = route(np.array([[1e4, -1e4, 0, 9999]], dtype=np.float32), TINY)
    assert idx.tolist() == [[0, 3]]
    np.testing.assert_allclose(weights[0], [1 / (1 + math.exp(-1)), 1 / (1 + math.e)], rtol=1e-6)
    assert [array.shape for array in route(np.empty((0, 4), np.float32), TINY)] == [(0, 2), (0, 2)]


def test_gate_logits_are_rounded_only_for_bf16():
    # 257 needs 9 bits; bf16 has 8 and ties go to even: 256.
    model = MoEModel(d_model=2, d_ff=1, num_experts=1, top_k=1, dtype="f32")
    ones = np.ones((1, 2, 2), dtype=np.float32)
    weights = Weights(gate=ones[0, :1], gate_up=ones, down=np.ones((1, 2, 1), dtype=np.float32))
    x = np.array([[256, 1]], dtype=np.float32)
    assert gate_logits(model, weights, x).tolist() == [[257]]
    bf16 = MoEModel(**{**model.to_dict(), "dtype": "bf16"})
    assert gate_logits(bf16, weights.cast("bf16"), x).tolist() == [[256]]


# ---- the layer, by hand


def silu(x):
    return x / (1 + math.exp(-x))


def test_layer_by_hand():
    # x = 2 goes to experts 3 and 2 (logits 8 and 6); an expert gives silu(x) * up * x * down.
    out = moe_layer(TINY, tiny_weights(), np.array([[2.0]], dtype=np.float32))
    share = 1 / (1 + math.exp(-2))
    expected = share * silu(2) * 8 * 10000 + (1 - share) * silu(2) * 6 * 1000
    assert out.dtype == np.float32
    assert out[0, 0] == pytest.approx(expected, rel=1e-6)


def test_layer_with_given_routing_skips_dropped_slots():
    idx = np.array([[0, -1], [-1, -1], [1, 0]])
    weights = np.array([[0.5, 9.0], [9.0, 9.0], [0.25, 2.0]])
    out = moe_layer(TINY, tiny_weights(), np.full((3, 1), 3.0, np.float32), (idx, weights))
    expected = [0.5 * silu(3) * 3 * 10, 0.0, 0.25 * silu(3) * 6 * 100 + 2.0 * silu(3) * 3 * 10]
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-6)


def test_layer_rounds_what_bf16_rounds():
    # silu(3) * 3 = 8.573...: between 8 and 16 bf16 steps by 1/16, so h = 8.5625; y = 85.625 is not rounded.
    bf16 = MoEModel(**{**TINY.to_dict(), "dtype": "bf16"})
    routing = (np.array([[0]]), np.array([[1.0]], dtype=np.float32))
    x = np.array([[3.0]], dtype=np.float32)
    assert moe_layer(bf16, tiny_weights(ml_dtypes.bfloat16), x, routing).tolist() == [[85.625]]


def test_layer_survives_large_activations_and_no_tokens():
    routing = (np.array([[0], [0]]), np.ones((2, 1)))
    out = moe_layer(TINY, tiny_weights(), np.array([[-500.0], [500.0]], dtype=np.float32), routing)
    assert out[:, 0].tolist() == [0.0, 2_500_000.0]  # silu(-500) = 0, silu(500) = 500
    assert moe_layer(TINY, tiny_weights(), np.empty((0, 1), dtype=np.float32)).shape == (0, 1)


@pytest.mark.parametrize(
    "x, routing, message",
    [
        (np.zeros((2, 3)), None, "x has shape (2, 3) (must be (num_tokens, d_model=1))"),
        (np.zeros((2, 3)), (np.zeros((2, 1), int), np.zeros((2, 1))), "x has shape (2, 3)"),
        (np.zeros((2, 1)), (np.zeros((1, 2), int), np.zeros((1, 2))), "routing has shapes (1, 2) and (1, 2)"),
        (np.zeros((2, 1)), (np.zeros((2, 2), int), np.zeros((2, 1))), "(must be (2, top_k), both)"),
        (np.zeros((1, 1)), (np.array([[0, 4]]), np.zeros((1, 2))), "expert 4 (must be in 0..3, or -1)"),
    ],
)
def test_layer_names_what_does_not_fit(x, routing, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moe_layer(TINY, tiny_weights(), x, routing)


def test_route_names_a_bad_shape():
    with pytest.raises(ValueError, match=re.escape("logits has shape (1, 3) (must be (num_tokens, 4))")):
        route(np.zeros((1, 3), dtype=np.float32), TINY)


# ---- relative_error


def test_relative_error_by_hand():
    # Differences 3 and 4, reference norm 10: 5 / 10.
    ours, theirs = [np.array([[9.0]]), np.array([[12.0]])], [np.array([[6.0]]), np.array([[8.0]])]
    assert relative_error(ours, theirs) == pytest.approx(0.5)
    assert relative_error(np.array([9.0, 12.0]), np.array([6.0, 8.0])) == pytest.approx(0.5)
    assert relative_error(np.array([1.0], ml_dtypes.bfloat16), np.array([2.0], np.float32)) == 0.5


def test_relative_error_at_the_edges():
    empty, zero, one = np.empty((0, 4)), np.zeros(2), np.ones(2)
    assert relative_error([empty, empty], [empty, empty]) == 0.0
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, zero) == math.inf
    assert math.isnan(relative_error(one * np.nan, one))
    assert math.isnan(relative_error(one * np.inf, one * np.inf))
    with pytest.raises(ValueError, match=r"outputs have shapes \[\(2,\)\] \(reference: \[\(2,\), \(2,\)\]\)"):
        relative_error([one], [one, one])


# ---- transformers' own block


def to_torch(array):
    torch = pytest.importorskip("torch")
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def to_numpy(tensor):
    return tensor.detach().float().numpy()


def block_of(model, weights):
    """Return transformers' block with these weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    block = Qwen3MoeSparseMoeBlock(
        transformers.Qwen3MoeConfig(
            hidden_size=model.d_model,
            moe_intermediate_size=model.d_ff,
            num_experts=model.num_experts,
            num_experts_per_tok=model.top_k,
            norm_topk_prob=model.norm_topk_prob,
        )
    ).to(torch.float32 if model.dtype == "f32" else torch.bfloat16)
    with torch.no_grad():
        block.gate.weight.copy_(to_torch(weights.gate))
        block.experts.gate_up_proj.copy_(to_torch(weights.gate_up))
        block.experts.down_proj.copy_(to_torch(weights.down))
    return block


def case(dtype, norm_topk_prob, d_model=96, d_ff=40, num_experts=6, top_k=2, num_tokens=33):
    model = MoEModel(
        d_model=d_model,
        d_ff=d_ff,
        num_experts=num_experts,
        top_k=top_k,
        dtype=dtype,
        norm_topk_prob=norm_topk_prob,
    )
    x = np.random.default_rng(1).standard_normal((num_tokens, d_model)).astype(model.numpy_dtype)
    weights = Weights.random(model, seed=2)
    return model, weights, x, block_of(model, weights)


SHAPES = [
    {},
    {"num_tokens": 1},
    {"top_k": 6},
    {"top_k": 1},
    {"d_model": 7, "d_ff": 3, "num_experts": 16, "top_k": 5},
]


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_f32_layer_agrees_with_transformers(norm_topk_prob, shape):
    model, weights, x, block = case("f32", norm_topk_prob, **shape)
    expected = to_numpy(block(to_torch(x)[None])[0])
    assert relative_error(moe_layer(model, weights, x), expected) < 1e-5


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_layer_agrees_with_transformers(norm_topk_prob, shape):
    model, weights, x, block = case("bf16", norm_topk_prob, **shape)
    # The block's own routing goes in: where two logits round to the same bf16 number, or the order of a sum
    # moves one across a rounding boundary, another expert is as right and gives quite other outputs.
    _, topk_weights, topk_idx = block.gate(to_torch(x))
    routing = (topk_idx.numpy(), to_numpy(topk_weights))
    expected = to_numpy(block(to_torch(x)[None])[0])
    assert relative_error(moe_layer(model, weights, x, routing), expected) < 1e-2


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_routing_agrees_with_transformers(dtype, norm_topk_prob):
    model, weights, x, block = case(dtype, norm_topk_prob, num_experts=32, top_k=4, num_tokens=200)
    logits = gate_logits(model, weights, x)
    idx, topk_weights = route(logits, model)
    their_logits, their_weights, their_idx = block.gate(to_torch(x))
    # A bf16 logit may land one step (2**-7 of its power of two) off: the sum's order decides the rounding.
    step = 2.0**-7 if dtype == "bf16" else 1e-5
    np.testing.assert_allclose(logits, to_numpy(their_logits), rtol=step, atol=1e-5)
    # Only tokens whose first five logits lie apart by more than such steps have but one right answer.
    top = -np.sort(-logits, axis=1)[:, : model.top_k + 1]
    clear = (-np.diff(top, axis=1) > 2 * step * np.abs(top).max()).all(axis=1)
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(idx[clear], their_idx.numpy()[clear])
    # bf16: their weights are themselves rounded to bf16, and two logits of up to 4 may each be a step off.
    np.testing.assert_allclose(
        topk_weights[clear], to_numpy(their_weights)[clear], rtol=1e-5 if dtype == "f32" else 0.05
    )


def test_bf16_layer_with_its_own_gate_agrees_where_no_logits_are_close():
    model, weights, x, block = case("bf16", True)
    logits = -np.sort(-gate_logits(model, weights, x), axis=1)
    clear = logits[:, 1] - logits[:, 2] > 2.0**-5  # the boundary between chosen and not chosen
    assert clear.sum() > 20
    expected = to_numpy(block(to_torch(x)[None])[0])
    assert relative_error(moe_layer(model, weights, x)[clear], expected[clear]) < 1e-2
