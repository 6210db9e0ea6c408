"""Real runs: the layer computed by the task system, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flashmoe.hw.build import BuildError
from flashmoe.hw.cpu import Chaos, Layer
from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.driver import DeviceError
from flashmoe.hw.fault import LaunchError
from flashmoe.hw.launches import RunResult
from flashmoe.hw.library import load_library
from flashmoe.hw.packed import PackedWeights
from flashmoe.hw.tuned import choose, tuned
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.routing import Routing
from flashmoe.tasks import Tiling
from flashmoe.weights import Weights

__all__ = [
    "BACKENDS",
    "BuildError",
    "Chaos",
    "DeviceError",
    "DeviceLayer",
    "LaunchError",
    "Layer",
    "PackedWeights",
    "RunResult",
    "choose",
    "prepare",
    "run",
    "tuned",
]

BACKENDS: dict[str, Callable[..., Layer | DeviceLayer]] = {
    "cpu": Layer,
    "cuda": DeviceLayer,
    "hip": partial(DeviceLayer, backend="hip"),
}


def prepare(model: MoEModel, backend: str) -> None:
    """See to it that launches on a backend can begin: its code is compiled for the model. Raises: as `run`."""
    if backend != "cpu":
        load_library(model, backend).card()


def run(
    model: MoEModel,
    weights: Weights | PackedWeights,
    x: Sequence[Any],
    *,
    backend: str = "cpu",
    workers: int | None = None,
    policy: str | Policy | None = None,
    tiling: Tiling | None = None,
    routing: Routing | None = None,
    seed: int = 0,
    domains: int = 2,
    deadline_s: float = 60.0,
) -> RunResult:
    """Compute one layer for real, once. To launch it many times, make a `Layer`, or on a GPU a `DeviceLayer`.

    weights: packed ones on a GPU only.
    x: one (num_tokens, d_model) array per PE; their number is the EP size. Other dtypes are cast to the model's. On a
    GPU also torch tensors, contiguous bfloat16 on the current device, which are not copied; outputs are tensors, then.
    backend: cpu; cuda (sm_90) or hip (gfx942), where all PEs share one card. Their code is compiled at the first use.
    workers: per PE; by default 4 on the CPU and all that a card has.
    policy: "tuned" is what is best on a GPU for so many tokens, and the default there; "ticket" on the CPU.
    domains: groups of workers with a ticket counter of their own (policy domain_steal).
    routing: experts and weights from outside; by default the gate runs inside.
    seed: kept in the trace's header; the layer itself has no randomness.
    deadline_s: of a single wait inside the launch.
    Raises: ValueError naming the bad argument and the accepted ones; LaunchError when the launch could not go on;
    BuildError when the GPU code cannot be compiled here; DeviceError when there is no GPU that can run it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} (accepted: {', '.join(BACKENDS)})")
    max_tokens = max((len(tokens) for tokens in x), default=0)
    layer = BACKENDS[backend](
        model,
        weights,
        ep_size=len(x),
        max_tokens=max_tokens,
        workers=(4 if backend == "cpu" else 0) if workers is None else workers,
        policy=choose(policy or ("ticket" if backend == "cpu" else "tuned"), max_tokens),
        tiling=tiling,
        domains=domains,
        deadline_s=deadline_s,
    )
    return layer(x, routing=routing, seed=seed)
