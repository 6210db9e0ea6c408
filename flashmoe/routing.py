"""Which experts each token of each PE goes to: drawn or recorded, for one layer or several, and its skew."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashmoe import families, recorded
from flashmoe.counts import expand_counts
from flashmoe.model import MoEModel
from flashmoe.placement import Placement
from flashmoe.recorded import Tokens, equal_weights

FORMS = (
    f"{families.FAMILY_FORMS}, {', '.join(f'FILE{suffix}' for suffix in recorded.SUFFIXES)}, FILE:LAYER, any@PLACEMENT"
)
_FILE = re.compile(rf"(?P<path>.+(?:{'|'.join(map(re.escape, recorded.SUFFIXES))}))(?::(?P<layer>\d+))?")


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
        return cls._drawn(families.uniform(), model, num_tokens, ep_size, seed)[0]

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
        return cls._drawn(families.zipf(exponent), model, num_tokens, ep_size, seed)[0]

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
        return cls._drawn(families.dirichlet(alpha), model, num_tokens, ep_size, seed)[0]

    @classmethod
    def hot(
        cls, model: MoEModel, num_tokens: int | Sequence[int], ep_size: int, seed: int = 0, *, num_hot: int
    ) -> Routing:
        """All tokens choose among the same num_hot experts, which are drawn from the seed."""
        return cls._drawn(families.hot(num_hot), model, num_tokens, ep_size, seed)[0]

    @classmethod
    def one(cls, model: MoEModel, num_tokens: int | Sequence[int], ep_size: int, seed: int = 0) -> Routing:
        """Every token goes to experts 0..top_k-1 with equal weights: all to one PE, if it owns that many.

        seed: unused; here so that all families are called alike.
        """
        counts = _tokens_per_pe(model, num_tokens, ep_size)
        idx = np.tile(np.arange(model.top_k, dtype=np.int32), (sum(counts), 1))
        return cls._cut(idx, equal_weights(idx), counts, model.num_experts, "one")

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        model: MoEModel,
        num_tokens: int | Sequence[int],
        ep_size: int,
        seed: int | np.random.SeedSequence = 0,
        name: str = "counts",
    ) -> Routing:
        """Tokens at random among all that choose the experts in proportion to counts, with equal weights.

        counts: (num_experts,) how many tokens chose each expert. Where they are a table for just this number of
        tokens, the load is exactly that; else it is the table scaled, with at most one slot a token for an expert.
        Raises: ValueError naming the counts that do not fit.
        """
        table = np.asarray(counts)
        if table.shape != (model.num_experts,):
            raise ValueError(f"counts have shape {table.shape} (must be ({model.num_experts},), one an expert)")
        per_pe = _tokens_per_pe(model, num_tokens, ep_size)
        stream = families.seeds(seed) if isinstance(seed, int) else seed
        idx = expand_counts(table, sum(per_pe), model.top_k, np.random.default_rng(stream))
        return cls._cut(idx, equal_weights(idx), per_pe, model.num_experts, name)

    @classmethod
    def _drawn(
        cls,
        family: families.Family,
        model: MoEModel,
        num_tokens: int | Sequence[int],
        ep_size: int,
        seed: int,
        num_layers: int = 1,
        correlation: float = 0.0,
    ) -> list[Routing]:
        counts = _tokens_per_pe(model, num_tokens, ep_size)
        drawn = families.draw_layers(family, model, counts, seed, num_layers, correlation)
        return [cls(tuple(idx), tuple(weights), model.num_experts, family.name) for idx, weights in drawn]

    @classmethod
    def _cut(
        cls, idx: NDArray[Any], weights: NDArray[Any], num_tokens: Sequence[int], num_experts: int, name: str
    ) -> Routing:
        """idx, weights: (num_tokens, top_k) of all PEs, one after the other."""
        cuts = np.cumsum(num_tokens)[:-1]
        return cls(tuple(np.split(idx, cuts)), tuple(np.split(weights, cuts)), num_experts, name)

    # ---- text and files

    @classmethod
    def parse(
        cls,
        text: str,
        model: MoEModel,
        num_tokens: int | Sequence[int] | None = None,
        ep_size: int | None = None,
        seed: int = 0,
        *,
        default: tuple[int | None, int | None] = (None, None),
    ) -> Routing:
        """Make the routing of one layer that a short text names: see `layers`.

        Raises: as `layers` does; and for a file with several layers without FILE:LAYER.
        """
        layers = cls.layers(text, model, num_tokens, ep_size, seed, default=default)
        if len(layers) > 1:
            raise ValueError(f"{text} has {len(layers)} layers (accepted for one layer: FILE:LAYER)")
        return layers[0]

    @classmethod
    def layers(
        cls,
        text: str,
        model: MoEModel,
        num_tokens: int | Sequence[int] | None = None,
        ep_size: int | None = None,
        seed: int = 0,
        *,
        num_layers: int | None = None,
        correlation: float = 0.0,
        default: tuple[int | None, int | None] = (None, None),
    ) -> list[Routing]:
        """Make the routings that a short text names, one a layer, for the same tokens.

        text: uniform, zipf:S, dirichlet:A, hot:N, one: as the classmethods draw them.
            FILE.npz, .jsonl, .json, .csv, .npy or .pt, FILE:LAYER for one layer of it: see flashmoe.recorded. Recorded
            tokens bring their number and mostly their PEs, and what is given too must agree. Those that name no PE are
            dealt to ep_size PEs in contiguous blocks, evenly (the first PEs take the odd ones) or, where
            num_tokens is given, so many a PE and no more. Count tables are expanded by `from_counts`.
            TEXT@PLACEMENT: any of these with its experts placed, see flashmoe.placement.
        num_layers: None: one of a family, all of a file; else so many, of a file the first ones.
        correlation: c in 0..1, of families. From layer to layer the experts are renamed at random, their
            popularity with them. A token's score for an expert, log popularity + Gumbel noise, becomes
            max(its score in the layer before + log c, a fresh score + log(1 - c)). So each layer by itself is a draw
            of the family, and a token's first choice is with probability c that of the layer before, renamed, and
            else a fresh one. 1: the same choices but for the names, so tokens that met in an expert meet again.
            0: no layer knows of another. `one` is the same in all layers.
        default: num_tokens and ep_size where neither the caller nor a file says them.
        Raises: ValueError naming the text and the accepted forms, or what does not fit the model.
        """
        if num_layers is not None and num_layers < 1:
            raise ValueError(f"num_layers={num_layers} (must be at least 1)")
        if not 0 <= correlation <= 1:
            raise ValueError(f"correlation={correlation} (must be in 0..1)")
        text, at, placement = split_placement(text)
        sizes = _Sizes(text, model, num_tokens, ep_size, default)
        if file := _FILE.fullmatch(text):
            if correlation:
                raise ValueError(f"correlation={correlation}, but {text} has its own layers (must be 0)")
            routings = _from_file(file["path"], file["layer"], sizes, seed, num_layers)
        else:
            family = families.parse_family(text, FORMS)
            if family is None:
                routings = [cls.one(model, *sizes.needed(), seed)] * (num_layers or 1)
            else:
                routings = cls._drawn(family, model, *sizes.needed(), seed, num_layers or 1, correlation)
        if not at:
            return routings
        placements = Placement.for_layers(placement, routings, seed)
        return [routing.placed(where) for routing, where in zip(routings, placements, strict=True)]

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz file: topk_idx and topk_weights with the PEs' tokens one after the other,
        num_tokens (ep_size,), num_experts, name."""
        recorded.write(path, [self])

    @staticmethod
    def save_layers(path: str | PathLike[str], layers: Sequence[Routing]) -> None:
        """Write several layers of the same tokens into one .npz, which parse and layers read.

        Raises: ValueError when they differ in tokens, top_k or experts.
        """
        recorded.write(path, layers)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Routing:
        """Read what save() wrote, or a file made elsewhere with the same arrays.

        Raises: ValueError naming the file and what is missing or does not fit.
        """
        tokens, *others = recorded.read_saved(path)
        if others:
            raise ValueError(f"{path} has {1 + len(others)} layers (Routing.layers reads them)")
        try:
            counts, experts = tokens.num_tokens or (), tokens.num_experts or 0
            return cls._cut(tokens.topk_idx, tokens.topk_weights, counts, experts, tokens.name or Path(path).stem)
        except ValueError as error:
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

    def pe_load(self) -> NDArray[np.int64]:
        """Return (ep_size,) how many slots of tokens each PE's experts work on: expert_load, added up.

        Raises: ValueError when the number of PEs does not divide the experts.
        """
        if self.num_experts % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size} (must divide num_experts={self.num_experts})")
        load: NDArray[np.int64] = self.expert_load().reshape(self.ep_size, -1).sum(axis=1)
        return load

    def skew(self, of: Literal["experts", "pes"] = "experts") -> dict[str, float]:
        """Return how unevenly the n experts, or the n PEs, are loaded.

        cv: standard deviation over mean; max_over_mean; gini: 0 even .. 1 - 1/n all on one;
        entropy [bits]: log2(n) even .. 0 all on one. No tokens at all count as even.
        """
        if of not in ("experts", "pes"):
            raise ValueError(f"of={of!r} (accepted: experts, pes)")
        load = np.sort(self.expert_load() if of == "experts" else self.pe_load()).astype(np.float64)
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

    def describe_skew(self) -> str:
        """Return one line for people: skew() of the experts and, where there are several PEs, of the PEs."""
        parts = []
        for of, count in (("experts", self.num_experts), ("pes", self.ep_size)):
            if of == "pes" and (count == 1 or self.num_experts % count):
                continue
            skew = self.skew("experts" if of == "experts" else "pes")
            parts.append(
                f"load of the {count} {'experts' if of == 'experts' else 'PEs'}: CV {skew['cv']:.2f}, "
                f"max/mean {skew['max_over_mean']:.2f}, Gini {skew['gini']:.2f}, "
                f"entropy {skew['entropy']:.2f} of {np.log2(count):.2f} bits"
            )
        return "; ".join(parts)

    def placed(self, placement: Placement) -> Routing:
        """Return the same tokens with each expert renamed to its slot, so that it lives on the slot's PE.

        The name gets "@" and the placement's, which parse understands; linear changes nothing.
        Raises: ValueError when the placement is for another number of experts.
        """
        if placement.num_experts != self.num_experts:
            raise ValueError(f"placement is for {placement.num_experts} experts (the routing has {self.num_experts})")
        if placement == Placement.linear(placement.num_experts):
            return self
        slots = np.array([*placement.permutation, -1])  # a dropped slot's -1 finds the last entry
        idx = tuple(slots[experts] for experts in self.topk_idx)
        return Routing(idx, self.topk_weights, self.num_experts, f"{self.name}@{placement.name}")

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


