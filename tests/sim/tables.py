"""Task tables made by hand: what an engine sees of `flashmoe.tasks.TaskTable`, without the native module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.machine import Machine
from flashmoe.trace import KINDS

TASK_DTYPE = np.dtype(
    [
        ("pe", "u2"),
        ("task_id", "u4"),
        ("kind", "u1"),
        ("expert", "i4"),
        ("tile", "i4"),
        ("block", "i4"),
        ("num_tokens", "u4"),
        ("peer", "i4"),
        ("chain", "u4"),
        ("weight_bytes", "u8"),
        ("io_bytes", "u8"),
        ("link_bytes", "u8"),
        ("flops", "u8"),
    ]
)
EVENT_KINDS = ("gated", "routed", "planned", "upped", "result")


@dataclass(frozen=True)
class HandTiling:
    down: str = "tile"


@dataclass(frozen=True)
class HandPolicy:
    """The fields of `flashmoe.policy.Policy` that an engine reads."""

    queue: str = "static"
    look_ahead: int = 0

    def picks(self, table: HandTable) -> list[list[int]]:
        """By task id: the heads of the chains."""
        tasks = table.tasks
        return [tasks["task_id"][(tasks["pe"] == pe) & (tasks["chain"] > 0)].tolist() for pe in range(table.num_pes)]


class HandTable:
    """Build with task() and event(), then read like a TaskTable. Tasks are added PE by PE."""

    def __init__(self, num_pes: int = 1, down: str = "tile") -> None:
        self.num_pes = num_pes
        self.tiling = HandTiling(down)
        self._tasks: list[tuple[Any, ...]] = []
        self._waits: list[list[int]] = []
        self._signals: list[list[tuple[int, int]]] = []
        self._events: list[tuple[int, int]] = []  # pe, kind
        self._plans = [self.event("planned", pe) for pe in range(num_pes)]

    def event(self, kind: str, pe: int = 0) -> int:
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
        waits: tuple[int, ...] = (),
        signals: tuple[int | tuple[int, int], ...] = (),
        expert: int = -1,
        tile: int | None = None,
        chain: int = 1,
        peer: int = -1,
    ) -> int:
        """Add a task; a signal is an event, or (event, bytes) to another PE. Returns its row."""
        row = len(self._tasks)
        task_id = sum(1 for task in self._tasks if task[0] == pe)
        tile = row if tile is None else tile  # every task its own weights, unless said otherwise
        fields = (pe, task_id, KINDS.index(kind), expert, tile, 0, 1, peer, chain, weights, io, 0, flops)
        self._tasks.append(fields)
        self._waits.append(list(waits))
        self._signals.append([signal if isinstance(signal, tuple) else (signal, 0) for signal in signals])
        return row

    @property
    def tasks(self) -> Any:
        return np.array(self._tasks, dtype=TASK_DTYPE)

    @property
    def first(self) -> Any:
        return np.searchsorted(self.tasks["pe"], np.arange(self.num_pes + 1))

    @property
    def event_pe(self) -> Any:
        return np.array([pe for pe, _ in self._events], dtype=np.uint16)

    @property
    def event_kind(self) -> Any:
        return np.array([kind for _, kind in self._events], dtype=np.uint8)

    @property
    def event_target(self) -> Any:
        """Every signal that somebody makes is wanted."""
        return np.bincount(self.signal_event, minlength=len(self._events)).astype(np.uint32)

    @property
    def wait_ptr(self) -> Any:
        return np.cumsum([0, *map(len, self._waits)])

    @property
    def wait_event(self) -> Any:
        return np.array([event for waits in self._waits for event in waits], dtype=np.int64)

    @property
    def signal_ptr(self) -> Any:
        return np.cumsum([0, *map(len, self._signals)])

    @property
    def signal_event(self) -> Any:
        return np.array([event for signals in self._signals for event, _ in signals], dtype=np.int64)

    @property
    def signal_bytes(self) -> Any:
        return np.array([size for signals in self._signals for _, size in signals], dtype=np.int64)

    @property
    def planned_event(self) -> Any:
        return np.array(self._plans)

    def row(self, pe: int, task_id: Any) -> Any:
        return task_id + self.first[pe]

    def describe(self, row: int) -> str:
        pe, task_id, kind = self._tasks[row][:3]
        return f"task {task_id} of PE {pe}: {KINDS[kind]}"

    def describe_event(self, event: int) -> str:
        pe, kind = self._events[event]
        return f"{EVENT_KINDS[kind]} event {event} on PE {pe}"


def plain_machine(**overrides: Any) -> Machine:
    """A machine without any latency: 100 GB/s, 10 GB/s a CU, so 1 byte through one CU takes 100 ps."""
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
        "put_ps": 0,
        "link_bytes_per_ns": 1.0,
        "link_topology": "mesh",
        "store_bytes_per_ns": 1e9,
    }
    values |= {f"{kind}_overhead_ps": 0 for kind in KINDS}
    return Machine(**(values | overrides))
