"""Types of the native module, hip_src/bindings/module.cpp."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS_PER_PE: int
MAX_LOOK_AHEAD: int

def task_dtype() -> np.dtype[np.void]: ...
def device_workspace_bytes(
    *, shape: Shape, tiling: Tiling, max_tokens: int, num_workers: int, num_domains: int
) -> int: ...
def benchmark_host(seconds: float, num_threads: int) -> dict[str, float]: ...

class Shape:
    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        num_pes: int,
        norm_topk_prob: bool,
        dtype: int,
    ) -> None: ...

class Tiling:
    def __init__(
        self,
        *,
        granularity: int,
        down: int,
        gate_tokens: int,
        gate_experts: int,
        dispatch_tokens: int,
        up_rows: int,
        down_rows: int,
        block_tokens: int,
        experts_per_pick: int,
        combine_tokens: int,
    ) -> None: ...

class TaskTable:
    def __init__(self, shape: Shape, tiling: Tiling, topk_idx: list[NDArray[np.int32]], gate_inside: bool) -> None: ...
    def tasks(self) -> np.ndarray[Any, Any]: ...
    def first(self) -> NDArray[np.uint64]: ...
    def events(
        self,
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]: ...
    def waits(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]: ...
    def signals(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint64]]: ...
    def order(self, order: int) -> list[NDArray[np.uint32]]: ...
    def first_of_last(self, pe: int, order: int, num_workers: int) -> int: ...
    def wrongly_decoded(self, pe: int, order: int, stride: int) -> NDArray[np.uint32]: ...
    def plan_digests(self) -> list[int]: ...
    def local_tokens(self) -> NDArray[np.uint32]: ...

class CpuLayer:
    def __init__(
        self,
        *,
        shape: Shape,
        tiling: Tiling,
        queue: int,
        order: int,
        look_ahead: int,
        max_tokens: int,
        num_workers: int,
        num_domains: int,
        deadline_s: float,
        trace_capacity: int,
        gate: NDArray[Any] | None,
        gate_up: NDArray[Any],
        down: NDArray[Any],
    ) -> None: ...
    def run(
        self,
        x: list[NDArray[Any]],
        out: list[NDArray[Any]],
        topk_idx: list[NDArray[np.int32]] | None,
        topk_weights: list[NDArray[np.float32]] | None,
        replay: list[list[list[int]]] | None,
        digests: list[int],
        *,
        max_delay_us: int,
        seed: int,
        absent_pe: int | None,
        dead_worker: tuple[int, int, int] | None,
    ) -> bool: ...
    def fault(self) -> dict[str, Any]: ...
    def epochs(self) -> list[int]: ...
    def workspace_bytes(self) -> int: ...
    def traces(self) -> list[np.ndarray[Any, Any]]: ...
    def drops(self) -> int: ...
    def routing(self, pe: int, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...

class LayerSource:
    ids_by_rank: list[list[int]]
    ids_by_worker: list[list[list[int]]]

class RoutedLayer(LayerSource):
    def __init__(self, shape: Shape, tiling: Tiling, topk_idx: list[NDArray[np.int32]], gate_inside: bool) -> None: ...

class ListedLayer(LayerSource):
    def __init__(self, table: dict[str, Any]) -> None: ...

def priority_queue_loop(num_tasks: int, num_workers: int) -> float: ...
def run_layers(
    parameters: dict[str, Any],
    layers: list[LayerSource],
    queue: int,
    order: int | None,
    look_ahead: int,
    sorts_experts: bool,
    gap_ps: int | None,
    keep_records: bool,
    with_bounds: bool,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]: ...
