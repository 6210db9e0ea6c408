"""Weights, tokens, routing and the right answer: sizes by hand, numbers against the numpy reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from flashmoe import reference
from flashmoe.bench import inputs
from flashmoe.model import MoEModel
from flashmoe.weights import Weights

MODEL = MoEModel(d_model=64, d_ff=32, num_experts=16, top_k=4)


@pytest.fixture(scope="module")
def sets() -> inputs.WeightSets:
    return inputs.WeightSets(MODEL, 2, "cpu", seed=1)


def to_numpy(tensor: Any) -> Any:
    return tensor.view(torch.int16).numpy().view(MODEL.numpy_dtype)


def test_two_sets_of_the_small_model_and_of_the_large_one_are_enough() -> None:
    # 128 experts of 3 x 2048 x 768 bf16 are 1.21 GB, so two are above 2 GB; one of the large model's 4.83 GB is, but
    # then each layer would follow itself
    assert inputs.num_weight_sets(MoEModel.preset("qwen3-30b-a3b")) == 2
    assert inputs.num_weight_sets(MoEModel.preset("qwen3-235b-a22b")) == 2
    assert inputs.num_weight_sets(MODEL) == math.ceil(2e9 / (16 * 3 * 64 * 32 * 2))


def test_all_experts_of_all_sets_are_one_piece_of_memory(sets: inputs.WeightSets) -> None:
    assert sets.all.nbytes == 2 * 16 * MODEL.expert_bytes
    first, second = sets.layers
    assert first.gate_up.data_ptr() == sets.all.data_ptr()
    assert second.down[-1, -1, -1].data_ptr() == sets.all[-1].data_ptr()
    assert sets[2] is first and sets[3] is second
    assert not torch.equal(first.gate_up, second.gate_up)


def test_distinct_experts_of_a_cell_by_hand(sets: inputs.WeightSets) -> None:
    cell = inputs.make_cell(MODEL, sets, 8, "one", 3, seed=0)  # all tokens to experts 0..3
    assert cell.distinct == [4, 4, 4]
    one = inputs.make_cell(MODEL, sets, 1, "gate", 2, seed=0)
    assert one.distinct == [4, 4]
    many = inputs.make_cell(MODEL, sets, 64, "gate", 2, seed=0)
    assert many.distinct == [len(set(layer.topk_idx.flatten().tolist())) for layer in many.layers]


@pytest.mark.parametrize("routing", ["gate", "uniform", "hot:1"])
def test_the_answer_is_that_of_the_numpy_reference(sets: inputs.WeightSets, routing: str) -> None:
    cell = inputs.make_cell(MODEL, sets, 5, routing, 2, seed=3)
    for number, layer in enumerate(cell.layers):
        held = sets[number]
        weights = Weights(gate=to_numpy(held.gate), gate_up=to_numpy(held.gate_up), down=to_numpy(held.down))
        x = to_numpy(layer.x)
        given = layer.topk_idx.numpy(), layer.topk_weights.numpy()
        if routing == "gate":  # the numpy router has to choose the same
            idx, scales = reference.route(reference.gate_logits(MODEL, weights, x), MODEL)
            assert np.array_equal(np.sort(idx), np.sort(given[0]))
            assert np.allclose(np.sort(scales), np.sort(given[1]), rtol=1e-5)
        wanted = reference.moe_layer(MODEL, weights, x, given)
        # the numpy one rounds silu(gate) * up to bf16
        assert reference.relative_error(layer.wanted.numpy(), wanted) < 4e-3


def test_no_token_has_a_close_choice(sets: inputs.WeightSets) -> None:
    gate = sets.layers[0].gate
    x = inputs.draw_tokens(MODEL, gate, 50, torch.Generator().manual_seed(0))
    assert x.shape == (50, 64) and x.dtype == torch.bfloat16
    ranked = (x.float() @ gate.float().T).sort(descending=True).values
    assert bool((ranked[:, 3].bfloat16() > ranked[:, 4].bfloat16()).all())


def test_tokens_of_a_model_that_takes_all_experts(sets: inputs.WeightSets) -> None:
    model = MoEModel(d_model=64, d_ff=32, num_experts=4, top_k=4)
    gate = sets.layers[0].gate[:4]
    assert inputs.draw_tokens(model, gate, 3, torch.Generator().manual_seed(0)).shape == (3, 64)


def test_hot_experts_are_taken_by_every_token_and_weights_sum_to_one() -> None:
    layers = inputs.make_routing(MODEL, "hot:2", 100, 3, seed=5)
    hot = []
    for idx, scales in layers:
        shared = set.intersection(*(set(row) for row in idx.tolist()))
        assert len(shared) == 2
        assert all(len(set(row)) == 4 for row in idx.tolist())
        assert set(idx[:, 2:].flatten().tolist()) | shared == set(range(16))  # the others spread over all
        assert np.allclose(scales.sum(axis=1), 1)
        hot.append(frozenset(shared))
    assert len(set(hot)) > 1  # drawn for each layer


def test_an_unknown_routing_is_named() -> None:
    with pytest.raises(ValueError, match="'hottest:1' is unknown"):
        inputs.make_routing(MODEL, "hottest:1", 4, 2, seed=0)


def test_the_error_of_the_worst_layer_counts_and_nan_is_never_right(sets: inputs.WeightSets) -> None:
    cell = inputs.make_cell(MODEL, sets, 2, "gate", 2, seed=0)
    wanted = [layer.wanted for layer in cell.layers]
    assert inputs.relative_error(wanted, cell.layers) == 0
    assert inputs.relative_error([wanted[0], 1.5 * wanted[1]], cell.layers) == pytest.approx(0.5)
    poisoned = wanted[1].clone()
    poisoned[0, 0] = float("nan")
    assert math.isnan(inputs.relative_error([2 * wanted[0], poisoned], cell.layers))
