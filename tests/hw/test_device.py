"""The layer computed on a GPU: right numbers, the same bits whoever runs which task, launch after launch."""

import functools
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cards import BACKENDS, MODEL, launch, make_layer
from layers import (
    BUILT_IN_POLICIES,
    assert_right,
    bits,
    expected,
    skewed_routing,
    tokens,
    tokens_without_ties,
    weights_of,
)
from qwen import torch

import flashmoe as fm
from flashmoe import chrome, explain
from flashmoe.hw import LaunchError, native_layer
from flashmoe.model import MoEModel
from flashmoe.plots import comparison, timeline
from flashmoe.policy import Policy
from flashmoe.reference import gate_logits, relative_error, route
from flashmoe.routing import Routing
from flashmoe.schedule import to_schedule
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.weights import Weights

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

TILINGS = {
    "tile": Tiling(),
    "small": Tiling(
        gate_tokens=4, gate_experts=4, dispatch_tokens=2, up_rows=16, down_rows=16, block_tokens=8, combine_tokens=3
    ),
    "rows": Tiling(down="rows", down_rows=16, block_tokens=8),
    "groups": Tiling(down="rows", gate_experts=16, up_rows=32, down_rows=32, block_tokens=16, experts_per_pick=2),
    "token": Tiling(granularity="token"),
}
COUNTS = {1: [37], 2: [0, 29], 4: [8, 0, 17, 1], 8: [3, 0, 9, 16, 0, 1, 5, 2]}
SMALL = {1: [7], 2: [0, 5], 4: [3, 0, 1, 2], 8: [1, 0, 2, 0, 1, 0, 1, 1]}  # the gate inside, without near-ties


@pytest.fixture
def make(backend):
    return functools.partial(make_layer, MODEL, backend)


def routings(ep_size, seed=0):
    """One of each skew; all tokens to one PE and dropped slots among them."""
    counts = COUNTS[ep_size]
    return [
        Routing.uniform(MODEL, counts, ep_size, seed),
        Routing.zipf(MODEL, counts, ep_size, seed, exponent=1.2),
        Routing.hot(MODEL, counts, ep_size, seed, num_hot=MODEL.top_k),
        Routing.one(MODEL, counts, ep_size, seed),
        skewed_routing(MODEL, counts, seed, skew=1.0, dropped=0.4),
        skewed_routing(MODEL, counts, seed, skew=0.0, dropped=1.0),
    ]


BIG_FIRST = Policy(name="big_first", queue="static", rank=lambda task: -task.num_tokens)


# ---- right, and the same bits


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("tiling", TILINGS)
def test_every_queue_is_right_and_gives_the_same_bits_for_every_skew(make, tiling, ep_size):
    x = tokens(MODEL, COUNTS[ep_size], seed=ep_size)
    cases = [(x, routing) for routing in routings(ep_size)]
    cases.append((tokens_without_ties(MODEL, weights_of(MODEL), SMALL[ep_size]), None))
    wanted = None
    for policy in [*BUILT_IN_POLICIES, BIG_FIRST]:
        layer = make(ep_size=ep_size, policy=policy, tiling=TILINGS[tiling], trace=False)
        seen = []
        for rows, routing in cases:
            follows = routing or chosen(rows)
            result = launch(layer, rows, routing, follows=follows if policy is BIG_FIRST else None)
            if wanted is None:
                assert_right(MODEL, rows, result)
            for pe, idx in enumerate(result.routing.topk_idx):
                assert not result.outputs[pe][(idx < 0).all(axis=1)].any()
            seen.append(bits(result.outputs))
        wanted = wanted or seen
        assert seen == wanted, policy


def chosen(x):
    """What the reference's gate chooses."""
    pairs = [route(gate_logits(MODEL, weights_of(MODEL), rows), MODEL) for rows in x]
    return Routing(*map(tuple, zip(*pairs, strict=True)), MODEL.num_experts)


@pytest.mark.parametrize("tiling", TILINGS)
def test_bits_depend_on_no_launch_and_no_number_of_workers(make, tiling):
    x, other = tokens(MODEL, [20, 11], seed=1), tokens(MODEL, [3, 32], seed=2)
    wanted = None
    for workers in (0, 1, 3, 50):
        layer = make(ep_size=2, max_tokens=32, workers=workers, tiling=TILINGS[tiling], trace=False)
        for _ in range(20):
            seen = bits(launch(layer, x).outputs), bits(launch(layer, other).outputs)
            wanted = wanted or seen
            assert seen == wanted, f"{workers} workers"


