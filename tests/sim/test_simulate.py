"""simulate(): real layers on the presets, from arguments to header."""

import json

import numpy as np
import pytest

from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, policy_names
from flashmoe.routing import Routing
from flashmoe.sim import explain, simulate
from flashmoe.tasks import Tiling

QWEN = MoEModel.preset("qwen3-30b-a3b")
SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")


@pytest.mark.parametrize(
    "policy", ["ancestor", "push", "ticket", "domain_steal", "static_phase", "expert_lpt", "local_first"]
)
@pytest.mark.parametrize("tokens", [0, 1, [3, 0]])
def test_every_policy_runs_every_task_above_the_bound(policy, tokens):
    assert policy in policy_names()
    routing = Routing.uniform(SMALL, tokens, ep_size=2, seed=1)
    trace = simulate(SMALL, routing=routing, policy=policy, workers=5)
    assert trace.header["policy"] == policy
    assert trace.makespan_ps >= trace.header["bound_ps"]
    assert trace.header["headroom"] == pytest.approx(trace.makespan_ps / trace.header["bound_ps"] - 1)
    assert (trace.records["end_ps"] > 0).all()


@pytest.mark.parametrize("down", ["tile", "rows"])
@pytest.mark.parametrize("gate", [True, False])
def test_tiling_and_given_routing(down, gate):
    routing = Routing.uniform(SMALL, 4, ep_size=3, seed=1)
    trace = simulate(SMALL, routing=routing, policy="push", tiling=Tiling(down=down), gate=gate, workers=4)
    assert trace.header["tiling"]["down"] == down
    assert trace.header["gate_inside"] is gate
    assert (trace.records["kind"] == 0).any() == gate
    assert trace.makespan_ps >= trace.header["bound_ps"]


def test_64_tokens_on_one_mi300x_take_little_more_than_their_bytes():
    trace = simulate(QWEN, routing=Routing.uniform(QWEN, 64, ep_size=1, seed=0), policy="static_phase")
    distinct_experts = len(np.unique(Routing.uniform(QWEN, 64, ep_size=1, seed=0).topk_idx[0]))
    weight_bytes = distinct_experts * QWEN.expert_bytes + QWEN.gate_bytes
    assert trace.header["distinct_weight_bytes"] == weight_bytes
    assert trace.header["bounds_ps"]["hbm"] == pytest.approx(weight_bytes / 4200 * 1000, rel=1e-6)
    assert 1.0 <= trace.makespan_ps / trace.header["bounds_ps"]["hbm"] < 1.15


def test_one_token_in_whole_experts_is_slow_and_says_why():
    routing = Routing.uniform(QWEN, 1, ep_size=1, seed=0)
    ancestor = simulate(QWEN, routing=routing, policy="ancestor")
    tiles = simulate(QWEN, routing=routing, policy="static_phase")
    assert ancestor.makespan_ps > 5 * tiles.makespan_ps
    why = explain(ancestor)
    assert "Only 8 of 304 workers ever had a part of an expert" in why
    # 3 * 2048 * 768 * 2 bytes at 40 GB/s
    assert "a whole expert is 9.44 MB, which one CU streams in 235.9 us at its cap of 40 GB/s" in why
    assert "the distinct weights of the busiest PE at full memory bandwidth" in explain(tiles)


def test_a_shared_counter_is_slow_across_domains_and_stealing_is_not():
    routing = Routing.uniform(QWEN, 1, ep_size=1, seed=0)
    ticket, steal = (simulate(QWEN, routing=routing, policy=policy) for policy in ("ticket", "domain_steal"))
    # one after the other; the counter idles for a moment, when every worker holds as many picks as it may
    assert ticket.records["ticket_ps"].max() >= len(ticket.records) * 190_000 + 12_000
    assert steal.makespan_ps < ticket.makespan_ps / 5


def test_the_header_survives_json_and_describes_the_run():
    trace = simulate(SMALL, routing=Routing.uniform(SMALL, 3, ep_size=2, seed=0), machine="h200", workers=3, seed=7)
    header = json.loads(json.dumps(trace.header))
    expected = {
        "executor": "simpy",
        "machine": "h200",
        "ep_size": 2,
        "num_workers": 3,
        "num_domains": 1,
        "seed": 7,
    }
    assert expected.items() <= header.items()
    assert header["num_tokens"] == [3, 3]
    assert Machine(**header["machine_parameters"]) == Machine.preset("h200")
    assert set(header["bounds_ps"]) == {"hbm", "workers", "longest_task", "critical_path", "links"}
    assert header["hbm_bytes"] == trace.records["hbm_bytes"].sum()
    assert len(trace.critical_path) > 0


def test_the_same_arguments_give_the_same_records():
    routing = Routing.zipf(SMALL, 5, ep_size=2, exponent=1.0, seed=3)
    first, second = (simulate(SMALL, routing=routing, policy="domain_steal", workers=9) for _ in range(2))
    assert np.array_equal(first.records, second.records)


@pytest.mark.parametrize("policy", ["static_phase", "push"])
def test_a_schedule_replayed_keeps_its_workers(policy):
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    trace = simulate(SMALL, routing=routing, policy=policy, workers=3)
    replay = simulate(SMALL, routing=routing, policy=Policy.from_trace(trace), workers=3)
    assert replay.records["worker"].tolist() == trace.records["worker"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "native2"}, r"unknown engine 'native2' \(engines: simpy\)"),
        ({"workers": 0}, "workers=0 .*at least 1"),
        ({"machine": "mi9"}, "unknown machine 'mi9'"),
        ({"policy": "best"}, "'best' .*static_phase"),
        (
            {"machine": Machine(**(Machine.preset("h200").to_dict() | {"num_pes_max": 1}))},
            "ep_size=2 .*at most 1",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {"routing": Routing.uniform(SMALL, 1, ep_size=2, seed=0)} | change
    with pytest.raises(ValueError, match=message):
        simulate(SMALL, **arguments)


def test_a_measured_trace_cannot_be_explained():
    trace = simulate(SMALL, routing=Routing.uniform(SMALL, 1, ep_size=1, seed=0), workers=2)
    header = {key: value for key, value in trace.header.items() if key != "bounds_ps"} | {"executor": "cpu"}
    with pytest.raises(ValueError, match="no bounds in a trace of executor 'cpu'"):
        explain(type(trace)(trace.records, header, trace.critical_path))
