"""The same run with many seeds: what the makespan is usually, rarely and on average, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.model import MoEModel
from flashmoe.routing import Routing
from flashmoe.sim import evaluate

__all__ = ["PERCENTILES", "Estimate", "Replication", "mean", "quantile", "replicate"]

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}

Routings = Routing | Sequence[Routing]


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample and its confidence interval; None where that end is not known."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class Replication:
    """The makespans of runs that differ in their seed alone.

    seeds, makespan_us: (n,) each. level: confidence of the intervals.
    """

    seeds: tuple[int, ...]
    makespan_us: NDArray[np.float64]
    level: float = 0.95

    def summary(self) -> dict[str, Estimate]:
        """Mean and PERCENTILES of the makespan [µs]: see `mean` and `quantile` for their intervals."""
        percentiles = {name: quantile(self.makespan_us, p, self.level) for name, p in PERCENTILES.items()}
        return {"mean": mean(self.makespan_us, self.level), **percentiles}


def replicate(
    model: MoEModel,
    *,
    routing: Routings | Callable[[int], Routings],
    seeds: int | Iterable[int],
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
    **inputs: Any,
) -> Replication:
    """Run `evaluate` once for each seed.

    routing: as for `evaluate`, the same for all seeds; or a function that draws one for each.
    seeds: that many, from 0 on; or the seeds themselves. inputs: what else `evaluate` takes.
    Raises: ValueError naming bad seeds, or what `evaluate` refuses.
    """
    chosen = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds={seeds!r} (must be a number of at least 1, or different seeds)")
    if not 0 < level < 1:
        raise ValueError(f"level={level} (must be between 0 and 1)")
    makespan_us = []
    for done, seed in enumerate(chosen):
        drawn = routing(seed) if callable(routing) else routing
        makespan_us.append(evaluate(model, routing=drawn, seed=seed, **inputs).makespan_us)
        if progress is not None:
            progress(done + 1, len(chosen))
    return Replication(chosen, np.array(makespan_us), level)


def mean(sample: NDArray[np.float64], level: float = 0.95) -> Estimate:
    """The mean with Student's t interval, which takes the mean of the runs as normally distributed.

    A single run has no interval. Nor has any sample where scipy (`pip install 'flashmoe[sweep]'`) is not installed.
    """
    value, n = float(sample.mean()), len(sample)
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        return Estimate(value, None, None)
    if n < 2:
        return Estimate(value, None, None)
    error = float(t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Estimate(value, value - error, value + error)


def quantile(sample: NDArray[np.float64], p: float, level: float = 0.95) -> Estimate:
    """The least value that a share p of the sample does not exceed, between two values of the sample.

    How many of n independent runs lie below the true quantile is binomial (n, p), whatever the distribution; so
    the interval holds it with at least the given level, half of the error on each side. It takes 369 runs to bound
    p99 from above with 95 %.
    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = np.sort(sample)
    n = len(ordered)
    below = np.cumsum([_binomial(n, k, p) for k in range(n + 1)])  # [k]: probability of at most k runs below
    error = (1 - level) / 2
    num_low = int(np.sum(below <= error))  # the num_low-th smallest value is still low enough
    high_idx = int(np.sum(below < 1 - error))  # 0-based
    return Estimate(
        value=float(np.quantile(ordered, p, method="inverted_cdf")),
        low=float(ordered[num_low - 1]) if num_low > 0 else None,
        high=float(ordered[high_idx]) if high_idx < n else None,
    )


def _binomial(n: int, k: int, p: float) -> float:
    log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_ways + k * math.log(p) + (n - k) * math.log1p(-p))
