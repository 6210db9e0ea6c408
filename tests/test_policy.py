"""Policies: the registry, orders written in Python, and schedules taken from traces."""

import functools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BUILT_IN_POLICIES, EIGHT, assert_sound, layers, routing_from, skewed_routing, tokens

from flashmoe.hw import Layer
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, TaskView, policy, policy_names, rank_picks, resolve, schedule
from flashmoe.schedule import ScheduleError, check_policy, to_schedule
from flashmoe.sim import evaluate, simulate
from flashmoe.tasks import ORDERS, TaskTable, Tiling
from flashmoe.trace import KINDS
from flashmoe.weights import Weights

SMALL = MoEModel(d_model=8, d_ff=4, num_experts=3, top_k=1, dtype="f32")
ONE_TILE = Tiling(up_rows=4, down_rows=8)


@pytest.fixture
def registry(monkeypatch):
    """Policies that a test registers are gone afterwards."""
    # flashmoe.policy as an attribute is the decorator of that name
    monkeypatch.setattr(sys.modules["flashmoe.policy"], "_in_python", {})


# ---- the registry


def test_built_in_policies_share_one_tiling_except_the_ancestor():
    assert policy_names()[: len(BUILT_IN_POLICIES)] == BUILT_IN_POLICIES
    for name in BUILT_IN_POLICIES:
        chosen = resolve(name)
        assert chosen.name == name
        assert chosen.tiling == (Tiling(granularity="token") if name == "ancestor" else Tiling())
        assert chosen.order in ORDERS and chosen.rank is None


def test_a_tiling_overrides_the_policys_own():
    rows = Tiling(down="rows")
    assert resolve("ancestor", rows).tiling == rows
    assert resolve("ancestor").tiling.granularity == "token"  # the built-in one is untouched
    mine = Policy(name="mine", queue="static", tiling=rows)
    assert resolve(mine) is mine
    assert resolve(mine, Tiling()).tiling == Tiling()


def test_unknown_names_are_answered_with_the_known_ones(registry):
    policy("mine")(lambda task: 0)
    with pytest.raises(ValueError, match=r"policy='best' \(accepted: ancestor, push, .*, mine, or a Policy\)"):
        resolve("best")


def test_registering_again_replaces_and_built_in_names_are_refused(registry):
    first = policy("mine")(lambda task: 0)
    assert resolve("mine") is first
    second = policy("mine", queue="static", look_ahead=2, tiling=Tiling(down="rows"))(lambda task: 1)
    assert resolve("mine") is second and policy_names() == [*BUILT_IN_POLICIES, "mine"]
    assert second.to_dict() == {"name": "mine", "queue": "static", "order": "phase", "look_ahead": 2}
    for name in BUILT_IN_POLICIES:
        for register in (policy, schedule):
            with pytest.raises(ValueError, match=f"policy '{name}' is built in"):
                register(name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"queue": "lifo"}, "queue='lifo' (accepted: push, ticket, domain, static, replay)"),
        ({"order": "best"}, "order='best' (accepted: phase, expert, local_first"),
        ({"look_ahead": -1}, "look_ahead=-1 (accepted: 0..15)"),
        ({"look_ahead": 16}, "look_ahead=16 (accepted: 0..15)"),
        ({"queue": "replay"}, "queue='replay' with replay=None"),
        ({"queue": "ticket", "replay": [[[0]]]}, "queue='ticket' with replay=lists"),
        ({"queue": "static", "replay": len}, "queue='static' with replay=a function"),
        ({"queue": "push", "rank": len}, "queue='push'"),
    ],
)
def test_bad_policies_name_what_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=r".") as error:
        Policy(name="bad", **arguments)
    assert named in str(error.value)


# ---- orders written in Python


def merged(table, picks):
    """One order over all PEs, made by walking through each PE's as far as inputs allow."""
    left = [list(table.row(pe, ids.astype(np.int64))) for pe, ids in enumerate(picks)]
    done = np.zeros(len(table.event_target), np.int64)
    order = []
    while any(left):
        before = len(order)
        for rows in left:
            while rows:
                chain = range(int(rows[0]), int(rows[0]) + int(table.tasks["chain"][rows[0]]))
                waits = {
                    int(event)
                    for row in chain
                    for event in table.wait_event[int(table.wait_ptr[row]) : int(table.wait_ptr[row + 1])]
                }
                if any(done[event] < table.event_target[event] for event in waits):
                    break
                for row in chain:
                    for event in table.signal_event[int(table.signal_ptr[row]) : int(table.signal_ptr[row + 1])]:
                        done[event] += 1
                order.append(int(rows.pop(0)))
        assert len(order) > before, "no PE can go on"
    return order


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layer=layers(max_tokens=4), seed=st.integers(0, 9), gate=st.booleans())
def test_any_rank_gives_an_order_that_holds_all_picks_after_their_inputs(layer, seed, gate):
    table = TaskTable(*layer, gate=gate)
    rng = np.random.default_rng(seed)
    picks = rank_picks(table, lambda task: rng.integers(0, 5))
    assert [ids.dtype for ids in picks] == [np.dtype(np.uint32)] * table.num_pes
    assert_sound(table, merged(table, picks))


