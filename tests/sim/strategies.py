"""Random layers, policies and machines for the engines: small, odd, and with many things at the same moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from layers import skewed_routing, tilings
from sim.tables import HandTable

from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.routing import Routing
from flashmoe.sim import EFFECTS, simulate
from flashmoe.tasks import ORDERS, Tiling
from flashmoe.trace import KINDS

# few round values: events at the same moment are what engines can disagree on
TIMES = st.sampled_from([0, 0, 0, 1_000, 1_000, 2_000, 3_000, 777])
RATES = st.sampled_from([1.0, 2.0, 4.0, 10.0, 3.7, 1e30])

# fixed parts of tasks: one time, or one for each of several sizes
OVERHEADS = TIMES | st.lists(st.tuples(st.sampled_from([1, 2, 3, 5, 8, 16, 64]), TIMES), min_size=1, max_size=4).map(
    lambda times: tuple(sorted(dict(times).items()))
)

# of a machine, but for signal_ps and the fixed parts
OTHER_TIMES = [
    *("launch_ps", "launch_domain_ps", "launch_step_ps", "prologue_ps", "ticket_ps", "ticket_far_ps"),
    *("ticket_service_ps", "ticket_far_service_ps", "signal_near_ps", "release_ps", "plan_ps", "put_ps"),
    *("link_message_ps", "gap_ps", "slice_ps", "stall_ps", "sort_ps", "sort_expert_ps"),
]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Any parameter may be anything; a third of them are hosts."""
    is_host = draw(st.integers(0, 2)) == 0
    values: dict[str, Any] = {name: draw(TIMES) for name in OTHER_TIMES}
    values |= {f"{kind}_overhead_ps": draw(OVERHEADS) for kind in KINDS}
    values["cache_idle_bytes_per_ns"] = draw(st.sampled_from([0.0, 0.0, 2.0, 7.3]))
    values |= {f"{name}_bytes_per_ns": draw(RATES) for name in ("hbm", "cu", "cache", "link", "store")}
    values["cu_flops_per_ns"] = draw(RATES) * 16
    if draw(st.integers(0, 4)) == 0:  # tasks that take no time at all
        values |= {f"{kind}_overhead_ps": 0 for kind in KINDS}
        values |= {"cache_bytes_per_ns": 1e30, "cu_flops_per_ns": 1e30, "store_bytes_per_ns": 1e30}
        values["cache_idle_bytes_per_ns"] = 0.0
    return Machine(
        name="any",
        num_cus=4,
        num_domains=draw(st.integers(1, 4)),
        num_pes_max=8,
        **values,
        signal_ps=values["signal_near_ps"] + draw(TIMES),
        signal_load_factor=draw(st.sampled_from([1.0, 1.0, 3.0, 2.3])),
        release_load_factor=draw(st.sampled_from([1.0, 1.0, 3.0, 2.3])),
        finish_beside=not is_host and draw(st.booleans()),
        ask_early=draw(st.booleans()),
        first_given=draw(st.booleans()),
        in_order=draw(st.booleans()),
        feed_bytes_per_ns=draw(st.sampled_from([0.0, 0.0, 1.0, 3.7])),
        cache_bytes=draw(st.sampled_from([0, 1, 64, 1_000, 1 << 40])),
        word_tokens=draw(st.sampled_from([0, 0, 2, 8])),
        plan_token_ps=draw(st.sampled_from([0, 0, 100, 333])),
        port_bytes_per_ns=draw(st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.3])),
        matrix_tokens=draw(st.sampled_from([1, 1, 4, 16])),
        matrix_rows=draw(st.sampled_from([1, 1, 8, 16])),
        knee=draw(st.sampled_from([0.0, 0.0, 1.0, 2.5, 8.0])),
        prefetch=not is_host and draw(st.booleans()),
        num_cores=draw(st.integers(1, 6)) if is_host else 0,
        pe_spread=0.0 if is_host else draw(st.sampled_from([0.0, 0.0, 0.2])),
        jitter=draw(st.sampled_from([0.0, 0.0, 0.3])),
        jitter_bytes=draw(st.sampled_from([0, 0, 24, 100])),
        stall_probability=draw(st.sampled_from([0.0, 0.0, 0.2, 1.0])),
    )


@st.composite
def policies(draw: st.DrawFn, tiling: Tiling) -> Policy:
    """Any queue that deals out by itself; an order written in Python at times."""
    queue = draw(st.sampled_from(["push", "ticket", "domain", "static"]))
    rank = None
    if queue != "push" and draw(st.integers(0, 5)) == 0:
        rank = _odd_tiles_last
    look_ahead = draw(st.sampled_from([0, 1, 1, 2, 3, 15]))
    order = draw(st.sampled_from(ORDERS))
    return Policy(name="any", queue=queue, order=order, look_ahead=look_ahead, tiling=tiling, rank=rank)


def _odd_tiles_last(task: Any) -> Any:
    return (task.tile % 2, -task.num_tokens)


