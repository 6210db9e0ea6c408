"""Several layers in a row: one launch that runs them all, or a launch each. By hand, on both engines.

The plain machine has no latency; an operation takes 1 ns, a byte of weights 100 ps through one CU.
"""

import pytest
from sim.tables import HandPolicy, HandTable, plain_machine

from flashmoe.sim import ENGINES, DeadlockError


@pytest.fixture(params=list(ENGINES))
def run(request):
    """Runs tables, one a layer: run(tables, machine, workers, lists, gap_ps=..., queue=...)."""

    def run_layers(tables, machine=None, workers=1, lists=None, *, gap_ps=None, seed=0, **policy):
        options = {"gap_ps": gap_ps, "seed": seed}
        return ENGINES[request.param](
            tables, machine or plain_machine(), HandPolicy(**policy), workers, lists, **options
        )

    return run_layers


def layer(*tasks, num_pes=1):
    """Independent tasks of one PE after the other: (kind, flops), or (kind, flops, weights), a list a PE."""
    table = HandTable(num_pes)
    for pe, of_pe in enumerate(tasks if num_pes > 1 else [tasks]):
        for kind, flops, *weights in of_pe:
            table.task(kind, pe=pe, flops=flops, weights=sum(weights))
    return table


def starts(records, number):
    return records["start_ps"][records["layer"] == number].tolist()


def test_records_come_layer_by_layer(run):
    records = run([layer(("gate", 1), ("combine", 2)), layer(("gate", 3))])
    assert records["layer"].tolist() == [0, 0, 1]
    assert records["task_id"].tolist() == [0, 1, 0]
    assert records["end_ps"].tolist() == [1_000, 3_000, 6_000]


# --- one launch for all


def test_a_worker_goes_on_and_other_pes_need_not(run):
    tables = [layer([("combine", 5)], [("combine", 9)], num_pes=2), layer([("gate", 1)], [("gate", 1)], num_pes=2)]
    records = run(tables)
    assert starts(records, 1) == [5_000, 9_000]  # PEs drift apart


def test_a_layer_waits_for_all_that_the_layer_before_left_on_its_pe(run):
    tables = [layer(("combine", 5), ("combine", 9)), layer(("gate", 1), ("gate", 1))]
    records = run(tables, plain_machine(num_domains=2, signal_ps=600, signal_near_ps=100), workers=2)
    # worker 0 is through at 5 ns, and sees the other domain's output at 9.6; worker 1 sees its own at once
    assert starts(records, 1) == [9_600, 9_000]
    assert records["ready_ps"][2:].tolist() == [9_600, 9_000]


def test_only_what_nothing_follows_is_output(run):
    first = HandTable()
    event = first.event("upped")
    first.task("up", flops=2, signals=(event,))
    first.task("down", flops=1, waits=(event,))
    first.task("up", flops=9, signals=(first.event("upped"),))  # nobody waits for it, but it signals
    records = run([first, layer(("gate", 1))], workers=3)
    assert starts(records, 1) == [3_000]


def test_tasks_of_later_stages_have_inputs_of_their_own(run):
    second = HandTable()
    second.task("route", flops=1, signals=(second.plan(),))
    second.task("up", flops=1, waits=(second.plan(),))
    records = run([layer(("combine", 5)), second], workers=2)
    assert starts(records, 1) == [5_000, 6_000]
    assert records["ready_ps"][1:].tolist() == [5_000, 6_000]


def test_weights_of_the_next_layer_stream_while_its_input_is_waited_for(run):
    tables = [layer(("combine", 9)), layer(("gate", 1), ("gate", 1, 30))]
    early = run(tables, workers=2)[2]
    assert (early["ticket_ps"], early["loaded_ps"], early["start_ps"], early["end_ps"]) == (0, 3_000, 9_000, 10_000)
    late = run(tables, plain_machine(prefetch=False), workers=2)[2]
    assert (late["start_ps"], late["end_ps"]) == (9_000, 12_000)


def test_who_has_nothing_to_do_learns_so_from_the_plan(run):
    first = HandTable()
    first.task("route", flops=4, signals=(first.plan(),))
    first.task("combine", flops=5)
    records = run([first, layer(("gate", 1), ("gate", 1), ("gate", 1, 30))], workers=3)
    # worker 2 stays until the plan is there at 4 ns, and then streams
    assert records["ticket_ps"][4] == 4_000
    assert records["loaded_ps"][4] == 7_000


def test_equal_layers_take_equal_times(run):
    tables = [layer(("gate", 1, 20), ("combine", 2)) for _ in range(5)]
    ends = run(tables, plain_machine(prefetch=False))["end_ps"]
    assert ends[1::2].tolist() == [4_000 * number for number in range(1, 6)]


