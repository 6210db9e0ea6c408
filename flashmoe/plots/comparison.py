"""Two runs of the same tasks, task by task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashmoe.plots.style import KIND_COLOURS, legend_outside, set_title
from flashmoe.trace import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flashmoe.compare import Comparison


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
                rasterized=True,
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
    legend_outside(ax)
    set_title(ax, f"y: {comparison.left_name}\nx: {comparison.right_name}")
    return ax


def _side(name: str) -> str:
    """What a comparison's side is, from the first word of Trace.describe()."""
    return name.split(" ", 1)[0]
