"""What the machine allows for the work per byte of a run, and what the run achieved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.model import NUMPY_DTYPES
from flashmoe.plots.style import (
    KIND_COLOURS,
    SERIES_COLOURS,
    SERIES_MARKERS,
    common_title,
    facts_of,
    legend_outside,
    set_title,
    trace_title,
)
from flashmoe.trace import KINDS, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flashmoe.machine import Machine


class Roofs(NamedTuple):
    """What all PEs of a run can do together."""

    bytes_per_ns: float
    flops_per_ns: float

    @classmethod
    def of(cls, trace: Trace, machine: Machine | None = None) -> Roofs:
        """machine: by default the one of the trace's header. Raises: ValueError when there is neither."""
        parameters = trace.header.get("machine_parameters") if machine is None else machine.to_dict()
        if not parameters:
            raise ValueError("the trace does not say on which machine it was made (give machine=...)")
        num_workers = trace.num_pes * trace.num_workers
        num_memories = trace.num_pes
        if parameters["num_cores"] > 0:  # a host: its PEs share cores and memory
            num_workers, num_memories = min(num_workers, parameters["num_cores"]), 1
        return cls(
            min(num_memories * parameters["hbm_bytes_per_ns"], num_workers * parameters["cu_bytes_per_ns"]),
            num_workers * parameters["cu_flops_per_ns"],
        )

    def at(self, flops_per_byte: Any) -> Any:
        """The most flops per ns at an arithmetic intensity."""
        return np.minimum(flops_per_byte * self.bytes_per_ns, self.flops_per_ns)


class Point(NamedTuple):
    flops_per_byte: float
    flops_per_ns: float


def plot_roofline(traces: Trace | Mapping[str, Trace], ax: Axes, *, machine: Machine | None = None) -> Axes:
    """Draw a run, or several by name, under the roofs of the machine: memory bandwidth and arithmetic.

    A run's intensity is its work over the bytes that its tasks streamed, its rate the work over the makespan. Of one
    run each kind of task has a point, too: over the time in which any worker held such a task. Work that is padding
    does not count. A point is below the roof by what was lost.
    machine: by default the one that the header names. Raises: ValueError without a machine, or when the runs differ
    in it.
    """
    runs = {"the run": traces} if isinstance(traces, Trace) else dict(traces)
    if not runs:
        raise ValueError("no traces (must be a trace, or at least one by name)")
    roofs = {Roofs.of(trace, machine) for trace in runs.values()}
    if len(roofs) > 1:
        raise ValueError(f"{len(roofs)} different machines or sizes in one roofline (must be the same for all runs)")
    [roof] = roofs
    points = []
    style: dict[str, Any]
    if isinstance(traces, Trace):
        for index, kind in enumerate(KINDS):
            if point := _point(traces, traces.records["kind"] == index):
                points.append(point)  # a ring: kinds of equal intensity may lie on the run and on each other
                style = {"color": KIND_COLOURS[kind], "marker": "o", "markersize": 11, "markerfacecolor": "none"}
                ax.plot(*_drawn(point), linestyle="", markeredgewidth=2.2, label=f"{kind} tasks", **style)
    for number, (name, trace) in enumerate(runs.items()):
        if point := _point(trace):
            points.append(point)
            style = {"color": SERIES_COLOURS[number % 8], "marker": SERIES_MARKERS[number % 8], "markersize": 8}
            if isinstance(traces, Trace):
                style = {"color": "black", "marker": "*", "markersize": 9}
            share = point.flops_per_ns / roof.at(point.flops_per_byte)
            x, y = _drawn(point)
            ax.plot([x, x], [y, roof.at(x) / 1000], color=style["color"], linewidth=1, linestyle=":")
            ax.plot(x, y, linestyle="", label=f"{name}: {100 * share:.0f} % of its roof", **style)
    _draw_roofs(ax, roof, points)
    first = next(iter(runs.values()))
    whose = "1 PE" if first.num_pes == 1 else f"{first.num_pes} PEs together"
    ax.set_xlabel("arithmetic intensity [flop per byte from memory]")
    ax.set_ylabel(f"rate of {whose} [TFLOP/s]")
    legend_outside(ax)
    one = isinstance(traces, Trace)
    set_title(ax, trace_title(first) if one else common_title([facts_of(trace) for trace in runs.values()]))
    return ax


def _drawn(point: Point) -> tuple[float, float]:
    return point.flops_per_byte, point.flops_per_ns / 1000


def _draw_roofs(ax: Axes, roof: Roofs, points: list[Point]) -> None:
    ridge = roof.flops_per_ns / roof.bytes_per_ns
    at = [point.flops_per_byte for point in points]
    left, right = min([ridge / 10, *at]) / 2, max([ridge, *at]) * 4
    x = np.array([left, ridge, right])
    ax.plot(x, roof.at(x) / 1000, color="black", linewidth=2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, right)
    lowest = min([roof.at(left), *(point.flops_per_ns for point in points)])
    ax.set_ylim(lowest / 1000 / 2, roof.flops_per_ns / 1000 * 3)
    ax.grid(which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    middle = np.sqrt(left * ridge)
    ax.annotate(
        f"memory, {roof.bytes_per_ns:,.0f} GB/s ",
        (middle, roof.at(middle) / 1000),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
    )
    ax.annotate(
        f"arithmetic, {roof.flops_per_ns / 1000:,.4g} TFLOP/s",
        (right, roof.flops_per_ns / 1000),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
    )


def _point(trace: Trace, mine: NDArray[np.bool_] | None = None) -> Point | None:
    """Where the run, or some of its tasks, lies; None without work, bytes or time."""
    chosen = slice(None) if mine is None else mine
    num_bytes, flops = float(trace.memory_bytes[chosen].sum()), float(flops_of(trace)[chosen].sum())
    time_ps = trace.makespan_ps if mine is None else _held_ps(trace.records[mine])
    if not (num_bytes > 0 and flops > 0 and time_ps > 0):
        return None
    return Point(flops / num_bytes, flops / (time_ps / 1000))


def flops_of(trace: Trace) -> NDArray[np.float64]:
    """(num_tasks,) useful work: each weight that a task streams is multiplied with each of its tokens [flop]."""
    model = trace.header.get("model")
    dtype = model.get("dtype", "bf16") if isinstance(model, dict) else "bf16"
    weights = trace.records["hbm_bytes"] / NUMPY_DTYPES[dtype].itemsize
    work: NDArray[np.float64] = 2.0 * trace.records["num_tokens"] * weights
    return work


def _held_ps(records: NDArray[np.void]) -> int:
    """How long at least one worker of any PE held one of these tasks: their bytes and work fall into this time."""
    order = np.argsort(records["ticket_ps"], kind="stable")
    begin_ps, end_ps = records["ticket_ps"][order], np.maximum.accumulate(records["end_ps"][order])
    covered_ps = end_ps[:-1].clip(min=begin_ps[1:]) - begin_ps[1:] if len(order) > 1 else np.zeros(0, np.int64)
    return int((end_ps - begin_ps).sum() - covered_ps.sum()) if len(order) else 0
