"""simulate() and evaluate(): real layers on the presets, from arguments to header and totals."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, policy_names
from flashmoe.routing import Routing
from flashmoe.sim import ENGINES, TIME_SHARES, evaluate, simulate
from flashmoe.sim.effects import without
from flashmoe.tasks import Tiling

QWEN = MoEModel.preset("qwen3-30b-a3b")
SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")
MI300X = Machine.preset("mi300x")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "policy", ["ancestor", "push", "ticket", "domain_steal", "static_phase", "expert_lpt", "local_first"]
)
@pytest.mark.parametrize("tokens", [0, 1, [3, 0]])
def test_every_policy_runs_every_task_above_the_bound(engine, policy, tokens):
    assert policy in policy_names()
    routing = Routing.uniform(SMALL, tokens, ep_size=2, seed=1)
    trace = simulate(SMALL, routing=routing, policy=policy, workers=5, engine=engine, without=["jitter"])
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


def test_64_tokens_on_one_mi300x_stream_every_chosen_expert_once():
    routing = Routing.uniform(QWEN, 64, ep_size=1, seed=0)
    trace = simulate(QWEN, routing=routing, policy="static_phase", without=["pe_spread"])
    weight_bytes = len(np.unique(routing.topk_idx[0])) * QWEN.expert_bytes + QWEN.gate_bytes
    assert trace.header["distinct_weight_bytes"] == weight_bytes
    hbm_ps = weight_bytes / MI300X.hbm_bytes_per_ns * 1000 + MI300X.launch_ps
    assert trace.header["bounds_ps"]["hbm"] == pytest.approx(hbm_ps, rel=1e-6)
    assert 1.0 <= trace.makespan_ps / hbm_ps < 1.25


def test_one_token_in_whole_experts_is_slow():
    routing = Routing.uniform(QWEN, 1, ep_size=1, seed=0)
    ancestor, tiles = (
        evaluate(QWEN, routing=routing, policy=policy, without=["launch_ramp"])
        for policy in ("ancestor", "static_phase")
    )
    assert ancestor.makespan_ps > 5 * tiles.makespan_ps


def test_a_shared_counter_is_slow_across_domains_and_stealing_is_not():
    routing = Routing.uniform(QWEN, 1, ep_size=1, seed=0)
    ticket, steal = (simulate(QWEN, routing=routing, policy=policy) for policy in ("ticket", "domain_steal"))
    one_after_the_other_ps = len(ticket.records) * MI300X.ticket_far_service_ps
    assert ticket.records["ticket_ps"].max() >= one_after_the_other_ps
    assert steal.makespan_ps < ticket.makespan_ps / 4


@pytest.mark.parametrize("engine", ENGINES)
def test_the_header_survives_json_and_describes_the_run(engine):
    routings = [Routing.uniform(SMALL, 3, ep_size=2, seed=seed) for seed in (0, 1)]
    options = {"machine": "h200", "workers": 3, "seed": 7, "gap_us": 2.5, "without": ["knee"], "pe_speed": [1.0, 0.9]}
    trace = simulate(SMALL, routing=routings, engine=engine, **options)
    header = json.loads(json.dumps(trace.header))
    expected = {
        "executor": engine,
        "machine": "h200",
        "ep_size": 2,
        "num_workers": 3,
        "num_domains": 1,
        "seed": 7,
        "layers": 2,
        "gap_us": 2.5,
        "without": ["knee"],
        "routing": [routing.digest for routing in routings],
    }
    assert expected.items() <= header.items()
    assert header["num_tokens"] == [3, 3]
    machine = without(Machine.preset("h200"), ["knee"])
    assert Machine(**header["machine_parameters"]) == machine
    if machine.pe_spread == 0:
        assert header["pe_speed"] == [1.0, 0.9]
    assert set(header["bounds_ps"]) == {"hbm", "workers", "longest_task", "critical_path", "links"}
    assert header["hbm_bytes"] == trace.records["hbm_bytes"].sum()
    ends = [trace.records["end_ps"][trace.records["layer"] == layer].max() for layer in (0, 1)]
    assert header["layer_end_ps"] == ends
    assert set(header["time_ps"]) == set(TIME_SHARES)
    assert len(trace.critical_path) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_arguments_give_the_same_records_and_another_seed_does_not(engine):
    routing = Routing.zipf(SMALL, 5, ep_size=2, exponent=1.0, seed=3)
    machine = Machine(**(MI300X.to_dict() | {"jitter": 0.2}))
    options = {"routing": routing, "policy": "domain_steal", "workers": 9, "machine": machine, "engine": engine}
    first, second, other = (simulate(SMALL, seed=seed, **options) for seed in (1, 1, 2))
    assert np.array_equal(first.records, second.records)
    assert not np.array_equal(first.records, other.records)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("policy", ["static_phase", "push"])
def test_a_schedule_replayed_keeps_its_workers(engine, policy):
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    trace = simulate(SMALL, routing=routing, policy=policy, workers=3, engine=engine)
    replay = simulate(SMALL, routing=routing, policy=Policy.from_trace(trace), workers=3, engine=engine)
    assert replay.records["worker"].tolist() == trace.records["worker"].tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_routing_is_a_list_of_one(engine):
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    alone, listed = (simulate(SMALL, routing=given, workers=3, engine=engine) for given in (routing, [routing]))
    assert np.array_equal(alone.records, listed.records)
    assert alone.header["routing"] == listed.header["routing"] == routing.digest


def test_a_slow_pe_is_late():
    routing = Routing.uniform(QWEN, 8, ep_size=2, seed=2)
    even, slow = (evaluate(QWEN, routing=routing, pe_speed=speeds) for speeds in (None, [1.0, 0.5]))
    assert 1.3 < slow.makespan_ps / even.makespan_ps < 2.0


def test_without_an_effect_a_run_is_as_on_a_machine_without_it():
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    names = ["ticket", "launch_ramp"]
    switched = simulate(SMALL, routing=routing, workers=3, without=names)
    other = simulate(SMALL, routing=routing, workers=3, machine=without(MI300X, names))
    assert np.array_equal(switched.records, other.records)
    assert switched.makespan_ps < simulate(SMALL, routing=routing, workers=3).makespan_ps


def test_gaps_are_added():
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    options = {"routing": [routing] * 3, "workers": 3, "without": ["jitter", "stalls"]}
    none, some = (evaluate(SMALL, gap_us=gap_us, **options) for gap_us in (0, 12.5))
    assert some.makespan_ps - none.makespan_ps == 2 * 12_500_000
    one = evaluate(SMALL, **(options | {"routing": routing}))
    assert none.layer_end_ps[0] == one.makespan_ps


@pytest.mark.parametrize("options", [{}, {"gap_us": 1.0}, {"gate": False}, {"tiling": Tiling(granularity="token")}])
@pytest.mark.parametrize("policy", ["push", "domain_steal"])
def test_evaluate_says_what_simulate_says(policy, options):
    routings = [Routing.zipf(SMALL, [3, 5], ep_size=2, seed=seed) for seed in (1, 2)]
    arguments = {"routing": routings, "policy": policy, "workers": 4, **options}
    native, simpy = (evaluate(SMALL, engine=engine, **arguments) for engine in ("native", "simpy"))
    assert native == simpy
    header = simulate(SMALL, **arguments).header
    assert {name: header[name] for name in vars(native).keys() & header} == {
        name: value for name, value in vars(native).items() if name in header
    }


def test_evaluate_replays():
    routing = Routing.uniform(SMALL, 4, ep_size=2, seed=2)
    trace = simulate(SMALL, routing=routing, workers=3)
    totals = evaluate(SMALL, routing=routing, workers=3, policy=Policy.from_trace(trace))
    assert totals.num_tasks == len(trace.records)


def test_evaluate_takes_what_simulate_takes():
    of_simulate, of_evaluate = (dict(inspect.signature(run).parameters) for run in (simulate, evaluate))
    del of_simulate["progress"]
    assert of_simulate == of_evaluate


MEMORY = """
import resource
from flashmoe import MoEModel, Routing
from flashmoe.sim import evaluate

