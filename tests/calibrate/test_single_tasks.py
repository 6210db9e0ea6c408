"""Costs of a kernel from launches of layers: those of a machine that is known are found again."""

from dataclasses import replace

import numpy as np
import pytest

import flashmoe as fm
from flashmoe.calibrate.device import Parameter
from flashmoe.calibrate.single_tasks import single_task_parameters
from flashmoe.hw.tuned import tuned
from flashmoe.machine import Machine, parameter_units
from flashmoe.measured import MeasuredLayer
from flashmoe.policy import resolve

MODEL = fm.MoEModel(d_model=2048, d_ff=768, num_experts=16, top_k=4)
NONE = {key: 0 for key in parameter_units() if key.endswith("_overhead_ps")}
BARE = replace(
    Machine.preset("h200"),
    **NONE,
    jitter=0.0,
    gap_ps=0,
    feed_bytes_per_ns=0.0,
    prologue_ps=0,
    plan_ps=1,
    plan_token_ps=0,
    sort_ps=0,
    sort_expert_ps=0,
    finish_beside=True,
    word_tokens=8,
)
TRUTH = {
    "feed_bytes_per_ns": 60.0,
    "gap_ps": 100_000,
    "gate_overhead_ps": ((1, 300_000), (4, 500_000), (32, 1_800_000), (128, 2_000_000)),
    "route_overhead_ps": ((1, 900_000), (8, 1_100_000)),
    "up_overhead_ps": 200_000,
    "down_overhead_ps": 200_000,
    "combine_overhead_ps": ((1, 800_000),),
    "prologue_ps": 1_000_000,
    "plan_ps": 3_000_000,
    "plan_token_ps": 11_000,
    "sort_ps": 400_000,
    "sort_expert_ps": 50_000,
}


def launched(tokens, machine, workers=1, policy="static_phase"):
    """A layer that was "measured" on a machine that is known."""
    policy = resolve(policy, tuned(tokens).tiling)
    routing = fm.Routing.uniform(MODEL, tokens, 1, seed=0)
    clock = replace(machine, launch_ps=0, pe_spread=0.0)
    trace = fm.simulate(MODEL, machine=clock, routing=routing, policy=policy, workers=workers)
    return MeasuredLayer(trace, routing, np.array([trace.makespan_us]))


def openings(machine):
    """Gates of 1, 4, 32 and 128 in size, with more workers than there are of them; routes of 1, 4 and 8 tokens."""
    return [launched(tokens, machine, workers=64) for tokens in (1, 4, 16, 64)]


@pytest.fixture(scope="module")
def found():
    truth = replace(BARE, **TRUTH)
    layers = [launched(tokens, truth) for tokens in (1, 4, 16, 64)]
    layers += [launched(tokens, truth, policy="expert_lpt") for tokens in (1, 4)]
    return single_task_parameters([*layers, *openings(truth)], BARE)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("prologue_ps", 0.01),
        ("feed_bytes_per_ns", 0.05),
        ("plan_ps", 0.05),
        ("sort_ps", 0.01),
        ("sort_expert_ps", 0.01),
        ("gap_ps", 0.2),
        ("plan_token_ps", 0.3),
        ("up_overhead_ps", 0.4),  # what the feed is off by is in it
        ("down_overhead_ps", 0.4),
    ],
)
def test_costs_are_found_again(found, name, tolerance):
    assert found[name].value == pytest.approx(TRUTH[name], rel=tolerance)


def test_fixed_parts_of_each_size_are_found_again(found):
    def assert_found(kind, times):
        sizes, times_ps = zip(*found[f"{kind}_overhead_ps"].value, strict=True)
        assert sizes == tuple(size for size, _ in times)
        assert times_ps == pytest.approx([time_ps for _, time_ps in times], rel=0.01)

    assert_found("gate", TRUTH["gate_overhead_ps"])
    # 3 of 7 of the way from 1 to 8 tokens
    assert_found("route", [(1, 900_000), (4, 900_000 + 200_000 * 3 / 7), (8, 1_100_000)])
    assert_found("combine", TRUTH["combine_overhead_ps"])


def test_nothing_else_is_claimed(found):
    assert found.keys() == TRUTH.keys()
    assert all(isinstance(parameter, Parameter) and parameter.spread >= 0 for parameter in found.values())


def test_a_kernel_that_keeps_up_with_its_stream_has_no_rate_of_its_own():
    layers = [launched(tokens, BARE) for tokens in (1, 4, 16)]
    assert single_task_parameters([*layers, *openings(BARE)], BARE)["feed_bytes_per_ns"].value == 0


def test_other_launches_are_refused():
    with pytest.raises(ValueError, match="no launch with several workers"):
        single_task_parameters([launched(1, BARE), launched(4, BARE)], BARE)
    with pytest.raises(ValueError, match=r"launches of \[4.0\] tokens"):
        single_task_parameters([launched(4, BARE), *openings(BARE)], BARE)


def test_what_is_finished_beside_the_next_task_takes_no_longer_than_the_next_task():
    truth = replace(BARE, **TRUTH)
    layers = []
    for layer in (launched(tokens, truth) for tokens in (1, 4, 16, 64)):
        records = layer.trace.records.copy()  # as where each task of a kernel waits until those before it are finished
        records["end_ps"][layer.trace.kind_names == "up"] += 5_000_000
        layers.append(replace(layer, trace=replace(layer.trace, records=records)))
    # of the smallest tile: gap, 64 KiB through the products, a token's row in and 8 results out
    least_ps = 100_000 + 1_000 * (65_536 / 60.0 + 2 * (2048 + 8) / BARE.cache_bytes_per_ns)
    found = single_task_parameters([*layers, *openings(truth)], BARE)
    assert found["up_overhead_ps"].value == pytest.approx(least_ps, rel=0.02)


def test_a_task_that_waits_for_others_to_be_finished_does_not_count():
    truth = replace(BARE, **TRUTH)
    layers = []
    for tokens in (1, 4, 16, 64):
        layer = launched(tokens, truth)
        records = layer.trace.records.copy()
        late_ps = 3_000_000 if tokens <= 4 else 0  # from one start to the next they take 1.4 us
        records["end_ps"][layer.trace.kind_names == "up"] += late_ps
        layers.append(replace(layer, trace=replace(layer.trace, records=records)))
    overhead = single_task_parameters([*layers, *openings(truth)], BARE)["up_overhead_ps"]
    assert overhead.value == pytest.approx(TRUTH["up_overhead_ps"], rel=0.4)
    assert "over 2 launches" in overhead.source
