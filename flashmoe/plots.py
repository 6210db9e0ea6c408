"""Figures of traces. plot_x draws on the axes it is given and returns them; figure_x makes a figure to save.

No pyplot and no display: a figure is a matplotlib.figure.Figure that draws itself with Agg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.trace import KINDS, Trace

if TYPE_CHECKING:  # matplotlib is imported where it is used: reading a trace must not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flashmoe.compare import Comparison

__all__ = [
    "KIND_COLOURS",
    "figure_mirrored",
    "figure_overview",
    "figure_timeline",
    "plot_comparison",
    "plot_hbm",
    "plot_mirrored",
    "plot_timeline",
    "plot_utilisation",
]

# Source: Okabe and Ito (2008), told apart with any colour vision; without their yellow, lost on white.
# `expert` is never seen beside `up` and `down`, whose work it does.
KIND_COLOURS = {
    "gate": "#CC79A7",
    "route": "#D55E00",
    "dispatch": "#56B4E9",
    "up": "#0072B2",
    "down": "#E69F00",
    "combine": "#009E73",
    "expert": "#332288",
}
WAIT_COLOUR = "#D9D9D9"
PATH_COLOUR = "#000000"

NUM_TIME_STEPS = 400  # of a curve over time
MAX_SPACED_ROWS = 200  # with more rows than this, a gap between two is thinner than a pixel
MAX_WORKER_LABELS = 40  # with more than this, only XCDs are named
MAX_DOMAIN_LABELS = 80  # and with more of those, only PEs


def plot_timeline(trace: Trace, ax: Axes, *, critical_path: bool = True) -> Axes:
    """Draw every task as a bar over time: a row a worker, grouped by PE and XCD, PE 0 on top.

    Light grey is a worker that holds a task and waits for its inputs; white is a worker without a task.
    """
    rows = _Rows.of(trace)
    unit = _time_unit(trace.makespan_ps)
    _draw_tasks(trace, ax, rows, unit, critical_path)
    _label_rows(ax, [(trace, rows)])
    ax.set_ylabel(f"{_workers_in_words(trace)}, a row each")
    ax.set_ylim(rows.num_rows, 0)
    _label_time(ax, trace.makespan_ps, unit)
    _legend(ax, [trace], critical_path)
    _set_title(ax, _title(trace))
    return ax


def plot_mirrored(simulated: Trace, measured: Trace, ax: Axes, *, critical_path: bool = True) -> Axes:
    """Draw two timelines on one time axis: the first above the middle line, the second mirrored below it.

    Both start at the middle with worker 0 of PE 0, so that a task has its counterpart at the same distance.
    """
    makespan_ps = max(simulated.makespan_ps, measured.makespan_ps)
    unit = _time_unit(makespan_ps)
    halves = [(simulated, _Rows.of(simulated, 1)), (measured, _Rows.of(measured, -1))]
    for trace, rows in halves:
        _draw_tasks(trace, ax, rows, unit, critical_path)
        end = trace.makespan_ps / unit.ps
        ax.plot([end, end], [0, rows.y(rows.num_rows)], color="black", linewidth=1.2, linestyle=":")
    ax.axhline(0, color="black", linewidth=2.5, zorder=3)
    _label_rows(ax, halves)
    ax.set_ylabel(f"{_how(measured)}, below   |   {_how(simulated)}, above")
    ax.set_ylim(-1.0, 1.0)
    _label_time(ax, makespan_ps, unit)
    _legend(ax, [simulated, measured], critical_path, makespan=True)
    _set_title(ax, f"above: {_title(simulated)}\nbelow: {_title(measured)}")
    return ax


def plot_utilisation(trace: Trace, ax: Axes) -> Axes:
    """Draw the share of all PEs' workers that run a task, over time, stacked by kind."""
    unit = _time_unit(trace.makespan_ps)
    edges_ps = _edges_ps(trace)
    capacity_ps = trace.num_pes * trace.num_workers * np.diff(edges_ps)
    base = np.zeros(len(edges_ps) - 1)
    for index, kind in enumerate(KINDS):
        busy_ps = trace.spread(np.where(trace.records["kind"] == index, trace.duration_ps, 0), edges_ps)
        if busy_ps.any():
            top = base + 100 * busy_ps.sum(axis=0) / capacity_ps
            ax.stairs(top, edges_ps / unit.ps, baseline=base, fill=True, color=KIND_COLOURS[kind], label=kind)
            base = top
    mean = 100 * trace.utilisation()
    ax.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.0f} %")
    ax.set_ylim(0, 105)
    ax.set_ylabel(f"utilisation\n[% of {trace.num_pes * trace.num_workers} workers]")
    _label_time(ax, trace.makespan_ps, unit)
    _legend_outside(ax)
    _set_title(ax, _title(trace))
    return ax


