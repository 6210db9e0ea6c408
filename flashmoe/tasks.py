"""The tasks of a layer: how it is cut (`Tiling`), and every task with what it waits for (`TaskTable`).

The task graph itself is C++ (`hip_src/include/flashmoe/task_graph.hpp`); this module shows it as numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.model import MoEModel
from flashmoe.routing import Routing
from flashmoe.trace import KINDS

TASK_DTYPE = np.dtype(
    [  # field for field `struct TaskRow` in hip_src/engine/task_table.hpp
        ("pe", "u2"),
        ("kind", "u2"),  # index into KINDS
        ("task_id", "u4"),
        ("expert", "i4"),  # -1: does not apply, as for tile, block and peer
        ("tile", "i4"),
        ("block", "i4"),
        ("num_tokens", "u4"),
        ("peer", "i4"),
        ("chain", "u4"),  # tasks that one pick takes, at the first of them; 0 inside a chain
        ("num_rows", "u4"),  # of weights, in a matrix product with the tokens; 0: there is none
        ("weight_bytes", "u8"),
        ("io_bytes", "u8"),
        ("link_bytes", "u8"),
        ("flops", "u8"),
    ],
    align=True,
)
# Kinds, by index, that wait for work of their own PE only: `waits_for_own_pe` in task.hpp. A worker may look past them.
OWN_PE_KINDS = tuple(KINDS.index(kind) for kind in ("route", "dispatch", "down"))
EVENT_KINDS = ("gated", "routed", "planned", "upped", "result")
ORDERS = ("phase", "expert", "local_first", "remote_first", "lpt", "arrival")

# 64 KB of up weights and 128 KB of down weights a task at d_model 2048 and d_ff 768 in bf16 would be too coarse for
# one token on 304 CUs; these give 64 and 48 KB.
_TILE_DEFAULTS = {
    "gate_tokens": 8,
    "gate_experts": 8,
    "dispatch_tokens": 1,
    "up_rows": 8,
    "down_rows": 32,
    "block_tokens": 64,
    "combine_tokens": 1,
}
# down="rows": a chain of tasks for each piece of the output, so as many pieces as there are workers to keep busy.
_ROWS_DEFAULTS = {**_TILE_DEFAULTS, "down_rows": 8}
# The ancestor's split, about 11 tasks a token: the whole gate, the top-k, a whole expert each, the sum.
_TOKEN_DEFAULTS = {
    **_TILE_DEFAULTS,
    "gate_tokens": 1,
    "gate_experts": 1 << 16,  # all of them
    "block_tokens": 1,
}


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a layer is cut into tasks. A size of 0 stands for the default of the granularity.

    A tile at the edge of a matrix is smaller; sizes above the matrix mean one tile.
    """

    granularity: Literal["tile", "token"] = "tile"  # token: a whole expert for one token is one task
    down: Literal["tile", "rows"] = "tile"  # rows: a worker adds up all experts of its PE for some output rows
    gate_tokens: int = 0  # tokens per gate and route task
    gate_experts: int = 0  # router rows per gate task
    dispatch_tokens: int = 0  # tokens per dispatch task; divides gate_tokens
    up_rows: int = 0  # gate/up row pairs per up task
    down_rows: int = 0  # output rows per down task
    block_tokens: int = 0  # most tokens of one expert in an up or down task
    experts_per_pick: int = 0  # down="rows": experts that one pick adds up; 0 = all of the PE
    combine_tokens: int = 0  # tokens per combine task

    def __post_init__(self) -> None:
        for name, accepted in (("granularity", ("tile", "token")), ("down", ("tile", "rows"))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} (accepted: {', '.join(accepted)})")
        if self.granularity == "token" and self.down == "rows":
            raise ValueError("down='rows' with granularity='token': a whole expert is one task (accepted: 'tile')")
        defaults = _ROWS_DEFAULTS if self.down == "rows" else _TILE_DEFAULTS
        if self.granularity == "token":
            defaults = _TOKEN_DEFAULTS
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if not isinstance(value, int) or not 0 <= value <= 1 << 20:
                raise ValueError(f"{field.name}={value!r} (accepted: 1..{1 << 20}, or 0 for the default)")
            if value == 0:
                object.__setattr__(self, field.name, defaults.get(field.name, 0))
        if self.gate_tokens % self.dispatch_tokens:
            raise ValueError(
                f"dispatch_tokens={self.dispatch_tokens} does not divide gate_tokens={self.gate_tokens}: "
                "a dispatch task waits for one route task"
            )
        if self.granularity == "token" and self.block_tokens != 1:
            raise ValueError(f"block_tokens={self.block_tokens} (with granularity='token' it must be 1)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def native(self) -> _native.Tiling:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return _native.Tiling(
            granularity=("tile", "token").index(self.granularity),
            down=("tile", "rows").index(self.down),
            **sizes,
        )


