"""Launches that cannot go on: they end, they say who waits for what, and the layer works again."""

import functools
import itertools
import re
import time

import numpy as np
import pytest
from layers import EIGHT, routing_from, skewed_routing, tokens

from flashmoe.hw import Chaos, LaunchError, Layer
from flashmoe.policy import Policy
from flashmoe.schedule import ScheduleError, to_schedule
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import KINDS
from flashmoe.weights import Weights

DEADLINE_S = 0.3
GRACE_S = 2.0
COUNTS = [3, 2]
QUEUES = ["push", "ticket", "domain_steal", "static_phase"]


@functools.cache
def weights():
    return Weights.random(EIGHT, seed=5)


def make_layer(policy="ticket", *, workers=2, ep_size=2, tiling=None):
    return Layer(
        EIGHT,
        weights(),
        ep_size=ep_size,
        max_tokens=4,
        workers=workers,
        policy=policy,
        tiling=tiling,
        deadline_s=DEADLINE_S,
    )


def bits(result):
    return [rows.tobytes() for rows in result.outputs]


def fails_in_time(layer, x, **arguments):
    start = time.monotonic()
    with pytest.raises(LaunchError) as error:
        layer(x, **arguments)
    # the deadline is what is promised, not a speed
    assert time.monotonic() - start < DEADLINE_S + GRACE_S
    return error.value


# ---- workers that fail to do their part


@pytest.mark.parametrize("policy", QUEUES)
@pytest.mark.parametrize("absent", [0, 1])
def test_a_pe_that_never_arrives_is_named_by_who_waits_for_it(absent, policy):
    layer, x = make_layer(policy), tokens(EIGHT, COUNTS)
    before = bits(layer(x))
    error = fails_in_time(layer, x, chaos=Chaos(absent_pe=absent))
    message, fault = str(error), error.fault
    assert message.startswith(f"PE {1 - absent} worker {fault['worker']}, epoch 2: waited 0.3")
    assert f"for planned (the dispatch of PE {absent}, by epoch): seen 0, wanted 2" in message
    assert fault["src"] == absent and fault["waited_s"] >= DEADLINE_S
    assert fault["unfinished_pes"] == [0, 1]
    assert fault["tasks_run"][2 * absent : 2 * absent + 2] == [0, 0] and f"PE {absent}: 0, 0" in message
    assert bits(layer(x)) == before
    assert layer.epochs == [1, 1]  # the workspace was reset


def test_a_lone_pe_that_never_arrives():
    layer, x = make_layer(ep_size=1), tokens(EIGHT, [3])
    before = bits(layer(x))
    assert "PE 0 did not finish" in str(fails_in_time(layer, x, chaos=Chaos(absent_pe=0)))
    assert bits(layer(x)) == before


@pytest.mark.parametrize("down", ["tile", "rows"])
@pytest.mark.parametrize("policy", ["push", "ticket"])
def test_a_worker_may_die_before_any_of_its_tasks(policy, down):
    """One worker a PE does everything, in a known order: each kind of task is once the one that is not done."""
    tiling = Tiling(down=down, gate_experts=8, up_rows=20, down_rows=24, combine_tokens=4)
    layer, x = make_layer(policy, workers=1, tiling=tiling), tokens(EIGHT, COUNTS)
    result = layer(x)
    before, records = bits(result), result.trace.records
    mine = np.sort(records[records["pe"] == 0], order="start_ps")
    died_at = {}
    for turn in range(len(mine)):
        kind = KINDS[mine["kind"][turn]]
        if kind in died_at:
            continue
        died_at[kind] = fails_in_time(layer, x, chaos=Chaos(dead_worker=(0, 0, turn)))
        assert died_at[kind].fault["tasks_run"][0] == turn
        assert f"PE 0: {turn}; PE 1: " in str(died_at[kind])
        assert 0 in died_at[kind].fault["unfinished_pes"]
        assert bits(layer(x)) == before
    assert set(died_at) == {"gate", "route", "dispatch", "up", "down", "combine"}
    for kind in ("gate", "route", "dispatch"):  # PE 1 cannot plan without PE 0
        message = str(died_at[kind])
        assert message.startswith("PE 1 worker 0, epoch ") and "planned (the dispatch of PE 0, by epoch)" in message
    for kind in ("up", "down"):  # PE 1 has its plan, and tokens with experts on PE 0
        message = str(died_at[kind])
        assert message.startswith("PE 1 worker 0, epoch ") and "for result[" in message
    # nobody waits for a combine, so no deadline need pass
    assert str(died_at["combine"]).startswith("PE 0 did not finish: a worker stopped")
    assert died_at["combine"].fault["unfinished_pes"] == [0]


