"""Layers on a GPU for tests: their weights there, and launches into poisoned outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers import weights_of
from numpy.typing import NDArray
from qwen import to_torch, torch

from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.launches import RunResult
from flashmoe.hw.packed import PackedWeights
from flashmoe.model import MoEModel
from flashmoe.routing import Routing

BACKENDS = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("hip", marks=pytest.mark.mi300x)]
# odd numbers of the instruction's tiles in every matrix; 8 PEs have two experts each
MODEL = MoEModel(d_model=320, d_ff=192, num_experts=16, top_k=4, name="card")
POISON = 0x7FE5  # bits of a bf16 NaN that no arithmetic gives


@functools.cache
def packed(model: MoEModel, backend: str) -> PackedWeights:
    return PackedWeights(model, weights_of(model), backend=backend)


DEFAULTS = {"ep_size": 1, "max_tokens": 40, "policy": "ticket", "deadline_s": 2.0}


def make_layer(model: MoEModel, backend: str, **arguments: Any) -> DeviceLayer:
    """A layer with weights_of(model)."""
    return DeviceLayer(model, packed(model, backend), backend=backend, **{**DEFAULTS, **arguments})


def launch(
    layer: DeviceLayer, x: Sequence[Any], routing: Routing | None = None, *, follows: Routing | None = None
) -> RunResult:
    """Launch once into poisoned tensors, each with a row more than it needs, which must stay as it is.

    x: arrays, or tensors on the card. routing: from outside; None: the gate decides.
    follows: the routing that a replay is made for.
    """
    if follows is not None:
        layer.follow(follows, gate=routing is None)
    tensors = [(to_torch(rows) if isinstance(rows, np.ndarray) else rows).cuda() for rows in x]
    out = [torch.full((len(rows) + 1, rows.shape[1]), POISON, dtype=torch.int16, device="cuda") for rows in tensors]
    given: dict[str, list[Any]] = {}
    if routing is not None:
        given["topk_idx"] = [torch.from_numpy(idx.copy()).cuda() for idx in routing.topk_idx]
        given["topk_weights"] = [torch.from_numpy(scales.copy()).cuda() for scales in routing.topk_weights]
    layer.launch(
        _pointers(tensors),
        _pointers(out),
        [len(rows) for rows in tensors],
        **{name: _pointers(values) for name, values in given.items()},
        stream=torch.cuda.current_stream().cuda_stream,
    )
    trace, used = layer.last_run()
    for rows in out:
        assert (rows[-1] == POISON).all(), "written behind the output"
    return RunResult([_as_bf16(rows[:-1]) for rows in out], trace, routing or used)


def _pointers(tensors: Sequence[Any]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _as_bf16(words: Any) -> NDArray[Any]:
    array: NDArray[Any] = words.cpu().numpy().view(ml_dtypes.bfloat16)
    return array
