"""What launches have in common, whatever the backend: arguments in, records out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.model import MoEModel
from flashmoe.routing import Routing
from flashmoe.tasks import TaskTable, critical_path, ready_times
from flashmoe.trace import TRACE_DTYPE, Trace, stamp

RECORD_DTYPE = np.dtype(  # field for field `struct TraceRecord` in hip_src/include/flashmoe/trace.hpp
    [
        ("start_ns", "u8"),
        ("duration_ns", "u4"),
        ("task_id", "u4"),
        ("ticket_delta", "u4"),
        ("ready_delta", "u4"),
        ("worker", "u2"),
        ("peer", "u2"),
        ("domain", "u2"),
        ("flags", "u2"),
    ]
)


@dataclass(frozen=True, eq=False)
class RunResult:
    """outputs: one (num_tokens, d_model) array per PE, in the model's dtype; tensors where x was tensors.

    routing: what the layer used.
    """

    outputs: list[Any]
    trace: Trace
    routing: Routing


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises: ValueError naming the value and the range."""
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} (accepted: {low}..{high})")


def check_routing(model: MoEModel, routing: Routing, num_tokens: list[int]) -> None:
    """Raises: ValueError when a routing from outside is not for this model and these tokens per PE."""
    routing.check(model)
    if list(routing.num_tokens) != num_tokens:
        raise ValueError(f"routing for {list(routing.num_tokens)} tokens per PE (x has {num_tokens})")


def take_tokens(model: MoEModel, x: Sequence[NDArray[Any]], ep_size: int, max_tokens: int) -> list[NDArray[Any]]:
    """x as contiguous (num_tokens, d_model) arrays of the model's dtype.

    Raises: ValueError naming what does not fit.
    """
    if len(x) != ep_size:
        raise ValueError(f"x: {len(x)} arrays (must be one per PE, {ep_size})")
    tokens = []
    for pe, rows in enumerate(x):
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != model.d_model:
            raise ValueError(f"x[{pe}]: shape {rows.shape} (must be (num_tokens, d_model={model.d_model}))")
        if len(rows) > max_tokens:
            raise ValueError(f"x[{pe}]: {len(rows)} tokens (the layer has room for max_tokens={max_tokens})")
        tokens.append(np.ascontiguousarray(rows, dtype=model.numpy_dtype))
    return tokens


def expected_routing(model: MoEModel, gate: NDArray[Any], tokens: list[NDArray[Any]]) -> Routing:
    """What the gate will choose: a schedule needs it before the launch, which checks it."""
    from flashmoe import reference

    return gate_routing(model, [reference.route(reference.router_logits(model, gate, x), model) for x in tokens])


def gate_routing(model: MoEModel, pairs: list[tuple[NDArray[np.int32], NDArray[np.float32]]]) -> Routing:
    """pairs: (topk_idx, topk_weights) of each PE, as a gate has chosen them."""
    idx, weights = tuple(idx for idx, _ in pairs), tuple(weights for _, weights in pairs)
    return Routing(topk_idx=idx, topk_weights=weights, num_experts=model.num_experts, name="gate")


def launch_trace(table: TaskTable, buffers: list[np.ndarray[Any, Any]], header: dict[str, Any]) -> Trace:
    """The trace of a launch. buffers: RECORD_DTYPE records of each worker, [pe * num_workers + worker], or none."""
    records = _records(table, buffers, header["num_workers"]) if buffers else np.zeros(0, TRACE_DTYPE)
    header = {
        **table.header(),
        **stamp(),
        **header,
        "hbm_bytes": int(table.tasks["weight_bytes"].sum()),
        "link_bytes": int(table.tasks["link_bytes"].sum()),
    }
    complete = len(records) == len(table)
    return Trace(records, header, critical_path(table, records) if complete else np.zeros(0, np.int64))


def _records(table: TaskTable, buffers: list[np.ndarray[Any, Any]], num_workers: int) -> np.ndarray[Any, Any]:
    """The workers' 32-byte records as trace records, by (pe, task_id)."""
    raw = np.concatenate(buffers)
    pe = np.repeat(np.arange(len(buffers)) // num_workers, [len(buffer) for buffer in buffers])
    rows = np.empty(len(raw), np.int64)
    for i in range(table.num_pes):
        rows[pe == i] = table.row(i, raw["task_id"][pe == i].astype(np.int64))
    raw, rows = raw[np.argsort(rows)], np.sort(rows)
    tasks = table.tasks[rows]
    records = np.zeros(len(raw), TRACE_DTYPE)
    for name in ("pe", "task_id", "kind", "expert", "tile", "num_tokens", "peer", "link_bytes"):
        records[name] = tasks[name]
    for name in ("worker", "domain", "flags"):
        records[name] = raw[name]
    records["hbm_bytes"] = tasks["weight_bytes"]
    start_ns = raw["start_ns"].astype(np.int64)
    records["start_ps"] = start_ns * 1000
    records["end_ps"] = (start_ns + raw["duration_ns"]) * 1000
    records["ticket_ps"] = (start_ns - raw["ticket_delta"]) * 1000
    records["asked_ps"], records["loaded_ps"] = records["ticket_ps"], records["start_ps"]
    records["done_ps"] = records["end_ps"]
    if len(rows) == len(table):  # all workers share a clock, so inputs were complete when their last maker ended
        records["ready_ps"] = ready_times(table, records["end_ps"].astype(np.int64))
    else:
        records["ready_ps"] = (start_ns - raw["ready_delta"]) * 1000
    return records
