"""The SimPy engine on small tables: every time below is worked out by hand.

The plain machine has no latency at all, and a byte of weights takes 100 ps through one CU (10 of 100 GB/s).
"""

import numpy as np
import pytest
from sim.tables import HandPolicy, HandTable, plain_machine

from flashmoe.sim.simpy_engine import DeadlockError, run_simpy


def run(table, machine=None, workers=1, lists=None, **policy):
    return run_simpy(table, machine or plain_machine(), HandPolicy(**policy), workers, lists)


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
def test_one_worker_takes_the_sum_of_its_tasks(queue):
    records = run(streams([10, 20, 30]), queue=queue)
    assert records["start_ps"].tolist() == [0, 1_000, 3_000]
    assert records["end_ps"].tolist() == [1_000, 3_000, 6_000]
    assert records["hbm_bytes"].tolist() == [10, 20, 30]


@pytest.mark.parametrize("queue", ["ticket", "static"])
@pytest.mark.parametrize(("num_tasks", "workers"), [(1, 4), (8, 4), (9, 4), (12, 5)])
def test_identical_tasks_take_whole_rounds(queue, num_tasks, workers):
    records = run(streams([10] * num_tasks), workers=workers, queue=queue)
    assert records["end_ps"].max() == -(-num_tasks // workers) * 1_000


def test_more_workers_than_the_memory_feeds_share_it():
    # 20 workers at 10 GB/s would need 200 of 100 GB/s: each gets 5, so 10 bytes take 2 ns
    assert run(streams([10] * 20), workers=20)["end_ps"].tolist() == [2_000] * 20


def test_pes_have_their_own_memory_unless_they_share_a_host():
    apart = run(streams([10] * 10, num_pes=2), workers=10)
    assert set(apart["end_ps"].tolist()) == {1_000}
    together = run(streams([10] * 10, num_pes=2), host(num_cores=20), workers=10)
    assert set(together["end_ps"].tolist()) == {2_000}


def test_a_task_takes_the_slower_of_weights_and_arithmetic_then_its_fixed_part():
    table = HandTable()
    table.task("up", weights=10, flops=3)  # 1 ns of weights, 3 ns of arithmetic
    table.task("up", weights=50, flops=3, io=4)  # 5 ns of weights, 4 ns of activations
    records = run(table, plain_machine(up_overhead_ps=70, prefetch=False))
    assert records["end_ps"].tolist() == [3_070, 8_140]


def test_the_next_weights_stream_while_a_task_runs():
    table = HandTable()
    table.task("up", weights=10, flops=3)
    table.task("up", weights=50, flops=3, io=4)
    records = run(table, plain_machine(up_overhead_ps=70))
    # the first weights are there at 1 ns: then the second pick is taken, and its weights are there at 6 ns
    assert records["ticket_ps"].tolist() == [0, 1_000]
    assert records["start_ps"].tolist() == [0, 3_070]
    assert records["end_ps"].tolist() == [3_070, 3_070 + 4_000 + 70]


# --- hosts


def host(**overrides):
    return plain_machine(prefetch=False, **{"num_cores": 1, **overrides})


def arithmetic(flops):
    table = HandTable()
    for count in flops:
        table.task("up", flops=count)
    return table


def test_workers_without_a_core_wait_for_one():
    assert run(arithmetic([2, 2]), host(), workers=2)["end_ps"].tolist() == [2_000, 4_000]
    assert run(arithmetic([2, 2]), host(num_cores=2), workers=2)["end_ps"].tolist() == [2_000, 2_000]


def test_a_worker_keeps_its_core_for_a_slice():
    # worker 0 has tasks 0 and 2
    assert run(arithmetic([2] * 4), host(slice_ps=1_000), workers=2)["end_ps"].tolist() == [2_000, 4_000, 6_000, 8_000]
    assert run(arithmetic([2] * 4), host(slice_ps=5_000), workers=2)["end_ps"].tolist() == [2_000, 6_000, 4_000, 8_000]


def test_who_waits_for_an_input_needs_no_core():
    records = run(waiting_table(), host(signal_ps=500), workers=2)
    # 5 ns of up; then the input is seen; 3 ns of weights, which nobody loaded before
    assert records["start_ps"].tolist() == [0, 5_500]
    assert records["end_ps"].tolist() == [5_000, 8_500]


def test_bookkeeping_lies_between_tasks():
    assert run(arithmetic([1, 1]), host(gap_ps=100))["start_ps"].tolist() == [0, 1_100]


def test_workers_start_one_after_the_other():
    records = run(arithmetic([1, 1, 1]), plain_machine(launch_step_ps=50), workers=3)
    assert records["start_ps"].tolist() == [0, 50, 100]


# --- waiting


def waiting_table():
    """A `down` with weights that waits for an `up` of 5 ns; both are tasks of one PE."""
    table = HandTable()
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    table.task("down", weights=30, flops=1, waits=(ready,))
    return table


def test_weights_stream_while_the_inputs_are_waited_for():
    records = run(waiting_table(), plain_machine(signal_ps=500), workers=2)
    down = records[1]
    assert (down["ticket_ps"], down["ready_ps"], down["start_ps"]) == (0, 5_500, 5_500)
    assert down["end_ps"] == 6_500  # its 3 ns of weights were there long ago


def test_without_prefetch_weights_wait_for_the_inputs():
    records = run(waiting_table(), plain_machine(signal_ps=500, prefetch=False), workers=2)
    assert records["end_ps"].tolist() == [5_000, 8_500]


def test_a_worker_sees_its_own_signals_at_once():
    records = run(waiting_table(), plain_machine(signal_ps=500), workers=1)
    assert records["ready_ps"][1] == records["start_ps"][1] == 5_000


def test_signals_take_longer_while_memory_is_busy():
    table = waiting_table()
    table.task("up", weights=1000)
    # the waiting task's own weights are there by then: one stream of 10 GB/s runs when the signal leaves
    records = run(table, plain_machine(signal_ps=1_000, signal_load_factor=5.0), workers=3)
    assert records["ready_ps"][1] == 5_000 + 1_400  # 1 + 4 * 10 % of the memory's bandwidth


def test_weights_of_later_stages_wait_for_the_plan_and_those_of_stage_a_do_not():
    table = HandTable()
    routed = table.event("routed")
    table.task("route", flops=4, signals=(routed, table.plan()))
    table.task("dispatch", weights=20, waits=(routed,))
    table.task("down", weights=20, waits=(routed,))
    records = run(table, workers=3)
    assert records["end_ps"].tolist() == [4_000, 4_000, 6_000]


def test_a_worker_streams_for_one_task_at_a_time():
    table = HandTable()
    routed = table.event("routed")
    table.task("route", flops=1, signals=(routed,))
    table.task("dispatch", weights=20, waits=(routed,))
    table.task("dispatch", weights=20, waits=(routed,))
    # worker 1 holds both dispatches from 0 on: 2 ns each, one after the other
    records = run(table, queue="replay", lists=[[[0], [1, 2]]], workers=2, look_ahead=1)
    assert records["end_ps"].tolist() == [1_000, 2_000, 4_000]


def test_a_chain_runs_in_order_without_returning_to_the_queue():
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


def test_a_ticket_counter_serves_one_worker_at_a_time():
    machine = plain_machine(ticket_service_ps=100, ticket_ps=30)
    records = run(streams([10] * 4), machine, workers=4, queue="ticket")
    assert records["ticket_ps"].tolist() == [130, 230, 330, 430]


def test_a_counter_shared_by_domains_has_its_own_cost():
    machine = plain_machine(num_domains=2, ticket_far_service_ps=200, ticket_far_ps=5)
    assert run(streams([10] * 2), machine, workers=2, queue="ticket")["ticket_ps"].tolist() == [205, 405]
    # a single worker makes a single domain
    assert run(streams([10]), machine, workers=1, queue="ticket")["ticket_ps"].tolist() == [0]


def test_static_gives_every_wth_task_to_a_worker():
    records = run(streams([10, 50, 10, 10, 10]), workers=2, queue="static")
    assert records["worker"].tolist() == [0, 1, 0, 1, 0]
    assert records["start_ps"].tolist() == [0, 0, 1_000, 5_000, 2_000]


def test_domains_own_every_dth_task_and_steal_from_the_next_when_done():
    machine = plain_machine(num_domains=2, ticket_service_ps=0, ticket_far_service_ps=100)
    # Domain 0 owns tasks 0 2 4 6 (worker 0), domain 1 owns 1 3 5 (worker 1). Worker 1 ends its three at 3 ns,
    # finds its counter exhausted and steals task 2 (for 100 ps) from worker 0, at task 0 until 10 ns; and on.
    records = run(streams([100, 10, 10, 10, 10, 10, 10]), machine, workers=2, queue="domain")
    assert records["worker"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert records["domain"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert records["ticket_ps"].tolist() == [0, 0, 3_100, 1_000, 4_200, 2_000, 5_300]


def test_stealing_goes_to_the_next_domain_not_to_the_first():
    machine = plain_machine(num_domains=3)
    # each domain owns two tasks; the worker of domain 1 is done at 1 ns and robs domain 2 before domain 0
    records = run(streams([100, 5, 100, 10, 5, 10]), machine, workers=3, queue="domain")
    assert records["worker"].tolist() == [0, 1, 2, 1, 1, 1]
    assert records["start_ps"].tolist() == [0, 0, 0, 2_000, 500, 1_000]


def test_replay_follows_its_lists():
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


def test_without_look_ahead_a_worker_waits_for_its_oldest_pick():
    records = run(look_ahead_table(), workers=2, queue="ticket")
    assert records["start_ps"].tolist() == [0, 9_000, 9_000, 10_000]


def test_look_ahead_runs_what_is_ready_meanwhile():
    records = run(look_ahead_table(), plain_machine(prefetch=False), workers=2, queue="ticket", look_ahead=1)
    assert records["worker"].tolist() == [0, 1, 1, 1]
    # worker 1 holds the route from 0 on, takes the gate, and once that is done the up
    assert records["ticket_ps"].tolist() == [0, 0, 0, 1_000]
    assert records["start_ps"].tolist() == [0, 9_000, 0, 1_000]


def test_the_oldest_ready_pick_goes_first():
    table = HandTable()
    first, second = table.event("gated"), table.event("gated")
    table.task("gate", flops=5, signals=(first, second))
    table.task("route", flops=1, waits=(first,))
    table.task("route", flops=1, waits=(second,))
    table.task("route", flops=1, waits=(second,))
    records = run(table, workers=2, queue="replay", lists=[[[0], [3, 1, 2]]], look_ahead=2)
    assert records["start_ps"].tolist() == [0, 6_000, 7_000, 5_000]


def test_who_waits_for_another_pe_takes_no_more():
    table = HandTable()
    gated = table.event("gated")
    table.task("gate", flops=9, signals=(gated,))
    table.task("up", flops=1, waits=(gated,))  # an up waits for other PEs, whatever its event
    table.task("gate", flops=1)
    records = run(table, workers=2, queue="ticket", look_ahead=3)
    assert records["start_ps"].tolist() == [0, 9_000, 9_000]


def test_a_down_that_cannot_be_decoded_yet_takes_no_more():
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


def test_push_with_one_worker_runs_in_the_order_of_pushing():
    machine = plain_machine(signal_ps=10**6)  # a worker needs no signal to see its own slots
    assert order_of(run(push_table(), machine, queue="push")) == list(range(10))


def test_push_pays_a_fetch_and_add_for_each_append_and_each_ticket():
    machine = plain_machine(ticket_service_ps=100, ticket_ps=20)
    records = run(push_table(), machine, queue="push")
    # one append for both tasks at launch, then the ticket
    assert records["ticket_ps"][0] == 240
    # task 0 ends at 1240, appends route 2 until 1360, ticket until 1480
    assert records["ticket_ps"][1] == 1_480


def test_push_shows_a_slot_to_other_workers_a_signal_later():
    table = HandTable()
    table.task("gate", flops=9)
    table.task("gate", flops=1)
    records = run(table, plain_machine(signal_ps=700), workers=2, queue="push")
    # worker 0 appends both at launch, so worker 1 has the first ticket
    assert records["worker"].tolist() == [1, 0]
    assert records["start_ps"].tolist() == [700, 0]


def test_push_appends_ready_groups_in_sequence_only():
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


def test_push_by_rows_appends_the_chains_with_the_plan():
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


def test_a_put_holds_its_worker_and_its_link_and_lands_later():
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


def test_empty_pes_are_fine():
    assert len(run(HandTable(num_pes=2), workers=2, queue="push")) == 0


# --- what must not hang


@pytest.mark.parametrize("queue", ["ticket", "static", "domain"])
def test_a_deadlock_names_worker_task_and_event(queue):
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


def test_a_replay_list_that_lacks_a_task_ends_with_its_name():
    with pytest.raises(DeadlockError, match="nobody took task 1 of PE 0: up"):
        run(streams([10, 10]), queue="replay", lists=[[[0]]])


def test_a_push_queue_that_is_never_filled_names_the_slot():
    table = HandTable()
    never = table.event("upped")
    table.task("up", waits=(table.plan(), never), signals=(never,))
    table.task("combine", waits=(never,))
    table.task("gate", flops=1)
    with pytest.raises(DeadlockError, match="worker 1 waits for slot 2 to be filled"):
        run(table, queue="push", workers=2)


def test_a_task_replayed_twice_does_not_hang():
    assert len(run(streams([10, 10]), queue="replay", lists=[[[0, 0, 1]]])) == 2


def test_unknown_queues_and_wrong_lists_are_refused():
    with pytest.raises(ValueError, match=r"unknown queue 'stack' \(queues: push, ticket, domain, static, rep"):
        run(streams([10]), queue="stack")
    with pytest.raises(ValueError, match="replay on PE 0 has 1 lists"):
        run(streams([10]), workers=2, queue="replay", lists=[[[0]]])


def test_progress_is_called_while_running():
    calls = []
    table = streams([10] * 1200)
    run_simpy(table, plain_machine(), HandPolicy(), 2, progress=lambda *counts: calls.append(counts))
    assert calls == [(500, 1200), (1000, 1200)]
