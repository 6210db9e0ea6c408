"""What flashmoe's device library has to offer: its layer under any policy, and the kernels that only read."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from functools import partial

import torch

from flashmoe.bench.inputs import Tensor, WeightSets
from flashmoe.bench.peers import Forward
from flashmoe.bench.timing import Layer
from flashmoe.hw import DeviceLayer, PackedWeights, tuned
from flashmoe.hw.library import load_library
from flashmoe.model import MoEModel
from flashmoe.policy import resolve

DEADLINE_S = 1.0  # of a wait in a layer of milliseconds at most; past it the output stays NaN


class PackedSets:
    """The weights once more, packed; every policy runs on the same ones."""

    def __init__(self, model: MoEModel, sets: WeightSets) -> None:
        self.model = model
        self._packed = [
            PackedWeights.in_place(model, layer.gate, layer.gate_up.clone(), layer.down.clone())
            for layer in sets.layers
        ]

    def layers(self, variant: str, max_tokens: int) -> list[DeviceLayer]:
        """One for each weight set. variant: see `policy_variants`."""
        name, comma, _ = variant.partition(",")
        policy = name if name == "tuned" else resolve(name)
        tiling = tuned(max_tokens).tiling if comma else None
        return [
            DeviceLayer(
                self.model,
                packed,
                ep_size=1,
                max_tokens=max_tokens,
                policy=policy,
                tiling=tiling,
                trace=False,
                deadline_s=DEADLINE_S,
            )
            for packed in self._packed
        ]


def policy_variants(names: Sequence[str]) -> list[str]:
    """Each policy cut in its own way, and cut as "tuned" is; a policy that deals in tokens has only its own.

    Raises: ValueError naming an unknown policy.
    """
    variants = []
    for name in names:
        variants.append(name)
        if name != "tuned" and resolve(name).tiling.granularity == "tile":
            variants.append(f"{name}, tuned tiling")
    return variants


def as_forward(layer: DeviceLayer) -> Forward:
    def forward(x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x)
        given = {}
        if topk_idx is not None and topk_weights is not None:
            given = {"topk_idx": [topk_idx.data_ptr()], "topk_weights": [topk_weights.data_ptr()]}
        stream = torch.cuda.current_stream().cuda_stream
        layer.launch([x.data_ptr()], [out.data_ptr()], [len(x)], **given, stream=stream)
        return out

    return forward


class ReadKernels:
    """Kernels of the device library that read a piece of some memory, and do nothing with it."""

    def __init__(self, model: MoEModel, data: Tensor) -> None:
        self._library, self._data = load_library(model, "cuda"), data
        self.names: list[str] = []
        while (name := self._library.text("read_name", len(self.names))) is not None:
            self.names.append(name)

    def layers(self, variant: int, num_bytes: Sequence[int]) -> list[Layer]:
        """For each layer a read of so many bytes, where the one before ended or, at the end, from the start."""
        at, size = 0, self._data.nbytes
        layers: list[Layer] = []
        for count in num_bytes:
            if at + count > size:
                at = 0
            layers.append(partial(self._read, self._data.data_ptr() + at, count, variant))
            at += count
        return layers

    def _read(self, pointer: int, count: int, variant: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._library.call("read", c.c_void_p(pointer), c.c_uint64(count), c.c_uint32(variant), c.c_void_p(stream))