def test_a_pe_without_outputs_does_not_wait(run):
    tables = [layer([("combine", 5)], [], num_pes=2), layer([("gate", 1)], [("gate", 1)], num_pes=2)]
    assert starts(run(tables), 1) == [5_000, 0]


def test_the_launch_ramp_comes_once(run):
    machine = plain_machine(launch_ps=700, launch_step_ps=50)
    records = run([layer(("combine", 1), ("combine", 1)), layer(("gate", 1), ("gate", 1))], machine, workers=2)
    assert starts(records, 0) == [700, 750]
    assert starts(records, 1) == [1_750, 1_750]


def test_the_layers_of_a_push_queue(run):
    tables = [layer(("gate", 1), ("combine", 2)), layer(("gate", 3), ("combine", 4))]
    # the second layer's combine waits for nothing but the plan, which nobody signals
    assert run(tables, queue="push")["end_ps"].tolist() == [1_000, 3_000, 6_000, 10_000]


def test_replay_has_lists_for_every_layer(run):
    tables = [layer(("gate", 1), ("gate", 2)), layer(("gate", 3), ("gate", 4))]
    records = run(tables, workers=2, queue="replay", lists=[[[[1], [0]]], [[[0, 1], []]]])
    assert records["worker"].tolist() == [1, 0, 0, 0]
    assert records["end_ps"].tolist() == [1_000, 2_000, 5_000, 9_000]


def test_jitter_differs_from_layer_to_layer(run):
    table = layer(*[("gate", 1_000)] * 20)
    records = run([table, table], plain_machine(jitter=0.3), seed=1, gap_ps=0)
    durations = (records["end_ps"] - records["start_ps"]).reshape(2, 20)
    assert (durations[0] != durations[1]).all()


# --- a launch each


def test_a_launch_follows_the_last_worker_the_gap_and_the_ramp(run):
    machine = plain_machine(launch_ps=700, launch_step_ps=50)
    tables = [layer(("combine", 5), ("combine", 1)), layer(("gate", 1), ("gate", 1)), layer(("gate", 1))]
    records = run(tables, machine, workers=2, gap_ps=2_000)
    assert starts(records, 0) == [700, 750]
    # 5.7 ns, 2 ns between, 0.7 ns launch; the second worker 50 ps later
    assert starts(records, 1) == [8_400, 8_450]
    # which ends at 9.45
    assert starts(records, 2) == [9_450 + 2_700]


def test_pes_are_launched_on_their_own(run):
    tables = [layer([("combine", 5)], [("combine", 9)], num_pes=2), layer([("gate", 1)], [("gate", 1)], num_pes=2)]
    assert starts(run(tables, gap_ps=1_000), 1) == [6_000, 10_000]


def test_no_weights_stream_between_launches(run):
    tables = [layer(("combine", 9)), layer(("gate", 1), ("gate", 1, 30))]
    late = run(tables, workers=2, gap_ps=0)[2]
    assert (late["asked_ps"], late["start_ps"], late["loaded_ps"], late["end_ps"]) == (9_000, 9_000, 12_000, 12_000)


def test_a_worker_that_was_launched_needs_no_plan_to_leave(run):
    first = HandTable()
    first.task("route", flops=4, signals=(first.plan(),))
    records = run([first, layer(("gate", 1))], workers=2, gap_ps=0)
    assert starts(records, 1) == [4_000]


def test_a_layer_of_nothing_takes_its_launch(run):
    records = run([HandTable(), HandTable(), layer(("gate", 1))], plain_machine(launch_ps=100), gap_ps=1_000)
    assert starts(records, 2) == [100 + 2 * 1_100]


# --- what must not hang


def test_a_deadlock_in_a_later_layer_says_which(run):
    second = HandTable()
    never = second.event("upped")
    second.task("gate", flops=1, waits=(never,), signals=(never,))
    message = r"1 of 2 tasks have not run\n  PE 0 worker 0 holds task 0 of PE 0: gate, which waits for upped event 1"
    with pytest.raises(DeadlockError, match=message):
        run([layer(("combine", 5)), second])


def test_a_deadlock_before_a_layer_names_the_layer_before(run):
    first = HandTable()
    never = first.event("upped")
    first.task("combine", flops=1)
    first.task("combine", flops=1, waits=(never,))
    first.task("down", waits=(never,), signals=(never,))
    with pytest.raises(DeadlockError) as error:
        run([first, layer(("gate", 1), ("gate", 1), ("gate", 1), ("gate", 1))], workers=4)
    assert "worker 0 holds task 0 of PE 0: gate, which waits for the end of layer 0 on PE 0: seen 1, wanted 2" in str(
        error.value
    )
