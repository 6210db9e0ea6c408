"""Synthetic routing: how popular each expert is, and tokens drawn from that, for one layer or correlated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.model import MoEModel

FAMILIES = ("uniform", "zipf", "dirichlet", "hot", "one")
FAMILY_FORMS = "uniform, zipf:S, dirichlet:A, hot:N, one"

PerPe = tuple[list[NDArray[np.int32]], list[NDArray[np.float32]]]  # topk_idx and topk_weights, one array a PE


@dataclass(frozen=True)
class Family:
    """A named distribution. popularity: (generator, model) -> (num_experts,) weights that need not sum to 1."""

    name: str
    popularity: Callable[[np.random.Generator, MoEModel], NDArray[np.float64]]


def uniform() -> Family:
    """Every expert is as likely as any other."""
    return Family("uniform", lambda rng, model: np.ones(model.num_experts))


def zipf(exponent: float) -> Family:
    """The r-th most popular expert has popularity r**-exponent; the generator says which expert has which rank."""
    if not 0 <= exponent < np.inf:
        raise ValueError(f"exponent={exponent} (must be finite and at least 0)")

    def popularity(rng: np.random.Generator, model: MoEModel) -> NDArray[np.float64]:
        return np.power(rng.permutation(model.num_experts) + 1, -float(exponent), dtype=np.float64)

    return Family(f"zipf:{exponent:g}", popularity)


def dirichlet(alpha: float) -> Family:
    """Popularity is one draw from a symmetric Dirichlet(alpha)."""
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha={alpha} (must be finite and above 0)")
    return Family(f"dirichlet:{alpha:g}", lambda rng, model: rng.dirichlet(np.full(model.num_experts, float(alpha))))


def hot(num_hot: int) -> Family:
    """num_hot experts, chosen by the generator, share all tokens evenly."""

    def popularity(rng: np.random.Generator, model: MoEModel) -> NDArray[np.float64]:
        if not model.top_k <= num_hot <= model.num_experts:
            raise ValueError(f"num_hot={num_hot} (must be in top_k={model.top_k}..num_experts={model.num_experts})")
        shares = np.zeros(model.num_experts)
        shares[rng.permutation(model.num_experts)[:num_hot]] = 1.0
        return shares

    return Family(f"hot:{num_hot}", popularity)


def parse_family(text: str, accepted: str) -> Family | None:
    """The family that a text names; None for `one`, which draws nothing. accepted: for the error's text."""
    family, colon, value = text.partition(":")
    if family in ("uniform", "one"):
        if colon:
            raise ValueError(f"routing {text!r}: {family} takes no value (accepted: {accepted})")
        return uniform() if family == "uniform" else None
    if family not in FAMILIES:
        raise ValueError(f"routing {text!r} is unknown (accepted: {accepted})")
    try:
        number = int(value) if family == "hot" else float(value)
    except ValueError:
        wanted = "an integer" if family == "hot" else "a number"
        raise ValueError(f"routing {text!r}: {value!r} is not {wanted} (accepted: {accepted})") from None
    if family == "hot":
        return hot(int(number))
    return zipf(number) if family == "zipf" else dirichlet(number)


def draw_layers(
    family: Family, model: MoEModel, num_tokens: Sequence[int], seed: int, num_layers: int, correlation: float
) -> list[PerPe]:
    """Draw top_k distinct experts a token with the family's popularity, for each layer and PE.

    num_tokens: one number a PE. correlation: see `Routing.layers`. Weights: the softmax over the chosen scores,
    descending.
    Source: the top k of log p + Gumbel noise are k draws without replacement, in order, with probabilities p
    (Kool et al. 2019, arXiv:1903.06059).
    """
    # What all PEs share comes from one generator; the PEs' own streams are spawned children, independent of it.
    shared = np.random.default_rng(seeds(seed))
    # One stream per PE, row by row, and a child of it per further layer: a token keeps its experts when
    # tokens, PEs or layers are added.
    streams = seeds(seed).spawn(len(num_tokens))
    with np.errstate(divide="ignore"):
        log_popularity = np.log(family.popularity(shared, model))  # -inf: never chosen
        log_carried, log_fresh = np.log(correlation), np.log1p(-correlation)

    def noisy(stream: np.random.SeedSequence, count: int) -> NDArray[np.float64]:
        return log_popularity + np.random.default_rng(stream).gumbel(size=(count, model.num_experts))

    scores = [noisy(stream, count) for stream, count in zip(streams, num_tokens, strict=True)]
    layers = [_chosen(scores, model.top_k)]
    for _ in range(num_layers - 1):
        renamed = shared.permutation(model.num_experts)  # this layer's expert e was renamed[e] in the one before
        log_popularity = log_popularity[renamed]
        # The larger of two Gumbels shifted by log c and log(1 - c) is a Gumbel again, so no layer is less or more
        # skewed than the first, and the first choice is the carried one with probability c.
        scores = [
            np.maximum(before[:, renamed] + log_carried, noisy(stream.spawn(1)[0], len(before)) + log_fresh)
            for before, stream in zip(scores, streams, strict=True)
        ]
        layers.append(_chosen(scores, model.top_k))
    return layers


def seeds(seed: int) -> np.random.SeedSequence:
    """The seed's sequence; ValueError when it is negative."""
    if seed < 0:
        raise ValueError(f"seed={seed} (must be at least 0)")
    return np.random.SeedSequence(seed)


def _chosen(scores: Sequence[NDArray[np.float64]], top_k: int) -> PerPe:
    idx, weights = [], []
    for rows in scores:
        chosen = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
        best = np.take_along_axis(rows, chosen, axis=1)
        top = np.exp(best - best[:, :1])
        idx.append(chosen.astype(np.int32))
        weights.append((top / top.sum(axis=1, keepdims=True)).astype(np.float32))
    return idx, weights
