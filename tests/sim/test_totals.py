"""Totals: where the workers' time goes, against an account by hand and one made task by task."""

import json
from dataclasses import replace

import pytest
from layers import routing_from
from sim.tables import plain_machine

from flashmoe.model import MoEModel
from flashmoe.routing import Routing
from flashmoe.sim import ENGINES, TIME_SHARES, Totals, evaluate, simulate
from flashmoe.tasks import Tiling

SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")


def account(trace):
    """Each share by its definition, task by task: overlaps of what a task did with the time since the one before."""

    def overlap(a, b, since, until):
        return max(0, min(b, until) - max(a, since))

    machine = trace.header["machine_parameters"]
    time_ps = dict.fromkeys(TIME_SHARES, 0)
    for pe in range(trace.header["ep_size"]):
        for worker in range(trace.header["num_workers"]):
            mine = trace.records[(trace.records["pe"] == pe) & (trace.records["worker"] == worker)]
            since = 0
            for task in sorted(mine.tolist(), key=lambda task: (task[start], task[end])):
                send_ps = -int(-(task[link_bytes] / machine["store_bytes_per_ns"] * 1000 - 1e-3) // 1)
                send_ps = min(task[end] - task[done], send_ps)
                time_ps["ticket"] += overlap(task[asked], task[ticket], since, task[start])
                time_ps["inputs"] += overlap(task[ticket], task[start], since, task[start])
                time_ps["stream"] += max(0, min(task[loaded], task[done]) - task[start])
                time_ps["compute"] += task[done] - max(task[start], task[loaded])
                time_ps["send"] += send_ps
                time_ps["overhead"] += task[end] - task[done] - send_ps
                since = task[end]
    whole_ps = trace.makespan_ps * trace.header["ep_size"] * trace.header["num_workers"]
    return time_ps | {"other": whole_ps - sum(time_ps.values())}


NAMES = simulate(SMALL, routing=Routing.uniform(SMALL, 0, ep_size=1), workers=1).records.dtype.names
start, end, done, link_bytes = map(NAMES.index, ("start_ps", "end_ps", "done_ps", "link_bytes"))
asked, ticket, loaded = map(NAMES.index, ("asked_ps", "ticket_ps", "loaded_ps"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_by_hand(engine):
    """One token, one expert, two PEs: the token goes to the other one and comes back."""
    model = MoEModel(d_model=4, d_ff=2, num_experts=2, top_k=1, dtype="f32")
    routing = routing_from([[[1]], []], 2)
    # the plain machine: 100 ps a byte of weights; arithmetic and activations take no time here
    machine = replace(
        plain_machine(prefetch=False, launch_ps=500, ticket_service_ps=20, put_ps=3_000, link_bytes_per_ns=16.0),
        cu_flops_per_ns=1e30,
        cache_bytes_per_ns=1e30,
        store_bytes_per_ns=8.0,
        up_overhead_ps=40,
    )
    options = {"machine": machine, "policy": "ticket", "workers": 1, "gate": False, "engine": engine}
    totals = evaluate(model, routing=routing, tiling=Tiling(up_rows=2, down_rows=4), **options)
    trace = simulate(model, routing=routing, tiling=Tiling(up_rows=2, down_rows=4), **options)
    # PE 0: route, dispatch, combine. PE 1: a dispatch of nothing, which it announces; up of 2 x 2 rows of 4 numbers
    # of 4 bytes, down of 4 rows of 2. The token is 16 bytes and 8 of where to; so is its result, without the 8.
    assert [trace.records["kind"].tolist(), trace.records["pe"].tolist()] == [[1, 2, 5, 2, 3, 4], [0, 0, 0, 1, 1, 1]]
    assert (totals.num_tasks, totals.hbm_bytes, totals.link_bytes) == (6, 64 + 32, 24 + 16)
    sent_ps = 500 + 2 * 20 + 3_000  # launch, two tickets, 24 bytes at 8 bytes/ns
    seen_ps = sent_ps + 1_500 + 3_000  # at 16 bytes/ns, and the way
    upped_ps = seen_ps + 6_400 + 40
    downed_ps = upped_ps + 20 + 3_200 + 2_000
    back_ps = downed_ps + 1_000 + 3_000
    assert totals.makespan_ps == trace.makespan_ps == back_ps
    assert totals.time_ps == {
        "ticket": 6 * 20,
        "inputs": (back_ps - sent_ps - 20) + (seen_ps - 540),
        "stream": 9_600,
        "compute": 0,
        "overhead": 40,
        "send": 5_000,
        "other": 2 * 500 + back_ps - downed_ps,
    }
    assert totals.utilisation == pytest.approx(
        {
            "cu": (9_600 + 40 + 5_000) / (2 * back_ps),
            "hbm": 96 / (0.1 * 2 * back_ps),  # 100 bytes/ns, two of them
            "link": 1_500 / back_ps,  # 24 bytes at 16 bytes/ns
        }
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "push"},
        {"policy": "ancestor", "machine": "h200"},
        {"gap_us": 1.0, "policy": "domain_steal"},
        {"tiling": Tiling(down="rows"), "without": ["prefetch"]},
        {"machine": plain_machine(num_cores=3, prefetch=False, gap_ps=70, slice_ps=900)},
    ],
)
def test_the_shares_are_what_their_definition_says_and_add_up(engine, options):
    routings = [Routing.zipf(SMALL, [3, 5], ep_size=2, seed=seed) for seed in (1, 2)]
    arguments = {"routing": routings, "workers": 4, "engine": engine, **options}
    totals, trace = evaluate(SMALL, **arguments), simulate(SMALL, **arguments)
    assert totals.time_ps == account(trace)
    assert sum(totals.time_ps.values()) == 2 * 4 * totals.makespan_ps
    assert all(0 <= share <= 1 for share in totals.utilisation.values())
    assert min(totals.time_ps.values()) >= 0
    assert tuple(totals.time_ps) == TIME_SHARES


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_at_all_is_no_division_by_zero(engine):
    totals = evaluate(SMALL, routing=Routing.uniform(SMALL, 0, ep_size=1), engine=engine, without=["launch_ramp"])
    assert (totals.makespan_ps, totals.num_tasks, totals.headroom) == (0, 0, 0.0)
    assert set(totals.utilisation.values()) == {0.0}
    assert set(totals.time_ps.values()) == {0}


def test_to_dict_is_flat_and_json():
    totals = Totals(
        makespan_ps=2_000_000,
        bounds_ps={"hbm": 3, "links": 4},
        bound_ps=4,
        headroom=0.5,
        num_tasks=9,
        ep_size=2,
        num_workers=3,
        layers=1,
        layer_end_ps=[2_000_000],
        hbm_bytes=5,
        link_bytes=6,
        distinct_weight_bytes=7,
        time_ps={"ticket": 8},
        utilisation={"cu": 0.25},
    )
    assert totals.makespan_us == 2.0
    assert json.loads(json.dumps(totals.to_dict())) == {
        "makespan_ps": 2_000_000,
        "makespan_us": 2.0,
        "bound_ps": 4,
        "bound_hbm_ps": 3,
        "bound_links_ps": 4,
        "headroom": 0.5,
        "num_tasks": 9,
        "ep_size": 2,
        "num_workers": 3,
        "layers": 1,
        "hbm_bytes": 5,
        "link_bytes": 6,
        "distinct_weight_bytes": 7,
        "time_ticket_ps": 8,
        "cu_utilisation": 0.25,
    }
