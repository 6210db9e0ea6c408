"""Traces as Chrome Trace Event JSON, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Perfetto drops slices of a track that overlap, and float rounding of back-to-back tasks is enough for that. So
times are whole ns, printed exactly as decimal µs, and a slice of a (pid, tid) ends by the start of the next.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.answers import streams
from flashmoe.trace import KINDS, Trace

__all__ = ["write_chrome"]

MIN_WAIT_NS = 100  # shorter waits are left as gaps: a slice for each would double the file and say nothing
NUM_COUNTER_STEPS = 500
SUFFIXES = (".json", ".json.gz")


def write_chrome(traces: Trace | Sequence[Trace], path: str | Path, *, counters: bool = True) -> None:
    """Write one or more traces as one file, .json or .json.gz by its name.

    pid: the PE; in a second trace 100 (or more) + PE, so that simulated and measured can be opened together.
    tid: the worker.
    A task is a slice; one that gets no ns of its own on its track is an instant event of its PE. A wait of
    100 ns or more, in which the worker has nothing else to run, is a slice "wait" before its task. Arrows
    follow the critical path only.
    counters: whether to add the HBM traffic of each PE [GB/s], a task's bytes spread evenly over their stream.
    Raises: ValueError for another suffix, or no trace.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown suffix (accepted: {', '.join(SUFFIXES)})")
    traces = [traces] if isinstance(traces, Trace) else list(traces)
    if not traces:
        raise ValueError("traces is empty (one trace or more expected)")
    if path.name.endswith(".gz"):
        # no name and no date inside, so that the same traces give the same bytes
        with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            packed.writelines(piece.encode() for piece in _document(traces, counters))
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(_document(traces, counters))


def _document(traces: Sequence[Trace], counters: bool) -> Iterator[str]:
    stride = 100  # a power of ten, so that a person reads the PE off the pid
    while stride < max(trace.num_pes for trace in traces):
        stride *= 10
    headers = json.dumps({"flashmoe_headers": [trace.header for trace in traces]})
    yield '{"displayTimeUnit":"ns","otherData":' + headers + ',"traceEvents":[\n'
    pids = [index * stride for index in range(len(traces))]
    # names of all traces first: Perfetto names a thread by its tid alone, the latest that it has seen
    chunks = [_names(trace, index, len(traces), pids[index]) for index, trace in enumerate(traces)]
    for index, trace in enumerate(traces):
        tracks = _tracks(trace)
        chunks += [_slices(trace, tracks, pids[index]), _flows(trace, tracks, index, pids[index])]
        if counters:
            chunks.append(_hbm_counter(trace, pids[index]))
    yield ",\n".join(",\n".join(chunk) for chunk in chunks if chunk)
    yield "\n]}\n"


@dataclass(frozen=True, eq=False)
class _Tracks:
    """The records as slices in whole ns, those of a worker disjoint. Each field: (num_tasks,) int64 [ns]."""

    wait: NDArray[np.int64]  # since when the worker only waited for this task; equals begin when it never did
    begin: NDArray[np.int64]
    end: NDArray[np.int64]  # equals begin for a task that has no ns of its own
    clamped: NDArray[np.int64]  # cut off at the end, because the trace has the worker on two tasks at once


def _tracks(trace: Trace) -> _Tracks:
    order, follows = trace.by_worker
    # floor keeps the order of times: what is back to back stays so
    begin = trace.records["start_ps"][order] // 1000
    end = trace.records["end_ps"][order] // 1000
    next_begin = np.full(len(order), np.iinfo(np.int64).max)
    next_begin[:-1][follows[1:]] = begin[1:][follows[1:]]
    clamped = np.maximum(0, end - next_begin)
    # a task shorter than a ns gets a whole one where its worker has nothing else in it
    end = np.minimum(np.maximum(end, begin + 1), next_begin)
    previous_end = np.zeros(len(order), np.int64)
    previous_end[1:][follows[1:]] = end[:-1][follows[1:]]
    wait = np.minimum(begin, np.maximum(trace.idle_since_ps[order] // 1000, previous_end))

    def unsorted(values: NDArray[np.int64]) -> NDArray[np.int64]:
        result = np.empty_like(values)
        result[order] = values
        return result

    return _Tracks(unsorted(wait), unsorted(begin), unsorted(end), unsorted(clamped))


def _names(trace: Trace, index: int, num_traces: int, pid_base: int) -> list[str]:
    machine = trace.header.get("machine", "unknown machine")
    how = f"{'simulated' if trace.simulated else 'measured'}, {machine}"
    domains = trace.worker_domains()
    events = []
    for pe in range(trace.num_pes):
        pid = pid_base + pe
        # the same PE of several traces side by side
        events.append(_metadata(pid, 0, "process_name", name=f"PE {pe} ({how})"))
        events.append(_metadata(pid, 0, "process_sort_index", sort_index=pe * num_traces + index))
        for worker in range(trace.num_workers):
            domain = int(domains[pe, worker])
            name = f"worker {worker}, {trace.domain_word} {domain}" if trace.num_domains > 1 else f"worker {worker}"
            events.append(_metadata(pid, worker, "thread_name", name=name))
            sort_index = domain * trace.num_workers + worker
            events.append(_metadata(pid, worker, "thread_sort_index", sort_index=sort_index))
    return events


def _metadata(pid: int, tid: int, what: str, **args: str | int) -> str:
    return json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}, separators=(",", ":"))


