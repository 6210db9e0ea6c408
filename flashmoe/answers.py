"""What a trace says besides its makespan: where time went, how busy each resource was, what held up the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.tasks import TaskTable, segment_owner
from flashmoe.trace import KINDS, TIME_SHARES, Trace

__all__ = [
    "PATH_EFFECTS",
    "WORKER_TIMES",
    "CriticalTime",
    "MemoryTime",
    "Utilisation",
    "critical_time",
    "distinct_bytes",
    "memory_time",
    "pe_speeds",
    "queue_length",
    "streams",
    "time_by_kind",
    "utilisation",
    "worker_time",
]

WORKER_TIMES = TIME_SHARES

# What the critical path does between the end of one of its tasks and the end of the next, in this order.
PATH_EFFECTS = (
    "signal",  # from the end of the task before to its signal being seen, on the same PE
    "link",  # the same from another PE: bytes, latency and waiting for links
    "gap",  # dense compute between layers that are launches of their own
    "launch",  # until the worker, which has not run anything in this launch, asks for a task
    "worker",  # until the worker asks for the task: its bookkeeping
    "ticket",
    "inputs",  # the task in hand, for what the task before did not make
    "stream",  # weights not there yet: at most what the worker alone needs for them at the speed of its PE
    "sharing",  # weights not there yet, beyond that: others stream, too, or the jitter made it slow
    "compute",
    "overhead",
    "send",
)
EXPERT_KINDS = tuple(KINDS.index(kind) for kind in ("up", "down", "expert"))

_ROUNDING_PS = 1e-3  # float64 noise: 25.0000000004 ps is 25 ps, not 26


# ---- workers


def worker_time(trace: Trace) -> dict[str, NDArray[np.int64]]:
    """Where the time of each worker went, from the launch to the makespan.

    Of a task, between the end of the one before on its worker and its own end: ticket: asking the queue for it;
    inputs: it is in hand, they are not there; stream: started, its weights are not there; compute; overhead: its
    fixed part; send: its remote stores. A trace that does not record when weights were there has all of start to
    end as compute.
    Returns: WORKER_TIMES, (num_pes, num_workers) each [ps]; they add up to the makespan exactly.
    """
    shape = trace.num_pes, trace.num_workers
    times = {name: np.zeros(shape, np.int64) for name in WORKER_TIMES}
    for name, of_task in _task_time(trace).items():
        np.add.at(times[name], (trace.records["pe"], trace.records["worker"]), of_task)
    times["other"][:] = trace.makespan_ps - sum(times.values())
    return times


def time_by_kind(trace: Trace) -> dict[str, dict[str, int]]:
    """The workers' time on tasks of each kind, all workers together: {kind: WORKER_TIMES without other} [ps]."""
    times = _task_time(trace)
    kinds = [(KINDS[kind], trace.records["kind"] == kind) for kind in np.unique(trace.records["kind"])]
    return {kind: {name: int(of_task[rows].sum()) for name, of_task in times.items()} for kind, rows in kinds}


def _task_time(trace: Trace) -> dict[str, NDArray[np.int64]]:
    """WORKER_TIMES without other, (num_tasks,) each [ps]."""
    order, follows = trace.by_worker
    rows = trace.records[order]
    # the latest end so far on the same worker: measured tasks of one may overlap by a tick of its clock
    turn = np.cumsum(~follows) * (trace.makespan_ps + 1)
    latest_ps = np.maximum.accumulate(rows["end_ps"] + turn) - turn
    before_ps = np.zeros(len(rows), np.int64)
    before_ps[1:][follows[1:]] = latest_ps[:-1][follows[1:]]
    start_ps = np.maximum(rows["start_ps"], before_ps)
    end_ps = np.maximum(rows["end_ps"], start_ps)
    asked_ps, ticket_ps = (np.clip(rows[name], before_ps, start_ps) for name in ("asked_ps", "ticket_ps"))
    done_ps = np.clip(rows["done_ps"], start_ps, end_ps)
    loaded_ps = np.clip(rows["loaded_ps"], start_ps, done_ps)
    send_ps = np.minimum(end_ps - done_ps, _store_ps(trace, rows))
    in_order = {
        "ticket": np.maximum(0, ticket_ps - asked_ps),
        "inputs": start_ps - ticket_ps,
        "stream": loaded_ps - start_ps,
        "compute": done_ps - loaded_ps,
        "overhead": end_ps - done_ps - send_ps,
        "send": send_ps,
    }
    times = {name: np.empty(len(rows), np.int64) for name in in_order}
    for name, values in in_order.items():
        times[name][order] = values
    return times


