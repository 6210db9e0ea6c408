"""Expert counts expanded to tokens: exact where they can be, in proportion where not, and random between."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.counts import expand_counts, scaled_counts
from flashmoe.model import MoEModel
from flashmoe.routing import Routing


def rng(seed=0):
    return np.random.default_rng(seed)


def counts_of(idx, num_experts):
    return np.bincount(idx.ravel(), minlength=num_experts)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_table_of_just_these_tokens_comes_back(data):
    # Any table that real tokens can have: draw the tokens, count, expand.
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    num_tokens = data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 99))
    skew = np.arange(1, num_experts + 1) ** -data.draw(st.sampled_from([0.0, 3.0]))
    drawn = [rng((seed, token)).choice(num_experts, top_k, False, skew / skew.sum()) for token in range(num_tokens)]
    table = counts_of(np.array(drawn), num_experts)
    idx = expand_counts(table, num_tokens, top_k, rng(seed))
    assert idx.shape == (num_tokens, top_k)
    assert all(len(set(token)) == top_k for token in idx.tolist())
    assert counts_of(idx, num_experts).tolist() == table.tolist()


def test_all_assignments_with_the_counts_are_as_likely():
    # Four tokens, one expert each, counts (2, 1, 1): 4! / (2! 1! 1!) = 12 assignments.
    draws = 1200
    seen = Counter(tuple(expand_counts([2, 1, 1], 4, 1, rng(seed)).ravel()) for seed in range(draws))
    assert len(seen) == 12
    assert all(abs(count - draws / 12) < 5 * np.sqrt(draws / 12) for count in seen.values())


def test_experts_meet_in_tokens_by_chance():
    # Six tokens, two of four experts each, three tokens an expert: of all such assignments, found by brute force,
    # count in how many tokens experts 0 and 1 meet.
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    choices = np.array(list(itertools.product(range(6), repeat=6)))
    degrees = np.array([(pairs[choices] == expert).sum(axis=(1, 2)) for expert in range(4)])
    met = (choices[(degrees == 3).all(axis=0)] == 0).sum(axis=1)
    draws = 800
    drawn = [
        sum(set(token) == {0, 1} for token in expand_counts([3] * 4, 6, 2, rng(seed)).tolist()) for seed in range(draws)
    ]
    assert abs(np.mean(drawn) - met.mean()) < 5 * met.std() / np.sqrt(draws)
    assert abs(np.var(drawn) - met.var()) < 0.2 * met.var()


def test_scaled_counts_keep_the_proportion_on_average():
    # 10 tokens of 2 slots from counts 1 : 2 : 4 : 1: shares of 20 are 2.5, 5, 10, 2.5; nothing is above 10.
    drawn = np.array([scaled_counts([100, 200, 400, 100], 10, 2, rng(seed)) for seed in range(2000)])
    assert (drawn.sum(axis=1) == 20).all()
    assert set(np.unique(drawn[:, 0])) == {2, 3} and (drawn[:, 2] == 10).all()
    np.testing.assert_allclose(drawn.mean(axis=0), [2.5, 5, 10, 2.5], atol=5 * 0.5 / np.sqrt(2000))


def test_no_expert_gets_more_slots_than_there_are_tokens():
    # 3 tokens, 2 slots: expert 0 would have 5.4 of 6 and is capped at 3, the other three share 3 as 2 : 1 : 1,
    # so 1.5, 0.75, 0.75.
    drawn = np.array([scaled_counts([900, 50, 25, 25], 3, 2, rng(seed)) for seed in range(2000)])
    assert (drawn[:, 0] == 3).all() and (drawn.sum(axis=1) == 6).all()
    np.testing.assert_allclose(drawn.mean(axis=0), [3, 1.5, 0.75, 0.75], atol=5 * 0.5 / np.sqrt(2000))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_as_many_experts_as_slots_are_all_chosen(num_tokens):
    assert scaled_counts([0, 5, 1, 0, 90], num_tokens, 3, rng()).tolist() == [0, num_tokens, num_tokens, 0, num_tokens]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(1, 10**9)), min_size=4, max_size=40), st.integers(0, 300))
def test_scaled_counts_always_fit(counts, num_tokens):
    if np.count_nonzero(counts) < 3:
        counts = [1, 1, 1, *counts]
    exact = scaled_counts(counts, num_tokens, 3, rng())
    assert exact.sum() == 3 * num_tokens
    assert exact.min() >= 0 and exact.max() <= num_tokens
    assert (exact[np.array(counts) == 0] == 0).all()


def test_routing_from_counts():
    model = MoEModel(d_model=8, d_ff=8, num_experts=4, top_k=2)
    routing = Routing.from_counts([1, 5, 3, 1], model, (2, 3), 2, seed=4, name="mine")
    assert routing.expert_load().tolist() == [1, 5, 3, 1]
    assert (routing.num_tokens, routing.name) == ((2, 3), "mine")
    assert {weight for rows in routing.topk_weights for weight in rows.ravel()} == {0.5}
    other = Routing.from_counts([1, 5, 3, 1], model, (2, 3), 2, seed=5)
    assert other.digest != routing.digest


@pytest.mark.parametrize(
    "counts, message",
    [
        ([1, 1, 1], "counts have shape (3,) (must be (4,), one an expert)"),
        ([0, 9, 0, 0], "only 1 experts have a count (top_k=2 needs as many)"),
        ([1, 1, 1, -1], "counts have -1"),
        ([1, 1, 1, np.inf], "counts have inf"),
    ],
)
def test_counts_that_do_not_fit_are_named(counts, message):
    model = MoEModel(d_model=8, d_ff=8, num_experts=4, top_k=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing.from_counts(counts, model, 2, 2)
