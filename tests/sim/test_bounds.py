"""Lower bounds: by hand, and as a property of random tables: no schedule ends before them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.strategies import machines, random_layer
from sim.tables import HandPolicy, HandTable, plain_machine, run_engine

from flashmoe.machine import Machine
from flashmoe.sim import ENGINES
from flashmoe.sim.bounds import distinct_weight_bytes, lower_bounds
from flashmoe.sim.costs import FINISHED_KINDS
from flashmoe.sim.parameters import resolve


def bounds_of(table, machine, workers, *, gap_ps=None, pe_speed=None):
    """Of one table, or of one a layer."""
    tables = table if isinstance(table, list) else [table]
    return lower_bounds(tables, resolve(machine, tables[0].num_pes, workers, pe_speed=pe_speed), gap_ps)


def test_hbm_counts_distinct_weights_of_the_busiest_pe():
    table = HandTable(num_pes=2)
    for pe, size in ((0, 100), (1, 400)):
        for _ in range(3):
            table.task("up", pe=pe, weights=size, expert=pe, tile=0)  # three token blocks, the same weights
    assert distinct_weight_bytes(table).tolist() == [100, 400]
    assert bounds_of(table, plain_machine(), 1)["hbm"] == pytest.approx(4_000, abs=1)  # 400 bytes at 100 GB/s


def test_workers_and_longest_task_by_hand():
    table = HandTable()
    table.task("up", weights=100)  # 10 ns of weights
    table.task("up", weights=30, flops=20)  # 3 ns of weights, 20 ns of arithmetic
    table.task("down", weights=40, chain=2)  # a chain: 4 + 5 ns, and the fixed part of each
    table.task("down", weights=50, chain=0)
    machine = plain_machine(down_overhead_ps=1_000)
    bounds = bounds_of(table, machine, 2)
    assert bounds["longest_task"] == pytest.approx(20_000, abs=1)
    assert bounds["workers"] == pytest.approx((20_000 + 2_000) / 2, abs=1)  # weights: 22 ns too
    bounds = bounds_of(table, plain_machine(prefetch=False), 2)
    assert bounds["workers"] == pytest.approx((10_000 + 20_000 + 4_000 + 5_000) / 2, abs=1)


def test_critical_path_by_hand():
    table = HandTable(num_pes=2)
    result = table.event("result", 0)
    table.task("route", pe=0, flops=3, signals=((table.plan(1), 100),))
    table.task("combine", pe=0, flops=2, waits=(result,))
    table.task("up", pe=1, weights=70, flops=1, waits=(table.plan(1),), signals=((result, 0),))
    machine = plain_machine(put_ps=500, link_bytes_per_ns=4.0)
    # route 3 ns, put 0.5 + 25 ns, 7 ns of weights that wait for the plan, put 0.5, combine 2
    assert bounds_of(table, machine, 1)["critical_path"] == pytest.approx(38_000, abs=1)
    assert run_engine("simpy", table, machine, 2)["end_ps"].max() == 38_000
    assert bounds_of(table, machine, 1)["links"] == pytest.approx(25_000, abs=1)


def test_messages_add_up_at_a_port():
    table = HandTable(num_pes=3)
    for pe in (0, 1):
        table.task("dispatch", pe=pe, signals=((table.plan(2), 100),))
    assert bounds_of(table, plain_machine(), 1)["links"] == pytest.approx(100_000, abs=1)
    assert bounds_of(table, plain_machine(port_bytes_per_ns=1.0), 1)["links"] == pytest.approx(200_000, abs=1)
    assert bounds_of(table, plain_machine(port_bytes_per_ns=4.0), 1)["links"] == pytest.approx(100_000, abs=1)
    table = HandTable(num_pes=3)
    table.task("dispatch", pe=0, signals=((table.plan(1), 100), (table.plan(2), 100)))
    assert bounds_of(table, plain_machine(port_bytes_per_ns=1.0), 1)["links"] == pytest.approx(200_000, abs=1)


def test_nothing_happens_before_the_launch():
    table = HandTable()
    table.task("gate", weights=100, flops=2)
    machine = plain_machine(launch_ps=5_000, launch_step_ps=300)
    bounds = bounds_of(table, machine, 4)
    expected = {"hbm": 6_000, "workers": 7_500, "longest_task": 15_000, "critical_path": 15_000, "links": 0}
    assert bounds == pytest.approx(expected, abs=1)


def test_a_slow_pe_is_slow_in_every_bound():
    table = HandTable(num_pes=2)
    for pe in (0, 1):
        table.task("up", pe=pe, weights=100, flops=12)  # 1 ns for the memory, 10 for a CU; 12 of arithmetic
    bounds = bounds_of(table, plain_machine(), 1, pe_speed=[1.0, 0.5])
    expected = {"hbm": 2_000, "workers": 24_000, "longest_task": 24_000, "critical_path": 24_000, "links": 0}
    assert bounds == pytest.approx(expected, abs=1)


def layers_by_hand():
    """Two layers of a combine each, whose outputs are the next layer's input: 5 and 9 ns on two PEs, then 4 and 1."""
    tables = []
    for durations in ((5, 9), (4, 1)):
        table = HandTable(num_pes=2)
        for pe, flops in enumerate(durations):
            event = table.event("gated", pe)
            table.task("gate", pe=pe, weights=100 * flops, signals=(event,))  # 10 ns each flop, beside nothing
            table.task("combine", pe=pe, flops=flops, waits=(event,))
        tables.append(table)
    return tables