def _store_ps(trace: Trace, rows: NDArray[np.void]) -> NDArray[np.int64]:
    """(n,) what a worker needs for each task's remote stores [ps]; 0 where the machine is not known."""
    bytes_per_ns = _parameter(trace, "store_bytes_per_ns")
    if not bytes_per_ns:
        return np.zeros(len(rows), np.int64)
    return np.ceil(rows["link_bytes"] / bytes_per_ns * 1000.0 - _ROUNDING_PS).astype(np.int64)


def _parameter(trace: Trace, name: str) -> float | None:
    """A parameter of the machine that a trace was simulated on; None where it is not known."""
    value: float | None = trace.header.get("machine_parameters", {}).get(name)
    return value


def pe_speeds(trace: Trace) -> NDArray[np.float64]:
    """(num_pes,) persistent speed factor of each PE: 1 is nominal, and what a trace without them has."""
    return np.array(trace.header.get("pe_speed") or [1.0] * trace.num_pes)


# ---- resources


@dataclass(frozen=True, eq=False)
class Utilisation:
    """Shares of the makespan, 0 to 1. None where the trace does not say how fast the resource is.

    cu: (num_pes, num_workers) executing a task.
    domain: (num_pes, num_domains) mean of its workers.
    hbm: (num_pes,) bytes streamed over what its memory, at the speed of the PE, could have read in the makespan.
    egress: (num_pes,) bytes sent over what the links of the PE, or its port, could have taken. None for one PE.
    link: (num_pes, num_pes) from source to destination. None without tables.
    """

    cu: NDArray[np.float64]
    domain: NDArray[np.float64]
    hbm: NDArray[np.float64] | None
    egress: NDArray[np.float64] | None
    link: NDArray[np.float64] | None


def utilisation(trace: Trace, tables: Sequence[TaskTable] | None = None) -> Utilisation:
    """How busy CUs, domains, memory and links were.

    tables: one a layer, of the same model, routing and tiling; without them nobody knows where results went.
    """
    records, num_pes = trace.records, trace.num_pes
    busy_ps = np.zeros((num_pes, trace.num_workers))
    np.add.at(busy_ps, (records["pe"], records["worker"]), trace.duration_ps)
    cu = busy_ps / max(1, trace.makespan_ps)
    domains = trace.worker_domains()
    domain = np.array(
        [[cu[pe, domains[pe] == d].mean() for d in range(trace.num_domains)] for pe in range(num_pes)]
    ).reshape(num_pes, trace.num_domains)
    makespan_ns = max(1, trace.makespan_ps) / 1000.0
    hbm = egress = link = None
    if memory := _parameter(trace, "hbm_bytes_per_ns"):
        hbm = np.bincount(records["pe"], trace.memory_bytes, num_pes) / (memory * pe_speeds(trace)) / makespan_ns
    if (one_link := _parameter(trace, "link_bytes_per_ns")) and num_pes > 1:
        port = _parameter(trace, "port_bytes_per_ns") or one_link * (num_pes - 1)
        egress = np.bincount(records["pe"], records["link_bytes"], num_pes) / port / makespan_ns
        if tables is not None:
            link = sum(map(_traffic, tables), np.zeros((num_pes, num_pes))) / one_link / makespan_ns
    return Utilisation(cu, domain, hbm, egress, link)