def plot_hbm(trace: Trace, ax: Axes, *, per_pe: bool = False, ceiling_bytes_per_ns: float | None = None) -> Axes:
    """Draw HBM traffic over time, all PEs together or a line for each.

    A task's bytes are spread evenly over its execution; those that it fetched while it waited count there,
    so that short peaks can pass the ceiling.
    ceiling_bytes_per_ns: of one PE; drawn as a line when given.
    """
    unit = _time_unit(trace.makespan_ps)
    edges_ps = _edges_ps(trace)
    bytes_per_ns = trace.spread(trace.records["hbm_bytes"], edges_ps) / (np.diff(edges_ps) / 1000)
    if per_pe:
        from matplotlib import colormaps

        colours = colormaps["viridis"](np.linspace(0, 0.9, trace.num_pes))  # kinds keep their own colours
        for pe, line in enumerate(bytes_per_ns):
            edges = edges_ps / unit.ps
            ax.stairs(line, edges, baseline=None, linewidth=1, color=colours[pe], label=f"PE {pe}")
    else:
        total = bytes_per_ns.sum(axis=0)
        ax.stairs(total, edges_ps / unit.ps, fill=True, color="#888888", label="all kinds")
    if ceiling_bytes_per_ns is not None:
        ceiling = ceiling_bytes_per_ns * (1 if per_pe else trace.num_pes)
        ax.axhline(ceiling, color="black", linewidth=1, linestyle="--", label=f"ceiling {ceiling:.0f} GB/s")
    ax.set_ylim(bottom=0)
    whose = "each PE" if per_pe else "1 PE" if trace.num_pes == 1 else f"{trace.num_pes} PEs"
    ax.set_ylabel(f"HBM traffic\nof {whose} [GB/s]")
    _label_time(ax, trace.makespan_ps, unit)
    _legend_outside(ax)
    _set_title(ax, _title(trace))
    return ax


def plot_comparison(comparison: Comparison, ax: Axes) -> Axes:
    """Draw each task's duration on the left against the right, by kind, on logarithmic axes.

    On the diagonal the two agree; a kind's spread across it is the spread of its tasks. A task that takes no
    time on one of the sides has no place here.
    """
    left, right = comparison.matched_left, comparison.matched_right
    left_us, right_us = ((side["end_ps"] - side["start_ps"]) / 1e6 for side in (left, right))
    drawn = (left_us > 0) & (right_us > 0) & (left["kind"] == right["kind"])
    for index, kind in enumerate(KINDS):
        mine = drawn & (left["kind"] == index)
        if mine.any():
            bias = comparison.by_kind[kind]["bias_pct"]
            ax.scatter(
                right_us[mine],
                left_us[mine],
                s=14,
                alpha=0.6,
                color=KIND_COLOURS[kind],
                linewidths=0,
                label=f"{kind}, {np.count_nonzero(mine)} tasks, bias {bias:+.0f} %",
            )
    ax.axline((1, 1), (10, 10), color="black", linewidth=1, label="equal")
    for factor in (0.5, 2):
        ax.axline((1, factor), (10, 10 * factor), color="black", linewidth=0.7, linestyle=":")
    ax.plot([], [], color="black", linewidth=0.7, linestyle=":", label="off by a factor of 2")
    ax.set_xscale("log")
    ax.set_yscale("log")
    if drawn.any():
        both = np.concatenate((left_us[drawn], right_us[drawn]))
        limits = (float(both.min()) / 1.5, float(both.max()) * 1.5)
        ax.set_xlim(limits)
        ax.set_ylim(limits)
    ax.set_aspect("equal")
    ax.set_xlabel(f"{_side(comparison.right_name)} duration of a task [µs]")
    ax.set_ylabel(f"{_side(comparison.left_name)} duration of a task [µs]")
    _legend_outside(ax)
    _set_title(ax, f"y: {comparison.left_name}\nx: {comparison.right_name}")
    return ax


def figure_timeline(trace: Trace) -> Figure:
    """plot_timeline as a figure."""
    figure = _figure(12, _timeline_inches(trace) + 1.2)
    plot_timeline(trace, figure.subplots())
    return figure


def figure_mirrored(simulated: Trace, measured: Trace) -> Figure:
    """plot_mirrored as a figure."""
    figure = _figure(12, 1.4 * max(_timeline_inches(simulated), _timeline_inches(measured)) + 1.4)
    plot_mirrored(simulated, measured, figure.subplots())
    return figure


