"""Schedules: per PE and worker the ids to run, and the proof that they can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmoe.policy import Policy
from flashmoe.tasks import OWN_PE_KINDS, TaskTable
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
        if len(policy.replay) != table.num_pes:
            raise ScheduleError(f"schedule for {len(policy.replay)} PEs (the layer has {table.num_pes})")
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

    A worker runs its list in order; past a pick that waits for its own PE it may take `look_ahead` more. Not so where
    picks are chains: whether a worker looks past a chain or waits inside it is a matter of timing, so their schedules
    must do without.
    """
    if len(schedule) != table.num_pes:
        raise ScheduleError(f"schedule for {len(schedule)} PEs (the layer has {table.num_pes})")
    for pe, workers in enumerate(schedule):
        if len(workers) != num_workers:
            raise ScheduleError(f"PE {pe}: lists for {len(workers)} workers (there are {num_workers})")
        _check_complete(table, pe, workers)
    _check_progress(table, schedule, 0 if (table.tasks["chain"] > 1).any() else look_ahead)


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
    """Plays the schedule without time: every worker as far as it gets, woken by the events that it waits for.

    Whoever goes first, all get equally far: running a task never makes another one unready.
    """
    down = KINDS.index("down")
    kind = table.tasks["kind"]
    count = np.zeros(len(table.event_target), np.int64)
    sleepers: dict[int, list[tuple[int, int]]] = {}  # event -> workers that wait for it
    todo = {
        (pe, worker): iter([row for task in tasks for row in _chain(table, table.row(pe, task))])
        for pe, workers in enumerate(schedule)
        for worker, tasks in enumerate(workers)
    }
    hands: dict[tuple[int, int], list[int]] = {who: [] for who in todo}  # rows that a worker holds, oldest first

    def first_missing(row: int) -> int | None:
        for event in table.wait_event[int(table.wait_ptr[row]) : int(table.wait_ptr[row + 1])]:
            if count[event] < table.event_target[event]:
                return int(event)
        return None

    def waits_for_own_pe(row: int) -> bool:
        planned = table.planned_event[table.tasks["pe"][row]]
        # before the plan the id of a down is only a number
        is_known = kind[row] != down or count[planned] >= table.event_target[planned]
        return kind[row] in OWN_PE_KINDS and bool(is_known)

    awake = list(todo)
    while awake:
        who = awake.pop()
        hand = hands[who]
        while True:
            blocked = [first_missing(row) for row in hand]
            if None in blocked:
                row = hand.pop(blocked.index(None))
                for signal in table.signal_event[int(table.signal_ptr[row]) : int(table.signal_ptr[row + 1])]:
                    count[signal] += 1
                    if count[signal] == table.event_target[signal]:
                        awake.extend(sleepers.pop(int(signal), []))
                continue
            may_take = not hand or (len(hand) <= look_ahead and waits_for_own_pe(hand[0]))
            if may_take and (following := next(todo[who], None)) is not None:
                hand.append(following)
                continue
            events = {event for event in blocked if event is not None}
            if hand and kind[hand[0]] == down:
                events.add(int(table.planned_event[who[0]]))  # which may let it look further
            for event in events:
                sleepers.setdefault(event, []).append(who)
            break
    stuck = {who: hand[0] for who, hand in hands.items() if hand}
    if stuck:
        lines = []
        for (pe, worker), row in sorted(stuck.items())[:8]:
            missing = first_missing(row)
            assert missing is not None
            lines.append(
                f"PE {pe} worker {worker} holds {table.describe(row)}, which waits for "
                f"{table.describe_event(missing)}: seen {count[missing]}, wanted {table.event_target[missing]}"
            )
        raise ScheduleError(f"deadlock: {len(stuck)} workers would wait for ever\n" + "\n".join(lines))


def _chain(table: TaskTable, head: int) -> range:
    return range(head, head + int(table.tasks["chain"][head]))
