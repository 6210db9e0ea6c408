"""One simulation as a point of a study: its inputs by name, what they resolve to, its digest and its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from importlib import metadata
from typing import Any, NamedTuple, get_type_hints

from flashmoe.families import FAMILIES
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.policy import resolve as resolve_policy
from flashmoe.routing import Routing
from flashmoe.sim import ENGINES, MODEL_VERSION, evaluate
from flashmoe.tasks import Tiling


class Input(NamedTuple):
    type: Any
    default: Any


INPUTS: dict[str, Input] = {
    "model": Input(str | MoEModel, "qwen3-30b-a3b"),
    "machine": Input(str | Machine, "mi300x"),
    "policy": Input(str | Policy, "static_phase"),
    "routing": Input(str, "uniform"),
    "ep": Input(int | None, None),  # 8, or what a recorded routing says
    "tokens": Input(int | None, None),  # per PE: 8, or what a recorded routing says
    "layers": Input(int | None, None),  # 1, or all that a recorded routing has
    "correlation": Input(float, 0.0),
    "seed": Input(int, 0),  # of the routing, and of what the machine leaves to chance
    "workers": Input(int | None, None),  # per PE: one for each CU
    "gate": Input(bool, True),
    "gap_us": Input(float | None, None),  # None: one launch for all layers
    "without": Input(tuple[str, ...], ()),
    "pe_speed": Input(tuple[float, ...] | None, None),
    "engine": Input(str, "native"),
}
_PARTS = {"model": MoEModel, "machine": Machine, "policy": Policy, "tiling": Tiling}
_NOT_OVERRIDDEN = {"name", "description", "origins", "tiling", "rank", "replay", "replay_digests"}


def _override_types() -> dict[str, Any]:
    types: dict[str, Any] = {}
    for part, of in _PARTS.items():
        hints = get_type_hints(of)
        types |= {
            f"{part}.{field.name}": hints[field.name] for field in fields(of) if field.name not in _NOT_OVERRIDDEN
        }
    return types


OVERRIDE_TYPES = _override_types()  # machine.signal_ps, tiling.up_rows, ...: single fields of what a name stands for


@lru_cache(maxsize=1)
def version() -> str:
    """Of all that decides a point's result beside its inputs."""
    return f"{metadata.version('flashmoe')}, model {MODEL_VERSION}"


@dataclass(frozen=True, eq=False)
class Point:
    """One simulation, resolved: whoever evaluates it needs to look nothing up but the files of a recorded routing.

    inputs: every name of INPUTS with its value, and the overrides that were given, as a row of results shows them.
    recorded: digests of the layers' routing where it comes from a file, else None.
    """

    inputs: Mapping[str, Any]
    model: MoEModel
    machine: Machine
    policy: Policy
    recorded: tuple[str, ...] | None

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """All that decides the result, ready for JSON: parameters instead of names, contents instead of files."""
        plain = {name: self.inputs[name] for name in INPUTS if name not in _PARTS}
        return {
            **plain,
            "without": sorted(self.inputs["without"]),
            "routing": self.recorded or self.inputs["routing"],
            "model": self.model.to_dict(),
            "machine": self.machine.to_dict(),
            "policy": self.policy.to_dict(),
            "tiling": self.policy.tiling.to_dict(),
        }

    @cached_property
    def digest(self) -> str:
        """32 hex digits that tell this simulation, in this version, from all others."""
        return digest_of(self.resolved)

    @cached_property
    def row(self) -> dict[str, Any]:
        """What a table of results says of it before it is evaluated; points that differ in the seed share `point`."""
        others = {key: value for key, value in self.resolved.items() if key != "seed"}
        return {"digest": self.digest, "point": digest_of(others), "version": version(), **self.inputs}

    def evaluate(self) -> dict[str, Any]:
        """Simulate it: the row, sim.Totals.to_dict(), error (None, or what went wrong) and wall_s."""
        began = time.perf_counter()
        try:
            outputs, error = self._totals(), None
        except Exception as problem:  # whatever it is, the other points of a study are not to be lost
            outputs, error = {}, f"{type(problem).__name__}: {problem}"
        return {**self.row, **outputs, "error": error, "wall_s": time.perf_counter() - began}

    def _totals(self) -> dict[str, Any]:
        given = self.inputs
        names = ("routing", "ep", "tokens", "layers", "correlation", "seed")
        routings = _draw(self.model, *(given[name] for name in names))
        if self.recorded is not None and self.recorded != tuple(routing.digest for routing in routings):
            raise ValueError(f"{given['routing']} has changed since, or is another file here")
        options = {name: given[name] for name in ("engine", "seed", "workers", "gate", "gap_us", "without", "pe_speed")}
        return evaluate(self.model, routing=routings, machine=self.machine, policy=self.policy, **options).to_dict()