def native_shape(model: MoEModel, ep_size: int) -> _native.Shape:
    """Raises ValueError when the experts cannot be shared out evenly."""
    model.experts_per_pe(ep_size)
    return _native.Shape(
        d_model=model.d_model,
        d_ff=model.d_ff,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_pes=ep_size,
        norm_topk_prob=model.norm_topk_prob,
        dtype=("bf16", "f32").index(model.dtype),
    )


class TaskTable:
    """Every task of one layer on all PEs, for one routing and tiling, by (pe, task_id); and the graph between them.

    Tasks wait for events: counters that live on a PE and reach a target once a launch.

    tasks: (num_tasks,) records of TASK_DTYPE.
    first: (num_pes + 1,) row of each PE's first task.
    event_pe, event_kind, event_index, event_target: (num_events,); a target of 0 is met from the start.
    planned_event: (num_pes,) the event after which a PE knows its tokens per expert.
    wait_ptr (num_tasks + 1,), wait_event: the events that task i waits for are wait_event[wait_ptr[i]:wait_ptr[i+1]].
    signal_ptr, signal_event, signal_bytes: the events that task i adds one to; bytes above 0 travel there first.
    """

    def __init__(self, model: MoEModel, routing: Routing, tiling: Tiling | None = None, *, gate: bool = True) -> None:
        """gate=False: routing is given from outside, the gate tasks are left out and the other ids stay."""
        routing.check(model)
        self.model, self.routing, self.tiling, self.gate = model, routing, tiling or Tiling(), gate
        topk_idx = [np.ascontiguousarray(idx, dtype=np.int32) for idx in routing.topk_idx]
        shape = native_shape(model, routing.ep_size)
        self._native = _native.TaskTable(shape, self.tiling.native(), topk_idx, gate)
        self.tasks: np.ndarray[Any, Any] = self._native.tasks()
        self.first = self._native.first()
        self.event_pe, self.event_kind, self.event_index, self.event_target, self.planned_event = self._native.events()
        self.wait_ptr, self.wait_event = self._native.waits()
        self.signal_ptr, self.signal_event, self.signal_bytes = self._native.signals()

    @property
    def num_pes(self) -> int:
        return len(self.first) - 1

    def __len__(self) -> int:
        return len(self.tasks)

    def row(self, pe: int, task_id: Any) -> Any:
        """Row of a task of a PE; array in, array out."""
        start = int(self.first[pe])
        skipped = int(self.tasks["task_id"][start]) if start < self.first[pe + 1] else 0  # gate tasks left out
        return task_id + (start - skipped)

    def rows(self, records: np.ndarray[Any, Any]) -> NDArray[np.int64]:
        """Row of each record of a trace of this layer."""
        rows = np.empty(len(records), np.int64)
        for pe in range(self.num_pes):
            mine = records["pe"] == pe
            rows[mine] = self.row(pe, records["task_id"][mine].astype(np.int64))
        return rows

    def order(self, name: str) -> list[NDArray[np.uint32]]:
        """Task ids of each PE's picks (first tasks of chains), in the order's rank."""
        if name not in ORDERS:
            raise ValueError(f"order={name!r} (accepted: {', '.join(ORDERS)})")
        return self._native.order(ORDERS.index(name))

    @cached_property
    def local_tokens(self) -> NDArray[np.uint32]:
        """(num_tasks,) how many of an expert task's tokens belong to its own PE."""
        return self._native.local_tokens()

    @cached_property
    def plan_digests(self) -> list[int]:
        """One number a PE: schedules may be replayed where these agree."""
        return self._native.plan_digests()

    def header(self) -> dict[str, Any]:
        """What a trace says about the layer, whoever runs it."""
        return {
            "model": self.model.to_dict(),
            "ep_size": self.num_pes,
            "num_tokens": [int(count) for count in self.routing.num_tokens],
            "routing": self.routing.digest,
            "routing_name": self.routing.name,
            "tiling": self.tiling.to_dict(),
            "gate_inside": self.gate,
            "plan_digests": self.plan_digests,
        }

    def describe(self, row: int) -> str:
        """A task in words, for messages."""
        task = self.tasks[row]
        parts = [f"task {task['task_id']} of PE {task['pe']}: {KINDS[task['kind']]}"]
        parts += [f"{name} {task[name]}" for name in ("expert", "tile", "block", "peer") if task[name] >= 0]
        return ", ".join(parts)

    def describe_event(self, event: int) -> str:
        return f"{EVENT_KINDS[self.event_kind[event]]}[{self.event_index[event]}] on PE {self.event_pe[event]}"


