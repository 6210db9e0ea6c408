"""Schedules: per PE and worker the ids to run, and the proof that they can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmoe.policy import Policy
from flashmoe.tasks import TaskTable
from flashmoe.trace import KINDS

Schedule = list[list[list[int]]]  # [pe][worker][turn]: first tasks of picks


class ScheduleError(ValueError):
    """A schedule that is incomplete, runs a task twice, or deadlocks."""


def to_schedule(policy: Policy, table: TaskTable, num_workers: int) -> Schedule:
    """The lists that a replay needs. A policy written in Python deals its order out: worker w gets w, w + W, ...

    Raises ScheduleError unless the schedule is complete and free of deadlock.
    """
    if policy.replay is not None:
        if policy.replay_digests is not None and list(policy.replay_digests) != table.plan_digests:
            wrong = [
                pe
                for pe, pair in enumerate(zip(policy.replay_digests, table.plan_digests, strict=False))
                if pair[0] != pair[1]
            ]
            raise ScheduleError(
                f"policy {policy.name!r} was made for another routing: tokens per expert differ on "
                f"PE {', '.join(map(str, wrong)) or f'count {table.num_pes}'}"
            )
        heads = [set(_heads(table, pe)) for pe in range(table.num_pes)]
        known = [_ids(table, pe) for pe in range(table.num_pes)]
        # a trace lists every task of a chain, a worker takes the chain by its first
        schedule = [
            [[task for task in worker if task in heads[pe] or task not in known[pe]] for worker in workers]
            for pe, workers in enumerate(policy.replay)
        ]
    else:
        schedule = [[ids[w::num_workers].tolist() for w in range(num_workers)] for ids in policy.picks(table)]
    check_schedule(table, schedule, num_workers, policy.look_ahead)
    return schedule


def _ids(table: TaskTable, pe: int) -> range:
    start, end = int(table.first[pe]), int(table.first[pe + 1])
    return (
        range(int(table.tasks["task_id"][start]), int(table.tasks["task_id"][end - 1]) + 1) if end > start else range(0)
    )


def _heads(table: TaskTable, pe: int) -> list[int]:
    mine = table.tasks[int(table.first[pe]) : int(table.first[pe + 1])]
    return mine["task_id"][mine["chain"] > 0].tolist()  # type: ignore[no-any-return]


def check_schedule(
    table: TaskTable, schedule: Sequence[Sequence[Sequence[int]]], num_workers: int, look_ahead: int = 0
) -> None:
    """Raises ScheduleError, with a counterexample, unless every pick is run exactly once and none waits for ever.

    A worker runs its list in order; past a pick that waits for its own PE it may take `look_ahead` more.
    """
    if len(schedule) != table.num_pes:
        raise ScheduleError(f"schedule for {len(schedule)} PEs (the layer has {table.num_pes})")
    for pe, workers in enumerate(schedule):
        if len(workers) != num_workers:
            raise ScheduleError(f"PE {pe}: lists for {len(workers)} workers (there are {num_workers})")
        _check_complete(table, pe, workers)
    _check_progress(table, schedule, look_ahead)


def _check_complete(table: TaskTable, pe: int, workers: Sequence[Sequence[int]]) -> None:
    wanted = set(_heads(table, pe))
    ids = _ids(table, pe)
    seen: dict[int, tuple[int, int]] = {}
    for worker, tasks in enumerate(workers):
        for turn, task in enumerate(tasks):
            if task not in wanted:
                what = (
                    "inside a chain, taken with its first task"
                    if task in ids
                    else f"not a task of this PE ({ids.start}..{ids.stop - 1})"
                )
                raise ScheduleError(f"PE {pe} worker {worker} turn {turn}: task {task} is {what}")
            if task in seen:
                raise ScheduleError(
                    f"{table.describe(table.row(pe, task))}: listed twice, for worker {seen[task][0]} "
                    f"turn {seen[task][1]} and worker {worker} turn {turn} (wanted once)"
                )
            seen[task] = (worker, turn)
    missing = wanted - seen.keys()
    if missing:
        raise ScheduleError(
            f"{table.describe(table.row(pe, min(missing)))}: in no worker's list "
            f"({len(missing)} of {len(wanted)} picks missing)"
        )


def _check_progress(table: TaskTable, schedule: Sequence[Sequence[Sequence[int]]], look_ahead: int) -> None:
    """Plays the schedule without time: any order of ready picks gets equally far, since running one never unreadies
    another."""
    own_pe_kinds = {KINDS.index(kind) for kind in ("route", "dispatch", "down")}
    count = np.zeros(len(table.event_target), np.int64)
    sleepers: dict[int, list[tuple[int, int]]] = {}  # event -> workers that looked at it in vain

    def first_missing(row: int) -> int | None:
        for event in table.wait_event[int(table.wait_ptr[row]) : int(table.wait_ptr[row + 1])]:
            if count[event] < table.event_target[event]:
                return int(event)
        return None

    def run_chain(row: int, end: int) -> tuple[int, int | None]:
        """Runs rows up to `end`; the row that it got to, and the event that stops it there."""
        while row < end:
            event = first_missing(row)
            if event is not None:
                return row, event
            for signal in table.signal_event[int(table.signal_ptr[row]) : int(table.signal_ptr[row + 1])]:
                count[signal] += 1
                if count[signal] == table.event_target[signal]:
                    awake.extend(sleepers.pop(int(signal), []))
            row += 1
        return row, None

    held: dict[tuple[int, int], list[int]] = {}  # rows that a worker has in hand, oldest first
    chain_end: dict[tuple[int, int], int] = {}  # of the chain that a worker is in: it can do nothing else
    turn = {(pe, w): 0 for pe, workers in enumerate(schedule) for w in range(len(workers))}
    awake = list(turn)
    while awake:
        who = awake.pop()
        pe, worker = who
        hand, tasks = held.setdefault(who, []), schedule[pe][worker]
        while True:
            blocked = [first_missing(row) for row in (hand[:1] if who in chain_end else hand)]
            ready = next((i for i, event in enumerate(blocked) if event is None), None)
            if ready is not None:
                row = hand.pop(ready)
                end = chain_end.pop(who, row + int(table.tasks["chain"][row]))
                row, event = run_chain(row, end)
                if event is not None:
                    hand.insert(0, row)
                    chain_end[who] = end
                continue
            own_work = not hand or int(table.tasks["kind"][hand[0]]) in own_pe_kinds
            may_take = who not in chain_end and own_work and len(hand) <= (look_ahead if hand else 0)
            if may_take and turn[who] < len(tasks):
                hand.append(table.row(pe, tasks[turn[who]]))
                turn[who] += 1
                continue
            for event in {event for event in blocked if event is not None}:
                sleepers.setdefault(event, []).append(who)
            break
    stuck = {who: hand for who, hand in held.items() if hand}
    if stuck:
        lines = []
        for (pe, worker), hand in sorted(stuck.items())[:8]:
            event = first_missing(hand[0])
            assert event is not None
            lines.append(
                f"PE {pe} worker {worker} holds {table.describe(hand[0])}, which waits for "
                f"{table.describe_event(event)}: seen {count[event]}, wanted {table.event_target[event]}"
            )
        raise ScheduleError(f"deadlock: {len(stuck)} workers would wait for ever\n" + "\n".join(lines))
