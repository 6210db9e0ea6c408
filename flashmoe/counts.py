"""Expert counts, how many tokens chose each expert, turned back into tokens that chose them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TRADES = 32  # of each token; by the eighth experts meet as often as by chance (128 experts, 4096 tokens of 8)


def expand_counts(counts: ArrayLike, num_tokens: int, top_k: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return (num_tokens, top_k) distinct experts a token, at random among all that have these counts.

    counts: (num_experts,) finite numbers of at least 0. If they are a table for just these tokens (they sum to
    num_tokens * top_k, none is above num_tokens), the result has exactly these counts; else it has the counts
    of `scaled_counts`.
    Raises: ValueError when fewer than top_k experts have a count, or naming a count that is none.
    Source: the trades are those of Strona et al. 2014, Nature Communications 5:4114 ("curveball").
    """
    exact = scaled_counts(counts, num_tokens, top_k, rng)
    # Copies of an expert lie in a row and are dealt to the tokens in turn: never two to the same token, since
    # no expert has more copies than there are tokens.
    dealt = np.repeat(np.arange(len(exact), dtype=np.int32), exact)
    idx = np.ascontiguousarray(dealt.reshape(top_k, num_tokens).T)
    # So far neighbours have the same experts. Two tokens pool the experts that only one of them has and take
    # random halves: counts stay, and any assignment with these counts can come out.
    for _ in range(_TRADES):
        order = rng.permutation(num_tokens)
        pairs = order[: num_tokens // 2 * 2].reshape(-1, 2)
        idx[pairs] = _traded(idx[pairs].reshape(-1, 2 * top_k), rng).reshape(-1, 2, top_k)
    return rng.permuted(idx, axis=1)


def scaled_counts(counts: ArrayLike, num_tokens: int, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return whole counts, num_tokens * top_k in all, in proportion to counts but at most num_tokens an expert.

    Fractions are rounded up or down at random so that the expectation is the proportion. What a capped expert
    cannot take goes to the others in proportion. Counts that fit already come back as they are.
    """
    check_counts(counts)
    wanted = np.asarray(counts, dtype=np.float64)
    used = int(np.count_nonzero(wanted))
    if used < top_k:
        raise ValueError(f"only {used} experts have a count (top_k={top_k} needs as many)")
    exact = np.zeros(len(wanted), dtype=np.int64)
    left = np.flatnonzero(wanted)
    slots = num_tokens * top_k
    while True:
        # Shares first: a count times the number of slots may be a large number over a large one.
        target = wanted[left] / wanted[left].sum() * slots if slots else np.zeros(len(left))
        if wanted[left].sum() == slots:
            target = wanted[left]
        full = target > num_tokens - 1e-6  # what rounding leaves just below is full, too
        if not full.any() or not slots:
            break
        exact[left[full]] = num_tokens
        slots -= num_tokens * int(full.sum())
        left = left[~full]
    # Systematic sampling along a random order of the experts.
    order = rng.permutation(len(left))
    start = rng.integers(2**20) / 2**20  # no finer: added to a whole number it must not round up to the next
    marks = np.floor(np.cumsum(target[order]) + start).astype(np.int64)
    if len(marks):
        marks[-1] = slots  # exactly, whatever the sum's rounding
    exact[left[order]] = np.diff(marks, prepend=0)
    return exact


def check_counts(counts: ArrayLike) -> None:
    """Raise ValueError naming a count, in an array of any shape, that is negative or not finite."""
    given = np.asarray(counts)
    wrong = given[~np.isfinite(given) | (given < 0)]
    if wrong.size:
        raise ValueError(f"counts have {wrong[0]} (must be finite and at least 0)")


def _traded(experts: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
    """experts: (num_pairs, 2 top_k), the first half one token's, the second half the other's."""
    experts = np.sort(experts, axis=1)
    same = experts[:, 1:] == experts[:, :-1]
    keys = rng.random(experts.shape)
    keys[:, :-1][same] = -1.0  # an expert that both have: one copy to the first token,
    keys[:, 1:][same] = 2.0  # one to the second
    return np.take_along_axis(experts, np.argsort(keys, axis=1), axis=1)
