"""Figures of many runs: data frames with a row a run, as from a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.plots.style import (
    BOUND_COLOUR,
    FACTS,
    SERIES_COLOURS,
    SERIES_MARKERS,
    SMALL,
    common_title,
    legend_outside,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# A column's label on an axis, and what its values are multiplied with: by its name, else by the end of its name.
LABELS: dict[str, tuple[str, float]] = {
    "tokens": ("tokens per PE", 1),
    "ep": ("PEs", 1),
    "num_workers": ("workers of a PE", 1),
    "headroom": ("time above the lower bound [%]", 100),
}
UNITS: dict[str, tuple[str, float]] = {
    "_bytes_per_ns": ("GB/s", 1),
    "_bytes": ("MB", 1e-6),
    "_us": ("µs", 1),
    "_ps": ("µs", 1e-6),
    "_utilisation": ("%", 100),
}
MAX_WRITTEN_CELLS = 200  # of a heat map: with more, the numbers no longer fit
LOG_RATIO = 16  # a scale whose largest value is this many times the smallest is logarithmic


def plot_makespan(
    frame: DataFrame, ax: Axes, *, over: str = "tokens", lines: str = "policy", title: str | None = None
) -> Axes:
    """Draw the makespan over the number of tokens, or another column, a line for each policy, above its lower bound.

    frame: a row a run; columns makespan_us and bound_ps (drawn when there), over and lines. Of several runs at
        one place, such as seeds, the line is the mean and the band reaches from the fastest to the slowest.
    Raises: ValueError naming a column that is not there.
    """
    _check_columns(frame, over, lines, "makespan_us")
    bounds: dict[tuple[float, ...], list[tuple[str, int]]] = {}  # the same curve is drawn once
    for number, (name, rows) in enumerate(frame.groupby(lines, sort=False)):
        times = rows.groupby(over)["makespan_us"].agg(["mean", "min", "max"])
        colour, marker = SERIES_COLOURS[number % 8], SERIES_MARKERS[number % 8]
        ax.plot(times.index, times["mean"], color=colour, marker=marker, markersize=5, label=str(name), zorder=3)
        ax.fill_between(times.index, times["min"], times["max"], color=colour, alpha=0.2, linewidth=0)
        if "bound_ps" in frame:
            curve = rows.groupby(over)["bound_ps"].min() / 1e6
            bounds.setdefault((*curve.index, *curve.round(3)), []).append((str(name), number))
    for curve, names in bounds.items():
        x, y = np.array(curve, np.float64).reshape(2, -1)
        alone = len(bounds) == 1
        label = "lower bound" if alone else f"bound: {', '.join(name for name, _ in names)}"
        colour = BOUND_COLOUR if alone or len(names) > 1 else SERIES_COLOURS[names[0][1] % 8]
        ax.plot(x, y, color=colour, linewidth=1.4, linestyle="--", label=label, zorder=2)
    _scale_axis(ax, "x", frame[over])
    _scale_axis(ax, "y", frame["makespan_us"])
    ax.set_xlabel(column_label(over)[0])
    ax.set_ylabel("makespan [µs]")
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    legend_outside(ax, title=lines)
    set_title(ax, _frame_title(frame) if title is None else title)
    return ax


def plot_heat_map(
    frame: DataFrame, ax: Axes, *, x: str, y: str, value: str = "makespan_us", title: str | None = None
) -> Axes:
    """Draw one column of a sweep as colours over two others, the mean where there are several runs.

    frame: a row a run. A place without a run is left white.
    Raises: ValueError naming a column that is not there.
    """
    from matplotlib.colors import LogNorm, Normalize

    _check_columns(frame, x, y, value)
    across, down = _axis_values(frame[x]), _axis_values(frame[y])
    label, factor = column_label(value)
    means = frame.groupby([x, y])[value].mean() * factor
    cells = np.array([[means.get((column, row), np.nan) for column in across] for row in down], np.float64)
    norm = LogNorm() if _spans_orders(cells) else Normalize()
    image = ax.imshow(np.ma.masked_invalid(cells), cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(label)
    ax.set_xticks(range(len(across)), [_in_words(item) for item in across])
    ax.set_yticks(range(len(down)), [_in_words(item) for item in down])
    if cells.size <= MAX_WRITTEN_CELLS:
        _write_cells(ax, cells, norm)
    ax.set_xlabel(column_label(x)[0])
    ax.set_ylabel(column_label(y)[0])
    set_title(ax, _frame_title(frame.drop(columns=[x, y])) if title is None else title)
    return ax


def column_label(name: str) -> tuple[str, float]:
    """What to write on the axis of a column, and the factor to its unit: link_bytes -> ("link [MB]", 1e-6)."""
    if name in LABELS:
        return LABELS[name]
    for suffix, (unit, factor) in UNITS.items():
        if name.endswith(suffix):
            word = " utilisation" if suffix == "_utilisation" else ""
            return f"{name.removesuffix(suffix).replace('_', ' ')}{word} [{unit}]", factor
    return name.replace("_", " "), 1


def _check_columns(frame: DataFrame, *names: str) -> None:
    for name in names:
        if name not in frame:
            raise ValueError(f"no column {name!r} (columns: {', '.join(map(str, frame.columns))})")


def _frame_title(frame: DataFrame) -> str:
    known = [name for name in FACTS if name in frame]
    return common_title([{"how": "simulated", **row} for row in frame[known].to_dict("records")])


def _axis_values(column: Any) -> list[Any]:
    """Numbers in order; anything else as it comes."""
    values = column.drop_duplicates().tolist()
    return sorted(values) if _is_number(column) else values


def _is_number(column: Any) -> bool:
    return column.dtype.kind in "iuf"  # pandas' own types, too


def _in_words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _scale_axis(ax: Axes, which: str, column: Any) -> None:
    """A logarithmic axis where the numbers ask for it, with ticks that people read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not (_is_number(column) and _spans_orders(column)):
        if which == "y":
            ax.set_ylim(0, 1.06 * column.max())
        return
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    values = _axis_values(column)
    if which == "x" and len(values) <= 12:
        axis.set_major_locator(FixedLocator(values))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _spans_orders(values: Any) -> bool:
    """Whether a logarithmic scale says more."""
    low, high = np.nanmin(values), np.nanmax(values)
    return bool(0 < low * LOG_RATIO <= high)


def _write_cells(ax: Axes, cells: NDArray[np.float64], norm: Any) -> None:
    """Each cell's number, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            light = norm(value) > 0.5
            text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
            ax.text(column, row, text, ha="center", va="center", fontsize=SMALL, color="black" if light else "white")
