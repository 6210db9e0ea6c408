"""Times that no schedule of a task table can beat on a machine, and which of them explains a makespan."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from flashmoe.machine import Machine
from flashmoe.sim.costs import PLANNED_KINDS, Costs, task_costs
from flashmoe.tasks import TaskTable, segment_owner
from flashmoe.trace import KINDS, Trace

_SAFETY = 1.0 - 1e-9  # rounding of shared bandwidth to float64 may end a stream this much early


def lower_bounds(table: TaskTable, machine: Machine, num_workers: int) -> dict[str, int]:
    """Lower bounds of the makespan by name [ps], each valid for every queue, order and look-ahead.

    hbm: distinct weight bytes of the busiest PE over its bandwidth (on a host: of all PEs, they share a memory).
    workers: work of the busiest PE over its workers (on a host: of all PEs over the cores).
    longest_task: the longest pick alone on the machine.
    critical_path: the longest chain of dependences with unlimited workers.
    links: the busiest direction of a link (mesh) or of a port (switch).
    """
    costs = task_costs(table, machine)
    return {
        "hbm": _hbm_ps(table, machine, costs),
        "workers": _workers_ps(table, machine, costs, num_workers),
        "longest_task": _longest_pick_ps(table, costs),
        "critical_path": _critical_path_ps(table, machine, costs),
        "links": _links_ps(table, machine),
    }


def distinct_weight_bytes(table: TaskTable) -> NDArray[np.float64]:
    """(num_pes,) float64, weights that each PE reads at least once, however often tasks stream them [bytes].

    Tasks of one kind, expert and tile read the same weights.
    """
    tasks = table.tasks
    _, index, tile = np.unique(tasks[["pe", "kind", "expert", "tile"]], return_index=True, return_inverse=True)
    largest = np.zeros(len(index))
    np.maximum.at(largest, tile.reshape(-1), tasks["weight_bytes"].astype(np.float64))
    return np.bincount(tasks["pe"][index], weights=largest, minlength=table.num_pes).astype(np.float64)


def _hbm_ps(table: TaskTable, machine: Machine, costs: Costs) -> int:
    distinct = distinct_weight_bytes(table)
    busiest = distinct.sum() if machine.num_cores > 0 else distinct.max(initial=0.0)
    return int(busiest / machine.hbm_bytes_per_ns * 1000.0 * _SAFETY)


def _workers_ps(table: TaskTable, machine: Machine, costs: Costs, num_workers: int) -> int:
    sums = [np.bincount(table.tasks["pe"], weights=work, minlength=table.num_pes) for work in _stages(costs)]
    bound_ps = max(total.max(initial=0.0) for total in sums) / num_workers
    if machine.num_cores > 0:
        bound_ps = max(bound_ps, max(total.sum() for total in sums) / machine.num_cores)
    return int(bound_ps * _SAFETY)


def _stages(costs: Costs) -> list[NDArray[np.int64]]:
    """What a worker does one task after the other: with prefetch it streams for one while it runs another."""
    return [costs.stream_ps, costs.compute_ps + costs.after_ps] if costs.early else [costs.least_ps]


def _longest_pick_ps(table: TaskTable, costs: Costs) -> int:
    if len(table.tasks) == 0:
        return 0
    heads = np.flatnonzero(table.tasks["chain"])
    stages = [*_stages(costs), np.where(table.tasks["chain"] > 0, costs.least_ps, 0)]
    return int(max(np.add.reduceat(stage, heads).max() for stage in stages) * _SAFETY)


def _critical_path_ps(table: TaskTable, machine: Machine, costs: Costs) -> int:
    """Earliest end of the last task. Signals inside a PE cost nothing: one worker may run both ends."""
    tasks = table.tasks
    pe, kind = tasks["pe"].tolist(), tasks["kind"].tolist()
    inside_chain = (tasks["chain"] == 0).tolist()
    stream_ps, compute_ps, after_ps = (
        costs.stream_ps.tolist(),
        costs.compute_ps.tolist(),
        costs.after_ps.tolist(),
    )
    wait_ptr, wait_event = table.wait_ptr.tolist(), table.wait_event.tolist()
    signal_ptr, signal_event = table.signal_ptr.tolist(), table.signal_event.tolist()
    trip_ps = _trip_ps(table, machine).tolist()
    wanted: list[int] = table.event_target.tolist()
    planned = table.planned_event.tolist()
    event_ps = [0.0] * len(wanted)  # earliest time at which an event is complete
    waiters: list[list[int]] = [[] for _ in wanted]
    missing = [0] * len(tasks)  # inputs, the plan and the task before in the chain, each until it is known
    for row in range(len(tasks)):
        needs = [event for event in wait_event[wait_ptr[row] : wait_ptr[row + 1]] if wanted[event] > 0]
        if kind[row] in PLANNED_KINDS and wanted[planned[pe[row]]] > 0:
            needs.append(planned[pe[row]])
        missing[row] = len(needs) + inside_chain[row]
        for event in needs:
            waiters[event].append(row)
    end_ps = [0.0] * len(tasks)
    weights_ps = [0.0] * len(tasks)  # earliest time at which a task's weights are there
    known = deque(row for row, count in enumerate(missing) if count == 0)
    while known:
        row = known.popleft()
        reached_ps = end_ps[row - 1] if inside_chain[row] else 0.0
        plan_ps = event_ps[planned[pe[row]]] if kind[row] in PLANNED_KINDS else 0.0
        inputs_ps = max((event_ps[event] for event in wait_event[wait_ptr[row] : wait_ptr[row + 1]]), default=0.0)
        start_ps = max(reached_ps, inputs_ps)
        # with prefetch the next task of a chain streams as soon as the one before has its weights
        streams_from_ps = max(weights_ps[row - 1] if inside_chain[row] else 0.0, plan_ps)
        weights_from_ps = streams_from_ps if costs.early else start_ps
        weights_ps[row] = weights_from_ps + stream_ps[row]
        end_ps[row] = max(start_ps + compute_ps[row], weights_ps[row]) + after_ps[row]
        if row + 1 < len(tasks) and inside_chain[row + 1]:
            missing[row + 1] -= 1
            if missing[row + 1] == 0:
                known.append(row + 1)
        for i in range(signal_ptr[row], signal_ptr[row + 1]):
            event = signal_event[i]
            event_ps[event] = max(event_ps[event], end_ps[row] + trip_ps[i])
            wanted[event] -= 1
            if wanted[event] == 0:
                for waiter in waiters[event]:
                    missing[waiter] -= 1
                    if missing[waiter] == 0:
                        known.append(waiter)
    return int(max(end_ps, default=0.0) * _SAFETY)


def _trip_ps(table: TaskTable, machine: Machine) -> NDArray[np.float64]:
    """(number of signals,) float64, least time from the end of a task to its signal being seen [ps]."""
    remote = table.tasks["pe"][segment_owner(table.signal_ptr)] != table.event_pe[table.signal_event]
    hops = 1 if machine.link_topology == "mesh" else 2
    trip_ps: NDArray[np.float64] = machine.put_ps + hops * table.signal_bytes / machine.link_bytes_per_ns * 1000.0
    return np.where(remote, trip_ps, 0.0)


def _links_ps(table: TaskTable, machine: Machine) -> int:
    source = table.tasks["pe"][segment_owner(table.signal_ptr)].astype(np.int64)
    destination = table.event_pe[table.signal_event].astype(np.int64)
    traffic = np.zeros((table.num_pes, table.num_pes))
    np.add.at(traffic, (source, destination), table.signal_bytes)
    np.fill_diagonal(traffic, 0.0)
    if machine.link_topology == "mesh":
        busiest = traffic.max(initial=0.0)
    else:
        busiest = max(traffic.sum(axis=0).max(initial=0.0), traffic.sum(axis=1).max(initial=0.0))
    return int(busiest / machine.link_bytes_per_ns * 1000.0 * _SAFETY)


def explain(trace: Trace) -> str:
    """Why a simulated makespan is what it is: the bound that binds, and where the workers' time went.

    Raises: ValueError for a trace that was not simulated (it has no bounds).
    """
    header = trace.header
    if "bounds_ps" not in header:
        raise ValueError(f"no bounds in a trace of executor {header.get('executor')!r} (only simulated ones have them)")
    if len(trace.records) == 0:
        return "No tasks: nothing to do, nothing to explain."
    bounds: dict[str, int] = header["bounds_ps"]
    largest = max(bounds, key=lambda name: bounds[name])
    sentences = [
        f"The makespan is {trace.makespan_us:.1f} us, {1 + header['headroom']:.2f} times its largest bound: "
        f"{_BINDING[largest]}, {bounds[largest] / 1e6:.1f} us."
    ]
    if bounds["longest_task"] > bounds["hbm"]:
        sentences.append(_longest_in_words(trace))
    distinct = header["distinct_weight_bytes"]
    if distinct and header["hbm_bytes"] > 1.05 * distinct:
        sentences.append(
            f"The tasks stream {header['hbm_bytes'] / 1e6:.1f} MB, "
            f"{header['hbm_bytes'] / distinct:.1f} times the {distinct / 1e6:.1f} MB of distinct weights."
        )
    sentences.append(_time_in_words(trace))
    return " ".join(sentences)


_BINDING = {
    "hbm": "the distinct weights of the busiest PE at full memory bandwidth",
    "workers": "the work of the busiest PE, spread evenly over its workers",
    "longest_task": "the longest pick alone",
    "critical_path": "the longest chain of tasks that wait for each other",
    "links": "the bytes over the busiest link",
}


def _longest_in_words(trace: Trace) -> str:
    header = trace.header
    of_an_expert = [KINDS.index(kind) for kind in ("up", "down", "expert")]
    records = trace.records[np.isin(trace.records["kind"], of_an_expert)]
    if len(records) == 0:
        return "No worker ever had an expert."
    num_busy = len(np.unique(records[["pe", "worker"]]))
    longest = records[np.argmax(records["hbm_bytes"])]
    num_bytes = int(longest["hbm_bytes"])
    cap = header["machine_parameters"]["cu_bytes_per_ns"]
    what = "a whole expert" if KINDS[longest["kind"]] == "expert" else f"a tile of {KINDS[longest['kind']]}"
    num_workers = header["num_workers"] * header["ep_size"]
    longest_us, memory_us = (header["bounds_ps"][name] / 1e6 for name in ("longest_task", "hbm"))
    return (
        f"Only {num_busy} of {num_workers} workers ever had a part of an expert, and the longest pick alone "
        f"needs {longest_us:.1f} us against {memory_us:.1f} us that the memory needs for everything: "
        f"{what} is {num_bytes / 1e6:.2f} MB, which one CU streams in {num_bytes / cap / 1e3:.1f} us "
        f"at its cap of {cap:g} GB/s."
    )


def _time_in_words(trace: Trace) -> str:
    """Shares of the workers' time on the PE that ends last."""
    header = trace.header
    last = int(trace.records["pe"][np.argmax(trace.records["end_ps"])])
    records = np.sort(trace.records[trace.records["pe"] == last], order=["worker", "start_ps", "end_ps"])
    before_ps = np.concatenate([[0], records["end_ps"][:-1]])
    before_ps[np.flatnonzero(np.diff(records["worker"], prepend=-1))] = 0  # the first task of each worker
    taken_ps = np.clip(records["ticket_ps"], before_ps, records["start_ps"])
    total = header["num_workers"] * int(records["end_ps"].max())
    executing = (records["end_ps"] - records["start_ps"]).sum() / total
    waiting = (records["start_ps"] - taken_ps).sum() / total
    fetching = (taken_ps - before_ps).sum() / total
    return (
        f"On PE {last}, the last to end, workers spend {executing:.0%} of their time executing tasks, "
        f"{waiting:.0%} waiting for the inputs of one, {fetching:.0%} getting the next one, and have none "
        f"left (or never had one) for {1 - executing - waiting - fetching:.0%}."
    )
