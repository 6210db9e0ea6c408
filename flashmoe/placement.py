"""Expert placement: which PE an expert lives on, as a permutation of the experts.

PE r owns slots r * num_experts / ep_size up to the next PE's, whatever the placement, so nothing that runs or
simulates a layer knows of it: `Routing.placed` and `Weights.placed` rename the experts to their slots.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashmoe.families import seeds

if TYPE_CHECKING:
    from flashmoe.routing import Routing

PLACEMENT_FORMS = "linear, strided, random, random:SEED, balanced, FILE.json, FILE.npy"


@dataclass(frozen=True)
class Placement:
    """Expert e lives in slot permutation[e].

    Raises: ValueError naming a slot that is missing.
    """

    permutation: tuple[int, ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        slots = np.asarray(self.permutation)
        if slots.ndim != 1 or slots.dtype.kind not in "iu" or not len(slots):
            raise ValueError(f"permutation is {slots.dtype} {slots.shape} (must be integers (num_experts,))")
        missing = np.setdiff1d(np.arange(len(slots)), slots)
        if len(missing):
            raise ValueError(f"permutation lacks slot {missing[0]} (must have each of 0..{len(slots) - 1} once)")
        object.__setattr__(self, "permutation", tuple(slots.tolist()))

    @classmethod
    def linear(cls, num_experts: int) -> Placement:
        """Expert e in slot e: neighbours live on the same PE."""
        return cls(tuple(range(num_experts)), "linear")

    @classmethod
    def strided(cls, num_experts: int, ep_size: int) -> Placement:
        """Expert e on PE e % ep_size: neighbours live on different PEs."""
        per_pe = _experts_per_pe(num_experts, ep_size)
        return cls(tuple(e % ep_size * per_pe + e // ep_size for e in range(num_experts)), "strided")

    @classmethod
    def random(cls, num_experts: int, seed: int = 0) -> Placement:
        """Every permutation is as likely as any other."""
        drawn = np.random.default_rng(seeds(seed)).permutation(num_experts)
        return cls(tuple(drawn.tolist()), f"random:{seed}")

    @classmethod
    def balanced(cls, load: ArrayLike, ep_size: int) -> Placement:
        """Spread the load: the heaviest expert first, each to the least loaded PE that has a slot left.

        load: (num_experts,), e.g. Routing.expert_load() of tokens seen before. Ties go to the lower expert and PE.
        Source: longest processing time first, Graham 1969, doi:10.1137/0117039, with as many experts on each PE.
        """
        loads = np.asarray(load, dtype=np.float64)
        if loads.ndim != 1 or not np.isfinite(loads).all() or (loads < 0).any():
            raise ValueError(f"load={load!r} (must be (num_experts,) finite numbers of at least 0)")
        per_pe = _experts_per_pe(len(loads), ep_size)
        owned: list[list[int]] = [[] for _ in range(ep_size)]
        pe_load = np.zeros(ep_size)
        for expert in np.argsort(-loads, kind="stable").tolist():
            open_pes = [pe for pe in range(ep_size) if len(owned[pe]) < per_pe]
            pe = min(open_pes, key=pe_load.__getitem__)
            owned[pe].append(expert)
            pe_load[pe] += loads[expert]
        in_slots = np.concatenate([sorted(experts) for experts in owned])
        return cls(tuple(np.argsort(in_slots).tolist()), "balanced")

    @classmethod
    def parse(cls, text: str, routing: Routing, seed: int = 0) -> Placement:
        """Make the placement that a text names, for one layer: see `for_layers`."""
        return cls.for_layers(text, [routing], seed)[0]

    @classmethod
    def for_layers(cls, text: str, layers: Sequence[Routing], seed: int = 0) -> list[Placement]:
        """Make the placements that a text names, one a layer: linear, strided, random, balanced or a file.

        random: another one for each layer; the first is that of the seed, which `random:SEED` gives.
        balanced: to each layer's own load, the best that a forecast of it could do.
        FILE.json, FILE.npy: the slot of each expert, (num_experts,) for all layers or (num_layers, num_experts).
        Raises: ValueError naming the text and the accepted forms, or what does not fit the routing.
        """
        num_experts, ep_size = layers[0].num_experts, layers[0].ep_size
        kind, colon, value = text.partition(":")
        if text == "linear":
            return [cls.linear(num_experts)] * len(layers)
        if text == "strided":
            return [cls.strided(num_experts, ep_size)] * len(layers)
        if text == "balanced":
            return [cls.balanced(layer.expert_load(), ep_size) for layer in layers]
        if kind == "random" and (value.isdecimal() or not colon):
            first = cls.random(num_experts, int(value) if colon else seed)
            rng = np.random.default_rng(seeds(int(value) if colon else seed).spawn(1)[0])
            return [first] + [cls(tuple(rng.permutation(num_experts).tolist()), first.name) for _ in layers[1:]]
        if text.endswith((".json", ".npy")):
            return cls._load(text, num_experts, len(layers))
        raise ValueError(f"placement {text!r} is unknown (accepted: {PLACEMENT_FORMS})")

    @classmethod
    def _load(cls, path: str, num_experts: int, num_layers: int) -> list[Placement]:
        try:
            if path.endswith(".npy"):
                slots = np.load(path, allow_pickle=False)
            else:
                slots = np.array(json.loads(Path(path).read_text(encoding="utf-8")))
            if slots.shape not in ((num_experts,), (num_layers, num_experts)):
                raise ValueError(
                    f"it has shape {slots.shape}, must be ({num_experts},) or ({num_layers}, {num_experts})"
                )
            return [cls(row, path) for row in np.broadcast_to(slots, (num_layers, num_experts))]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read a placement from {path} ({error})") from error

    @property
    def num_experts(self) -> int:
        return len(self.permutation)

    @property
    def experts(self) -> NDArray[np.int64]:
        """(num_experts,) the expert in each slot: the permutation's inverse."""
        return np.argsort(self.permutation)


def _experts_per_pe(num_experts: int, ep_size: int) -> int:
    if ep_size < 1 or num_experts % ep_size:
        raise ValueError(f"ep_size={ep_size} (must divide num_experts={num_experts})")
    return num_experts // ep_size
