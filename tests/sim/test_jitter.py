"""The model's random numbers against plain integers and the normal distribution."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from flashmoe.sim import jitter

NORMAL = NormalDist()
GOLDEN = 0x9E3779B97F4A7C15


def mixed(word):
    """SplitMix64's finaliser on Python integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_the_finaliser_gives_splitmix64s_published_sequence():
    states = [(1234567 + i * GOLDEN) % 2**64 for i in (1, 2, 3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mixed(state) for state in states] == expected
    assert jitter.mixed(np.array(states, np.uint64)).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "layer", "pe", "task_id"),
    [(1, 0, 0, 0), (0, 0, 0, 1), (2**63 - 1, 61, 7, 17_000), (5, 65_535, 65_535, 2**32 - 1)],
)
def test_bits_by_hand(seed, layer, pe, task_id):
    key = mixed((seed + 1) * GOLDEN % 2**64)
    counter = (layer * 2**48 + pe * 2**32 + task_id) * GOLDEN + key
    expected = mixed((mixed(counter % 2**64) + key) % 2**64)
    bits = jitter.task_bits(seed, layer, np.array([pe]), np.array([task_id]))
    assert bits.dtype == np.uint64
    assert bits.tolist() == [expected]


def test_bits_are_spread_over_tasks_layers_pes_and_seeds():
    ids = np.arange(4096)
    zeros = np.zeros(4096, np.int64)
    streams = [
        jitter.task_bits(3, 0, zeros, ids),
        jitter.task_bits(3, 1, zeros, ids),
        jitter.task_bits(3, 0, zeros + 1, ids),
        jitter.task_bits(4, 0, zeros, ids),
    ]
    assert len(np.unique(np.concatenate(streams))) == 4 * 4096
    for bits in streams:
        for bit in range(64):
            ones = int((bits >> np.uint64(bit) & np.uint64(1)).sum())
            assert abs(ones - 2048) < 6 * 32  # standard deviation sqrt(4096) / 2
    for one, other in pairwise(streams):
        same = (one >> np.uint64(52)) == (other >> np.uint64(52))
        assert same.sum() < 10  # one in 4096 is expected


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5, 1.0])
def test_factors_follow_a_lognormal_distribution_of_mean_one(sigma):
    table = jitter.quantiles(sigma)
    assert len(table) == 4096
    assert (np.diff(table) > 0).all()
    assert table.mean() == pytest.approx(1.0, abs=1e-12)
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        # mean 1: the logarithm's mean is -sigma^2 / 2; a table loses a little of the upper tail
        exact = np.exp(sigma * NORMAL.inv_cdf(share) - sigma**2 / 2)
        assert table[int(share * 4096)] == pytest.approx(exact, rel=3e-3 * max(1.0, sigma / 0.1))


def test_what_stays_in_a_cache_follows_an_exponential_distribution_of_mean_one():
    table = jitter.stays()
    assert len(table) == 4096
    assert (np.diff(table) > 0).all()
    assert table.mean() == pytest.approx(1.0, abs=1e-12)
    for share in (0.01, 0.25, 0.5, 0.9, 0.99):
        assert table[int(share * 4096)] == pytest.approx(-np.log(1 - share), rel=0.02)


def test_bits_of_their_own_choose_what_stays():
    table = jitter.stays()
    bits = np.array([0, 2**40 - 1, 2**40, 2**52 - 1, 2**52], np.uint64)
    assert jitter.stay(bits, table).tolist() == table[[0, 0, 1, 4095, 0]].tolist()


def test_no_jitter_is_a_factor_of_one():
    assert (jitter.quantiles(0.0) == 1.0).all()


def test_the_upper_bits_choose_the_factor():
    table = jitter.quantiles(0.3)
    bits = np.array([0, 2**52 - 1, 2**52, 2**64 - 1], np.uint64)
    assert jitter.factors(bits, table).tolist() == table[[0, 0, 1, 4095]].tolist()


def test_the_lower_bits_choose_who_stalls():
    assert [jitter.stall_threshold(p) for p in (0.0, 0.25, 1.0)] == [0, 2**30, 2**32]
    bits = np.array([0, 2**30 - 1, 2**30, 2**32 - 1, 2**32], np.uint64)
    assert jitter.stalls(bits, 2**30).tolist() == [True, True, False, False, True]
    assert jitter.stalls(bits, 0).tolist() == [False] * 5
    assert jitter.stalls(bits, 2**32).tolist() == [True] * 5


def test_stalls_and_factors_have_nothing_to_do_with_each_other():
    bits = jitter.task_bits(9, 0, np.zeros(40_000, np.int64), np.arange(40_000))
    stalled = jitter.stalls(bits, jitter.stall_threshold(0.3))
    factors = jitter.factors(bits, jitter.quantiles(0.5))
    assert stalled.mean() == pytest.approx(0.3, abs=0.01)  # standard error 0.0023
    assert np.corrcoef(stalled, factors)[0, 1] == pytest.approx(0.0, abs=0.02)  # standard error 0.005


def test_pe_factors_are_lognormal_with_median_one():
    logs = np.log(jitter.pe_factors(2, 4000, 0.1))
    assert np.median(logs) == pytest.approx(0.0, abs=0.008)  # standard error 0.1 * 1.25 / sqrt(4000) = 0.002
    assert logs.std() == pytest.approx(0.1, abs=0.005)  # standard error 0.0011
    assert jitter.pe_factors(2, 3, 0.1) == jitter.pe_factors(2, 8, 0.1)[:3]  # more PEs leave the others as they are
    assert jitter.pe_factors(2, 3, 0.1) != jitter.pe_factors(3, 3, 0.1)
