"""Scheduling policies: a queue discipline, an order and a tiling under one name.

The built-in orders are C++ (`hip_src/include/flashmoe/policy.hpp`) and run in the kernel as they do here. A policy
written in Python ranks tasks; its order becomes a list of task ids, which any executor can follow.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.tasks import ORDERS, TaskTable, Tiling
from flashmoe.trace import KINDS, Trace

Queue = Literal["push", "ticket", "domain", "static", "replay"]
QUEUES: tuple[str, ...] = get_args(Queue)


class TaskView(NamedTuple):
    """A pick as a Python policy sees it; -1 where a field does not apply."""

    pe: int
    kind: str
    expert: int
    tile: int
    block: int
    num_tokens: int
    local_tokens: int  # of them on the expert's own PE
    peer: int
    weight_bytes: int
    flops: int


Rank = Callable[[TaskView], Any]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """queue: who gets which pick. order: the rank of picks. look_ahead: picks that a worker may take on while its
    first one waits for work of its own PE; they run as they become ready.

    rank: for an order written in Python. replay: for queue="replay", per PE and worker the ids to run.
    """

    name: str
    queue: Queue = "ticket"
    order: str = "phase"
    look_ahead: int = 0
    tiling: Tiling = field(default_factory=Tiling)
    rank: Rank | None = None
    replay: Sequence[Sequence[Sequence[int]]] | None = None
    replay_digests: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.queue not in QUEUES:
            raise ValueError(f"queue={self.queue!r} (accepted: {', '.join(QUEUES)})")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} (accepted: {', '.join(ORDERS)})")
        if not 0 <= self.look_ahead <= _native.MAX_LOOK_AHEAD:
            raise ValueError(f"look_ahead={self.look_ahead} (accepted: 0..{_native.MAX_LOOK_AHEAD})")
        if (self.queue == "replay") != (self.replay is not None):
            raise ValueError(f"queue={self.queue!r} with replay={'lists' if self.replay else None} (give both or none)")
        if self.rank is not None and self.queue in ("push", "replay"):
            raise ValueError(
                f"queue={self.queue!r} keeps no order of its own (accepted with a rank: ticket, domain, static)"
            )

    def with_tiling(self, tiling: Tiling | None) -> Policy:
        return self if tiling is None else replace(self, tiling=tiling)

    def picks(self, table: TaskTable) -> list[NDArray[np.uint32]]:
        """Per PE the ids of all picks (first tasks of chains), in this policy's order."""
        return table.order(self.order) if self.rank is None else rank_picks(table, self.rank)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "queue": self.queue, "order": self.order, "look_ahead": self.look_ahead}

    @classmethod
    def from_trace(cls, trace: Trace, name: str | None = None) -> Policy:
        """The schedule of a trace, simulated or measured, as a policy: every worker repeats its own tasks.

        It fits the routing, EP size, tiling and number of workers that the trace was made with.
        """
        header, records = trace.header, trace.records
        lists: list[list[list[int]]] = []
        for pe in range(header["ep_size"]):
            mine = records[records["pe"] == pe]
            mine = mine[np.lexsort((mine["task_id"], mine["end_ps"], mine["start_ps"]))]
            lists.append([mine["task_id"][mine["worker"] == w].tolist() for w in range(header["num_workers"])])
        return cls(
            name=name or f"replay of {header['policy']}",
            queue="replay",
            tiling=Tiling(**header["tiling"]),
            replay=lists,
            replay_digests=header["plan_digests"],
        )


