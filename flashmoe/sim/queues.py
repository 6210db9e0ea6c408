"""How a worker gets its next pick: the five queue disciplines, one object for each PE.

A pick is a chain of tasks (mostly of one); it is named by the row of its first task in the task table.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import simpy

from flashmoe.sim.servers import Counter

if TYPE_CHECKING:
    from flashmoe.sim.simpy_engine import Pe, Worker

Steps = Generator[simpy.Event, Any, None]
Taking = Generator[simpy.Event, Any, int | None]  # returns the row of a pick, or None: there are no more

QUEUES = ("push", "ticket", "domain", "static", "replay")


class TicketQueue:
    """One counter over the ranks of an order."""

    runs_ahead = True  # a worker may take its next pick while it runs a task

    def __init__(self, pe: Pe, order: Sequence[int]) -> None:
        self._order = order
        self._counter = Counter(pe.env)
        self._cost_ps = pe.shared_ticket_ps

    def launch(self, worker: Worker) -> Steps:
        """What worker 0 does before anything else."""
        yield from ()

    def take(self, worker: Worker) -> Taking:
        """Get the next pick for a worker, which is busy with it until it has it."""
        rank: int = yield self._counter.add(*self._cost_ps)
        return self._order[rank] if rank < len(self._order) else None

    def completed(self, worker: Worker, events: Sequence[int]) -> Steps:
        """What a worker does right after the signals of a task to events of its own PE."""
        yield from ()


class DomainQueue(TicketQueue):
    """A counter for each domain: domain d owns ranks d, d + D, ...; its own first, then the next one's."""

    def __init__(self, pe: Pe, order: Sequence[int]) -> None:
        super().__init__(pe, order)
        self._counters = [Counter(pe.env) for _ in range(pe.num_domains)]
        self._near_ps, self._far_ps = pe.near_ticket_ps, pe.shared_ticket_ps
        self._exhausted = [0] * pe.num_workers  # domains that this worker has found empty, its own first

    def take(self, worker: Worker) -> Taking:
        num_domains = len(self._counters)
        while (steps := self._exhausted[worker.index]) < num_domains:
            domain = (worker.domain + steps) % num_domains
            ticket: int = yield self._counters[domain].add(*(self._far_ps if steps else self._near_ps))
            rank = domain + num_domains * ticket
            if rank < len(self._order):
                return self._order[rank]
            self._exhausted[worker.index] += 1
        return None


class ListQueue(TicketQueue):
    """A list of picks for each worker, no counter: `static` (ranks w, w + W, ...) and `replay`."""

    def __init__(self, pe: Pe, lists: Sequence[Sequence[int]]) -> None:
        super().__init__(pe, ())
        self._picks = [iter(rows) for rows in lists]

    def take(self, worker: Worker) -> Taking:
        yield from ()
        return next(self._picks[worker.index], None)


