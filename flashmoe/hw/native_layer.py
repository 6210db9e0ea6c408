"""One layer of a device library: a policy, and the workspace that it needs on the card."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw.fault import LaunchError, launch_error
from flashmoe.hw.launches import RECORD_DTYPE
from flashmoe.hw.library import (
    DeviceBuffer,
    FlashmoeConfig,
    FlashmoeFault,
    FlashmoeInput,
    FlashmoeTiling,
    u32,
)
from flashmoe.hw.packed import PackedWeights
from flashmoe.policy import QUEUES, Policy
from flashmoe.routing import Routing
from flashmoe.schedule import to_schedule
from flashmoe.tasks import ORDERS, TaskTable, Tiling

KERNELS = ("best", "general", "pipeline")  # FlashmoeConfig.kernel

_NONE = 0xFFFFFFFF
_TRACE_CAPACITY = 1 << 14  # records of a worker


class NativeLayer:
    """Launched as often as wanted; nothing is reset in between."""

    def __init__(
        self,
        weights: PackedWeights,
        policy: Policy,
        *,
        ep_size: int,
        max_tokens: int,
        workers: int,
        domains: int,
        deadline_s: float,
        trace: bool,
        kernel: str,
    ) -> None:
        """Raises: ValueError when no kernel can do it, with the library's reason."""
        self.policy, self.ep_size, self.max_tokens = policy, ep_size, max_tokens
        self.follows_lists = policy.queue == "replay" or policy.rank is not None
        self._library, self._weights, self._traced = weights.library, weights, trace
        self._layer = c.c_void_p()
        self._lists: list[DeviceBuffer] = []
        self._followed = FlashmoeInput()
        config = FlashmoeConfig(
            num_pes=ep_size,
            max_tokens=max_tokens,
            tiling=_native_tiling(policy.tiling),
            queue=QUEUES.index("replay" if self.follows_lists else policy.queue),
            order=ORDERS.index(policy.order),
            look_ahead=policy.look_ahead,
            num_workers=workers,
            num_domains=min(domains, workers) if workers else domains,
            trace_capacity=_TRACE_CAPACITY if trace else 0,
            kernel=KERNELS.index(kernel),
            deadline_ns=int(deadline_s * 1e9),
        )
        of_all = weights.native()
        self._library.call("create", c.byref(config), c.byref(of_all), c.byref(self._layer), error=ValueError)
        self.num_workers = int(self._library.get("num_workers", self._layer))

    def __del__(self) -> None:
        if getattr(self, "_layer", None):
            self._library.get("destroy", self._layer)

    @property
    def workspace_bytes(self) -> int:
        return int(self._library.get("workspace_bytes", self._layer))

    @property
    def kernel_name(self) -> str:
        return self._library.text("kernel_name", self._layer) or ""

    def follow(self, routing: Routing, *, gate: bool) -> None:
        """Put the lists of a replay, or of a policy written in Python, for this routing on the card."""
        table = TaskTable(self._weights.model, routing, self.policy.tiling, gate=gate)
        lists, self._followed = [], FlashmoeInput()
        for pe, workers in enumerate(to_schedule(self.policy, table, self.num_workers)):
            offsets = np.cumsum([0, *map(len, workers)], dtype=np.uint32)
            ids = np.array([i for worker in workers for i in worker], np.uint32)
            lists += [DeviceBuffer.of(self._library, offsets), DeviceBuffer.of(self._library, ids)]
            self._followed.replay_offset_device[pe], self._followed.replay_ids_device[pe] = (
                b.pointer for b in lists[-2:]
            )
            self._followed.replay_digest[pe] = table.plan_digests[pe]
        self._lists = lists

    def launch(
        self,
        x: Sequence[int],
        out: Sequence[int],
        num_tokens: Sequence[int],
        topk_idx: Sequence[int] | None,
        topk_weights: Sequence[int] | None,
        stream: int,
    ) -> None:
        given = FlashmoeInput()
        if self.follows_lists:
            if not self._lists:
                raise ValueError(f"policy {self.policy.name!r} follows lists (call follow(routing) before the launch)")
            c.memmove(c.byref(given), c.byref(self._followed), c.sizeof(given))
        for pe in range(self.ep_size):
            given.x_device[pe], given.out_device[pe], given.num_tokens[pe] = x[pe], out[pe], num_tokens[pe]
            if topk_idx is not None and topk_weights is not None:
                given.topk_idx_device[pe], given.topk_weights_device[pe] = topk_idx[pe], topk_weights[pe]
        self._library.call("launch", self._layer, c.byref(given), c.c_void_p(stream))

    def check(self) -> None:
        """Wait for the device. Raises: LaunchError when a launch could not go on; the layer is then reset."""
        fault = FlashmoeFault()
        self._library.call("fault", self._layer, c.byref(fault))
        if fault.kind:
            raise self._error(fault)

    def _error(self, fault: FlashmoeFault) -> LaunchError:
        told: dict[str, Any] = {name: getattr(fault, name) for name, *_ in FlashmoeFault._fields_}
        for name in ("task_id", "src"):
            told[name] = None if told[name] == _NONE else told[name]
        _, ran, _ = self.records()
        told |= {"waited_s": told.pop("waited_ns") * 1e-9, "tasks_run": ran, "unfinished_pes": []}
        self._library.call("reset", self._layer)
        return launch_error(told, self.num_workers)

    def records(self) -> tuple[list[NDArray[np.void]], list[int], int]:
        """Of the last launch: each worker's records [pe * num_workers + worker], the number of tasks that each ran,
        and the records dropped in all. Nothing without trace."""
        buffers: list[NDArray[np.void]] = []
        ran, dropped = [], 0
        space = np.zeros(_TRACE_CAPACITY, RECORD_DTYPE)
        for worker in range(self.ep_size * self.num_workers if self._traced else 0):
            size, drops = u32(), u32()
            which = u32(worker // self.num_workers), u32(worker % self.num_workers)
            self._library.call(
                "trace", self._layer, *which, c.c_void_p(space.ctypes.data), c.byref(size), c.byref(drops)
            )
            buffers.append(space[: size.value].copy())
            ran.append(size.value + drops.value)
            dropped += drops.value
        return buffers, ran, dropped

    def routing(self, pe: int, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """What the gate chose in the last launch: (num_tokens, top_k) each."""
        # the library copies as many rows as the workspace has room for
        idx = np.zeros((self.max_tokens, self._weights.model.top_k), np.int32)
        weights = np.zeros(idx.shape, np.float32)
        to = c.c_void_p(idx.ctypes.data), c.c_void_p(weights.ctypes.data)
        self._library.call("routing", self._layer, u32(pe), *to)
        # a NaN token has NaN weights and poisons its own output; a Routing holds numbers
        return idx[:num_tokens].copy(), np.nan_to_num(weights[:num_tokens])


def _native_tiling(tiling: Tiling) -> FlashmoeTiling:
    values = tiling.to_dict()
    values["granularity"] = ("tile", "token").index(tiling.granularity)
    values["down"] = ("tile", "rows").index(tiling.down)
    return FlashmoeTiling(**values)
