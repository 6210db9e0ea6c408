"""The GPU backend: PEs share one card, a library built for the layer's shape does the work."""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw.build import BuildError, build_library, check_shape
from flashmoe.hw.fault import launch_error
from flashmoe.hw.launches import (
    RECORD_DTYPE,
    RunResult,
    check_range,
    check_routing,
    expected_routing,
    gate_routing,
    launch_trace,
    take_tokens,
)
from flashmoe.model import MoEModel
from flashmoe.policy import QUEUES, Policy, resolve
from flashmoe.routing import Routing
from flashmoe.schedule import to_schedule
from flashmoe.tasks import ORDERS, TaskTable, Tiling
from flashmoe.weights import Weights

ABI, MAX_PES, MAX_TOKENS = 1, 8, 1024
_NONE = 0xFFFFFFFF
_TRACE_CAPACITY = 1 << 14  # records of a worker
_u32, _u64, _pointers = c.c_uint32, c.c_uint64, c.c_void_p * MAX_PES


def _u32s(names: str) -> list[tuple[str, Any]]:
    return [(name, _u32) for name in names.split()]


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
        ("deadline_ns", _u64),
    ]


class FlashmoeWeights(c.Structure):
    _fields_ = [("gate_device", c.c_void_p), ("gate_up_device", c.c_void_p), ("down_device", c.c_void_p)]


class FlashmoeInput(c.Structure):
    _fields_ = [
        ("x_device", _pointers),
        ("out_device", _pointers),
        ("topk_idx_device", _pointers),
        ("topk_weights_device", _pointers),
        ("replay_offset_device", _pointers),
        ("replay_ids_device", _pointers),
        ("replay_digest", _u64 * MAX_PES),
        ("num_tokens", _u32 * MAX_PES),
    ]


class FlashmoeFault(c.Structure):
    _fields_ = [*_u32s("kind pe worker task_id epoch event index src")] + [
        (name, _u64) for name in ("seen", "wanted", "waited_ns")
    ]


class FlashmoeDevice(c.Structure):
    _fields_ = [
        ("name", c.c_char * 64),
        ("arch", c.c_char * 32),
        *_u32s("num_cus shared_bytes_per_wg"),
        ("memory_bytes", _u64),
        ("l2_bytes", _u64),
    ]


class _Library:
    """The functions of a device library; an error of one is a RuntimeError with the library's text."""

    def __init__(self, path: Path, model: MoEModel) -> None:
        """Raises: BuildError when the library cannot be loaded or is for another shape or version."""
        try:
            self._dll = c.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}") from error
        self._dll.flashmoe_error.restype = c.c_char_p
        self._dll.flashmoe_kernel_name.restype = c.c_char_p
        self._dll.flashmoe_pack_scratch.restype = _u64
        self._dll.flashmoe_workspace_bytes.restype = _u64
        self._dll.flashmoe_num_workers.restype = _u32
        if (abi := self._dll.flashmoe_abi()) != ABI:
            raise BuildError(f"{path}: version {abi} of the interface (this flashmoe has {ABI})")
        shape = FlashmoeShape()
        self._dll.flashmoe_shape(c.byref(shape))
        for name in ("d_model", "d_ff", "num_experts", "top_k", "norm_topk_prob"):
            if getattr(shape, name) != getattr(model, name):
                raise BuildError(f"{path}: built for {name}={getattr(shape, name)} (wanted {getattr(model, name)})")

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self._dll, f"flashmoe_{name}")(*arguments):
            raise RuntimeError(f"{name}: {(self._dll.flashmoe_error() or b'').decode(errors='replace')}")

    def get(self, name: str, *arguments: Any) -> Any:
        return getattr(self._dll, f"flashmoe_{name}")(*arguments)