def test_layers_add_up():
    machine = plain_machine(launch_ps=100, prefetch=False)
    bounds = bounds_of(layers_by_hand(), machine, 1)
    # PE 0: 50 + 5 ns and 40 + 4; PE 1: 90 + 9 and 10 + 1; they need not wait for each other
    assert bounds["critical_path"] == pytest.approx(110_100, abs=1)
    assert bounds["workers"] == pytest.approx(110_100, abs=1)
    assert bounds["hbm"] == pytest.approx(10_100, abs=1)  # 1000 bytes
    assert bounds["longest_task"] == pytest.approx(90_100, abs=1)


def test_launches_of_their_own_add_up_with_what_lies_between():
    machine = plain_machine(launch_ps=100, prefetch=False)
    bounds = bounds_of(layers_by_hand(), machine, 1, gap_ps=7_000)
    assert bounds["critical_path"] == pytest.approx(110_100 + 7_100, abs=1)
    assert bounds["hbm"] == pytest.approx(10_000 + 100 + 7_100, abs=1)
    assert bounds["links"] == 0


def test_empty_layers_bound_nothing():
    machine = plain_machine(launch_ps=100)
    tables = [*layers_by_hand()[:1], HandTable(num_pes=2)]
    assert bounds_of(tables, machine, 1, gap_ps=7_000) == bounds_of(tables[:1], machine, 1, gap_ps=7_000)
    assert set(bounds_of([HandTable()], machine, 1).values()) == {0}


def test_with_prefetch_a_layers_first_weights_stream_during_the_layer_before():
    bounds = bounds_of(layers_by_hand(), plain_machine(launch_ps=100), 1)
    # both layers' weights from the launch on, side by side: PE 1 has 90 ns of them, then 9 and 1 ns of combines
    assert bounds["critical_path"] == pytest.approx(100 + 90_000 + 9_000 + 1_000, abs=1)


def test_a_host_is_bound_by_its_one_memory_and_its_cores():
    table = HandTable(num_pes=2)
    for pe in (0, 1):
        table.task("up", pe=pe, weights=10, flops=10)
    bounds = bounds_of(table, plain_machine(num_cores=1, prefetch=False), 1)
    assert bounds["hbm"] == pytest.approx(200, abs=1)  # 20 bytes at 100 bytes/ns
    assert bounds["workers"] == pytest.approx(20_000, abs=1)  # both tasks on one core


