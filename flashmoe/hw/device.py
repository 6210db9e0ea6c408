"""The GPU backends: PEs share one card, a library built for the layer's shape does the work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw.driver import driver_version
from flashmoe.hw.launches import (
    RunResult,
    check_range,
    check_routing,
    expected_routing,
    gate_routing,
    launch_trace,
    take_tokens,
)
from flashmoe.hw.library import MAX_PES, MAX_TOKENS, DeviceBuffer, download
from flashmoe.hw.native_layer import KERNELS, NativeLayer
from flashmoe.hw.packed import PackedWeights
from flashmoe.hw.tensors import current_stream, is_tensor, pointer_of
from flashmoe.hw.tuned import tuned_ranges
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, resolve
from flashmoe.routing import Routing
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import Trace
from flashmoe.weights import Weights

_CLOCK_STEP_PS = {"cuda": 32_000, "hip": 10_000}  # in which the device's clock advances: platform.hpp


class DeviceLayer:
    """One layer, its weights and a workspace on the card, to be launched as often as wanted.

    Launches of one layer share its workspace: they must follow each other, on one stream or ordered by events. All
    workers of a launch must be on the card at once, so launches of several layers may overlap only where the workers
    of all of them fit.
    """

    def __init__(
        self,
        model: MoEModel,
        weights: Weights | PackedWeights,
        *,
        ep_size: int,
        max_tokens: int,
        workers: int = 0,
        policy: str | Policy = "tuned",
        tiling: Tiling | None = None,
        domains: int = 2,
        deadline_s: float = 60.0,
        trace: bool = True,
        backend: str = "cuda",
        kernel: str = "best",
    ) -> None:
        """max_tokens: of one PE, 0..1024. workers: per PE; 0: all of the card. trace=False records nothing.

        policy: "tuned" takes what is best for the tokens of each launch; there is a workspace for each such choice.
        backend: cuda or hip. kernel: best (the fastest that can), general, or pipeline.
        Raises: ValueError naming what the kernels cannot do; BuildError without a compiler; DeviceError without a
        card that the kernels are for, or when its memory does not suffice.
        """
        check_range("ep_size", ep_size, 1, MAX_PES)
        check_range("max_tokens", max_tokens, 0, MAX_TOKENS)
        check_range("workers", workers, 0, 1 << 16)
        check_range("domains", domains, 1, 256)
        if not 0 < deadline_s < 1e6:
            raise ValueError(f"deadline_s={deadline_s} (accepted: above 0 and below 1e6)")
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r} (accepted: {', '.join(KERNELS)})")
        model.experts_per_pe(ep_size)
        if policy == "tuned":
            policies = [(most, best.with_tiling(tiling)) for most, best in tuned_ranges(max_tokens)]
        else:
            policies = [(max_tokens, resolve(policy, tiling))]
        self.model, self.ep_size, self.max_tokens, self.backend = model, ep_size, max_tokens, backend
        self.weights = weights if isinstance(weights, PackedWeights) else PackedWeights(model, weights, backend=backend)
        if (self.weights.model, self.weights.library.backend) != (model, backend):
            raise ValueError(f"weights packed for {self.weights.model} and {self.weights.library.backend!r}")
        self._library = self.weights.library
        self._card = self._library.card()
        if workers * ep_size > self._card.num_cus:
            raise ValueError(
                f"workers={workers} on {ep_size} PEs ({self._card.name.decode()} has {self._card.num_cus} "
                f"CUs, and all workers must run at once: accepted: 0..{self._card.num_cus // ep_size})"
            )
        self._natives = [
            NativeLayer(
                self.weights,
                chosen,
                ep_size=ep_size,
                max_tokens=most,
                workers=workers,
                domains=domains,
                deadline_s=deadline_s,
                trace=trace,
                kernel=kernel,
            )
            for most, chosen in policies
        ]
        self.weights.pack()
        self.workers = self._natives[-1].num_workers
        self.domains = min(domains, self.workers)
        self._last: tuple[NativeLayer, list[int], bool] | None = None  # layer, tokens per PE, gate inside
        self._taking_turns = threading.Lock()

    @property
    def workspace_bytes(self) -> int:
        """Workspaces and symmetric heaps of all PEs, and room for traces; without weights."""
        return sum(native.workspace_bytes for native in self._natives)

    def kernel_name(self, num_tokens: int) -> str:
        """Of the kernel that a launch of so many tokens runs on. Raises: ValueError when there is no room for them."""
        return self._native_for([num_tokens]).kernel_name

    def launch(
        self,
        x: Sequence[int],
        out: Sequence[int],
        num_tokens: Sequence[int],
        *,
        topk_idx: Sequence[int] | None = None,
        topk_weights: Sequence[int] | None = None,
        stream: int = 0,
    ) -> None:
        """Launch once on a stream, asynchronously: nothing is allocated or waited for, and a graph can capture it.

        All lists have an element a PE, most of them device pointers (0 where a PE has no tokens):
        x, out: (num_tokens, d_model) bfloat16, aligned to 16 bytes, not overlapping.
        topk_idx, topk_weights: (num_tokens, top_k) int32 and float32; -1 drops a slot. None: the gate decides.
        stream: a cudaStream_t or hipStream_t.
        Raises: ValueError naming what does not fit. A launch that cannot go on writes no output, nor do those after
        it: `check` tells.
        """
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("one of topk_idx and topk_weights (accepted: both or neither)")
        for values in (x, out, num_tokens, topk_idx, topk_weights):
            if values is not None and len(values) != self.ep_size:
                raise ValueError(f"{len(values)} elements (must be one per PE, {self.ep_size})")
        if any(pointer % 16 for pointer in (*x, *out)):
            raise ValueError("x or out is not aligned to 16 bytes")
        native = self._native_for(num_tokens)
        native.launch(x, out, num_tokens, topk_idx, topk_weights, stream)
        self._last = native, list(num_tokens), topk_idx is None

    def follow(self, routing: Routing, *, gate: bool) -> None:
        """Get ready for launches with this routing under a policy that follows lists: a replay, or one in Python.

        gate: whether the gate will be inside. Not asynchronous; calls of the layer do it by themselves.
        """
        self._native_for(routing.num_tokens).follow(routing, gate=gate)

    def check(self) -> None:
        """Wait for the device. Raises: LaunchError when a launch could not go on; the next one can again."""
        for native in self._natives:
            native.check()

    def last_run(self, *, seed: int = 0) -> tuple[Trace, Routing]:
        """Wait for the device; trace and routing of the last launch, with no records when it had no tokens.

        Raises: LaunchError as `check`; ValueError when nothing was launched.
        """
        if self._last is None:
            raise ValueError("nothing was launched (accepted: after a launch)")
        self.check()
        native, counts, gate = self._last
        routing = self._routing(native, counts)
        return self._trace(native, routing, gate=gate, seed=seed), routing

    def __call__(self, x: Sequence[Any], *, routing: Routing | None = None, seed: int = 0) -> RunResult:
        """Launch once. Arguments and errors as in `flashmoe.run`; launches from several threads take turns."""
        with self._taking_turns:
            return self._run(x, routing, seed)

    def _run(self, x: Sequence[Any], routing: Routing | None, seed: int) -> RunResult:
        inputs = _Tensors(self, x) if any(map(is_tensor, x)) else _Arrays(self, x)
        if routing is not None:
            check_routing(self.model, routing, inputs.counts)
        native = self._native_for(inputs.counts)
        if native.follows_lists:
            expected = routing or expected_routing(self.model, self.weights.gate(), inputs.arrays())
            native.follow(expected, gate=routing is None)
        given: list[list[DeviceBuffer]] = []
        if routing is not None:
            for values, dtype in ((routing.topk_idx, np.int32), (routing.topk_weights, np.float32)):
                given.append([DeviceBuffer.of(self._library, array.astype(dtype)) for array in values])
        topk_idx, topk_weights = ([b.pointer for b in buffers] for buffers in given) if given else (None, None)
        self.launch(
            inputs.x, inputs.out, inputs.counts, topk_idx=topk_idx, topk_weights=topk_weights, stream=inputs.stream
        )
        self.check()
        used = routing or self._routing(native, inputs.counts)
        return RunResult(inputs.outputs(), self._trace(native, used, gate=routing is None, seed=seed), used)

    def _native_for(self, num_tokens: Sequence[int]) -> NativeLayer:
        most = max(num_tokens)
        for native in self._natives:
            if most <= native.max_tokens:
                return native
        raise ValueError(f"{most} tokens (the layer has room for max_tokens={self.max_tokens})")

    def _routing(self, native: NativeLayer, counts: list[int]) -> Routing:
        return gate_routing(self.model, [native.routing(pe, count) for pe, count in enumerate(counts)])

    def _trace(self, native: NativeLayer, routing: Routing, *, gate: bool, seed: int) -> Trace:
        # without any tokens a kernel need not run at all, and the records are those of the launch before
        buffers, _, drops = native.records() if max(routing.num_tokens) else ([], [], 0)
        header = {
            "executor": self.backend,
            "machine": self._card.arch.decode(),
            "device": self._card.name.decode(),
            "driver": driver_version(self.backend),
            "kernel": native.kernel_name,
            "library": self._library.path.name,
            "num_workers": self.workers,
            "num_domains": self.domains,
            "policy": native.policy.name,
            "queue": native.policy.queue,
            "order": native.policy.order,
            "seed": seed,
            "clock": {"unit": "ps", "resolution_ps": _CLOCK_STEP_PS[self.backend]},
            "drops": drops,
        }
        return launch_trace(TaskTable(self.model, routing, native.policy.tiling, gate=gate), buffers, header)


class _Arrays:
    """Tokens in numpy arrays: copied to the card, and the outputs back."""

    stream = 0

    def __init__(self, layer: DeviceLayer, x: Sequence[NDArray[Any]]) -> None:
        self._library, self._tokens = layer._library, take_tokens(layer.model, x, layer.ep_size, layer.max_tokens)
        self.counts = [len(rows) for rows in self._tokens]
        self._x = [DeviceBuffer.of(self._library, rows) for rows in self._tokens]
        self._out = [DeviceBuffer(self._library, rows.nbytes) for rows in self._tokens]
        self.x, self.out = ([buffer.pointer for buffer in buffers] for buffers in (self._x, self._out))

    def arrays(self) -> list[NDArray[Any]]:
        return self._tokens

    def outputs(self) -> list[NDArray[Any]]:
        pairs = zip(self.out, self._tokens, strict=True)
        return [download(self._library, pointer, rows.shape, rows.dtype) for pointer, rows in pairs]


class _Tensors:
    """Tokens in tensors on the card: used where they are, and so are the outputs."""

    def __init__(self, layer: DeviceLayer, x: Sequence[Any]) -> None:
        if len(x) != layer.ep_size:
            raise ValueError(f"x: {len(x)} tensors (must be one per PE, {layer.ep_size})")
        if not all(map(is_tensor, x)):
            raise ValueError("x: tensors and arrays (accepted: tensors on the card for all PEs, or arrays)")
        self._layer, self._tensors = layer, list(x)
        self.x = [pointer_of(f"x[{pe}]", rows, ("num_tokens", layer.model.d_model)) for pe, rows in enumerate(x)]
        self._out = [rows.new_empty(rows.shape) for rows in x]
        self.out = [int(rows.data_ptr()) for rows in self._out]
        self.counts = [int(rows.shape[0]) for rows in x]
        self.stream = current_stream(x[0])

    def arrays(self) -> list[NDArray[Any]]:
        dtype = self._layer.model.numpy_dtype
        self._layer._library.call("synchronize")  # the tensors may still be in the making on a stream of torch's
        pairs = zip(self.x, self._tensors, strict=True)
        return [download(self._layer._library, pointer, tuple(rows.shape), dtype) for pointer, rows in pairs]

    def outputs(self) -> list[Any]:
        return self._out