# Experts 0, 1, 2 get 1, 3 and 2 tokens.
COUNTED = routing_from([[[1], [2], [1], [0], [2], [1]]], 3)


def order_of(rank, gate=False):
    table = TaskTable(SMALL, COUNTED, ONE_TILE, gate=gate)
    tasks = table.tasks[table.row(0, rank_picks(table, rank)[0].astype(np.int64))]
    return [(KINDS[task["kind"]], int(task["expert"])) for task in tasks]


@pytest.mark.parametrize(
    ("name", "num_pes", "sorts"),
    [
        ("ticket", 1, False),
        ("ticket", 8, False),
        ("expert_lpt", 1, True),
        ("expert_lpt", 8, True),
        ("local_first", 1, False),
        ("local_first", 2, True),
        ("remote_first", 1, False),
        ("remote_first", 2, True),
    ],
)
def test_orders_that_are_not_of_ids_need_experts_sorted(name, num_pes, sorts):
    assert resolve(name).sorts_experts(num_pes) == sorts


def test_an_order_that_is_handed_in_needs_no_sorting():
    assert Policy(name="as met", order="arrival").sorts_experts(1)
    assert not Policy(name="ranked", order="arrival", rank=lambda task: 0).sorts_experts(1)
    lists = [[[0]]]
    assert not Policy(name="again", queue="replay", order="arrival", replay=lists).sorts_experts(1)


def test_ranks_decide_among_what_is_ready():
    # by the number of tokens alone: the up of 3 tokens, then its down, which is ready now and has 3 as well
    big_first = order_of(lambda task: -task.num_tokens)
    assert big_first[1:7] == [("up", 1), ("down", 1), ("up", 2), ("down", 2), ("up", 0), ("down", 0)]
    small_last_phase = order_of(lambda task: (task.kind != "up", task.num_tokens))
    assert [expert for kind, expert in small_last_phase if kind == "up"] == [0, 2, 1]
    # equal ranks go by id
    assert [expert for kind, expert in order_of(lambda task: 0) if kind == "up"] == [0, 1, 2]


def test_a_rank_sees_the_task():
    seen = {}

    def rank(task):
        assert isinstance(task, TaskView)
        seen[task.kind, task.expert] = task
        return 0

    order_of(rank, gate=True)
    assert {kind for kind, _ in seen} == {"gate", "route", "up", "down", "combine"}
    up = seen["up", 1]
    # 2 x 4 rows of 8 floats; 3 tokens x 2 matrices x 4 rows x 8 x 2 flops
    assert up == TaskView(
        pe=0,
        kind="up",
        expert=1,
        tile=0,
        block=1,
        num_tokens=3,
        local_tokens=3,
        peer=-1,
        weight_bytes=256,
        flops=384,
    )
    assert seen["route", -1].expert == -1 and seen["route", -1].num_tokens == 6


def test_a_rank_is_asked_once_a_pick():
    asked = []
    order_of(lambda task: asked.append(task) or 0)
    assert len(asked) == len(set(asked)) == 1 + 3 + 3 + 6  # route, up, down, combine


def test_what_a_rank_raises_is_not_swallowed():
    with pytest.raises(TypeError):
        order_of(lambda task: task.num_tokens if task.expert >= 0 else None)


# ---- the schedule of a trace


@functools.cache
def ran(policy_name, down):
    model, counts = EIGHT, [3, 0, 4, 1]
    layer = Layer(
        model,
        Weights.random(model, seed=1),
        ep_size=4,
        max_tokens=4,
        workers=3,
        policy=policy_name,
        tiling=Tiling(down=down, up_rows=7, experts_per_pick=1),
        deadline_s=20,
    )
    routing = skewed_routing(model, counts, seed=2, skew=1.0, dropped=0.2)
    return model, counts, routing, layer(tokens(model, counts), routing=routing)


@pytest.mark.parametrize("down", ["tile", "rows"])
@pytest.mark.parametrize("name", ["push", "ticket", "domain_steal", "expert_lpt"])
def test_a_trace_can_be_replayed(name, down):
    model, counts, routing, result = ran(name, down)
    replay = Policy.from_trace(result.trace)
    assert replay.name == f"replay of {name}" and replay.queue == "replay"
    assert Policy.from_trace(result.trace, "again").name == "again"
    schedule = to_schedule(replay, TaskTable(model, routing, replay.tiling, gate=False), 3)
    again = Layer(
        model, Weights.random(model, seed=1), ep_size=4, max_tokens=4, workers=3, policy=replay, deadline_s=20
    )(tokens(model, counts), routing=routing)
    for before, after in zip(result.outputs, again.outputs, strict=True):
        np.testing.assert_array_equal(before, after)
    heads = TaskTable(model, routing, replay.tiling, gate=False).tasks
    heads = {(int(task["pe"]), int(task["task_id"])) for task in heads[heads["chain"] > 0]}
    for pe, workers in enumerate(schedule):
        for worker, ids in enumerate(workers):
            records = again.trace.records
            mine = records[(records["pe"] == pe) & (records["worker"] == worker)]
            ran_ids = mine["task_id"][np.argsort(mine["start_ps"])].tolist()
            assert [task for task in ran_ids if (pe, task) in heads] == ids