class PushQueue(TicketQueue):
    """Slots in a row: who makes a pick ready appends it, a worker takes a ticket and waits for its slot.

    Picks that become ready together take one fetch-and-add on the tail, which the worker waits for; others see
    the slots a signal later.
    Picks that wait for another PE's work have nobody on this PE to append them. They form groups (first all
    that wait for `planned`, then each combine alone), and the worker that has waited longest for its slot
    appends the next group as soon as it is ready, strictly in sequence.
    """

    runs_ahead = False  # the slot may not be filled yet, and often the running task is the one that will fill it

    def __init__(
        self, pe: Pe, order: Sequence[int], pushed_on_completion: Sequence[int], groups: list[list[int]]
    ) -> None:
        super().__init__(pe, order)
        self._pe = pe
        self._head, self._tail = Counter(pe.env), Counter(pe.env)
        # slot -> its pick, when other workers see it [ps], who appended it
        self._slots: dict[int, tuple[int, int, Worker]] = {}
        self._waiting: dict[int, simpy.Event] = {}  # slot -> wake-up of its worker, in the order of waiting
        self._groups, self._next_group = groups, 0
        self._appending_group = False
        self._watching = False  # a bell hangs on an input of the next group
        self._missing: dict[int, int] = {}  # pick -> inputs still to be completed on this PE
        self._unlocks: dict[int, list[int]] = {}  # event -> picks that wait for it
        self._signals: dict[int, int] = {}  # event -> signals made so far, seen or not
        for row in sorted(pushed_on_completion):
            inputs = [event for event in pe.layer.inputs[row] if pe.layer.target[event] > 0]
            self._missing[row] = len(inputs)
            for event in inputs:
                self._unlocks.setdefault(event, []).append(row)

    def launch(self, worker: Worker) -> Steps:
        yield from self._append(worker, [row for row, missing in self._missing.items() if missing == 0])

    def take(self, worker: Worker) -> Taking:
        slot: int = yield self._head.add(*self._cost_ps)
        if slot >= len(self._order):
            return None
        while slot not in self._slots:
            if not self._appending_group and self._group_is_ready(worker):
                yield from self._append_group(worker)
                continue
            self._watch()
            wake = self._waiting[slot] = worker.sleep(slot)
            yield from worker.wait(wake)
        self._offer()  # this worker may have been woken for a group, and its own slot came first
        row, seen_ps, writer = self._slots[slot]
        if writer is not worker and seen_ps > self._pe.env.now:
            yield self._pe.env.timeout(seen_ps - self._pe.env.now)
        return row

    def completed(self, worker: Worker, events: Sequence[int]) -> Steps:
        ready = []
        for event in events:
            self._signals[event] = self._signals.get(event, 0) + 1
            if self._signals[event] == self._pe.layer.target[event]:
                for row in self._unlocks.get(event, ()):
                    self._missing[row] -= 1
                    if self._missing[row] == 0:
                        ready.append(row)
        yield from self._append(worker, ready)

    def _append(self, worker: Worker, rows: list[int]) -> Steps:
        if not rows:
            return
        first: int = yield self._tail.add(*self._cost_ps, len(rows))
        seen_ps = int(self._pe.env.now) + self._pe.signal_ps()
        for slot, row in enumerate(rows, start=first):
            self._slots[slot] = (row, seen_ps, worker)
            if wake := self._waiting.pop(slot, None):
                wake.succeed()

    def _append_group(self, worker: Worker) -> Steps:
        rows = self._groups[self._next_group]
        self._appending_group = True
        yield from self._append(worker, rows)
        self._appending_group = False
        self._next_group += 1

    def _group_is_ready(self, worker: Worker | None) -> bool:
        """Whether a worker sees the inputs of the next group; with None, whether everybody does."""
        return self._next_group < len(self._groups) and self._unseen_input(worker) is None

    def _unseen_input(self, worker: Worker | None) -> int | None:
        if self._next_group == 0:
            inputs = [self._pe.planned]  # a chain waits for each of its other inputs itself
        else:
            inputs = self._pe.layer.inputs[self._groups[self._next_group][0]]
        sees = worker.sees if worker else self._pe.layer.has_landed
        return next((event for event in inputs if not sees(event)), None)

    def _watch(self) -> None:
        """Hang a bell on the first input of the next group that has not landed."""
        if self._watching or self._appending_group or self._next_group >= len(self._groups):
            return
        if (event := self._unseen_input(None)) is not None:
            bell = self._pe.env.event()
            bell.callbacks.append(self._ring)
            self._pe.layer.wake_on(event, bell)
            self._watching = True

    def _ring(self, _: simpy.Event) -> None:
        self._watching = False
        self._offer()

    def _offer(self) -> None:
        """Wake the worker that has waited longest if the next group is ready; else hang the bell again."""
        if not self._waiting or self._appending_group:
            return
        if self._group_is_ready(None):
            slot = next(iter(self._waiting))
            self._waiting.pop(slot).succeed()
        else:
            self._watch()


def make_queue(
    pe: Pe, queue: str, order: Sequence[int], lists: Sequence[Sequence[int]] | None, by_rows: bool
) -> TicketQueue:
    """The queue of one PE.

    order: rows of all picks by rank. lists: rows for each worker, `replay` only. by_rows: tiling of `down`.
    Raises: ValueError naming the queue and the known ones, or the wrong number of lists.
    """
    if queue == "ticket":
        return TicketQueue(pe, order)
    if queue == "domain":
        return DomainQueue(pe, order)
    if queue == "static":
        return ListQueue(pe, [order[worker :: pe.num_workers] for worker in range(pe.num_workers)])
    if queue == "replay":
        if lists is None or len(lists) != pe.num_workers:
            given = "none" if lists is None else str(len(lists))
            raise ValueError(f"replay on PE {pe.index} has {given} lists (must be one a worker, so {pe.num_workers})")
        return ListQueue(pe, lists)
    if queue == "push":
        planned_kinds = ("up", "expert", "down") if by_rows else ("up", "expert")
        after_plan = [row for row in order if pe.layer.kind_name(row) in planned_kinds]
        combines = sorted(row for row in order if pe.layer.kind_name(row) == "combine")
        grouped = {*after_plan, *combines}
        on_completion = [row for row in order if row not in grouped]
        return PushQueue(pe, order, on_completion, [after_plan, *([row] for row in combines)])
    raise ValueError(f"unknown queue {queue!r} (queues: {', '.join(QUEUES)})")
