"""Placements worked out by hand, the least loaded PE by brute force, and layers that stay the same when placed."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import reference
from flashmoe.model import MoEModel
from flashmoe.placement import Placement
from flashmoe.routing import Routing
from flashmoe.weights import Weights

MODEL = MoEModel(d_model=16, d_ff=12, num_experts=6, top_k=3, dtype="f32", name="six")


def pes(placement, ep_size):
    """The experts of each PE."""
    return [sorted(experts.tolist()) for experts in np.split(placement.experts, ep_size)]


# ---- makers


def test_linear_and_strided():
    assert Placement.linear(6) == Placement((0, 1, 2, 3, 4, 5), "linear")
    assert pes(Placement.linear(6), 3) == [[0, 1], [2, 3], [4, 5]]
    assert pes(Placement.strided(6, 3), 3) == [[0, 3], [1, 4], [2, 5]]
    assert Placement.strided(6, 3).permutation == (0, 2, 4, 1, 3, 5)


def test_random_depends_on_the_seed():
    drawn = {Placement.random(6, seed).permutation for seed in range(20)}
    assert len(drawn) > 10
    assert Placement.random(6, 3) == Placement.random(6, 3)
    assert Placement.random(6, 3).name == "random:3"


def test_balanced_by_hand():
    # Heaviest first to the emptier PE: 9 -> PE 0; 7 -> PE 1; 6 -> PE 1 (7 < 9); 4 -> PE 0 (9 < 13); 2: PE 0 and 1 have
    # 13 each and PE 0 is lower, which fills it; 1 -> PE 1.
    placement = Placement.balanced([9, 2, 7, 4, 1, 6], 2)
    assert pes(placement, 2) == [[0, 1, 3], [2, 4, 5]]
    assert placement.experts.tolist() == [0, 1, 3, 2, 4, 5]


def test_balanced_keeps_an_equal_number_on_each_pe():
    # Without the limit PE 1 would take all five light experts.
    assert pes(Placement.balanced([100, 1, 1, 1, 1, 1], 2), 2) == [[0, 4, 5], [1, 2, 3]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_balanced_is_between_the_best_and_the_bound(load, ep_size):
    per_pe = 6 // ep_size
    best = min(
        max(sum(load[e] for e in order[pe * per_pe : (pe + 1) * per_pe]) for pe in range(ep_size))
        for order in itertools.permutations(range(6))
    )
    mine = max(sum(load[e] for e in experts) for experts in pes(Placement.balanced(load, ep_size), ep_size))
    assert best <= mine <= 2 * best


def test_balanced_evens_out_a_skewed_layer():
    model = MoEModel.preset("qwen3-30b-a3b")
    skews = {
        text: Routing.parse(f"zipf:1@{text}", model, 64, 8).skew("pes")["max_over_mean"]
        for text in ("linear", "strided", "balanced")
    }
    assert skews["balanced"] < 1.1 < 1.2 < min(skews["linear"], skews["strided"])


# ---- text and files


def test_parse_names_the_makers():
    routing = Routing.one(MODEL, 2, 3)
    assert Placement.parse("linear", routing) == Placement.linear(6)
    assert Placement.parse("strided", routing) == Placement.strided(6, 3)
    assert Placement.parse("random", routing, seed=5) == Placement.random(6, 5)
    assert Placement.parse("random:7", routing, seed=5) == Placement.random(6, 7)
    assert Placement.parse("balanced", routing) == Placement.balanced([2, 2, 2, 0, 0, 0], 3)


def test_layers_have_placements_of_their_own():
    layers = Routing.layers("zipf:1", MODEL, 50, 3, num_layers=3)
    drawn = Placement.for_layers("random", layers, seed=2)
    assert drawn[0] == Placement.random(6, 2) and len({placement.permutation for placement in drawn}) == 3
    for layer, placement in zip(layers, Placement.for_layers("balanced", layers), strict=True):
        assert placement == Placement.balanced(layer.expert_load(), 3)
    assert len(set(Placement.for_layers("strided", layers))) == 1


def test_files(tmp_path):
    layers = Routing.layers("uniform", MODEL, 4, 3, num_layers=2)
    slots = [[5, 4, 3, 2, 1, 0], [1, 0, 2, 3, 4, 5]]
    np.save(tmp_path / "p.npy", slots)
    (tmp_path / "p.json").write_text(json.dumps(slots[0]))
    found = Placement.for_layers(str(tmp_path / "p.npy"), layers)
    assert [placement.permutation for placement in found] == [tuple(row) for row in slots]
    found = Placement.for_layers(str(tmp_path / "p.json"), layers)
    assert [placement.permutation for placement in found] == [tuple(slots[0])] * 2
    routing = Routing.parse(f"uniform@{tmp_path}/p.json", MODEL, 4, 3)
    assert routing.expert_load().tolist() == layers[0].expert_load().tolist()[::-1]
    with pytest.raises(ValueError, match=re.escape("it has shape (2, 6), must be (6,) or (1, 6)")):
        Placement.parse(str(tmp_path / "p.npy"), layers[0])
    (tmp_path / "p.json").write_text("[0, 1, 2, 3, 4, 4]")
    with pytest.raises(ValueError, match=r"p\.json \(permutation lacks slot 5 \(must have each of 0\.\.5 once\)\)"):
        Placement.parse(str(tmp_path / "p.json"), layers[0])
    with pytest.raises(ValueError, match=r"cannot read a placement from none\.json .*No such file"):
        Placement.parse("none.json", layers[0])


@pytest.mark.parametrize("text", ["", "round", "random:", "random:-1", "random:x", "linear:1"])
def test_unknown_text_is_named(text):
    accepted = "linear, strided, random, random:SEED, balanced, FILE.json, FILE.npy"
    with pytest.raises(ValueError, match=re.escape(f"placement {text!r} is unknown (accepted: {accepted})")):
        Placement.parse(text, Routing.one(MODEL, 2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Placement((0, 2)), "permutation lacks slot 1 (must have each of 0..1 once)"),
        (lambda: Placement((0.0, 1.0)), "permutation is float64 (2,) (must be integers (num_experts,))"),
        (lambda: Placement(()), "permutation is float64 (0,)"),
        (lambda: Placement((0, 0, 1)), "permutation lacks slot 2"),
        (lambda: Placement.strided(6, 4), "ep_size=4 (must divide num_experts=6)"),
        (lambda: Placement.balanced([1, 2, 3], 0), "ep_size=0 (must divide num_experts=3)"),
        (lambda: Placement.balanced([1, -2], 1), "load=[1, -2] (must be (num_experts,) finite numbers"),
        (lambda: Placement.random(6, -1), "seed=-1"),
        (
            lambda: Routing.one(MODEL, 1, 1).placed(Placement.linear(4)),
            "placement is for 4 experts (the routing",
        ),
        (lambda: Weights.random(MODEL).placed(Placement.linear(4)), "placement is for 4 experts (the weights have 6)"),
    ],
)
def test_placements_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---- placed routing and weights


def test_placed_routing_renames_the_experts():
    placement = Placement((2, 0, 1, 5, 3, 4), "mine")
    routing = Routing((np.array([[0, 5, -1], [2, 1, 3]]),), (np.full((2, 3), 0.5),), 6, "given")
    placed = routing.placed(placement)
    assert placed.topk_idx[0].tolist() == [[2, 4, -1], [1, 0, 5]]
    assert placed.topk_weights[0].tolist() == routing.topk_weights[0].tolist()
    assert placed.name == "given@mine"
    assert placed.expert_load()[list(placement.permutation)].tolist() == routing.expert_load().tolist()
    assert placed.placed(Placement(tuple(placement.experts.tolist()))).digest == routing.digest
    assert routing.placed(Placement.linear(6)) is routing


@pytest.mark.parametrize("text", ["linear", "strided", "random:4", "balanced"])
def test_a_placed_name_makes_the_placed_routing_again(text):
    placed = Routing.parse(f"zipf:1@{text}", MODEL, 8, 3, seed=2)
    plain = Routing.parse("zipf:1", MODEL, 8, 3, seed=2)
    assert placed.digest == plain.placed(Placement.parse(text, plain, seed=2)).digest
    assert Routing.parse(placed.name, MODEL, 8, 3, seed=2).digest == placed.digest


def test_a_path_may_have_an_at(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    routing = Routing.uniform(MODEL, 3, 2)
    routing.save(folder / "r.npz")
    assert Routing.parse(f"{folder}/r.npz", MODEL).digest == routing.digest
    strided = routing.placed(Placement.strided(6, 2))
    assert Routing.parse(f"{folder}/r.npz@strided", MODEL).digest == strided.digest


@pytest.mark.parametrize("placement", [Placement.strided(6, 3), Placement.random(6, 1), Placement.linear(6)])
@pytest.mark.parametrize("gate", [True, False])
def test_a_placed_layer_computes_the_same(placement, gate):
    weights = Weights.random(MODEL, 3)
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    routing = None if gate else Routing.uniform(MODEL, 40, 1)
    placed = None if routing is None else routing.placed(placement)
    plain = reference.moe_layer(MODEL, weights, x, routing and (routing.topk_idx[0], routing.topk_weights[0]))
    moved = reference.moe_layer(
        MODEL, weights.placed(placement), x, placed and (placed.topk_idx[0], placed.topk_weights[0])
    )
    # Each token's three results are the same; the reference adds them by slot, so the sum rounds differently.
    assert reference.relative_error(moved, plain) < 3e-7


def test_the_gate_of_placed_weights_chooses_the_placed_experts():
    weights, placement = Weights.random(MODEL, 3), Placement.random(6, 1)
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    idx, topk_weights = reference.route(reference.gate_logits(MODEL, weights, x), MODEL)
    placed_idx, placed_weights = reference.route(reference.gate_logits(MODEL, weights.placed(placement), x), MODEL)
    np.testing.assert_array_equal(np.array(placement.permutation)[idx], placed_idx)
    np.testing.assert_allclose(topk_weights, placed_weights, rtol=1e-6)
