"""Routing families against their probabilities, skew worked out by hand, files, and every refusal."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.model import MoEModel
from flashmoe.routing import Routing

MODEL = MoEModel(d_model=96, d_ff=40, num_experts=16, top_k=4, name="sixteen")
FAMILIES = {
    "uniform": Routing.uniform,
    "zipf": lambda *args, **kwargs: Routing.zipf(*args, **kwargs, exponent=1.2),
    "dirichlet": lambda *args, **kwargs: Routing.dirichlet(*args, **kwargs, alpha=0.01),
    "hot": lambda *args, **kwargs: Routing.hot(*args, **kwargs, num_hot=5),
    "one": Routing.one,
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def routing_of(*topk_idx, num_experts=6):
    """Return a routing of the given indices, one nested list per PE, with weights that do not matter."""
    idx = [np.array(rows, dtype=np.int64) for rows in topk_idx]
    return Routing(tuple(idx), tuple(np.ones(rows.shape) for rows in idx), num_experts)


# ---- what every family promises


@each_family
def test_tokens_have_distinct_experts_and_weights_that_sum_to_one(family):
    routing = family(MODEL, (3, 0, 50, 1), 4)
    assert routing.num_tokens == (3, 0, 50, 1)
    assert (routing.ep_size, routing.top_k, routing.num_experts) == (4, 4, 16)
    for idx, weights in zip(routing.topk_idx, routing.topk_weights, strict=True):
        assert idx.dtype == np.int32 and weights.dtype == np.float32
        assert all(len(set(token)) == 4 and set(token) <= set(range(16)) for token in idx.tolist())
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
        assert (np.diff(weights, axis=1) <= 0).all()  # descending, as a router gives them
    routing.check(MODEL)


@each_family
def test_same_seed_same_routing(family):
    first, again = family(MODEL, 20, 2, seed=7), family(MODEL, [20, 20], 2, seed=7)
    assert first.digest == again.digest
    np.testing.assert_array_equal(np.stack(first.topk_weights), np.stack(again.topk_weights))


@pytest.mark.parametrize("name", ["uniform", "zipf", "dirichlet", "hot"])
def test_seeds_and_pes_differ(name):
    routing = FAMILIES[name](MODEL, 20, 2, seed=7)
    assert routing.digest != FAMILIES[name](MODEL, 20, 2, seed=8).digest
    assert not np.array_equal(*routing.topk_idx)


@each_family
def test_a_token_keeps_its_experts_when_others_join(family):
    few, many = family(MODEL, (5, 7), 2), family(MODEL, (9, 8, 3, 3), 4)
    for pe, count in enumerate((5, 7)):
        np.testing.assert_array_equal(few.topk_idx[pe], many.topk_idx[pe][:count])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data())
def test_any_top_k_up_to_all_experts(num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    model = MoEModel(d_model=8, d_ff=8, num_experts=num_experts, top_k=top_k)
    for text in ("uniform", "zipf:2", "dirichlet:0.001", f"hot:{top_k}", "one"):
        routing = Routing.parse(text, model, 3, 1, seed=data.draw(st.integers(0, 5)))
        assert routing.name == text
        assert routing.expert_load().sum() == 3 * top_k
        assert routing.expert_load().max() <= 3


# ---- what each family is


def test_uniform_is_flat():
    # 16000 tokens, 4 of 16 experts each: binomial, mean 4000, standard deviation sqrt(16000 * 3/16) = 55.
    load = Routing.uniform(MODEL, 8000, 2).expert_load()
    assert abs(load - 4000).max() < 5 * 55


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.5])
def test_zipf_first_choices_follow_the_power_law(exponent):
    num_tokens = 20_000
    routing = Routing.zipf(MODEL, num_tokens, 1, exponent=exponent)
    counts = np.bincount(routing.topk_idx[0][:, 0], minlength=16)
    weights = [rank**-exponent for rank in range(1, 17)]
    expected = np.array(weights) / sum(weights) * num_tokens
    assert (abs(np.sort(counts)[::-1] - expected) < 5 * np.sqrt(expected)).all()


def test_zipf_second_choice_is_drawn_from_what_is_left():
    # Without replacement: P(second = b | first = a) = p_b / (1 - p_a). With exponent 1 over 4 experts
    # p = (12, 6, 4, 3) / 25, so the pair (rank 1, rank 2) has probability 12/25 * 6/13.
    model = MoEModel(d_model=8, d_ff=8, num_experts=4, top_k=2)
    idx = Routing.zipf(model, 50_000, 1, exponent=1.0).topk_idx[0]
    by_rank = np.argsort(-np.bincount(idx[:, 0], minlength=4))
    pair = ((idx[:, 0] == by_rank[0]) & (idx[:, 1] == by_rank[1])).mean()
    assert abs(pair - 12 / 25 * 6 / 13) < 5 * math.sqrt(0.22 * 0.78 / 50_000)


def test_zipf_popular_experts_depend_on_the_seed():
    routings = [Routing.zipf(MODEL, 500, 1, seed, exponent=2.0) for seed in range(9)]
    assert len({int(routing.expert_load().argmax()) for routing in routings}) > 3


def test_dirichlet_small_alpha_is_skewed_and_large_alpha_is_flat():
    skewed = Routing.dirichlet(MODEL, 500, 1, alpha=0.05).skew()["cv"]
    flat = Routing.dirichlet(MODEL, 500, 1, alpha=1000.0).skew()["cv"]
    assert flat < 0.15 < 0.8 < skewed


def test_hot_uses_only_the_hot_experts():
    load = Routing.hot(MODEL, 200, 2, num_hot=5).expert_load()
    assert np.count_nonzero(load) == 5
    # Each hot expert is in 4 of 5 draws: 400 tokens, mean 320, standard deviation sqrt(400 * 0.8 * 0.2) = 8.
    assert abs(load[load > 0] - 320).max() < 5 * 8


def test_one_sends_all_to_the_first_experts():
    routing = Routing.one(MODEL, (2, 0, 1, 3), 4)
    assert routing.topk_idx[0].tolist() == [[0, 1, 2, 3]] * 2
    assert routing.topk_weights[3].tolist() == [[0.25] * 4] * 3
    assert routing.expert_load().tolist() == [6] * 4 + [0] * 12


# ---- layers


def layers_of(text, correlation, num_layers=2, num_tokens=4000, model=MODEL, **arguments):
    return Routing.layers(text, model, num_tokens, 1, num_layers=num_layers, correlation=correlation, **arguments)


def renaming(before, after):
    """What each expert is called in the next layer, of fully correlated layers: where most of its slots go."""
    seen = np.zeros((before.num_experts,) * 2, dtype=int)
    np.add.at(seen, (before.topk_idx[0], after.topk_idx[0]), 1)
    return seen.argmax(axis=1)


@pytest.mark.parametrize("text", ["uniform", "zipf:1", "dirichlet:0.5", "hot:5"])
def test_full_correlation_only_renames_the_experts(text):
    layers = layers_of(text, 1.0, num_layers=3)
    assert [layer.name for layer in layers] == [text] * 3
    for before, after in itertools.pairwise(layers):
        renamed = renaming(before, after)
        used = np.unique(before.topk_idx[0])
        assert len(set(renamed[used])) == len(used) and (renamed[used] != used).any()
        np.testing.assert_array_equal(renamed[before.topk_idx[0]], after.topk_idx[0])
        np.testing.assert_array_equal(before.topk_weights[0], after.topk_weights[0])


def test_no_correlation_leaves_the_overlap_of_chance():
    # Two independent sets of 4 of 16 experts share 4 * 4 / 16 = 1 on average, hypergeometric variance
    # 4 * 1/4 * 3/4 * 12/15 = 0.6; whatever the renaming, so compare the names as they are.
    before, after = layers_of("uniform", 0.0)
    shared = (before.topk_idx[0][:, :, None] == after.topk_idx[0][:, None, :]).sum(axis=(1, 2))
    assert abs(shared.mean() - 1.0) < 5 * math.sqrt(0.6 / 4000)
    assert abs(shared.var() - 0.6) < 0.1


@pytest.mark.parametrize("correlation", [0.3, 0.8])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_a_first_choice_is_carried_over_with_the_correlation(exponent, correlation):
    # Carried with probability c, else drawn anew, and then the same by chance with probability sum p^2.
    before, after = layers_of(f"zipf:{exponent}", correlation, num_tokens=20_000)
    popularity = np.arange(1, 17) ** -exponent / (np.arange(1, 17) ** -exponent).sum()
    expected = correlation + (1 - correlation) * (popularity**2).sum()
    # The renaming comes from fully correlated layers of the same seed, which are renamed alike.
    renamed = renaming(*layers_of(f"zipf:{exponent}", 1.0, num_tokens=20_000))
    same = (renamed[before.topk_idx[0][:, 0]] == after.topk_idx[0][:, 0]).mean()
    assert abs(same - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_more_correlation_keeps_more_of_a_tokens_experts():
    renamed = renaming(*layers_of("uniform", 1.0))
    overlaps = []
    for correlation in (0.0, 0.25, 0.5, 0.75, 1.0):
        before, after = layers_of("uniform", correlation)
        overlaps.append((renamed[before.topk_idx[0]][:, :, None] == after.topk_idx[0][:, None, :]).sum() / 4000)
    assert overlaps == sorted(overlaps) and overlaps[-1] == 4.0 and abs(overlaps[0] - 1.0) < 0.1


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_every_layer_is_a_draw_of_the_family(correlation):
    # First choices of zipf:1 in the fifth layer, sorted, follow the power law as in the first.
    last = layers_of("zipf:1", correlation, num_layers=5, num_tokens=20_000)[-1]
    expected = 1 / np.arange(1, 17) / (1 / np.arange(1, 17)).sum() * 20_000
    counts = np.sort(np.bincount(last.topk_idx[0][:, 0], minlength=16))[::-1]
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_layers_start_with_the_one_of_parse_and_keep_when_more_join():
    one = Routing.parse("zipf:1", MODEL, (5, 7), 2, seed=3)
    two = Routing.layers("zipf:1", MODEL, (5, 7), 2, seed=3, num_layers=2, correlation=0.5)
    four = Routing.layers("zipf:1", MODEL, (9, 7, 1, 0), 4, seed=3, num_layers=4, correlation=0.5)
    assert two[0].digest == one.digest
    assert len({layer.digest for layer in four}) == 4
    for before, after in zip(two, four, strict=False):
        for pe, count in enumerate((5, 7)):
            np.testing.assert_array_equal(before.topk_idx[pe], after.topk_idx[pe][:count])


def test_layers_of_one_are_alike():
    assert {layer.digest for layer in layers_of("one", 0.5, num_layers=3)} == {Routing.one(MODEL, 4000, 1).digest}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_layers": 0}, "num_layers=0 (must be at least 1)"),
        ({"correlation": 1.5}, "correlation=1.5 (must be in 0..1)"),
        ({"correlation": -0.1}, "correlation=-0.1"),
        ({"correlation": math.nan}, "correlation=nan"),
    ],
)
def test_layers_name_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing.layers("uniform", MODEL, 2, 2, **arguments)


def test_default_sizes_fill_what_is_not_said():
    routing = Routing.parse("uniform", MODEL, ep_size=4, default=(3, 2))
    assert routing.num_tokens == (3, 3, 3, 3)


# ---- load, skew, digest


def test_load_skips_dropped_slots():
    assert routing_of([[0, 5], [5, -1]], [[-1, -1]]).expert_load().tolist() == [1, 0, 0, 0, 0, 2]


def test_skew_of_a_load_worked_out_by_hand():
    # Loads 0, 1, 3: mean 4/3, variance 14/9, Gini = (-2*0 + 0*1 + 2*3) / (3 * 4) = 1/2.
    skew = routing_of([[2], [2], [1], [2]], num_experts=3).skew()
    assert skew == pytest.approx(
        {
            "cv": math.sqrt(14 / 9) / (4 / 3),
            "max_over_mean": 9 / 4,
            "gini": 1 / 2,
            "entropy": 1 / 4 * 2 + 3 / 4 * math.log2(4 / 3),
        }
    )


def test_skew_of_all_to_one():
    # k of E experts share all: cv = sqrt(E/k - 1), max/mean = E/k, Gini = 1 - k/E, entropy = log2 k.
    skew = Routing.one(MODEL, 5, 1).skew()
    assert skew == pytest.approx({"cv": math.sqrt(3), "max_over_mean": 4.0, "gini": 0.75, "entropy": 2.0})


@pytest.mark.parametrize("rows", [[[0], [1], [2], [3]], np.empty((0, 1))], ids=["even", "no tokens"])
def test_skew_of_even_load(rows):
    even = {"cv": 0.0, "max_over_mean": 1.0, "gini": 0.0, "entropy": 2.0}
    assert routing_of(rows, num_experts=4).skew() == pytest.approx(even)


def test_load_and_skew_of_pes():
    # Experts 0, 1, 2 on PE 0 and 3, 4, 5 on PE 1: three slots and one. Mean 2, standard deviation 1.
    routing = routing_of([[0, 5], [2, -1]], [[1, -1]])
    assert routing.pe_load().tolist() == [3, 1]
    entropy = 3 / 4 * math.log2(4 / 3) + 1 / 4 * 2
    assert routing.skew("pes") == pytest.approx({"cv": 0.5, "max_over_mean": 1.5, "gini": 0.25, "entropy": entropy})
    assert routing.describe_skew() == (
        "load of the 6 experts: CV 0.71, max/mean 1.50, Gini 0.33, entropy 2.00 of 2.58 bits; "
        "load of the 2 PEs: CV 0.50, max/mean 1.50, Gini 0.25, entropy 0.81 of 1.00 bits"
    )
    with pytest.raises(ValueError, match=re.escape("of='pe' (accepted: experts, pes)")):
        routing.skew("pe")


def test_skew_of_pes_needs_as_many_experts_on_each():
    uneven = routing_of([[0]], [[0]], [[0]], num_experts=16)
    with pytest.raises(ValueError, match=re.escape("ep_size=3 (must divide num_experts=16)")):
        uneven.pe_load()
    assert "PEs" not in uneven.describe_skew() and "PEs" not in routing_of([[0]]).describe_skew()


def test_digest_tells_routings_apart():
    base = routing_of([[0, 1], [2, 3]])
    assert re.fullmatch("[0-9a-f]{16}", base.digest)
    others = [
        routing_of([[1, 0], [2, 3]]),
        routing_of([[0, 1]], [[2, 3]]),
        routing_of([[0], [1], [2], [3]]),
        routing_of([[0, 1], [2, 3]], num_experts=8),
    ]
    assert len({routing.digest for routing in (base, *others)}) == 5
    reweighted = Routing(base.topk_idx, tuple(2 * w for w in base.topk_weights), 6, "other name")
    assert reweighted.digest == base.digest


def test_arrays_are_copies_that_cannot_change():
    idx, weights = np.zeros((2, 1), dtype=np.int32), np.ones((2, 1), dtype=np.float32)
    routing = Routing((idx,), (weights,), 4)
    idx[0] = 3
    assert routing.topk_idx[0].tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="read-only"):
        routing.topk_idx[0][0] = 1


# ---- text and files


@pytest.mark.parametrize(
    "text, made",
    [
        ("uniform", Routing.uniform(MODEL, 6, 2, seed=3)),
        ("zipf:1.2", Routing.zipf(MODEL, 6, 2, seed=3, exponent=1.2)),
        ("dirichlet:0.5", Routing.dirichlet(MODEL, 6, 2, seed=3, alpha=0.5)),
        ("hot:5", Routing.hot(MODEL, 6, 2, seed=3, num_hot=5)),
        ("one", Routing.one(MODEL, 6, 2)),
    ],
)
def test_parse_makes_the_family(text, made):
    parsed = Routing.parse(text, MODEL, 6, 2, seed=3)
    assert (parsed.digest, parsed.name) == (made.digest, text)


def test_file_round_trip(tmp_path):
    routing = Routing(
        topk_idx=(np.array([[3, -1], [0, 5]]), np.empty((0, 2), dtype=int), np.array([[5, 4]])),
        topk_weights=(np.array([[0.75, 0.0], [0.5, 0.25]]), np.empty((0, 2)), np.array([[1.5, 0.1]])),
        num_experts=6,
        name="recorded",
    )
    routing.save(tmp_path / "r.npz")
    model = MoEModel(d_model=8, d_ff=8, num_experts=6, top_k=2)
    parsed = Routing.parse(str(tmp_path / "r.npz"), model, num_tokens=[2, 0, 1], ep_size=3)
    for loaded in (Routing.load(tmp_path / "r.npz"), parsed):
        assert (loaded.num_experts, loaded.name, loaded.num_tokens) == (6, "recorded", (2, 0, 1))
        assert loaded.digest == routing.digest
        for ours, theirs in zip(loaded.topk_weights, routing.topk_weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_parse_checks_a_file_against_what_was_asked(tmp_path):
    path = str(tmp_path / "r.npz")
    Routing.uniform(MODEL, (2, 3), 2).save(path)
    assert Routing.parse(path, MODEL).num_tokens == (2, 3)
    with pytest.raises(ValueError, match=r"ep_size=4, but .*r\.npz is for 2 PEs"):
        Routing.parse(path, MODEL, ep_size=4)
    with pytest.raises(ValueError, match=r"num_tokens=2, but .*r\.npz has \[2, 3\]"):
        Routing.parse(path, MODEL, num_tokens=2)
    with pytest.raises(ValueError, match=r"top_k=4 \(model 'custom': 2\)"):
        Routing.parse(path, MoEModel(d_model=8, d_ff=8, num_experts=16, top_k=2))


def test_load_names_what_is_wrong(tmp_path):
    path = tmp_path / "r.npz"
    arrays = {"topk_idx": np.zeros((2, 1), dtype=int), "topk_weights": np.ones((2, 1)), "num_experts": 4}
    with pytest.raises(ValueError, match=r"r\.npz .*No such file"):
        Routing.load(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"r\.npz .*not an npz file"):
        Routing.load(path)
    np.savez(path, topk_idx=arrays["topk_idx"])
    with pytest.raises(ValueError, match="no topk_weights, num_tokens, num_experts"):
        Routing.load(path)
    np.savez(path, **arrays, num_tokens=[3])
    with pytest.raises(ValueError, match=r"num_tokens=\[3\] does not add up to the 2 rows"):
        Routing.load(path)
    np.savez(path, **{**arrays, "topk_idx": np.full((2, 1), 4)}, num_tokens=[2])
    with pytest.raises(ValueError, match=r"r\.npz .*has expert 4"):
        Routing.load(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("zipff:1", "'zipff:1' is unknown (accepted: uniform, zipf:S, dirichlet:A, hot:N, one, FILE.npz, FILE.jsonl, "),
        ("zipff:1@strided", "routing 'zipff:1@strided' is unknown"),
        ("zipf:1@strode", "placement 'strode' is unknown (accepted: linear, strided, random, "),
        ("zipf:1@", "placement '' is unknown"),
        ("", "routing '' is unknown"),
        ("uniform:2", "'uniform:2': uniform takes no value"),
        ("one:", "'one:': one takes no value"),
        ("zipf", "'zipf': '' is not a number"),
        ("zipf:x", "'zipf:x': 'x' is not a number"),
        ("hot:2.5", "'hot:2.5': '2.5' is not an integer"),
        ("hot:3", "num_hot=3 (must be in top_k=4..num_experts=16)"),
        ("hot:17", "num_hot=17 (must be in"),
        ("zipf:-1", "exponent=-1.0 (must be finite and at least 0)"),
        ("zipf:nan", "exponent=nan"),
        ("dirichlet:0", "alpha=0.0 (must be finite and above 0)"),
    ],
)
def test_parse_names_bad_text(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing.parse(text, MODEL, 2, 2)


def test_parse_needs_counts_for_a_family():
    with pytest.raises(ValueError, match="'uniform' needs num_tokens and ep_size"):
        Routing.parse("uniform", MODEL)


@pytest.mark.parametrize(
    "num_tokens, ep_size, seed, message",
    [
        (-1, 2, 0, "num_tokens=-1 (must be"),
        ([1, 2, 3], 2, 0, "num_tokens=[1, 2, 3] (must be an integer of at least 0, or ep_size=2 of them)"),
        (1.5, 2, 0, "num_tokens=1.5 (must be"),
        (1, 3, 0, "ep_size=3 (must divide num_experts=16"),
        (1, 2, -1, "seed=-1 (must be at least 0)"),
    ],
)
def test_families_name_bad_counts(num_tokens, ep_size, seed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing.uniform(MODEL, num_tokens, ep_size, seed)


@pytest.mark.parametrize(
    "topk_idx, message",
    [
        ([[0, 6]], "topk_idx of PE 0 has expert 6 (must be in 0..5, or -1"),
        ([[0, -2]], "has expert -2"),
        ([[0, 1], [3, 3]], "token 1 of PE 0 has expert 3 twice"),
        ([0, 1], "topk_idx of PE 0 is int64 (2,) (must be integers (num_tokens, top_k >= 1))"),
        ([[], []], "is int64 (2, 0)"),
    ],
)
def test_bad_indices_are_named(topk_idx, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        routing_of(topk_idx)


def test_two_dropped_slots_are_not_the_same_expert():
    assert routing_of([[-1, -1, 2]]).top_k == 3


def test_pes_must_fit_each_other():
    idx, weights = np.zeros((2, 1), dtype=int), np.ones((2, 1))
    with pytest.raises(ValueError, match="topk_idx has 2 PEs and topk_weights 1"):
        Routing((idx, idx), (weights,), 4)
    with pytest.raises(ValueError, match="at least 1"):
        Routing((), (), 4)
    with pytest.raises(ValueError, match=r"topk_weights of PE 1 is \(1, 1\) \(topk_idx: \(2, 1\)\)"):
        Routing((idx, idx), (weights, weights[:1]), 4)
    with pytest.raises(ValueError, match=r"topk_weights of PE 0 has nan"):
        Routing((idx,), (weights * np.nan,), 4)
    with pytest.raises(ValueError, match=r"top_k=\[1, 2\] over the PEs"):
        Routing((idx, [[0, 1]]), (weights, [[1, 1]]), 4)
    with pytest.raises(ValueError, match="topk_idx of PE 0 is float64"):
        Routing((weights,), (weights,), 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": 8}, "routing 'uniform' has num_experts=16 (model 'sixteen': 8)"),
        ({"top_k": 3}, "routing 'uniform' has top_k=4 (model 'sixteen': 3)"),
    ],
)
def test_check_names_what_does_not_fit_the_model(change, message):
    other = MoEModel(**{**MODEL.to_dict(), **change})
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing.uniform(MODEL, 2, 2).check(other)


def test_check_refuses_uneven_experts():
    with pytest.raises(ValueError, match="ep_size=3"):
        routing_of([[0]], [[0]], [[0]], num_experts=16).check(MoEModel(**{**MODEL.to_dict(), "top_k": 1}))