model = MoEModel.preset("qwen3-30b-a3b")
routing = Routing.uniform(model, 2, ep_size=4, seed=0)
for layers in (4, 64):
    evaluate(model, routing=[routing] * layers, gap_us={gap_us})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("gap_us", [None, 0])
def test_memory_stays_flat_however_many_layers_there_are(gap_us):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY.format(gap_us=gap_us)], capture_output=True, text=True, check=True, timeout=300
    )
    few_kb, many_kb = map(int, run.stdout.split())
    assert many_kb - few_kb < 1_000  # 505,200 more tasks: 2 bytes each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "native2"}, r"unknown engine 'native2' \(engines: native, simpy\)"),
        ({"workers": 0}, r"workers=0 \(must be a whole number in 1\.\.65535\)"),
        ({"workers": 65_536}, "workers=65536"),
        ({"machine": "mi9"}, "unknown machine 'mi9'"),
        ({"policy": "best"}, "'best' .*static_phase"),
        ({"machine": Machine(**(Machine.preset("h200").to_dict() | {"num_pes_max": 1}))}, "ep_size=2 .*at most 1"),
        ({"routing": []}, r"routing=\[\] \(must be a Routing, or one a layer\)"),
        (
            {"routing": [Routing.uniform(SMALL, 1, ep_size=ep_size, seed=0) for ep_size in (1, 2)]},
            r"routings for \[1, 2\] PEs",
        ),
        ({"gap_us": -1.0}, r"gap_us=-1.0 \(must be None, or"),
        ({"gap_us": float("nan")}, "gap_us=nan"),
        ({"without": "jitter"}, r"without='jitter' \(must be a list of effects: memory_sharing, "),
        ({"without": ["gravity"]}, "unknown effect 'gravity'"),
        ({"pe_speed": [1.0]}, r"pe_speed=\[1.0\] \(must be 2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
@pytest.mark.parametrize("run", [simulate, evaluate])
def test_bad_arguments_are_refused_by_name(run, change, message):
    arguments = {"routing": Routing.uniform(SMALL, 1, ep_size=2, seed=0)} | change
    with pytest.raises(ValueError, match=message):
        run(SMALL, **arguments)
