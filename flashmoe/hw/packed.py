"""Weights on the card, in the order in which the matrix instructions read them."""

from __future__ import annotations

import ctypes as c
from typing import Any

from numpy.typing import NDArray

from flashmoe.hw.library import DeviceBuffer, FlashmoeWeights, download, load_library
from flashmoe.hw.tensors import current_stream, pointer_of
from flashmoe.model import MoEModel
from flashmoe.weights import Weights


class PackedWeights:
    """The packed weights of one layer; any number of device layers of that model may share them.

    They are packed when the first layer has been made over them, so nothing is lost when that is refused. On the card
    they take as much as the weights themselves, and a scratch buffer of one expert's larger matrix while they are
    packed.
    """

    _owners: list[Any]  # of the memory
    _at: list[int]  # device pointers: gate, gate_up, down

    def __init__(self, model: MoEModel, weights: Weights, *, backend: str = "cuda") -> None:
        """Upload a copy. Raises: as `DeviceLayer`."""
        self._begin(model, backend)
        weights.check(model)
        weights = weights.cast(model.dtype)
        self._owners = [DeviceBuffer.of(self.library, a) for a in (weights.gate, weights.gate_up, weights.down)]
        self._at = [buffer.pointer for buffer in self._owners]

    @classmethod
    def in_place(cls, model: MoEModel, gate: Any, gate_up: Any, down: Any, *, backend: str = "cuda") -> PackedWeights:
        """Take tensors on the card: they will be packed where they are, and gate_up and down hold nothing else then.

        gate: (num_experts, d_model), not changed; gate_up: (num_experts, 2 d_ff, d_model), an expert's gate rows
        first; down: (num_experts, d_model, d_ff). All bfloat16 and contiguous. They stay alive with this object.
        Raises: ValueError naming what does not fit; else as `DeviceLayer`.
        """
        packed = cls.__new__(cls)
        packed._begin(model, backend)
        experts, rows, columns = model.num_experts, model.d_model, model.d_ff
        packed._owners = [gate, gate_up, down]
        packed._at = [
            pointer_of("gate", gate, (experts, rows)),
            pointer_of("gate_up", gate_up, (experts, 2 * columns, rows)),
            pointer_of("down", down, (experts, rows, columns)),
        ]
        packed._stream = current_stream(gate)
        return packed

    def _begin(self, model: MoEModel, backend: str) -> None:
        self.model, self.library = model, load_library(model, backend)
        self.library.card()
        self._stream = 0
        self._done = False

    def pack(self) -> None:
        """Pack them unless they are; waits for the device."""
        if self._done:
            return
        scratch = DeviceBuffer(self.library, self.library.get("pack_scratch"))
        gate_up, down = map(c.c_void_p, self._at[1:])
        self.library.call("pack", gate_up, down, c.c_void_p(scratch.pointer), c.c_void_p(self._stream))
        self._done = True
        self.library.call("synchronize")  # before the scratch goes

    def native(self) -> FlashmoeWeights:
        return FlashmoeWeights(*self._at)

    def gate(self) -> NDArray[Any]:
        """The router's matrix, copied from the card."""
        return download(self.library, self._at[0], (self.model.num_experts, self.model.d_model), self.model.numpy_dtype)
