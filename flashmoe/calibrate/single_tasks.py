"""From launches with one worker, which runs one task at a time, to what a kernel's tasks cost beyond the device.

Each launch is simulated with these costs left out, on a machine that is idle as the card is then. What tasks take
longer on the card is their fixed part. docs/model.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flashmoe.calibrate.device import Parameter
from flashmoe.calibrate.measurements import Measurements
from flashmoe.machine import Machine, parameter_units
from flashmoe.measured import MeasuredLayer
from flashmoe.trace import KINDS, Trace
from flashmoe.validate import kind_errors, simulate_as

# kinds that a layer on one PE with tiles has
_TIMED = ("gate", "route", "up", "down", "combine")


def bare_machine(machine: Machine, measured: Measurements) -> Machine:
    """The machine as one worker finds it, without what is to be found out."""
    read = measured.one("l2_read", "rate_of_an_sm", bytes=65536, sms=1, by="loads of 256 threads", streams="idle")
    ticket = measured.one("ticket", "latency", what="one SM, words and SMs vary", streams="idle")
    unknown: dict[str, Any] = {key: 0 for key in parameter_units() if key.endswith("_overhead_ps")}
    return replace(
        machine,
        **unknown,
        prologue_ps=0,
        plan_ps=0,
        plan_token_ps=0,
        gap_ps=0,
        jitter=0.0,
        cache_bytes_per_ns=read.median,
        ticket_ps=round(ticket.median * 1000),
        ticket_far_ps=round(ticket.median * 1000),
    )


def single_task_parameters(layers: Sequence[MeasuredLayer], bare: Machine) -> dict[str, Parameter]:
    """Fixed parts by kind, prologue and lists. bare: see `bare_machine`.

    Raises: ValueError unless each layer was launched with one worker, and there are two numbers of tokens.
    """
    for layer in layers:
        if layer.trace.num_workers != 1:
            raise ValueError(f"a launch with {layer.trace.num_workers} workers (must be 1: one task at a time)")
    tokens = np.array([layer.trace.header["num_tokens"][0] for layer in layers], np.float64)
    if len(set(tokens.tolist())) < 2:
        raise ValueError(f"launches of {sorted(set(tokens.tolist()))} tokens (must be two numbers at least)")
    pairs = [(layer, simulate_as(layer, bare)) for layer in layers]
    parameters = {}
    for kind in _TIMED:
        missing_ns = []
        for layer, simulated in pairs:
            error = kind_errors(layer.table, simulated, layer.trace).get(kind)
            if error is not None:
                picks_length = _mean_chain(layer, kind)
                missing_ns.append(1000 * (error.measured_us - error.simulated_us) / picks_length)
        if missing_ns:
            parameters[f"{kind}_overhead_ps"] = _fixed(missing_ns, f"{kind} tasks of one worker")
    starts = [_first_start_ns(layer.trace) - _first_start_ns(simulated) for layer, simulated in pairs]
    parameters["prologue_ps"] = _fixed(starts, "first instruction to the start of the first task, less a ticket")
    lists_ns = np.array([_lists_ns(layer.trace) - _lists_ns(simulated) for layer, simulated in pairs])
    slope_ns, fixed_ns = np.polyfit(tokens, lists_ns, 1)
    spread_ns = float(np.max(np.abs(np.polyval([slope_ns, fixed_ns], tokens) - lists_ns)))
    told = f"end of the last route to the first up of one worker, {min(tokens):.0f} to {max(tokens):.0f} tokens"
    parameters["plan_ps"] = Parameter(max(0, round(fixed_ns * 1000)), spread_ns * 1000, "fitted", told)
    parameters["plan_token_ps"] = Parameter(max(0, round(slope_ns * 1000)), 0.0, "fitted", told)
    return parameters


def _fixed(missing_ns: list[float], what: str) -> Parameter:
    """Nothing takes less than no time: where the model without a fixed part is too slow already, there is none."""
    value, spread = float(np.median(missing_ns)), float(np.ptp(missing_ns)) / 2
    source = f"{what}: {value:.4g} ± {spread:.2g} ns over {len(missing_ns)} launches"
    return Parameter(max(0, round(value * 1000)), spread * 1000, "measured", source)


def _mean_chain(layer: MeasuredLayer, kind: str) -> float:
    tasks = layer.table.tasks
    chains = tasks["chain"][(tasks["kind"] == KINDS.index(kind)) & (tasks["chain"] > 0)]
    return float(chains.mean())


def _first_start_ns(trace: Trace) -> float:
    return float(trace.records["start_ps"].min()) / 1000


def _lists_ns(trace: Trace) -> float:
    records, kinds = trace.records, trace.kind_names
    return float(records["start_ps"][kinds == "up"].min() - records["end_ps"][kinds == "route"].max()) / 1000
