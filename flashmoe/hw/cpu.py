"""The CPU backend: PEs are groups of threads in this process. Same tasks, queues and exchange as on a GPU."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.hw.fault import launch_error
from flashmoe.hw.launches import (
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
from flashmoe.tasks import ORDERS, TaskTable, Tiling, native_shape
from flashmoe.trace import Trace
from flashmoe.weights import Weights

_MAX_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Trouble for a launch, to see that it is borne or told: delays, and workers that fail to do their part."""

    max_delay_us: int = 0  # random, before tasks and between a task and its signals
    absent_pe: int | None = None  # its workers never start
    dead_worker: tuple[int, int, int] | None = None  # (pe, worker, number of tasks after which it stops)


class Layer:
    """One layer, its weights and a workspace, to be launched as often as wanted. Nothing is reset in between."""

    def __init__(
        self,
        model: MoEModel,
        weights: Weights,
        *,
        ep_size: int,
        max_tokens: int,
        workers: int = 4,
        policy: str | Policy = "ticket",
        tiling: Tiling | None = None,
        domains: int = 2,
        deadline_s: float = 60.0,
        trace: bool = True,
    ) -> None:
        """max_tokens: the most tokens of one PE that the workspace has room for. trace=False records nothing.

        Raises: ValueError naming the bad argument and the accepted values.
        """
        check_range("ep_size", ep_size, 1, 64)
        check_range("max_tokens", max_tokens, 0, _native.MAX_TOKENS_PER_PE)
        check_range("workers", workers, 1, _MAX_WORKERS)
        check_range("domains", domains, 1, _MAX_WORKERS)
        if not 0 < deadline_s < 1e6:
            raise ValueError(f"deadline_s={deadline_s} (accepted: above 0 and below 1e6)")
        weights.check(model)
        self.model, self.workers, self.ep_size, self.max_tokens = model, workers, ep_size, max_tokens
        self.domains = min(domains, workers)
        self.policy = resolve(policy, tiling)
        self.weights = weights.cast(model.dtype)
        self._follows_lists = self.policy.queue == "replay" or self.policy.rank is not None
        tiling = self.policy.tiling
        shape = native_shape(model, ep_size)
        self._native = _native.CpuLayer(
            shape=shape,
            tiling=tiling.native(),
            queue=QUEUES.index("replay" if self._follows_lists else self.policy.queue),
            order=ORDERS.index(self.policy.order),
            look_ahead=self.policy.look_ahead,
            max_tokens=max_tokens,
            num_workers=workers,
            num_domains=self.domains,
            deadline_s=deadline_s,
            # room for all of a large layer's tasks on one worker; untouched pages cost nothing
            trace_capacity=1 << 20 if trace else 0,
            gate=self.weights.gate,
            gate_up=self.weights.gate_up,
            down=self.weights.down,
        )
        self._traced = trace
        self._taking_turns = threading.Lock()

    @property
    def workspace_bytes(self) -> int:
        """Workspaces and symmetric heaps of all PEs, without weights."""
        return self._native.workspace_bytes()

    @property
    def epochs(self) -> list[int]:
        """Launches that each PE has finished since the workspace was made, or reset after a failure."""
        return self._native.epochs()

    def __call__(
        self,
        x: Sequence[NDArray[Any]],
        *,
        routing: Routing | None = None,
        seed: int = 0,
        chaos: Chaos | None = None,
    ) -> RunResult:
        """Launch once. Arguments and errors as in `flashmoe.run`; seed also draws the chaos.

        Launches from several Python threads take turns: there is one workspace.
        """
        with self._taking_turns:
            return self._launch(x, routing, seed, chaos or Chaos())

    def _launch(self, x: Sequence[NDArray[Any]], routing: Routing | None, seed: int, chaos: Chaos) -> RunResult:
        if chaos.absent_pe is not None:
            check_range("absent_pe", chaos.absent_pe, 0, self.ep_size - 1)
        if chaos.dead_worker is not None:
            check_range("dead_worker[0] (PE)", chaos.dead_worker[0], 0, self.ep_size - 1)
            check_range("dead_worker[1] (worker)", chaos.dead_worker[1], 0, self.workers - 1)
        tokens = take_tokens(self.model, x, self.ep_size, self.max_tokens)
        num_tokens = [len(rows) for rows in tokens]
        schedule, digests = None, []
        if routing is not None:
            check_routing(self.model, routing, num_tokens)
        if self._follows_lists:
            expected = routing or expected_routing(self.model, self.weights.gate, tokens)
            table = TaskTable(self.model, expected, self.policy.tiling, gate=routing is None)
            schedule = to_schedule(self.policy, table, self.workers)
            digests = table.plan_digests
        outputs = [np.zeros(rows.shape, self.model.numpy_dtype) for rows in tokens]
        done = self._native.run(
            [_bits(rows) for rows in tokens],
            [_bits(rows) for rows in outputs],
            None if routing is None else [np.ascontiguousarray(idx, np.int32) for idx in routing.topk_idx],
            None if routing is None else [np.ascontiguousarray(w, np.float32) for w in routing.topk_weights],
            schedule,
            digests,
            max_delay_us=chaos.max_delay_us,
            seed=seed,
            absent_pe=chaos.absent_pe,
            dead_worker=chaos.dead_worker,
        )
        if not done:
            raise launch_error(self._native.fault(), self.workers)
        if routing is None:
            pairs = [self._native.routing(pe, count) for pe, count in enumerate(num_tokens)]
            # a NaN token has NaN weights and poisons its own output; a Routing holds numbers
            used = gate_routing(self.model, [(idx, np.nan_to_num(weights)) for idx, weights in pairs])
        else:
            used = routing
        return RunResult(outputs, self._trace(used, gate=routing is None, seed=seed), used)

    def _trace(self, routing: Routing, *, gate: bool, seed: int) -> Trace:
        buffers = self._native.traces() if self._traced else []
        more = {
            "executor": "cpu",
            "machine": "host",
            "cpu": platform.processor() or platform.machine(),
            "num_cores": os.cpu_count(),
            "num_workers": self.workers,
            "num_domains": self.domains,
            "policy": self.policy.name,
            "seed": seed,
            "clock": {"unit": "ps", "resolution_ps": 1000},
            "drops": self._native.drops() if self._traced else 0,
        }
        return launch_trace(TaskTable(self.model, routing, self.policy.tiling, gate=gate), buffers, more)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """bf16 as the 16-bit words that it is: the native module knows no numpy type of that name."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array
