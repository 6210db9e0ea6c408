"""What replications say about a mean, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def exponential(rng: np.random.Generator, mean_ps: float, shape: tuple[int, ...]) -> Any:
    """Whole picoseconds; with a mean of a million, rounding does not matter."""
    return np.rint(rng.exponential(mean_ps, shape)).astype(np.int64)


def estimate(values: Any, controls: Sequence[Any] = ()) -> tuple[float, float]:
    """Mean over independent replications and its standard error.

    values: (num_replications,). controls: like values, of expectation 0 and correlated with them, such as the mean
    service time drawn in a replication minus the true one: what they explain is no longer error.
    Source: control variates by regression, Lavenberg and Welch 1981, Management Science 27(3).
    """
    values = np.asarray(values, np.float64)
    design = np.column_stack([np.ones(len(values)), *controls])
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    residuals = values - design @ coefficients
    variance = residuals @ residuals / (len(values) - design.shape[1])
    return float(coefficients[0]), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))


def assert_agrees(values: Any, theory: float, controls: Sequence[Any] = (), *, sharp: float = 0.02) -> None:
    """The mean lies within four standard errors of theory, and one of them is less than `sharp` of theory."""
    mean, error = estimate(values, controls)
    assert error < sharp * abs(theory), f"standard error {error:.4g} blunts the test: theory {theory:.4g}"
    assert abs(mean - theory) < 4 * error, f"{mean:.5g} +- {error:.2g}, theory {theory:.5g}"
