"""Figures of benchmarks: times beside what the memory gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmoe.bench.result import OURS, How, Measurement, Result, whole
from flashmoe.plots.style import BOUND_COLOUR, SERIES_COLOURS, SERIES_MARKERS, empty_figure, legend_outside, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_ceiling_share(result: Result, ax: Axes, *, routing: str | None = None) -> Axes:
    """Draw the share of the read ceiling over the number of tokens, a line for flashmoe and each peer.

    routing: None: the first that was measured. The band reaches from the 10th to the 90th percentile of the replays.
    Wrong results are left out.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter

    routing = result.routings()[0] if routing is None else routing
    all_tokens = result.tokens(routing)
    how_most = whole(routing)
    lines: list[tuple[str, How]] = [(OURS, how_most)]
    if how_most == "gate":
        lines.append((OURS, "given"))
    lines += [(peer, how_most) for peer in result.peers()]
    for number, (who, how) in enumerate(lines):
        rows = [result.find(routing, n, who, how, "tuned" if who == OURS else None) for n in all_tokens]
        drawn = [row for row in rows if row is not None and row.right]
        if not drawn:
            continue
        x, ceiling = [row.tokens for row in drawn], [_ceiling_us(result, row) for row in drawn]
        colour = SERIES_COLOURS[number % 8]
        label = who if how == how_most else f"{who}, routing given"
        ax.plot(
            x,
            [100 * c / row.median_us for c, row in zip(ceiling, drawn, strict=True)],
            color=colour,
            marker=SERIES_MARKERS[number % 8],
            markersize=5,
            linestyle="--" if label != who else "-",
            label=label,
            zorder=4 if who == OURS else 3,
        )
        ax.fill_between(
            x,
            [100 * c / row.p90_us for c, row in zip(ceiling, drawn, strict=True)],
            [100 * c / row.p10_us for c, row in zip(ceiling, drawn, strict=True)],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    ax.axhline(100, color=BOUND_COLOUR, linewidth=1.2, linestyle=":", label="only reading", zorder=2)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(all_tokens))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    ax.set_ylim(0, 105)
    ax.set_xlabel("tokens")
    ax.set_ylabel("read ceiling's time / time of the layer")
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    legend_outside(ax)
    set_title(ax, _title(result, routing))
    return ax


def figure_ceiling_share(result: Result) -> Figure:
    """All routings, one below the other."""
    routings = result.routings()
    made = empty_figure(8, 4 * len(routings))
    axes = made.subplots(len(routings), 1, squeeze=False)[:, 0]
    for ax, routing in zip(axes, routings, strict=True):
        plot_ceiling_share(result, ax, routing=routing)
    return made


def _ceiling_us(result: Result, row: Measurement) -> float:
    return result.ceiling(row.routing, row.tokens).median_us


def _title(result: Result, routing: str) -> str:
    header = result.header
    inside = "router inside" if routing == "gate" else f"routing {routing}, given"
    graph = f"a graph of {header['num_layers']} layers, median of {header['repeats']} replays"
    return (
        f"One layer of {header['model']['name']}, bf16, {inside}\n"
        f"measured on {header['device']}, {header['date'][:10]}; {graph}"
    )
