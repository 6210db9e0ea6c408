"""The machine that a schedule runs on: a few physical parameters, each with its unit and its origin."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

# Units that a file may use for a field of each unit, and their size in it.
_UNITS: dict[str, dict[str, float]] = {
    "ps": {"ps": 1, "ns": 1_000, "us": 1_000_000},
    "bytes/ns": {"bytes/ns": 1, "GB/s": 1},
    "flop/ns": {"flop/ns": 1, "TFLOP/s": 1_000},
    "count": {"count": 1},
    "ratio": {"ratio": 1},
    "flag": {"flag": 1},
}
_LONGEST_PS = 10**12  # a second: far beyond any of these times, and sums of them stay in 64 bits
_LARGEST_TASK = 65535  # sizes of tasks that a time may be given for
_ORIGINS = ("measured", "datasheet", "estimate", "fitted")
_NAMES = ("name", "base", "description")  # keys of a file that are not parameters

Times = tuple[tuple[int, int], ...]  # (size of a task, time [ps]), sizes ascending


class Origin(NamedTuple):
    """Where a parameter's value comes from."""

    unit: str  # of the value in Machine, whatever unit the file used
    origin: str  # measured | datasheet | estimate | fitted
    source: str


def _parameter(
    unit: str, what: str, *, least: float | None = None, most: float = math.inf, sizes: str = "", **options: Any
) -> Any:
    """A field of Machine. least: by default 0 for a time, 1 for a count, and any positive number for the others.

    A time is a second at most. sizes: it may be one, or one for each of several sizes of a task, in these.
    """
    if unit == "ps":
        least, most = 0, _LONGEST_PS
    elif least is None and unit == "count":
        least = 1
    if sizes:
        what += f"; or [[size, time], ...], sizes in {sizes}, in proportion between"
    return field(metadata={"unit": unit, "what": what, "least": least, "most": most, "by_size": sizes != ""}, **options)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of GPU (or host) and the fabric between several of them, one PE a GPU.

    The unit and the meaning of each field are in its metadata: `parameter_units()`, `parameter_meanings()`.
    A field with a default may be left out: the default is the simpler machine that does not have this.
    Workers are dealt to the domains in turn. Raises: ValueError naming the field, its value and what is accepted.
    """

    name: str
    num_cus: int = _parameter("count", "CUs (SMs) of one PE: its workers, one a CU", most=65535)
    num_domains: int = _parameter("count", "groups of CUs with an L2 of their own (XCDs)")
    num_pes_max: int = _parameter("count", "largest number of PEs that the fabric joins")
    # memory
    hbm_bytes_per_ns: float = _parameter("bytes/ns", "achieved memory bandwidth of one PE")
    cu_bytes_per_ns: float = _parameter("bytes/ns", "most that one CU can stream from memory")
    knee: float = _parameter(
        "ratio",
        "how sharply a stream's rate turns from the CU's cap c to its share s of the memory: exponent p of "
        "(c^-p + s^-p)^(-1/p), at least 1; 0: the lesser of the two",
        least=0,
        default=0.0,
    )
    prefetch: bool = _parameter("flag", "weights stream before a task's inputs are ready")
    # launch
    launch_ps: int = _parameter("ps", "launch to the first instruction of a PE's first worker", default=0)
    launch_domain_ps: int = _parameter(
        "ps", "a domain's first worker starts this much after the domain's before", default=0
    )
    launch_step_ps: int = _parameter("ps", "a worker starts this much after the one before in its domain", default=0)
    prologue_ps: int = _parameter("ps", "a worker's first instruction to its first request for a pick", default=0)
    # queues
    ticket_ps: int = _parameter("ps", "ticket from a counter of the own domain, beyond its service")
    ticket_far_ps: int = _parameter("ps", "ticket from a counter that several domains use, beyond its service")
    ticket_service_ps: int = _parameter("ps", "serial part of a ticket, counter of the own domain")
    ticket_far_service_ps: int = _parameter("ps", "serial part of a ticket, counter that several domains use")
    first_given: bool = _parameter(
        "flag", "a launch hands out the first tickets, to worker after worker, and they take no time", default=False
    )
    ask_early: bool = _parameter(
        "flag",
        "with prefetch, a worker asks for its next pick when it starts a task, not when that task's weights are there",
        default=False,
    )
    in_order: bool = _parameter(
        "flag",
        "a worker runs its picks in the order in which it took them, and takes one more while the oldest waits: a "
        "policy's look-ahead does not count",
        default=False,
    )
    # signals inside a PE
    signal_ps: int = _parameter("ps", "release to being seen by a CU of another domain, memory idle")
    signal_near_ps: int = _parameter("ps", "release to being seen by a CU of the same domain, memory idle")
    signal_load_factor: float = _parameter(
        "ratio", "a signal takes this many times as long when the memory is fully loaded", least=1, default=1.0
    )
    # how a kernel ends a task
    release_ps: int = _parameter(
        "ps", "an up, down or expert task's stores are made visible before it signals, memory idle", default=0
    )
    release_load_factor: float = _parameter(
        "ratio", "a release takes this many times as long when the memory is fully loaded", least=1, default=1.0
    )
    finish_beside: bool = _parameter(
        "flag",
        "what follows the arithmetic of an up, down or expert task runs beside the worker's next task, one at a time",
        default=False,
    )
    word_tokens: int = _parameter(
        "count",
        "a PE with at most so many tokens sends results as words that are their own signal: no releases, hidden rows "
        "of twice the bytes, and every worker routes for itself; 0: never",
        least=0,
        default=0,
    )
    plan_ps: int = _parameter("ps", "a worker makes the lists of its experts, fixed part", default=0)
    plan_token_ps: int = _parameter("ps", "the same, for each token of the layer", default=0)
    sort_ps: int = _parameter(
        "ps", "and sorts its experts, if the policy's order is not that of ids, fixed part", default=0
    )
    sort_expert_ps: int = _parameter("ps", "the same, for each expert of the PE that has tokens", default=0)
    # fabric
    put_ps: int = _parameter("ps", "put with signal to another PE, one way, beyond its bytes")
    link_bytes_per_ns: float = _parameter("bytes/ns", "one direction between two PEs")
    port_bytes_per_ns: float = _parameter(
        "bytes/ns", "one direction of all links of a PE together; 0: no limit beyond the links", least=0, default=0.0
    )
    link_message_ps: int = _parameter("ps", "a message holds its link and ports this long beyond its bytes", default=0)
    store_bytes_per_ns: float = _parameter("bytes/ns", "remote stores of one CU, which is busy meanwhile")
    # arithmetic
    cu_flops_per_ns: float = _parameter("flop/ns", "achieved matrix rate of one CU")
    matrix_tokens: int = _parameter("count", "tokens of a matrix instruction: a task's are padded to it", default=1)
    matrix_rows: int = _parameter("count", "weight rows of a matrix instruction: a task's are padded to it", default=1)
    cache_bytes_per_ns: float = _parameter(
        "bytes/ns", "activations through the cache, one CU, beside the streams of experts' weights"
    )
    cache_idle_bytes_per_ns: float = _parameter(
        "bytes/ns",
        "the same of gate, route, dispatch and combine tasks, which come before and after those streams; "
        "0: as beside them",
        least=0,
        default=0.0,
    )
    cache_bytes: int = _parameter(
        "count",
        "weights leave the cache after so many bytes of others read from memory, on average; 0: always from memory",
        least=0,
        default=0,
    )
    feed_bytes_per_ns: float = _parameter(
        "bytes/ns",
        "weights from where they have arrived through the products, one CU, however few tokens; 0: no limit",
        least=0,
        default=0.0,
    )
    # fixed parts
    gate_overhead_ps: int | Times = _parameter("ps", "fixed part of a gate task", sizes="tokens x experts")
    route_overhead_ps: int | Times = _parameter("ps", "fixed part of a route task", sizes="tokens")
    dispatch_overhead_ps: int | Times = _parameter("ps", "fixed part of a dispatch task", sizes="tokens")
    up_overhead_ps: int | Times = _parameter("ps", "fixed part of an up task", sizes="rows of weights")
    down_overhead_ps: int | Times = _parameter("ps", "fixed part of a down task", sizes="rows of weights")
    combine_overhead_ps: int | Times = _parameter("ps", "fixed part of a combine task", sizes="tokens")
    expert_overhead_ps: int | Times = _parameter("ps", "fixed part of an expert task", sizes="rows of weights")
    gap_ps: int = _parameter("ps", "a worker's bookkeeping between two tasks", default=0)
    # what differs from task to task and from PE to PE
    jitter: float = _parameter(
        "ratio", "sigma of the lognormal factor (mean 1) on a task's time", least=0, most=1, default=0.0
    )
    jitter_bytes: int = _parameter(
        "count",
        "bytes over which luck evens out: a task that streams k times as many has jitter / sqrt(k); 0: never",
        least=0,
        default=0,
    )
    stall_probability: float = _parameter("ratio", "share of the tasks that stall", least=0, most=1, default=0.0)
    stall_ps: int = _parameter("ps", "extra time of a task that stalls", default=0)
    pe_spread: float = _parameter(
        "ratio", "standard deviation of a PE's persistent speed factor", least=0, most=1, default=0.0
    )
    # a host of threads
    num_cores: int = _parameter("count", "cores that the workers of all PEs share; 0: each is a CU", least=0, default=0)
    slice_ps: int = _parameter("ps", "a worker keeps its core this long while others wait for one", default=0)
    description: str = field(default="", compare=False, repr=False)
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key in parameter_units():
            value = getattr(self, key)
            if isinstance(value, list) and all(isinstance(pair, list | tuple) for pair in value):  # as JSON has it
                object.__setattr__(self, key, value := tuple(tuple(pair) for pair in value))
            _check(key, value)
        if 0 < self.knee < 1:
            raise ValueError(f"knee={self.knee} (must be 0, or at least 1)")
        if self.signal_near_ps > self.signal_ps:
            raise ValueError(f"signal_near_ps={self.signal_near_ps} (must be at most signal_ps={self.signal_ps})")
        if self.num_cores > 0 and self.pe_spread > 0:
            raise ValueError(f"pe_spread={self.pe_spread} with num_cores > 0 (must be 0: the PEs share the cores)")
        if self.num_cores > 0 and self.prefetch:
            raise ValueError("prefetch=True with num_cores > 0 (must be False: only a running thread loads anything)")
        if self.num_cores > 0 and self.finish_beside:
            raise ValueError("finish_beside=True with num_cores > 0 (must be False: a thread does one thing at a time)")
        if self.num_domains > self.num_cus:
            raise ValueError(f"num_domains={self.num_domains} (must be at most num_cus={self.num_cus})")

    @classmethod
    def preset(cls, name: str) -> Machine:
        """A machine that comes with the package; ValueError naming the presets if there is no such one."""
        if name not in preset_names():
            raise ValueError(
                f"unknown machine {name!r} (presets: {', '.join(preset_names())}; or 'host', or a .toml file)"
            )
        return _load_preset(name)

    @classmethod
    def load(cls, machine: str | Path | Machine) -> Machine:
        """A Machine as it is, "host" (measured on the spot), a preset's name, or a TOML file."""
        if isinstance(machine, Machine):
            return machine
        if str(machine) == "host":
            from flashmoe.calibrate import host_machine  # measures for seconds: only who asks for it pays

            return host_machine()
        path = Path(machine)
        if path.suffix != ".toml":
            return cls.preset(str(machine))
        if not path.is_file():
            raise ValueError(f"no machine file {str(path)!r} (presets: {', '.join(preset_names())})")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"machine file {str(path)!r} is not UTF-8: {error}") from error
        return _from_toml(text, path.stem)

    def overheads(self, kind: str) -> Times:
        """Fixed part of a task of this kind: sizes of tasks, ascending, and the time of each [ps]."""
        value = getattr(self, f"{kind}_overhead_ps", None)
        if value is None:
            kinds = [key.removesuffix("_overhead_ps") for key in parameter_units() if key.endswith("_overhead_ps")]
            raise ValueError(f"unknown task kind {kind!r} (kinds: {', '.join(kinds)})")
        return value if isinstance(value, tuple) else ((1, value),)

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, ready for JSON; without the origins."""
        return {"name": self.name} | {key: getattr(self, key) for key in parameter_units()}

    def save(self, path: str | Path) -> None:
        """Write a machine file that `load` reads. Raises: ValueError for a parameter without an origin."""
        Path(path).write_text(_to_toml(self), encoding="utf-8")


def parameter_units() -> dict[str, str]:
    """Unit of each parameter, by field name."""
    return {item.name: item.metadata["unit"] for item in fields(Machine) if "unit" in item.metadata}


def parameter_meanings() -> dict[str, str]:
    """What each parameter is, by field name."""
    return {item.name: item.metadata["what"] for item in fields(Machine) if "what" in item.metadata}


def preset_names() -> tuple[str, ...]:
    """Machines that come with the package; "host" is measured, not a preset."""
    return tuple(
        sorted(item.name.removesuffix(".toml") for item in _preset_folder().iterdir() if item.name.endswith(".toml"))
    )


@lru_cache  # a sweep asks for the same few machines thousands of times
def _load_preset(name: str) -> Machine:
    return _from_toml((_preset_folder() / f"{name}.toml").read_text(encoding="utf-8"), name)


def _preset_folder() -> Any:
    return resources.files("flashmoe") / "presets"


def _check(key: str, value: Any, written: str = "") -> None:
    """Raise ValueError unless Machine takes the value of this parameter. written: the value as a file has it."""
    about = Machine.__dataclass_fields__[key].metadata
    unit, least, most = about["unit"], about["least"], about["most"]
    if unit == "flag":
        good, accepted = isinstance(value, bool), "true or false"
    else:
        whole = unit in ("ps", "count")
        limits = "positive" if least is None else f"at least {least}"
        limits += f" and at most {most}" if most < math.inf else ""
        accepted = f"a {'whole' if whole else 'finite'} number, {limits} [{unit}]"

        def fits(number: Any) -> bool:
            good = type(number) is int or (type(number) is float and not whole and math.isfinite(number))
            return good and bool(number > 0 if least is None else least <= number <= most)

        if about["by_size"] and isinstance(value, tuple):
            accepted = f"[[size, time], ...], sizes ascending in 1..{_LARGEST_TASK}, each time {accepted}"
            sizes = [0, *(pair[0] for pair in value if len(pair) == 2)]
            good = len(sizes) == len(value) + 1 > 1 and all(type(size) is int for size in sizes)
            good = good and sizes == sorted(set(sizes)) and sizes[-1] <= _LARGEST_TASK
            good = good and all(fits(time) for _, time in value)
        else:
            good = fits(value)
    if not good:
        raise ValueError(f"{key}={written or repr(value)} (must be {accepted})")


def _from_toml(text: str, default_name: str) -> Machine:
    """Parse a machine file: `key = { value, unit, origin, source }` each, over `base = "preset"` if given.

    What comes from a base is an estimate here, however it was found there: this is another machine.
    """
    try:
        entries = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"machine file {default_name!r} is not TOML: {error}") from error
    units = parameter_units()
    if unknown := [key for key in entries if key not in units and key not in _NAMES]:
        raise ValueError(
            f"unknown machine parameter {unknown[0]!r} (parameters: {', '.join(units)}; also {', '.join(_NAMES)})"
        )
    for key in _NAMES:
        if not isinstance(entries.get(key, ""), str):
            raise ValueError(f"{key} = {entries[key]!r} (must be a text)")
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    if "base" in entries:
        if entries["base"] not in preset_names():
            raise ValueError(f"base = {entries['base']!r} (must be a preset: {', '.join(preset_names())})")
        base = Machine.preset(entries["base"])
        values = base.to_dict()
        origins = {
            key: Origin(unit, "estimate", f"as {base.name} ({origin}): {source}")
            for key, (unit, origin, source) in base.origins.items()
        }
    values["name"] = entries.get("name", default_name)
    for key in units.keys() & entries.keys():
        values[key], origins[key] = _read_entry(key, entries[key], units[key])
    if missing := [
        item.name for item in fields(Machine) if item.default is MISSING and item.name in units.keys() - values.keys()
    ]:
        raise ValueError(
            f"machine {values['name']!r} lacks {', '.join(missing)} (give them, or a base: {', '.join(preset_names())})"
        )
    return Machine(**values, description=entries.get("description", ""), origins=origins)


def _to_toml(machine: Machine) -> str:
    lines = [f"name = {json.dumps(machine.name)}", f"description = {json.dumps(machine.description)}", ""]
    defaults = {item.name: item.default for item in fields(Machine)}
    for key, unit in parameter_units().items():
        value = getattr(machine, key)
        if key not in machine.origins:
            if value == defaults[key]:
                continue
            raise ValueError(f"{key}={value} has no origin (a machine file says of each parameter where it is from)")
        scaled, written = (value, unit) if unit != "ps" else (_in_ns(value), "ns")
        _, origin, source = machine.origins[key]
        texts = f'unit = "{written}", origin = "{origin}", source = {json.dumps(source, ensure_ascii=False)}'
        lines.append(f"{key} = {{ value = {json.dumps(scaled)}, {texts} }}")
    return "\n".join(lines) + "\n"


def _in_ns(value: int | Times) -> Any:
    return [[size, time / 1000] for size, time in value] if isinstance(value, tuple) else value / 1000


def _read_entry(key: str, entry: Any, unit: str) -> tuple[Any, Origin]:
    wanted = {"value", "unit", "origin", "source"}
    if not isinstance(entry, dict) or entry.keys() != wanted:
        raise ValueError(f"{key} = {entry!r} (must be a table with value, unit, origin and source)")
    if entry["unit"] not in _UNITS[unit]:
        raise ValueError(f"{key} has unit {entry['unit']!r} (accepted: {', '.join(_UNITS[unit])})")
    if entry["origin"] not in _ORIGINS:
        raise ValueError(f"{key} has origin {entry['origin']!r} (accepted: {', '.join(_ORIGINS)})")
    value, scale = entry["value"], _UNITS[unit][entry["unit"]]
    written = "" if scale == 1 or type(value) not in (int, float) else f"{value!r} {entry['unit']}"
    if isinstance(value, list) and Machine.__dataclass_fields__[key].metadata["by_size"]:
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise ValueError(f"{key} = {value!r} (must be a number, or [[size, time], ...])")
        value = tuple((size, _scaled(time, scale, unit)) for size, time in value)
    else:
        value = _scaled(value, scale, unit)
    _check(key, value, written)
    return value, Origin(unit, entry["origin"], str(entry["source"]))


def _scaled(value: Any, scale: float, unit: str) -> Any:
    """A value of a file in the unit of Machine; what is no number stays as it is."""
    if scale == 1 or type(value) not in (int, float):
        return value
    value *= scale
    if unit == "ps" and abs(value) < math.inf:  # neither infinite nor NaN, which do not round
        value = round(value)
    return value
