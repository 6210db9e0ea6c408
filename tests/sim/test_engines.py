"""Both engines on small tables: every time below is worked out by hand.

The plain machine has no latency at all, and a byte of weights takes 100 ps through one CU (10 of 100 GB/s).
"""

import numpy as np
import pytest
from sim.tables import HandPolicy, HandTable, plain_machine, run_engine

from flashmoe.sim import ENGINES, DeadlockError


@pytest.fixture(params=list(ENGINES))
def run(request):
    """Runs a table on an engine: run(table, machine, workers, lists, pe_speed=..., queue=..., look_ahead=...)."""
    return lambda *arguments, **options: run_engine(request.param, *arguments, **options)


def streams(sizes, num_pes=1):
    """A table of independent tasks with these weights [bytes], the same on each PE."""
    table = HandTable(num_pes)
    for pe in range(num_pes):
        for size in sizes:
            table.task("up", pe=pe, weights=size)
    return table


def order_of(records):
    """Task ids in the order in which they started."""
    return records["task_id"][np.argsort(records["start_ps"], kind="stable")].tolist()


@pytest.mark.parametrize("queue", ["ticket", "domain", "static"])
def test_one_worker_takes_the_sum_of_its_tasks(run, queue):
    records = run(streams([10, 20, 30]), queue=queue)
    assert records["start_ps"].tolist() == [0, 1_000, 3_000]
    assert records["end_ps"].tolist() == [1_000, 3_000, 6_000]
    assert records["hbm_bytes"].tolist() == [10, 20, 30]


