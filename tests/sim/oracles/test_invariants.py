"""What holds for any run: bytes are conserved, units do not matter, more bandwidth helps where it must."""

from itertools import pairwise

import numpy as np
import pytest
from sim.oracles.stations import unit_machine
from sim.tables import HandTable, plain_machine, run_engine

from flashmoe.machine import Machine, parameter_units
from flashmoe.tasks import segment_owner

QUEUES = ("ticket", "domain", "static", "push")
TIMES = ("asked_ps", "ticket_ps", "ready_ps", "start_ps", "loaded_ps", "done_ps", "end_ps")
RATES = [key for key, unit in parameter_units().items() if unit in ("bytes/ns", "flop/ns")]
NUM_PES, NUM_WORKERS = 3, 6


def random_table(seed, size=1, num_tasks=60):
    """Tasks with all kinds of costs that mostly wait for others; every fourth one sends a message to the next PE.

    size: factor on all amounts. What a task waits for comes earlier in everybody's order, so no queue can deadlock.
    """
    rng = np.random.default_rng(seed)
    table = HandTable(NUM_PES)
    ended = [[table.event("gated", pe) for _ in range(num_tasks)] for pe in range(NUM_PES)]
    arrived = [[table.event("result", (pe + 1) % NUM_PES) for _ in range(num_tasks)] for pe in range(NUM_PES)]
    for pe in range(NUM_PES):
        for task in range(num_tasks):
            amounts = rng.integers(0, 1_000_000, 4) * rng.integers(0, 2, 4) * size
            weights, flops, io, sent = amounts.tolist()
            exchanges = task % 4 == 0
            waits = [ended[pe][int(rng.integers(max(0, task - 10), task))]] if task % 3 else []
            table.task(
                "combine" if exchanges else "gate",  # what waits for another PE is a combine in a push queue
                pe=pe,
                weights=weights,
                flops=flops,
                io=io,
                waits=waits + ([arrived[pe - 1][task - 4]] if exchanges and task else []),
                signals=[ended[pe][task]] + ([(arrived[pe][task], sent)] if exchanges else []),
            )
    return table


def busy_machine(**overrides):
    """Everything takes time, memory is shared and links are crowded. All rates are powers of two [bytes/ns]."""
    values = {
        "num_cus": NUM_WORKERS,
        "num_domains": 2,
        "prefetch": True,
        "hbm_bytes_per_ns": 2048.0,
        "cu_bytes_per_ns": 1024.0,
        "cu_flops_per_ns": 1024.0,
        "cache_bytes_per_ns": 1024.0,
        "link_bytes_per_ns": 512.0,
        "port_bytes_per_ns": 512.0,
        "store_bytes_per_ns": 4096.0,
        "gate_overhead_ps": 30_000,
        "combine_overhead_ps": 50_000,
        "gap_ps": 2_000,
        "put_ps": 90_000,
        "link_message_ps": 7_000,
        "ticket_ps": 4_000,
        "ticket_far_ps": 9_000,
        "ticket_service_ps": 1_000,
        "ticket_far_service_ps": 3_000,
        "signal_ps": 8_000,
        "signal_near_ps": 5_000,
        "signal_load_factor": 2.0,
        "launch_ps": 11_000,
        "launch_step_ps": 6_000,
        "launch_domain_ps": 1_000,
    }
    return plain_machine(**(values | overrides))


def times(records):
    return np.stack([records[name] for name in TIMES])


