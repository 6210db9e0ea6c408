"""Schedules and policies: complete, and free of deadlock under any timing, or refused with a counterexample.

What "any timing" means, and why it is so, stands in `flashmoe.liveness`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from flashmoe.liveness import End, Graph, Queues, Undecided, play, search
from flashmoe.policy import Lists, Policy
from flashmoe.tasks import TaskTable
from flashmoe.trace import KINDS

Schedule = list[list[list[int]]]  # [pe][worker][turn]: first tasks of picks

CYCLE_TITLE = "a cycle of waits:"  # line of a message, before the steps
_NAMED = 8  # waiting workers, missing tasks or tasks of a cycle that a message spells out


@dataclass(frozen=True)
class Wait:
    """A step of a cycle of waits: a task, and how the next step's task holds it up."""

    pe: int
    task_id: int
    kind: str
    why: str

    def __str__(self) -> str:
        return f"task {self.task_id} of PE {self.pe}, {self.kind}, {self.why}"


class ScheduleError(ValueError):
    """A schedule or policy that is incomplete, runs a task twice, or deadlocks.

    cycle: of a deadlock, tasks that each wait for the next one, and the last for the first.
    """

    def __init__(self, message: str, cycle: Sequence[Wait] = ()) -> None:
        super().__init__(message)
        self.cycle = list(cycle)


def to_schedule(policy: Policy, table: TaskTable, num_workers: int) -> Schedule:
    """The lists that a replay needs: the policy's own, or those that its function makes, called once for each table.
    An order is dealt out: worker w gets w, w + W, ...

    Raises ScheduleError, naming the policy, unless the schedule is complete and free of deadlock.
    """
    _check_made_for(policy, table)
    with _naming(policy):
        if policy.replay is not None:
            schedule = _replayed(policy, table, num_workers)
        else:
            schedule = [[ids[w::num_workers].tolist() for w in range(num_workers)] for ids in policy.picks(table)]
        check_schedule(table, schedule, num_workers, policy.look_ahead)
    return schedule


def check_policy(
    policy: Policy, table: TaskTable, num_workers: int, *, num_domains: int = 1, in_order: bool = False
) -> None:
    """Raises ScheduleError, naming the policy, unless every pick is run exactly once and no timing leaves a worker
    waiting for ever.

    num_workers: of a PE. num_domains: ticket counters of a PE, for queue="domain". in_order: as `Machine.in_order`.
    """
    if in_order and policy.queue != "push":
        policy = replace(policy, look_ahead=0)
    if policy.queue in ("static", "replay"):
        to_schedule(policy, table, num_workers)
        return
    with _naming(policy):
        orders = [np.asarray(ids).tolist() for ids in policy.picks(table)]
        if policy.queue == "push":
            _check_push(table, orders)
        else:
            domains = num_domains if policy.queue == "domain" else 1
            check_order(
                table, orders, num_workers, num_domains=domains, look_ahead=policy.look_ahead, in_order=in_order
            )


def check_schedule(
    table: TaskTable, schedule: Sequence[Sequence[Sequence[int]]], num_workers: int, look_ahead: int = 0
) -> None:
    """Checks lists for each worker, [pe][worker] ids of picks: the queues `static` and `replay`.

    A worker runs its list in order; past a pick that waits for its own PE it may take `look_ahead` more.
    Raises ScheduleError, with a counterexample, unless every pick is run exactly once and no timing leaves a worker
    waiting for ever; or when look-ahead above 1 is needed and there are too many timings to try.
    """
    if len(schedule) != table.num_pes:
        raise ScheduleError(f"schedule for {len(schedule)} PEs (the layer has {table.num_pes})")
    for pe, workers in enumerate(schedule):
        if len(workers) != num_workers:
            raise ScheduleError(f"PE {pe}: lists for {len(workers)} workers (there are {num_workers})")
        _check_complete(table, pe, workers, "worker's list", lambda worker, turn: f"worker {worker} turn {turn}")
    lists = [[_rows(table, pe, ids) for ids in workers] for pe, workers in enumerate(schedule)]
    _check_liveness(Graph(table), Queues.of_lists(lists), look_ahead)