@pytest.mark.parametrize("given_routing", [False, True])
def test_bits_by_tile_do_not_depend_on_the_number_of_pes(make, given_routing):
    drawn = skewed_routing(MODEL, [24], seed=3, skew=1.0, dropped=0.2)
    seen = set()
    for counts in ([24], [24, 0], [11, 13], [0, 3, 20, 1], [1, 2, 3, 0, 4, 0, 13, 1]):
        cuts = np.cumsum(counts)[:-1]
        split = (tuple(np.split(arrays[0], cuts)) for arrays in (drawn.topk_idx, drawn.topk_weights))
        routing = Routing(*split, MODEL.num_experts) if given_routing else None
        for tiling in ("tile", "small", "token"):
            layer = make(ep_size=len(counts), max_tokens=24, tiling=TILINGS[tiling], trace=False)
            seen.add(np.concatenate(launch(layer, tokens(MODEL, counts), routing).outputs).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("policy", ["ticket", "push"])
@pytest.mark.parametrize("kernel", ["general", "pipeline"])
def test_fresh_inputs_on_one_workspace(make, kernel, policy):
    """Numbers of tokens on both sides of every limit, one after the other: nothing is left from the launch before."""
    layer = make(max_tokens=200, kernel=kernel, policy=policy, tiling=TILINGS["groups"])
    rng = np.random.default_rng(4)
    for seed in range(100):
        counts = [int(rng.choice([0, 1, 2, 7, 8, 9, 16, 17, 31, 64, 100, 200]))]
        x = tokens(MODEL, counts, seed)
        skew, dropped = float(rng.choice([0, 1, 30])), float(rng.choice([0, 0.3]))
        result = launch(layer, x, skewed_routing(MODEL, counts, seed, skew, dropped) if seed % 2 else None)
        assert_right(MODEL, x, result)


# ---- the gate


@pytest.mark.parametrize("norm", [True, False])
def test_the_gate_chooses_as_the_reference_does(backend, norm):
    model = MoEModel(**{**MODEL.to_dict(), "norm_topk_prob": norm})
    for counts, policy in (([7], "ticket"), ([9], "tuned"), ([3, 6], "push"), ([3, 6], "static_phase")):
        x = tokens_without_ties(model, weights_of(model), counts)
        layer = make_layer(model, backend, ep_size=len(counts), max_tokens=16, policy=policy)
        result = launch(layer, x)
        for pe, rows in enumerate(x):
            idx, weights = route(gate_logits(model, weights_of(model), rows), model)
            np.testing.assert_array_equal(result.routing.topk_idx[pe], idx)
            # a logit may lie one step of bf16, 2**-8 of its size, from the reference's
            np.testing.assert_allclose(result.routing.topk_weights[pe], weights, rtol=3e-2)


def test_equal_logits_go_to_the_lower_expert(backend):
    even = Weights(np.ones_like(weights_of(MODEL).gate), weights_of(MODEL).gate_up, weights_of(MODEL).down)
    for counts in ([5], [12], [4, 4]):
        result = fm.run(MODEL, even, tokens(MODEL, counts), backend=backend)
        for idx, weights in zip(result.routing.topk_idx, result.routing.topk_weights, strict=True):
            assert (idx == np.arange(MODEL.top_k)).all()
            np.testing.assert_allclose(weights, 1 / MODEL.top_k, rtol=1e-6)


@pytest.mark.parametrize("given_routing", [False, True])
@pytest.mark.parametrize("tiling", TILINGS)
def test_a_poisoned_token_poisons_itself_alone(make, tiling, given_routing):
    for counts in ([6], [20], [9, 4]):
        layer = make(ep_size=len(counts), max_tokens=20, tiling=TILINGS[tiling])
        routing = skewed_routing(MODEL, counts, seed=2, skew=1.0, dropped=0.0) if given_routing else None
        x = tokens(MODEL, counts)
        clean = launch(layer, x, routing).outputs
        poisoned = [rows.copy() for rows in x]
        poisoned[0][2], poisoned[-1][0] = np.nan, np.inf
        outputs = launch(layer, poisoned, routing).outputs
        bad = {(0, 2), (len(counts) - 1, 0)}
        for pe, count in enumerate(counts):
            for token in range(count):
                if (pe, token) in bad:
                    assert np.isnan(outputs[pe][token].astype(np.float32)).all()
                else:
                    assert outputs[pe][token].tobytes() == clean[pe][token].tobytes()
        assert bits(launch(layer, x, routing).outputs) == bits(clean)


# ---- replays, and launches that cannot go on


@pytest.mark.parametrize("ep_size", [1, 2, 8])
@pytest.mark.parametrize("tiling", TILINGS)
def test_a_simulated_schedule_of_a_python_policy_is_repeated(make, tiling, ep_size):
    routing, x = routings(ep_size)[1], tokens(MODEL, COUNTS[ep_size])
    layer = make(ep_size=ep_size, tiling=TILINGS[tiling])
    wanted = launch(layer, x, routing)
    simulated = fm.simulate(
        MODEL,
        routing=routing,
        machine="h200",
        policy=BIG_FIRST,
        tiling=TILINGS[tiling],
        workers=layer.workers,
        gate=False,
    )
    layer = make(ep_size=ep_size, policy=Policy.from_trace(simulated))
    result = launch(layer, x, routing, follows=routing)
    assert bits(result.outputs) == bits(wanted.outputs)
    np.testing.assert_array_equal(result.trace.records["worker"], simulated.records["worker"])


def replaying(make):
    """A layer that follows lists, inputs, and the routing that the lists are for."""
    layer = make(ep_size=2, workers=4, policy=BIG_FIRST, deadline_s=0.3)
    return layer, tokens(MODEL, COUNTS[2]), Routing.uniform(MODEL, COUNTS[2], 2)


def test_a_replay_for_another_routing_is_reported_and_the_layer_goes_on(make):
    layer, x, routing = replaying(make)
    wanted = bits(launch(layer, x, routing, follows=routing).outputs)
    other = Routing.uniform(MODEL, COUNTS[2], 2, seed=1)
    with pytest.raises(LaunchError, match="the replayed schedule was made for another routing") as error:
        launch(layer, x, routing, follows=other)
    digests = [TaskTable(MODEL, r, Tiling(), gate=False).plan_digests for r in (routing, other)]
    assert (error.value.fault["seen"], error.value.fault["wanted"]) in set(zip(*digests, strict=True))
    assert bits(launch(layer, x, routing, follows=routing).outputs) == wanted


def test_lists_that_deadlock_end_at_the_deadline_and_the_layer_goes_on(make, monkeypatch):
    layer, x, routing = replaying(make)
    wanted = bits(launch(layer, x, routing, follows=routing).outputs)

    def backwards(*arguments):
        return [[ids[::-1] for ids in pe] for pe in to_schedule(*arguments)]

    monkeypatch.setattr(native_layer, "to_schedule", backwards)
    with pytest.raises(LaunchError, match=r"PE \d worker \d, epoch \d+: waited 0\.3\d* s with ") as error:
        launch(layer, x, routing, follows=routing)
    assert error.value.fault["waited_s"] >= 0.3 and error.value.fault["seen"] != error.value.fault["wanted"]
    monkeypatch.undo()
    for _ in range(3):
        assert bits(launch(layer, x, routing, follows=routing).outputs) == wanted


# ---- traces


@pytest.mark.parametrize("ep_size", [1, 2, 8])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("policy", ["push", "ticket", "domain_steal", "static_phase"])
def test_the_trace_has_every_task_once_after_its_inputs(make, backend, policy, tiling, ep_size):
    layer = make(ep_size=ep_size, policy=policy, tiling=TILINGS[tiling])
    for routing in (None, routings(ep_size)[1]):
        result = launch(layer, tokens(MODEL, COUNTS[ep_size]), routing)
        records, header = result.trace.records, result.trace.header
        table = TaskTable(MODEL, result.routing, TILINGS[tiling], gate=routing is None)
        for field in ("pe", "task_id", "kind", "expert", "tile", "num_tokens", "peer", "link_bytes"):
            np.testing.assert_array_equal(records[field], table.tasks[field], err_msg=field)
        assert (records["ticket_ps"] <= records["start_ps"]).all()
        assert (records["start_ps"] <= records["end_ps"]).all()
        assert (records["domain"] == records["worker"] % layer.domains).all()
        # the pipelined kernel ends a task beside the next one, and may note an end after words of it were read
        is_pipelined = layer.kernel_name(max(COUNTS[ep_size])).startswith("pipeline")
        assert (records["ready_ps"] <= records["end_ps" if is_pipelined else "start_ps"]).all()
        for pe, worker in itertools.product(range(ep_size), range(layer.workers)):
            mine = np.sort(records[(records["pe"] == pe) & (records["worker"] == worker)], order="start_ps")
            if is_pipelined:
                assert (mine["ticket_ps"][1:] >= mine["ticket_ps"][:-1]).all()
            else:
                assert (mine["start_ps"][1:] >= mine["end_ps"][:-1]).all()
        assert header["executor"] == backend and header["policy"] == policy and header["drops"] == 0
        assert header["num_tokens"] == COUNTS[ep_size] and header["gate_inside"] is (routing is None)
        assert records["start_ps"].min() >= 0
        assert records["end_ps"][result.trace.critical_path[-1]] == records["end_ps"].max()


def test_a_trace_spans_no_more_than_the_launch(make):
    layer = make(policy="tuned")
    x = torch.randn(40, MODEL.d_model, device="cuda").bfloat16()
    out, begin, end = torch.empty_like(x), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        begin.record()
        layer.launch([x.data_ptr()], [out.data_ptr()], [40], stream=torch.cuda.current_stream().cuda_stream)
        end.record()
        trace, _ = layer.last_run()
        assert 0 < trace.makespan_us <= 1e3 * begin.elapsed_time(end) + 1  # an event is late by up to half a µs


def test_records_past_the_capacity_are_counted(make, monkeypatch):
    monkeypatch.setattr(native_layer, "_TRACE_CAPACITY", 2)
    for counts in ([8], [20, 20]):
        layer = make(ep_size=len(counts), max_tokens=20, workers=5)
        result = launch(layer, tokens(MODEL, counts))
        table = TaskTable(MODEL, result.routing, Tiling())
        assert len(result.trace.records) == 2 * 5 * len(counts)
        assert result.trace.header["drops"] == len(table) - len(result.trace.records)


@pytest.mark.parametrize("ep_size", [1, 4])
def test_traces_are_compared_exported_and_drawn(make, tmp_path, ep_size):
    layer = make(ep_size=ep_size, policy="static_phase")
    measured = launch(layer, tokens(MODEL, COUNTS[ep_size])).trace
    routing = launch(layer, tokens(MODEL, COUNTS[ep_size])).routing
    simulated = fm.simulate(MODEL, routing=routing, machine="h200", policy="static_phase", workers=layer.workers)
    compared = fm.compare(simulated, measured)
    assert compared.matched == len(measured.records) == len(simulated.records) and not compared.warnings
    measured.save(tmp_path / "measured.npz")
    assert (fm.Trace.load(tmp_path / "measured.npz").records == measured.records).all()
    chrome.write_chrome([simulated, measured], tmp_path / "trace.json")
    slices = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(slices) >= 2 * len(measured.records)
    for figure in (
        timeline.figure_timeline(measured),
        timeline.figure_mirrored(simulated, measured),
        timeline.figure_overview(measured),
    ):
        figure.savefig(tmp_path / "figure.png")
    comparison.plot_comparison(compared, plt.figure().subplots()).figure.savefig(tmp_path / "figure.png")
    plt.close("all")
    assert f"The makespan is {measured.makespan_us:.1f} µs" in explain.explain(measured)


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({"d_model": 96}, {}, "d_model=96 (accepted on a GPU: multiples of 64 in 64..8192)"),
        ({"d_ff": 8256}, {}, "d_ff=8256 (accepted on a GPU: multiples of 64 in 64..8192)"),
        ({"num_experts": 513}, {}, "num_experts=513 (accepted on a GPU: 1..512)"),
        ({"num_experts": 64, "top_k": 17}, {}, "top_k=17 (accepted on a GPU: 1..16)"),
        ({"dtype": "f32"}, {}, "dtype='f32' (accepted on a GPU: 'bf16')"),
        ({}, {"ep_size": 9}, "ep_size=9 (accepted: 1..8)"),
        ({}, {"ep_size": 3}, "ep_size=3 (must divide num_experts=16"),
        ({}, {"max_tokens": 1025}, "max_tokens=1025 (accepted: 0..1024)"),
        ({}, {"workers": 10_000}, "workers=10000"),
        ({}, {"kernel": "fast"}, "kernel='fast' (accepted: "),
        ({}, {"policy": "best"}, "policy='best' (accepted: "),
        ({}, {"ep_size": 2, "kernel": "pipeline", "tiling": TILINGS["rows"]}, "2 PEs"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(backend, changes, arguments, named):
    with pytest.raises(ValueError, match=r".") as error:
        model = MoEModel(**{**MODEL.to_dict(), **changes})
        make_layer(model, backend, **arguments)
    assert named in str(error.value)


def test_one_shot_runs_give_the_same(make, backend):
    x = tokens(MODEL, [9, 4])
    result = fm.run(MODEL, weights_of(MODEL), x, backend=backend, policy="ticket")
    assert relative_error(result.outputs, expected(MODEL, x, result.routing)) < 1e-2
    layer = make(ep_size=2, max_tokens=9)
    assert bits(launch(layer, x).outputs) == bits(result.outputs)
    with pytest.raises(ValueError, match=r"x\[0\]: 10 tokens .*max_tokens=9"):
        layer(tokens(MODEL, [10, 4]))
