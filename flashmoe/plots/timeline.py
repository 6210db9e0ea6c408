"""Gantt charts: every task of every worker over time, and two runs mirrored on one time axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.plots.over_time import plot_hbm, plot_utilisation
from flashmoe.plots.style import (
    KIND_COLOURS,
    PATH_COLOUR,
    SMALL,
    TIME_COLOURS,
    TimeUnit,
    empty_figure,
    how,
    label_time,
    legend_outside,
    num_layers,
    set_title,
    time_unit,
    trace_title,
    workers_in_words,
)
from flashmoe.trace import KINDS, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SPACED_ROWS = 200  # with more rows than this, a gap between two is thinner than a pixel
MAX_WORKER_LABELS = 40  # with more than this, only domains are named
MAX_DOMAIN_LABELS = 80  # and with more of those, only PEs
MAX_LAYER_LABELS = 12
DRAWN_TIMES = ("asked", "ticket", "start", "end")
LAYER_COLOUR = "#D40000"


def plot_timeline(trace: Trace, ax: Axes, *, critical_path: bool = True) -> Axes:
    """Draw every task as a bar over time: a row a worker, grouped by PE and XCD, PE 0 on top.

    Dark grey is a worker that waits for a ticket; light grey one that holds a task and waits for its inputs; white
    one without a task. Of several layers, a line in each PE marks where the layer's last task ended there.
    critical_path: draw what the end had to wait for: its tasks thick, thin lines from one to the next.
    """
    rows = _Rows.of(trace)
    unit = time_unit(trace.makespan_ps)
    _draw_tasks(trace, ax, rows, unit, critical_path)
    _draw_layers(trace, ax, rows, unit)
    _label_rows(ax, [(trace, rows)])
    ax.set_ylabel(f"{workers_in_words(trace)}, a row each")
    ax.set_ylim(rows.num_rows, 0)
    label_time(ax, trace.makespan_ps, unit)
    _label_layers(trace, ax, unit)
    _legend(ax, [trace], critical_path)
    set_title(ax, trace_title(trace))
    return ax


def plot_mirrored(simulated: Trace, measured: Trace, ax: Axes, *, critical_path: bool = True) -> Axes:
    """Draw two timelines on one time axis: the first above the middle line, the second mirrored below it.

    Usually one is simulated and one measured, but any two will do, such as two policies.
    Both start at the middle with worker 0 of PE 0, so that a task has its counterpart at the same distance.
    """
    makespan_ps = max(simulated.makespan_ps, measured.makespan_ps)
    unit = time_unit(makespan_ps)
    halves = [(simulated, _Rows.of(simulated, 1)), (measured, _Rows.of(measured, -1))]
    for trace, rows in halves:
        _draw_tasks(trace, ax, rows, unit, critical_path)
        _draw_layers(trace, ax, rows, unit)
        end = trace.makespan_ps / unit.ps
        ax.plot([end, end], [0, rows.y(rows.num_rows)], color="black", linewidth=1.2, linestyle=":")
    ax.axhline(0, color="black", linewidth=2.5, zorder=3)
    _label_rows(ax, halves)
    ax.set_ylabel("{1}, below   |   {0}, above".format(*_names(simulated, measured)))
    ax.set_ylim(-1.0, 1.0)
    label_time(ax, makespan_ps, unit)
    _legend(ax, [simulated, measured], critical_path, makespan=True)
    above, below = trace_title(simulated), trace_title(measured)
    set_title(ax, f"above: {above}\nbelow: {below}")
    return ax


def figure_timeline(trace: Trace) -> Figure:
    """plot_timeline as a figure, as high as its rows need."""
    figure = empty_figure(12, _timeline_inches(trace) + 1.2)
    plot_timeline(trace, figure.subplots())
    return figure


def figure_mirrored(simulated: Trace, measured: Trace) -> Figure:
    """plot_mirrored as a figure, as high as its rows need."""
    figure = empty_figure(12, 1.4 * max(_timeline_inches(simulated), _timeline_inches(measured)) + 1.4)
    plot_mirrored(simulated, measured, figure.subplots())
    return figure


def figure_overview(trace: Trace, *, ceiling_bytes_per_ns: float | None = None) -> Figure:
    """Timeline, utilisation and HBM traffic on one time axis. ceiling_bytes_per_ns: as plot_hbm."""
    height = _timeline_inches(trace)
    figure = empty_figure(12, height + 4.6)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[height, 1.6, 1.6])
    plot_timeline(trace, axes[0])
    plot_utilisation(trace, axes[1])
    plot_hbm(trace, axes[2], ceiling_bytes_per_ns=ceiling_bytes_per_ns)
    for ax in axes[:2]:
        ax.set_xlabel("")
    for ax in axes[1:]:
        set_title(ax, "")  # the timeline's stands for all three, and so do its colours
    handles, _ = axes[1].get_legend_handles_labels()
    legend_outside(axes[1], handles[-1:])
    return figure


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


def _names(above: Trace, below: Trace) -> tuple[str, str]:
    """What tells the two apart, as short as possible."""
    if how(above) != how(below):
        return how(above), how(below)
    return str(above.header.get("policy", "first")), str(below.header.get("policy", "second"))


def _draw_tasks(trace: Trace, ax: Axes, rows: _Rows, unit: TimeUnit, critical_path: bool) -> None:
    from matplotlib.collections import PolyCollection

    records = trace.records
    asked, ticket, start, end, idle_since = (
        times / unit.ps for times in (*(records[f"{name}_ps"] for name in DRAWN_TIMES), trace.idle_since_ps)
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
    if (asked < ticket).any():  # below the other bars: a worker that looks ahead asks while it runs another task
        bars(asked, ticket, asked < ticket, facecolors=TIME_COLOURS["ticket"], linewidths=0, zorder=0.8)
    bars(idle_since, start, idle_since < start, facecolors=TIME_COLOURS["inputs"], linewidths=0, zorder=1)
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
    """The critical path: its tasks as thick lines with a dot where each starts, thin ones from one to the next."""
    from matplotlib.collections import LineCollection

    path = trace.critical_path
    height = rows.y(rows.of_task[path] + 0.5)
    begins, ends = np.stack((start[path], height), axis=-1), np.stack((end[path], height), axis=-1)
    tasks: Any = np.stack((begins, ends), axis=1)
    steps: Any = np.stack((ends[:-1], begins[1:]), axis=1)
    for lines, colour, width in (
        (steps, "white", 1.8),
        (tasks, "white", 3.4),
        (steps, PATH_COLOUR, 0.8),
        (tasks, PATH_COLOUR, 1.8),
    ):
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=4), autolim=False)
    ax.plot(*begins.T, linestyle="", marker="o", markersize=3.2, color=PATH_COLOUR, markeredgecolor="white", zorder=5)


def _layer_ends_ps(trace: Trace) -> NDArray[np.int64]:
    """(layers, num_pes) end of the last task."""
    ends_ps = np.zeros((num_layers(trace), trace.num_pes), np.int64)
    np.maximum.at(ends_ps, (trace.records["layer"], trace.records["pe"]), trace.records["end_ps"])
    return ends_ps


def _draw_layers(trace: Trace, ax: Axes, rows: _Rows, unit: TimeUnit) -> None:
    """Where each layer but the last ended, PE by PE."""
    from matplotlib.collections import LineCollection

    ends = _layer_ends_ps(trace)[:-1] / unit.ps
    if ends.size:
        top = rows.y(np.broadcast_to(np.array(rows.pe_starts), ends.shape))
        bottom = rows.y(np.broadcast_to(np.array(rows.pe_starts) + trace.num_workers, ends.shape))
        lines: Any = np.stack((np.stack((ends, top), axis=-1), np.stack((ends, bottom), axis=-1)), axis=-2)
        lines = lines.reshape(-1, 2, 2)
        marks = LineCollection(lines, colors=LAYER_COLOUR, linewidths=1.4, linestyles="--", zorder=3.5)
        ax.add_collection(marks, autolim=False)


def _label_layers(trace: Trace, ax: Axes, unit: TimeUnit) -> None:
    """Name the layers above the axes, each in the middle of its time."""
    ends = _layer_ends_ps(trace).max(axis=1) / unit.ps
    if 1 < len(ends) <= MAX_LAYER_LABELS:
        middles = (np.concatenate(([0.0], ends[:-1])) + ends) / 2
        above = ax.secondary_xaxis("top")
        above.set_xticks(middles.tolist(), [f"layer {number}" for number in range(len(ends))])
        above.tick_params(length=0, labelsize=SMALL, pad=1)


def _label_rows(ax: Axes, parts: list[tuple[Trace, _Rows]]) -> None:
    """Name PEs, and workers or domains where there is room for them."""
    major: list[tuple[float, str]] = []
    workers: list[tuple[float, str]] = []
    domains: list[tuple[float, str]] = []
    for trace, rows in parts:
        word = trace.domain_word
        for pe, start in enumerate(rows.pe_starts):
            major.append((rows.y(start + trace.num_workers / 2), f"PE {pe}"))
        domain_of = trace.worker_domains()
        several = trace.num_domains > 1
        for (pe, worker), row in np.ndenumerate(rows.of_worker):
            prefix = f"{word} {domain_of[pe, worker]}, " if several else ""
            workers.append((rows.y(row + 0.5), f"{prefix}worker {worker}"))
        ends = [start for start, _ in rows.domain_starts[1:]] + [rows.num_rows]
        for (start, domain), end in zip(rows.domain_starts, ends, strict=True):
            domains += [(rows.y((start + end) / 2), f"{word} {domain}")] * several
    minor = workers if len(workers) <= MAX_WORKER_LABELS else domains if len(domains) <= MAX_DOMAIN_LABELS else []
    ax.set_yticks([y for y, _ in major], [label for _, label in major])
    ax.set_yticks([y for y, _ in minor], [label for _, label in minor], minor=True)
    longest = max((len(label) for _, label in minor), default=0)
    ax.tick_params(axis="y", which="major", length=0, pad=6 + 4.6 * longest)  # beside the minor labels, not on them
    ax.tick_params(axis="y", which="minor", length=0, labelsize=7, labelcolor="#555555")


def _legend(ax: Axes, traces: list[Trace], critical_path: bool, makespan: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {int(kind) for trace in traces for kind in np.unique(trace.records["kind"])}
    handles: list[Any] = [
        Patch(color=KIND_COLOURS[kind], label=kind) for index, kind in enumerate(KINDS) if index in present
    ]
    if any((trace.records["asked_ps"] < trace.records["ticket_ps"]).any() for trace in traces):
        handles.append(Patch(color=TIME_COLOURS["ticket"], label="waits for\na ticket"))
    handles.append(Patch(color=TIME_COLOURS["inputs"], label="waits for\nits inputs"))
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="no task"))
    if critical_path and any(len(trace.critical_path) for trace in traces):
        handles.append(
            Line2D([], [], color=PATH_COLOUR, linewidth=1.8, marker="o", markersize=3, label="critical path")
        )
    if any(num_layers(trace) > 1 for trace in traces):
        handles.append(
            Line2D([], [], color=LAYER_COLOUR, linewidth=1.4, linestyle="--", label="layer ended\non this PE")
        )
    if makespan:
        handles.append(Line2D([], [], color="black", linewidth=1.2, linestyle=":", label="makespan"))
    legend_outside(ax, handles)


def _timeline_inches(trace: Trace) -> float:
    """0.16 inches a row, from 2.5 for a few rows to 10 for whatever is more than a page holds."""
    return float(np.clip(0.16 * trace.num_pes * trace.num_workers, 2.5, 10))
