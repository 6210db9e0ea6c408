"""The layer computed by threads: right numbers, the same bits whoever runs which task, launch after launch."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    BUILT_IN_POLICIES,
    EIGHT,
    ODD,
    assert_right,
    bits,
    layers,
    pairs_of,
    skewed_routing,
    tokens,
    weights_of,
)

from flashmoe.hw import Chaos, Layer, run
from flashmoe.model import MoEModel
from flashmoe.policy import policy_names
from flashmoe.reference import gate_logits, route
from flashmoe.routing import Routing
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import KINDS
from flashmoe.weights import Weights

TILINGS = {
    "tile": Tiling(),
    "small": Tiling(gate_tokens=2, gate_experts=3, up_rows=7, down_rows=11, block_tokens=2, combine_tokens=2),
    "rows": Tiling(down="rows", down_rows=17),
    "groups": Tiling(down="rows", experts_per_pick=2, block_tokens=3, up_rows=9),
    "token": Tiling(granularity="token", gate_tokens=3),
}


def with_dtype(model, dtype, **changes):
    return MoEModel(**{**model.to_dict(), "dtype": dtype, **changes})


def test_the_list_of_policies_is_complete():
    assert policy_names()[: len(BUILT_IN_POLICIES)] == BUILT_IN_POLICIES


# ---- right


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_right_for_every_policy_and_any_number_of_pes_and_workers(tiling, dtype):
    model = with_dtype(EIGHT, dtype)
    grid = [*itertools.product((1, 2, 4, 8), (1, 2, 5, 16))]
    shift = 3 * list(TILINGS).index(tiling)
    for turn, policy in enumerate(BUILT_IN_POLICIES * 2):
        ep_size, workers = grid[(turn * 5 + shift) % 16]  # each of the 16 once, with other policies for each tiling
        counts = [(3 * pe + turn) % 6 for pe in range(ep_size)]
        x = tokens(model, counts, seed=turn)
        result = run(model, weights_of(model), x, policy=policy, tiling=TILINGS[tiling], workers=workers, deadline_s=30)
        assert_right(model, x, result)
        assert [rows.dtype for rows in result.outputs] == [model.numpy_dtype] * ep_size
        assert len(result.trace.records) == len(TaskTable(model, result.routing, TILINGS[tiling]))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("counts", [[5, 3], [1, 0], [0, 1], [0, 0], [0, 7]])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_odd_sizes_and_pes_without_tokens(dtype, counts, norm):
    model = with_dtype(ODD, dtype, norm_topk_prob=norm)
    x = tokens(model, counts)
    for policy in ("ancestor", "push", "domain_steal", "static_phase"):
        result = run(model, weights_of(model), x, policy=policy, workers=3, deadline_s=30)
        assert_right(model, x, result)
        assert [rows.shape for rows in result.outputs] == [(count, 96) for count in counts]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("skew", [1.0, 30.0])  # 30: every token on the same two experts
def test_routing_from_outside_with_dropped_slots(skew, dropped, tiling):
    routing = skewed_routing(ODD, [4, 0, 5], seed=1, skew=skew, dropped=dropped)
    x = tokens(ODD, [4, 0, 5])
    for policy in ("push", "expert_lpt"):
        result = run(ODD, weights_of(ODD), x, policy=policy, tiling=TILINGS[tiling], routing=routing, deadline_s=30)
        assert_right(ODD, x, result)
        assert result.routing is routing
        for pe, idx in enumerate(routing.topk_idx):
            assert not result.outputs[pe][(idx < 0).all(axis=1)].any()


def test_every_token_on_one_expert():
    model = with_dtype(ODD, "f32", top_k=1)
    x = tokens(model, [9, 6])
    for tiling in TILINGS.values():
        result = run(model, weights_of(model), x, tiling=tiling, routing=Routing.one(model, [9, 6], 2))
        assert_right(model, x, result)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layer=layers(max_tokens=4), policy=st.sampled_from(BUILT_IN_POLICIES), workers=st.sampled_from([1, 2, 5]))
def test_right_for_random_layers(layer, policy, workers):
    model, routing, tiling = layer
    x = tokens(model, routing.num_tokens)
    result = run(
        model, weights_of(model), x, policy=policy, tiling=tiling, workers=workers, routing=routing, deadline_s=30
    )
    assert_right(model, x, result)


@pytest.mark.parametrize("norm", [True, False])
def test_the_gate_chooses_as_the_reference_does(norm):
    model = with_dtype(EIGHT, "f32", norm_topk_prob=norm)
    x = tokens(model, [20, 3])
    result = run(model, weights_of(model), x)
    for pe, rows in enumerate(x):
        logits = gate_logits(model, weights_of(model), rows)
        # sums in another order differ in their last bits: no tie may be closer than that
        assert np.diff(np.sort(logits, axis=1), axis=1).min() > 1e-5
        idx, weights = route(logits, model)
        np.testing.assert_array_equal(result.routing.topk_idx[pe], idx)
        np.testing.assert_allclose(result.routing.topk_weights[pe], weights, rtol=1e-5)


def test_equal_logits_go_to_the_lower_expert():
    model = with_dtype(EIGHT, "f32")
    even = Weights(np.ones_like(weights_of(model).gate), weights_of(model).gate_up, weights_of(model).down)
    result = run(model, even, tokens(model, [4, 4]))
    for idx, weights in zip(result.routing.topk_idx, result.routing.topk_weights, strict=True):
        assert idx.tolist() == [[0, 1, 2]] * 4
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_inputs_of_other_types_are_cast():
    model = with_dtype(EIGHT, "bf16")
    x = [rows.astype(np.float32) for rows in tokens(model, [3, 2])]
    doubles = run(model, weights_of(model), [rows.astype(np.float64) for rows in x])
    strided = run(model, weights_of(model), [np.asfortranarray(rows) for rows in x])
    assert bits(doubles.outputs) == bits(strided.outputs) == bits(run(model, weights_of(model), x).outputs)
    assert doubles.outputs[0].dtype == ml_dtypes.bfloat16


# ---- the same bits


@pytest.mark.parametrize("down", ["tile", "rows"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bits_depend_on_no_policy_and_no_number_of_workers(dtype, down):
    model, counts = with_dtype(EIGHT, dtype), [4, 0, 6, 1]
    x = tokens(model, counts)
    seen = set()
    for policy in BUILT_IN_POLICIES[1:]:  # the ancestor cuts the layer in its own way
        for workers in (1, 3, 16):
            result = run(
                model, weights_of(model), x, policy=policy, workers=workers, tiling=Tiling(down=down), deadline_s=30
            )
            seen.add(tuple(bits(result.outputs)))
    assert len(seen) == 1


@pytest.mark.parametrize("down", ["tile", "rows"])
def test_bits_are_the_same_in_200_disturbed_runs(down):
    model, counts = with_dtype(EIGHT, "bf16"), [3, 1, 0, 4]
    x = tokens(model, counts)
    tiling = Tiling(down=down, up_rows=5, down_rows=8, block_tokens=2)
    made = [
        Layer(model, weights_of(model), ep_size=4, max_tokens=4, workers=3, policy=policy, tiling=tiling, trace=False)
        for policy in BUILT_IN_POLICIES[1:]
    ]
    seen = {
        tuple(bits(made[seed % len(made)](x, seed=seed, chaos=Chaos(max_delay_us=80)).outputs)) for seed in range(200)
    }
    assert len(seen) == 1


@pytest.mark.parametrize("given_routing", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bits_by_tile_do_not_depend_on_the_number_of_pes(dtype, given_routing):
    model = with_dtype(EIGHT, dtype)
    chosen = skewed_routing(model, [11], seed=3, skew=1.0, dropped=0.2)
    seen = set()
    for counts in ([11], [11, 0], [0, 11], [5, 6], [0, 3, 8, 0], [1, 2, 3, 0, 4, 0, 0, 1]):
        cuts = np.cumsum(counts)[:-1]
        routing = Routing(tuple(np.split(chosen.topk_idx[0], cuts)), tuple(np.split(chosen.topk_weights[0], cuts)), 8)
        x, outside = tokens(model, counts), routing if given_routing else None
        for tiling in (Tiling(), Tiling(block_tokens=2, up_rows=3, down_rows=5), Tiling(granularity="token")):
            result = run(model, weights_of(model), x, tiling=tiling, routing=outside)
            seen.add(np.concatenate(result.outputs).tobytes())
    assert len(seen) == 1


# ---- launch after launch


@pytest.mark.parametrize(("policy", "down"), [("push", "tile"), ("ticket", "rows"), ("domain_steal", "tile")])
def test_a_thousand_launches_on_one_workspace(policy, down):
    model, most = EIGHT, 3
    rng = np.random.default_rng(8)
    layer = Layer(
        model,
        weights_of(model),
        ep_size=2,
        max_tokens=most,
        workers=2,
        policy=policy,
        tiling=Tiling(down=down, down_rows=24, up_rows=20),
        trace=False,
    )
    cases = []
    for seed in range(9):
        counts = rng.integers(0, most + 1, 2).tolist()
        x = tokens(model, counts, seed)
        routing = skewed_routing(model, counts, seed, skew=1.0, dropped=0.2) if seed % 2 else None
        result = layer(x, routing=routing)
        assert_right(model, x, result)
        cases.append((x, routing, bits(result.outputs)))
    for launch in range(991):
        x, routing, wanted = cases[int(rng.integers(len(cases)))]
        assert bits(layer(x, routing=routing).outputs) == wanted, f"launch {launch}"
    assert layer.epochs == [1000, 1000]


@pytest.mark.parametrize("policy", ["push", "ticket", "domain_steal", "static_phase"])
def test_many_more_workers_than_tasks(policy):
    # Tickets run past the last task by as many as there are workers; what lies behind the slots is no task.
    # top_k = 16 and launches 1, 2, ... put pairs (expert, epoch) there.
    model = MoEModel(d_model=8, d_ff=4, num_experts=16, top_k=16, dtype="f32")
    layer = Layer(model, weights_of(model), ep_size=1, max_tokens=1, workers=64, policy=policy, deadline_s=5)
    x = tokens(model, [1])
    for _ in range(16):
        result = layer(x)
        assert_right(model, x, result)
        assert len(result.trace.records) == len(TaskTable(model, result.routing))


# ---- poison


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("given_routing", [False, True])
def test_a_poisoned_token_poisons_itself_alone(given_routing, tiling):
    counts = [4, 3]
    layer = Layer(ODD, weights_of(ODD), ep_size=2, max_tokens=4, tiling=TILINGS[tiling], deadline_s=20)
    routing = skewed_routing(ODD, counts, seed=2, skew=1.0, dropped=0.0) if given_routing else None
    x = tokens(ODD, counts)
    clean = layer(x, routing=routing).outputs
    poisoned = [rows.copy() for rows in x]
    poisoned[0][2], poisoned[1][0] = np.nan, np.inf
    outputs = layer(poisoned, routing=routing).outputs
    for pe, bad in ((0, 2), (1, 0)):
        assert np.isnan(outputs[pe][bad]).all()
        others = np.arange(counts[pe]) != bad
        np.testing.assert_array_equal(outputs[pe][others], clean[pe][others])
    assert bits(layer(x, routing=routing).outputs) == bits(clean)


# ---- the trace


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("policy", BUILT_IN_POLICIES)
def test_the_trace_has_every_task_once_after_its_inputs(policy, tiling):
    counts = [3, 0, 2]
    result = run(ODD, weights_of(ODD), tokens(ODD, counts), policy=policy, tiling=TILINGS[tiling], workers=3, seed=7)
    records, header = result.trace.records, result.trace.header
    table = TaskTable(ODD, result.routing, TILINGS[tiling])
    for field in ("pe", "task_id", "kind", "expert", "tile", "num_tokens", "peer", "link_bytes"):
        np.testing.assert_array_equal(records[field], table.tasks[field], err_msg=field)
    assert (records["ready_ps"] <= records["start_ps"]).all()
    assert (records["ticket_ps"] <= records["start_ps"]).all()
    assert (records["start_ps"] <= records["end_ps"]).all()
    assert (records["worker"] < 3).all() and (records["domain"] == records["worker"] % 2).all()
    for pe, worker in itertools.product(range(3), range(3)):
        mine = np.sort(records[(records["pe"] == pe) & (records["worker"] == worker)], order="start_ps")
        assert (mine["start_ps"][1:] >= mine["end_ps"][:-1]).all()
    assert header["executor"] == "cpu" and header["policy"] == policy and header["seed"] == 7
    assert header["num_tokens"] == counts and header["gate_inside"] is True and header["drops"] == 0
    assert header["num_workers"] == 3 and header["num_domains"] == 2 and header["ep_size"] == 3
    assert header["routing"] == result.routing.digest
    path = result.trace.critical_path
    assert records["end_ps"][path[-1]] == records["end_ps"].max()
    assert (np.diff(records["end_ps"][path]) >= 0).all()


def test_routing_from_outside_has_no_gate_tasks_and_trace_can_be_off():
    routing = Routing.uniform(EIGHT, 3, 2)
    layer = Layer(EIGHT, weights_of(EIGHT), ep_size=2, max_tokens=3, trace=False)
    quiet = layer(tokens(EIGHT, [3, 3]), routing=routing)
    assert len(quiet.trace.records) == 0 and quiet.trace.header["gate_inside"] is False
    loud = run(EIGHT, weights_of(EIGHT), tokens(EIGHT, [3, 3]), routing=routing)
    assert KINDS.index("gate") not in loud.trace.records["kind"]
    assert bits(quiet.outputs) == bits(loud.outputs)


def test_stolen_picks_are_flagged_with_the_domain_policy_alone():
    # 4 workers in 4 domains: tasks of very unequal length make some of them steal
    x = tokens(EIGHT, [8])
    stolen = 4
    for policy in ("ticket", "static_phase", "push"):
        records = run(EIGHT, weights_of(EIGHT), x, policy=policy, workers=4, domains=4).trace.records
        assert not (records["flags"] & stolen).any()
    layer = Layer(EIGHT, weights_of(EIGHT), ep_size=1, max_tokens=8, workers=4, domains=4, policy="domain_steal")
    flags = [layer(x, seed=seed, chaos=Chaos(max_delay_us=500)).trace.records["flags"] for seed in range(10)]
    assert any((flag & stolen).any() for flag in flags)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"workers": 0}, "workers=0 (accepted: 1..256)"),
        ({"workers": 257}, "workers=257"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"domains": 0}, "domains=0"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"policy": "best"}, "policy='best' (accepted: ancestor"),
        ({"ep_size": 3}, "ep_size=3"),
        ({"ep_size": 0}, "ep_size=0"),
        ({"max_tokens": 65536}, "max_tokens=65536 (accepted: 0..65535)"),
    ],
)
def test_bad_arguments_name_what_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=r".") as error:
        Layer(EIGHT, weights_of(EIGHT), **{"ep_size": 2, "max_tokens": 4, **arguments})
    assert named in str(error.value)


def test_bad_inputs_name_what_is_wrong():
    layer = Layer(EIGHT, weights_of(EIGHT), ep_size=2, max_tokens=4)
    good = tokens(EIGHT, [2, 2])
    for x, named in (
        (good[:1], r"x: 1 arrays \(must be one per PE, 2\)"),
        ([good[0], good[1][:, :-1]], r"x\[1\]: shape \(2, 23\)"),
        ([good[0], np.zeros((5, 24))], r"x\[1\]: 5 tokens .*max_tokens=4"),
        ([good[0], good[1][0]], r"x\[1\]: shape \(24,\)"),
    ):
        with pytest.raises(ValueError, match=named):
            layer(x)
    with pytest.raises(ValueError, match=r"routing for \[2, 1\] tokens per PE \(x has \[2, 2\]\)"):
        layer(good, routing=Routing.uniform(EIGHT, [2, 1], 2))
    with pytest.raises(ValueError, match="num_experts=6"):
        layer(good, routing=Routing.uniform(ODD, [2, 2], 2))
    with pytest.raises(ValueError, match=r"backend='tpu' \(accepted: cpu, cuda, hip\)"):
        run(EIGHT, weights_of(EIGHT), good, backend="tpu")
    with pytest.raises(ValueError, match="gate"):
        run(EIGHT, weights_of(ODD), good)
    with pytest.raises(ValueError, match="ep_size=0"):
        run(EIGHT, weights_of(EIGHT), [])


def test_a_routing_counts_tokens_as_the_table_does():
    """The helper that other tests count with agrees with the routing's own load."""
    routing = skewed_routing(EIGHT, [5, 2], seed=0, skew=1.0, dropped=0.3)
    assert [len(pairs) for pairs in pairs_of(routing)] == routing.expert_load().tolist()