def _tokens_per_pe(model: MoEModel, num_tokens: int | Sequence[int], ep_size: int) -> tuple[int, ...]:
    model.experts_per_pe(ep_size)
    counts: Any = np.asarray(num_tokens)
    if counts.ndim == 0:
        counts = np.full(ep_size, counts)
    if counts.shape != (ep_size,) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(f"num_tokens={num_tokens!r} (must be an integer of at least 0, or ep_size={ep_size} of them)")
    return tuple(int(count) for count in counts)


# ---- from text and files


@dataclass(frozen=True)
class _Sizes:
    """What a text and its caller say of the number of tokens and PEs."""

    text: str
    model: MoEModel
    num_tokens: int | Sequence[int] | None
    ep_size: int | None
    default: tuple[int | None, int | None]

    def needed(self) -> tuple[int | Sequence[int], int]:
        """Tokens and PEs, of a text that brings neither."""
        num_tokens = self.default[0] if self.num_tokens is None else self.num_tokens
        if num_tokens is None or self.needed_ep_size is None:
            raise ValueError(f"routing {self.text!r} needs num_tokens and ep_size (only recorded tokens bring them)")
        return num_tokens, self.needed_ep_size

    @property
    def needed_ep_size(self) -> int | None:
        return self.default[1] if self.ep_size is None else self.ep_size

    def per_pe(self, tokens: Tokens) -> tuple[int, ...]:
        """Tokens of each PE, of the first of these tokens: all of them unless the file names no PEs."""
        found = tokens.num_tokens
        if found is None:
            if (ep_size := self.needed_ep_size) is None:
                raise ValueError(f"routing {self.text!r} names no PEs and needs ep_size")
            self.model.experts_per_pe(ep_size)
            if self.num_tokens is None:
                each, odd = divmod(len(tokens.topk_idx), ep_size)
                return tuple(each + (pe < odd) for pe in range(ep_size))
            wanted = _tokens_per_pe(self.model, self.num_tokens, ep_size)
            if sum(wanted) > len(tokens.topk_idx):
                raise ValueError(
                    f"num_tokens={self.num_tokens} on {ep_size} PEs, but {self.text} has {len(tokens.topk_idx)} tokens"
                )
            return wanted
        if self.ep_size is not None and not tokens.all_pes:
            found += (0,) * (self.ep_size - len(found))
        if self.ep_size not in (None, len(found)):
            raise ValueError(f"ep_size={self.ep_size}, but {self.text} is for {len(found)} PEs")
        if self.num_tokens is not None and _tokens_per_pe(self.model, self.num_tokens, len(found)) != found:
            raise ValueError(f"num_tokens={self.num_tokens}, but {self.text} has {list(found)}")
        return found


