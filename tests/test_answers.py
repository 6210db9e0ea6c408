"""Answers worked out by hand on traces of a few tasks, and as sums that must come out on simulated ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from traces import layer_trace, make_trace

from flashmoe import MoEModel, Routing, TaskTable, Trace
from flashmoe.answers import (
    PATH_EFFECTS,
    WORKER_TIMES,
    critical_time,
    distinct_bytes,
    memory_time,
    queue_length,
    streams,
    time_by_kind,
    utilisation,
    worker_time,
)
from flashmoe.sim import simulate

NS = 1_000  # ps

# 10 bytes/ns through one CU, 20 through the memory
MACHINE: dict[str, Any] = {
    "cu_bytes_per_ns": 10.0,
    "hbm_bytes_per_ns": 20.0,
    "store_bytes_per_ns": 4.0,
    "link_bytes_per_ns": 5.0,
    "port_bytes_per_ns": 0.0,
    "launch_ps": 2 * NS,
    "num_cores": 0,
    "prefetch": True,
}

SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")


def task(kind: str = "up", **times_ns: Any) -> dict[str, Any]:
    """A record whose times are given in ns, by name without _ps."""
    times = ("ready", "asked", "ticket", "start", "loaded", "done", "end")
    return {"kind": kind} | {
        f"{key}_ps" if key in times else key: value * NS if key in times else value for key, value in times_ns.items()
    }


def one_worker() -> Trace:
    """Two tasks of worker 0 of 2, prefetched or not, and 24 bytes sent: 6 ns at 4 bytes/ns."""
    return make_trace(
        [
            task("gate", asked=2, ticket=5, start=9, loaded=15, done=20, end=23),
            # asked for while the first one ran; its weights were there before its inputs
            task("down", asked=10, ticket=26, start=30, loaded=28, done=34, end=42, link_bytes=24),
        ],
        num_workers=2,
        machine_parameters=MACHINE,
    )


def simulated(layers: int = 1, **options: Any) -> Trace:
    routing = [Routing.zipf(SMALL, 5, ep_size=2, exponent=1.0, seed=seed) for seed in range(layers)]
    return simulate(SMALL, routing=routing, workers=7, engine="simpy", **options)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"policy": "ticket", "seed": 4},
    {"policy": "push", "layers": 2},
    {"policy": "domain_steal", "layers": 3, "gap_us": 2.0},
    {"policy": "ancestor", "pe_speed": [1.0, 0.8]},
    {"without": ["prefetch", "launch_ramp"]},
]


# ---- workers


def test_worker_time_by_hand() -> None:
    times = worker_time(one_worker())
    assert list(times) == list(WORKER_TIMES)
    assert {name: time_ps[0].tolist() for name, time_ps in times.items()} == {
        "ticket": [(3 + 3) * NS, 0],  # 2..5, and of 10..26 what came after the first task's end at 23
        "inputs": [(4 + 4) * NS, 0],
        "stream": [6 * NS, 0],
        "compute": [(5 + 4) * NS, 0],
        "overhead": [(3 + 2) * NS, 0],
        "send": [6 * NS, 0],
        "other": [2 * NS, 42 * NS],  # before the first ticket; a worker without tasks
    }


def test_time_by_kind_by_hand() -> None:
    assert time_by_kind(one_worker()) == {
        "gate": {
            "ticket": 3 * NS,
            "inputs": 4 * NS,
            "stream": 6 * NS,
            "compute": 5 * NS,
            "overhead": 3 * NS,
            "send": 0,
        },
        "down": {
            "ticket": 3 * NS,
            "inputs": 4 * NS,
            "stream": 0,
            "compute": 4 * NS,
            "overhead": 2 * NS,
            "send": 6 * NS,
        },
    }


def test_a_send_is_never_longer_than_what_follows_the_arithmetic() -> None:
    trace = make_trace([task(done=8, end=10, link_bytes=10**6)], machine_parameters=MACHINE)
    assert worker_time(trace)["send"].sum() == 2 * NS


def test_a_trace_that_records_start_and_end_alone_has_compute_alone() -> None:
    times = worker_time(make_trace([task(ticket=1, start=3, end=9)], num_workers=1, executor="cpu"))
    assert {name: int(time_ps.sum()) for name, time_ps in times.items() if time_ps.any()} == {
        "inputs": 2 * NS,
        "compute": 6 * NS,
        "other": 1 * NS,
    }


def test_worker_times_add_up_even_where_tasks_overlap() -> None:
    trace = make_trace([task(end=10), task(start=6, end=9), task(start=8, end=14)], num_workers=1)
    times = worker_time(trace)
    assert sum(times.values()).tolist() == [[14 * NS]]
    assert times["compute"].sum() == 14 * NS


@pytest.mark.parametrize("options", VARIANTS)
def test_worker_times_of_simulated_layers_are_those_in_the_header(options: dict[str, Any]) -> None:
    trace = simulated(**options)
    times = worker_time(trace)
    assert {name: int(time_ps.sum()) for name, time_ps in times.items()} == trace.header["time_ps"]
    assert (sum(times.values()) == trace.makespan_ps).all()
    assert all((time_ps >= 0).all() for time_ps in times.values())
    by_kind = time_by_kind(trace)
    for name in WORKER_TIMES[:-1]:
        assert sum(of_kind[name] for of_kind in by_kind.values()) == times[name].sum()


# ---- resources


def test_utilisation_by_hand() -> None:
    trace = make_trace(
        [
            task(pe=0, worker=0, end=10, hbm_bytes=40),
            task(pe=0, worker=1, domain=1, start=5, end=20, hbm_bytes=60, link_bytes=30),
            task(pe=1, worker=1, domain=1, end=20),
        ],
        ep_size=2,
        num_workers=2,
        num_domains=2,
        machine_parameters=MACHINE,
    )
    use = utilisation(trace)
    assert use.cu.tolist() == [[0.5, 0.75], [0.0, 1.0]]
    assert use.domain.tolist() == [[0.5, 0.75], [0.0, 1.0]]
    assert use.hbm is not None and use.hbm.tolist() == [0.25, 0.0]  # 100 of 20 ns x 20 bytes/ns
    assert use.egress is not None and use.egress.tolist() == [0.3, 0.0]  # 30 of 20 ns x 5 bytes/ns
    assert use.link is None
    through_port = make_trace(
        [task(end=20, link_bytes=30)], ep_size=3, machine_parameters=MACHINE | {"port_bytes_per_ns": 3.0}
    )
    assert (utilisation(through_port).egress == [0.5, 0, 0]).all()


def test_the_memory_of_a_slow_pe_gives_less() -> None:
    tasks = [task(pe=pe, end=20, hbm_bytes=100) for pe in (0, 1)]
    use = utilisation(make_trace(tasks, ep_size=2, machine_parameters=MACHINE, pe_speed=[1.0, 0.5]))
    assert use.hbm is not None and use.hbm.tolist() == [0.25, 0.5]  # 100 of 20 ns x 20 or 10 bytes/ns


def test_utilisation_of_an_unknown_machine_is_that_of_its_cus() -> None:
    use = utilisation(make_trace([task(end=20)], executor="cpu", ep_size=2))
    assert use.cu[0, 0] == 1 and use.hbm is use.egress is use.link is None


@pytest.mark.parametrize(
    ("num_tokens", "used"),
    [([4, 0, 0], []), ([0, 0, 4], [[0, 2], [2, 0]])],  # all experts wanted are PE 0's: rows go there, results back
)
def test_links_come_from_the_tables(num_tokens: list[int], used: list[list[int]]) -> None:
    routing = Routing.one(SMALL, num_tokens, ep_size=3)
    trace = simulate(SMALL, routing=routing, workers=4, engine="simpy")
    link = utilisation(trace, [TaskTable(SMALL, routing)]).link
    assert link is not None and np.argwhere(link).tolist() == used
    could_carry = trace.makespan_ps / 1000 * trace.header["machine_parameters"]["link_bytes_per_ns"]
    assert link.sum() * could_carry == pytest.approx(trace.header["link_bytes"])


def test_queue_length_by_hand() -> None:
    trace = make_trace(
        [
            task(pe=0, ready=0, start=4, end=5),
            task(pe=0, worker=1, ready=2, start=6, end=7),
            task(pe=1, ready=0, start=0, end=8),
            task(pe=1, worker=1, ready=9, start=8, end=8),  # seen by a late clock: never waited
        ],
        ep_size=2,
    )
    lengths = queue_length(trace, np.array([0, 2, 4, 6, 8]) * NS)
    assert lengths.tolist() == [[1, 2, 1, 0], [0, 0, 0, 0]]


def test_queue_length_obeys_littles_law() -> None:
    trace = layer_trace(ep_size=2, num_workers=5)
    mean = queue_length(trace, np.array([0, trace.makespan_ps]))[:, 0]
    for pe in range(2):
        mine = trace.records[trace.records["pe"] == pe]
        arrivals_per_ps = len(mine) / trace.makespan_ps
        mean_wait_ps = (mine["start_ps"] - mine["ready_ps"]).mean()
        assert mean[pe] == pytest.approx(arrivals_per_ps * mean_wait_ps)


# ---- memory


def test_streams_by_hand() -> None:
    trace = make_trace(
        [
            task("gate", ticket=1, start=1, loaded=3, done=4, end=4, hbm_bytes=20),
            # the plan is there at 8, the worker took it at 4; its weights before its start
            task("up", ticket=4, ready=8, start=9, loaded=13, done=14, end=15, hbm_bytes=40),
            # taken at 13, but one task streams at a time
            task("down", ticket=11, ready=16, start=17, loaded=15, done=18, end=18, hbm_bytes=20),
            task("combine", ticket=18, start=20, end=21),
        ],
        num_workers=1,
        machine_parameters=MACHINE,
    )
    moved = streams(trace)
    assert (moved.records["start_ps"][:3] // NS).tolist() == [1, 8, 13]
    assert (moved.records["end_ps"][:3] // NS).tolist() == [3, 13, 15]
    late = Trace(trace.records, trace.header | {"machine_parameters": MACHINE | {"prefetch": False}}, np.zeros(0, int))
    assert (streams(late).records["start_ps"][:2] // NS).tolist() == [1, 9]


def test_a_trace_that_does_not_record_its_weights_streams_while_it_runs() -> None:
    trace = make_trace([task(ticket=1, start=3, end=9, hbm_bytes=8)])
    assert streams(trace) is trace


@pytest.mark.parametrize("options", VARIANTS)
def test_no_more_is_streamed_than_the_memory_can_give(options: dict[str, Any]) -> None:
    trace = simulated(**options)
    moved = streams(trace)
    edges_ps = np.array([0, trace.makespan_ps])
    assert moved.spread(trace.records["hbm_bytes"], edges_ps).sum() == pytest.approx(trace.header["hbm_bytes"])
    has_weights = trace.records["hbm_bytes"] > 0
    cap = trace.header["machine_parameters"]["cu_bytes_per_ns"]
    rate = trace.records["hbm_bytes"][has_weights] / (moved.duration_ps[has_weights] / 1000)
    assert rate.max() <= cap * 1.2  # jitter shortens some streams
    assert moved.by_worker[0].shape == trace.records.shape


def test_distinct_bytes_by_hand() -> None:
    weights = {"kind": "up", "expert": 3, "tile": 0}
    trace = make_trace(
        [
            {**weights, "hbm_bytes": 40},
            {**weights, "hbm_bytes": 40},  # another block of tokens
            {**weights, "tile": 1, "hbm_bytes": 30},
            {**weights, "layer": 1, "hbm_bytes": 40},
            {**weights, "pe": 1, "hbm_bytes": 5},
        ],
        ep_size=2,
    )
    assert distinct_bytes(trace).tolist() == [110, 5]


def test_memory_time_by_hand() -> None:
    # 20 bytes/ns, so a byte takes 50 ps; the tile is read twice
    tile = {"expert": 0, "tile": 0, "hbm_bytes": 100}
    trace = make_trace(
        [
            task("gate", ticket=2, start=2, loaded=4, end=5, done=4, hbm_bytes=20),
            task("up", ticket=5, ready=10, start=10, loaded=34, done=34, end=35, expert=1, tile=0, hbm_bytes=240),
            task("up", worker=1, ticket=10, ready=10, start=10, loaded=20, done=20, end=20, **tile),
            task("up", worker=1, ticket=20, ready=10, start=20, loaded=30, done=30, end=30, **tile),
            task("down", worker=1, ticket=30, start=32, loaded=32, done=33, end=33, expert=1, tile=1, hbm_bytes=20),
            task("combine", ticket=35, start=37, end=40),
        ],
        machine_parameters=MACHINE,
    )
    memory = memory_time(trace)
    assert memory is not None and memory.pe == 0
    assert (memory.begin_ps, memory.end_ps, memory.reading_ps) == (10 * NS, 34 * NS, 24 * NS)
    assert memory.parts_ps == pytest.approx(
        {
            "must": 19 * NS,  # 20 + 240 + 100 + 20 bytes
            "idle": 2 * NS,
            "before": 7 * NS,  # 10 ns, less the launch and 1 ns for 20 bytes
            "meanwhile": 1 * NS,  # 24 ns for 460 bytes
            "between": 0,
            "after": 6 * NS,
            "again": 5 * NS,
        }
    )
    assert sum(memory.parts_ps.values()) == pytest.approx(40 * NS)


@pytest.mark.parametrize("options", VARIANTS)
def test_memory_time_divides_the_time_over_the_bound(options: dict[str, Any]) -> None:
    trace = simulated(**options)
    memory = memory_time(trace)
    assert memory is not None
    parts_ps = memory.parts_ps
    assert sum(parts_ps.values()) == pytest.approx(trace.makespan_ps)
    assert parts_ps["must"] + parts_ps["idle"] == pytest.approx(trace.header["bounds_ps"]["hbm"], abs=2)
    assert min(parts_ps.values()) > -1
    assert (parts_ps["between"] > 0) == (trace.header["layers"] > 1)


def test_memory_time_reads_layer_by_layer() -> None:
    # 5 ns of reading, 5 between the layers, 4 of reading
    trace = make_trace(
        [
            task("up", ready=0, start=0, loaded=5, done=5, end=6, expert=0, hbm_bytes=100),
            task("up", layer=1, ticket=10, ready=10, start=10, loaded=14, done=14, end=15, expert=0, hbm_bytes=60),
        ],
        machine_parameters=MACHINE | {"launch_ps": 0},
        layers=2,
    )
    memory = memory_time(trace)
    assert memory is not None
    assert (memory.begin_ps, memory.end_ps, memory.reading_ps) == (0, 14 * NS, 9 * NS)
    assert memory.parts_ps["meanwhile"] == pytest.approx(1 * NS)
    assert memory.parts_ps["between"] == pytest.approx(5 * NS)


def test_memory_time_of_a_host_is_that_of_its_one_memory() -> None:
    trace = make_trace(
        [task("up", pe=pe, ready=0, end=10, expert=pe, hbm_bytes=50) for pe in (0, 1)],
        ep_size=2,
        machine_parameters=MACHINE | {"num_cores": 2, "prefetch": False, "launch_ps": 0},
    )
    memory = memory_time(trace)
    assert memory is not None and memory.pe is None
    assert memory.parts_ps == pytest.approx(
        {"must": 5 * NS, "idle": 0, "before": 0, "meanwhile": 5 * NS, "between": 0, "after": 0, "again": 0}
    )


def test_memory_time_is_unknown_without_a_machine_and_without_tasks() -> None:
    assert memory_time(make_trace([task(end=3)], executor="cpu")) is None
    assert memory_time(make_trace([], machine_parameters=MACHINE)) is None


# ---- the critical path


def test_critical_time_by_hand() -> None:
    trace = make_trace(
        [
            task("route", pe=0, asked=3, ticket=4, start=4, done=6, end=9, loaded=4, link_bytes=4),
            # on another PE: seen at 14; 40 bytes take 4 ns alone, and it waited 5 for them
            task("up", pe=1, asked=5, ticket=6, ready=14, start=14, loaded=19, done=21, end=22, hbm_bytes=40),
            # the same worker: 1 ns of bookkeeping, 2 for a ticket, 3 for another input
            task("up", pe=1, asked=23, ticket=25, ready=14, start=28, loaded=27, done=30, end=31, hbm_bytes=40),
            # another worker of the same PE, which had asked long ago
            task("down", pe=1, worker=1, asked=2, ticket=3, ready=33, start=33, done=35, end=35),
        ],
        critical_path=[0, 1, 2, 3],
        ep_size=2,
        machine_parameters=MACHINE,
    )
    assert critical_time(trace).total() == {
        "signal": 2 * NS,
        "link": 5 * NS,
        "gap": 0,
        "launch": 3 * NS,
        "worker": 1 * NS,
        "ticket": (1 + 2) * NS,
        "inputs": 3 * NS,
        "stream": 4 * NS,
        "sharing": 1 * NS,
        "compute": (2 + 2 + 2 + 2) * NS,
        "overhead": (2 + 1 + 1) * NS,
        "send": 1 * NS,
    }
    path = critical_time(trace)
    assert {name: ps for name, ps in path.between(12 * NS, 20 * NS).items() if ps} == {
        "link": 2 * NS,
        "stream": 4 * NS,
        "sharing": 1 * NS,
        "compute": 1 * NS,
    }


@pytest.mark.parametrize(("speed", "stream", "sharing"), [(1.0, 4, 6), (0.5, 8, 2), (0.25, 10, 0)])
def test_what_a_slow_pe_needs_alone_is_no_sharing(speed: float, stream: int, sharing: int) -> None:
    # 40 bytes at 10 bytes/ns times the speed of PE 1
    trace = make_trace(
        [task(pe=1, loaded=10, done=11, end=11, hbm_bytes=40)],
        critical_path=[0],
        ep_size=2,
        pe_speed=[1.0, speed],
        machine_parameters=MACHINE,
    )
    total = critical_time(trace).total()
    assert (total["stream"], total["sharing"]) == (stream * NS, sharing * NS)


def test_a_launch_of_its_own_begins_with_the_gap() -> None:
    tasks = [
        task("combine", end=10),
        task("gate", layer=1, worker=1, asked=17, ticket=17, start=17, end=20),
    ]
    trace = make_trace(tasks, critical_path=[0, 1], gap_us=0.005, layers=2, machine_parameters=MACHINE)
    times = {name: ps for name, ps in critical_time(trace).total().items() if ps}
    assert times == {"gap": 5 * NS, "launch": 2 * NS, "compute": 13 * NS}
    pipelined = make_trace(tasks, critical_path=[0, 1], gap_us=None, layers=2, machine_parameters=MACHINE)
    assert critical_time(pipelined).total()["gap"] == 0


def test_an_unknown_path_takes_no_time() -> None:
    assert set(critical_time(make_trace([task(end=3)])).total().values()) == {0}


@pytest.mark.parametrize("options", VARIANTS)
def test_the_effects_of_the_critical_path_add_up_to_the_makespan(options: dict[str, Any]) -> None:
    trace = simulated(**options)
    path = critical_time(trace)
    total = path.total()
    assert list(total) == list(PATH_EFFECTS)
    assert sum(total.values()) == trace.makespan_ps
    assert min(total.values()) >= 0
    middle = trace.makespan_ps // 3
    halves = [path.between(0, middle), path.between(middle, trace.makespan_ps)]
    assert {name: sum(half[name] for half in halves) for name in total} == total
    if options.get("gap_us"):
        assert total["gap"] == 2 * 2_000_000


def test_an_unlimited_memory_is_not_shared() -> None:
    total = critical_time(simulated(without=["memory_sharing", "jitter", "pe_spread"])).total()
    assert total["sharing"] <= 2  # rounding up to whole ps
