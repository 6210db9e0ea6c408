"""Curves over the time of one run: how busy the workers were, the memory traffic, the tasks in the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashmoe.answers import pe_speeds, queue_length, streams
from flashmoe.plots.style import (
    KIND_COLOURS,
    label_time,
    legend_outside,
    set_title,
    time_unit,
    trace_title,
)
from flashmoe.trace import KINDS, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_TIME_STEPS = 400


def plot_utilisation(trace: Trace, ax: Axes) -> Axes:
    """Draw the share of all PEs' workers that run a task, over time, stacked by kind."""
    edges_ps = _edges_ps(trace)
    capacity_ps = trace.num_pes * trace.num_workers * np.diff(edges_ps)
    shares = {}
    for kind, mine in _by_kind(trace):
        shares[kind] = 100 * trace.spread(np.where(mine, trace.duration_ps, 0), edges_ps).sum(axis=0) / capacity_ps
    _stack(trace, ax, shares, edges_ps)
    mean = 100 * trace.utilisation()
    ax.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.0f} %")
    ax.set_ylim(0, 105)
    ax.set_ylabel(f"utilisation\n[% of {trace.num_pes * trace.num_workers} workers]")
    legend_outside(ax)
    return ax


def plot_queue_length(trace: Trace, ax: Axes) -> Axes:
    """Draw how many tasks are ready (their inputs are there) and not started, over time, stacked by kind.

    The line: workers that run nothing at that moment. Where both are high, tasks and workers do not find each other.
    """
    edges_ps = _edges_ps(trace)
    no_path = np.zeros(0, np.int64)
    lengths = {
        kind: queue_length(Trace(trace.records[mine], trace.header, no_path), edges_ps).sum(axis=0)
        for kind, mine in _by_kind(trace)
    }
    _stack(trace, ax, lengths, edges_ps)
    num_workers = trace.num_pes * trace.num_workers
    busy = trace.spread(trace.duration_ps, edges_ps).sum(axis=0) / np.diff(edges_ps)
    edges = edges_ps / time_unit(trace.makespan_ps).ps
    label = f"workers that\nrun nothing,\nof {num_workers}"
    ax.stairs(num_workers - busy, edges, baseline=None, color="black", linewidth=1.2, label=label)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("tasks ready, not started\n(all PEs)")
    legend_outside(ax)
    return ax


def plot_hbm(trace: Trace, ax: Axes, *, per_pe: bool = False, ceiling_bytes_per_ns: float | None = None) -> Axes:
    """Draw HBM traffic over time, all PEs together or a line for each.

    A task's bytes are spread evenly over its stream, though its rate changes with the number of streams: the curve
    can pass the ceiling by some per cent.
    ceiling_bytes_per_ns: of one PE at nominal speed; drawn when given, a line for each speed there is with per_pe.
    """
    unit = time_unit(trace.makespan_ps)
    edges_ps = _edges_ps(trace)
    bytes_per_ns = streams(trace).spread(trace.memory_bytes, edges_ps) / (np.diff(edges_ps) / 1000)
    edges = edges_ps / unit.ps
    if per_pe:
        from matplotlib import colormaps

        colours = colormaps["viridis"](np.linspace(0, 0.9, trace.num_pes))  # kinds keep their own colours
        for pe, line in enumerate(bytes_per_ns):
            ax.stairs(line, edges, baseline=None, linewidth=1, color=colours[pe], label=f"PE {pe}")
    else:
        ax.stairs(bytes_per_ns.sum(axis=0), edges, fill=True, color="#888888", label="all kinds")
    if ceiling_bytes_per_ns is not None:
        speeds = pe_speeds(trace)
        ceilings = ceiling_bytes_per_ns * (np.unique(speeds) if per_pe else speeds.sum(keepdims=True))
        lowest, highest = f"{ceilings.min():.0f}", f"{ceilings.max():.0f}"
        values = lowest if lowest == highest else f"{lowest} to {highest}"
        for ceiling in ceilings:
            ax.axhline(ceiling, color="black", linewidth=1, linestyle="--")
        ax.lines[-1].set_label(f"ceiling {values} GB/s\n(curve: each stream\nspread evenly)")
    ax.set_ylim(bottom=0)
    whose = "each PE" if per_pe else "1 PE" if trace.num_pes == 1 else f"{trace.num_pes} PEs"
    ax.set_ylabel(f"HBM traffic\nof {whose} [GB/s]")
    label_time(ax, trace.makespan_ps, unit)
    legend_outside(ax)
    set_title(ax, trace_title(trace))
    return ax


def _by_kind(trace: Trace) -> list[tuple[str, NDArray[np.bool_]]]:
    """The kinds that occur, and which records are theirs."""
    return [(KINDS[kind], trace.records["kind"] == kind) for kind in np.unique(trace.records["kind"])]


def _stack(trace: Trace, ax: Axes, curves: dict[str, NDArray[np.float64]], edges_ps: NDArray[np.float64]) -> None:
    """Areas by kind, one on top of the other, over the time axis."""
    unit = time_unit(trace.makespan_ps)
    base = np.zeros(len(edges_ps) - 1)
    for kind, curve in curves.items():
        if curve.any():
            top = base + curve
            ax.stairs(top, edges_ps / unit.ps, baseline=base, fill=True, color=KIND_COLOURS[kind], label=kind)
            base = top
    label_time(ax, trace.makespan_ps, unit)
    set_title(ax, trace_title(trace))


def _edges_ps(trace: Trace) -> NDArray[np.float64]:
    return np.linspace(0, max(1, trace.makespan_ps), NUM_TIME_STEPS + 1)