class DeviceLayer:
    """One layer, its weights and a workspace on the card, to be launched as often as wanted."""

    def __init__(
        self,
        model: MoEModel,
        weights: Weights,
        *,
        ep_size: int,
        max_tokens: int,
        workers: int = 0,
        policy: str | Policy = "ticket",
        tiling: Tiling | None = None,
        domains: int = 2,
        deadline_s: float = 60.0,
        trace: bool = True,
    ) -> None:
        """workers: per PE; 0: all of the card. max_tokens: of one PE, 0..1024. trace=False records nothing.

        Raises: ValueError naming the bad argument; BuildError without a compiler; RuntimeError without a GPU.
        """
        self._memory: list[c.c_void_p] = []
        self._layer = c.c_void_p()
        check_shape(model)
        check_range("ep_size", ep_size, 1, MAX_PES)
        check_range("max_tokens", max_tokens, 0, MAX_TOKENS)
        check_range("workers", workers, 0, 1 << 16)
        check_range("domains", domains, 1, 256)
        if not 0 < deadline_s < 1e6:
            raise ValueError(f"deadline_s={deadline_s} (accepted: above 0 and below 1e6)")
        model.experts_per_pe(ep_size)
        weights.check(model)
        self.model, self.ep_size, self.max_tokens = model, ep_size, max_tokens
        self.policy, self.weights = resolve(policy, tiling), weights.cast(model.dtype)
        self._follows_lists = self.policy.queue == "replay" or self.policy.rank is not None
        self._traced, self._taking_turns = trace, threading.Lock()
        self._library = _Library(build_library(model), model)
        self._card = FlashmoeDevice()
        self._library.call("device", c.byref(self._card))
        gate, gate_up, down = map(self._upload, (self.weights.gate, self.weights.gate_up, self.weights.down))
        scratch = self._malloc(self._library.get("pack_scratch"))
        self._library.call("pack", gate_up, down, scratch, None)
        self._library.call("synchronize")
        self._free(scratch)
        cut = self.policy.tiling.to_dict()
        cut["granularity"] = ("tile", "token").index(cut["granularity"])
        cut["down"] = ("tile", "rows").index(cut["down"])
        config = FlashmoeConfig(
            num_pes=ep_size,
            max_tokens=max_tokens,
            tiling=FlashmoeTiling(**cut),
            queue=QUEUES.index("replay" if self._follows_lists else self.policy.queue),
            order=ORDERS.index(self.policy.order),
            look_ahead=self.policy.look_ahead,
            num_workers=workers,
            num_domains=min(domains, workers) if workers else domains,
            trace_capacity=_TRACE_CAPACITY if trace else 0,
            deadline_ns=int(deadline_s * 1e9),
        )
        on_card = FlashmoeWeights(gate, gate_up, down)
        self._library.call("create", c.byref(config), c.byref(on_card), c.byref(self._layer))
        self.workers = int(self._library.get("num_workers", self._layer))
        self.domains = min(domains, self.workers)

    def __del__(self) -> None:
        library = getattr(self, "_library", None)
        if library is None:
            return
        if self._layer:
            library.get("destroy", self._layer)
        for pointer in self._memory:
            library.get("free", pointer)

    @property
    def workspace_bytes(self) -> int:
        """Workspaces and symmetric heaps of all PEs, without weights."""
        return int(self._library.get("workspace_bytes", self._layer))

    def __call__(self, x: Sequence[NDArray[Any]], *, routing: Routing | None = None, seed: int = 0) -> RunResult:
        """Launch once. Arguments and errors as in `flashmoe.run`; launches from several threads take turns."""
        with self._taking_turns:
            kept = len(self._memory)
            try:
                return self._launch(x, routing, seed)
            finally:
                for pointer in self._memory[kept:]:
                    self._free(pointer)

    def _launch(self, x: Sequence[NDArray[Any]], routing: Routing | None, seed: int) -> RunResult:
        tokens = take_tokens(self.model, x, self.ep_size, self.max_tokens)
        counts = [len(rows) for rows in tokens]
        if routing is not None:
            check_routing(self.model, routing, counts)
        given = FlashmoeInput()
        if self._follows_lists:
            expected = routing or expected_routing(self.model, self.weights, tokens)
            table = TaskTable(self.model, expected, self.policy.tiling, gate=routing is None)
            for pe, lists in enumerate(to_schedule(self.policy, table, self.workers)):
                offsets = np.cumsum([0, *map(len, lists)], dtype=np.uint32)
                given.replay_offset_device[pe] = self._upload(offsets).value
                given.replay_ids_device[pe] = self._upload(np.array([i for ids in lists for i in ids], np.uint32)).value
                given.replay_digest[pe] = table.plan_digests[pe]
        outputs = [np.zeros(rows.shape, self.model.numpy_dtype) for rows in tokens]
        for pe, rows in enumerate(tokens):
            given.num_tokens[pe] = len(rows)
            given.x_device[pe] = self._upload(rows).value
            given.out_device[pe] = self._upload(outputs[pe]).value
            if routing is not None:
                given.topk_idx_device[pe] = self._upload(np.ascontiguousarray(routing.topk_idx[pe], np.int32)).value
                scales = np.ascontiguousarray(routing.topk_weights[pe], np.float32)
                given.topk_weights_device[pe] = self._upload(scales).value
        self._library.call("launch", self._layer, c.byref(given), None)
        fault = FlashmoeFault()
        self._library.call("fault", self._layer, c.byref(fault))
        buffers, ran, drops = self._traces()
        if fault.kind:
            told: dict[str, Any] = {name: getattr(fault, name) for name, *_ in FlashmoeFault._fields_}
            for name in ("task_id", "src"):
                told[name] = None if told[name] == _NONE else told[name]
            told |= {"waited_s": told.pop("waited_ns") * 1e-9, "tasks_run": ran, "unfinished_pes": []}
            self._library.call("reset", self._layer)
            raise launch_error(told, self.workers)
        for pe, rows in enumerate(outputs):
            if rows.nbytes:
                self._library.call(
                    "copy", c.c_void_p(rows.ctypes.data), c.c_void_p(given.out_device[pe]), _u64(rows.nbytes)
                )
        used = routing or gate_routing(self.model, [self._routing(pe, count) for pe, count in enumerate(counts)])
        header = {
            "executor": "cuda",
            "machine": self._card.arch.decode(),
            "device": self._card.name.decode(),
            "num_workers": self.workers,
            "num_domains": self.domains,
            "policy": self.policy.name,
            "seed": seed,
            "clock": {"unit": "ps", "resolution_ps": 32000},
            "drops": drops,
        }
        table = TaskTable(self.model, used, self.policy.tiling, gate=routing is None)
        return RunResult(outputs, launch_trace(table, buffers, header), used)

    def _routing(self, pe: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        idx = np.zeros((count, self.model.top_k), np.int32)
        weights = np.zeros((count, self.model.top_k), np.float32)
        places = c.c_void_p(idx.ctypes.data), c.c_void_p(weights.ctypes.data)
        self._library.call("routing", self._layer, _u32(pe), *places)
        return idx, np.nan_to_num(weights)  # a NaN token poisons its own output; a Routing holds numbers

    def _traces(self) -> tuple[list[np.ndarray[Any, Any]], list[int], int]:
        """Records of each worker, the number of tasks that each ran, and the records dropped in all."""
        buffers: list[np.ndarray[Any, Any]] = []
        ran, dropped = [], 0
        for worker in range(self.ep_size * self.workers if self._traced else 0):
            records, size, drops = np.zeros(_TRACE_CAPACITY, RECORD_DTYPE), _u32(), _u32()
            where = _u32(worker // self.workers), _u32(worker % self.workers), c.c_void_p(records.ctypes.data)
            self._library.call("trace", self._layer, *where, c.byref(size), c.byref(drops))
            buffers.append(records[: size.value].copy())
            ran.append(size.value + drops.value)
            dropped += drops.value
        return buffers, ran, dropped

    def _malloc(self, num_bytes: int) -> c.c_void_p:
        pointer = c.c_void_p()
        self._library.call("malloc", c.byref(pointer), _u64(max(num_bytes, 1)))
        self._memory.append(pointer)
        return pointer

    def _free(self, pointer: c.c_void_p) -> None:
        self._memory = [kept for kept in self._memory if kept is not pointer]
        self._library.call("free", pointer)

    def _upload(self, array: NDArray[Any]) -> c.c_void_p:
        pointer = self._malloc(array.nbytes)
        if array.nbytes:
            self._library.call("copy", pointer, c.c_void_p(array.ctypes.data), _u64(array.nbytes))
        return pointer
