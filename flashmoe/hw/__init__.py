"""Real runs: the layer computed by the task system, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from flashmoe.hw.cpu import Chaos, Layer
from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.fault import LaunchError
from flashmoe.hw.launches import RunResult
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.routing import Routing
from flashmoe.tasks import Tiling
from flashmoe.weights import Weights

__all__ = ["BACKENDS", "Chaos", "LaunchError", "Layer", "RunResult", "run"]

BACKENDS: dict[str, type[Layer] | type[DeviceLayer]] = {"cpu": Layer, "cuda": DeviceLayer}


def run(
    model: MoEModel,
    weights: Weights,
    x: Sequence[NDArray[Any]],
    *,
    backend: str = "cpu",
    workers: int | None = None,
    policy: str | Policy = "ticket",
    tiling: Tiling | None = None,
    routing: Routing | None = None,
    seed: int = 0,
    domains: int = 2,
    deadline_s: float = 60.0,
) -> RunResult:
    """Compute one layer for real, once. To launch it many times, make a `Layer`.

    x: one (num_tokens, d_model) array per PE; their number is the EP size. Other dtypes are cast to the model's.
    backend: cpu, or cuda (built with nvcc at the first use).
    workers: per PE; by default 4 on the CPU and all that a card has.
    domains: groups of workers with a ticket counter of their own (policy domain_steal).
    routing: experts and weights from outside; by default the gate runs inside.
    seed: kept in the trace's header; the layer itself has no randomness.
    deadline_s: of a single wait inside the launch.
    Raises: ValueError naming the bad argument and the accepted ones; LaunchError when the launch could not go on.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} (accepted: {', '.join(BACKENDS)})")
    layer = BACKENDS[backend](
        model,
        weights,
        ep_size=len(x),
        max_tokens=max((len(tokens) for tokens in x), default=0),
        workers=(4 if backend == "cpu" else 0) if workers is None else workers,
        policy=policy,
        tiling=tiling,
        domains=domains,
        deadline_s=deadline_s,
    )
    return layer(x, routing=routing, seed=seed)