def rank_picks(table: TaskTable, rank: Rank) -> list[NDArray[np.uint32]]:
    """Orders picks by a rank, lower first, such that no pick comes before what it waits for.

    Of the picks whose inputs are made by picks before them, on whatever PE, the lowest rank comes next. Each PE's
    order is a part of this one order, so queues that hand picks out in order cannot deadlock.
    """
    tasks = table.tasks
    heads = np.flatnonzero(tasks["chain"] > 0)
    missing = table.event_target.astype(np.int64)
    waiting: dict[int, list[int]] = {}  # event -> picks
    unmet = dict.fromkeys(heads.tolist(), 0)
    members = {int(head): range(int(head), int(head) + int(tasks["chain"][head])) for head in heads}

    def edges(ptr: NDArray[Any], values: NDArray[Any], head: int) -> list[int]:
        return [int(event) for row in members[head] for event in values[int(ptr[row]) : int(ptr[row + 1])]]

    for head in unmet:
        for event in set(edges(table.wait_ptr, table.wait_event, head)):
            if missing[event] > 0:
                waiting.setdefault(event, []).append(head)
                unmet[head] += 1
    ready: list[tuple[Any, int]] = [(_key(table, rank, head), head) for head, count in unmet.items() if count == 0]
    heapq.heapify(ready)
    order: list[list[int]] = [[] for _ in range(table.num_pes)]
    while ready:
        _, head = heapq.heappop(ready)
        order[tasks["pe"][head]].append(int(tasks["task_id"][head]))
        for event in edges(table.signal_ptr, table.signal_event, head):
            missing[event] -= 1
            if missing[event] == 0:
                for waiter in waiting.get(event, ()):
                    unmet[waiter] -= 1
                    if unmet[waiter] == 0:
                        heapq.heappush(ready, (_key(table, rank, waiter), waiter))
    return [np.array(ids, np.uint32) for ids in order]


def _key(table: TaskTable, rank: Rank, head: int) -> Any:
    task = table.tasks[head]
    return rank(
        TaskView(
            pe=int(task["pe"]),
            kind=KINDS[task["kind"]],
            expert=int(task["expert"]),
            tile=int(task["tile"]),
            block=int(task["block"]),
            num_tokens=int(task["num_tokens"]),
            local_tokens=int(table.local_tokens[head]),
            peer=int(task["peer"]),
            weight_bytes=int(task["weight_bytes"]),
            flops=int(task["flops"]),
        )
    )


_BUILT_IN: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name="ancestor", queue="push", tiling=Tiling(granularity="token")),
        Policy(name="push", queue="push"),
        Policy(name="ticket", queue="ticket", look_ahead=1),
        Policy(name="domain_steal", queue="domain", look_ahead=1),
        Policy(name="static_phase", queue="static", look_ahead=1),
        Policy(name="expert_lpt", queue="domain", order="lpt", look_ahead=4),  # depth first: down soon follows up
        Policy(name="local_first", queue="domain", order="local_first", look_ahead=1),
        Policy(name="remote_first", queue="domain", order="remote_first", look_ahead=1),
    )
}
_in_python: dict[str, Policy] = {}


def policy_names() -> list[str]:
    """Names that `policy=` accepts: the built-in ones, then those written in Python."""
    return [*_BUILT_IN, *_in_python]


def policy(
    name: str, *, queue: Queue = "ticket", tiling: Tiling | None = None, look_ahead: int = 0
) -> Callable[[Rank], Policy]:
    """Makes a policy of a function that ranks tasks: lower runs first, ties by PE and id.

    The function is called once a pick with a TaskView and returns anything that sorts. It need not care for
    dependencies: a task is never put before what it waits for.

        @fm.policy("big_first")
        def big_first(task):
            return -task.num_tokens
    """
    if name in _BUILT_IN:
        raise ValueError(f"policy {name!r} is built in; choose another name")

    def register(rank: Rank) -> Policy:
        made = Policy(name=name, queue=queue, tiling=tiling or Tiling(), look_ahead=look_ahead, rank=rank)
        _in_python[name] = made
        return made

    return register


def resolve(chosen: str | Policy, tiling: Tiling | None = None) -> Policy:
    """A policy by name, or as it is; with another tiling if one is given."""
    if isinstance(chosen, Policy):
        return chosen.with_tiling(tiling)
    if chosen in _BUILT_IN:
        return _BUILT_IN[chosen].with_tiling(tiling)
    if chosen in _in_python:
        return _in_python[chosen].with_tiling(tiling)
    raise ValueError(f"policy={chosen!r} (accepted: {', '.join(policy_names())}, or a Policy)")