def check_order(
    table: TaskTable,
    orders: Sequence[Sequence[int]],
    num_workers: int,
    *,
    num_domains: int = 1,
    look_ahead: int = 0,
    in_order: bool = False,
) -> None:
    """Checks orders, [pe] ids of picks by rank, whose picks workers take from counters: the queues `ticket` and
    `domain`. Domain d of `num_domains` owns ranks d, d + D, ... in_order: workers run their picks in the order in which
    they take them, and take one more while one waits; accepted is then what one worker a PE gets through.

    Raises ScheduleError as `check_schedule` does. Who gets which pick is a matter of timing, too.
    """
    if len(orders) != table.num_pes:
        raise ScheduleError(f"orders for {len(orders)} PEs (the layer has {table.num_pes})")
    for pe, ids in enumerate(orders):
        _check_complete(table, pe, [ids], "order", lambda _, rank: f"rank {rank}")
    rows = [_rows(table, pe, ids) for pe, ids in enumerate(orders)]
    if in_order:
        num_workers, num_domains, look_ahead = 1, 1, 0  # 5
    _check_liveness(Graph(table), Queues.of_counters(rows, num_workers, num_domains), look_ahead)


@contextmanager
def _naming(policy: Policy) -> Iterator[None]:
    try:
        yield
    except ScheduleError as error:
        raise ScheduleError(f"policy {policy.name!r}: {error}", error.cycle) from None


# ---- lists


def _check_made_for(policy: Policy, table: TaskTable) -> None:
    if policy.replay_digests is not None and list(policy.replay_digests) != table.plan_digests:
        wrong = [
            pe
            for pe, pair in enumerate(zip(policy.replay_digests, table.plan_digests, strict=False))
            if len({*pair}) > 1
        ]
        raise ScheduleError(
            f"policy {policy.name!r} was made for another routing: tokens per expert differ on "
            f"PE {', '.join(map(str, wrong)) or f'count {table.num_pes}'}"
        )


def _replayed(policy: Policy, table: TaskTable, num_workers: int) -> Schedule:
    assert policy.replay is not None
    lists: Lists = policy.replay(table, num_workers) if callable(policy.replay) else policy.replay
    if _length(lists, "schedule") != table.num_pes:
        raise ScheduleError(f"schedule for {len(lists)} PEs (the layer has {table.num_pes})")
    schedule: Schedule = []
    for pe, workers in enumerate(lists):
        known, heads = _ids(table, pe), set(_heads(table, pe))
        _length(workers, f"PE {pe}")
        schedule.append([])
        for worker, ids in enumerate(workers):
            _length(ids, f"PE {pe} worker {worker}")
            whole = [_as_id(task, f"PE {pe} worker {worker} turn {turn}") for turn, task in enumerate(ids)]
            # a trace lists every task of a chain, a worker takes the chain by its first
            schedule[-1].append([task for task in whole if task in heads or task not in known])
    return schedule


def _length(lists: Sequence[object], what: str) -> int:
    try:
        return len(lists)
    except TypeError:
        raise ScheduleError(f"{what}: {lists!r} (must be a list: [pe][worker][turn] of task ids)") from None


def _as_id(task: object, where: str) -> int:
    try:
        return operator.index(task)  # type: ignore[arg-type]
    except TypeError:
        raise ScheduleError(f"{where}: {task!r} (must be a task id)") from None


def _ids(table: TaskTable, pe: int) -> range:
    start, end = int(table.first[pe]), int(table.first[pe + 1])
    if end == start:
        return range(0)
    return range(int(table.tasks["task_id"][start]), int(table.tasks["task_id"][end - 1]) + 1)


def _heads(table: TaskTable, pe: int) -> list[int]:
    mine = table.tasks[int(table.first[pe]) : int(table.first[pe + 1])]
    return mine["task_id"][mine["chain"] > 0].tolist()  # type: ignore[no-any-return]


def _rows(table: TaskTable, pe: int, ids: Sequence[int]) -> list[int]:
    return table.row(pe, np.asarray(ids, np.int64)).tolist()  # type: ignore[no-any-return]


