"""What tasks cost, by hand. The plain machine: a byte of weights takes 100 ps, an operation or an activation 1 ns."""

import numpy as np
import pytest
from sim.tables import HandTable, plain_machine

from flashmoe.sim import jitter
from flashmoe.sim.costs import remote_bytes, task_costs
from flashmoe.sim.parameters import resolve


def costs(table, *, layer=0, seed=0, pe_speed=None, **machine):
    return task_costs(table, resolve(plain_machine(**machine), table.num_pes, 1, seed=seed, pe_speed=pe_speed), layer)


def test_every_part_by_hand():
    table = HandTable(num_pes=2)
    event, other = table.event("upped", 0), table.event("result", 1)
    table.task("up", weights=30, flops=2, io=5, signals=(event,))
    table.task("down", weights=7, flops=9, io=5, signals=(event, (other, 8), (other, 4)))
    got = costs(table, up_overhead_ps=70, down_overhead_ps=11, store_bytes_per_ns=5.0)
    assert got.stream_bytes.tolist() == [30.0, 7.0]
    assert got.stream_ps.tolist() == [3_000, 700]
    assert got.compute_ps.tolist() == [7_000, 14_000]  # activations, then arithmetic
    assert got.overhead_ps.tolist() == [70, 11]
    assert got.send_ps.tolist() == [0, 2_400]  # 12 bytes; a signal of the own PE is no message
    assert got.after_ps.tolist() == [70, 2_411]
    assert got.least_ps.tolist() == [7_070, 16_411]
    assert remote_bytes(table).tolist() == [0, 12]


def test_times_are_rounded_up_and_noise_is_not():
    table = HandTable()
    table.task("up", weights=1, flops=1)
    got = costs(table, cu_bytes_per_ns=3.0, hbm_bytes_per_ns=3.0, cu_flops_per_ns=3.0)
    assert got.stream_ps.tolist() == got.compute_ps.tolist() == [334]
    table = HandTable()
    table.task("up", weights=3, flops=3)
    got = costs(table, cu_bytes_per_ns=0.1, cu_flops_per_ns=0.1)  # 30000.000000000004 in float64
    assert got.stream_ps.tolist() == got.compute_ps.tolist() == [30_000]


@pytest.mark.parametrize(
    ("tokens", "rows", "cells"),
    [(1, 1, 16 * 32), (16, 32, 16 * 32), (17, 32, 32 * 32), (16, 33, 16 * 64), (40, 70, 48 * 96), (0, 8, 0), (3, 0, 3)],
)
def test_matrix_products_are_padded_to_whole_tiles(tokens, rows, cells):
    table = HandTable()
    # 6 operations a cell; without rows it is no matrix product
    table.task("up", tokens=tokens, rows=rows, flops=6 * (tokens * rows if rows else tokens))
    assert costs(table, matrix_tokens=16, matrix_rows=32).compute_ps.tolist() == [6_000 * cells]


def test_a_pes_speed_is_that_of_its_streams_arithmetic_and_fixed_parts():
    table = HandTable(num_pes=2)
    for pe in (0, 1):
        table.task("dispatch", pe=pe, weights=10, flops=3, signals=((table.plan(1 - pe), 8),))
    got = costs(table, pe_speed=[0.5, 2.0], dispatch_overhead_ps=100, store_bytes_per_ns=4.0)
    assert got.stream_bytes.tolist() == [10, 10]
    assert got.stream_ps.tolist() == [2_000, 500]
    assert got.compute_ps.tolist() == [6_000, 1_500]
    assert got.overhead_ps.tolist() == [200, 50]
    assert got.send_ps.tolist() == [2_000, 2_000]


def test_jitter_scales_streams_arithmetic_and_fixed_parts_of_a_task_alike():
    table = HandTable(num_pes=2)
    for pe in (0, 0, 1):
        table.task("dispatch", pe=pe, weights=10, flops=3, signals=((table.plan(1 - pe), 8),))
    got = costs(table, layer=2, seed=5, jitter=0.4, dispatch_overhead_ps=100, store_bytes_per_ns=4.0)
    bits = jitter.task_bits(5, 2, np.array([0, 0, 1]), np.array([0, 1, 0]))
    factors = jitter.quantiles(0.4)[(bits >> np.uint64(52)).astype(int)]
    assert len(set(factors)) == 3
    assert got.stream_bytes.tolist() == pytest.approx((10 * factors).tolist())
    assert (np.abs(got.stream_ps - 1_000 * factors) <= 1).all()
    assert (np.abs(got.compute_ps - 3_000 * factors) <= 1).all()
    assert (np.abs(got.overhead_ps - 100 * factors) <= 1).all()
    assert got.send_ps.tolist() == [2_000] * 3


def test_a_fixed_part_may_depend_on_the_size_of_a_task():
    table = HandTable()
    for rows in (1, 4, 6, 12, 16, 99):
        table.task("up", tokens=7, rows=rows)
    table.task("gate", tokens=3, rows=4)  # 12 in size
    table.task("route", tokens=9)
    times = ((4, 100), (12, 500), (16, 0))
    got = costs(table, up_overhead_ps=times, gate_overhead_ps=times, route_overhead_ps=((8, 0), (10, 3)))
    # below the first size, at it, a quarter of the way, ...
    assert got.overhead_ps.tolist() == [100, 100, 200, 500, 0, 0, 500, 1]


def test_what_comes_before_and_after_the_streams_finds_the_cache_idle():
    table = HandTable()
    for kind in ("gate", "route", "up", "down", "combine"):
        table.task(kind, io=12)
    assert costs(table).compute_ps.tolist() == [12_000] * 5
    got = costs(table, cache_idle_bytes_per_ns=4.0)
    assert got.compute_ps.tolist() == [3_000, 3_000, 12_000, 12_000, 3_000]


def test_half_of_a_word_is_its_signal():
    table = HandTable(num_pes=2)
    table.task("route", tokens=2)
    table.task("route", pe=1, tokens=3)
    for pe in (0, 1):  # 2 x 10 values of 2 bytes each; 3 rows of weights
        table.task("down", pe=pe, tokens=2, rows=3, io=40, flops=2 * 2 * 10 * 3)
    fast = {"cu_flops_per_ns": 1e30}
    assert costs(table, **fast).compute_ps.tolist() == [0, 0, 40_000, 40_000]
    assert costs(table, word_tokens=2, **fast).compute_ps.tolist() == [0, 0, 80_000, 40_000]


def test_a_stall_is_added_to_the_fixed_part():
    table = HandTable()
    table.task("up", flops=3)
    got = costs(table, up_overhead_ps=100, stall_ps=7_000, stall_probability=1.0)
    assert (got.compute_ps.tolist(), got.overhead_ps.tolist()) == ([3_000], [7_100])


def test_weights_are_early_where_the_machine_prefetches():
    assert costs(HandTable()).early
    assert not costs(HandTable(), prefetch=False).early
