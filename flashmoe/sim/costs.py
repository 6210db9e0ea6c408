"""What each task costs on a machine, before anybody shares anything. `hip_src/engine/costs.hpp` does the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.machine import Machine, Times
from flashmoe.sim import jitter
from flashmoe.sim.bandwidth import ROUNDING_PS
from flashmoe.sim.parameters import Parameters
from flashmoe.tasks import TaskTable, segment_owner
from flashmoe.trace import KINDS

# Kinds whose tasks can be decoded only after the PE knows its tokens per expert (its `planned` event).
PLANNED_KINDS = tuple(KINDS.index(kind) for kind in ("up", "down", "combine", "expert"))
# Kinds that multiply with experts' weights: a kernel has warps of their own for what follows, with a release.
FINISHED_KINDS = tuple(KINDS.index(kind) for kind in ("up", "down", "expert"))
# Kinds that read a layer's input; the others read what these make.
FIRST_KINDS = tuple(KINDS.index(kind) for kind in ("gate", "route", "dispatch"))


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of the n tasks of a table.

    stream_bytes: (n,) float64, what a task takes from the shared channel [bytes].
    stream_ps: (n,) int64, least time of that stream, alone at a CU's cap [ps, rounded up].
    compute_ps: (n,) int64, least time for its arithmetic, its activations and its weights' way there [ps, rounded up].
    overhead_ps: (n,) int64, the fixed part [ps, rounded up].
    send_ps: (n,) int64, its remote stores, which keep the worker busy [ps, rounded up].
    weights: (n,) int64, row of the first task that streams the same weights.
    stay_bytes: (n,) float64, after how many bytes of others they have left the cache for it; -1: there is none [bytes].
    early: weights may stream before a task's inputs are ready.
    """

    stream_bytes: NDArray[np.float64]
    stream_ps: NDArray[np.int64]
    compute_ps: NDArray[np.int64]
    overhead_ps: NDArray[np.int64]
    send_ps: NDArray[np.int64]
    weights: NDArray[np.int64]
    stay_bytes: NDArray[np.float64]
    early: bool

    @property
    def after_ps(self) -> NDArray[np.int64]:
        """(n,) int64, what follows stream and arithmetic [ps]."""
        return self.overhead_ps + self.send_ps

    @property
    def least_ps(self) -> NDArray[np.int64]:
        """(n,) int64, least time that a task keeps its worker when its inputs are there [ps]."""
        return np.maximum(self.stream_ps, self.compute_ps) + self.after_ps


def task_costs(table: TaskTable, parameters: Parameters, layer: int = 0) -> Costs:
    """Costs of every task of a layer's table, in the order of its rows."""
    machine, tasks = parameters.machine, table.tasks
    speeds = parameters.speeds[tasks["pe"]]
    slow = 1.0 / speeds  # how much longer than usual a task takes
    stall_ps: Any = 0
    bytes_factor: Any = 1.0
    bits: Any = None
    if parameters.jitters or machine.cache_bytes > 0:
        bits = jitter.task_bits(parameters.seed, layer, tasks["pe"], tasks["task_id"])
    if parameters.jitters:
        luck = jitter.factors(bits, parameters.quantiles) - 1.0
        bytes_factor = 1.0 + luck * _evened_out(tasks["weight_bytes"].astype(np.float64), machine.jitter_bytes)
        slow = slow * bytes_factor
        stall_ps = np.where(jitter.stalls(bits, parameters.stall_threshold), machine.stall_ps, 0)
    is_finished = np.isin(tasks["kind"], FINISHED_KINDS)
    flop_ns = _padded_flops(tasks, machine.matrix_tokens, machine.matrix_rows) / machine.cu_flops_per_ns
    idle_bytes_per_ns = machine.cache_idle_bytes_per_ns or machine.cache_bytes_per_ns
    io_ns = moved_bytes(table, machine.word_tokens) / np.where(
        is_finished, machine.cache_bytes_per_ns, idle_bytes_per_ns
    )
    feed_ns = tasks["weight_bytes"] / machine.feed_bytes_per_ns if machine.feed_bytes_per_ns > 0 else 0.0
    products_ns = np.maximum(feed_ns, flop_ns)
    # a gate reads its router rows and its tokens at once; in a ring, tokens' rows and weights wait for each other
    work_ns = np.where(is_finished, io_ns + products_ns, np.maximum(io_ns, products_ns))
    stream_bytes = tasks["weight_bytes"] * bytes_factor
    return Costs(
        stream_bytes=stream_bytes,
        stream_ps=_ceil(stream_bytes / machine.cu_bytes_per_ns * 1000.0 / speeds),
        compute_ps=_ceil(work_ns * 1000.0 * slow),
        overhead_ps=_ceil(_overheads_ps(tasks, machine) * slow) + stall_ps,
        send_ps=_ceil(remote_bytes(table) / machine.store_bytes_per_ns * 1000.0),
        weights=first_of_same_weights(tasks),
        stay_bytes=jitter.stay(bits, parameters.stay_bytes) if machine.cache_bytes > 0 else np.full(len(tasks), -1.0),
        early=machine.prefetch,
    )


def tokens_by_pe(table: TaskTable) -> NDArray[np.int64]:
    """(num_pes,) tokens that each PE routes."""
    is_route = table.tasks["kind"] == KINDS.index("route")
    num_tokens = np.bincount(table.tasks["pe"][is_route], table.tasks["num_tokens"][is_route], table.num_pes)
    return num_tokens.astype(np.int64)