def _check_complete(
    table: TaskTable, pe: int, lists: Sequence[Sequence[int]], what: str, where: Callable[[int, int], str]
) -> None:
    """where: names a place, by list and turn."""
    wanted, ids = set(_heads(table, pe)), _ids(table, pe)
    seen: dict[int, tuple[int, int]] = {}
    for number, tasks in enumerate(lists):
        for turn, task in enumerate(tasks):
            if task not in wanted:
                accepted = f"{ids.start}..{ids.stop - 1}" if ids else "it has none"
                is_inside = task in ids
                fault = (
                    "inside a chain, taken with its first task" if is_inside else f"not a task of this PE ({accepted})"
                )
                raise ScheduleError(f"PE {pe} {where(number, turn)}: task {task} is {fault}")
            if task in seen:
                raise ScheduleError(
                    f"{table.describe(table.row(pe, task))}: listed twice, for {where(*seen[task])} and "
                    f"{where(number, turn)} (wanted once)"
                )
            seen[task] = (number, turn)
    if missing := sorted(wanted - seen.keys()):
        more = ", ..." if len(missing) > _NAMED else ""
        raise ScheduleError(
            f"{table.describe(table.row(pe, missing[0]))}: in no {what} "
            f"({len(missing)} of {len(wanted)} picks missing: {', '.join(map(str, missing[:_NAMED]))}{more})"
        )


# ---- deadlocks


def _check_liveness(graph: Graph, queues: Queues, look_ahead: int) -> None:
    """The numbers are those of the claims in `flashmoe.liveness`."""
    end = play(graph, queues, whole_chains=look_ahead > 0)
    if not end.is_stuck:
        return  # 1 and 2
    if look_ahead == 0:
        raise _deadlock(graph, queues, end)  # 1
    ahead = play(graph, queues, look_ahead)
    if ahead.is_stuck:
        raise _deadlock(graph, queues, ahead)  # a timing like any other
    if look_ahead == 1 and queues.are_lists and max(graph.chain) == 1:
        return  # 3
    try:
        ahead = search(graph, queues, look_ahead)  # 4
    except Undecided:
        raise _deadlock(
            graph, queues, end, f"not proven: gets through only if look_ahead={look_ahead} comes in time; without it "
        ) from None
    if ahead.is_stuck:
        raise _deadlock(graph, queues, ahead)


def _deadlock(graph: Graph, queues: Queues, end: End, verdict: str = "deadlock: ") -> ScheduleError:
    """Who waits for what, and a cycle of waits."""
    waits = _Waits(graph, queues, end)
    lines = [f"{verdict}{len(waits.stuck)} workers would wait for ever"]
    lines += [waits.who_waits(worker) for worker in waits.stuck[:_NAMED]]
    if len(waits.stuck) > _NAMED:
        lines.append(f"and {len(waits.stuck) - _NAMED} more workers")
    cycle = waits.cycle()
    if cycle:
        shown = [*map(str, cycle[:_NAMED]), *(["..."] if len(cycle) > _NAMED else [])]
        lines += [CYCLE_TITLE, *shown, f"task {cycle[0].task_id} of PE {cycle[0].pe} again"]
    return ScheduleError("\n".join(lines), cycle)