def split_placement(text: str) -> tuple[str, str, str]:
    """Cut TEXT@PLACEMENT; a file's path may have an @ of its own."""
    routing, at, placement = text.rpartition("@")
    if _FILE.fullmatch(routing) or routing.partition(":")[0] in families.FAMILIES:
        return routing, at, placement
    return text, "", ""


def _from_file(path: str, layer: str | None, sizes: _Sizes, seed: int, num_layers: int | None) -> list[Routing]:
    held = recorded.read(path, sizes.model.num_experts)
    streams = dict(zip(held, families.seeds(seed).spawn(len(held)), strict=True))  # one layer is drawn as among all
    if layer is not None:
        if int(layer) not in held:
            raise ValueError(f"{path} has no layer {layer} (it has {', '.join(map(str, held))})")
        held = {int(layer): held[int(layer)]}
    if num_layers is not None and num_layers > len(held):
        raise ValueError(f"num_layers={num_layers}, but {sizes.text} has {len(held)}")
    routings: list[Routing] = []
    for number, found in list(held.items())[:num_layers]:
        name = Path(path).stem if len(streams) == 1 else f"{Path(path).stem}:{number}"
        if isinstance(found, Tokens):
            counts = sizes.per_pe(found)
            first = slice(sum(counts))
            experts = found.num_experts or sizes.model.num_experts
            idx, weights = found.topk_idx[first], found.topk_weights[first]
            routings.append(Routing._cut(idx, weights, counts, experts, found.name or name))
            routings[-1].check(sizes.model)
        else:
            routings.append(Routing.from_counts(found, sizes.model, *sizes.needed(), streams[number], name))
    if len({routing.num_tokens for routing in routings}) > 1:
        raise ValueError(f"{path} has {[r.num_tokens for r in routings]} tokens (must be the same in all layers)")
    return routings
