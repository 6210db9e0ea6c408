"""Percentiles over seeds and their intervals: by hand, against scipy, and by counting how often they hold."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from flashmoe import MoEModel, Routing
from flashmoe.replicate import Estimate, mean, quantile, replicate
from flashmoe.sim import evaluate

SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")


def draw(seed: int) -> Routing:
    return Routing.uniform(SMALL, 3, ep_size=2, seed=seed)


def test_quantile_by_hand() -> None:
    # of 6 runs, none is below the median with probability 1/64 < 2.5 %, and at most one with 7/64
    assert quantile(np.array([6.0, 1, 3, 2, 5, 4]), 0.5) == Estimate(3, 1, 6)
    # of 5 the least is above the median with probability 1/32 already
    assert quantile(np.arange(5.0), 0.5) == Estimate(2, None, None)
    assert quantile(np.arange(5.0), 0.5, level=0.9) == Estimate(2, 0, 4)


def test_a_high_percentile_needs_many_runs_for_its_upper_end() -> None:
    # all n runs are below p99 with probability 0.99**n, which is 2.5 % at n = 367.04
    assert quantile(np.arange(367.0), 0.99).high is None
    assert quantile(np.arange(368.0), 0.99).high == 367


@pytest.mark.parametrize("n", [3, 20, 101, 2000])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_quantile_against_scipy(n: int, p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    sample = np.random.default_rng(n).gamma(2.0, size=n)
    ours = quantile(sample, p)
    theirs = stats.quantile_test(sample, q=1.0, p=p).confidence_interval(confidence_level=0.95)
    assert ours.low == (None if np.isnan(theirs.low) else theirs.low)
    assert ours.high == (None if np.isnan(theirs.high) else theirs.high)
    assert ours.low is None or ours.low <= ours.value
    assert ours.high is None or ours.value <= ours.high


def test_an_interval_holds_the_true_quantile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    true = -np.log(1 - 0.9)  # of the exponential distribution
    num_held = 0
    for _ in range(2000):
        estimate = quantile(rng.exponential(size=60), 0.9, level=0.8)
        assert estimate.low is not None and estimate.high is not None
        num_held += estimate.low <= true <= estimate.high
    # at least 80 %, and not much more: 80.0 to 90 with a standard deviation of 0.9
    assert 0.78 < num_held / 2000 < 0.92


def test_mean_by_hand() -> None:
    pytest.importorskip("scipy.stats")
    # 97.5 % of Student's t with one degree of freedom, a Cauchy distribution, lie below tan(0.475 pi)
    estimate = mean(np.array([4.0, 6.0]))
    error = np.tan(0.475 * np.pi)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((5, 5 - error, 5 + error))
    assert mean(np.array([7.0, 7.0, 7.0])) == Estimate(7, 7, 7)
    assert mean(np.array([7.0])) == Estimate(7, None, None)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_interval_holds_the_true_mean_as_often_as_it_says(n: int) -> None:
    pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    num_held = 0
    for _ in range(2000):
        estimate = mean(rng.normal(50, 3, size=n))
        assert estimate.low is not None and estimate.high is not None
        num_held += estimate.low <= 50 <= estimate.high
    assert num_held / 2000 == pytest.approx(0.95, abs=0.015)  # three standard deviations


def test_without_scipy_the_mean_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert mean(np.array([4.0, 6.0])) == Estimate(5, None, None)


def test_replicate_runs_each_seed() -> None:
    fixed, options = draw(0), {"workers": 3, "policy": "ticket"}
    runs = replicate(SMALL, routing=fixed, seeds=[4, 2], **options)
    assert runs.seeds == (4, 2)
    assert runs.makespan_us.tolist() == [
        evaluate(SMALL, routing=fixed, seed=seed, **options).makespan_us for seed in (4, 2)
    ]
    assert runs.makespan_us[0] != runs.makespan_us[1]  # the machine's jitter
    summary = runs.summary()
    assert list(summary) == ["mean", "p50", "p90", "p99"]
    assert summary["mean"].value == pytest.approx(runs.makespan_us.mean())
    assert summary["p99"].value == runs.makespan_us.max()


def test_replicate_may_draw_the_routing_too() -> None:
    done = []
    runs = replicate(
        SMALL,
        routing=lambda seed: [draw(seed), draw(seed + 10)],
        seeds=3,
        workers=3,
        progress=lambda *counts: done.append(counts),
    )
    assert runs.seeds == (0, 1, 2)
    assert runs.makespan_us[2] == evaluate(SMALL, routing=[draw(2), draw(12)], seed=2, workers=3).makespan_us
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": 0}, "seeds=0"), ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"), ({"seeds": 2, "level": 1}, "level=1")],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replicate(SMALL, routing=draw(0), **options)  # type: ignore[arg-type]
