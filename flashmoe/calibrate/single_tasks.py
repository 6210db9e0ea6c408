"""From launches of layers to what a kernel's tasks cost beyond the device.

With one worker, which runs one task at a time; and with all of them, of which only the first task is looked at. Each
launch is simulated with these costs left out. What tasks take longer on the card is their fixed part. docs/model.md has
the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.calibrate.device import Parameter
from flashmoe.calibrate.measurements import Measurements
from flashmoe.machine import Machine, parameter_units
from flashmoe.measured import MeasuredLayer
from flashmoe.sim.costs import moved_bytes, num_active_experts, task_sizes
from flashmoe.trace import KINDS, Trace
from flashmoe.validate import kind_errors, simulate_as

# Kinds whose weights go through the ring; those that a layer opens with.
_FED, _OPENING = ("up", "down"), ("gate", "route")


class Step(NamedTuple):
    """Tasks of a kind and size: bytes of weights and activations, mean time from one start to the next."""

    num_bytes: float
    io_bytes: float
    step_ns: float


def bare_machine(machine: Machine, measured: Measurements) -> Machine:
    """The machine as one worker finds it, without what is to be found out."""
    ticket = measured.one("ticket", "latency", what="one SM, words and SMs vary", streams="idle")
    idle_ps = round(ticket.median * 1000)
    unknown: dict[str, Any] = {key: 0 for key in parameter_units() if key.endswith("_overhead_ps")}
    # lists are made, in no time: whoever routed waits for its own words, too
    unknown |= {"prologue_ps": 0, "plan_ps": 1, "plan_token_ps": 0, "gap_ps": 0, "feed_bytes_per_ns": 0.0}
    return replace(machine, **unknown, jitter=0.0, ticket_ps=idle_ps, ticket_far_ps=idle_ps)


def single_task_parameters(launches: Sequence[MeasuredLayer], bare: Machine) -> dict[str, Parameter]:
    """The kernel's rate, fixed parts by kind, prologue and lists. bare: see `bare_machine`.

    Of launches with one worker, those whose policy has experts sorted tell what that takes, and nothing else. Of those
    with more only gate and route tasks are looked at: they come first, and nothing else runs then.
    Raises: ValueError unless there are one of these and, with one worker, two numbers of tokens.
    """
    layers = [layer for layer in launches if layer.trace.num_workers == 1]
    openings = [layer for layer in launches if layer.trace.num_workers > 1]
    if not openings:
        raise ValueError("no launch with several workers (for gate and route tasks, all at once)")
    sorted_layers = [layer for layer in layers if layer.policy.sorts_experts(1)]
    layers = [layer for layer in layers if not layer.policy.sorts_experts(1)]
    tokens = np.array([layer.trace.header["num_tokens"][0] for layer in layers], np.float64)
    if len(set(tokens.tolist())) < 2:
        raise ValueError(f"launches of {sorted(set(tokens.tolist()))} tokens (must be two numbers at least)")
    steps = {kind: [_start_to_start(layer, kind, bare.word_tokens) for layer in layers] for kind in _FED}
    parameters = _feed([step for of_kind in steps.values() for step in of_kind if step is not None], bare)
    fed = replace(bare, **{key: parameter.value for key, parameter in parameters.items()})
    pairs = [(layer, simulate_as(layer, fed)) for layer in layers]
    for kind, of_kind in steps.items():
        found = [_missing_ns(*pair, kind, step) for pair, step in zip(pairs, of_kind, strict=True)]
        missing_ns = [missing for missing in found if missing is not None]
        if missing_ns:
            # Tasks are finished one after the other, beside the next: what it takes itself is no more than the least
            # time from one start to the next.
            least_ns = min((step.step_ns for step in of_kind if step is not None), default=None)
            parameters[f"{kind}_overhead_ps"] = _fixed(missing_ns, f"{kind} of one worker", least_ns)
    opened = [(layer, simulate_as(layer, fed)) for layer in openings]
    for kind in _OPENING:
        parameters[f"{kind}_overhead_ps"] = _by_size(opened, kind, f"{kind} of all workers at once")
    parameters["combine_overhead_ps"] = _by_size(pairs, "combine", "combine of one worker")
    # where all are in chains: the same warps end both
    parameters.setdefault("down_overhead_ps", parameters["up_overhead_ps"])
    starts_ns = [_first_start_ns(layer.trace) - _first_start_ns(simulated) for layer, simulated in pairs]
    parameters["prologue_ps"] = _fixed(starts_ns, "first instruction to the start of the first task, less a ticket")
    lists_ns = np.array([_lists_ns(layer.trace) - _lists_ns(simulated) for layer, simulated in pairs])
    told = f"end of the last route to the first up of one worker, {min(tokens):.0f} to {max(tokens):.0f} tokens"
    parameters |= _line("plan_ps", "plan_token_ps", tokens, lists_ns, told)
    return parameters | _sorting(sorted_layers, layers)


def _sorting(sorted_layers: Sequence[MeasuredLayer], layers: Sequence[MeasuredLayer]) -> dict[str, Parameter]:
    """What lists take longer where experts are sorted: a fixed part, a time an expert; nothing without two layers."""
    plain = {layer.trace.header["num_tokens"][0]: layer for layer in layers}
    pairs = [(layer, plain.get(layer.trace.header["num_tokens"][0])) for layer in sorted_layers]
    found = [(num_active_experts(one.table.tasks, 1)[0], one, other) for one, other in pairs if other is not None]
    if len(found) < 2:
        return {}
    experts = np.array([num_experts for num_experts, _, _ in found], np.float64)
    longer_ns = np.array([_lists_ns(one.trace) - _lists_ns(other.trace) for _, one, other in found])
    told = f"the same longer, where {min(experts):.0f} to {max(experts):.0f} experts are sorted"
    return _line("sort_ps", "sort_expert_ps", experts, longer_ns, told)


def _line(fixed: str, slope: str, x: NDArray[np.float64], y_ns: NDArray[np.float64], told: str) -> dict[str, Parameter]:
    """Two parameters, a fixed part and a time for each of x; neither is less than none."""
    slope_ns, fixed_ns = np.polyfit(x, y_ns, 1)
    spread_ns = float(np.max(np.abs(np.polyval([slope_ns, fixed_ns], x) - y_ns)))
    return {
        fixed: Parameter(max(0, round(fixed_ns * 1000)), spread_ns * 1000, "fitted", told),
        slope: Parameter(max(0, round(slope_ns * 1000)), 0.0, "fitted", told),
    }


def _feed(steps: Sequence[Step], bare: Machine) -> dict[str, Parameter]:
    """What a task costs where its weights do not hold it up, beside its activations: a fixed part, a time a byte.

    Least squares of the relative error of the time from start to start. steps: of each kind and size.
    """
    num_bytes, io_bytes, step_ns = np.array(steps).T
    weights, products_ns = 1 / step_ns, step_ns - io_bytes / bare.cache_bytes_per_ns
    slope, fixed = np.polyfit(num_bytes, products_ns, 1, w=weights)
    if np.mean(step_ns * bare.cu_bytes_per_ns / num_bytes) <= 1.05:
        slope = fixed = 0.0  # a CU's stream is slower: nothing was seen of the kernel
    spread = float(np.std(weights * (slope * num_bytes + fixed - products_ns)))
    told = f"start to start of up and down tasks of one worker, {len(steps)} kinds and sizes: {spread:.0%} rms"
    rate = 0.0 if slope <= 0 else 1 / float(slope)
    return {
        "feed_bytes_per_ns": Parameter(round(rate, 1), spread * rate, "fitted", told),
        "gap_ps": Parameter(max(0, round(float(fixed) * 1000)), spread * float(fixed) * 1000, "fitted", told),
    }


def _missing_ns(layer: MeasuredLayer, simulated: Trace, kind: str, step: Step | None) -> float | None:
    """What tasks of a kind take longer than in a simulation without a fixed part; None where that cannot be told.

    It cannot inside a chain, where the end of a task lies beside the next; nor where tasks take over twice as long as
    from one start to the next: they wait for others to be finished.
    """
    error = kind_errors(layer.table, simulated, layer.trace).get(kind)
    if error is None or _has_chains(layer, kind) or (step and error.measured_us * 1000 > 2 * step.step_ns):
        return None
    return 1000 * (error.measured_us - error.simulated_us)


def _start_to_start(layer: MeasuredLayer, kind: str, word_tokens: int) -> Step | None:
    """Of the tasks of a kind; None without two picks.

    Of a chain only the first start counts: how its tasks are told apart inside is the kernel's matter.
    """
    tasks, records = layer.table.tasks, layer.trace.records[np.argsort(layer.table.rows(layer.trace.records))]
    heads = np.flatnonzero((tasks["kind"] == KINDS.index(kind)) & (tasks["chain"] > 0))
    if len(heads) < 2:
        return None
    heads = heads[np.argsort(records["start_ps"][heads], kind="stable")]
    num_tasks = int(tasks["chain"][heads[:-1]].sum())
    passed_ps = int(records["start_ps"][heads[-1]] - records["start_ps"][heads[0]])
    of_kind = tasks["kind"] == KINDS.index(kind)
    num_bytes = float(np.median(tasks["weight_bytes"][of_kind]))
    io_bytes = float(moved_bytes(layer.table, word_tokens)[of_kind].mean())
    return Step(num_bytes, io_bytes, passed_ps / num_tasks / 1000)


def _fixed(missing_ns: list[float], what: str, most_ns: float | None = None) -> Parameter:
    """Nothing takes less than no time: where the model without a fixed part is too slow already, there is none."""
    value, spread = float(np.median(missing_ns)), float(np.ptp(missing_ns)) / 2
    source = f"{what}: {value:.4g} ± {spread:.2g} ns over {len(missing_ns)} launches"
    if most_ns is not None and most_ns < value:
        value, source = most_ns, f"{source}; at most {most_ns:.4g} ns, from start to start"
    return Parameter(max(0, round(value * 1000)), spread * 1000, "measured", source)


def _by_size(pairs: Sequence[tuple[MeasuredLayer, Trace]], kind: str, what: str) -> Parameter:
    """The fixed part of a kind for each size that most tasks of a launch have."""
    missing_ns: dict[int, list[float]] = {}
    for layer, simulated in pairs:
        error, tasks = kind_errors(layer.table, simulated, layer.trace).get(kind), layer.table.tasks
        if error is not None:
            size = int(np.median(task_sizes(tasks[tasks["kind"] == KINDS.index(kind)])))
            missing_ns.setdefault(size, []).append(1000 * (error.measured_us - error.simulated_us))
    if not missing_ns:
        return Parameter(0, 0.0, "measured", f"{what}: in no launch")
    found = {size: _fixed(of_size, what) for size, of_size in sorted(missing_ns.items())}
    times = tuple((size, int(parameter.value)) for size, parameter in found.items())
    spread_ps = max(parameter.spread for parameter in found.values())
    num_launches = sum(len(of_size) for of_size in missing_ns.values())
    return Parameter(times, spread_ps, "measured", f"{what}, {len(times)} sizes, over {num_launches} launches")


def _has_chains(layer: MeasuredLayer, kind: str) -> bool:
    tasks = layer.table.tasks
    return bool((tasks["chain"][tasks["kind"] == KINDS.index(kind)] != 1).any())


def _first_start_ns(trace: Trace) -> float:
    return float(trace.records["start_ps"].min()) / 1000


def _lists_ns(trace: Trace) -> float:
    records, kinds = trace.records, trace.kind_names
    return float(records["start_ps"][kinds == "up"].min() - records["end_ps"][kinds == "route"].max()) / 1000