# --- conservation


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("num_workers", [1, 2, 5, 20])
def test_memory_that_one_stream_can_fill_is_always_full(engine, queue, num_workers):
    """However it is shared: all bytes take bytes over bandwidth."""
    sizes = np.random.default_rng(num_workers).integers(1, 1_000_000, 100)
    table = HandTable()
    for size in sizes.tolist():
        table.task("gate", weights=size)
    makespan_ps = run_engine(engine, table, unit_machine(), num_workers, queue=queue)["end_ps"].max()
    assert 0 <= makespan_ps - sizes.sum() <= len(sizes)  # each end is rounded up to a whole ps


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("knee", [0.0, 2.0])
def test_bytes_are_the_integral_of_the_rate(engine, queue, knee):
    """Without prefetch a task's stream lasts from its start until its weights are there."""
    machine = busy_machine(prefetch=False, knee=knee)
    table = random_table(1)
    records = run_engine(engine, table, machine, NUM_WORKERS, queue=queue)
    total, cap = machine.hbm_bytes_per_ns / 1000, machine.cu_bytes_per_ns / 1000
    assert np.array_equal(records["hbm_bytes"], table.tasks["weight_bytes"])
    for pe in range(NUM_PES):
        mine = records[(records["pe"] == pe) & (records["hbm_bytes"] > 0)]
        changes = sorted(
            [(at, 1) for at in mine["start_ps"].tolist()] + [(at, -1) for at in mine["loaded_ps"].tolist()]
        )
        integral, num_streams, last_ps = 0.0, 0, 0
        for at_ps, change in changes:
            if num_streams:
                share = total / num_streams
                rate = (cap**-knee + share**-knee) ** (-1 / knee) if knee else min(cap, share)
                integral += rate * num_streams * (at_ps - last_ps)
            num_streams, last_ps = num_streams + change, at_ps
        lost = integral - mine["hbm_bytes"].sum()
        assert 0 <= lost <= total * len(mine)  # each end is rounded up to a whole ps


@pytest.mark.parametrize("queue", QUEUES)
def test_links_carry_what_is_sent_and_no_faster_than_they_can(engine, queue):
    machine, table = busy_machine(), random_table(2)
    records = run_engine(engine, table, machine, NUM_WORKERS, queue=queue)
    sender, waiter = (
        segment_owner(table.signal_ptr),
        dict(zip(table.wait_event, segment_owner(table.wait_ptr), strict=True)),
    )
    is_message = table.tasks["pe"][sender] != table.event_pe[table.signal_event]
    for pe in range(NUM_PES):
        messages = np.flatnonzero(is_message & (table.tasks["pe"][sender] == pe))
        assert records["link_bytes"][records["pe"] == pe].sum() == table.signal_bytes[messages].sum()
        messages = messages[:-1]  # nobody waits for the last one
        seen_ps = [records["ready_ps"][waiter[event]] for event in table.signal_event[messages]]
        on_link_ps = table.signal_bytes[messages] / machine.link_bytes_per_ns * 1000 + machine.link_message_ps
        assert max(seen_ps) - records["end_ps"][sender[messages]].min() >= on_link_ps.sum() + machine.put_ps


@pytest.mark.parametrize("queue", ["ticket", "domain", "static"])
def test_workers_lose_no_time_between_tasks(engine, queue):
    """The launch, a task and its bookkeeping, the next one: without prefetch a worker's time has no gaps."""
    machine = busy_machine(prefetch=False)
    records = run_engine(engine, random_table(3), machine, NUM_WORKERS, queue=queue)
    for pe in range(NUM_PES):
        for worker in range(NUM_WORKERS):
            mine = np.sort(records[(records["pe"] == pe) & (records["worker"] == worker)], order="start_ps")
            launch_ps = machine.launch_ps + worker % 2 * machine.launch_domain_ps + worker // 2 * machine.launch_step_ps
            assert mine["asked_ps"].tolist() == [launch_ps, *(mine["end_ps"][:-1] + machine.gap_ps).tolist()]


# --- units


def scaled(machine, times_by=1, rates_by=1.0):
    """The machine with all its times, or all its rates, multiplied."""
    values = machine.to_dict()
    for key, unit in parameter_units().items():
        if unit == "ps":
            values[key] *= times_by
        elif key in RATES:
            values[key] *= rates_by
    return Machine(**values)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("knee", [0.0, 2.0])