def _traffic(table: TaskTable) -> NDArray[np.float64]:
    """(num_pes, num_pes) bytes from each PE to each other one."""
    source = table.tasks["pe"][segment_owner(table.signal_ptr)].astype(np.int64)
    sums = np.zeros((table.num_pes, table.num_pes))
    np.add.at(sums, (source, table.event_pe[table.signal_event].astype(np.int64)), table.signal_bytes)
    np.fill_diagonal(sums, 0.0)
    return sums


def queue_length(trace: Trace, edges_ps: NDArray[Any]) -> NDArray[np.float64]:
    """Tasks that are ready and not yet started, mean over intervals of time.

    edges_ps: (n + 1,) increasing. Returns: (num_pes, n).
    """
    start_ps = trace.records["start_ps"]
    ready_ps = np.clip(trace.records["ready_ps"], 0, start_ps)
    return _moved(trace, ready_ps, start_ps).spread(start_ps - ready_ps, edges_ps) / np.diff(edges_ps)


def streams(trace: Trace) -> Trace:
    """The same tasks, each from the moment its weights began to stream to the last of them.

    A CU streams for one task at a time. With prefetch it begins when the worker has the task and its PE the plan,
    else when the task starts. So `streams(trace).spread(trace.memory_bytes, edges_ps)` is the memory traffic
    over time. A trace that does not record when weights were there is returned as it is.
    """
    records = trace.records
    loaded_ps, start_ps = records["loaded_ps"], records["start_ps"]
    has_weights = records["hbm_bytes"] > 0
    if (loaded_ps == start_ps)[has_weights].all():
        return trace
    begin_ps = start_ps.copy()
    if _parameter(trace, "prefetch"):
        begin_ps = np.maximum(records["ticket_ps"], _plan_ps(trace))
        order = np.lexsort((loaded_ps, records["worker"], records["pe"]))
        order = order[has_weights[order]]
        same_worker = (np.diff(records["pe"][order].astype(np.int64)) == 0) & (
            np.diff(records["worker"][order].astype(np.int64)) == 0
        )
        after = order[1:][same_worker]
        begin_ps[after] = np.maximum(begin_ps[after], loaded_ps[order[:-1][same_worker]])
    return _moved(trace, np.clip(begin_ps, 0, loaded_ps), np.maximum(loaded_ps, 0))


def _plan_ps(trace: Trace) -> NDArray[np.int64]:
    """(num_tasks,) when the task's PE knew which expert tasks it has, 0 for tasks that don't need that [ps]."""
    records = trace.records
    place = records["layer"].astype(np.int64) * trace.num_pes + records["pe"]
    first_ps = np.full(place.max(initial=0) + 1, np.iinfo(np.int64).max)
    waits = np.isin(records["kind"], [KINDS.index("up"), KINDS.index("expert")])  # for the plan and nothing else
    np.minimum.at(first_ps, place[waits], records["ready_ps"][waits])
    known = np.isin(records["kind"], EXPERT_KINDS) & (first_ps[place] < np.iinfo(np.int64).max)
    return np.where(known, first_ps[place], 0)


def _moved(trace: Trace, start_ps: NDArray[np.int64], end_ps: NDArray[np.int64]) -> Trace:
    records = trace.records.copy()
    records["start_ps"], records["end_ps"] = start_ps, end_ps
    return Trace(records, trace.header, trace.critical_path)


def distinct_bytes(trace: Trace) -> NDArray[np.int64]:
    """(num_pes,) weights that each PE has to read at least once [bytes]: several tasks may stream the same."""
    records = trace.records
    _, first, weights = np.unique(
        records[["layer", "pe", "kind", "expert", "tile"]], return_index=True, return_inverse=True
    )
    largest = np.zeros(len(first), np.int64)
    np.maximum.at(largest, weights.reshape(-1), records["hbm_bytes"].astype(np.int64))
    sums = np.zeros(trace.num_pes, np.int64)
    np.add.at(sums, records["pe"][first], largest)
    return sums


# ---- the critical path


