"""Task tables made by hand: what an engine sees of `flashmoe.tasks.TaskTable`, without a model or a routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flashmoe.machine import Machine
from flashmoe.sim import ENGINES
from flashmoe.tasks import EVENT_KINDS, TASK_DTYPE
from flashmoe.trace import KINDS


@dataclass(frozen=True)
class HandTiling:
    down: str = "tile"


@dataclass(frozen=True)
class HandPolicy:
    """The fields of `flashmoe.policy.Policy` that an engine reads."""

    queue: str = "static"
    look_ahead: int = 0
    sorts: bool = False

    def sorts_experts(self, num_pes: int) -> bool:
        return self.sorts

    def picks(self, table: HandTable) -> list[list[int]]:
        """By task id: the heads of the chains."""
        tasks = table.tasks
        return [tasks["task_id"][(tasks["pe"] == pe) & (tasks["chain"] > 0)].tolist() for pe in range(table.num_pes)]


class HandTable:
    """Build with task() and event(), then read like a TaskTable. Tasks are added PE by PE.

    The arrays are made when they are first read; nothing can be added after that.
    """

    def __init__(self, num_pes: int = 1, down: str = "tile") -> None:
        self.num_pes = num_pes
        self.tiling = HandTiling(down)
        self._tasks: list[tuple[Any, ...]] = []
        self._tasks_of = [0] * num_pes
        self._waits: list[Sequence[int]] = []
        self._signals: list[list[tuple[int, int]]] = []
        self._events: list[tuple[int, int]] = []  # pe, kind
        self._plans = [self.event("planned", pe) for pe in range(num_pes)]

    def event(self, kind: str, pe: int = 0) -> int:
        self._check_open()
        self._events.append((pe, EVENT_KINDS.index(kind)))
        return len(self._events) - 1

    def plan(self, pe: int = 0) -> int:
        return self._plans[pe]

    def task(
        self,
        kind: str,
        *,
        pe: int = 0,
        weights: int = 0,
        io: int = 0,
        flops: int = 0,
        waits: Sequence[int] = (),
        signals: Sequence[int | tuple[int, int]] = (),
        expert: int = -1,
        tile: int | None = None,
        tokens: int = 1,
        rows: int = 0,
        chain: int = 1,
        peer: int = -1,
    ) -> int:
        """Add a task; a signal is an event, or (event, bytes) to another PE. Returns its row."""
        self._check_open()
        row = len(self._tasks)
        task_id = self._tasks_of[pe]
        self._tasks_of[pe] += 1
        tile = row if tile is None else tile  # every task its own weights, unless said otherwise
        kind_idx = KINDS.index(kind)
        self._tasks.append((pe, kind_idx, task_id, expert, tile, 0, tokens, peer, chain, rows, weights, io, 0, flops))
        self._waits.append(waits)
        self._signals.append([signal if isinstance(signal, tuple) else (signal, 0) for signal in signals])
        return row

    def _check_open(self) -> None:
        if "tasks" in vars(self):
            raise RuntimeError("this table has been read: nothing can be added any more")

    def __len__(self) -> int:
        return len(self._tasks)

    @cached_property
    def tasks(self) -> Any:
        return np.array(self._tasks, dtype=TASK_DTYPE)

    @cached_property
    def first(self) -> Any:
        return np.searchsorted(self.tasks["pe"], np.arange(self.num_pes + 1))

    @cached_property
    def event_pe(self) -> Any:
        return np.array([pe for pe, _ in self._events], dtype=np.uint16)

    @cached_property
    def event_kind(self) -> Any:
        return np.array([kind for _, kind in self._events], dtype=np.uint16)

    @cached_property
    def event_target(self) -> Any:
        """Every signal that somebody makes is wanted."""
        return np.bincount(self.signal_event, minlength=len(self._events)).astype(np.uint32)

    @cached_property
    def wait_ptr(self) -> Any:
        return np.cumsum([0, *map(len, self._waits)])

    @cached_property
    def wait_event(self) -> Any:
        return np.array([event for waits in self._waits for event in waits], dtype=np.int64)

    @cached_property
    def signal_ptr(self) -> Any:
        return np.cumsum([0, *map(len, self._signals)])

    @cached_property
    def signal_event(self) -> Any:
        return np.array([event for signals in self._signals for event, _ in signals], dtype=np.int64)

    @cached_property
    def signal_bytes(self) -> Any:
        return np.array([size for signals in self._signals for _, size in signals], dtype=np.int64)

    @cached_property
    def planned_event(self) -> Any:
        return np.array(self._plans)

    def row(self, pe: int, task_id: Any) -> Any:
        return task_id + self.first[pe]

    def describe(self, row: int) -> str:
        pe, kind, task_id = self._tasks[row][:3]
        return f"task {task_id} of PE {pe}: {KINDS[kind]}"

    def describe_event(self, event: int) -> str:
        pe, kind = self._events[event]
        return f"{EVENT_KINDS[kind]} event {event} on PE {pe}"


def run_engine(
    engine: str,
    table: HandTable,
    machine: Machine | None = None,
    workers: int = 1,
    lists: Any = None,
    *,
    pe_speed: Sequence[float] | None = None,
    **policy: Any,
) -> Any:
    """One layer on an engine, by name. lists: [pe][worker] picks of queue="replay". policy: fields of HandPolicy.

    Returns: (num_tasks,) TRACE_DTYPE, in the order of the table's rows.
    """
    run: Any = ENGINES[engine]  # typed for a TaskTable and a Policy
    return run(table, machine or plain_machine(), HandPolicy(**policy), workers, lists, pe_speed=pe_speed)


def plain_machine(**overrides: Any) -> Machine:
    """A machine without any latency: 100 GB/s, 10 GB/s a CU, so 1 byte through one CU takes 100 ps.

    signal_near_ps is as signal_ps unless it is given.
    """
    values: dict[str, Any] = {
        "name": "plain",
        "num_cus": 4,
        "num_domains": 1,
        "num_pes_max": 8,
        "hbm_bytes_per_ns": 100.0,
        "cu_bytes_per_ns": 10.0,
        "cu_flops_per_ns": 1.0,
        "cache_bytes_per_ns": 1.0,
        "prefetch": True,
        "ticket_ps": 0,
        "ticket_far_ps": 0,
        "ticket_service_ps": 0,
        "ticket_far_service_ps": 0,
        "signal_ps": 0,
        "signal_near_ps": overrides.get("signal_ps", 0),
        "put_ps": 0,
        "link_bytes_per_ns": 1.0,
        "store_bytes_per_ns": 1e9,
    }
    values |= {f"{kind}_overhead_ps": 0 for kind in KINDS}
    return Machine(**(values | overrides))