def segment_owner(ptr: NDArray[Any]) -> NDArray[np.int64]:
    """Row that each edge of a compressed edge list belongs to: [0, 2, 3] -> [0, 0, 1]."""
    begin = ptr.astype(np.int64)
    counts: NDArray[np.int64] = begin[1:] - begin[:-1]
    return np.repeat(np.arange(len(ptr) - 1), counts)


def ready_times(table: TaskTable, end_ps: NDArray[np.int64]) -> NDArray[np.int64]:
    """When each task's last input was complete, given the end of every task: (num_tasks,) [ps], 0 without."""
    event_ps = np.zeros(len(table.event_pe), np.int64)
    np.maximum.at(event_ps, table.signal_event, end_ps[segment_owner(table.signal_ptr)])
    ready_ps = np.zeros(len(table), np.int64)
    np.maximum.at(ready_ps, segment_owner(table.wait_ptr), event_ps[table.wait_event])
    return ready_ps


def critical_path(tables: TaskTable | Sequence[TaskTable], records: np.ndarray[Any, Any]) -> NDArray[np.int64]:
    """What the last task to end had to wait for, and so on back to the start.

    A task was held up by the last of its inputs or by the task before it on its worker: the later of both. In
    a later layer a task without inputs of its own waits for all of the layer before on its PE.
    tables: one, or one a layer.
    Returns: indices into records, first to last.
    """
    if len(records) == 0:
        return np.zeros(0, np.int64)
    maker = np.full(len(records), -1, np.int64)  # record -> record that made its last input
    for layer, table in enumerate([tables] if isinstance(tables, TaskTable) else tables):
        maker[records["layer"] == layer] = _last_makers(table, records, layer)

    before = np.full(len(records), -1, np.int64)  # record -> record before it on its worker
    by_worker = np.lexsort((records["end_ps"], records["start_ps"], records["worker"], records["pe"]))
    same = (np.diff(records["pe"][by_worker].astype(np.int64)) == 0) & (
        np.diff(records["worker"][by_worker].astype(np.int64)) == 0
    )
    before[by_worker[1:][same]] = by_worker[:-1][same]

    path = [int(np.argmax(records["end_ps"]))]
    while True:
        current = path[-1]
        maker_idx, worker_idx = int(maker[current]), int(before[current])
        # inputs become visible after their maker's end, so they compare by ready time; a launch has none
        input_ps = max(records["ready_ps"][current], records["end_ps"][maker_idx]) if maker_idx >= 0 else -1
        worker_ps = records["end_ps"][worker_idx] if worker_idx >= 0 else -1
        current = maker_idx if input_ps >= worker_ps else worker_idx
        if current < 0:
            return np.array(path[::-1], np.int64)
        path.append(current)


def _last_makers(table: TaskTable, records: np.ndarray[Any, Any], layer: int) -> NDArray[np.int64]:
    """For each record of a layer, in their order, the record of the last to end of those that it waited for, or -1."""
    of_layer = np.flatnonzero(records["layer"] == layer)
    place = np.full(len(table.tasks), -1, np.int64)  # row of the table -> index of the record
    row_of = table.rows(records[of_layer])
    place[row_of] = of_layer
    end_ps = np.where(place >= 0, records["end_ps"][place], -1)

    signal_row = segment_owner(table.signal_ptr)
    by_end = np.argsort(end_ps[signal_row], kind="stable")
    last_row = np.full(len(table.event_pe), -1, np.int64)  # event -> row that completed it
    last_row[table.signal_event[by_end]] = signal_row[by_end]  # of equal indices the last one stays

    maker = np.full(len(table.tasks), -1, np.int64)  # row of the table -> record
    made_by = last_row[table.wait_event]
    waits = np.flatnonzero(made_by >= 0)
    waits = waits[np.argsort(end_ps[made_by[waits]], kind="stable")]
    maker[segment_owner(table.wait_ptr)[waits]] = place[made_by[waits]]

    if layer > 0:
        for pe in range(table.num_pes):
            earlier = np.flatnonzero((records["layer"] == layer - 1) & (records["pe"] == pe))
            if len(earlier):
                without = (table.tasks["pe"] == pe) & (maker < 0)
                maker[without] = earlier[np.argmax(records["end_ps"][earlier])]
    return maker[row_of]
