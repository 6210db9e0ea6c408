"""Why a makespan is what it is, in words for somebody who did not make the trace, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashmoe.answers import (
    EXPERT_KINDS,
    WORKER_TIMES,
    CriticalTime,
    critical_time,
    distinct_bytes,
    memory_time,
    pe_speeds,
    queue_length,
    time_by_kind,
    utilisation,
    worker_time,
)
from flashmoe.trace import KINDS, Trace

__all__ = ["explain", "summarise"]

BOUNDS = {
    "hbm": "the distinct weights of the busiest PE at full memory bandwidth",
    "workers": "the work of the busiest PE, spread evenly over its workers",
    "longest_task": "the longest pick alone",
    "critical_path": "the longest chain of tasks that wait for each other",
    "links": "the bytes over the busiest link",
}
WORKER_WORDS = {
    "ticket": "asking the queue for a task",
    "inputs": "waiting for a task's inputs",
    "stream": "waiting for a task's weights",
    "compute": "computing",
    "overhead": "in the fixed part of tasks",
    "send": "storing to other PEs",
    "other": "without a task (not launched yet, or none left)",
}
PATH_WORDS = {
    "signal": "signals inside a PE",
    "link": "messages between PEs",
    "gap": "dense compute between layers",
    "launch": "launch",
    "worker": "bookkeeping",
    "ticket": "tickets",
    "inputs": "other inputs",
    "stream": "weights at a worker's own rate",
    "sharing": "weights slowed down by sharing",
    "compute": "arithmetic",
    "overhead": "fixed parts of tasks",
    "send": "remote stores",
}
SPEED_WORTH_NAMING = 0.01  # share by which a PE differs from the others
WORTH_NAMING = 0.02  # smaller shares are left out of sentences
MOST_NAMED = 3  # shares of a part
NUM_INTERVALS = 100  # of the makespan, for the length of queues


def explain(trace: Trace) -> str:
    """Where the time over the largest bound went, and what the critical path and the workers did, a line each.

    Two bounds can be lived up to at every moment, so the time over them divides exactly. Memory: into bandwidth that
    was not used and weights that were read again (`memory_time`). Work: into what workers did besides. For others
    the critical path has to do, which divides the whole makespan (`critical_time`).
    """
    if len(trace.records) == 0:
        return "No tasks: nothing to do, nothing to explain."
    path = critical_time(trace)
    sentences = [_makespan_in_words(trace)]
    if bounds := trace.header.get("bounds_ps"):
        largest = max(bounds, key=lambda name: bounds[name])
        reads = trace.records["hbm_bytes"].any()
        if not reads:
            sentences.append("No task reads any weights.")
        elif bounds["longest_task"] > bounds["hbm"]:
            sentences.append(_longest_in_words(trace))
        work = _work_in_words(trace) if largest == "workers" else ""
        if work or reads:
            sentences.append(work or _memory_in_words(trace, path, is_largest=largest == "hbm"))
    sentences += [_path_in_words(trace, path), _workers_in_words(trace)]
    return "\n".join(sentence for sentence in sentences if sentence)


def summarise(trace: Trace) -> dict[str, Any]:
    """What can be asked of one trace, as plain numbers for JSON: times in µs, shares from 0 to 1, lists by PE."""
    header, path, use = trace.header, critical_time(trace), utilisation(trace)
    bounds, memory = header.get("bounds_ps"), memory_time(trace)
    edges_ps = np.linspace(0, max(NUM_INTERVALS, trace.makespan_ps), NUM_INTERVALS + 1)
    queue = queue_length(trace, edges_ps)
    on_path = trace.records[path.records]
    return {
        "text": explain(trace),
        "makespan_us": trace.makespan_us,
        "bounds_us": _in_us(bounds) if bounds else None,
        "headroom": header.get("headroom"),
        "memory": None if memory is None else {"pe": memory.pe, **_in_us(memory.parts_ps)},
        "critical_path": {
            "tasks": [
                {"layer": layer, "pe": pe, "task_id": task_id, "kind": KINDS[kind]}
                for layer, pe, task_id, kind in on_path[["layer", "pe", "task_id", "kind"]].tolist()
            ],
            "time_us": _in_us(path.total()),
        },
        "worker_time_us": {name: (time_ps.mean(axis=1) / 1e6).tolist() for name, time_ps in worker_time(trace).items()},
        "time_by_kind_us": {kind: _in_us(times_ps) for kind, times_ps in time_by_kind(trace).items()},
        "utilisation": {
            "cu": use.cu.mean(axis=1).tolist(),
            "domain": use.domain.tolist(),
            "hbm": None if use.hbm is None else use.hbm.tolist(),
            "egress": None if use.egress is None else use.egress.tolist(),
        },
        "queue_length": {"mean": queue.mean(axis=1).tolist(), "max": queue.max(axis=1).tolist()},
    }


def _in_us(times_ps: Mapping[str, float]) -> dict[str, float]:
    return {name: time_ps / 1e6 for name, time_ps in times_ps.items()}


def _us(time_ps: float) -> str:
    return f"{time_ps / 1e6:.1f} µs"


def _shares_in_words(
    times_ps: Mapping[str, float], words: Mapping[str, str], form: str = "{time} {what}", most: int | None = None
) -> str:
    """The largest first, those not worth naming left out: "2.1 µs arithmetic, 0.3 µs launch"."""
    total = sum(times_ps.values())
    named = [name for name, time_ps in times_ps.items() if time_ps > WORTH_NAMING * total]
    named.sort(key=lambda name: -times_ps[name])
    return ", ".join(
        form.format(time=_us(times_ps[name]), share=f"{times_ps[name] / total:.0%}", what=words[name])
        for name in named[:most]
    )


def _makespan_in_words(trace: Trace) -> str:
    bounds = trace.header.get("bounds_ps")
    if not bounds:
        return (
            f"The makespan is {_us(trace.makespan_ps)}. A trace of executor {trace.header['executor']!r} has no bounds "
            "to hold it against."
        )
    largest = max(bounds, key=lambda name: bounds[name])
    return (
        f"The makespan is {_us(trace.makespan_ps)}, {1 + trace.header['headroom']:.2f} times its largest bound: "
        f"{BOUNDS[largest]}, {_us(bounds[largest])}{_launches_in_words(trace)}."
    )


def _launches_in_words(trace: Trace) -> str:
    """What every bound holds besides."""
    if trace.header.get("gap_us") is not None and trace.header.get("layers", 1) > 1:
        return " with the launches and the dense compute between them"
    return " with the launch" if trace.header["machine_parameters"].get("launch_ps") else ""


def _memory_in_words(trace: Trace, path: CriticalTime, *, is_largest: bool) -> str:
    """The time over the bound of the memory; nothing where its speed is not known."""
    memory = memory_time(trace)
    if memory is None:
        return ""
    begin_ps, end_ps, parts_ps = memory.begin_ps, memory.end_ps, memory.parts_ps
    launch_ps = trace.header["machine_parameters"].get("launch_ps", 0)
    used = 1 - parts_ps["meanwhile"] / max(1, memory.reading_ps)
    words = {
        "before": (
            f"were lost in the {_us(begin_ps - launch_ps)} before it was asked for the first expert weights"
            f"{_meanwhile(path, launch_ps, begin_ps)}"
        ),
        "meanwhile": (
            f"were lost in the {_us(memory.reading_ps)} in which it read them, at "
            f"{f'{used:.0%}' if used >= 0.01 else 'less than 1%'} of its bandwidth"
        ),
        "between": "were lost between the last weights of a layer and the first of the next",
        "after": (
            f"were lost in the {_us(trace.makespan_ps - end_ps)} after the last of them"
            f"{_meanwhile(path, end_ps, trace.makespan_ps)}"
        ),
        "again": f"went into weights read more than once ({_again_in_words(trace)})",
    }
    over_ps = sum(parts_ps[name] for name in words)
    named = [f"{_us(parts_ps[name])} {what}" for name, what in words.items() if parts_ps[name] > WORTH_NAMING * over_ps]
    if not named:
        return ""
    whose = "of this host" if memory.pe is None else f"of PE {memory.pe}, {_why_this_pe(trace, memory.pe)}"
    bound = "it" if is_largest else f"the {_us(trace.makespan_ps - over_ps)} that the memory needs for everything"
    return f"Of the {_us(over_ps)} above {bound}, as the memory {whose}, saw them: {'; '.join(named)}."


def _why_this_pe(trace: Trace, pe: int) -> str:
    """Why the memory of this PE needs longest."""
    speeds = pe_speeds(trace)
    usual = float(np.median(np.delete(speeds, pe))) if len(speeds) > 1 else 1.0
    if abs(speeds[pe] / usual - 1) > SPEED_WORTH_NAMING:
        return f"which needs longest for what it has to read, at {speeds[pe]:.2f} times the nominal speed"
    return "which has most to read"


def _meanwhile(path: CriticalTime, begin_ps: int, end_ps: int) -> str:
    words = _shares_in_words(path.between(begin_ps, end_ps), PATH_WORDS, most=MOST_NAMED)
    return f" (on the critical path in that time, mostly: {words})" if words else ""


def _again_in_words(trace: Trace) -> str:
    read, distinct = int(trace.memory_bytes.sum()), int(distinct_bytes(trace).sum())
    return (
        f"{read / 1e6:.1f} MB on all PEs, {read / distinct:.1f} times the {distinct / 1e6:.1f} MB of distinct weights"
    )


def _longest_in_words(trace: Trace) -> str:
    header = trace.header
    records = trace.records[np.isin(trace.records["kind"], EXPERT_KINDS)]
    if len(records) == 0:
        return "No worker ever had an expert."
    num_busy = len(np.unique(records[["pe", "worker"]]))
    longest = records[np.argmax(records["hbm_bytes"])]
    num_bytes = int(longest["hbm_bytes"])
    cap = header["machine_parameters"]["cu_bytes_per_ns"]
    what = "a whole expert" if KINDS[longest["kind"]] == "expert" else f"a tile of {KINDS[longest['kind']]}"
    num_workers = trace.num_workers * trace.num_pes
    few = (
        f"Only {num_busy} of {num_workers} workers ever had a part of an expert, and the"
        if num_busy < num_workers
        else "The"
    )
    return (
        f"{few} longest pick alone needs {_us(header['bounds_ps']['longest_task'])} against "
        f"{_us(header['bounds_ps']['hbm'])} that the memory needs for everything: "
        f"{what} is {num_bytes / 1e6:.2f} MB, which one worker streams in "
        f"{_us(num_bytes / cap * 1000)} at its cap of {cap:g} GB/s."
    )


def _work_in_words(trace: Trace) -> str:
    """The time over the bound of the workers; nothing where their streams make that bound, and not their work."""
    work_names = ["compute", "overhead", "send"]
    if not trace.header["machine_parameters"]["prefetch"]:
        work_names.append("stream")
    times = {name: time_ps.mean(axis=1) for name, time_ps in worker_time(trace).items()}
    work = sum(times[name] for name in work_names)
    pe = int(np.argmax(work))
    beyond_ps = float(work[pe]) - trace.header["bounds_ps"]["workers"]
    if beyond_ps < 0:
        return ""
    parts = {name: float(times[name][pe]) for name in WORKER_TIMES if name not in work_names} | {"beyond": beyond_ps}
    words = WORKER_WORDS | {"beyond": "on tasks that took longer than they do alone"}
    named = _shares_in_words(parts, words)
    return f"Of the {_us(sum(parts.values()))} above it an average worker of PE {pe} spent: {named}."


def _path_in_words(trace: Trace, path: CriticalTime) -> str:
    if len(path.records) == 0:
        return ""
    pes = np.unique(trace.records["pe"][path.records]).tolist()
    where = f"all on PE {pes[0]}" if len(pes) == 1 else f"on {len(pes)} PEs"
    tasks = "1 task" if len(path.records) == 1 else f"{len(path.records)} tasks"
    return f"The critical path, {tasks} {where}, is made of {_shares_in_words(path.total(), PATH_WORDS)}."


def _workers_in_words(trace: Trace) -> str:
    """Shares of the workers' time on the PE that ends last."""
    last = int(trace.records["pe"][np.argmax(trace.records["end_ps"])])
    times_ps = {name: float(time_ps[last].sum()) for name, time_ps in worker_time(trace).items()}
    shares = _shares_in_words(times_ps, WORKER_WORDS, "{share} {what}")
    return f"On PE {last}, the last to end, workers spend {shares}."