@dataclass(frozen=True, eq=False)
class CriticalTime:
    """The critical path, and what it did at each moment from the launch to the end of its last task.

    records: (n,) indices of its tasks, first to last.
    bounds_ps: (n, len(PATH_EFFECTS) + 1) int64: effect i of a task lasts from column i to column i + 1, and its
        first column is the end of the task before.
    """

    records: NDArray[np.int64]
    bounds_ps: NDArray[np.int64]

    def between(self, begin_ps: int, end_ps: int) -> dict[str, int]:
        """Time of each of PATH_EFFECTS inside an interval [ps]."""
        bounds_ps = np.clip(self.bounds_ps, begin_ps, end_ps)
        sums = np.diff(bounds_ps, axis=1).sum(axis=0)
        return dict(zip(PATH_EFFECTS, sums.tolist(), strict=True))

    def total(self) -> dict[str, int]:
        """Time of each of PATH_EFFECTS [ps]; they add up to the end of the path, so to the makespan, exactly."""
        return self.between(0, int(self.bounds_ps.max(initial=0)))


def critical_time(trace: Trace) -> CriticalTime:
    """Split the critical path into effects.

    This says what the path was doing, not what would be gained without it: another path may be as long.
    A trace does not record the draws of its jitter: a stream that one slowed down counts as sharing beyond what the
    worker alone needs on average.
    """
    path = trace.critical_path
    rows = trace.records[path]
    if len(path) == 0:
        return CriticalTime(path, np.zeros((0, len(PATH_EFFECTS) + 1), np.int64))
    end_ps = np.maximum.accumulate(rows["end_ps"])
    from_ps = np.concatenate([[0], end_ps[:-1]])
    previous = np.roll(rows, 1)
    has_previous = np.arange(len(path)) > 0
    same_pe = previous["pe"] == rows["pe"]
    by_input = has_previous & ~(same_pe & (previous["worker"] == rows["worker"]))
    gap_us = trace.header.get("gap_us")
    new_launch = has_previous & (previous["layer"] != rows["layer"]) & (gap_us is not None)
    cap = (_parameter(trace, "cu_bytes_per_ns") or 0.0) * pe_speeds(trace)[rows["pe"]]
    with np.errstate(divide="ignore", invalid="ignore"):
        alone_ps = np.minimum(np.nan_to_num(rows["hbm_bytes"] / cap * 1000.0, nan=0.0), 1e18).astype(np.int64)
    started_ps = np.maximum(rows["start_ps"], from_ps)
    until_ps = {
        "signal": np.where(by_input & same_pe, rows["ready_ps"], 0),
        "link": np.where(by_input & ~same_pe, rows["ready_ps"], 0),
        "gap": np.where(new_launch, from_ps + round((gap_us or 0) * 1e6), 0),
        "launch": np.where(_first_of_launch(trace)[path], rows["asked_ps"], 0),
        "worker": rows["asked_ps"],
        "ticket": rows["ticket_ps"],
        "inputs": rows["start_ps"],
        "stream": np.minimum(rows["loaded_ps"], started_ps + alone_ps),
        "sharing": rows["loaded_ps"],
        "compute": rows["done_ps"],
        "overhead": rows["end_ps"] - np.minimum(_store_ps(trace, rows), rows["end_ps"] - rows["done_ps"]),
        "send": end_ps,
    }
    bounds_ps = np.stack([from_ps, *(until_ps[effect] for effect in PATH_EFFECTS)], axis=1)
    bounds_ps = np.minimum(np.maximum.accumulate(bounds_ps, axis=1), end_ps[:, None])
    return CriticalTime(path, bounds_ps)


def _first_of_launch(trace: Trace) -> NDArray[np.bool_]:
    """(num_tasks,) whether the task is the first that its worker runs after a launch."""
    order, follows = trace.by_worker
    if trace.header.get("gap_us") is not None:
        layer = trace.records["layer"][order]
        follows = follows & (layer == np.roll(layer, 1))
    first = np.empty(len(order), bool)
    first[order] = ~follows
    return first


