"""Lower bounds: by hand, and as a property of random tables: no schedule ends before them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.tables import HandPolicy, HandTable, plain_machine

from flashmoe.machine import Machine
from flashmoe.sim.bounds import distinct_weight_bytes, lower_bounds
from flashmoe.sim.simpy_engine import run_simpy


def test_hbm_counts_distinct_weights_of_the_busiest_pe():
    table = HandTable(num_pes=2)
    for pe, size in ((0, 100), (1, 400)):
        for _ in range(3):
            table.task("up", pe=pe, weights=size, expert=pe, tile=0)  # three token blocks, the same weights
    assert distinct_weight_bytes(table).tolist() == [100, 400]
    assert lower_bounds(table, plain_machine(), 1)["hbm"] == pytest.approx(4_000, abs=1)  # 400 bytes at 100 GB/s


def test_workers_and_longest_task_by_hand():
    table = HandTable()
    table.task("up", weights=100)  # 10 ns of weights
    table.task("up", weights=30, flops=20)  # 3 ns of weights, 20 ns of arithmetic
    table.task("down", weights=40, chain=2)  # a chain: 4 + 5 ns, and the fixed part of each
    table.task("down", weights=50, chain=0)
    machine = plain_machine(down_overhead_ps=1_000)
    bounds = lower_bounds(table, machine, 2)
    assert bounds["longest_task"] == pytest.approx(20_000, abs=1)
    assert bounds["workers"] == pytest.approx((20_000 + 2_000) / 2, abs=1)  # weights: 22 ns too
    bounds = lower_bounds(table, plain_machine(prefetch=False), 2)
    assert bounds["workers"] == pytest.approx((10_000 + 20_000 + 4_000 + 5_000) / 2, abs=1)


def test_critical_path_by_hand():
    table = HandTable(num_pes=2)
    result = table.event("result", 0)
    table.task("route", pe=0, flops=3, signals=((table.plan(1), 100),))
    table.task("combine", pe=0, flops=2, waits=(result,))
    table.task("up", pe=1, weights=70, flops=1, waits=(table.plan(1),), signals=((result, 0),))
    machine = plain_machine(put_ps=500, link_bytes_per_ns=4.0)
    # route 3 ns, put 0.5 + 25 ns, 7 ns of weights that wait for the plan, put 0.5, combine 2
    assert lower_bounds(table, machine, 1)["critical_path"] == pytest.approx(38_000, abs=1)
    assert run_simpy(table, machine, HandPolicy(), 2)["end_ps"].max() == 38_000
    assert lower_bounds(table, machine, 1)["links"] == pytest.approx(25_000, abs=1)


def test_links_of_a_switch_add_up_at_a_port():
    table = HandTable(num_pes=3)
    for pe in (0, 1):
        table.task("dispatch", pe=pe, signals=((table.plan(2), 100),))
    assert lower_bounds(table, plain_machine(link_topology="mesh"), 1)["links"] == pytest.approx(100_000, abs=1)
    assert lower_bounds(table, plain_machine(link_topology="switch"), 1)["links"] == pytest.approx(200_000, abs=1)


def test_a_host_is_bound_by_its_one_memory_and_its_cores():
    table = HandTable(num_pes=2)
    for pe in (0, 1):
        table.task("up", pe=pe, weights=10, flops=10)
    bounds = lower_bounds(table, plain_machine(num_cores=1, prefetch=False), 1)
    assert bounds["hbm"] == pytest.approx(200, abs=1)  # 20 bytes at 100 bytes/ns
    assert bounds["workers"] == pytest.approx(20_000, abs=1)  # both tasks on one core


def test_the_stages_of_a_chain_overlap():
    table = HandTable(down="rows")
    table.task("down", weights=40, flops=1, chain=2)  # 4 ns of weights
    table.task("down", weights=40, flops=1, chain=0)
    assert lower_bounds(table, plain_machine(), 1)["longest_task"] == pytest.approx(8_000, abs=1)
    assert run_simpy(table, plain_machine(), HandPolicy(), 1)["end_ps"].tolist() == [4_000, 8_000]


def test_no_tasks_no_bound():
    assert set(lower_bounds(HandTable(2), plain_machine(), 3).values()) == {0}


def random_layer(seed: int, num_pes: int, down: str) -> HandTable:
    """A small layer of every kind of task, with random sizes and edges that point forward."""
    rng = np.random.default_rng(seed)
    table = HandTable(num_pes, down)
    blocks = rng.integers(1, 4, num_pes)
    experts = rng.integers(0, 4, num_pes)
    upped = [[table.event("upped", pe) for _ in range(experts[pe])] for pe in range(num_pes)]
    results = [[table.event("result", pe) for _ in range(3)] for pe in range(num_pes)]

    def sizes() -> dict[str, int]:
        return {
            "weights": int(rng.integers(0, 3) * rng.integers(0, 500)),
            "io": int(rng.integers(0, 3)),
            "flops": int(rng.integers(0, 9)),
        }

    for pe in range(num_pes):
        gated = [table.event("gated", pe) for _ in range(blocks[pe])]
        routed = [table.event("routed", pe) for _ in range(blocks[pe])]
        for block in range(blocks[pe]):
            for _ in range(2):
                table.task("gate", pe=pe, signals=(gated[block],), **sizes())
        for block in range(blocks[pe]):
            table.task("route", pe=pe, waits=(gated[block],), signals=(routed[block], table.plan(pe)), **sizes())
        for block in range(blocks[pe]):
            for peer in range(num_pes):
                if peer != pe:
                    put = (table.plan(peer), int(rng.integers(0, 200)))
                    table.task("dispatch", pe=pe, peer=peer, waits=(routed[block],), signals=(put,), **sizes())
        for expert in range(experts[pe]):
            for tile in range(int(rng.integers(1, 4))):
                table.task(
                    "up",
                    pe=pe,
                    waits=(table.plan(pe),),
                    signals=(upped[pe][expert],),
                    expert=expert,
                    tile=tile,
                    **sizes(),
                )
        for tile in range(2):
            for expert in range(experts[pe]):
                to = int(rng.integers(num_pes))
                put = (results[to][int(rng.integers(3))], int(rng.integers(0, 99)) if to != pe else 0)
                chain = 1 if down == "tile" else int(experts[pe]) * (expert == 0)
                table.task(
                    "down",
                    pe=pe,
                    waits=(upped[pe][expert],),
                    signals=(put,),
                    expert=expert,
                    tile=tile,
                    chain=chain,
                    **sizes(),
                )
        for result in results[pe]:
            table.task("combine", pe=pe, waits=(table.plan(pe), result), **sizes())
    return table


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 3),
    workers=st.integers(1, 5),
    queue=st.sampled_from(["push", "ticket", "domain", "static"]),
    look_ahead=st.integers(0, 3),
    down=st.sampled_from(["tile", "rows"]),
    prefetch=st.booleans(),
    topology=st.sampled_from(["mesh", "switch"]),
    on_host=st.booleans(),
)
def test_no_schedule_beats_its_bounds(seed, num_pes, workers, queue, look_ahead, down, prefetch, topology, on_host):
    machine = plain_machine(
        num_domains=2,
        hbm_bytes_per_ns=25.0,
        prefetch=prefetch and not on_host,
        ticket_service_ps=30,
        ticket_far_ps=40,
        ticket_far_service_ps=90,
        signal_ps=700,
        signal_load_factor=2.5,
        put_ps=1_500,
        link_bytes_per_ns=3.0,
        link_topology=topology,
        store_bytes_per_ns=7.0,
        up_overhead_ps=123,
        route_overhead_ps=456,
        num_cores=2 if on_host else 0,
        slice_ps=900,
        gap_ps=11,
        launch_step_ps=60,
    )
    table = random_layer(seed, num_pes, down)
    policy = HandPolicy(queue=queue, look_ahead=look_ahead)
    records = run_simpy(table, machine, policy, workers)
    bounds = lower_bounds(table, machine, workers)
    assert records["end_ps"].max() >= max(bounds.values()), bounds
    assert (records["ready_ps"] <= records["start_ps"]).all()
    assert (records["ticket_ps"] <= records["start_ps"]).all()
    assert (records["start_ps"] <= records["end_ps"]).all()
    assert np.array_equal(records, run_simpy(table, machine, policy, workers))  # the same table, the same trace
    for pe in range(num_pes):
        for worker in range(workers):  # a worker does one thing at a time
            own = np.sort(records[(records["pe"] == pe) & (records["worker"] == worker)], order="start_ps")
            assert (own["start_ps"][1:] >= own["end_ps"][:-1]).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 3),
    queue=st.sampled_from(["ticket", "domain", "static", "push"]),
)
def test_one_worker_runs_the_same_order_whatever_the_latencies(seed, num_pes, queue):
    table = random_layer(seed, num_pes, "tile")
    orders = []
    for slow in (1, 50):
        machine = plain_machine(signal_ps=100 * slow, put_ps=300 * slow, ticket_service_ps=7 * slow, prefetch=slow == 1)
        records = run_simpy(table, machine, HandPolicy(queue=queue, look_ahead=2), 1)
        orders.append(
            [np.argsort(records["end_ps"][records["pe"] == pe], kind="stable").tolist() for pe in range(num_pes)]
        )
    assert orders[0] == orders[1]


def test_twice_the_machine_takes_half_the_time():
    slow = Machine.preset("mi300x").to_dict() | {"signal_load_factor": 1.0}
    fast = {
        key: value * 2 if key.endswith("_per_ns") else value // 2 if key.endswith("_ps") else value
        for key, value in slow.items()
    }
    table = random_layer(3, 3, "tile")
    makespans = [
        run_simpy(table, Machine(**values), HandPolicy(queue="domain"), 4)["end_ps"].max() for values in (slow, fast)
    ]
    assert makespans[0] == pytest.approx(2 * makespans[1], rel=1e-4)
