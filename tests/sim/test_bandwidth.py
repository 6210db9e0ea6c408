"""Capped processor sharing against closed forms and by hand. 1 byte at 1 GB/s takes 1000 ps."""

import numpy as np
import pytest
import simpy

from flashmoe.sim.bandwidth import CappedSharing, ceil_ps


def fair_rates(total, cap, num_streams):
    """The lesser of the cap and the fair share, of each of n streams [bytes/ps]; total, cap [bytes/ns]."""
    return np.array([0.0] + [min(cap, total / n) / 1000 for n in range(1, num_streams + 1)])


def end_times_ps(total, cap, arrivals):
    """When each stream ends; arrivals: (time [ps], bytes)."""
    env = simpy.Environment(0)
    channel = CappedSharing(env, fair_rates(total, cap, len(arrivals)), 0)
    ends = [-1] * len(arrivals)

    def stream(index, at_ps, num_bytes):
        yield env.timeout(at_ps)
        done = env.event()
        channel.start(num_bytes, done.succeed)
        yield done
        ends[index] = env.now

    for index, (at_ps, num_bytes) in enumerate(arrivals):
        env.process(stream(index, at_ps, num_bytes))
    env.run()
    return ends


@pytest.mark.parametrize("num_streams", [1, 2, 7, 304])
def test_equal_streams_share_the_channel_evenly(num_streams):
    assert end_times_ps(10, 10, [(0, 700.0)] * num_streams) == [num_streams * 70_000] * num_streams


def test_few_streams_run_at_their_cap():
    # 3 streams of at most 4 GB/s in a channel of 100: 1000 bytes take 250 ns each
    assert end_times_ps(100, 4, [(0, 1000.0)] * 3) == [250_000] * 3


def test_streams_beyond_total_over_cap_slow_everybody_down():
    # 5 streams, cap 40 of 100: fair share 20, so 1000 bytes take 50 ns
    assert end_times_ps(100, 40, [(0, 1000.0)] * 5) == [50_000] * 5


def test_staggered_arrivals_by_hand():
    # Total 2 GB/s, cap 2. A: 200 bytes at 0; B: 100 bytes at 50 ns. At 50 ns A has 100 left; both then get
    # 1 GB/s and end at 150 ns.
    assert end_times_ps(2, 2, [(0, 200.0), (50_000, 100.0)]) == [150_000, 150_000]
    # B of 50 bytes: ends at 100 ns; A has 50 left then, at 2 GB/s 25 ns more.
    assert end_times_ps(2, 2, [(0, 200.0), (50_000, 50.0)]) == [125_000, 100_000]


def test_a_stream_alone_again_after_an_idle_time():
    assert end_times_ps(2, 1, [(0, 10.0), (1_000_000, 10.0)]) == [10_000, 1_010_000]


def test_fractions_of_a_picosecond_round_up_and_noise_does_not():
    assert end_times_ps(3, 3, [(0, 1.0)]) == [334]  # 333.33 ps
    assert end_times_ps(0.1, 0.1, [(0, 3.0)]) == [30_000]  # 3 / 0.1 * 1000 = 30000.000000000004 in float64
    assert [ceil_ps(ps) for ps in (0.0, 0.0005, 0.5, 1.0, 1.0005, 1.5)] == [0, 0, 1, 1, 1, 2]


def test_agrees_with_a_fluid_model_that_rescans_every_stream():
    rng = np.random.default_rng(7)
    arrivals = [
        (int(at), float(size)) for at, size in zip(rng.integers(0, 10**6, 60), rng.integers(1, 9999, 60), strict=True)
    ]
    total, cap = 50.0, 8.0
    left = {}
    expected = [0.0] * len(arrivals)
    now = 0.0
    coming = sorted((at, index) for index, (at, _) in enumerate(arrivals))
    while coming or left:
        rate = min(cap, total / len(left)) / 1000 if left else 0.0
        next_end = now + min(left.values()) / rate if left else float("inf")
        next_arrival = coming[0][0] if coming else float("inf")
        step_to = min(next_end, next_arrival)
        left = {index: size - rate * (step_to - now) for index, size in left.items()}
        now = step_to
        for index in [index for index, size in left.items() if size <= 1e-6]:
            expected[index] = now
            del left[index]
        while coming and coming[0][0] <= now:
            index = coming.pop(0)[1]
            left[index] = arrivals[index][1]
    assert np.abs(np.array(end_times_ps(total, cap, arrivals)) - expected).max() < 60  # a ps lost at each rounding


def test_rates_may_be_anything():
    env = simpy.Environment(0)
    channel = CappedSharing(env, np.array([0.0, 0.010, 0.002]), 0)  # two together get less than one alone
    ends = {}
    for name, num_bytes in (("short", 2.0), ("long", 4.0)):
        channel.start(num_bytes, lambda name=name: ends.update({name: env.now}))
    assert channel.num_streams == 2
    env.run()
    # 2 bytes at 2 bytes/ns; then the long one's other 2 bytes at 10
    assert ends == {"short": 1_000, "long": 1_200}
    assert channel.num_streams == 0


def test_channels_come_first_by_rank_and_streams_that_end_together_in_the_order_of_their_start():
    env = simpy.Environment(0)
    channels = [CappedSharing(env, fair_rates(100, 1, 2), rank) for rank in (0, 1)]
    order = []
    env.timeout(5_000).callbacks.append(lambda _: order.append("timeout"))
    for name, channel in (("b1", 1), ("b2", 1), ("a1", 0), ("a2", 0)):
        channels[channel].start(5.0, lambda name=name: order.append(name))
    env.run()
    assert env.now == 5_000
    assert order == ["a1", "a2", "b1", "b2", "timeout"]
