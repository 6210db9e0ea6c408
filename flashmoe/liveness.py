"""Whether workers get through their queues, whatever the timing.

The rules are the engines' and the kernel's: a worker runs the oldest pick in its hand that is ready (a chain beside
others only with the inputs of all its tasks). With nothing ready it takes the next one of its queue, if its hand is
empty, or if it holds at most `look_ahead` picks and the oldest is known to wait for work of its own PE. Timing is
everything else: how long tasks and tickets take, and when which worker sees a signal. Only its own are seen at once.

A pick that is fetched while a task still runs is the same as that task's signals coming late. Signals add to counters
and picks are never given back, which gives

1. Without look-ahead all timings get equally far. Say one timing runs t and another ends without it, t being the first
   such task: its inputs are there in the end, so nobody has taken it, and so all who might take it hold picks from
   before it that wait. Fewer tasks had run when the first timing took t: there these picks were held as well, and no
   worker was left for t. Workers who take from a shared counter, or come by to steal, are interchangeable. So one
   run (`play`) decides.
2. If that run gets through, with each chain taken only when all its inputs are there, so does every timing with
   look-ahead: by the same argument, since whoever is stuck holds at least one pick.
3. Lists with a look-ahead of 1 and without chains: all timings get equally far, too. A worker's hand is empty or holds
   what the list has next, so what it may take next depends on what has run alone.
4. Otherwise look-ahead may come too late or hoard picks: with a list d1 c d2, where the combine c needs d2, a worker
   gets to d2 only if it finds d1 not ready. `search` tries all timings of small layers.
5. Workers that run their picks in order and take one more while the oldest waits (`Machine.in_order`) may hoard the one
   that another needs. But where one worker a PE gets through its order, there is an order of all tasks, L, that agrees
   with every PE's. Of those that have not run take the first in L: its inputs are there. Whoever has it holds nothing
   before it, as that would come first in L, too (and holds nothing else at all if it is from another domain). If nobody
   has it, nobody of its domain holds anything, as that would be from before it, so one of them takes it.

Layers in a row: nothing of a layer waits for a later one, and a worker that comes late is a matter of timing. So
layers are checked one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flashmoe.tasks import OWN_PE_KINDS, TaskTable
from flashmoe.trace import KINDS

_DOWN = KINDS.index("down")
# before the plan a task of these kinds is only a number
_PLANNED_KINDS = tuple(KINDS.index(kind) for kind in ("up", "down", "combine", "expert"))


class Graph:
    """A task table as lists, by row: what each task waits for (the plan included) and whom it signals."""

    def __init__(self, table: TaskTable) -> None:
        tasks = table.tasks
        self.table = table
        self.pe: list[int] = tasks["pe"].tolist()
        self.kind: list[int] = tasks["kind"].tolist()
        self.chain: list[int] = tasks["chain"].tolist()
        self.target: list[int] = np.asarray(table.event_target).tolist()
        self.planned: list[int] = np.asarray(table.planned_event)[tasks["pe"]].tolist()
        self.inputs = _split(table.wait_event, table.wait_ptr)
        self.signals = _split(table.signal_event, table.signal_ptr)
        for row in np.flatnonzero(np.isin(tasks["kind"], _PLANNED_KINDS)).tolist():
            if self.planned[row] not in self.inputs[row]:
                self.inputs[row].append(self.planned[row])

    def makers(self) -> list[list[int]]:
        """Of each event the rows that signal it."""
        makers: list[list[int]] = [[] for _ in self.target]
        for row, events in enumerate(self.signals):
            for event in events:
                makers[event].append(row)
        return makers


@dataclass(frozen=True)
class Queues:
    """Who takes picks from where.

    rows: of each queue its picks in order, by the row of their first task. paths: of each worker the queues it takes
    from; the next one when those before are exhausted. workers: (pe, worker) of each path.
    """

    rows: Sequence[Sequence[int]]
    paths: Sequence[tuple[int, ...]]
    workers: Sequence[tuple[int, int]]

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[Sequence[int]]]) -> Queues:
        """lists: [pe][worker] rows."""
        rows = [of_worker for of_pe in lists for of_worker in of_pe]
        workers = [(pe, worker) for pe, of_pe in enumerate(lists) for worker in range(len(of_pe))]
        return cls(rows, [(queue,) for queue in range(len(rows))], workers)

    @classmethod
    def of_counters(cls, orders: Sequence[Sequence[int]], num_workers: int, num_domains: int) -> Queues:
        """A counter for each domain of a PE. orders: [pe] rows by rank, of which domain d owns d, d + D, ..."""
        domains = min(num_domains, num_workers)
        rows = [order[domain::domains] for order in orders for domain in range(domains)]
        workers = [(pe, worker) for pe in range(len(orders)) for worker in range(num_workers)]
        paths = [tuple(pe * domains + (worker + step) % domains for step in range(domains)) for pe, worker in workers]
        return cls(rows, paths, workers)

    @property
    def are_lists(self) -> bool:
        return all(len(path) == 1 for path in self.paths) and len(self.rows) == len(self.paths)


@dataclass(frozen=True)
class End:
    """What is left when nobody can go on: the tasks that have run, and of each worker what it holds.

    held: (row of the next task, row after the last) of each pick in hand, oldest first.
    """

    has_run: Sequence[bool]
    held: Sequence[Sequence[tuple[int, int]]]

    @property
    def is_stuck(self) -> bool:
        return any(self.held)


def play(graph: Graph, queues: Queues, look_ahead: int = 0, *, whole_chains: bool = False) -> End:
    """One timing: everybody goes on as long as possible, and looks ahead only when nobody can go on otherwise.

    whole_chains: a chain is taken up only when the inputs of all its tasks are there.
    """
    return _Play(graph, queues, look_ahead, whole_chains).run()


class _Play:
    def __init__(self, graph: Graph, queues: Queues, look_ahead: int, whole_chains: bool) -> None:
        self._graph, self._queues, self._look_ahead, self._whole_chains = graph, queues, look_ahead, whole_chains
        self._left = list(graph.target)  # signals that an event still needs
        self._missing = [0] * len(graph.inputs)  # inputs that a task still needs
        self._waiting: list[list[int]] = [[] for _ in graph.target]
        for row, events in enumerate(graph.inputs):
            for event in events:
                if self._left[event] > 0:
                    self._missing[row] += 1
                    self._waiting[event].append(row)
        self._turns = [iter(rows) for rows in queues.rows]
        self._hands: list[list[list[int]]] = [[] for _ in queues.paths]
        self._holder: dict[int, int] = {}  # row -> worker
        self._has_run = [False] * len(graph.inputs)
        self._awake = list(range(len(queues.paths)))
        self._may_look: list[int] = []

    def run(self) -> End:
        while True:
            if self._awake:
                self._go_on(self._awake.pop())
            elif self._may_look:
                worker = self._may_look.pop()
                if self._may_take(worker) and self._take(worker):
                    self._awake.append(worker)
            else:
                return End(self._has_run, [[(row, end) for row, end in hand] for hand in self._hands])

    def _go_on(self, worker: int) -> None:
        hand = self._hands[worker]
        while True:
            ready = next((pick for pick in hand if self._is_ready(pick, len(hand) == 1)), None)
            if ready is not None:
                self._run_task(ready[0])
                ready[0] += 1
                if ready[0] == ready[1]:
                    hand.remove(ready)
            elif hand:
                self._may_look.append(worker)
                return
            elif not self._take(worker):
                return

    def _is_ready(self, pick: list[int], is_alone: bool) -> bool:
        if is_alone and not self._whole_chains:
            return self._missing[pick[0]] == 0
        return not any(self._missing[row] for row in range(*pick))

    def _may_take(self, worker: int) -> bool:
        hand = self._hands[worker]
        if not 0 < len(hand) <= self._look_ahead:
            return False
        row = hand[0][0]
        is_known = self._graph.kind[row] != _DOWN or self._left[self._graph.planned[row]] <= 0
        is_inside_chain = self._graph.chain[row] == 0  # there a worker looks at nothing else
        return self._graph.kind[row] in OWN_PE_KINDS and is_known and not is_inside_chain

    def _take(self, worker: int) -> bool:
        for queue in self._queues.paths[worker]:
            row = next(self._turns[queue], None)
            if row is not None:
                end = row + self._graph.chain[row]
                self._hands[worker].append([row, end])
                for held in range(row, end):
                    self._holder[held] = worker
                return True
        return False

    def _run_task(self, row: int) -> None:
        self._has_run[row] = True
        for event in self._graph.signals[row]:
            self._left[event] -= 1
            if self._left[event] == 0:
                for waiter in self._waiting[event]:
                    self._missing[waiter] -= 1
                    holder = self._holder.get(waiter)
                    if holder is not None:
                        self._awake.append(holder)


@dataclass(frozen=True, slots=True)
class _Hand:
    """A worker in a search. held: picks, oldest first. inside: the next task of a chain that it has begun, or -1.

    ran, seen: bits of tasks that it ran, of events that it must have seen by now.
    """

    held: tuple[int, ...] = ()
    inside: int = -1
    ran: int = 0
    seen: int = 0


_State = tuple[tuple[int, ...], tuple[_Hand, ...]]  # picks taken from each queue; workers


class Undecided(Exception):
    """There are more timings than the search may try."""


def search(graph: Graph, queues: Queues, look_ahead: int, budget: int = 1_000_000) -> End:
    """Tries all timings: the end of one in which somebody is stuck, or else of any.

    budget: workers and events written down, over all states; the default takes about a second. Raises: Undecided.
    """
    return _Search(graph, queues, look_ahead).run(budget)


class _Search:
    """Depth first over what workers may do next. What a worker has seen is decided as late as possible."""

    def __init__(self, graph: Graph, queues: Queues, look_ahead: int) -> None:
        self._graph, self._queues, self._look_ahead = graph, queues, look_ahead
        self._makers = [sum({1 << row for row in rows}) for rows in graph.makers()]
        self._needs = [sum({1 << event for event in events if graph.target[event] > 0}) for events in graph.inputs]

    def run(self, budget: int) -> End:
        start: _State = ((0,) * len(self._queues.rows), (_Hand(),) * len(self._queues.paths))
        todo, known = [start], {start}
        while todo:
            state = todo.pop()
            following = list(self._following(state))
            budget -= (1 + len(following)) * len(state[1]) + len(self._makers)
            if budget < 0:
                raise Undecided
            if not following:
                end = self._end(state)
                if end.is_stuck:
                    return end
            for after in following:
                if after not in known:
                    known.add(after)
                    todo.append(after)
        return end

    def _end(self, state: _State) -> End:
        done = self._done(state)
        chain = self._graph.chain
        held = [
            [(hand.inside, self._chain_end(hand.inside))] * (hand.inside >= 0)
            + [(row, row + chain[row]) for row in hand.held]
            for hand in state[1]
        ]
        return End([bool(done >> row & 1) for row in range(len(chain))], held)

    def _chain_end(self, row: int) -> int:
        head = row
        while self._graph.chain[head] == 0:
            head -= 1
        return head + self._graph.chain[head]

    @staticmethod
    def _done(state: _State) -> int:
        done = 0
        for hand in state[1]:
            done |= hand.ran
        return done

    def _complete(self, done: int) -> int:
        """Bits of complete events."""
        complete = 0
        for event, target in enumerate(self._graph.target):
            if (self._makers[event] & done).bit_count() >= target:
                complete |= 1 << event
        return complete

    def _following(self, state: _State) -> Iterator[_State]:
        """First what adds to a hand, last what empties it: depth first the last one is tried first."""
        taken, hands = state
        done = self._done(state)
        complete = self._complete(done)
        runs = []
        for worker, hand in enumerate(hands):
            if hand.inside >= 0:
                if not self._needs[hand.inside] & ~complete:
                    runs.append((worker, self._ran(hand, hand.inside, hand.held, done)))
                continue
            needs = [self._needs_of(row, len(hand.held) == 1) for row in hand.held]
            after = self._taken(worker, hand, needs, taken, complete)
            if after is not None:
                yield after[0], (*hands[:worker], after[1], *hands[worker + 1 :])
            for i, row in enumerate(hand.held):
                sees = hand.seen | needs[i]
                if not needs[i] & ~complete and all(need & ~sees for need in needs[:i]):
                    rest = hand.held[:i] + hand.held[i + 1 :]
                    runs.append((worker, self._ran(_Hand(hand.held, -1, hand.ran, sees), row, rest, done)))
        for worker, made in runs:
            yield taken, (*hands[:worker], made, *hands[worker + 1 :])

    def _needs_of(self, row: int, is_alone: bool) -> int:
        needs = 0
        for task in range(row, row + (1 if is_alone else self._graph.chain[row])):
            needs |= self._needs[task]
        return needs

    def _taken(
        self, worker: int, hand: _Hand, needs: list[int], taken: tuple[int, ...], complete: int
    ) -> tuple[tuple[int, ...], _Hand] | None:
        seen = hand.seen
        if hand.held:
            kind = self._graph.kind[hand.held[0]]
            if len(hand.held) > self._look_ahead or kind not in OWN_PE_KINDS:
                return None
            if kind == _DOWN:
                planned = self._graph.planned[hand.held[0]]
                seen |= 1 << planned
                if not complete >> planned & 1:
                    return None
            if not all(need & ~seen for need in needs):
                return None
        for queue in self._queues.paths[worker]:
            if taken[queue] < len(self._queues.rows[queue]):
                row = self._queues.rows[queue][taken[queue]]
                after = (*taken[:queue], taken[queue] + 1, *taken[queue + 1 :])
                return after, _Hand((*hand.held, row), -1, hand.ran, seen)
        return None

    def _ran(self, hand: _Hand, row: int, held: tuple[int, ...], done: int) -> _Hand:
        """The worker after it ran a task."""
        ran = hand.ran | 1 << row
        seen = hand.seen | self._needs[row]
        done |= 1 << row
        for event in self._graph.signals[row]:
            makers = self._makers[event]
            # others' signals to the same event may be on their way
            if not makers & ~ran and (makers & done).bit_count() >= self._graph.target[event]:
                seen |= 1 << event
        inside = row + 1 if row + 1 < self._chain_end(row) else -1
        return _Hand(held, inside, ran, seen)


def _split(values: np.ndarray, ptr: np.ndarray) -> list[list[int]]:
    edges, bounds = np.asarray(values).tolist(), np.asarray(ptr).tolist()
    return [edges[begin:end] for begin, end in pairwise(bounds)]
