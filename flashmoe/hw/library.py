"""A device library in this process: the structures of its interface, its functions, and memory on the card."""

from __future__ import annotations

import ctypes as c
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw.build import BuildError, build_library, check_shape
from flashmoe.hw.driver import DeviceError, check_driver
from flashmoe.model import MoEModel

ABI, MAX_PES, MAX_TOKENS = 1, 8, 1024
TARGETS = {"cuda": "sm_90", "hip": "gfx942"}  # backend -> what its library is built for
_CARDS = {"cuda": "H100, H200, GH200", "hip": "MI300A, MI300X, MI325X"}

u32, u64, pointers = c.c_uint32, c.c_uint64, c.c_void_p * MAX_PES


def _u32s(names: str) -> list[tuple[str, Any]]:
    return [(name, u32) for name in names.split()]


# field for field the structures of hip_src/device/api.h


class FlashmoeShape(c.Structure):
    _fields_ = _u32s("d_model d_ff num_experts top_k num_pes norm_topk_prob dtype")


class FlashmoeTiling(c.Structure):
    _fields_ = _u32s(
        "granularity down gate_tokens gate_experts dispatch_tokens up_rows down_rows block_tokens experts_per_pick "
        "combine_tokens"
    )


class FlashmoeConfig(c.Structure):
    _fields_ = [
        *_u32s("num_pes max_tokens"),
        ("tiling", FlashmoeTiling),
        *_u32s("queue order look_ahead num_workers num_domains trace_capacity kernel"),
        ("deadline_ns", u64),
    ]


class FlashmoeWeights(c.Structure):
    _fields_ = [("gate_device", c.c_void_p), ("gate_up_device", c.c_void_p), ("down_device", c.c_void_p)]


class FlashmoeInput(c.Structure):
    _fields_ = [
        ("x_device", pointers),
        ("out_device", pointers),
        ("topk_idx_device", pointers),
        ("topk_weights_device", pointers),
        ("replay_offset_device", pointers),
        ("replay_ids_device", pointers),
        ("replay_digest", u64 * MAX_PES),
        ("num_tokens", u32 * MAX_PES),
    ]


class FlashmoeFault(c.Structure):
    _fields_ = [
        *_u32s("kind pe worker task_id epoch event index src"),
        *((name, u64) for name in ("seen", "wanted", "waited_ns")),
    ]


class FlashmoeDevice(c.Structure):
    _fields_ = [
        ("name", c.c_char * 64),
        ("arch", c.c_char * 32),
        *_u32s("num_cus shared_bytes_per_wg"),
        ("memory_bytes", u64),
        ("l2_bytes", u64),
    ]


class Library:
    """The functions of a device library."""

    def __init__(self, path: Path, model: MoEModel, backend: str) -> None:
        """Raises: BuildError when the library cannot be loaded or is for another shape or version."""
        self.path, self.backend = path, backend
        try:
            self._dll = c.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}") from error
        for name in ("pack_scratch", "workspace_bytes"):
            self._function(name).restype = u64
        self._function("num_workers").restype = u32
        if (abi := self.get("abi")) != ABI:
            raise BuildError(f"{path}: version {abi} of the interface (this flashmoe has {ABI})")
        shape = FlashmoeShape()
        self.get("shape", c.byref(shape))
        for name in ("d_model", "d_ff", "num_experts", "top_k", "norm_topk_prob"):
            if getattr(shape, name) != getattr(model, name):
                raise BuildError(f"{path}: built for {name}={getattr(shape, name)} (wanted {getattr(model, name)})")

    def _function(self, name: str) -> Any:
        return getattr(self._dll, f"flashmoe_{name}")

    def get(self, name: str, *arguments: Any) -> Any:
        return self._function(name)(*arguments)

    def text(self, name: str, *arguments: Any) -> str | None:
        """Of a function that gives text, or NULL."""
        function = self._function(name)
        function.restype = c.c_char_p
        told = function(*arguments)
        return None if told is None else str(told.decode(errors="replace"))

    def call(self, name: str, *arguments: Any, error: Callable[[str], Exception] = DeviceError) -> None:
        """Raises: `error` with the library's own text when the function gives one."""
        if self.get(name, *arguments):
            raise error(f"{name}: {self.text('error') or ''}")

    def card(self) -> FlashmoeDevice:
        """The current device. Raises: DeviceError when there is none, or the code of this library is not for it."""
        card = FlashmoeDevice()
        self.call("device", c.byref(card))
        if card.arch.decode().split(":")[0] != TARGETS[self.backend]:  # AMD appends features: gfx942:sramecc+
            raise DeviceError(
                f"the card is {card.name.decode()} ({card.arch.decode()}); backend={self.backend!r} is for "
                f"{TARGETS[self.backend]} ({_CARDS[self.backend]})"
            )
        return card


@cache
def load_library(model: MoEModel, backend: str) -> Library:
    """The library for a model's shape, built at the first use, with a line on stderr.

    Raises: ValueError for a shape that the kernels cannot do; DeviceError without a card; BuildError without a
    compiler.
    """
    check_shape(model)
    check_driver(backend)
    path = build_library(model, TARGETS[backend], progress=lambda line: print(f"flashmoe: {line}", file=sys.stderr))
    return Library(path, model, backend)


class DeviceBuffer:
    """Memory on the card; freed with the object."""

    def __init__(self, library: Library, num_bytes: int) -> None:
        self._library, self._pointer, self.num_bytes = library, c.c_void_p(), num_bytes
        library.call("malloc", c.byref(self._pointer), u64(num_bytes))

    @classmethod
    def of(cls, library: Library, array: NDArray[Any]) -> Self:
        """A copy of an array."""
        array = np.ascontiguousarray(array)
        buffer = cls(library, array.nbytes)
        library.call("copy", buffer._pointer, c.c_void_p(array.ctypes.data), u64(array.nbytes))
        return buffer

    @property
    def pointer(self) -> int:
        return self._pointer.value or 0

    def __del__(self) -> None:
        if self._pointer:
            self._library.get("free", self._pointer)


def download(library: Library, pointer: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of what lies at a device pointer; waits for the device."""
    array = np.empty(shape, dtype)
    library.call("copy", c.c_void_p(array.ctypes.data), c.c_void_p(pointer), u64(array.nbytes))
    return array
