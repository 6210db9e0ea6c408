"""How a worker gets its next pick: the five queue disciplines, one object for each PE and layer.

A pick is a chain of tasks (mostly of one); it is named by the row of its first task in the task table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import simpy

from flashmoe.policy import QUEUES
from flashmoe.sim.servers import Counter

if TYPE_CHECKING:
    from flashmoe.sim.simpy_engine import Stage
    from flashmoe.sim.simpy_worker import Worker

# The worker's own domain has no more picks. In another one what it holds may be waited for by those who hold what it
# waits for: it has to be done with that first.
ELSEWHERE = -1

Got = Callable[[int | None], None]  # called with the row of a pick, ELSEWHERE, or None: there are no more


class TicketQueue:
    """One counter over the ranks of an order."""

    runs_ahead = True  # a worker may take its next pick while it runs a task
    gives_first = True  # there are tickets that a launch may hand out

    def __init__(self, stage: Stage, order: Sequence[int]) -> None:
        self._order = order
        self._counter = Counter(stage.env)
        self._cost_ps = stage.shared_ticket_ps
        # workers that have the first ticket to come: it is given with the launch, and counters begin after it
        self._first = set(range(stage.pe.num_workers if stage.first_given and self.gives_first else 0))
        self._counter.value = len(self._first)

    def ask(self, worker: Worker, got: Got) -> None:
        """Have the next pick for a worker looked up; the worker waits, or runs another task, until it has it."""
        if worker.index in self._first:
            self._first.remove(worker.index)
            got(self._pick(worker.index))
            return
        self._counter.add(*self._cost_ps).callbacks.append(lambda ticket: got(self._pick(ticket.value)))

    def launch(self, worker: Worker) -> simpy.Event | None:
        """What worker 0 does before anything else, or None."""
        return None

    def completed(self, worker: Worker, events: Sequence[int]) -> simpy.Event | None:
        """What a worker does right after the signals of a task to events of its own PE, or None."""
        return None

    def _pick(self, rank: int) -> int | None:
        return self._order[rank] if rank < len(self._order) else None


class DomainQueue(TicketQueue):
    """A counter for each domain: domain d owns ranks d, d + D, ...; a worker takes its own, then those of others.

    With its own exhausted, a worker first looks at the others' counters, all at once, and takes a ticket from the
    nearest one that has picks left: at the end all workers come by, and tickets of one counter are served one by one.
    """

    def __init__(self, stage: Stage, order: Sequence[int]) -> None:
        super().__init__(stage, order)
        self._env = stage.env
        self._counters = [Counter(stage.env) for _ in range(stage.pe.num_domains)]
        self._near_ps, self._far_ps = stage.near_ticket_ps, stage.shared_ticket_ps
        for worker in self._first:
            self._counters[worker % stage.pe.num_domains].value += 1

    def ask(self, worker: Worker, got: Got) -> None:
        if worker.index in self._first:  # of its own domain: that number is its rank
            self._first.remove(worker.index)
            self._answer(worker, self._pick(worker.index), got)
        elif not worker.is_away:
            self._take(worker, worker.domain, self._near_ps, got)
        elif len(self._counters) == 1:
            got(None)
        else:
            self._env.timeout(sum(self._far_ps)).callbacks.append(lambda _: self._look_round(worker, got))

    def _look_round(self, worker: Worker, got: Got) -> None:
        num_domains = len(self._counters)
        for step in range(1, num_domains):
            domain = (worker.domain + step) % num_domains
            if self._rank(domain, self._counters[domain].value) < len(self._order):
                self._take(worker, domain, self._far_ps, got)
                return
        got(None)

    def _take(self, worker: Worker, domain: int, cost_ps: tuple[int, int], got: Got) -> None:
        self._counters[domain].add(*cost_ps).callbacks.append(
            lambda ticket: self._answer(worker, self._pick(self._rank(domain, ticket.value)), got)
        )

    def _answer(self, worker: Worker, pick: int | None, got: Got) -> None:
        if pick is None:
            worker.is_away = True
            if worker.layer.in_order and worker.is_busy:
                got(ELSEWHERE)
            else:
                self.ask(worker, got)
        else:
            got(pick)

    def _rank(self, domain: int, ticket: int) -> int:
        return domain + len(self._counters) * ticket


class ListQueue(TicketQueue):
    """A list of picks for each worker, no counter: `static` (ranks w, w + W, ...) and `replay`."""

    def __init__(self, stage: Stage, lists: Sequence[Sequence[int]]) -> None:
        super().__init__(stage, ())
        self._picks = [iter(rows) for rows in lists]

    def ask(self, worker: Worker, got: Got) -> None:
        got(next(self._picks[worker.index], None))


class PushQueue(TicketQueue):
    """Slots in a row: who makes a pick ready appends it, a worker takes a ticket and waits for its slot.

    Picks that become ready together take one fetch-and-add on the tail, which the worker waits for; others see
    the slots a signal later.
    Picks that wait for another PE's work have nobody on this PE to append them. They form groups (first all
    that wait for `planned`, then each combine alone), and the worker that has waited longest for its slot
    appends the next group as soon as it is ready, strictly in sequence.
    """

    gives_first = False  # a slot may be filled by whoever makes its pick ready
    runs_ahead = False  # the slot may not be filled yet, and often the running task is the one that will fill it

    def __init__(
        self, stage: Stage, order: Sequence[int], pushed_on_completion: Sequence[int], groups: list[list[int]]
    ) -> None:
        super().__init__(stage, order)
        self._stage, self._events = stage, stage.layer.events
        self._env, self._head, self._tail = stage.env, Counter(stage.env), Counter(stage.env)
        # slot -> its pick, when other workers see it [ps], who appended it
        self._slots: dict[int, tuple[int, int, Worker]] = {}
        self._waiting: dict[int, tuple[Worker, Got]] = {}  # slot -> who waits for it, in the order of waiting
        self._groups, self._next_group = groups, 0
        self._appending_group = False
        self._watching = False  # a bell hangs on an input of the next group
        self._missing: dict[int, int] = {}  # pick -> inputs still to be completed on this PE
        self._unlocks: dict[int, list[int]] = {}  # event -> picks that wait for it
        self._signals: dict[int, int] = {}  # event -> signals made so far, seen or not
        for row in sorted(pushed_on_completion):
            # who opens a layer holds its pick until the layer before is through
            inputs = [e for e in stage.layer.inputs[row] if self._events.target[e] > 0 and e != stage.entry]
            self._missing[row] = len(inputs)
            for event in inputs:
                self._unlocks.setdefault(event, []).append(row)

    def launch(self, worker: Worker) -> simpy.Event | None:
        return self._append(worker, [row for row, missing in self._missing.items() if missing == 0])

    def ask(self, worker: Worker, got: Got) -> None:
        def ticketed(ticket: Any) -> None:
            if ticket.value >= len(self._order):
                got(None)
            else:
                self._settle(worker, ticket.value, got)

        self._head.add(*self._cost_ps).callbacks.append(ticketed)

    def completed(self, worker: Worker, events: Sequence[int]) -> simpy.Event | None:
        ready = []
        for event in events:
            self._signals[event] = self._signals.get(event, 0) + 1
            if self._signals[event] == self._events.target[event]:
                for row in self._unlocks.get(event, ()):
                    self._missing[row] -= 1
                    if self._missing[row] == 0:
                        ready.append(row)
        return self._append(worker, ready)

    def _settle(self, worker: Worker, slot: int, got: Got) -> None:
        """Hand out a slot that is filled; else append the next group, if it is ready, or wait."""
        if slot not in self._slots:
            if not self._appending_group and self._group_is_ready(worker):
                self._append_group(worker, lambda: self._settle(worker, slot, got))
                return
            self._watch()
            self._waiting[slot] = (worker, got)
            worker.waits_for, worker.slot = "slot", slot
            return
        self._offer()  # this worker may have been woken for a group, and its own slot came first
        row, seen_ps, writer = self._slots[slot]
        if writer is not worker and seen_ps > self._env.now:
            self._env.timeout(seen_ps - int(self._env.now)).callbacks.append(lambda _: got(row))
        else:
            got(row)

    def _append(self, worker: Worker, rows: list[int]) -> simpy.Event | None:
        if not rows:
            return None

        def publish(first: Any) -> None:
            seen_ps = int(self._env.now) + self._stage.pe.far_ps()
            for slot, row in enumerate(rows, start=first.value):
                self._slots[slot] = (row, seen_ps, worker)
                self._wake(slot)

        service_ps, latency_ps = self._cost_ps
        appended = self._tail.add(service_ps, latency_ps, amount=len(rows))
        appended.callbacks.append(publish)
        return appended

    def _append_group(self, worker: Worker, then: Callable[[], None]) -> None:
        def done(_: Any) -> None:
            self._appending_group = False
            self._next_group += 1
            then()

        self._appending_group = True
        appended = self._append(worker, self._groups[self._next_group])
        if appended is None:
            done(None)
        else:
            appended.callbacks.append(done)

    def _wake(self, slot: int) -> None:
        """Let the worker that waits for a slot, if there is one, look again."""
        if slot in self._waiting:
            worker, got = self._waiting.pop(slot)
            self._env.timeout(0).callbacks.append(lambda _: self._settle(worker, slot, got))

    def _group_is_ready(self, worker: Worker | None) -> bool:
        """Whether a worker sees the inputs of the next group; with None, whether everybody does."""
        return self._next_group < len(self._groups) and self._unseen_input(worker) is None

    def _unseen_input(self, worker: Worker | None) -> int | None:
        if self._next_group == 0:
            inputs = [self._stage.planned]  # a chain waits for each of its other inputs itself
        else:
            inputs = self._stage.layer.inputs[self._groups[self._next_group][0]]
        return next((event for event in inputs if not self._events.is_seen(event, worker)), None)

    def _watch(self) -> None:
        """Hang a bell on the first input of the next group that not everybody sees."""
        if self._watching or self._appending_group or self._next_group >= len(self._groups):
            return
        if (event := self._unseen_input(None)) is not None:
            self._events.call_when_landed(event, self._ring)
            self._watching = True

    def _ring(self) -> None:
        self._watching = False
        self._offer()

    def _offer(self) -> None:
        """Wake the worker that has waited longest if the next group is ready; else hang the bell again."""
        if not self._waiting or self._appending_group:
            return
        if self._group_is_ready(None):
            self._wake(next(iter(self._waiting)))
        else:
            self._watch()


def make_queue(
    stage: Stage, queue: str, order: Sequence[int], lists: Sequence[Sequence[int]] | None, by_rows: bool
) -> TicketQueue:
    """The queue of one PE in one layer.

    order: rows of all picks by rank. lists: rows for each worker, `replay` only. by_rows: tiling of `down`.
    Raises: ValueError naming the queue and the known ones, or the wrong number of lists.
    """
    num_workers = stage.pe.num_workers
    if queue == "ticket":
        return TicketQueue(stage, order)
    if queue == "domain":
        return DomainQueue(stage, order)
    if queue == "static":
        return ListQueue(stage, [order[worker::num_workers] for worker in range(num_workers)])
    if queue == "replay":
        if lists is None or len(lists) != num_workers:
            given = "none" if lists is None else str(len(lists))
            raise ValueError(f"replay on PE {stage.pe.index} has {given} lists (must be one a worker: {num_workers})")
        return ListQueue(stage, lists)
    if queue == "push":
        planned_kinds = ("up", "expert", "down") if by_rows else ("up", "expert")
        after_plan = [row for row in order if stage.layer.kind_name(row) in planned_kinds]
        combines = sorted(row for row in order if stage.layer.kind_name(row) == "combine")
        grouped = {*after_plan, *combines}
        on_completion = [row for row in order if row not in grouped]
        return PushQueue(stage, order, on_completion, [after_plan, *([row] for row in combines)])
    raise ValueError(f"unknown queue {queue!r} (queues: {', '.join(QUEUES)})")
