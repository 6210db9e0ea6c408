"""What no timing can change, against all timings tried one by one, and against the engines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import edges, routing_from
from sim.strategies import machines

from flashmoe.liveness import Graph, Queues, Undecided, play, search
from flashmoe.model import MoEModel
from flashmoe.schedule import ScheduleError, check_order, check_schedule
from flashmoe.sim import ENGINES, DeadlockError
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import KINDS

MODEL = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
ONE_TOKEN = routing_from([[[0, 1]]], 2)
TABLES = {
    "tile": TaskTable(MODEL, ONE_TOKEN, gate=False),  # route 1, up 2 3, down 4 5, combine 6
    "rows": TaskTable(MODEL, ONE_TOKEN, Tiling(down="rows"), gate=False),  # the downs 4 and 5 are a chain
    "two tiles": TaskTable(MODEL, ONE_TOKEN, Tiling(up_rows=2), gate=False),
    "two PEs": TaskTable(MODEL, routing_from([[[0, 1]], []], 2), gate=False),
}


# ---- an oracle that knows the rules and no theorem


class AllTimings:
    """Every state that the rules allow: each worker sees each event whenever it likes, but its own at once.

    A state: picks taken from each queue; of each worker (held, rest of a chain, events seen); who ran which task.
    """

    def __init__(self, table: TaskTable, queues: Queues, look_ahead: int) -> None:
        self.queues, self.look_ahead = queues, look_ahead
        self.kinds = [KINDS[kind] for kind in table.tasks["kind"]]
        self.chain, self.target = table.tasks["chain"].tolist(), table.event_target.tolist()
        self.plan = [int(table.planned_event[pe]) for pe in table.tasks["pe"]]
        self.signals = [edges(table.signal_ptr, table.signal_event, row) for row in range(len(table))]
        self.needs = []
        for row, kind in enumerate(self.kinds):
            late = [self.plan[row]] if kind in ("up", "down", "combine", "expert") else []
            events = {*edges(table.wait_ptr, table.wait_event, row), *late}
            self.needs.append(frozenset(event for event in events if self.target[event] > 0))

    def can_get_stuck(self, most: int) -> bool | None:
        """None when there are too many states."""
        workers = (((), (), frozenset()),) * len(self.queues.paths)
        start: Any = ((0,) * len(self.queues.rows), workers, (-1,) * len(self.kinds))
        known, todo = {start}, [start]
        while todo and len(known) < most:
            state = todo.pop()
            after = list(self.after(state))
            if not after and min(state[2]) < 0:
                return True
            todo += {*after} - known
            known |= {*after}
        return None if todo else False

    def after(self, state: Any) -> Iterator[Any]:
        taken, workers, ran = state
        for w, (held, rest, seen) in enumerate(workers):
            for event in set(range(len(self.target))) - seen:
                who = self.who(event, ran)
                if 0 < self.target[event] <= len(who):
                    yield taken, put(workers, w, (held, rest, seen | {event})), ran
            if rest:
                if self.needs[rest[0]] <= seen:
                    yield self.run(state, w, rest[0], held, rest[1:])
                continue
            for i, head in enumerate(held):
                rows = tuple(range(head, head + self.chain[head]))
                if all(self.needs[row] <= seen for row in (rows if len(held) > 1 else rows[:1])):
                    yield self.run(state, w, head, (*held[:i], *held[i + 1 :]), rows[1:])
                    break
            else:
                queue = next((q for q in self.queues.paths[w] if taken[q] < len(self.queues.rows[q])), None)
                if queue is not None and self.may_take(held, seen):
                    pick = self.queues.rows[queue][taken[queue]]
                    yield put(taken, queue, taken[queue] + 1), put(workers, w, ((*held, pick), rest, seen)), ran

    def may_take(self, held: Any, seen: Any) -> bool:
        if not held:
            return True
        kind = self.kinds[held[0]]
        is_own = kind in ("route", "dispatch") or (kind == "down" and self.plan[held[0]] in seen)
        return is_own and len(held) <= self.look_ahead

    def who(self, event: int, ran: Any) -> list[int]:
        """Workers that signalled an event."""
        return [w for row, w in enumerate(ran) if w >= 0 and event in self.signals[row]]

    def run(self, state: Any, w: int, row: int, held: Any, rest: Any) -> Any:
        taken, workers, ran = state
        ran = put(ran, row, w)
        signalled = {event: self.who(event, ran) for event in self.signals[row]}
        own = {event for event, who in signalled.items() if len(who) >= self.target[event] and set(who) == {w}}
        return taken, put(workers, w, (held, rest, workers[w][2] | own)), ran


def put(values: Any, i: int, value: Any) -> Any:
    return (*values[:i], value, *values[i + 1 :])


def shuffled(table: TaskTable, rng: random.Random) -> list[list[int]]:
    """For each PE an order in which a few picks are where they should not be."""
    orders = [ids.tolist() for ids in table.order(rng.choice(["phase", "expert"]))]
    for ids in orders:
        for _ in range(rng.choice([0, 1, 2, 4])):
            ids.insert(rng.randrange(len(ids)), ids.pop(rng.randrange(len(ids))))
    return orders


def dealt(orders: list[list[int]], num_workers: int, rng: random.Random) -> list[list[list[int]]]:
    lists: list[list[list[int]]] = [[[] for _ in range(num_workers)] for _ in orders]
    for of_pe, ids in zip(lists, orders, strict=True):
        for task_id in ids:
            rng.choice(of_pe).append(task_id)
    return lists


def rows_of(table: TaskTable, pe: int, ids: list[int]) -> list[int]:
    return [int(table.row(pe, task_id)) for task_id in ids]


def queues_of_lists(table: TaskTable, lists: list[list[list[int]]]) -> Queues:
    return Queues.of_lists([[rows_of(table, pe, ids) for ids in workers] for pe, workers in enumerate(lists)])


def refuses(check: Any, *args: Any, **kwargs: Any) -> bool:
    try:
        check(*args, **kwargs)
    except ScheduleError as error:
        assert "deadlock: " in str(error) and error.cycle
        return True
    return False


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("name", TABLES)
def test_the_verdict_is_that_of_all_timings(name, seed):
    rng = random.Random(f"{name} {seed}")
    table, look_ahead = TABLES[name], rng.choice([0, 1, 2, 3])
    num_workers = 1 if seed % 3 == 0 else 2
    orders = shuffled(table, rng)
    if seed % 2:
        num_domains = rng.choice([1, 2])
        rows = [rows_of(table, pe, ids) for pe, ids in enumerate(orders)]
        queues = Queues.of_counters(rows, num_workers, num_domains)
        refused = refuses(check_order, table, orders, num_workers, num_domains=num_domains, look_ahead=look_ahead)
    else:
        lists = dealt(orders, num_workers, rng)
        queues = queues_of_lists(table, lists)
        refused = refuses(check_schedule, table, lists, num_workers, look_ahead)
    stuck = AllTimings(table, queues, look_ahead).can_get_stuck(most=10_000)
    assert stuck in (None, refused)
    # the search alone, which need not be asked where a theorem decides
    if stuck is not None:
        assert search(Graph(table), queues, look_ahead, budget=10**7).is_stuck == stuck


# ---- the engines


@dataclass(frozen=True)
class Handed:
    """A policy as an engine sees it, whose orders are given."""

    queue: str
    look_ahead: int
    orders: list[list[int]]

    def picks(self, table: TaskTable) -> list[list[int]]:
        return self.orders

    def sorts_experts(self, num_pes: int) -> bool:
        return False


def deadlocks(
    engine: str, table: TaskTable, machine: Any, num_workers: int, policy: Any, lists: Any, seed: int
) -> bool:
    try:
        records = ENGINES[engine](table, machine, policy, num_workers, lists, seed=seed)
    except DeadlockError:
        return True
    assert len(records) == len(table)
    return False


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(TABLES)),
    queue=st.sampled_from(["ticket", "domain", "replay"]),
    num_workers=st.sampled_from([1, 2, 3]),
    look_ahead=st.sampled_from([0, 0, 1, 2]),
    machine=machines(),
    seed=st.integers(0, 1 << 20),
)
def test_engines_get_stuck_only_where_it_was_foretold(name, queue, num_workers, look_ahead, machine, seed):
    table, rng = TABLES[name], random.Random(seed)
    orders = shuffled(table, rng)
    lists = dealt(orders, num_workers, rng) if queue == "replay" else None
    if lists is not None:
        refused = refuses(check_schedule, table, lists, num_workers, 0 if machine.in_order else look_ahead)
    else:
        options = {
            "num_domains": machine.num_domains if queue == "domain" else 1,
            "look_ahead": look_ahead,
            "in_order": machine.in_order,
        }
        refused = refuses(check_order, table, orders, num_workers, **options)
    policy = Handed(queue, look_ahead, orders)
    # without look-ahead, and for lists with 1 and no chains, all timings get equally far
    is_certain = look_ahead == 0 or (queue == "replay" and look_ahead == 1 and name != "rows")
    if machine.in_order:
        is_certain = queue == "replay"
    for engine in ENGINES:
        if deadlocks(engine, table, machine, num_workers, policy, lists, seed):
            assert refused
        else:
            assert not (refused and is_certain)


# ---- by hand

ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE = range(1, 7)
# worker 1 reaches DOWN_1 past the combine only if it finds that DOWN_0 has to wait
HURRIED = [[[ROUTE, UP_0, UP_1], [DOWN_0, COMBINE, DOWN_1]]]


def test_look_ahead_may_come_too_late():
    table = TABLES["tile"]
    assert refuses(check_schedule, table, HURRIED, 2, 0) and refuses(check_schedule, table, HURRIED, 2, 2)
    queues = queues_of_lists(table, HURRIED)
    end = search(Graph(table), queues, 2)
    combine = int(table.row(0, COMBINE))
    assert end.is_stuck and list(end.held) == [[], [(combine, combine + 1)]]
    # a lone worker sees at once what it makes ready: here DOWN_0 always waits when it looks ahead
    lone = [[[ROUTE, UP_1, DOWN_0, COMBINE, DOWN_1, UP_0]]]
    assert not refuses(check_schedule, table, lone, 1, 2) and refuses(check_schedule, table, lone, 1, 1)


def test_a_counter_needs_as_many_workers_as_wait():
    table = TABLES["tile"]
    order = [[ROUTE, DOWN_0, DOWN_1, UP_0, UP_1, COMBINE]]
    assert refuses(check_order, table, order, 1) and refuses(check_order, table, order, 2)
    check_order(table, order, 3)
    # Two workers hold both downs; whichever looks ahead takes an up, which is ready.
    check_order(table, order, 2, look_ahead=1)
    # one worker may hold both downs, though the other is free
    check_order(table, order, 1, look_ahead=2)


def test_in_order_a_worker_may_hold_what_another_needs():
    table = TABLES["tile"]
    order = [[ROUTE, DOWN_0, DOWN_1, UP_0, UP_1, COMBINE]]
    assert refuses(check_order, table, order, 3, in_order=True)  # behind a down one may have taken an up
    check_order(table, [[ROUTE, UP_0, DOWN_0, UP_1, DOWN_1, COMBINE]], 3, num_domains=2, in_order=True)


def test_thieves_come_when_their_own_domain_is_exhausted():
    # domain 0 owns ROUTE DOWN_1 UP_0, domain 1 COMBINE UP_1 DOWN_0: of two workers one holds DOWN_1, one COMBINE
    table = TABLES["tile"]
    order = [[ROUTE, COMBINE, DOWN_1, UP_1, UP_0, DOWN_0]]
    assert refuses(check_order, table, order, 2, num_domains=2)
    check_order(table, order, 3, num_domains=2)  # the third one, of domain 0, runs UP_0 and steals UP_1


def test_a_search_gives_up():
    table = TABLES["two tiles"]
    with pytest.raises(Undecided):
        search(
            Graph(table), Queues.of_counters([rows_of(table, 0, table.order("phase")[0].tolist())], 2, 1), 2, budget=10
        )


def test_what_is_left_at_the_end():
    table = TABLES["rows"]
    graph, queues = Graph(table), queues_of_lists(table, [[[ROUTE, UP_0, 4, UP_1]]])
    end = play(graph, queues)
    assert [bool(ran) for ran in end.has_run] == [True, True, False, True, False]  # the chain was begun
    assert list(end.held) == [[(4, 5)]]
    whole = play(graph, queues, whole_chains=True)
    assert [bool(ran) for ran in whole.has_run] == [True, True, False, False, False]
    assert list(whole.held) == [[(3, 5)]]