# Three tokens of one PE, each for experts 0, 1 and 2. Ids: 3 4 5 route, 6 7 8 up, 9 10 11 down, 12 13 14 combine;
# static: worker 0 has the odd ones, worker 1 the even ones.
@pytest.mark.parametrize(
    ("after", "waits"),
    [
        (1, "with no task yet for planned (its own PE's tokens routed): seen 2, wanted 3"),  # no route 5
        (2, "with task 10 for upped[1]: seen 0, wanted 1"),  # no up 7
        (3, "with task 12 for result[0]: seen 0, wanted 2"),  # no down 9; results carry their epoch
    ],
)
def test_the_report_names_task_event_seen_and_wanted(after, waits):
    tiling = Tiling(gate_experts=8, gate_tokens=1, up_rows=20, down_rows=24)
    layer, x = make_layer("static_phase", ep_size=1, tiling=tiling), tokens(EIGHT, [3])
    routing = routing_from([[[0, 1, 2]] * 3], 8)
    before = bits(layer(x, routing=routing))
    error = fails_in_time(layer, x, routing=routing, chaos=Chaos(dead_worker=(0, 0, after)))
    # worker 1 ran its route and ups, and down 10 if it could
    ran = f"tasks run by each worker: PE 0: {after}, {[0, 1, 3, 4][after]}"
    assert re.fullmatch(rf"PE 0 worker 1, epoch 2: waited 0\.3\d* s {re.escape(f'{waits}; {ran}')}", str(error))
    assert bits(layer(x, routing=routing)) == before


def test_a_gate_that_is_not_computed():
    # ids 0 1 2 gate, 3 4 5 route; worker 0 should have run gates 0 and 2
    tiling = Tiling(gate_experts=8, gate_tokens=1)
    layer, x = make_layer("static_phase", ep_size=1, tiling=tiling), tokens(EIGHT, [3])
    before = bits(layer(x))
    error = fails_in_time(layer, x, chaos=Chaos(dead_worker=(0, 0, 0)))
    assert "PE 0 worker 1, epoch 2: waited 0.3" in str(error)
    assert "s with task 3 for gated[0]: seen 0, wanted 1; tasks run by each worker: PE 0: 0, 1" in str(error)
    assert error.fault["task_id"] == 3 and (error.fault["seen"], error.fault["wanted"]) == (0, 1)
    assert bits(layer(x)) == before


def test_push_never_waits_for_what_is_there():
    """PE 0 has no tokens and so no combine, but an expert of a token of PE 1: its slots are a dispatch, ups and a down.

    PE 1 has work of its own, so that PE 0's live worker has waited for the slot of the down for longest.
    """
    layer = make_layer("push", tiling=Tiling(up_rows=2, down_rows=24))
    routing, x = routing_from([[], [[0, 4, 5], [4, 5, 6], [5, 6, 7], [4, 6, 7]]], 8), tokens(EIGHT, [0, 4])
    before, errors = bits(layer(x, routing=routing)), []
    for worker, after in itertools.product((0, 1), (0, 1, 3)):
        try:  # which worker gets which task is a matter of timing
            layer(x, routing=routing, chaos=Chaos(dead_worker=(0, worker, after)))
        except LaunchError as error:
            errors.append(error)
        assert bits(layer(x, routing=routing)) == before
    assert errors
    for error in errors:
        assert error.fault["seen"] != error.fault["wanted"], str(error)


def test_a_single_worker_that_dies_leaves_nobody_to_wait():
    layer, x = make_layer(workers=1, ep_size=1), tokens(EIGHT, [3])
    before = bits(layer(x))
    for after in (0, 1, 5):
        error = fails_in_time(layer, x, chaos=Chaos(dead_worker=(0, 0, after)))
        assert str(error) == (
            "PE 0 did not finish: a worker stopped, and nobody waited for its tasks; "
            f"tasks run by each worker: PE 0: {after}"
        )
        assert bits(layer(x)) == before


