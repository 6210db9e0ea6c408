"""What to say when nothing can happen any more and tasks have not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashmoe.tasks import TaskTable

NAMED = 8  # waiting workers, or tasks, that a message spells out


class DeadlockError(RuntimeError):
    """Nothing can happen any more, and tasks have not run. The message names who waits for what."""


class Input(NamedTuple):
    """What a task that somebody holds waits for."""

    row: int
    event: int
    seen: int
    wanted: int


class Stuck(NamedTuple):
    """A worker that would wait for ever: for a slot of the push queue, or for inputs of what it holds."""

    pe: int
    worker: int
    layer: int
    slot: int | None
    inputs: list[Input]


def deadlock_message(
    tables: Sequence[TaskTable],
    now_ps: int,
    *,
    missing: int,
    num_tasks: int,
    stuck: Sequence[Stuck],
    num_stuck: int,
    not_taken: Sequence[tuple[int, int]],
) -> str:
    """Several lines. not_taken: (layer, row) of tasks that have not run, named when nobody is stuck."""
    lines = [f"deadlock at {now_ps} ps: {missing} of {num_tasks} tasks have not run"]
    lines += [_who_waits(tables, worker) for worker in stuck[:NAMED]]
    if num_stuck > NAMED:
        lines.append(f"and {num_stuck - NAMED} more workers")
    if num_stuck == 0:
        lines += [f"nobody took {tables[layer].describe(row)}" for layer, row in not_taken[:NAMED]]
    return "\n  ".join(lines)


def _who_waits(tables: Sequence[TaskTable], stuck: Stuck) -> str:
    who = f"PE {stuck.pe} worker {stuck.worker}"
    if stuck.slot is not None:
        return f"{who} waits for slot {stuck.slot} to be filled"
    table, holds = tables[stuck.layer], []
    for row, event, seen, wanted in stuck.inputs:
        if event < len(table.event_pe):
            what = table.describe_event(event)
        else:
            what = f"the end of layer {stuck.layer - 1} on PE {stuck.pe}"
        holds.append(f"{table.describe(row)}, which waits for {what}: seen {seen}, wanted {wanted}")
    return f"{who} holds {'; '.join(holds) or 'nothing and waits for the plan'}"