@st.composite
def runs(draw: st.DrawFn) -> tuple[MoEModel, dict[str, Any]]:
    """A model and the arguments of simulate(), but for the engine."""
    num_pes = draw(st.integers(1, 4))
    num_experts = num_pes * draw(st.integers(1, 8 // num_pes))
    model = MoEModel(
        d_model=draw(st.sampled_from([4, 8, 8, 16, 7, 1])),
        d_ff=draw(st.sampled_from([4, 8, 8, 5, 1])),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 4))),
        dtype=draw(st.sampled_from(["bf16", "f32"])),
    )
    num_layers = draw(st.sampled_from([1, 1, 2, 3]))
    routings = [draw(_routings(model, num_pes)) for _ in range(num_layers)]
    tiling = draw(tilings())
    if draw(st.booleans()):  # more tasks
        tiling = replace(tiling, up_rows=draw(st.integers(1, 3)), down_rows=draw(st.integers(1, 4)))
    machine, workers = draw(machines()), draw(st.integers(1, 9))
    arguments: dict[str, Any] = {
        "routing": routings,
        "machine": machine,
        "policy": draw(policies(tiling)),
        "workers": workers,
        "gate": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
        "gap_us": draw(st.sampled_from([None, None, 0.0, 0.003, 0.0017])),
        "without": draw(st.lists(st.sampled_from(list(EFFECTS)), max_size=3)),
        "pe_speed": _speeds(draw, num_pes, machine.num_cores > 0),
    }
    if draw(st.integers(0, 4)) == 0:  # replay it, perhaps on another machine
        arguments |= {"routing": [routings[0]] * num_layers, "without": []}
        one_layer = simulate(model, **(arguments | {"routing": routings[0]}))
        replay = replace(Policy.from_trace(one_layer), look_ahead=draw(st.integers(0, 3)))
        other = draw(machines())
        arguments |= {"policy": replay, "machine": other}
        arguments["pe_speed"] = _speeds(draw, num_pes, other.num_cores > 0)
    return model, arguments


def _speeds(draw: st.DrawFn, num_pes: int, is_host: bool) -> list[float] | None:
    speed = st.sampled_from([1.0, 1.0, 0.5, 0.9, 1.3])
    if draw(st.booleans()):
        return None
    return [draw(speed)] * num_pes if is_host else [draw(speed) for _ in range(num_pes)]


@st.composite
def _routings(draw: st.DrawFn, model: MoEModel, num_pes: int) -> Routing:
    counts = [draw(st.sampled_from([0, 1, 2, 3, 5, 8])) for _ in range(num_pes)]
    return skewed_routing(
        model,
        counts,
        seed=draw(st.integers(0, 99)),
        skew=draw(st.sampled_from([0.0, 2.0, 30.0])),
        dropped=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    )


def random_layer(seed: int, num_pes: int, down: str, *, broken: float = 0.0) -> HandTable:
    """A small layer of every kind of task, with random sizes and edges that point forward.

    broken: probability that a task waits for something in addition, which may not come before it.
    """
    rng = np.random.default_rng(seed)
    table = HandTable(num_pes, down)
    blocks = rng.integers(1, 4, num_pes)
    experts = rng.integers(0, 4, num_pes)
    upped = [[table.event("upped", pe) for _ in range(experts[pe])] for pe in range(num_pes)]
    results = [[table.event("result", pe) for _ in range(3)] for pe in range(num_pes)]

    def sizes() -> dict[str, int]:
        return {
            "weights": int(rng.integers(0, 3) * rng.integers(0, 500)),
            "io": int(rng.integers(0, 3)),
            "flops": int(rng.integers(0, 9)),
        }

    def also(pe: int) -> tuple[int, ...]:
        events = [table.plan(pe), *upped[pe], *results[pe]]
        return (events[int(rng.integers(len(events)))],) if rng.random() < broken else ()

    for pe in range(num_pes):
        gated = [table.event("gated", pe) for _ in range(blocks[pe])]
        routed = [table.event("routed", pe) for _ in range(blocks[pe])]
        for block in range(blocks[pe]):
            for _ in range(2):
                table.task("gate", pe=pe, waits=also(pe), signals=(gated[block],), **sizes())
        for block in range(blocks[pe]):
            waits, signals = (gated[block], *also(pe)), (routed[block], table.plan(pe))
            table.task("route", pe=pe, waits=waits, signals=signals, **sizes())
        for block in range(blocks[pe]):
            for peer in range(num_pes):
                if peer != pe:
                    put = (table.plan(peer), int(rng.integers(0, 200)))
                    table.task("dispatch", pe=pe, peer=peer, waits=(routed[block],), signals=(put,), **sizes())
        for expert in range(experts[pe]):
            for tile in range(int(rng.integers(1, 4))):
                table.task(
                    "up",
                    pe=pe,
                    waits=(table.plan(pe), *also(pe)),
                    signals=(upped[pe][expert],),
                    expert=expert,
                    tile=tile,
                    **sizes(),
                )
        for tile in range(2):
            for expert in range(experts[pe]):
                to = int(rng.integers(num_pes))
                put = (results[to][int(rng.integers(3))], int(rng.integers(0, 99)) if to != pe else 0)
                chain = 1 if down == "tile" else int(experts[pe]) * (expert == 0)
                table.task(
                    "down",
                    pe=pe,
                    waits=(upped[pe][expert], *also(pe)),
                    signals=(put,),
                    expert=expert,
                    tile=tile,
                    chain=chain,
                    **sizes(),
                )
        for result in results[pe]:
            table.task("combine", pe=pe, waits=(table.plan(pe), result), **sizes())
    return table
