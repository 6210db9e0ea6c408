"""The same scheduling in the model and on threads: one worker a PE runs the same tasks in the same order."""

import functools

import numpy as np
import pytest
from layers import BUILT_IN_POLICIES, EIGHT, skewed_routing, tokens

from flashmoe.hw import run
from flashmoe.policy import Policy
from flashmoe.sim import simulate
from flashmoe.tasks import ORDERS, Tiling
from flashmoe.weights import Weights

TILINGS = {
    "own": None,  # the policy's
    "small": Tiling(gate_tokens=2, gate_experts=3, up_rows=7, down_rows=11, block_tokens=2, combine_tokens=2),
    "rows": Tiling(down="rows", down_rows=9, experts_per_pick=2, block_tokens=2),
    "token": Tiling(granularity="token"),
}


@functools.cache
def weights():
    return Weights.random(EIGHT, seed=5)


def order_of(trace, pe):
    """Task ids of a PE by start. With one worker two tasks start together only if the first took no time at all."""
    mine = trace.records[trace.records["pe"] == pe]
    return mine["task_id"][np.lexsort((mine["end_ps"], mine["start_ps"]))].tolist()


def assert_same_order(ep_size, policy, tiling, *, given, seed):
    counts = [(2 * pe + seed) % 5 for pe in range(ep_size)]
    x = tokens(EIGHT, counts, seed)
    routing = skewed_routing(EIGHT, counts, seed, skew=[0.0, 1.5, 30.0][seed % 3], dropped=0.2) if given else None
    result = run(EIGHT, weights(), x, workers=1, policy=policy, tiling=tiling, routing=routing, deadline_s=30)
    trace = simulate(
        EIGHT, routing=result.routing, machine="mi300x", policy=policy, tiling=tiling, workers=1, gate=not given
    )
    assert len(trace.records) == len(result.trace.records)
    for pe in range(ep_size):
        assert order_of(trace, pe) == order_of(result.trace, pe), f"PE {pe}"


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("policy", BUILT_IN_POLICIES)
@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_built_in_policies(ep_size, policy, tiling):
    for seed, given in ((0, False), (1, True), (2, True)):
        assert_same_order(ep_size, policy, TILINGS[tiling], given=given, seed=seed)


@pytest.mark.parametrize("queue", ["push", "ticket", "domain", "static"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_on_every_queue(order, queue):
    policy = Policy(name="mine", queue=queue, order=order, look_ahead=2, tiling=Tiling(up_rows=7, block_tokens=2))
    assert_same_order(4, policy, None, given=True, seed=4)


@pytest.mark.parametrize("queue", ["ticket", "domain", "static"])
def test_an_order_in_python(queue):
    policy = Policy(name="mine", queue=queue, look_ahead=2, rank=lambda task: (task.tile % 2, -task.num_tokens))
    assert_same_order(2, policy, None, given=True, seed=1)
    assert_same_order(2, policy, None, given=False, seed=2)


def test_a_schedule_of_the_model_runs_on_threads():
    counts = [3, 4]
    routing = skewed_routing(EIGHT, counts, 0, skew=1.0, dropped=0.0)
    trace = simulate(EIGHT, routing=routing, machine="mi300x", policy="expert_lpt", workers=3, gate=False)
    x = tokens(EIGHT, counts)
    result = run(EIGHT, weights(), x, workers=3, policy=Policy.from_trace(trace), routing=routing, deadline_s=30)
    for pe in range(2):
        for worker in range(3):
            pair = []
            for records in (trace.records, result.trace.records):
                mine = records[(records["pe"] == pe) & (records["worker"] == worker)]
                pair.append(mine["task_id"][np.lexsort((mine["end_ps"], mine["start_ps"]))].tolist())
            assert pair[0] == pair[1]
    plain = run(EIGHT, weights(), x, workers=3, routing=routing, deadline_s=30)
    for ours, theirs in zip(result.outputs, plain.outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
