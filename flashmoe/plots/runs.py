"""Several runs side by side: what the workers did in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flashmoe.answers import WORKER_TIMES, worker_time
from flashmoe.plots.style import (
    BOUND_COLOUR,
    TIME_COLOURS,
    common_title,
    facts_of,
    legend_outside,
    set_title,
    time_in_words,
    time_unit,
)
from flashmoe.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIME_WORDS = {
    "ticket": "asks the queue",
    "inputs": "waits for inputs",
    "stream": "waits for weights",
    "compute": "computes",
    "overhead": "fixed part of a task",
    "send": "stores to other PEs",
    "other": "no task",
}


class RunTotals(Protocol):
    """Of `flashmoe.evaluate`'s Totals, what a figure needs."""

    @property
    def makespan_ps(self) -> int: ...
    @property
    def bound_ps(self) -> int: ...
    @property
    def time_ps(self) -> dict[str, int]: ...


def plot_worker_time(runs: Mapping[str, Trace | RunTotals], ax: Axes, *, title: str | None = None) -> Axes:
    """Draw the makespan of each run as a bar, cut into what an average worker did, and across it the lower bound.

    runs: by the name to write beside the bar, from top to bottom.
    """
    from matplotlib.patches import Patch

    if not runs:
        raise ValueError("no runs (must be at least one, by name)")
    makespans_ps = np.array([run.makespan_ps for run in runs.values()], np.float64)
    unit = time_unit(int(makespans_ps.max()))
    left = np.zeros(len(runs))
    shares = [_shares(run) for run in runs.values()]
    rows = np.arange(len(runs))
    for name in WORKER_TIMES:
        widths = np.array([share[name] for share in shares]) * makespans_ps / unit.ps
        edge = "#BBBBBB" if name == "other" else "none"
        ax.barh(rows, widths, left=left, height=0.65, color=TIME_COLOURS[name], edgecolor=edge, linewidth=0.6)
        left += widths
    for row, makespan_ps in enumerate(makespans_ps):
        ax.annotate(
            time_in_words(makespan_ps),
            (makespan_ps / unit.ps, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    bounds = np.array([_bound_ps(run) for run in runs.values()], np.float64) / unit.ps
    known = bounds > 0
    lines = ax.vlines(bounds[known], rows[known] - 0.45, rows[known] + 0.45, color=BOUND_COLOUR, linewidth=2.5)
    lines.set_label("lower bound: no schedule\nof these tasks is faster")
    ax.set_yticks(rows, list(runs))
    ax.set_ylim(len(runs) - 0.4, -0.6)
    ax.set_xlim(0, 1.14 * max(1.0, makespans_ps.max()) / unit.ps)
    ax.set_xlabel(f"makespan, and what a worker does in it on average [{unit.name}]")
    ax.spines[["top", "right"]].set_visible(False)
    used = [name for name in WORKER_TIMES if any(share[name] > 0 for share in shares)]
    handles = [Patch(facecolor=TIME_COLOURS[n], edgecolor="#BBBBBB", label=TIME_WORDS[n]) for n in used]
    legend_outside(ax, [*handles, *([lines] if known.any() else [])])
    if title is None:
        title = common_title([facts_of(run) if isinstance(run, Trace) else {} for run in runs.values()])
    set_title(ax, title)
    return ax


def _shares(run: Trace | RunTotals) -> dict[str, float]:
    """Of all the workers' time, by WORKER_TIMES; they add up to 1."""
    times = worker_time(run) if isinstance(run, Trace) else run.time_ps
    sums = {name: float(np.sum(times[name])) for name in WORKER_TIMES}
    whole = sum(sums.values()) or 1.0
    return {name: value / whole for name, value in sums.items()}


def _bound_ps(run: Trace | RunTotals) -> int:
    """0 where nobody knows it."""
    return int(run.header.get("bound_ps", 0)) if isinstance(run, Trace) else run.bound_ps