@pytest.mark.parametrize("queue", ["ticket", "static"])
@pytest.mark.parametrize(("num_tasks", "workers"), [(1, 4), (8, 4), (9, 4), (12, 5)])
def test_identical_tasks_take_whole_rounds(run, queue, num_tasks, workers):
    records = run(streams([10] * num_tasks), workers=workers, queue=queue)
    assert records["end_ps"].max() == -(-num_tasks // workers) * 1_000


def test_more_workers_than_the_memory_feeds_share_it(run):
    # 20 workers at 10 GB/s would need 200 of 100 GB/s: each gets 5, so 10 bytes take 2 ns
    assert run(streams([10] * 20), workers=20)["end_ps"].tolist() == [2_000] * 20


def test_pes_have_their_own_memory_unless_they_share_a_host(run):
    apart = run(streams([10] * 10, num_pes=2), workers=10)
    assert set(apart["end_ps"].tolist()) == {1_000}
    together = run(streams([10] * 10, num_pes=2), host(num_cores=20), workers=10)
    assert set(together["end_ps"].tolist()) == {2_000}


def test_a_task_takes_the_slower_of_weights_and_arithmetic_then_its_fixed_part(run):
    table = HandTable()
    table.task("up", weights=10, flops=3)  # 1 ns of weights, 3 ns of arithmetic
    table.task("up", weights=50, flops=3, io=4)  # 5 ns of weights, 3 + 4 ns with activations
    records = run(table, plain_machine(up_overhead_ps=70, prefetch=False))
    assert records["end_ps"].tolist() == [3_070, 10_140]


def test_the_next_weights_stream_while_a_task_runs(run):
    table = HandTable()
    table.task("up", weights=10, flops=3)
    table.task("up", weights=50, flops=3, io=4)
    records = run(table, plain_machine(up_overhead_ps=70))
    # the first weights are there at 1 ns: then the second pick is taken, and its weights are there at 6 ns
    assert records["ticket_ps"].tolist() == [0, 1_000]
    assert records["start_ps"].tolist() == [0, 3_070]
    assert records["end_ps"].tolist() == [3_070, 3_070 + 7_000 + 70]


@pytest.mark.parametrize("duration_ns", [1, 3, 32, 8_192])  # on and off the edges of a timing wheel
def test_at_one_moment_memory_comes_first_and_then_what_was_planned_first(run, duration_ns):
    table = HandTable()
    table.task("gate", flops=duration_ns)  # planned for then from the start
    table.task("gate", weights=10 * duration_ns)  # its weights are there first, but its worker only wakes up then
    table.task("dispatch", flops=duration_ns)  # a little later: perhaps in the same slot of the wheel
    for _ in range(2):
        table.task("gate", flops=1)
    records = run(table, plain_machine(prefetch=False, dispatch_overhead_ps=100), workers=3, queue="ticket")
    assert records["end_ps"].tolist()[:2] == [1_000 * duration_ns] * 2
    assert records["worker"].tolist() == [0, 1, 2, 0, 1]


# --- hosts


def host(**overrides):
    return plain_machine(prefetch=False, **{"num_cores": 1, **overrides})


def arithmetic(flops):
    table = HandTable()
    for count in flops:
        table.task("up", flops=count)
    return table


def test_workers_without_a_core_wait_for_one(run):
    assert run(arithmetic([2, 2]), host(), workers=2)["end_ps"].tolist() == [2_000, 4_000]
    assert run(arithmetic([2, 2]), host(num_cores=2), workers=2)["end_ps"].tolist() == [2_000, 2_000]


def test_a_worker_keeps_its_core_for_a_slice(run):
    # worker 0 has tasks 0 and 2
    assert run(arithmetic([2] * 4), host(slice_ps=1_000), workers=2)["end_ps"].tolist() == [2_000, 4_000, 6_000, 8_000]
    assert run(arithmetic([2] * 4), host(slice_ps=5_000), workers=2)["end_ps"].tolist() == [2_000, 6_000, 4_000, 8_000]


def test_who_waits_for_an_input_needs_no_core(run):
    records = run(waiting_table(), host(signal_ps=500), workers=2)
    # 5 ns of up; then the input is seen; 3 ns of weights, which nobody loaded before
    assert records["start_ps"].tolist() == [0, 5_500]
    assert records["end_ps"].tolist() == [5_000, 8_500]


def test_bookkeeping_lies_between_tasks(run):
    assert run(arithmetic([1, 1]), host(gap_ps=100))["start_ps"].tolist() == [0, 1_100]


def test_workers_start_domain_by_domain_and_one_after_the_other(run):
    machine = plain_machine(num_domains=2, launch_ps=700, launch_domain_ps=40, launch_step_ps=100)
    records = run(arithmetic([1] * 5), machine, workers=5)
    # workers 0, 2, 4 are domain 0, workers 1, 3 domain 1
    assert records["start_ps"].tolist() == [700, 740, 800, 840, 900]
    assert records["domain"].tolist() == [0, 1, 0, 1, 0]


# --- what a task costs


def test_matrix_tiles_are_padded(run):
    table = HandTable()
    table.task("up", tokens=3, rows=5, flops=3 * 5 * 4)
    table.task("gate", tokens=3, flops=60)  # no matrix product
    # 4 x 8 of 3 x 5 cells, 4 operations each
    assert run(table, plain_machine(matrix_tokens=4, matrix_rows=8))["end_ps"].tolist() == [128_000, 188_000]


def test_a_slow_pe_streams_and_computes_slowly_and_sends_as_fast_as_others(run):
    table = HandTable(num_pes=2)
    for pe in (0, 1):
        table.task("dispatch", pe=pe, flops=3, signals=((table.plan(1 - pe), 8),))
        table.task("gate", pe=pe, weights=10)
    machine = plain_machine(dispatch_overhead_ps=100, store_bytes_per_ns=4.0, ticket_service_ps=7, prefetch=False)
    records = run(table, machine, workers=1, queue="ticket", pe_speed=[0.5, 1.0])
    durations = records["end_ps"] - records["start_ps"]
    assert durations.tolist() == [6_000 + 200 + 2_000, 2_000, 3_000 + 100 + 2_000, 1_000]
    assert records["ticket_ps"].tolist() == [7, 8_214, 7, 5_114]


def test_the_parts_of_a_task_are_in_its_record(run):
    table = HandTable(num_pes=2)
    gated = table.event("gated")
    table.task("gate", flops=3, signals=(gated,))
    table.task("dispatch", weights=20, flops=5, waits=(gated,), signals=((table.plan(1), 8),))
    machine = plain_machine(prefetch=False, ticket_service_ps=7, dispatch_overhead_ps=100, store_bytes_per_ns=4.0)
    dispatch = run(table, machine, queue="ticket")[1]
    # asked for at 3007, there at 3014; 2 ns of weights beside 5 of arithmetic, 100 ps, 2 ns of stores
    columns = ("asked_ps", "ticket_ps", "ready_ps", "start_ps", "loaded_ps", "done_ps", "end_ps")
    assert [int(dispatch[name]) for name in columns] == [3_007, 3_014, 3_007, 3_014, 5_014, 8_014, 10_114]


def test_jitter_belongs_to_the_task_whoever_runs_it(run):
    machine = plain_machine(jitter=0.5, gate_overhead_ps=0)
    table = arithmetic([1000] * 40)
    alone = run(table, machine, workers=1)
    crowd = run(table, machine, workers=7, queue="ticket")
    durations = alone["end_ps"] - alone["start_ps"]
    assert durations.tolist() == (crowd["end_ps"] - crowd["start_ps"]).tolist()
    assert len(set(durations.tolist())) > 30


def test_jitter_has_the_mean_that_it_is_said_to_have(run):
    records = run(arithmetic([1000] * 4000), plain_machine(jitter=0.3), workers=100)
    factors = (records["done_ps"] - records["start_ps"]) / 1e6
    # standard errors: of the mean 0.31 / sqrt(4000) = 0.005, of the deviation 0.3 / sqrt(8000) = 0.0034
    assert factors.mean() == pytest.approx(1.0, abs=0.015)
    assert np.log(factors).std() == pytest.approx(0.3, abs=0.012)


def test_a_stall_is_extra_time(run):
    certain = run(arithmetic([2, 3]), plain_machine(stall_probability=1.0, stall_ps=500))
    assert certain["end_ps"].tolist() == [2_500, 6_000]
    records = run(arithmetic([1] * 2000), plain_machine(stall_probability=0.1, stall_ps=500), workers=10)
    stalled = (records["end_ps"] - records["start_ps"]) == 1_500
    assert set((records["end_ps"] - records["start_ps"]).tolist()) == {1_000, 1_500}
    assert stalled.mean() == pytest.approx(0.1, abs=0.03)  # standard error 0.007


# --- waiting


def waiting_table():
    """A `down` with weights that waits for an `up` of 5 ns; both are tasks of one PE."""
    table = HandTable()
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    table.task("down", weights=30, flops=1, waits=(ready,))
    return table


def test_weights_stream_while_the_inputs_are_waited_for(run):
    records = run(waiting_table(), plain_machine(signal_ps=500), workers=2)
    down = records[1]
    assert (down["ticket_ps"], down["ready_ps"], down["start_ps"]) == (0, 5_500, 5_500)
    assert down["end_ps"] == 6_500  # its 3 ns of weights were there long ago


def test_without_prefetch_weights_wait_for_the_inputs(run):
    records = run(waiting_table(), plain_machine(signal_ps=500, prefetch=False), workers=2)
    assert records["end_ps"].tolist() == [5_000, 8_500]


def test_a_worker_sees_its_own_signals_at_once(run):
    records = run(waiting_table(), plain_machine(signal_ps=500), workers=1)
    assert records["ready_ps"][1] == records["start_ps"][1] == 5_000


def test_signals_are_seen_sooner_in_the_own_domain(run):
    table = HandTable()
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    for _ in range(3):
        table.task("down", flops=1, waits=(ready,))
    # workers 0 and 2 are of one domain, 1 and 3 of the other
    records = run(table, plain_machine(num_domains=2, signal_ps=900, signal_near_ps=300), workers=4)
    assert records["ready_ps"].tolist() == [0, 5_900, 5_300, 5_900]
    assert records["start_ps"].tolist() == [0, 5_900, 5_300, 5_900]


@pytest.mark.parametrize(
    ("signal_ps", "seen_ps"),
    [
        (400, 6_000),  # the other domain's signal has landed: the own one is seen at once
        (2_000, 7_000),  # it is still on its way
    ],
)
def test_an_own_signal_is_not_enough_while_another_is_on_its_way(run, signal_ps, seen_ps):
    table = HandTable()
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    table.task("up", flops=6, signals=(ready,))
    table.task("down", flops=1, waits=(ready,))
    lists = [[[0], [1, 2]]]
    machine = plain_machine(num_domains=2, signal_ps=signal_ps, signal_near_ps=100)
    records = run(table, machine, workers=2, queue="replay", lists=lists)
    assert records["ready_ps"][2] == records["start_ps"][2] == seen_ps


def test_a_signal_is_seen_when_the_last_one_lands_whichever_was_made_last(run):
    table = HandTable(num_pes=2)
    result = table.event("result", 0)
    table.task("up", pe=0, flops=5, signals=(result,))
    table.task("combine", pe=0, flops=1, waits=(result,))
    table.task("down", pe=1, flops=2, signals=((result, 10),))
    # the down is over at 2 ns and its message lands at 2 + 10 + 3; the own signal, of 5 ns, is seen at once
    records = run(table, plain_machine(put_ps=3_000, signal_ps=700), workers=1)
    assert records["start_ps"][1] == records["ready_ps"][1] == 15_000
    # a faster link: it lands at 2.1 ns
    records = run(table, plain_machine(link_bytes_per_ns=100.0, signal_ps=700), workers=1)
    assert records["start_ps"][1] == 5_000


def test_signals_take_longer_while_memory_is_busy(run):
    table = waiting_table()
    table.task("up", weights=1000)
    # the waiting task's own weights are there by then: one stream of 10 GB/s runs when the signal leaves
    records = run(table, plain_machine(signal_ps=1_000, signal_load_factor=5.0), workers=3)
    assert records["ready_ps"][1] == 5_000 + 1_400  # 1 + 4 * 10 % of the memory's bandwidth


def test_weights_of_later_stages_wait_for_the_plan_and_those_of_stage_a_do_not(run):
    table = HandTable()
    routed = table.event("routed")
    table.task("route", flops=4, signals=(routed, table.plan()))
    table.task("dispatch", weights=20, waits=(routed,))
    table.task("down", weights=20, waits=(routed,))
    records = run(table, workers=3)
    assert records["end_ps"].tolist() == [4_000, 4_000, 6_000]


def test_a_worker_streams_for_one_task_at_a_time(run):
    table = HandTable()
    routed = table.event("routed")
    table.task("route", flops=1, signals=(routed,))
    table.task("dispatch", weights=20, waits=(routed,))
    table.task("dispatch", weights=20, waits=(routed,))
    # worker 1 holds both dispatches from 0 on: 2 ns each, one after the other
    records = run(table, queue="replay", lists=[[[0], [1, 2]]], workers=2, look_ahead=1)
    assert records["end_ps"].tolist() == [1_000, 2_000, 4_000]


def test_a_chain_runs_in_order_without_returning_to_the_queue(run):
    table = HandTable()
    first, second = table.event("upped"), table.event("upped")
    table.task("up", flops=1, signals=(first,))
    table.task("up", flops=9, signals=(second,))
    table.task("down", flops=2, waits=(first,), chain=2)
    table.task("down", flops=2, weights=10, waits=(second,), chain=0)
    table.task("combine", flops=1)
    records = run(table, workers=3, queue="ticket")
    assert records["start_ps"].tolist() == [0, 0, 1_000, 9_000, 1_000]
    assert records["worker"].tolist() == [0, 1, 2, 2, 0]
    assert records["ticket_ps"][3] == 1_000  # reached when the task before it had its weights, of which it has none


# --- queues


def test_a_ticket_counter_serves_one_worker_at_a_time(run):
    machine = plain_machine(ticket_service_ps=100, ticket_ps=30)
    records = run(streams([10] * 4), machine, workers=4, queue="ticket")
    assert records["ticket_ps"].tolist() == [130, 230, 330, 430]


def test_a_counter_shared_by_domains_has_its_own_cost(run):
    machine = plain_machine(num_domains=2, ticket_far_service_ps=200, ticket_far_ps=5)
    assert run(streams([10] * 2), machine, workers=2, queue="ticket")["ticket_ps"].tolist() == [205, 405]
    # a single worker makes a single domain
    assert run(streams([10]), machine, workers=1, queue="ticket")["ticket_ps"].tolist() == [0]


def test_static_gives_every_wth_task_to_a_worker(run):
    records = run(streams([10, 50, 10, 10, 10]), workers=2, queue="static")
    assert records["worker"].tolist() == [0, 1, 0, 1, 0]
    assert records["start_ps"].tolist() == [0, 0, 1_000, 5_000, 2_000]


def test_domains_own_every_dth_task_and_steal_from_the_next_when_done(run):
    machine = plain_machine(num_domains=2, ticket_service_ps=0, ticket_far_service_ps=100)
    # Domain 0 owns tasks 0 2 4 6 (worker 0), domain 1 owns 1 3 5 (worker 1). Worker 1 ends its three at 3 ns,
    # finds its counter exhausted, looks at the other one (100 ps) and steals task 2 (100 ps) from worker 0, which is
    # at task 0 until 10 ns; and on.
    records = run(streams([100, 10, 10, 10, 10, 10, 10]), machine, workers=2, queue="domain")
    assert records["worker"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert records["domain"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert records["ticket_ps"].tolist() == [0, 0, 3_200, 1_000, 4_400, 2_000, 5_600]


def test_stealing_goes_to_the_next_domain_not_to_the_first(run):
    machine = plain_machine(num_domains=3)
    # each domain owns two tasks; the worker of domain 1 is done at 1 ns and robs domain 2 before domain 0
    records = run(streams([100, 5, 100, 10, 5, 10]), machine, workers=3, queue="domain")
    assert records["worker"].tolist() == [0, 1, 2, 1, 1, 1]
    assert records["start_ps"].tolist() == [0, 0, 0, 2_000, 500, 1_000]


def test_replay_follows_its_lists(run):
    records = run(streams([10] * 4), workers=2, queue="replay", lists=[[[3, 0], [2, 1]]])
    assert records["worker"].tolist() == [0, 1, 1, 0]
    assert records["start_ps"].tolist() == [1_000, 1_000, 0, 0]


# --- look-ahead


def look_ahead_table():
    """gate 0 (9 ns) - route 1; gate 2 (1 ns)."""
    table = HandTable()
    gated = table.event("gated")
    table.task("gate", flops=9, signals=(gated,))
    table.task("route", flops=1, waits=(gated,))
    table.task("gate", flops=1)
    table.task("up", flops=1)
    return table


def test_without_look_ahead_a_worker_waits_for_its_oldest_pick(run):
    records = run(look_ahead_table(), workers=2, queue="ticket")
    assert records["start_ps"].tolist() == [0, 9_000, 9_000, 10_000]


def test_look_ahead_runs_what_is_ready_meanwhile(run):
    records = run(look_ahead_table(), plain_machine(prefetch=False), workers=2, queue="ticket", look_ahead=1)
    assert records["worker"].tolist() == [0, 1, 1, 1]
    # worker 1 holds the route from 0 on, takes the gate, and once that is done the up
    assert records["ticket_ps"].tolist() == [0, 0, 0, 1_000]
    assert records["start_ps"].tolist() == [0, 9_000, 0, 1_000]


def test_the_oldest_ready_pick_goes_first(run):
    table = HandTable()
    first, second = table.event("gated"), table.event("gated")
    table.task("gate", flops=5, signals=(first, second))
    table.task("route", flops=1, waits=(first,))
    table.task("route", flops=1, waits=(second,))
    table.task("route", flops=1, waits=(second,))
    records = run(table, workers=2, queue="replay", lists=[[[0], [3, 1, 2]]], look_ahead=2)
    assert records["start_ps"].tolist() == [0, 6_000, 7_000, 5_000]


def test_who_waits_for_another_pe_takes_no_more(run):
    table = HandTable()
    gated = table.event("gated")
    table.task("gate", flops=9, signals=(gated,))
    table.task("up", flops=1, waits=(gated,))  # an up waits for other PEs, whatever its event
    table.task("gate", flops=1)
    records = run(table, workers=2, queue="ticket", look_ahead=3)
    assert records["start_ps"].tolist() == [0, 9_000, 9_000]


def test_a_down_that_cannot_be_decoded_yet_takes_no_more(run):
    table = HandTable()
    upped = table.event("upped")
    table.task("route", flops=9, signals=(table.plan(),))
    table.task("up", flops=1, signals=(upped,))
    table.task("down", flops=1, waits=(upped,))
    table.task("gate", flops=1)
    records = run(table, workers=2, queue="replay", lists=[[[0, 1], [2, 3]]], look_ahead=1)
    assert records["start_ps"].tolist() == [0, 9_000, 10_000, 9_000]  # the gate once the plan is there


# --- push


def push_table():
    """Two gates, their routes, two ups after the plan, a down each, two combines."""
    table = HandTable()
    gated = [table.event("gated") for _ in range(2)]
    upped = [table.event("upped") for _ in range(2)]
    results = [table.event("result") for _ in range(2)]
    for block in range(2):
        table.task("gate", flops=1, signals=(gated[block],))
    for block in range(2):
        table.task("route", flops=1, waits=(gated[block],), signals=(table.plan(),))
    for block in range(2):
        table.task("up", flops=1, waits=(table.plan(),), signals=(upped[block],))
    for block in range(2):
        table.task("down", flops=1, waits=(upped[block],), signals=(results[1 - block],))
    for token in range(2):
        table.task("combine", flops=1, waits=(table.plan(), results[token]))
    return table


def test_push_with_one_worker_runs_in_the_order_of_pushing(run):
    machine = plain_machine(signal_ps=10**6)  # a worker needs no signal to see its own slots
    assert order_of(run(push_table(), machine, queue="push")) == list(range(10))


def test_push_pays_a_fetch_and_add_for_each_append_and_each_ticket(run):
    machine = plain_machine(ticket_service_ps=100, ticket_ps=20)
    records = run(push_table(), machine, queue="push")
    # one append for both tasks at launch, then the ticket
    assert records["ticket_ps"][0] == 240
    # task 0 ends at 1240, appends route 2 until 1360, ticket until 1480
    assert records["ticket_ps"][1] == 1_480


def test_push_shows_a_slot_to_other_workers_a_signal_later(run):
    table = HandTable()
    table.task("gate", flops=9)
    table.task("gate", flops=1)
    records = run(table, plain_machine(signal_ps=700), workers=2, queue="push")
    # worker 0 appends both at launch, so worker 1 has the first ticket
    assert records["worker"].tolist() == [1, 0]
    assert records["start_ps"].tolist() == [700, 0]


def test_push_appends_ready_groups_in_sequence_only(run):
    table = HandTable()
    results = [table.event("result") for _ in range(2)]
    table.task("route", flops=1, signals=(table.plan(),))
    table.task("up", flops=9, waits=(table.plan(),), signals=(results[0],))
    table.task("up", flops=2, waits=(table.plan(),), signals=(results[1],))
    table.task("combine", flops=1, waits=(results[0],))
    table.task("combine", flops=1, waits=(results[1],))
    records = run(table, workers=3, queue="push")
    # combine 4 is ready at 3 ns, but nobody looks at it before combine 3 was appended at 10 ns
    assert records["start_ps"].tolist() == [0, 1_000, 1_000, 10_000, 10_000]


def test_push_by_rows_appends_the_chains_with_the_plan(run):
    table = HandTable(down="rows")
    upped = [table.event("upped") for _ in range(2)]
    table.task("route", flops=1, signals=(table.plan(),))
    for block in range(2):
        table.task("up", flops=1 + 4 * block, waits=(table.plan(),), signals=(upped[block],))
    table.task("down", flops=1, waits=(upped[0],), chain=2)
    table.task("down", flops=1, waits=(upped[1],), chain=0)
    records = run(table, workers=3, queue="push")
    assert records["start_ps"].tolist() == [0, 1_000, 1_000, 2_000, 6_000]
    assert records["ticket_ps"][3] == 1_000  # taken before it was ready: it waits for its inputs itself


# --- several PEs


def test_a_put_holds_its_worker_and_its_link_and_lands_later(run):
    table = HandTable(num_pes=2)
    table.task("dispatch", pe=0, signals=((table.plan(1), 100),), peer=1)
    table.task("dispatch", pe=0, signals=((table.plan(1), 100),), peer=1)
    table.task("up", pe=1, weights=10, waits=(table.plan(1),))
    machine = plain_machine(store_bytes_per_ns=4.0, link_bytes_per_ns=2.0, put_ps=1_000)
    records = run(table, machine, workers=2)
    assert records["end_ps"].tolist()[:2] == [25_000, 25_000]  # 100 bytes at 4 GB/s, two workers side by side
    assert records["ready_ps"][2] == 25_000 + 2 * 50_000 + 1_000  # one link: the second message queues
    assert records["end_ps"][2] == 127_000  # an up's weights wait for the plan
    assert records["link_bytes"].tolist() == [100, 100, 0]
    assert records["peer"].tolist() == [1, 1, -1]


def test_messages_of_one_pe_share_its_port(run):
    table = HandTable(num_pes=3)
    for peer in (1, 2):
        table.task("dispatch", pe=0, signals=((table.plan(peer), 100),), peer=peer)
    for pe in (1, 2):
        table.task("up", pe=pe, flops=1, waits=(table.plan(pe),))
    machine = plain_machine(link_bytes_per_ns=2.0, port_bytes_per_ns=4.0, put_ps=1_000)
    records = run(table, machine, workers=2)
    # 100 bytes: 25 ns at a port, 50 on a link; the second head leaves when the port is done with the first message
    assert records["ready_ps"].tolist()[2:] == [51_000, 76_000]


def test_empty_pes_are_fine(run):
    assert len(run(HandTable(num_pes=2), workers=2, queue="push")) == 0


# --- what must not hang


@pytest.mark.parametrize("queue", ["ticket", "static", "domain"])
def test_a_deadlock_names_worker_task_and_event(run, queue):
    table = HandTable()
    never = table.event("upped")
    table.task("down", waits=(never,), chain=1)
    table.task("up", signals=(never,))
    message = (
        r"deadlock at 0 ps: 2 of 2 tasks have not run\n"
        r"  PE 0 worker 0 holds task 0 of PE 0: down, which waits for upped event 1 on PE 0: seen 0, wanted 1"
    )
    with pytest.raises(DeadlockError, match=message):
        run(table, queue=queue)


def test_a_replay_list_that_lacks_a_task_ends_with_its_name(run):
    with pytest.raises(DeadlockError, match="nobody took task 1 of PE 0: up"):
        run(streams([10, 10]), queue="replay", lists=[[[0]]])


def test_a_push_queue_that_is_never_filled_names_the_slot(run):
    table = HandTable()
    never = table.event("upped")
    table.task("up", waits=(table.plan(), never), signals=(never,))
    table.task("combine", waits=(never,))
    table.task("gate", flops=1)
    with pytest.raises(DeadlockError, match="worker 1 waits for slot 2 to be filled"):
        run(table, queue="push", workers=2)


def test_a_task_replayed_twice_does_not_hang(run):
    records = run(streams([10, 10]), queue="replay", lists=[[[0, 0, 1]]])
    assert records["end_ps"].tolist() == [2_000, 3_000]  # the record is that of the second time


def test_unknown_queues_and_wrong_lists_are_refused(run):
    with pytest.raises(ValueError, match=r"unknown queue 'stack' \(queues: push, ticket, domain, static, rep"):
        run(streams([10]), queue="stack")
    with pytest.raises(ValueError, match="replay on PE 0 has 1 lists"):
        run(streams([10]), workers=2, queue="replay", lists=[[[0]]])


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_is_called_while_running(engine):
    calls = []
    table = streams([10] * 70_000 if engine == "native" else [10] * 1_200)
    ENGINES[engine](table, plain_machine(), HandPolicy(), 2, progress=lambda *counts: calls.append(counts))
    # the native engine is fast enough to do without for long
    assert calls == ([(65_536, 70_000)] if engine == "native" else [(500, 1_200), (1_000, 1_200)])


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_may_stop_a_run(engine):
    def stop(done, total):
        raise KeyboardInterrupt(f"{done} of {total}")

    table = streams([10] * 70_000 if engine == "native" else [10] * 600)
    with pytest.raises(KeyboardInterrupt, match=r"^(65536 of 70000|500 of 600)$"):
        ENGINES[engine](table, plain_machine(), HandPolicy(), 2, progress=stop)


def test_a_deadlock_names_what_is_missing_and_not_what_has_come_meanwhile(run):
    table = HandTable()
    soon, never = table.event("upped"), table.event("upped")
    table.task("up", flops=5, signals=(soon,))
    table.task("down", waits=(never, soon))
    table.task("down", signals=(never,), waits=(never,))
    message = r"PE 0 worker 1 holds task 1 of PE 0: down, which waits for upped event 2 on PE 0: seen 0, wanted 1\n"
    with pytest.raises(DeadlockError, match=message):
        run(table, workers=3)


def test_tasks_that_took_no_time_have_run(run):
    with pytest.raises(DeadlockError, match=r"1 of 2 tasks have not run\n  nobody took task 1 of PE 0: up$"):
        run(arithmetic([0, 0]), queue="replay", lists=[[[0]]])


def test_a_task_that_ran_twice_does_not_make_up_for_one_that_did_not(run):
    with pytest.raises(DeadlockError, match="nobody took task 1 of PE 0: up"):
        run(streams([10, 10]), queue="replay", lists=[[[0, 0]]])