def digest_of(values: Mapping[str, Any]) -> str:
    """32 hex digits of values that JSON knows, and of the version."""
    text = json.dumps([version(), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def unresolved_row(given: Mapping[str, Any], error: ValueError) -> dict[str, Any]:
    """The row of inputs that `resolve` refused."""
    inputs = {name: default for name, (_, default) in INPUTS.items()} | {
        name: getattr(value, "name", value) for name, value in given.items()
    }
    others = {name: value for name, value in inputs.items() if name != "seed"}
    about = {"digest": digest_of(inputs), "point": digest_of(others), "version": version()}
    return {**about, **inputs, "error": str(error), "wall_s": None}


def resolve(given: Mapping[str, Any]) -> Point:
    """Make a point of inputs by name, those of INPUTS and OVERRIDE_TYPES; their types are taken as right.

    Raises: ValueError naming the value that is not accepted, alone or beside the others.
    """
    inputs = {name: default for name, (_, default) in INPUTS.items()} | dict(given)
    overrides = {
        part: tuple((name.partition(".")[2], value) for name, value in given.items() if name.startswith(f"{part}."))
        for part in _PARTS
    }
    model = load_model(inputs["model"], overrides["model"])
    machine = load_machine(inputs["machine"], overrides["machine"])
    policy = load_policy(inputs["policy"])
    policy = replace(policy, tiling=_tiling(policy.tiling, dict(overrides["tiling"])), **dict(overrides["policy"]))
    inputs |= {"model": model.name, "machine": machine.name, "policy": policy.name}
    if inputs["engine"] not in ENGINES:
        raise ValueError(f"engine={inputs['engine']!r} (engines: {', '.join(ENGINES)})")
    if inputs["workers"] is None:
        inputs["workers"] = machine.num_cus
    recorded = None
    if _is_recorded(inputs["routing"]):
        names = ("routing", "ep", "tokens", "layers", "correlation", "seed")
        routings = _draw(model, *(inputs[name] for name in names))
        recorded = tuple(routing.digest for routing in routings)
        counts = set(routings[0].num_tokens)
        inputs |= {"ep": routings[0].ep_size, "layers": len(routings)}
        if len(counts) == 1:
            inputs["tokens"] = counts.pop()
    else:
        usual = {"ep": 8, "tokens": 8, "layers": 1}
        inputs |= {name: usual[name] for name in usual if inputs[name] is None}
    for name, value in (("model", model), ("machine", machine), ("policy", policy), ("tiling", policy.tiling)):
        # as resolved: a tiling's size of 0 stands for its default
        inputs |= {f"{name}.{field}": getattr(value, field) for field, _ in overrides[name]}
    return Point(inputs, model, machine, policy, recorded)


@lru_cache(maxsize=64)
def load_model(model: str | MoEModel, overrides: tuple[tuple[str, Any], ...] = ()) -> MoEModel:
    """What MoEModel.load gives, with some fields replaced."""
    return replace(MoEModel.load(model), **dict(overrides))


@lru_cache(maxsize=64)
def load_machine(machine: str | Machine, overrides: tuple[tuple[str, Any], ...] = ()) -> Machine:
    """A preset, a TOML file, or a machine as it is; with some parameters replaced, and without their origins."""
    if machine == "host":
        raise ValueError(
            "machine='host' is measured anew every time, so that no result would be found again "
            "(accepted: a preset, a .toml file, or in Python a Machine: Machine.load('host'))"
        )
    loaded = _machine_file(machine) if isinstance(machine, str) else machine
    return replace(loaded, origins={}, **dict(overrides))


@lru_cache(maxsize=16)
def _machine_file(machine: str) -> Machine:
    return Machine.load(machine)


def load_policy(policy: str | Policy) -> Policy:
    """A policy that any process can take by its fields alone."""
    loaded = resolve_policy(policy)
    if loaded.rank is not None or loaded.replay is not None:
        made = "is written in Python" if loaded.rank is not None else "replays a trace"
        raise ValueError(f"policy {loaded.name!r} {made} (accepted here: policies made of queue, order and look_ahead)")
    return loaded


def _tiling(own: Tiling, sizes: dict[str, Any]) -> Tiling:
    """The policy's own tiling with some sizes replaced; the others are the defaults of the way the layer is cut."""
    cut = {name: sizes.get(name, getattr(own, name)) for name in ("granularity", "down")}
    is_own = cut == {name: getattr(own, name) for name in cut}
    return replace(own, **sizes) if is_own else Tiling(**{**cut, **sizes})


def _is_recorded(text: str) -> bool:
    """Whether the routing, or the placement behind its @, is read from a file."""
    family = text.partition("@")[0].partition(":")[0]
    return family not in FAMILIES or text.endswith((".json", ".npy"))


@lru_cache(maxsize=32)  # points that differ in policy, machine or tiling share a routing
def _draw(
    model: MoEModel,
    text: str,
    ep: int | None,
    tokens: int | None,
    layers: int | None,
    correlation: float,
    seed: int,
) -> list[Routing]:
    how: dict[str, Any] = {"num_layers": layers, "correlation": correlation, "default": (8, 8)}
    return Routing.layers(text, model, tokens, ep, seed, **how)