def test_bytes_and_flops_of_another_size_change_nothing(engine, queue, knee):
    """Exactly, as a power of two does not touch the digits of a float."""
    machine = busy_machine(knee=knee)
    records = run_engine(engine, random_table(4), machine, NUM_WORKERS, queue=queue)
    larger = run_engine(engine, random_table(4, size=8), scaled(machine, rates_by=8.0), NUM_WORKERS, queue=queue)
    assert np.array_equal(records["worker"], larger["worker"])
    assert np.array_equal(times(records), times(larger))


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("hbm_bytes_per_ns", [8192.0, 2048.0])
def test_all_times_as_long_again(engine, queue, hbm_bytes_per_ns):
    """Exactly where each time is a whole number of ps: in the first case no streams share memory, and all amounts
    are multiples of the rates. Shared streams end at fractions, which are rounded up.
    """
    machine, table = busy_machine(hbm_bytes_per_ns=hbm_bytes_per_ns), random_table(5, size=4096)
    records = run_engine(engine, table, machine, NUM_WORKERS, queue=queue)
    slower = run_engine(engine, table, scaled(machine, times_by=4, rates_by=0.25), NUM_WORKERS, queue=queue)
    assert np.array_equal(records["worker"], slower["worker"])
    error_ps = np.abs(times(slower) - 4 * times(records)).max()
    assert error_ps == 0 if hbm_bytes_per_ns == 8192.0 else error_ps < 4 * len(table)


# --- more bandwidth


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_a_faster_part_makes_nothing_later_in_a_fixed_order(engine, rate, prefetch):
    """One worker a PE: then all orders are fixed, that of the messages on a link, too."""
    machine = busy_machine(prefetch=prefetch, signal_load_factor=1.0)
    table = random_table(6)
    slow_ps = times(run_engine(engine, table, machine, queue="static"))
    for factor in (1.3, 2.0, 10.0):
        faster = Machine(**(machine.to_dict() | {rate: factor * getattr(machine, rate)}))
        fast_ps = times(run_engine(engine, table, faster, queue="static"))
        assert (fast_ps <= slow_ps).all()
        slow_ps = fast_ps


def test_more_memory_bandwidth_makes_no_stream_later_in_a_fixed_order(engine):
    """Workers that do nothing but stream share evenly all the time."""
    table = HandTable()
    for size in np.random.default_rng(7).integers(1, 1_000_000, 60).tolist():
        table.task("gate", weights=size)
    ends_ps = [
        run_engine(engine, table, unit_machine(cu_bytes_per_ns=200.0, hbm_bytes_per_ns=total), 8, queue="static")[
            "end_ps"
        ]
        for total in (500.0, 650.0, 1000.0, 1600.0, 5000.0)
    ]
    assert all((fast_ps <= slow_ps).all() for slow_ps, fast_ps in pairwise(ends_ps))


def test_more_memory_bandwidth_can_make_a_fixed_order_slower(engine):
    """An anomaly of sharing. Three workers stream 400 bytes, compute 600 ps, and stream again; the fourth computes
    1200 ps, streams 600 bytes, and computes 3000 ps.

    At 1 byte/ps the three are back at 3 * 400 + 600 = 1800 ps, just when the fourth has streamed, alone, what it needs.
    At 1.25 they are back at 960 + 600 = 1560 ps, and it has 600 - 360 * 1.25 = 150 bytes left, at a quarter of the
    bandwidth: 480 ps more, and it ends at 1560 + 480 + 3000 = 5040 instead of 4800.
    """
    table = HandTable()
    for weights, flops in [({"weights": 400}, {"flops": 1200}), ({"flops": 600}, {"weights": 600})]:
        for _ in range(3):
            table.task("gate", **weights)
        table.task("gate", **flops)
    for _ in range(3):
        table.task("gate", weights=400)
    table.task("gate", flops=3000)

    def makespan_ps(total):
        machine = unit_machine(hbm_bytes_per_ns=total, cu_bytes_per_ns=total)
        return run_engine(engine, table, machine, 4, queue="static")["end_ps"].max()

    assert (makespan_ps(1000.0), makespan_ps(1250.0)) == (4800, 5040)