class _Waits:
    """Who waits for what when nobody can go on."""

    def __init__(self, graph: Graph, queues: Queues, end: End) -> None:
        self._graph, self._queues, self._end = graph, queues, end
        self.stuck = [worker for worker, held in enumerate(end.held) if held]
        self._seen = [0] * len(graph.target)  # signals to each event
        for row, has_run in enumerate(end.has_run):
            for event in graph.signals[row] if has_run else ():
                self._seen[event] += 1

    def who_waits(self, worker: int) -> str:
        table, (pe, number) = self._graph.table, self._queues.workers[worker]
        row = self._blocked(self._end.held[worker][0])
        event = self._missing(row)
        assert event is not None
        return (
            f"PE {pe} worker {number} holds {table.describe(row)}, which waits for "
            f"{table.describe_event(event)}: seen {self._seen[event]}, wanted {self._graph.target[event]}"
        )

    def cycle(self) -> list[Wait]:
        """The cycle that the first stuck worker's task leads to; empty if that waits for what nobody makes."""
        graph = self._graph
        self._makers = graph.makers()
        self._pick_of = {row: pick for held in self._end.held for pick in held for row in range(*pick)}
        self._queue_of = {
            row: queue
            for queue, heads in enumerate(self._queues.rows)
            for head in heads
            for row in range(head, head + graph.chain[head])
        }
        path: dict[int, Wait] = {}  # in the order of the steps
        following: int | None = self._blocked(self._end.held[self.stuck[0]][0])
        while following is not None and following not in path:
            row = following
            why, following = self._held_up(row)
            task_id = int(graph.table.tasks["task_id"][row])
            path[row] = Wait(graph.pe[row], task_id, KINDS[graph.kind[row]], why)
        return [] if following is None else list(path.values())[list(path).index(following) :]

    def _held_up(self, row: int) -> tuple[str, int | None]:
        """What holds a task up, and the row to blame."""
        if row not in self._pick_of:
            takers = [worker for worker in self.stuck if self._queue_of[row] in self._queues.paths[worker]]
            pe, number = self._queues.workers[takers[0]]
            who = f"worker {number}" if len(takers) == 1 else f"all {len(takers)} workers of PE {pe}"
            holds = "holds" if len(takers) == 1 else "hold tasks that wait, such as"
            return f"is not taken: {who} {holds}", self._blocked(self._end.held[takers[0]][0])
        event = self._missing(row)
        if event is None:
            return "is in one chain with", self._blocked(self._pick_of[row])
        maker = next((maker for maker in self._makers[event] if not self._end.has_run[maker]), None)
        return f"waits for {self._graph.table.describe_event(event)}, to be signalled by", maker

    def _missing(self, row: int) -> int | None:
        """The first event that a task waits for."""
        return next((event for event in self._graph.inputs[row] if self._seen[event] < self._graph.target[event]), None)

    def _blocked(self, pick: tuple[int, int]) -> int:
        """The task of a pick that waits."""
        return next(row for row in range(*pick) if self._missing(row) is not None)


def _check_push(table: TaskTable, orders: Sequence[Sequence[int]]) -> None:
    """`push` queues a pick when it is ready, which cannot deadlock unless the tasks wait in a circle. Two exceptions:

    Chains are queued with all that wait for the plan alone: each must come after what it waits for, so that of the
    chains that wait, the first one never does. Combines are queued one after the other: nothing may wait for one.
    """
    graph = Graph(table)
    for pe, ids in enumerate(orders):
        _check_complete(table, pe, [ids], "order", lambda _, rank: f"rank {rank}")
    rows = [_rows(table, pe, ids) for pe, ids in enumerate(orders)]
    heads = [row for of_pe in rows for row in of_pe]
    alone = Queues([[row] for row in heads], [(i,) for i in range(len(heads))], [(graph.pe[row], 0) for row in heads])
    if (end := play(graph, alone)).is_stuck:
        raise _deadlock(graph, alone, end)

    makers = graph.makers()
    planned = ("up", "expert", "down") if table.tiling.down == "rows" else ("up", "expert")
    for of_pe in rows:
        queued: set[int] = set()
        for head in of_pe:
            kind = KINDS[graph.kind[head]]
            if kind == "combine" and graph.signals[head]:
                raise ScheduleError(f"{table.describe(head)}: signals others (in a push queue nothing may wait for it)")
            if kind not in planned:
                continue
            for row in range(head, head + graph.chain[head]):
                for event in graph.inputs[row]:
                    behind = [maker for maker in makers[event] if maker not in queued]
                    if event != graph.planned[row] and graph.target[event] > 0 and behind:
                        raise ScheduleError(
                            f"{table.describe(row)}: waits in the push queue for {table.describe_event(event)}, "
                            f"signalled by {table.describe(behind[0])}, which does not come before it"
                        )
                queued.add(row)
