"""What each task costs on a machine, before anybody shares anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.machine import Machine
from flashmoe.sim.bandwidth import ROUNDING_PS
from flashmoe.tasks import TaskTable, segment_owner
from flashmoe.trace import KINDS

# Kinds whose tasks can be decoded only after the PE knows its tokens per expert (its `planned` event).
PLANNED_KINDS = tuple(KINDS.index(kind) for kind in ("up", "down", "combine", "expert"))


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of the n tasks of a table.

    stream_bytes: (n,) float64, what a task streams through the shared channel [bytes].
    stream_ps: (n,) int64, least time of that stream, alone at a CU's cap [ps, rounded up].
    compute_ps: (n,) int64, least time for its arithmetic and its activations [ps, rounded up].
    after_ps: (n,) int64, what follows both: fixed overhead, remote stores [ps, rounded up].
    early: weights may stream before a task's inputs are ready.
    """

    stream_bytes: NDArray[np.float64]
    stream_ps: NDArray[np.int64]
    compute_ps: NDArray[np.int64]
    after_ps: NDArray[np.int64]
    early: bool

    @property
    def least_ps(self) -> NDArray[np.int64]:
        """(n,) int64, least time that a task keeps its worker when its inputs are there [ps]."""
        return np.maximum(self.stream_ps, self.compute_ps) + self.after_ps


def task_costs(table: TaskTable, machine: Machine) -> Costs:
    """Costs of every task of a table on a machine, in the order of the table's rows."""
    tasks = table.tasks
    flop_ns = tasks["flops"] / machine.cu_flops_per_ns
    io_ns = tasks["io_bytes"] / machine.cache_bytes_per_ns
    stream_bytes = tasks["weight_bytes"].astype(np.float64)
    overhead_ps = np.array([machine.overhead_ps(kind) for kind in KINDS], dtype=np.int64)
    return Costs(
        stream_bytes=stream_bytes,
        stream_ps=_ceil_ps(stream_bytes / machine.cu_bytes_per_ns),
        compute_ps=_ceil_ps(np.maximum(flop_ns, io_ns)),
        after_ps=overhead_ps[tasks["kind"]] + _ceil_ps(remote_bytes(table) / machine.store_bytes_per_ns),
        early=machine.prefetch,
    )


def remote_bytes(table: TaskTable) -> NDArray[np.float64]:
    """(n,) float64, bytes that each task stores to other PEs [bytes]."""
    source = segment_owner(table.signal_ptr)
    remote = table.tasks["pe"][source] != table.event_pe[table.signal_event]
    weights: Any = np.where(remote, table.signal_bytes, 0).astype(np.float64)
    return np.bincount(source, weights=weights, minlength=len(table.tasks)).astype(np.float64)


def _ceil_ps(ns: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ceil(ns * 1000.0 - ROUNDING_PS).astype(np.int64)
