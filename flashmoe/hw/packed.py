"""Weights on the card, in the order in which the matrix instructions read them."""

from __future__ import annotations

import ctypes as c
from typing import Any

from numpy.typing import NDArray

from flashmoe.hw.library import DeviceBuffer, FlashmoeWeights, Library, download, load_library
from flashmoe.hw.tensors import current_stream, pointer_of
from flashmoe.model import MoEModel
from flashmoe.weights import Weights


class PackedWeights:
    """The packed weights of one layer; any number of device layers of that model may share them.

    On the card they take as much as the weights themselves. While they are packed there is a scratch buffer of one
    expert's larger matrix besides.
    """

    def __init__(self, model: MoEModel, weights: Weights, *, backend: str = "cuda") -> None:
        """Upload and pack a copy. Raises: as `DeviceLayer`."""
        library = load_library(model, backend)
        library.card()
        weights.check(model)
        weights = weights.cast(model.dtype)
        buffers = [DeviceBuffer.of(library, array) for array in (weights.gate, weights.gate_up, weights.down)]
        self._pack(library, model, [buffer.pointer for buffer in buffers], buffers, stream=0)

    @classmethod
    def in_place(cls, model: MoEModel, gate: Any, gate_up: Any, down: Any, *, backend: str = "cuda") -> PackedWeights:
        """Pack tensors on the card where they are: gate_up and down hold the packed weights from then on.

        gate: (num_experts, d_model), not changed; gate_up: (num_experts, 2 d_ff, d_model), an expert's gate rows
        first; down: (num_experts, d_model, d_ff). All bfloat16 and contiguous. They stay alive with this object.
        Raises: ValueError naming what does not fit; else as `DeviceLayer`.
        """
        library = load_library(model, backend)
        library.card()
        experts, rows, columns = model.num_experts, model.d_model, model.d_ff
        at = [
            pointer_of("gate", gate, (experts, rows)),
            pointer_of("gate_up", gate_up, (experts, 2 * columns, rows)),
            pointer_of("down", down, (experts, rows, columns)),
        ]
        packed = cls.__new__(cls)
        packed._pack(library, model, at, [gate, gate_up, down], stream=current_stream(gate))
        return packed

    def _pack(self, library: Library, model: MoEModel, at: list[int], owners: list[Any], stream: int) -> None:
        self.library, self.model, self._at, self._owners = library, model, at, owners
        scratch = DeviceBuffer(library, library.get("pack_scratch"))
        gate_up, down = map(c.c_void_p, at[1:])
        library.call("pack", gate_up, down, c.c_void_p(scratch.pointer), c.c_void_p(stream))
        library.call("synchronize")  # before the scratch goes

    def native(self) -> FlashmoeWeights:
        return FlashmoeWeights(*self._at)

    def gate(self) -> NDArray[Any]:
        """The router's matrix, copied from the card."""
        return download(self.library, self._at[0], (self.model.num_experts, self.model.d_model), self.model.numpy_dtype)
