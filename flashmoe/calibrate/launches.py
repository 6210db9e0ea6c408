"""Layers launched on a GPU to be measured: with the routing that is wanted, weights cold, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw import prepare
from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.packed import PackedWeights
from flashmoe.measured import MeasuredLayer
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.routing import Routing
from flashmoe.trace import Trace
from flashmoe.weights import Weights

Progress = Callable[[int, int], None]  # (done, all)

_CHOSEN, _STEP = 6.0, 0.1  # logits of a token's first choice, and from one choice to the next


class Launch(NamedTuple):
    """What to launch. workers 0: all that the card has."""

    policy: Policy
    routing: Routing
    workers: int = 0


def tokens_for(routing: Routing, gate: NDArray[Any]) -> NDArray[np.float32]:
    """Tokens for which a router chooses the experts of a routing, in its order.

    gate: (num_experts, d_model), with num_experts <= d_model and rows that are independent, as random ones are.
    Returns: (num_tokens, d_model), the shortest with these logits: about 6 for the experts chosen, 0 for the others.
    """
    idx = routing.topk_idx[0]
    logits = np.zeros((len(idx), len(gate)), np.float64)
    np.put_along_axis(logits, idx, _CHOSEN - _STEP * np.arange(idx.shape[1]), axis=1)
    tokens: NDArray[np.float32] = (logits @ np.linalg.pinv(gate.astype(np.float64)).T).astype(np.float32)
    return tokens


def measure_layers(
    model: MoEModel,
    launches: Sequence[Launch],
    *,
    repeats: int,
    seed: int = 0,
    backend: str = "cuda",
    progress: Progress | None = None,
) -> list[MeasuredLayer]:
    """Launch each `repeats` times, with the gate inside, random weights and tracing.

    Before each launch another runs with the experts renamed, so that no weights of the layer are left in the cache.
    Raises: as `DeviceLayer`; RuntimeError when the router chose other experts than it was meant to.
    """
    prepare(model, backend)  # without a card it fails before weights are drawn
    weights = Weights.random(model, seed=seed)
    gate = np.asarray(weights.gate, np.float32)
    packed = PackedWeights(model, weights, backend=backend)
    layers: dict[tuple[Any, ...], DeviceLayer] = {}
    results = []
    for number, (policy, routing, workers) in enumerate(launches):
        key = (policy.name, policy.tiling, workers)
        if key not in layers:
            most = max(sum(each.routing.num_tokens) for each in launches if _key(each) == key)
            options: dict[str, Any] = {"policy": policy, "workers": workers, "backend": backend}
            layers[key] = DeviceLayer(model, packed, ep_size=1, max_tokens=most, **options)
        results.append(_measure(layers[key], routing, gate, repeats, seed))
        if progress is not None:
            progress(number + 1, len(launches))
    return results


def _key(launch: Launch) -> tuple[Any, ...]:
    return launch.policy.name, launch.policy.tiling, launch.workers


def _measure(layer: DeviceLayer, routing: Routing, gate: NDArray[np.float32], repeats: int, seed: int) -> MeasuredLayer:
    num_experts = routing.num_experts
    renamed = (routing.topk_idx[0] + num_experts // 2) % num_experts
    other = Routing((renamed,), routing.topk_weights, num_experts)
    x, cold_x = tokens_for(routing, gate), tokens_for(other, gate)
    traces: list[Trace] = []
    for _ in range(repeats):
        layer([cold_x])
        result = layer([x], seed=seed)
        chosen, wanted = (np.sort(each.topk_idx[0], axis=1) for each in (result.routing, routing))
        if not np.array_equal(chosen, wanted):
            raise RuntimeError(f"{int((chosen != wanted).any(axis=1).sum())} tokens went to other experts than meant")
        traces.append(result.trace)
    used = Routing(result.routing.topk_idx, result.routing.topk_weights, num_experts, name=routing.name)
    return MeasuredLayer.of(traces, used)