@pytest.mark.parametrize("policy", ["ancestor", *QUEUES, "expert_lpt"])
def test_faults_at_random_places_leave_the_layer_usable(policy):
    layer, x = make_layer(policy, workers=3), tokens(EIGHT, COUNTS)
    routing = skewed_routing(EIGHT, COUNTS, seed=4, skew=1.0, dropped=0.2)
    before = bits(layer(x, routing=routing))
    rng = np.random.default_rng(3)
    for seed in range(2):
        dead = (int(rng.integers(2)), int(rng.integers(3)), int(rng.integers(6)))
        chaos = Chaos(max_delay_us=50, dead_worker=dead)
        try:
            layer(x, routing=routing, chaos=chaos, seed=seed)
        except LaunchError as error:
            assert "PE" in str(error)
        assert bits(layer(x, routing=routing)) == before


# ---- replays


def replayed(policy="ticket", workers=2):
    """A layer that replays a schedule, its inputs, its routing and the schedule itself."""
    routing = skewed_routing(EIGHT, COUNTS, seed=1, skew=1.0, dropped=0.0)
    x = tokens(EIGHT, COUNTS)
    replay = Policy.from_trace(make_layer(policy, workers=workers)(x, routing=routing).trace)
    table = TaskTable(EIGHT, routing, replay.tiling, gate=False)
    return x, routing, table, to_schedule(replay, table, workers)


def replay_of(schedule, table, look_ahead=0):
    return Policy(
        name="mine", queue="replay", replay=schedule, replay_digests=table.plan_digests, look_ahead=look_ahead
    )


def test_bad_lists_are_refused_before_the_launch():
    x, routing, table, schedule = replayed()
    missing = [[ids.copy() for ids in pe] for pe in schedule]
    gone = max(missing[1], key=len).pop(3)  # whoever had most: threads do not share tasks alike
    doubled = [[ids.copy() for ids in pe] for pe in schedule]
    twice = max(schedule[0], key=len)[0]
    doubled[0][1].append(twice)
    backwards = [[ids[::-1] for ids in pe] for pe in schedule]
    for lists, named in (
        (missing, f"task {gone} of PE 1: .*in no worker's list"),
        (doubled, f"task {twice} of PE 0: .*listed twice"),
        (backwards, r"deadlock: .*\n(.*\n)*PE \d worker \d holds task \d+ .* seen \d+, wanted \d+"),
    ):
        layer = make_layer(replay_of(lists, table))
        with pytest.raises(ScheduleError, match=named):
            layer(x, routing=routing)
        assert layer.epochs == [0, 0]
    layer = make_layer(replay_of(schedule, table))
    assert bits(layer(x, routing=routing)) == bits(make_layer()(x, routing=routing))


def test_a_list_for_another_routing_is_refused_before_the_launch():
    x, routing, table, schedule = replayed()
    layer = make_layer(replay_of(schedule, table))
    before = bits(layer(x, routing=routing))
    other = skewed_routing(EIGHT, COUNTS, seed=2, skew=1.0, dropped=0.0)
    with pytest.raises(ScheduleError, match=r"'mine' was made for another routing: tokens per expert differ on PE \d"):
        layer(x, routing=other)
    assert bits(layer(x, routing=routing)) == before


def test_a_gate_that_chooses_otherwise_than_expected_ends_the_launch(monkeypatch):
    """The list was made for what the gate should choose; the plan's builder compares when it knows."""
    x, _, table, _ = replayed()
    by_rank = Policy(name="mine", queue="static", rank=lambda task: 0)
    layer = make_layer(by_rank)
    before = bits(layer(x))
    wrong = skewed_routing(EIGHT, COUNTS, seed=9, skew=0.0, dropped=0.0)
    monkeypatch.setattr("flashmoe.hw.cpu.expected_routing", lambda model, gate, tokens: wrong)
    error = fails_in_time(layer, x)
    assert "the replayed schedule was made for another routing" in str(error)
    assert error.fault["wanted"] in TaskTable(EIGHT, wrong, by_rank.tiling).plan_digests
    assert error.fault["seen"] not in table.plan_digests
    monkeypatch.undo()
    assert bits(layer(x)) == before
