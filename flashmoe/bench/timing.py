"""CUDA graphs of layers: captured, checked, and timed by replays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from flashmoe.bench.inputs import LayerInput, relative_error

WARM_UP = 3  # replays before the timed ones
HOLD_CYCLES = 100_000  # 50 us
ENOUGH_S = 2.0  # of replays; what is slow gets fewer of them
FEWEST = 3

Layer = Callable[[], Any]  # launches one layer on the current stream; its output, if it has one


@dataclass(frozen=True)
class Times:
    """Microseconds a layer, over the timed replays."""

    median_us: float
    p10_us: float
    p90_us: float
    replays: int


@dataclass(frozen=True)
class Checked(Times):
    """error: the largest relative error of a layer; same_bits: of all outputs that were looked at."""

    error: float
    same_bits: bool


class Graph:
    """Layers back to back in one CUDA graph, each with an output of its own."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.num_layers = len(layers)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = [layer() for layer in layers]

    def replay(self) -> None:
        self._graph.replay()


def run_once(layers: Sequence[Layer]) -> None:
    """Outside of a graph: what is compiled, tuned or allocated at the first call must not be captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers:
            layer()
    torch.cuda.synchronize()


def time_graphs(graphs: Sequence[Graph], repeats: int) -> Times:
    """Replay one graph after the other, `repeats` rounds or what ENOUGH_S allows, between two events each.

    The device is kept busy until the host has enqueued all three, so how long the host takes is not in the time.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    us: list[float] = []
    started_s = time.perf_counter()
    for round_ in range(-WARM_UP, repeats):
        if time.perf_counter() - started_s > ENOUGH_S:
            if round_ >= FEWEST:
                break
            if round_ < 0:
                continue
        for graph in graphs:
            torch.cuda._sleep(HOLD_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_ >= 0:
                us.append(begin.elapsed_time(end) * 1e3 / graph.num_layers)
    p10, median, p90 = np.percentile(us, (10, 50, 90)).tolist()
    return Times(median, p10, p90, len(us))


def check_and_time(graphs: Sequence[Graph], inputs: Sequence[LayerInput], repeats: int) -> Checked:
    """Times, and whether the outputs are right before and after them. inputs: of all the graphs' layers, in order.

    Outputs hold NaN before a replay whose result is looked at, so nothing old can pass for a result.
    """
    outputs = [out for graph in graphs for out in graph.outputs]
    errors, seen = [], []

    def look() -> None:
        torch.cuda.synchronize()
        errors.append(relative_error(outputs, inputs))
        seen.append([out.clone() for out in outputs])

    def replay_and_look() -> None:
        for out in outputs:
            out.fill_(float("nan"))
        for graph in graphs:
            graph.replay()
        look()

    replay_and_look()
    times = time_graphs(graphs, repeats)
    look()  # the last of the timed replays
    replay_and_look()
    same = all(_same_bits(seen[0], other) for other in seen[1:])
    return Checked(**asdict(times), error=float(np.max(errors)), same_bits=same)


def _same_bits(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(left, right, strict=True))