def figure_overview(trace: Trace, *, ceiling_bytes_per_ns: float | None = None) -> Figure:
    """Timeline, utilisation and HBM traffic on one time axis. ceiling_bytes_per_ns: as plot_hbm."""
    height = _timeline_inches(trace)
    figure = _figure(12, height + 4.6)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[height, 1.6, 1.6])
    plot_timeline(trace, axes[0])
    plot_utilisation(trace, axes[1])
    plot_hbm(trace, axes[2], ceiling_bytes_per_ns=ceiling_bytes_per_ns)
    for ax in axes[:2]:
        ax.set_xlabel("")
    for ax in axes[1:]:
        _set_title(ax, "")  # the timeline's stands for all three, and so do its colours
    handles, _ = axes[1].get_legend_handles_labels()
    _legend_outside(axes[1], handles[-1:])
    return figure


@dataclass(frozen=True)
class _Unit:
    ps: float
    name: str


def _time_unit(makespan_ps: int) -> _Unit:
    if makespan_ps < 20_000_000_000:
        return _Unit(1e6, "µs")
    return _Unit(1e9, "ms") if makespan_ps < 20_000_000_000_000 else _Unit(1e12, "s")


def _time_in_words(time_ps: int) -> str:
    unit = _time_unit(time_ps)
    value = time_ps / unit.ps
    return f"{value:.0f} {unit.name}" if value >= 1000 else f"{value:.4g} {unit.name}"


@dataclass(frozen=True, eq=False)
class _Rows:
    """Where each worker's row lies: rows are counted from 0 by (pe, domain, worker), and y = row * step."""

    num_rows: int
    step: float
    of_worker: NDArray[np.int64]  # (num_pes, num_workers) the worker's row
    of_task: NDArray[np.int64]  # (num_tasks,) its worker's row
    pe_starts: list[int]  # first row of each PE
    domain_starts: list[tuple[int, int]]  # first row of each domain of each PE, and which domain

    @classmethod
    def of(cls, trace: Trace, sign: int = 0) -> _Rows:
        """sign: 0 for one unit of y a row, +1 or -1 for all rows within 0..1 or 0..-1."""
        num_pes, num_workers = trace.num_pes, trace.num_workers
        domains = trace.worker_domains()
        of_worker = np.empty((num_pes, num_workers), np.int64)
        domain_starts = []
        for pe in range(num_pes):
            order = np.argsort(domains[pe], kind="stable")
            of_worker[pe, order] = pe * num_workers + np.arange(num_workers)
            values, firsts = np.unique(domains[pe, order], return_index=True)
            domain_starts += [(pe * num_workers + int(f), int(d)) for f, d in zip(firsts, values, strict=True)]
        num_rows = num_pes * num_workers
        return cls(
            num_rows=num_rows,
            step=sign / num_rows if sign else 1.0,
            of_worker=of_worker,
            of_task=of_worker[trace.records["pe"], trace.records["worker"]],
            pe_starts=[pe * num_workers for pe in range(num_pes)],
            domain_starts=domain_starts,
        )

    def y(self, row: Any) -> Any:
        return row * self.step


def _draw_tasks(trace: Trace, ax: Axes, rows: _Rows, unit: _Unit, critical_path: bool) -> None:
    from matplotlib.collections import PolyCollection

    records = trace.records
    start, end, idle_since = (
        times / unit.ps for times in (records["start_ps"], records["end_ps"], trace.idle_since_ps)
    )
    spaced = rows.num_rows <= MAX_SPACED_ROWS
    margin = 0.12 if spaced else 0.0
    top, bottom = rows.y(rows.of_task + margin), rows.y(rows.of_task + 1 - margin)
    # a seam between tasks of one kind, but not where it would cover a short task
    seam = np.where(spaced & (end - start > trace.makespan_ps / unit.ps / 200), 0.5, 0.0)

    def bars(left: NDArray[Any], right: NDArray[Any], which: NDArray[np.bool_], **style: Any) -> None:
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        vertices: Any = np.stack([np.stack(corner, axis=-1)[which] for corner in corners], axis=1)
        ax.add_collection(PolyCollection(vertices, rasterized=True, **style), autolim=False)

    # one collection for each colour: an artist for each task would take a minute for 10^5 of them
    bars(idle_since, start, idle_since < start, facecolors=WAIT_COLOUR, linewidths=0, zorder=1)
    for index, kind in enumerate(KINDS):
        mine = records["kind"] == index
        if mine.any():
            style = {"facecolors": KIND_COLOURS[kind], "edgecolors": "white", "linewidths": seam[mine]}
            bars(start, end, mine, zorder=2, **style)
    for row, _ in rows.domain_starts:
        ax.axhline(rows.y(row), color="black", linewidth=0.3, alpha=0.4, zorder=3)
    for row in rows.pe_starts[1:]:
        ax.axhline(rows.y(row), color="black", linewidth=1.0, zorder=3)
    if critical_path:
        _draw_path(trace, ax, rows, start, end)