def _slices(trace: Trace, tracks: _Tracks, pid_base: int) -> list[str]:
    order, _ = trace.by_worker
    rows = trace.records[order]
    columns: list[list[int]] = [
        values.tolist()
        for values in (
            tracks.begin[order],
            tracks.end[order],
            tracks.wait[order],
            tracks.clamped[order],
            rows["pe"].astype(np.int64) + pid_base,
            rows["worker"],
            rows["kind"],
            rows["layer"],
            rows["task_id"],
            rows["expert"],
            rows["tile"],
            rows["num_tokens"],
            rows["ready_ps"] // 1000,
            rows["ticket_ps"] // 1000,
        )
    ]
    events = []
    for begin, end, wait, clamped, pid, tid, k, layer, task_id, expert, tile, num_tokens, ready, ticket in zip(
        *columns, strict=True
    ):
        kind = KINDS[k]
        args = (
            f'"args":{{"layer":{layer},"task_id":{task_id},"kind":"{kind}","expert":{expert},"tile":{tile},'
            f'"num_tokens":{num_tokens},"ready_ns":{ready},"ticket_ns":{ticket}'
        )
        if clamped:
            args += f',"clamped_ns":{clamped}'
        place = f'"pid":{pid},"tid":{tid}'
        if begin - wait >= MIN_WAIT_NS:
            events.append(
                f'{{"ph":"X","name":"wait","cat":"wait","ts":{_us(wait)},"dur":{_us(begin - wait)},{place},'
                f'"args":{{"layer":{layer},"task_id":{task_id},"for":"{kind}"}}}}'
            )
        if end > begin:
            events.append(
                f'{{"ph":"X","name":"{kind}","cat":"task","ts":{_us(begin)},"dur":{_us(end - begin)},{place},{args}}}}}'
            )
        else:
            # of its process: on its thread, Perfetto would take it for the slice that an arrow binds to
            events.append(f'{{"ph":"i","s":"p","name":"{kind}","cat":"task","ts":{_us(begin)},{place},{args}}}}}')
    return events


def _flows(trace: Trace, tracks: _Tracks, index: int, pid_base: int) -> list[str]:
    """An arrow from each task of the critical path to the next, both ends inside their slices."""
    path = trace.critical_path
    path = path[tracks.end[path] > tracks.begin[path]]  # an instant has no slice to bind to
    events = []
    for step, (tail, head) in enumerate(zip(path[:-1].tolist(), path[1:].tolist(), strict=True)):
        head_begin, head_end = int(tracks.begin[head]), int(tracks.end[head])
        leave = int(tracks.end[tail]) - 1  # the last ns inside
        enter = min(head_begin + 1, head_end - 1)
        if leave > enter:  # tasks that overlap, as after a clock correction: an arrow must not run backwards
            leave, enter = int(tracks.begin[tail]), head_end - 1
            if leave > enter:
                continue
        for phase, row, time in (('"s"', tail, leave), ('"f","bp":"e"', head, enter)):
            pid, tid = int(trace.records["pe"][row]) + pid_base, int(trace.records["worker"][row])
            events.append(
                f'{{"ph":{phase},"name":"critical path","cat":"critical_path","id":{index << 32 | step},'
                f'"ts":{_us(time)},"pid":{pid},"tid":{tid}}}'
            )
    return events


def _hbm_counter(trace: Trace, pid_base: int) -> list[str]:
    makespan_ns = -(-trace.makespan_ps // 1000)
    if not trace.memory_bytes.any():
        return []
    edges_ns: NDArray[np.int64] = np.unique(np.linspace(0, makespan_ns, NUM_COUNTER_STEPS + 1).astype(np.int64))
    bytes_per_ns = streams(trace).spread(trace.memory_bytes, edges_ns * 1000) / np.diff(edges_ns)
    events = []
    for pe in range(trace.num_pes):
        values = [*bytes_per_ns[pe].tolist(), 0.0]  # back to 0 at the end of the last step
        for time, value in zip(edges_ns.tolist(), values, strict=True):
            events.append(
                f'{{"ph":"C","name":"HBM","ts":{_us(time)},"pid":{pid_base + pe},"tid":0,'
                f'"args":{{"GB/s":{max(0.0, value):.1f}}}}}'
            )
    return events


def _us(time_ns: int) -> str:
    """Whole ns as decimal µs, exact: 1234 -> "1.234"."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"
