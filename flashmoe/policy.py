"""Scheduling policies: a queue discipline, an order and a tiling under one name.

The built-in orders are C++ (`hip_src/include/flashmoe/policy.hpp`) and run in the kernel as they do here. A policy
written in Python ranks tasks; its order becomes a list of task ids, which any executor can follow.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.tasks import ORDERS, TaskTable, Tiling, segment_owner
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
Lists = Sequence[Sequence[Sequence[int]]]  # [pe][worker][turn] task ids
MakeLists = Callable[[TaskTable, int], Lists]  # called with the tasks of a layer and the number of workers of a PE


@dataclass(frozen=True, kw_only=True)
class Policy:
    """queue: who gets which pick. order: the rank of picks. look_ahead: picks that a worker may take on while its
    first one waits for work of its own PE; they run as they become ready.

    rank: for an order written in Python. replay: for queue="replay", per PE and worker the ids to run, or a function
    that makes these lists; it is called once for each layer. They are proven complete and free of deadlock
    (`flashmoe.schedule`) before anything runs.
    """

    name: str
    queue: Queue = "ticket"
    order: str = "phase"
    look_ahead: int = 0
    tiling: Tiling = field(default_factory=Tiling)
    rank: Rank | None = None
    replay: Lists | MakeLists | None = None
    replay_digests: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.queue not in QUEUES:
            raise ValueError(f"queue={self.queue!r} (accepted: {', '.join(QUEUES)})")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} (accepted: {', '.join(ORDERS)})")
        if not 0 <= self.look_ahead <= _native.MAX_LOOK_AHEAD:
            raise ValueError(f"look_ahead={self.look_ahead} (accepted: 0..{_native.MAX_LOOK_AHEAD})")
        if (self.queue == "replay") != (self.replay is not None):
            given = "None" if self.replay is None else "a function" if callable(self.replay) else "lists"
            raise ValueError(f"queue={self.queue!r} with replay={given} (give queue='replay' and replay, or neither)")
        if self.rank is not None and self.queue in ("push", "replay"):
            raise ValueError(
                f"queue={self.queue!r} keeps no order of its own (accepted with a rank: ticket, domain, static)"
            )

    def with_tiling(self, tiling: Tiling | None) -> Policy:
        return self if tiling is None else replace(self, tiling=tiling)

    def picks(self, table: TaskTable) -> list[NDArray[np.uint32]]:
        """Per PE the ids of all picks (first tasks of chains), in this policy's order."""
        return table.order(self.order) if self.rank is None else rank_picks(table, self.rank)

    def sorts_experts(self, num_pes: int) -> bool:
        """Whether the lists of a PE's experts have to be sorted: its order is built in, and not that of their ids."""
        if self.rank is not None or self.queue == "replay":
            return False
        # with one PE all tokens are its own
        return self.order in ("lpt", "arrival") or (num_pes > 1 and self.order in ("local_first", "remote_first"))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "queue": self.queue, "order": self.order, "look_ahead": self.look_ahead}

    @classmethod
    def from_trace(cls, trace: Trace, name: str | None = None) -> Policy:
        """The schedule of a trace, simulated or measured, as a policy: every worker repeats its own tasks.

        It fits the routing, EP size, tiling and number of workers that the trace was made with.
        """
        header, records = trace.header, trace.records
        if header.get("layers", 1) > 1:
            raise ValueError(f"trace of {header['layers']} layers (a replay repeats the schedule of one)")
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
    order is a part of this one order, so queues that hand picks out in order cannot deadlock. The rank is asked once
    a pick, when its inputs are there.
    """
    heads = np.flatnonzero(table.tasks["chain"] > 0)
    views, pe = _views(table, heads), table.tasks["pe"][heads].tolist()
    # picks are numbered through; a chain waits for and signals all that its tasks do
    pick_of = np.cumsum(table.tasks["chain"] > 0) - 1
    signals = _grouped(pick_of[segment_owner(table.signal_ptr)], np.asarray(table.signal_event), len(heads))
    num_events = len(table.event_target)
    waits = np.unique(pick_of[segment_owner(table.wait_ptr)] * num_events + np.asarray(table.wait_event, np.int64))
    waits = waits[np.asarray(table.event_target)[waits % num_events] > 0]
    waiting = _grouped(waits % num_events, waits // num_events, num_events)
    missing = table.event_target.tolist()  # signals that an event still needs
    unmet = np.bincount(waits // num_events, minlength=len(heads)).tolist()  # inputs that a pick still needs

    ready = [(rank(views[pick]), pick) for pick, count in enumerate(unmet) if count == 0]
    heapq.heapify(ready)
    order: list[list[int]] = [[] for _ in range(table.num_pes)]
    while ready:
        _, pick = heapq.heappop(ready)
        order[pe[pick]].append(pick)
        for event in signals[pick]:
            missing[event] -= 1
            if missing[event] == 0:
                for waiter in waiting[event]:
                    unmet[waiter] -= 1
                    if unmet[waiter] == 0:
                        heapq.heappush(ready, (rank(views[waiter]), waiter))
    ids = table.tasks["task_id"][heads]
    return [ids[picks].astype(np.uint32) for picks in order]


def _views(table: TaskTable, rows: NDArray[np.int64]) -> list[TaskView]:
    columns = {name: table.tasks[name][rows].tolist() for name in TaskView._fields if name != "local_tokens"}
    columns["local_tokens"] = table.local_tokens[rows].tolist()
    columns["kind"] = [KINDS[kind] for kind in columns["kind"]]
    return list(map(TaskView, *(columns[name] for name in TaskView._fields)))


def _grouped(group: NDArray[Any], values: NDArray[Any], num_groups: int) -> list[list[int]]:
    """Of each group its values, in their order."""
    bounds = np.cumsum(np.bincount(group, minlength=num_groups)).tolist()
    ordered = values[np.argsort(group, kind="stable")].tolist()
    return [ordered[begin:end] for begin, end in pairwise([0, *bounds])]


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
    _check_free(name)

    def register(rank: Rank) -> Policy:
        return _register(Policy(name=name, queue=queue, tiling=tiling or Tiling(), look_ahead=look_ahead, rank=rank))

    return register


def schedule(name: str, *, tiling: Tiling | None = None, look_ahead: int = 0) -> Callable[[MakeLists], Policy]:
    """Makes a policy of a function that says which worker runs which tasks, and in which order.

    The function is called once a layer, with the TaskTable and the number of workers of a PE. It returns, for each PE
    and worker, a list of the ids of picks: tasks whose `chain` is above 0. Simulations and launches refuse lists
    that lack a pick, or could deadlock, with a ScheduleError.

        @fm.schedule("tile_by_tile")
        def tile_by_tile(table, num_workers):
            lists = [[[] for _ in range(num_workers)] for _ in range(table.num_pes)]
            for task in table.tasks[table.tasks["chain"] > 0]:
                lists[task["pe"]][task["tile"] % num_workers].append(task["task_id"])
            return lists
    """
    _check_free(name)

    def register(make_lists: MakeLists) -> Policy:
        made = Policy(name=name, queue="replay", tiling=tiling or Tiling(), look_ahead=look_ahead, replay=make_lists)
        return _register(made)

    return register


def _check_free(name: str) -> None:
    if name in _BUILT_IN:
        raise ValueError(f"policy {name!r} is built in; choose another name")


def _register(made: Policy) -> Policy:
    _in_python[made.name] = made
    return made


def resolve(chosen: str | Policy, tiling: Tiling | None = None) -> Policy:
    """A policy by name, or as it is; with another tiling if one is given."""
    if isinstance(chosen, Policy):
        return chosen.with_tiling(tiling)
    if chosen in _BUILT_IN:
        return _BUILT_IN[chosen].with_tiling(tiling)
    if chosen in _in_python:
        return _in_python[chosen].with_tiling(tiling)
    raise ValueError(f"policy={chosen!r} (accepted: {', '.join(policy_names())}, or a Policy)")
