"""Hand-made traces for tests: a few tasks written out, or a whole layer that looks like a real one."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np

from flashmoe.trace import KINDS, TRACE_DTYPE, Trace

HEADER: dict[str, Any] = {
    "executor": "simpy",
    "machine": "mi300x",
    "model": {"name": "qwen3-30b-a3b", "d_model": 2048, "d_ff": 768},
    "ep_size": 1,
    "num_workers": 4,
    "num_domains": 1,
    "routing": "0123456789abcdef",
    "policy": "static_phase",
    "tiling": {"down": "tile"},
    "seed": 0,
    "num_tokens": [8],
}

FIELDS_AT_REST = {"expert": -1, "tile": -1, "peer": -1}


def make_trace(tasks: Iterable[dict[str, Any]], critical_path: Iterable[int] = (), **header: Any) -> Trace:
    """A trace of these tasks: kind is a name, task_id counts up, what is left out is 0 (or -1 for "none").

    Times that an executor may not record are then as TRACE_DTYPE says: asked_ps, loaded_ps and done_ps.
    """
    tasks = list(tasks)
    records = np.zeros(len(tasks), TRACE_DTYPE)
    for task_id, task in enumerate(tasks):
        times = {
            "asked_ps": task.get("ticket_ps", 0),
            "loaded_ps": task.get("start_ps", 0),
            "done_ps": task.get("end_ps", 0),
        }
        record = {"task_id": task_id, **FIELDS_AT_REST, **times, **task}
        record["kind"] = KINDS.index(record.get("kind", "up"))
        for field, value in record.items():
            records[task_id][field] = value
    return Trace(records, {**HEADER, **header}, np.array(list(critical_path), np.int64))


def layer_trace(
    *, ep_size: int, num_workers: int, num_domains: int = 1, tiles: int = 12, seed: int = 0, **header: Any
) -> Trace:
    """A layer of 16 experts a PE, each of `tiles` up and as many down tasks; records in the order of phases.

    A phase waits for the one before it, on its own PE (route, dispatch, down) or on all PEs (up, combine).
    The worker that is free first takes the next task, and durations vary by a few percent.
    """
    rng = np.random.default_rng(seed)
    phases = [
        # kind, tasks, mean ns, waits for all PEs, bytes
        ("gate", 4, 2_500, False, 131_072),
        ("route", 4, 900, False, 0),
        ("dispatch", 4 * ep_size, 700, False, 0),
        ("up", 16 * tiles, 18_000, True, 6_291_456 // tiles),
        ("down", 16 * tiles, 9_000, False, 3_145_728 // tiles),
        ("combine", 8, 1_200, True, 0),
    ]
    free = [[(int(rng.integers(500, 3_000)), worker) for worker in range(num_workers)] for _ in range(ep_size)]
    for heap in free:
        heapq.heapify(heap)
    phase_end = np.zeros(ep_size, np.int64)
    next_id = [0] * ep_size
    rows: list[dict[str, Any]] = []
    path: list[int] = []
    for kind, count, mean_ns, waits_for_all, num_bytes in phases:
        ready = np.full(ep_size, phase_end.max() + 2_200) if waits_for_all else phase_end + 500
        if kind == "gate":
            ready = np.zeros(ep_size, np.int64)
        phase_end = np.zeros(ep_size, np.int64)
        for pe in range(ep_size):
            for index in range(count):
                free_at, worker = heapq.heappop(free[pe])
                start = max(free_at, int(ready[pe]))
                end = start + int(mean_ns * rng.lognormal(0, 0.08))
                heapq.heappush(free[pe], (end, worker))
                phase_end[pe] = max(phase_end[pe], end)
                by_expert = kind in ("up", "down")
                rows.append(
                    {
                        "pe": pe,
                        "task_id": next_id[pe],
                        "kind": kind,
                        "worker": worker,
                        "domain": worker % min(num_domains, num_workers),
                        "expert": 16 * pe + index // tiles if by_expert else -1,
                        "tile": index % tiles if by_expert else -1,
                        "num_tokens": 4,
                        "ready_ps": int(ready[pe]) * 1000,
                        "asked_ps": free_at * 1000,
                        "ticket_ps": free_at * 1000,
                        "start_ps": start * 1000,
                        "loaded_ps": start * 1000,
                        "done_ps": end * 1000,
                        "end_ps": end * 1000,
                        "peer": index % ep_size if kind == "dispatch" else -1,
                        "hbm_bytes": num_bytes,
                    }
                )
                next_id[pe] += 1
        latest = int(phase_end.argmax())
        path.append(
            max(
                (i for i, row in enumerate(rows) if row["kind"] == kind and row["pe"] == latest),
                key=lambda i: rows[i]["end_ps"],
            )
        )
    trace = make_trace([], ep_size=ep_size, num_workers=num_workers, num_domains=num_domains, seed=seed)
    records = np.zeros(len(rows), TRACE_DTYPE)
    for field in TRACE_DTYPE.names or ():
        values = [row.get(field, 0) for row in rows]
        records[field] = [KINDS.index(value) for value in values] if field == "kind" else values
    return Trace(records, {**trace.header, "num_tokens": [8] * ep_size, **header}, np.array(path, np.int64))
