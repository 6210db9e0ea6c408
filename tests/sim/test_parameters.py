"""A machine's tables by hand."""

import numpy as np
import pytest
from sim.tables import plain_machine

from flashmoe.sim.parameters import resolve


def test_the_launch_ramp():
    machine = plain_machine(num_domains=3, launch_ps=1_000, launch_domain_ps=70, launch_step_ps=5)
    # worker w: domain w % 3, the (w // 3)-th there
    assert resolve(machine, 1, 7).start_ps.tolist() == [1_000, 1_070, 1_140, 1_005, 1_075, 1_145, 1_010]
    assert resolve(machine, 1, 2).start_ps.tolist() == [1_000, 1_070]


def test_domains_have_a_worker_each():
    machine = plain_machine(num_domains=3)
    assert [resolve(machine, 1, workers).num_domains for workers in (1, 2, 3, 7)] == [1, 2, 3, 3]


def test_streams_get_their_cap_or_their_share():
    rates = resolve(plain_machine(), 1, 20).rates  # 100 bytes/ns in all, 10 a CU
    assert rates.shape == (1, 21)
    assert rates[0, 1:11].tolist() == [0.010] * 10
    assert rates[0, 11:].tolist() == pytest.approx([0.1 / n for n in range(11, 21)])


def test_the_knee_by_hand():
    def rate(knee, n):
        return resolve(plain_machine(knee=knee), 1, 20).rates[0, n] * 1000

    assert rate(1.0, 10) == pytest.approx(5.0)  # cap and share are 10: 1 / (1/10 + 1/10)
    assert rate(2.0, 10) == pytest.approx(10 / 2**0.5)
    assert rate(1.0, 20) == pytest.approx(1 / (1 / 10 + 1 / 5))
    assert rate(3.0, 4) == pytest.approx((10**-3 + 25**-3) ** (-1 / 3))
    # a sharp knee is the lesser of the two, and does not overflow
    for n in (1, 10, 20):
        assert rate(1_000.0, n) == pytest.approx(rate(0.0, n), rel=1e-3)
        assert 0 < rate(1e6, n) <= rate(0.0, n)


@pytest.mark.parametrize("knee", [0.0, 1.0, 4.0, 50.0])
def test_more_streams_are_slower_each_and_faster_together(knee):
    rates = resolve(plain_machine(knee=knee), 1, 50).rates[0, 1:]
    together = rates * np.arange(1, 51)
    assert (np.diff(rates) <= 0).all()
    assert (np.diff(together) >= -1e-12).all()
    assert together.max() <= 0.1 + 1e-12


def test_signals_stretch_with_the_share_of_bandwidth_in_use():
    machine = plain_machine(signal_ps=1_000, signal_near_ps=100, signal_load_factor=3.0)
    parameters = resolve(machine, 1, 12)
    # n streams of 10 of 100 bytes/ns: 1 + 2 * n / 10 times, at most 3 times
    assert parameters.far_ps.tolist() == [1_000 + 200 * min(n, 10) for n in range(13)]
    assert parameters.near_ps.tolist() == [100 + 20 * min(n, 10) for n in range(13)]


def test_the_streams_of_a_hosts_pes_share_one_memory():
    host = plain_machine(num_cores=4, prefetch=False)
    assert resolve(host, 3, 5).rates.shape == (3, 16)
    assert resolve(plain_machine(), 3, 5).rates.shape == (3, 6)


def test_a_pes_speed_is_that_of_its_memory():
    parameters = resolve(plain_machine(), 2, 20, pe_speed=[0.5, 1.0])
    assert parameters.speeds.tolist() == [0.5, 1.0]
    assert (parameters.rates[0] == parameters.rates[1] / 2).all()
    # the load is what the memory is asked for of what it can give
    machine = plain_machine(signal_ps=1_000, signal_near_ps=0, signal_load_factor=3.0)
    assert resolve(machine, 2, 3, pe_speed=[0.5, 1.0]).far_ps.tolist() == [1_000, 1_200, 1_400, 1_600]


def test_pe_spread_multiplies_pe_speed_and_depends_on_the_seed():
    machine = plain_machine(pe_spread=0.2)
    drawn = resolve(machine, 4, 1, seed=1).speeds
    assert len(set(drawn.tolist())) == 4
    assert resolve(machine, 4, 1, seed=1, pe_speed=[2.0, 1.0, 1.0, 1.0]).speeds.tolist() == [2 * drawn[0], *drawn[1:]]
    assert resolve(machine, 4, 1, seed=2).speeds.tolist() != drawn.tolist()
    assert resolve(plain_machine(), 4, 1, seed=2).speeds.tolist() == [1.0] * 4


def test_who_jitters():
    assert not resolve(plain_machine(), 1, 1).jitters
    assert resolve(plain_machine(jitter=0.1), 1, 1).jitters
    assert resolve(plain_machine(stall_probability=0.5, stall_ps=1), 1, 1).stall_threshold == 2**31
    assert not resolve(plain_machine(stall_probability=0.5), 1, 1).jitters  # a stall of no time is none


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"pe_speed": [1.0]}, r"pe_speed=\[1.0\] \(must be 2 factors in 0\.001\.\.1000, one a PE\)"),
        ({}, {"pe_speed": [1.0, 0.0]}, "must be 2 factors"),
        ({}, {"pe_speed": [1.0, float("inf")]}, "must be 2 factors"),
        ({}, {"pe_speed": [1.0, float("nan")]}, "must be 2 factors"),
        ({"num_cores": 2, "prefetch": False}, {"pe_speed": [1.0, 0.9]}, "must be equal: the PEs of a host"),
        ({}, {"seed": -1}, r"seed=-1 \(must be a whole number in 0\.\.2\^63 - 1\)"),
        ({}, {"seed": 2**63}, "seed=9223372036854775808"),
    ],
)
def test_what_does_not_fit_is_named(changes, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(plain_machine(**changes), 2, 1, **options)
