"""The pipelined kernel's logic, without a GPU: its threads are fibers, run in a random order; results are right.

$FLASHMOE_FIBER_SEEDS: how many random layers to try.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hw.fibers.library import fibers, set_seed
from layers import assert_right, bits, skewed_routing, tokens, tokens_without_ties, weights_of
from numpy.typing import NDArray

from flashmoe import MoEModel, Policy, Routing, Tiling
from flashmoe.hw import LaunchError, native_layer
from flashmoe.hw.device import DeviceLayer
from flashmoe.reference import gate_logits, route
from flashmoe.schedule import to_schedule
from flashmoe.tasks import TaskTable

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++, no GPU"
)
SEEDS = int(os.environ.get("FLASHMOE_FIBER_SEEDS", "30"))

MODELS = {
    # a part of a slot of the ring; experts that no power of two divides
    "narrow": MoEModel(d_model=64, d_ff=192, num_experts=5, top_k=3, norm_topk_prob=False),
    # odd numbers of the instruction's tiles in every matrix, and more slots than the ring has
    "odd": MoEModel(d_model=320, d_ff=64, num_experts=16, top_k=4),
    # several experts for each lane that makes the plan
    "wide": MoEModel(d_model=128, d_ff=64, num_experts=70, top_k=2),
}
TILINGS = {
    "small": Tiling(gate_tokens=4, gate_experts=4, up_rows=16, down_rows=16, block_tokens=8, combine_tokens=4),
    "blocks of 16": Tiling(gate_experts=16, up_rows=32, down_rows=128, block_tokens=16),
    "blocks of 32": Tiling(gate_tokens=16, gate_experts=16, up_rows=64, down_rows=64, block_tokens=32),
    "blocks of 64": Tiling(gate_tokens=32, gate_experts=16, up_rows=64, down_rows=128, combine_tokens=2),
    "rows": Tiling(down="rows", gate_experts=1, down_rows=16, block_tokens=8),
    # few tokens, too, as lists: results are combined
    "narrow groups": Tiling(down="rows", gate_experts=1, down_rows=16, block_tokens=8, experts_per_pick=3),
    "groups": Tiling(down="rows", gate_experts=16, up_rows=32, down_rows=32, block_tokens=16, experts_per_pick=3),
    "wide rows": Tiling(down="rows", gate_tokens=16, up_rows=64, down_rows=128, block_tokens=32),
}
DEADLINE_S = 16e-3  # by the fibers' clock, which counts their steps: a launch that goes on has waits of up to 5 ms
BIG_FIRST = Policy(name="big_first", queue="static", rank=lambda task: -task.num_tokens)
POLICIES = ["ticket", "push", "domain_steal", "static_phase", "expert_lpt", "local_first", "remote_first", BIG_FIRST]
for policy_order in ("arrival", "expert", "phase"):
    POLICIES.append(Policy(name=f"domain, {policy_order}", queue="domain", order=policy_order))


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with fibers(tmp_path_factory.mktemp("fibers")):
        yield


def make_layer(model: MoEModel, **arguments: Any) -> DeviceLayer:
    defaults = {"ep_size": 1, "max_tokens": 40, "workers": 2, "policy": "ticket", "kernel": "pipeline"}
    return DeviceLayer(model, weights_of(model), **{**defaults, **arguments})


def assert_traced(result: Any, model: MoEModel, tiling: Tiling, *, gate: bool) -> None:
    """Every task has one record, with its times in order."""
    table, records = TaskTable(model, result.routing, tiling, gate=gate), result.trace.records
    assert result.trace.header["drops"] == 0
    for field in ("task_id", "kind", "expert", "tile", "num_tokens"):
        np.testing.assert_array_equal(records[field], table.tasks[field], err_msg=field)
    assert (records["ticket_ps"] <= records["start_ps"]).all()
    assert (records["start_ps"] <= records["end_ps"]).all()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_layer_is_right_launch_after_launch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = MODELS[rng.choice(list(MODELS))]
    tiling = TILINGS[rng.choice(list(TILINGS))]
    policy = POLICIES[rng.integers(len(POLICIES))]
    trace = bool(rng.integers(2))
    workers, domains = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    layer = make_layer(model, policy=policy, tiling=tiling, workers=workers, domains=domains, trace=trace)
    plain = make_layer(model, tiling=tiling, workers=1, trace=False)
    for turn in range(3):
        set_seed(model, 10 * seed + turn)
        counts = [int(rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 33, 40]))]
        x = tokens(model, counts, seed)
        routing = None
        if rng.integers(2):
            skew, dropped = rng.choice([0.0, 1.0, 30.0]), rng.choice([0, 0.3, 1])
            routing = skewed_routing(model, counts, seed, skew, dropped)
        elif policy is BIG_FIRST:  # its lists are made for what the reference's gate chooses
            x = tokens_without_ties(model, weights_of(model), [min(counts[0], 9)])
        result = layer(x, routing=routing)
        assert_right(model, x, result)
        if trace:
            assert_traced(result, model, tiling, gate=routing is None)
        set_seed(model, 10 * seed + turn + 5)
        assert bits(plain(x, routing=routing).outputs) == bits(result.outputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["ticket", "static_phase", Policy(name="as met", order="arrival")])
def test_picks_that_are_taken_early_may_turn_out_to_be_no_up_tasks(policy: str | Policy, seed: int) -> None:
    model, tiling, counts = MODELS["odd"], TILINGS["rows"], [1]  # 8 up tasks an expert
    layer = make_layer(model, policy=policy, tiling=tiling, workers=8)
    x, whole = tokens(model, counts, seed), skewed_routing(model, counts, seed, skew=0.0, dropped=0.0)
    for num_kept in (0, 1, 2, 1):
        set_seed(model, 10 * seed + num_kept)
        idx = np.where(np.arange(model.top_k) < num_kept, whole.topk_idx[0], np.int32(-1))
        routing = Routing((idx,), whole.topk_weights, model.num_experts, "few pairs")
        result = layer(x, routing=routing)
        assert_right(model, x, result)
        assert_traced(result, model, tiling, gate=False)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gate_chooses_as_the_reference_does(name: str, tiling: str) -> None:
    model = MODELS[name]
    layer = make_layer(model, tiling=TILINGS[tiling], trace=False)
    for count in (3, 9):
        (x,) = tokens_without_ties(model, weights_of(model), [count])
        idx, weights = route(gate_logits(model, weights_of(model), x), model)
        routing = layer([x]).routing
        np.testing.assert_array_equal(routing.topk_idx[0], idx)
        # a logit may lie one step of bf16, 2**-8 of its size, from the reference's
        np.testing.assert_allclose(routing.topk_weights[0], weights, rtol=3e-2)


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.parametrize("tiling", TILINGS)
def test_a_poisoned_token_poisons_itself_alone(tiling: str, count: int) -> None:
    model = MODELS["wide"]
    layer = make_layer(model, tiling=TILINGS[tiling], trace=False)
    (x,) = tokens(model, [count])
    (clean,) = layer([x]).outputs
    poisoned = x.copy()
    poisoned[2] = np.nan
    (outputs,) = layer([poisoned]).outputs
    assert np.isnan(outputs[2].astype(np.float32)).all()
    others = np.arange(count) != 2
    assert outputs[others].tobytes() == clean[others].tobytes()


# ---- launches that cannot go on


def following(tiling: str, seed: int) -> tuple[DeviceLayer, MoEModel, list[NDArray[Any]], Routing]:
    """A layer that follows lists, and a routing for it."""
    model = MODELS["odd"]
    set_seed(model, seed)
    layer = make_layer(model, policy=BIG_FIRST, tiling=TILINGS[tiling], workers=3, deadline_s=DEADLINE_S)
    counts = [5 if seed % 2 else 20]
    return layer, model, tokens(model, counts), skewed_routing(model, counts, seed, skew=1.0, dropped=0.1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tiling", TILINGS)
def test_a_replay_for_another_routing_is_reported_and_the_layer_goes_on(tiling: str, seed: int) -> None:
    layer, model, x, routing = following(tiling, seed)
    wanted = bits(layer(x, routing=routing).outputs)
    other = skewed_routing(model, [len(x[0])], seed + 100, skew=1.0, dropped=0.1)
    follow = native_layer.NativeLayer.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_layer.NativeLayer, "follow", lambda self, _, gate: follow(self, other, gate=gate))
        with pytest.raises(LaunchError, match="the replayed schedule was made for another routing") as error:
            layer(x, routing=routing)
    digests = [TaskTable(model, r, TILINGS[tiling], gate=False).plan_digests[0] for r in (routing, other)]
    assert [error.value.fault["seen"], error.value.fault["wanted"]] == digests
    assert bits(layer(x, routing=routing).outputs) == wanted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tiling", TILINGS)
def test_lists_that_deadlock_end_at_the_deadline_and_the_layer_goes_on(tiling: str, seed: int) -> None:
    layer, _, x, routing = following(tiling, seed)
    wanted = bits(layer(x, routing=routing).outputs)

    def backwards(*arguments: Any) -> list[list[list[int]]]:
        return [[ids[::-1] for ids in pe] for pe in to_schedule(*arguments)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_layer, "to_schedule", backwards)
        with pytest.raises(LaunchError, match=r"PE 0 worker \d, epoch 2: waited .* s with ") as error:
            layer(x, routing=routing)
    assert error.value.fault["waited_s"] >= DEADLINE_S
    assert error.value.fault["seen"] != error.value.fault["wanted"]
    for _ in range(2):
        assert bits(layer(x, routing=routing).outputs) == wanted