def sends_words(table: TaskTable, word_tokens: int) -> NDArray[np.bool_]:
    """(num_pes,) whether a PE has so few tokens that its results are their own signal."""
    few: NDArray[np.bool_] = (word_tokens > 0) & (tokens_by_pe(table) <= word_tokens)
    return few


def moved_bytes(table: TaskTable, word_tokens: int) -> NDArray[np.uint64]:
    """(n,) activations and results that each task reads and writes; half of a hidden row's words is signal [bytes]."""
    tasks = table.tasks
    # a value of a row, 2 bytes, takes two operations with each of the weights' rows
    row_bytes = tasks["flops"] // np.maximum(tasks["num_rows"], 1).astype(np.uint64)
    has_words = (tasks["kind"] == KINDS.index("down")) & sends_words(table, word_tokens)[tasks["pe"]]
    moved: NDArray[np.uint64] = tasks["io_bytes"] + np.where(has_words, row_bytes, np.uint64(0))
    return moved


def first_of_same_weights(tasks: Any) -> NDArray[np.int64]:
    """(n,) row of the first task with the same weights: blocks of tokens share those of a tile, nothing else does."""
    key = tasks["pe"].astype(np.int64) << 3 | tasks["kind"]
    for name in ("expert", "tile"):  # from -1 on, and fewer than 2^21
        key = (key << 21) + tasks[name] + 1
    _, first, weights = np.unique(key, return_index=True, return_inverse=True)
    rows: NDArray[np.int64] = first[weights.reshape(-1)].astype(np.int64)
    return rows


def num_active_experts(tasks: Any, num_pes: int) -> NDArray[np.int64]:
    """(num_pes,) experts of each PE that have tokens."""
    of_expert = tasks[np.isin(tasks["kind"], [KINDS.index("up"), KINDS.index("expert")])]
    pairs = np.unique(of_expert[["pe", "expert"]])
    return np.bincount(pairs["pe"], minlength=num_pes).astype(np.int64)


def remote_bytes(table: TaskTable) -> NDArray[np.float64]:
    """(n,) float64, bytes that each task stores to other PEs [bytes]."""
    source = segment_owner(table.signal_ptr)
    remote = table.tasks["pe"][source] != table.event_pe[table.signal_event]
    weights: Any = np.where(remote, table.signal_bytes, 0).astype(np.float64)
    return np.bincount(source, weights=weights, minlength=len(table.tasks)).astype(np.float64)


def _overheads_ps(tasks: Any, machine: Machine) -> NDArray[np.float64]:
    """(n,) fixed part of each task, by its kind and size [ps]."""
    size, result = task_sizes(tasks), np.zeros(len(tasks), np.int64)
    for index, kind in enumerate(KINDS):
        of_kind = tasks["kind"] == index
        result[of_kind] = between(machine.overheads(kind), size[of_kind])
    return result.astype(np.float64)


def task_sizes(tasks: Any) -> NDArray[np.int64]:
    """(n,) what a fixed part may depend on: rows of experts' weights; of others tokens, times a gate's experts."""
    num_rows = tasks["num_rows"].astype(np.int64)
    by_tokens = tasks["num_tokens"].astype(np.int64) * np.maximum(num_rows, 1)
    sizes: NDArray[np.int64] = np.where(np.isin(tasks["kind"], FINISHED_KINDS), num_rows, by_tokens)
    return sizes


def between(times: Times, size: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) time for each size, in proportion between those that are given, and that of the nearest beyond [ps]."""
    sizes, times_ps = np.array(times, np.int64).T
    if len(sizes) == 1:
        return np.full(len(size), times_ps[0])
    place = np.clip(np.searchsorted(sizes, size, side="right") - 1, 0, len(sizes) - 2)
    low, high = sizes[place], sizes[place + 1]
    inside = np.clip(size, sizes[0], sizes[-1])
    result: NDArray[np.int64] = ((high - inside) * times_ps[place] + (inside - low) * times_ps[place + 1]) // (
        high - low
    )
    return result


def _evened_out(weight_bytes: NDArray[np.float64], jitter_bytes: int) -> NDArray[np.float64]:
    """Share of the jitter that is left in a task of so many bytes: the mean of k independent pieces has 1 / sqrt(k)."""
    if jitter_bytes == 0:
        return np.ones(len(weight_bytes))
    left: NDArray[np.float64] = np.sqrt(jitter_bytes / np.maximum(weight_bytes, float(jitter_bytes)))
    return left


def _padded_flops(tasks: Any, matrix_tokens: int, matrix_rows: int) -> NDArray[np.float64]:
    """The matrix instruction works on whole tiles: operations on tokens and rows that are not there count, too."""
    num_tokens, num_rows = tasks["num_tokens"].astype(np.uint64), tasks["num_rows"].astype(np.uint64)
    is_matrix = (num_rows > 0) & (num_tokens > 0)
    cells = np.where(is_matrix, num_tokens * num_rows, np.uint64(1))
    padded = _up_to_multiple(num_tokens, matrix_tokens) * _up_to_multiple(num_rows, matrix_rows)
    flops: NDArray[np.uint64] = tasks["flops"] // cells * np.where(is_matrix, padded, np.uint64(1))
    return flops.astype(np.float64)


def _up_to_multiple(values: NDArray[np.uint64], of: int) -> NDArray[np.uint64]:
    size = np.uint64(of)
    return (values + size - np.uint64(1)) // size * size


def _ceil(ps: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ceil(ps - ROUNDING_PS).astype(np.int64)
