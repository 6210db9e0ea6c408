"""Schedules: complete, once each, and free of deadlock, or refused with the reason."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BUILT_IN_POLICIES, layers, routing_from

from flashmoe.model import MoEModel
from flashmoe.policy import Policy, resolve
from flashmoe.schedule import ScheduleError, check_order, check_policy, check_schedule, to_schedule
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
    assert message.endswith("in no worker's list (1 of 6 picks missing: 5)")
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


def cycle_of(check, *args, **kwargs):
    with pytest.raises(ScheduleError) as error:
        check(*args, **kwargs)
    cycle = error.value.cycle
    shown = "\n".join(["a cycle of waits:", *map(str, cycle), f"task {cycle[0].task_id} of PE {cycle[0].pe} again"])
    assert str(error.value).endswith(shown)
    return [(wait.pe, wait.task_id, wait.kind, wait.why) for wait in cycle]


def test_a_cycle_goes_from_task_to_task():
    upped = "waits for upped[{}] on PE 0, to be signalled by"
    assert cycle_of(check_schedule, TABLE, [[[ROUTE, DOWN_0, UP_1], [DOWN_1, UP_0, COMBINE]]], 2) == [
        (0, DOWN_0, "down", upped.format(0)),
        (0, UP_0, "up", "is not taken: worker 1 holds"),
        (0, DOWN_1, "down", upped.format(1)),
        (0, UP_1, "up", "is not taken: worker 0 holds"),
    ]
    # both workers of a counter hold a down, and neither takes the next rank
    cycle = cycle_of(check_order, TABLE, [[ROUTE, DOWN_0, DOWN_1, UP_0, UP_1, COMBINE]], 2)
    assert cycle == [
        (0, DOWN_1, "down", upped.format(1)),
        (0, UP_1, "up", "is not taken: all 2 workers of PE 0 hold tasks that wait, such as"),
    ]


def test_a_cycle_may_lead_through_pes():
    # PE 0 sends its token only after the combine, which needs PE 1's part
    assert [step[:3] for step in cycle_of(check_schedule, PAIR, [[[1, 3, 4, 5, 2]], [[0, 1, 2]]], 1)] == [
        (0, 5, "combine"),
        (1, 2, "down"),
        (1, 1, "up"),
        (0, 2, "dispatch"),
    ]


def test_a_cycle_may_lead_through_a_chain():
    assert cycle_of(check_schedule, ROWS, [[[ROUTE, UP_0, 4, UP_1]]], 1) == [
        (0, 5, "down", "waits for upped[1] on PE 0, to be signalled by"),
        (0, UP_1, "up", "is not taken: worker 0 holds"),
    ]


def test_an_event_that_nobody_completes_is_no_cycle():
    table = TaskTable(MODEL, routing_from([[[0, 1]]], 2), gate=False)
    table.event_target = table.event_target.copy()
    table.event_target[table.wait_event[int(table.wait_ptr[table.row(0, DOWN_1)])]] += 1
    with pytest.raises(ScheduleError, match=r"upped\[1\] on PE 0: seen 1, wanted 2") as error:
        check_schedule(table, [[[ROUTE, UP_0, UP_1, DOWN_0, DOWN_1, COMBINE]]], 1)
    assert error.value.cycle == []


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


def test_what_depends_on_look_ahead_and_is_too_large_to_try_is_refused():
    # 40 tokens on 8 workers: a combine before the last down gets through only if somebody looks past it in time
    routing = routing_from([[[0, 1]] * 40], 2)
    table = TaskTable(MODEL, routing, Tiling(down_rows=2, block_tokens=4), gate=False)
    order = table.order("phase")[0].tolist()
    kinds = [KINDS[table.tasks["kind"][table.row(0, task_id)]] for task_id in order]
    first_up, first_down = kinds.index("up"), kinds.index("down")
    downs_first = [
        *order[:first_up],
        *order[first_down : first_down + 8],
        *order[first_up:first_down],
        *order[first_down + 8 :],
    ]
    with pytest.raises(ScheduleError) as error:
        check_order(table, [downs_first], 8, look_ahead=2)
    message = str(error.value)
    assert message.startswith("not proven: gets through only if look_ahead=2 comes in time; without it 8 workers would")
    assert error.value.cycle
    check_order(table, [downs_first], 9, look_ahead=2)  # with one worker more no look-ahead is needed


# ---- policies


@settings(max_examples=20, deadline=None, derandomize=True)
@given(layer=layers(max_tokens=4), num_workers=st.sampled_from([1, 2, 7]), num_domains=st.sampled_from([1, 2, 3]))
def test_built_in_policies_never_deadlock(layer, num_workers, num_domains):
    table = TaskTable(*layer)
    for name in BUILT_IN_POLICIES:
        check_policy(resolve(name, layer[2]), table, num_workers, num_domains=num_domains)


class Ordered(Policy):
    """A policy whose order is what a test says."""

    def picks(self, table):
        return [np.array(ids, np.uint32) for ids in ORDERS_BY_NAME[self.name]]


ORDERS_BY_NAME = {
    "backwards": [[COMBINE, DOWN_1, DOWN_0, UP_1, UP_0, ROUTE]],
    "short": [[ROUTE, UP_0, UP_1, DOWN_0, COMBINE]],
    "chain first": [[ROUTE, 4, UP_0, UP_1]],
}


@pytest.mark.parametrize("queue", ["ticket", "domain", "static", "push"])
def test_orders_are_checked_by_the_queues_rules(queue):
    with pytest.raises(ScheduleError, match=r"^policy 'short': task 5 of PE 0: .* missing: 5\)$"):
        check_policy(Ordered(name="short", queue=queue), TABLE, 2)
    backwards, chain_first = (Ordered(name=name, queue=queue) for name in ("backwards", "chain first"))
    if queue == "push":
        check_policy(backwards, TABLE, 2)  # picks are queued as they become ready, whatever their rank
        with pytest.raises(ScheduleError, match=r"'chain first': task 4 .* waits in the push queue for upped\[0\]"):
            check_policy(chain_first, ROWS, 3)
        return
    with pytest.raises(ScheduleError, match=r"^policy 'backwards': deadlock: 2 workers would wait for ever"):
        check_policy(backwards, TABLE, 2, num_domains=2)
    check_policy(chain_first, ROWS, 3, num_domains=1)


def test_orders_for_other_sizes_are_named():
    with pytest.raises(ScheduleError, match=r"orders for 2 PEs \(the layer has 1\)"):
        check_order(TABLE, [[], []], 1)
    with pytest.raises(ScheduleError, match=r"^PE 0 rank 2: task 9 is not a task of this PE \(1\.\.6\)"):
        check_order(TABLE, [[ROUTE, UP_0, 9]], 1)
    with pytest.raises(ScheduleError, match=r"listed twice, for rank 0 and rank 2 \(wanted once\)"):
        check_order(TABLE, [[ROUTE, UP_0, ROUTE]], 1)


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


# ---- lists from functions


def made_by(make_lists):
    return Policy(name="mine", queue="replay", replay=make_lists)


def test_a_function_is_asked_once_with_the_tasks_and_the_workers():
    asked = []

    def make_lists(table, num_workers):
        asked.append((table, num_workers))
        return ((np.array([ROUTE, UP_1, DOWN_1]), (UP_0, DOWN_0, COMBINE)),)

    schedule = to_schedule(made_by(make_lists), TABLE, 2)
    assert schedule == [[[ROUTE, UP_1, DOWN_1], [UP_0, DOWN_0, COMBINE]]]
    assert all(type(task) is int for worker in schedule[0] for task in worker)
    assert asked == [(TABLE, 2)]


@pytest.mark.parametrize(
    ("lists", "named"),
    [
        (None, r"schedule: None \(must be a list: \[pe\]\[worker\]\[turn\] of task ids\)"),
        ([], r"schedule for 0 PEs \(the layer has 1\)"),
        ([7], r"PE 0: 7 \(must be a list"),
        ([[[ROUTE], 3]], r"PE 0 worker 1: 3 \(must be a list"),
        ([[[ROUTE, "up"]]], r"PE 0 worker 0 turn 1: 'up' \(must be a task id\)"),
        ([[[ROUTE, 2.5]]], r"PE 0 worker 0 turn 1: 2.5 \(must be a task id\)"),
        ([[[ROUTE]]], r"PE 0: lists for 1 workers \(there are 2\)"),
        ([[[DOWN_0, ROUTE, UP_0, UP_1, DOWN_1, COMBINE], []]], "deadlock: 1 workers would wait for ever"),
    ],
)
def test_what_functions_return_is_checked(lists, named):
    with pytest.raises(ScheduleError, match=f"^policy 'mine': {named}"):
        to_schedule(made_by(lambda table, num_workers: lists), TABLE, 2)


def test_what_a_function_raises_is_its_own():
    with pytest.raises(ZeroDivisionError):
        to_schedule(made_by(lambda table, num_workers: 1 // 0), TABLE, 2)