def test_policies_in_python_run_on_every_queue(registry):
    model, counts, routing, result = ran("ticket", "tile")
    for queue in ("ticket", "domain", "static"):
        mine = policy("mine", queue=queue, look_ahead=1)(lambda task: (-task.num_tokens, task.tile))
        layer = Layer(
            model,
            Weights.random(model, seed=1),
            ep_size=4,
            max_tokens=4,
            workers=3,
            policy=mine.with_tiling(Tiling(up_rows=7, experts_per_pick=1)),
            deadline_s=20,
        )
        outputs = layer(tokens(model, counts), routing=routing).outputs
        for ours, theirs in zip(outputs, result.outputs, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# ---- schedules written in Python


def by_tile(table, num_workers):
    lists = [[[] for _ in range(num_workers)] for _ in range(table.num_pes)]
    for task in table.tasks[table.tasks["chain"] > 0]:
        lists[task["pe"]][task["tile"] % num_workers].append(task["task_id"])
    return lists


def by_tile_of(asked):
    def make_lists(table, num_workers):
        asked.append((table.routing, num_workers))
        return by_tile(table, num_workers)

    return make_lists


@pytest.mark.parametrize("engine", ["native", "simpy"])
def test_a_schedule_is_asked_for_once_a_layer(registry, engine):
    asked = []
    made = schedule("by_tile")(by_tile_of(asked))
    assert resolve("by_tile") is made and made.queue == "replay" and policy_names()[-1] == "by_tile"
    routings = [skewed_routing(EIGHT, [3, 0, 4, 1], seed=seed, skew=1.0, dropped=0.2) for seed in range(3)]
    run = {"routing": routings, "machine": "h200", "policy": "by_tile", "engine": engine, "workers": 3}
    trace = simulate(EIGHT, **run)
    assert asked == [(routing, 3) for routing in routings]
    totals = evaluate(EIGHT, **run)
    assert len(asked) == 6 and totals.makespan_us == trace.makespan_us
    tasks = trace.records[trace.records["tile"] >= 0]
    assert np.array_equal(tasks["worker"], tasks["tile"] % 3)


def test_schedules_in_python_run_for_real(registry):
    model, counts, routing, result = ran("ticket", "tile")
    made = schedule("by_tile", tiling=Tiling(up_rows=7, experts_per_pick=1), look_ahead=1)(by_tile)
    assert made.look_ahead == 1 and made.tiling.up_rows == 7
    layer = Layer(
        model, Weights.random(model, seed=1), ep_size=4, max_tokens=4, workers=3, policy="by_tile", deadline_s=20
    )
    again = layer(tokens(model, counts), routing=routing)
    for ours, theirs in zip(again.outputs, result.outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tasks = again.trace.records[again.trace.records["tile"] >= 0]
    assert np.array_equal(tasks["worker"], tasks["tile"] % 3)


@pytest.mark.parametrize("engine", ["native", "simpy"])
def test_a_bad_schedule_is_refused_before_it_runs(registry, engine):
    schedule("backwards")(lambda table, num_workers: [[ids[::-1] for ids in pe] for pe in by_tile(table, num_workers)])
    schedule("idle")(lambda table, num_workers: [[[]] * num_workers] * table.num_pes)
    _, _, routing, _ = ran("ticket", "tile")
    run = {"routing": routing, "machine": "h200", "engine": engine, "workers": 3}
    with pytest.raises(ScheduleError, match=r"policy 'backwards': deadlock: .* workers would wait for ever"):
        simulate(EIGHT, policy="backwards", **run)
    with pytest.raises(ScheduleError, match=r"policy 'idle': task \d+ of PE 0: gate, .*picks missing"):
        evaluate(EIGHT, policy="idle", **run)


def test_orders_in_python_never_deadlock():
    model, routing = EIGHT, ran("ticket", "tile")[2]
    for queue in ("ticket", "domain", "static"):
        last_first = Policy(name="mine", queue=queue, rank=lambda task: (-task.tile, task.kind), look_ahead=2)
        check_policy(last_first, TaskTable(model, routing), 3, num_domains=2)


def test_a_trace_of_several_layers_is_no_schedule():
    trace = simulate(EIGHT, routing=[ran("ticket", "tile")[2]] * 2, machine="h200", workers=3)
    with pytest.raises(ValueError, match="trace of 2 layers"):
        Policy.from_trace(trace)
