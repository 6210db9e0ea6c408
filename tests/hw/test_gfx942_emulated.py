"""gfx942's machine code computes the layer: one work-group, emulated, held to the CPU backend and the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import tokens

from flashmoe import Layer, MoEModel, Policy, Routing, Tiling, Weights, reference, run, simulate
from flashmoe.hw.device import DeviceLayer

FOLDER = os.environ.get("FLASHMOE_GFX942_EMULATOR")
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="set FLASHMOE_GFX942_EMULATOR to a folder with tinygrad's tinygrad/ and test/ (needs clang++-19, no GPU)",
)

SMALL = MoEModel(d_model=128, d_ff=64, num_experts=4, top_k=2)
OTHER = MoEModel(d_model=64, d_ff=192, num_experts=5, top_k=3, norm_topk_prob=False)
TILINGS = {
    "tile": Tiling(up_rows=16, down_rows=16),
    "rows": Tiling(down="rows", up_rows=16, down_rows=16, block_tokens=8),
    "token": Tiling(granularity="token", block_tokens=1),
}


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[None]:
    from hw.emulator.gfx942 import Emulator

    assert FOLDER is not None
    emulator = Emulator(Path(FOLDER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmoe.hw.library.check_driver", lambda backend: None)  # the stand-in is the driver
        yield
    del emulator  # here and not before: kernels are launched on it


def check(
    model: MoEModel,
    count: int,
    policy: str | Policy,
    tiling: Tiling | None = None,
    routing: Routing | None = None,
) -> None:
    """Routing, order of tasks and outputs of one worker agree with the CPU's, and the outputs with the reference."""
    weights, x = Weights.random(model, seed=count), tokens(model, [count], seed=count)
    cpu, gfx942 = (
        run(model, weights, x, backend=backend, workers=1, policy=policy, tiling=tiling, routing=routing)
        for backend in ("cpu", "hip")
    )
    np.testing.assert_array_equal(gfx942.routing.topk_idx[0], cpu.routing.topk_idx[0])
    np.testing.assert_allclose(gfx942.routing.topk_weights[0], cpu.routing.topk_weights[0], rtol=1e-5)
    assert order(gfx942) == order(cpu)
    chosen = cpu.routing.topk_idx[0], cpu.routing.topk_weights[0]
    wanted = reference.moe_layer(model, weights, x[0], chosen)
    assert reference.relative_error(gfx942.outputs, [wanted]) < 1e-2
    # sums of float32 in another order, rounded to bf16 twice: a unit in the last place, 2^-8, or two
    assert reference.relative_error(gfx942.outputs, cpu.outputs) < 2**-7


def order(result: Any) -> list[int]:
    records = result.trace.records
    return records["task_id"][np.argsort(records["start_ps"], kind="stable")].tolist()


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_layer(tiling: str) -> None:
    check(SMALL, 3, "ticket", TILINGS[tiling])


@pytest.mark.parametrize("policy", ["push", "domain_steal", "static_phase", "expert_lpt", "ancestor"])
def test_queues_and_orders(policy: str) -> None:
    check(SMALL, 2, policy)


@pytest.mark.parametrize("tiling", ["tile", "rows"])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_odd_numbers_of_tokens_and_sizes(count: int, tiling: str) -> None:
    check(OTHER, count, "ticket", TILINGS[tiling])


def test_the_kernel_without_trace_points() -> None:
    weights, x = Weights.random(SMALL, seed=1), tokens(SMALL, [5], seed=1)
    layers = (
        kind(SMALL, weights, ep_size=1, max_tokens=5, workers=1, policy="ticket", **how)
        for kind, how in ((Layer, {}), (DeviceLayer, {"backend": "hip", "trace": False}))
    )
    cpu, gfx942 = (layer(x) for layer in layers)
    assert len(gfx942.trace.records) == 0
    np.testing.assert_array_equal(gfx942.routing.topk_idx[0], cpu.routing.topk_idx[0])
    assert reference.relative_error(gfx942.outputs, cpu.outputs) < 2**-7


def test_routing_from_outside_with_dropped_choices() -> None:
    idx = np.array([[0, 3], [2, -1], [-1, -1], [1, 2]], np.int32)
    routing = Routing(topk_idx=(idx,), topk_weights=(np.full((4, 2), 0.5, np.float32),), num_experts=4)
    check(SMALL, 4, "ticket", TILINGS["rows"], routing)


def test_a_schedule_of_the_simulator() -> None:
    """The order is one that no queue of the kernel makes by itself."""
    routing = Routing.zipf(SMALL, num_tokens=3, ep_size=1, seed=2)
    policy = Policy(name="backwards", queue="ticket", rank=lambda task: -task.expert, tiling=TILINGS["tile"])
    plan = simulate(SMALL, machine="host", routing=routing, policy=policy, workers=1, gate=False)
    check(SMALL, 3, Policy.from_trace(plan), routing=routing)