# ---- the time over a bound


@dataclass(frozen=True, eq=False)
class MemoryTime:
    """The makespan as the memory of one PE saw it: reading what it must at full bandwidth, and everything else.

    pe: the PE with most to read for its speed; None on a host, whose PEs share one memory.
    begin_ps, end_ps: expert weights were first asked for, and the last of them was there.
    reading_ps: time from a layer's first expert weights to its last ones, all layers together.
    parts_ps: these add up to the makespan, and all but the first two to the time over the bound "hbm" [ps]:
        must: distinct weights over the bandwidth;
        idle: launches and dense compute between them, when nothing can be read;
        before, meanwhile, between, after: bandwidth that was not used, as time at full bandwidth, before begin_ps,
            while the expert weights of a layer were read, from one layer's to the next one's, after end_ps;
        again: weights that were read more than once.
    """

    pe: int | None
    begin_ps: int
    end_ps: int
    reading_ps: int
    parts_ps: dict[str, float]


def memory_time(trace: Trace) -> MemoryTime | None:
    """Split the makespan by what the memory of the PE with most to read did; None where its speed is not known.

    An idle moment of a memory that binds is lost for good, so this is exact, whatever the schedule.
    """
    bytes_per_ns = _parameter(trace, "hbm_bytes_per_ns")
    if not bytes_per_ns or len(trace.records) == 0:
        return None
    distinct = distinct_bytes(trace)
    speeds = pe_speeds(trace)
    pe = None if _parameter(trace, "num_cores") else int(np.argmax(distinct / speeds))
    pes = slice(None) if pe is None else slice(pe, pe + 1)
    bytes_per_ps = bytes_per_ns * float(speeds[pes].mean()) / 1000.0
    read = streams(trace)
    edges_ps = np.append(_reading_ps(read, pe), trace.makespan_ps)
    read_bytes = read.spread(read.memory_bytes, edges_ps)[pes].sum(axis=0)
    unused_ps = np.diff(edges_ps) - read_bytes / bytes_per_ps
    launch_ps, gap_us = _parameter(trace, "launch_ps") or 0, trace.header.get("gap_us")
    gaps_ps = 0.0 if gap_us is None else (len(edges_ps) // 2 - 2) * (launch_ps + gap_us * 1e6)
    must_ps = float(distinct[pes].sum() / bytes_per_ps)
    parts_ps = {
        "must": must_ps,
        "idle": launch_ps + gaps_ps,
        "before": unused_ps[0] - launch_ps,
        "meanwhile": unused_ps[1:-1:2].sum(),
        "between": unused_ps[2:-1:2].sum() - gaps_ps,
        "after": unused_ps[-1],
        "again": read_bytes.sum() / bytes_per_ps - must_ps,
    }
    return MemoryTime(
        pe=pe,
        begin_ps=int(edges_ps[1]),
        end_ps=int(edges_ps[-2]),
        reading_ps=int(np.diff(edges_ps)[1:-1:2].sum()),
        parts_ps={name: float(part_ps) for name, part_ps in parts_ps.items()},
    )


def _reading_ps(read: Trace, pe: int | None) -> NDArray[np.int64]:
    """(1 + 2 x layers,) the launch, then per layer begin and end of reading the experts of a PE (None: of all)."""
    records = read.records
    mine = np.ones(len(records), bool) if pe is None else records["pe"] == pe
    experts = np.isin(records["kind"], EXPERT_KINDS) & (records["hbm_bytes"] > 0)
    edges_ps = [0]
    for layer in range(int(records["layer"].max()) + 1):
        of_layer = mine & (records["layer"] == layer)
        reads = records[of_layer & experts]
        if len(reads):
            edges_ps += [reads["start_ps"].min(), reads["end_ps"].max()]
        else:  # no expert of this PE is wanted: its reading takes no time, somewhere inside the layer
            edges_ps += [records["start_ps"][of_layer].max(initial=edges_ps[-1])] * 2
    return np.maximum.accumulate(edges_ps)
