"""Schedules: complete, once each, and free of deadlock, or refused with the reason."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layers, routing_from

from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.schedule import ScheduleError, check_schedule, to_schedule
from flashmoe.tasks import ORDERS, TaskTable, Tiling
from flashmoe.trace import KINDS

# One token of PE 0 that uses both experts: ids 1 route, 2 3 up, 4 5 down, 6 combine (0 would be the gate).
MODEL = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
TABLE = TaskTable(MODEL, routing_from([[[0, 1]]], 2), gate=False)
ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE = range(1, 7)
# The same by rows: both downs are one pick, and there is nothing to combine.
ROWS = TaskTable(MODEL, routing_from([[[0, 1]]], 2), Tiling(down="rows"), gate=False)
# The same token with an expert on either of two PEs.
PAIR = TaskTable(MODEL, routing_from([[[0, 1]], []], 2), gate=False)


def test_the_tables_are_as_the_comments_say():
    kinds = [KINDS[kind] for kind in TABLE.tasks["kind"]]
    assert kinds == ["route", "up", "up", "down", "down", "combine"]
    assert TABLE.tasks["task_id"].tolist() == [ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE]
    assert ROWS.tasks["chain"].tolist() == [1, 1, 1, 2, 0]
    assert [(int(t["pe"]), int(t["task_id"]), KINDS[t["kind"]]) for t in PAIR.tasks] == [
        (0, 1, "route"),
        (0, 2, "dispatch"),
        (0, 3, "up"),
        (0, 4, "down"),
        (0, 5, "combine"),
        (1, 0, "dispatch"),
        (1, 1, "up"),
        (1, 2, "down"),
    ]


def refused(table, schedule, workers, look_ahead=0):
    with pytest.raises(ScheduleError) as error:
        check_schedule(table, schedule, workers, look_ahead)
    return str(error.value)


# ---- good ones


@pytest.mark.parametrize(
    "workers",
    [
        [[ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE]],
        [[ROUTE, UP_1, DOWN_1, UP_0, DOWN_0, COMBINE]],
        [[DOWN_0, DOWN_1], [ROUTE, UP_0], [UP_1], [COMBINE]],  # each may wait for the others
        [[], [ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE]],
    ],
)
def test_schedules_that_work(workers):
    check_schedule(TABLE, [workers], len(workers))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layer=layers(max_tokens=4), num_workers=st.sampled_from([1, 2, 3, 7]), look_ahead=st.sampled_from([0, 1, 4]))
def test_every_built_in_order_dealt_out_works(layer, num_workers, look_ahead):
    table = TaskTable(*layer)
    for order in ORDERS:
        policy = Policy(name=order, queue="static", order=order, look_ahead=look_ahead, tiling=layer[2])
        schedule = to_schedule(policy, table, num_workers)
        for pe, ids in enumerate(table.order(order)):
            assert schedule[pe] == [ids[worker::num_workers].tolist() for worker in range(num_workers)]


# ---- incomplete ones


def test_missing_tasks_are_named():
    message = refused(TABLE, [[[ROUTE, UP_0, DOWN_0], [UP_1, COMBINE]]], 2)
    assert message.startswith(f"task {DOWN_1} of PE 0: down, expert 1, tile 0")
    assert "in no worker's list (1 of 6 picks missing" in message
    # of several the first
    assert refused(PAIR, [[[1, 2, 3, 4, 5]], [[]]], 1).startswith("task 0 of PE 1: dispatch")


def test_doubled_tasks_are_named_with_both_places():
    message = refused(TABLE, [[[ROUTE, UP_0, UP_1], [DOWN_0, UP_1, DOWN_1, COMBINE]]], 2)
    assert message.startswith(f"task {UP_1} of PE 0: up, expert 1")
    assert "for worker 0 turn 2 and worker 1 turn 1 (wanted once)" in message


@pytest.mark.parametrize("foreign", [0, 7, 4_000_000, -1])
def test_ids_of_no_task_are_named(foreign):
    message = refused(TABLE, [[[ROUTE, foreign]]], 1)
    assert message == f"PE 0 worker 0 turn 1: task {foreign} is not a task of this PE (1..6)"


def test_a_task_inside_a_chain_cannot_be_taken_alone():
    message = refused(ROWS, [[[ROUTE, UP_0, UP_1, 4, 5]]], 1)
    assert message == "PE 0 worker 0 turn 4: task 5 is inside a chain, taken with its first task"
    check_schedule(ROWS, [[[ROUTE, UP_0, UP_1, 4]]], 1)


def test_the_wrong_number_of_lists_is_named():
    assert refused(TABLE, [], 1) == "schedule for 0 PEs (the layer has 1)"
    assert refused(PAIR, [[[1, 2, 3, 4, 5]]], 1) == "schedule for 1 PEs (the layer has 2)"
    assert refused(TABLE, [[[ROUTE]]], 2) == "PE 0: lists for 1 workers (there are 2)"


# ---- deadlocks


def test_a_worker_that_waits_for_itself():
    message = refused(TABLE, [[[ROUTE, DOWN_0, UP_0, UP_1, DOWN_1, COMBINE]]], 1)
    assert message.startswith("deadlock: 1 workers would wait for ever\n")
    assert "PE 0 worker 0 holds task 4 of PE 0: down, expert 0, tile 0, block 0" in message
    assert "waits for upped[0] on PE 0: seen 0, wanted 1" in message


def test_two_workers_that_wait_for_each_other():
    message = refused(TABLE, [[[ROUTE, DOWN_0, UP_1], [DOWN_1, UP_0, COMBINE]]], 2)
    assert message.startswith("deadlock: 2 workers")
    assert re.search(r"worker 0 holds task 4 .*upped\[0\]", message)
    assert re.search(r"worker 1 holds task 5 .*upped\[1\]", message)


def test_two_pes_that_wait_for_each_other():
    # PE 0 holds its combine and then the dispatch that PE 1 needs before it can compute for that combine
    message = refused(PAIR, [[[1, 5, 2, 3, 4]], [[0, 1, 2]]], 1)
    assert "PE 0 worker 0 holds task 5 of PE 0: combine" in message
    assert "PE 1 worker 0 holds task 1 of PE 1: up" in message and "planned[0] on PE 1: seen 0, wanted 1" in message


def test_a_chain_that_waits_for_what_comes_after_it():
    message = refused(ROWS, [[[ROUTE, UP_0, 4, UP_1]]], 1)
    assert "holds task 5 of PE 0: down, expert 1" in message and "waits for upped[1]" in message
    check_schedule(ROWS, [[[ROUTE, UP_0, 4], [UP_1]]], 2)


# ---- look-ahead


def test_look_ahead_passes_a_pick_that_waits_for_its_own_pe():
    workers = [[ROUTE, UP_0, DOWN_1, DOWN_0, UP_1, COMBINE]]  # DOWN_1 waits for UP_1, two places behind
    assert "holds task 5 of PE 0: down, expert 1" in refused(TABLE, [workers], 1)
    check_schedule(TABLE, [workers], 1, look_ahead=1)  # DOWN_0 runs at once and makes room for UP_1
    further = [[ROUTE, UP_0, DOWN_1, COMBINE, DOWN_0, UP_1]]  # COMBINE stays in hand
    assert "holds" in refused(TABLE, [further], 1, look_ahead=1)
    check_schedule(TABLE, [further], 1, look_ahead=2)


def test_look_ahead_does_not_pass_a_pick_that_waits_for_other_pes():
    # an up waits for the plan, and so for other PEs, even where there are none
    assert "holds task 2 of PE 0: up" in refused(TABLE, [[[UP_0, ROUTE, UP_1, DOWN_0, DOWN_1, COMBINE]]], 1, 15)
    assert "holds task 6 of PE 0: combine" in refused(TABLE, [[[ROUTE, COMBINE, UP_0, UP_1, DOWN_0, DOWN_1]]], 1, 15)


def test_look_ahead_does_not_pass_a_pick_that_cannot_be_decoded_yet():
    # before the plan an id of a later stage is only a number: nobody knows that it waits for its own PE
    assert "holds task 4" in refused(TABLE, [[[DOWN_0, ROUTE, UP_0, UP_1, DOWN_1, COMBINE]]], 1, 15)


def test_look_ahead_must_not_be_needed_with_chains():
    # Whether worker 1 finds UP_0 done when it comes to the chain is a matter of timing. If so it starts the chain,
    # and then waits for UP_1, which is behind it in its own list.
    for workers in ([[UP_0], [ROUTE, 4, UP_1]], [[ROUTE, 4, UP_1], [UP_0]]):
        assert "deadlock" in refused(ROWS, [workers], 2, look_ahead=1)


# ---- from policies to lists


def test_replay_lists_may_name_every_task_of_a_chain():
    policy = Policy(name="mine", queue="replay", replay=[[[ROUTE, UP_0, UP_1, 4, 5]]])
    assert to_schedule(policy, ROWS, 1) == [[[ROUTE, UP_0, UP_1, 4]]]


def test_replay_for_another_routing_or_other_sizes_is_refused():
    lists = [[[ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE]]]
    for digests in ([1], [*TABLE.plan_digests, 1]):
        policy = Policy(name="mine", queue="replay", replay=lists, replay_digests=digests)
        with pytest.raises(ScheduleError, match="'mine'"):
            to_schedule(policy, TABLE, 1)
    with pytest.raises(ScheduleError, match="PE 0: lists for 1 workers"):
        to_schedule(Policy(name="mine", queue="replay", replay=lists), TABLE, 2)
    for replay in ([], [*lists, [[0]]]):
        with pytest.raises(ScheduleError, match=f"schedule for {len(replay)} PEs"):
            to_schedule(Policy(name="mine", queue="replay", replay=replay), TABLE, 1)


@pytest.mark.parametrize("queue", ["ticket", "domain", "static"])
def test_orders_in_python_are_dealt_out(queue):
    policy = Policy(name="mine", queue=queue, rank=lambda task: -task.expert)
    # both ups are ready after the route; expert 1 first, then its down
    schedule = to_schedule(policy, TABLE, 2)
    assert schedule == [[[ROUTE, DOWN_1, DOWN_0], [UP_1, UP_0, COMBINE]]]
    assert all(isinstance(task, int) for worker in schedule[0] for task in worker)
    assert np.array_equal(np.concatenate(policy.picks(TABLE)), [ROUTE, UP_1, DOWN_1, UP_0, DOWN_0, COMBINE])
