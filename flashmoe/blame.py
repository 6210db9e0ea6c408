"""Whose fault is the error of a simulated makespan: how long tasks take, or who runs what in which order?"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flashmoe.tasks import TaskTable, ready_times, segment_owner
from flashmoe.trace import KINDS, Trace

__all__ = ["Blame", "Replayable", "blame"]


@dataclass(frozen=True)
class Blame:
    """The error of a simulated makespan against the measured one, split [µs].

    durations: with the simulated durations in place of the measured ones. schedule: with the simulated schedule in
    place of the measured one. Both are the mean of being replaced first and second, and add up to error.
    by_kind: what the durations of one kind alone change in the measured run.
    """

    error_us: float
    durations_us: float
    schedule_us: float
    by_kind: dict[str, float]


class Replayable:
    """A trace as a schedule and a duration for each task, to be put together with those of another trace.

    A worker runs its tasks in the order of their ends. A task can begin when the one before has ended and its inputs
    have been made; what passes from then to its end is its duration, so that signals, tickets and whatever else holds
    it up are in it. Schedule and durations of one trace give back its ends to the picosecond.
    """

    def __init__(self, table: TaskTable, trace: Trace) -> None:
        """Raises: ValueError unless the trace has each task of the table once, in one layer."""
        records = trace.records
        rows = table.rows(records)
        if len(records) != len(table) or not np.array_equal(np.sort(rows), np.arange(len(table))):
            raise ValueError(f"trace of {len(records)} tasks (must be the {len(table)} of the table, each once)")
        self.table = table
        by_row = records[np.argsort(rows)]
        self.end_ps = by_row["end_ps"].astype(np.int64)
        order = np.lexsort((by_row["start_ps"], by_row["end_ps"], by_row["worker"], by_row["pe"]))
        same = np.diff(by_row["pe"][order].astype(np.int64) << 16 | by_row["worker"][order]) == 0
        self.before = np.full(len(order), -1, np.int64)  # row -> row of the task before it on its worker
        self.before[order[1:][same]] = order[:-1][same]
        free_ps = np.where(self.before >= 0, self.end_ps[self.before], 0)
        self.duration_ps = self.end_ps - np.maximum(free_ps, ready_times(table, self.end_ps))

    def makespan_ps(self, duration_ps: NDArray[np.int64]) -> int:
        """The makespan with this schedule and these durations, (num_tasks,) by row of the table.

        Raises: ValueError when the schedule contradicts the task graph.
        """
        table = self.table
        signal_of = _segments(table.signal_event, table.signal_ptr)
        waiters: list[list[int]] = [[] for _ in table.event_pe]
        missing = (self.before >= 0).astype(int)
        target = table.event_target.tolist()
        for row, event in zip(segment_owner(table.wait_ptr).tolist(), table.wait_event.tolist(), strict=True):
            if target[event] > 0:
                waiters[event].append(row)
                missing[row] += 1
        after = np.full(len(table), -1, np.int64)
        after[self.before[self.before >= 0]] = np.flatnonzero(self.before >= 0)
        begin_ps, todo, next_row = [0] * len(table), missing.tolist(), after.tolist()
        durations, event_ps = duration_ps.tolist(), [0] * len(target)
        known, done, last_ps = deque(row for row, count in enumerate(todo) if count == 0), 0, 0

        def release(row: int, time_ps: int) -> None:
            begin_ps[row] = max(begin_ps[row], time_ps)
            todo[row] -= 1
            if todo[row] == 0:
                known.append(row)

        while known:
            row = known.popleft()
            done += 1
            end_ps = begin_ps[row] + durations[row]
            last_ps = max(last_ps, end_ps)
            for event in signal_of[row]:
                event_ps[event] = max(event_ps[event], end_ps)
                target[event] -= 1
                if target[event] == 0:
                    for waiter in waiters[event]:
                        release(waiter, event_ps[event])
            if next_row[row] >= 0:
                release(next_row[row], end_ps)
        if done < len(table):
            raise ValueError(f"{len(table) - done} tasks wait for each other (schedule and task graph contradict)")
        return last_ps


def blame(table: TaskTable, simulated: Trace, measured: Trace) -> Blame:
    """Replay each trace's schedule with the other one's durations. Raises: ValueError, as `Replayable`."""
    here, there = Replayable(table, simulated), Replayable(table, measured)
    both, neither = here.makespan_ps(here.duration_ps), there.makespan_ps(there.duration_ps)
    durations_alone = there.makespan_ps(here.duration_ps) - neither
    schedule_alone = here.makespan_ps(there.duration_ps) - neither
    durations_ps = (durations_alone + both - neither - schedule_alone) / 2
    schedule_ps = (schedule_alone + both - neither - durations_alone) / 2
    kinds = table.tasks["kind"]
    by_kind = {}
    for kind in np.unique(kinds).tolist():
        mixed = np.where(kinds == kind, here.duration_ps, there.duration_ps)
        by_kind[KINDS[kind]] = (there.makespan_ps(mixed) - neither) / 1e6
    return Blame((both - neither) / 1e6, durations_ps / 1e6, schedule_ps / 1e6, by_kind)


def _segments(values: NDArray[np.generic], ptr: NDArray[np.generic]) -> list[list[int]]:
    flat, bounds = values.tolist(), ptr.tolist()
    return [flat[begin:end] for begin, end in pairwise(bounds)]