def _draw_path(trace: Trace, ax: Axes, rows: _Rows, start: NDArray[Any], end: NDArray[Any]) -> None:
    """The critical path: its tasks as thick lines, the steps from one to the next as thin ones."""
    from matplotlib.collections import LineCollection

    path = trace.critical_path
    height = rows.y(rows.of_task[path] + 0.5)
    begins, ends = np.stack((start[path], height), axis=-1), np.stack((end[path], height), axis=-1)
    tasks: Any = np.stack((begins, ends), axis=1)
    steps: Any = np.stack((ends[:-1], begins[1:]), axis=1)
    for lines, colour, width in ((tasks, "white", 3.2), (steps, PATH_COLOUR, 0.7), (tasks, PATH_COLOUR, 1.8)):
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=4), autolim=False)


def _label_rows(ax: Axes, parts: list[tuple[Trace, _Rows]]) -> None:
    """Name PEs, and workers or XCDs where there is room for them."""
    major: list[tuple[float, str]] = []
    workers: list[tuple[float, str]] = []
    domains: list[tuple[float, str]] = []
    for trace, rows in parts:
        for pe, start in enumerate(rows.pe_starts):
            major.append((rows.y(start + trace.num_workers / 2), f"PE {pe}"))
        domain_of = trace.worker_domains()
        several = trace.num_domains > 1
        for (pe, worker), row in np.ndenumerate(rows.of_worker):
            xcd = f"XCD {domain_of[pe, worker]}, " if several else ""
            workers.append((rows.y(row + 0.5), f"{xcd}worker {worker}"))
        ends = [start for start, _ in rows.domain_starts[1:]] + [rows.num_rows]
        for (start, domain), end in zip(rows.domain_starts, ends, strict=True):
            domains += [(rows.y((start + end) / 2), f"XCD {domain}")] * several
    minor = workers if len(workers) <= MAX_WORKER_LABELS else domains if len(domains) <= MAX_DOMAIN_LABELS else []
    ax.set_yticks([y for y, _ in major], [label for _, label in major])
    ax.set_yticks([y for y, _ in minor], [label for _, label in minor], minor=True)
    longest = max((len(label) for _, label in minor), default=0)
    ax.tick_params(axis="y", which="major", length=0, pad=6 + 4 * longest)  # beside the minor labels, not on them
    ax.tick_params(axis="y", which="minor", length=0, labelsize=7, labelcolor="#555555")


def _label_time(ax: Axes, makespan_ps: int, unit: _Unit) -> None:
    ax.set_xlim(0, max(1, makespan_ps) * 1.01 / unit.ps)
    ax.set_xlabel(f"time since launch [{unit.name}]")


def _legend(ax: Axes, traces: list[Trace], critical_path: bool, makespan: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {int(kind) for trace in traces for kind in np.unique(trace.records["kind"])}
    handles: list[Any] = [
        Patch(color=KIND_COLOURS[kind], label=kind) for index, kind in enumerate(KINDS) if index in present
    ]
    handles.append(Patch(color=WAIT_COLOUR, label="waits for\nits inputs"))
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="no task"))
    if critical_path and any(len(trace.critical_path) for trace in traces):
        handles.append(Line2D([], [], color=PATH_COLOUR, linewidth=1.8, label="critical path"))
    if makespan:
        handles.append(Line2D([], [], color="black", linewidth=1.2, linestyle=":", label="makespan"))
    _legend_outside(ax, handles)


def _legend_outside(ax: Axes, handles: list[Any] | None = None) -> None:
    """To the right of the axes, where it covers nothing."""
    if handles is None:
        handles, _ = ax.get_legend_handles_labels()
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.005, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=9,
    )


def _set_title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10)


def _title(trace: Trace) -> str:
    return f"{trace.describe()}, makespan {_time_in_words(trace.makespan_ps)}"


def _how(trace: Trace) -> str:
    return "simulated" if trace.simulated else "measured"


def _side(name: str) -> str:
    """What a comparison's side is, from the first word of Trace.describe()."""
    return name.split(" ", 1)[0]


def _workers_in_words(trace: Trace) -> str:
    noun = "worker" if trace.num_workers == 1 else "workers"
    pes = "" if trace.num_pes == 1 else f"{trace.num_pes} PEs x "
    return f"{pes}{trace.num_workers} {noun}"


def _edges_ps(trace: Trace) -> NDArray[np.float64]:
    return np.linspace(0, max(1, trace.makespan_ps), NUM_TIME_STEPS + 1)


def _timeline_inches(trace: Trace) -> float:
    """0.16 inches a row, from 2.5 for a few rows to 10 for whatever is more than a page holds."""
    return float(np.clip(0.16 * trace.num_pes * trace.num_workers, 2.5, 10))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
