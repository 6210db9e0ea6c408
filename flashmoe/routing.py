"""Which experts each token of each PE goes to: synthetic families, recorded files, and their skew."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashmoe.model import MoEModel

FORMS = "uniform, zipf:S, dirichlet:A, hot:N, one, FILE.npz"


@dataclass(frozen=True, eq=False)  # arrays do not compare to one bool; compare digests
class Routing:
    """The experts of each token and their weights, one array per PE (the PE that owns the tokens).

    topk_idx: per PE (num_tokens, top_k) int32 in [0, num_experts), distinct in a token; -1: a dropped slot.
    topk_weights: per PE float32 of the same shape.
    The arrays are copied and read-only.
    Raises: ValueError naming the PE and the value or shape that does not fit.
    """

    topk_idx: tuple[NDArray[np.int32], ...]
    topk_weights: tuple[NDArray[np.float32], ...]
    num_experts: int
    name: str = "custom"

    def __post_init__(self) -> None:
        if not len(self.topk_idx) == len(self.topk_weights) >= 1:
            raise ValueError(
                f"topk_idx has {len(self.topk_idx)} PEs and topk_weights {len(self.topk_weights)} "
                "(must be the same number, at least 1)"
            )
        object.__setattr__(self, "num_experts", int(self.num_experts))
        idx = tuple(_checked_idx(array, pe, self.num_experts) for pe, array in enumerate(self.topk_idx))
        weights = tuple(_checked_weights(array, pe, idx[pe]) for pe, array in enumerate(self.topk_weights))
        widths = [array.shape[1] for array in idx]
        if len(set(widths)) > 1:
            raise ValueError(f"top_k={widths} over the PEs (must be the same on all)")
        object.__setattr__(self, "topk_idx", idx)
        object.__setattr__(self, "topk_weights", weights)

    # ---- synthetic families

    @classmethod
    def uniform(cls, model: MoEModel, num_tokens: int | Sequence[int], ep_size: int, seed: int = 0) -> Routing:
        """Every expert is as likely as any other.

        num_tokens: per PE, one number for all or ep_size numbers; the same for every family.
        """
        popularity = np.ones(model.num_experts)
        return cls._drawn(model, num_tokens, ep_size, seed, popularity, "uniform")

    @classmethod
    def zipf(
        cls,
        model: MoEModel,
        num_tokens: int | Sequence[int],
        ep_size: int,
        seed: int = 0,
        *,
        exponent: float = 1.0,
    ) -> Routing:
        """A token's first choice is the r-th most popular expert with probability ~ r**-exponent.

        Which expert has which rank is drawn from the seed: in trained layers popular experts lie scattered.
        """
        if not 0 <= exponent < np.inf:
            raise ValueError(f"exponent={exponent} (must be finite and at least 0)")
        rank = _family_rng(seed).permutation(model.num_experts) + 1
        popularity = np.power(rank, -float(exponent), dtype=np.float64)
        return cls._drawn(model, num_tokens, ep_size, seed, popularity, f"zipf:{exponent:g}")

    @classmethod
    def dirichlet(
        cls,
        model: MoEModel,
        num_tokens: int | Sequence[int],
        ep_size: int,
        seed: int = 0,
        *,
        alpha: float = 1.0,
    ) -> Routing:
        """Popularity is one draw for all PEs from a symmetric Dirichlet(alpha): small alpha, large skew."""
        if not 0 < alpha < np.inf:
            raise ValueError(f"alpha={alpha} (must be finite and above 0)")
        popularity = _family_rng(seed).dirichlet(np.full(model.num_experts, float(alpha)))
        return cls._drawn(model, num_tokens, ep_size, seed, popularity, f"dirichlet:{alpha:g}")

    @classmethod
    def hot(
        cls, model: MoEModel, num_tokens: int | Sequence[int], ep_size: int, seed: int = 0, *, num_hot: int
    ) -> Routing:
        """All tokens choose among the same num_hot experts, which are drawn from the seed."""
        if not model.top_k <= num_hot <= model.num_experts:
            raise ValueError(f"num_hot={num_hot} (must be in top_k={model.top_k}..num_experts={model.num_experts})")
        popularity = np.zeros(model.num_experts)
        popularity[_family_rng(seed).permutation(model.num_experts)[:num_hot]] = 1.0
        return cls._drawn(model, num_tokens, ep_size, seed, popularity, f"hot:{num_hot}")

    @classmethod
    def one(cls, model: MoEModel, num_tokens: int | Sequence[int], ep_size: int, seed: int = 0) -> Routing:
        """Every token goes to experts 0..top_k-1 with equal weights: all to one PE, if it owns that many.

        seed: unused; here so that all families are called alike.
        """
        counts = _counts(model, num_tokens, ep_size)
        chosen = np.arange(model.top_k, dtype=np.int32)
        idx = tuple(np.tile(chosen, (count, 1)) for count in counts)
        weights = tuple(np.full((count, model.top_k), 1 / model.top_k, dtype=np.float32) for count in counts)
        return cls(idx, weights, model.num_experts, "one")

    @classmethod
    def _drawn(
        cls,
        model: MoEModel,
        num_tokens: int | Sequence[int],
        ep_size: int,
        seed: int,
        popularity: NDArray[np.float64],
        name: str,
    ) -> Routing:
        # The top-k of log p + Gumbel noise are k draws without replacement, in order, with probabilities p
        # (Kool et al. 2019, arXiv:1903.06059); the softmax over those k scores is the router's own weighting.
        counts = _counts(model, num_tokens, ep_size)
        with np.errstate(divide="ignore"):
            log_popularity = np.log(popularity)  # -inf: never chosen
        # One stream per PE, row by row: a token keeps its experts when tokens or PEs are added.
        idx, weights = [], []
        for count, stream in zip(counts, _seeds(seed).spawn(ep_size), strict=True):
            scores = log_popularity + np.random.default_rng(stream).gumbel(size=(count, model.num_experts))
            chosen = np.argsort(-scores, axis=1, kind="stable")[:, : model.top_k]
            top_scores = np.take_along_axis(scores, chosen, axis=1)
            top = np.exp(top_scores - top_scores[:, :1])
            idx.append(chosen.astype(np.int32))
            weights.append((top / top.sum(axis=1, keepdims=True)).astype(np.float32))
        return cls(tuple(idx), tuple(weights), model.num_experts, name)

    # ---- text and files

    @classmethod
    def parse(
        cls,
        text: str,
        model: MoEModel,
        num_tokens: int | Sequence[int] | None = None,
        ep_size: int | None = None,
        seed: int = 0,
    ) -> Routing:
        """Make the routing that a short text names: uniform, zipf:S, dirichlet:A, hot:N, one or FILE.npz.

        A file brings its own num_tokens and ep_size; where they are given too, they must agree.
        Raises: ValueError naming the text and the accepted forms, or what does not fit the model.
        """
        if text.endswith(".npz"):
            routing = cls.load(text)
            routing.check(model)
            if ep_size is not None and ep_size != routing.ep_size:
                raise ValueError(f"ep_size={ep_size}, but {text} is for {routing.ep_size} PEs")
            if num_tokens is not None and _counts(model, num_tokens, routing.ep_size) != routing.num_tokens:
                raise ValueError(f"num_tokens={num_tokens}, but {text} has {list(routing.num_tokens)}")
            return routing
        family, colon, value = text.partition(":")
        if family not in ("uniform", "zipf", "dirichlet", "hot", "one"):
            raise ValueError(f"routing {text!r} is unknown (accepted: {FORMS})")
        if num_tokens is None or ep_size is None:
            raise ValueError(f"routing {text!r} needs num_tokens and ep_size (only a file brings its own)")
        if family in ("uniform", "one"):
            if colon:
                raise ValueError(f"routing {text!r}: {family} takes no value (accepted: {FORMS})")
            make = cls.uniform if family == "uniform" else cls.one
            return make(model, num_tokens, ep_size, seed)
        try:
            number = int(value) if family == "hot" else float(value)
        except ValueError:
            wanted = "an integer" if family == "hot" else "a number"
            raise ValueError(f"routing {text!r}: {value!r} is not {wanted} (accepted: {FORMS})") from None
        if family == "zipf":
            return cls.zipf(model, num_tokens, ep_size, seed, exponent=number)
        if family == "dirichlet":
            return cls.dirichlet(model, num_tokens, ep_size, seed, alpha=number)
        return cls.hot(model, num_tokens, ep_size, seed, num_hot=int(number))

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz file: topk_idx and topk_weights with the PEs' tokens one after the other,
        num_tokens (ep_size,), num_experts, name."""
        with open(path, "wb") as file:  # a name would get .npz appended
            np.savez_compressed(
                file,
                topk_idx=np.concatenate(self.topk_idx),
                topk_weights=np.concatenate(self.topk_weights),
                num_tokens=np.array(self.num_tokens, dtype=np.int64),
                num_experts=np.int64(self.num_experts),
                name=np.array(self.name),
            )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Routing:
        """Read what save() wrote, or a file made elsewhere with the same arrays.

        Raises: ValueError naming the file and what is missing or does not fit.
        """
        wanted = ("topk_idx", "topk_weights", "num_tokens", "num_experts")
        try:
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):  # numpy would take it for a pickle
                    raise ValueError("not an npz file")
                with np.load(file) as arrays:
                    missing = [key for key in wanted if key not in arrays]
                    if missing:
                        raise ValueError(f"no {', '.join(missing)}; needs {', '.join(wanted)}")
                    idx, weights, num_tokens, num_experts = (arrays[key] for key in wanted)
                    name = str(arrays["name"]) if "name" in arrays else Path(path).stem
            if num_tokens.ndim != 1 or not len(idx) == len(weights) == num_tokens.sum():
                raise ValueError(
                    f"num_tokens={num_tokens.tolist()} does not add up to the {len(idx)} rows of topk_idx "
                    f"and {len(weights)} of topk_weights"
                )
            cuts = np.cumsum(num_tokens)[:-1]
            return cls(tuple(np.split(idx, cuts)), tuple(np.split(weights, cuts)), int(num_experts), name)
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot read a routing from {path} ({error})") from error

    # ---- what executors and people ask

    @property
    def ep_size(self) -> int:
        """Number of PEs."""
        return len(self.topk_idx)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each PE."""
        return tuple(len(idx) for idx in self.topk_idx)

    @property
    def top_k(self) -> int:
        """Slots of a token, dropped ones included."""
        return int(self.topk_idx[0].shape[1])

    @property
    def digest(self) -> str:
        """16 hex digits that tell this routing's shapes and experts from others'; weights do not count."""
        digest = hashlib.sha256(repr((self.num_experts, self.top_k, self.num_tokens)).encode())
        for idx in self.topk_idx:
            digest.update(idx.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def expert_load(self) -> NDArray[np.int64]:
        """Return (num_experts,) tokens routed to each expert from all PEs; dropped slots do not count."""
        chosen = np.concatenate([idx.ravel() for idx in self.topk_idx])
        return np.bincount(chosen[chosen >= 0], minlength=self.num_experts).astype(np.int64)

    def skew(self) -> dict[str, float]:
        """Return how unevenly the experts are loaded.

        cv: standard deviation over mean; max_over_mean; gini: 0 even .. 1 - 1/num_experts all on one;
        entropy [bits]: log2(num_experts) even .. 0 all on one. No tokens at all count as even.
        """
        load = np.sort(self.expert_load()).astype(np.float64)
        if not load.any():
            load[:] = 1.0
        share = load / load.sum()
        # Gini from sorted shares: sum over i of (2 i - n - 1) share_i / n, i from 1.
        rank = 2 * np.arange(1, len(share) + 1) - len(share) - 1
        used = share[share > 0]
        return {
            "cv": float(load.std() / load.mean()),
            "max_over_mean": float(load.max() / load.mean()),
            "gini": float((rank * share).sum() / len(share)),
            "entropy": float((used * np.log2(1 / used)).sum()),
        }

    def check(self, model: MoEModel) -> None:
        """Raise ValueError when num_experts, top_k or the number of PEs does not fit the model."""
        for field in ("num_experts", "top_k"):
            mine, wanted = getattr(self, field), getattr(model, field)
            if mine != wanted:
                raise ValueError(f"routing {self.name!r} has {field}={mine} (model {model.name!r}: {wanted})")
        model.experts_per_pe(self.ep_size)


def _checked_idx(array: ArrayLike, pe: int, num_experts: int) -> NDArray[np.int32]:
    given = np.asarray(array)
    if given.ndim != 2 or given.shape[1] < 1 or given.dtype.kind not in "iu":
        raise ValueError(
            f"topk_idx of PE {pe} is {given.dtype} {given.shape} (must be integers (num_tokens, top_k >= 1))"
        )
    wrong = given[(given < -1) | (given >= num_experts)]
    if wrong.size:
        raise ValueError(
            f"topk_idx of PE {pe} has expert {wrong[0]} (must be in 0..{num_experts - 1}, or -1 for a dropped slot)"
        )
    in_order = np.sort(given, axis=1)
    twice = np.argwhere((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0))
    if twice.size:
        token, slot = twice[0]
        twin = in_order[token, slot]
        raise ValueError(f"token {token} of PE {pe} has expert {twin} twice (must be distinct)")
    idx = np.array(given, dtype=np.int32, order="C")
    idx.flags.writeable = False
    return idx


def _checked_weights(array: ArrayLike, pe: int, idx: NDArray[np.int32]) -> NDArray[np.float32]:
    weights = np.array(array, dtype=np.float32, order="C")
    if weights.shape != idx.shape:
        raise ValueError(f"topk_weights of PE {pe} is {weights.shape} (topk_idx: {idx.shape})")
    wrong = weights[~np.isfinite(weights)]
    if wrong.size:
        raise ValueError(f"topk_weights of PE {pe} has {wrong[0]} (must be finite)")
    weights.flags.writeable = False
    return weights


def _counts(model: MoEModel, num_tokens: int | Sequence[int], ep_size: int) -> tuple[int, ...]:
    model.experts_per_pe(ep_size)
    counts: Any = np.asarray(num_tokens)
    if counts.ndim == 0:
        counts = np.full(ep_size, counts)
    if counts.shape != (ep_size,) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(f"num_tokens={num_tokens!r} (must be an integer of at least 0, or ep_size={ep_size} of them)")
    return tuple(int(count) for count in counts)


def _seeds(seed: int) -> np.random.SeedSequence:
    if seed < 0:
        raise ValueError(f"seed={seed} (must be at least 0)")
    return np.random.SeedSequence(seed)


def _family_rng(seed: int) -> np.random.Generator:
    """What all PEs share; the PEs' own streams are spawned children and so independent of it."""
    return np.random.default_rng(_seeds(seed))