def test_the_stages_of_a_chain_overlap():
    table = HandTable(down="rows")
    table.task("down", weights=40, flops=1, chain=2)  # 4 ns of weights
    table.task("down", weights=40, flops=1, chain=0)
    assert bounds_of(table, plain_machine(), 1)["longest_task"] == pytest.approx(8_000, abs=1)
    assert run_engine("simpy", table)["end_ps"].tolist() == [4_000, 8_000]


def test_no_tasks_no_bound():
    assert set(bounds_of(HandTable(2), plain_machine(), 3).values()) == {0}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    engine=st.sampled_from(list(ENGINES)),
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 3),
    layers=st.integers(1, 2),
    workers=st.integers(1, 5),
    queue=st.sampled_from(["push", "ticket", "domain", "static"]),
    look_ahead=st.integers(0, 3),
    down=st.sampled_from(["tile", "rows"]),
    gap_ps=st.sampled_from([None, 0, 5_000]),
    machine=machines(),
)
def test_no_schedule_beats_its_bounds(engine, seed, num_pes, layers, workers, queue, look_ahead, down, gap_ps, machine):
    machine = replace(machine, jitter=0.0)  # with luck a run may be faster
    tables = [random_layer(seed + layer, num_pes, down) for layer in range(layers)]
    policy = HandPolicy(queue=queue, look_ahead=look_ahead)
    records = ENGINES[engine](tables, machine, policy, workers, gap_ps=gap_ps)
    bounds = bounds_of(tables, machine, workers, gap_ps=gap_ps)
    assert records["end_ps"].max() >= max(bounds.values()), bounds
    assert (records["ready_ps"] <= records["start_ps"]).all()
    assert (records["asked_ps"] <= records["ticket_ps"]).all()
    assert (records["ticket_ps"] <= records["start_ps"]).all()
    assert (records["start_ps"] <= records["done_ps"]).all()
    assert (records["loaded_ps"] <= records["done_ps"]).all()
    assert (records["done_ps"] <= records["end_ps"]).all()
    # the same tables, the same trace
    assert np.array_equal(records, ENGINES[engine](tables, machine, policy, workers, gap_ps=gap_ps))
    ends_beside = machine.finish_beside and queue != "push"
    for pe in range(num_pes):
        for worker in range(workers):  # a worker does one thing at a time, but for the ends of some tasks
            own = np.sort(records[(records["pe"] == pe) & (records["worker"] == worker)], order=["start_ps", "end_ps"])
            is_beside = ends_beside & np.isin(own["kind"], FINISHED_KINDS)
            free_ps = np.where(is_beside, own["done_ps"], own["end_ps"])
            assert (own["start_ps"][1:] >= free_ps[:-1]).all()
            assert (np.diff(own["end_ps"][is_beside]) >= 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    engine=st.sampled_from(list(ENGINES)),
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 3),
    queue=st.sampled_from(["ticket", "domain", "static", "push"]),
)
def test_one_worker_runs_the_same_order_whatever_the_latencies(engine, seed, num_pes, queue):
    table = random_layer(seed, num_pes, "tile")
    orders = []
    for slow in (1, 50):
        machine = plain_machine(signal_ps=100 * slow, put_ps=300 * slow, ticket_service_ps=7 * slow, prefetch=slow == 1)
        records = run_engine(engine, table, machine, 1, queue=queue, look_ahead=2)
        orders.append(
            [np.argsort(records["end_ps"][records["pe"] == pe], kind="stable").tolist() for pe in range(num_pes)]
        )
    assert orders[0] == orders[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_twice_the_machine_takes_half_the_time(engine):
    slow = Machine.preset("mi300x").to_dict() | {"signal_load_factor": 1.0, "jitter": 0.0, "pe_spread": 0.0}
    fast = {
        key: value * 2 if key.endswith("_per_ns") else value // 2 if key.endswith("_ps") else value
        for key, value in slow.items()
    }
    table = random_layer(3, 3, "tile")
    makespans = [
        run_engine(engine, table, Machine(**values), 4, queue="domain")["end_ps"].max() for values in (slow, fast)
    ]
    assert makespans[0] == pytest.approx(2 * makespans[1], rel=1e-4)
