"""What all figures share: colours, units, titles, legends."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.trace import Trace

if TYPE_CHECKING:  # matplotlib is imported where it is used: reading a trace must not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
# Greys are waiting. The others are from the "muted" scheme of Paul Tol (2021), and no kind has one of them.
TIME_COLOURS = {
    "ticket": "#969696",
    "inputs": "#D9D9D9",
    "stream": "#88CCEE",
    "compute": "#117733",
    "overhead": "#DDCC77",
    "send": "#AA4499",
    "other": "#FFFFFF",
}
BOUND_COLOUR = "#000000"
PATH_COLOUR = "#000000"

# Of several lines or points in one figure, one after the other: both change, so that colour is never all there is.
SERIES_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#332288", "#777777")
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

SMALL, USUAL = 8, 9  # font sizes


@dataclass(frozen=True)
class TimeUnit:
    ps: float
    name: str


def time_unit(makespan_ps: int) -> TimeUnit:
    if makespan_ps < 20_000_000_000:
        return TimeUnit(1e6, "µs")
    return TimeUnit(1e9, "ms") if makespan_ps < 20_000_000_000_000 else TimeUnit(1e12, "s")


def time_in_words(time_ps: float) -> str:
    unit = time_unit(int(time_ps))
    value = time_ps / unit.ps
    return f"{value:.0f} {unit.name}" if value >= 1000 else f"{value:.4g} {unit.name}"


def figure(plot: Callable[..., Any], *what: Any, inches: tuple[float, float] = (8, 4.5), **options: Any) -> Figure:
    """One of the plot_x functions as a figure to save: figure(plot_heat_map, frame, x="tokens", y="policy")."""
    made = empty_figure(*inches)
    plot(*what, made.subplots(), **options)
    return made


def empty_figure(width: float, height: float) -> Figure:
    """No pyplot and no display: a figure that draws itself with Agg. width, height: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    return made


def set_title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=USUAL + 1)


def label_time(ax: Axes, makespan_ps: int, unit: TimeUnit) -> None:
    ax.set_xlim(0, max(1, makespan_ps) * 1.01 / unit.ps)
    ax.set_xlabel(f"time since launch [{unit.name}]")


def legend_outside(ax: Axes, handles: list[Any] | None = None, title: str | None = None) -> None:
    """To the right of the axes, where it covers nothing."""
    if handles is None:
        handles, _ = ax.get_legend_handles_labels()
    ax.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.005, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=USUAL,
        title_fontsize=USUAL,
        alignment="left",
    )


def how(trace: Trace) -> str:
    return "simulated" if trace.simulated else "measured"


def trace_title(trace: Trace) -> str:
    """Two lines: what was run where, and how long it took."""
    header = trace.header
    parts = [f"makespan {time_in_words(trace.makespan_ps)}"]
    if header.get("bound_ps"):
        headroom = 100 * header.get("headroom", 0.0)
        parts[0] += f", {abs(headroom):.0f} % {'above' if headroom >= 0 else 'below'} its lower bound"
    if "routing_name" in header:
        parts.append(f"routing {header['routing_name']}")
    if num_layers(trace) > 1:
        gap_us = header.get("gap_us")
        between = "in one kernel" if gap_us is None else f"with {gap_us:g} µs of dense compute between"
        parts.append(f"{num_layers(trace)} layers {between}")
    if header.get("without"):
        parts.append(f"without {', '.join(header['without'])}")
    return f"{trace.describe()}\n{'; '.join(parts)}"


def num_layers(trace: Trace) -> int:
    return 1 + int(trace.records["layer"].max(initial=0))


def workers_in_words(trace: Trace) -> str:
    noun = "worker" if trace.num_workers == 1 else "workers"
    pes = "" if trace.num_pes == 1 else f"{trace.num_pes} PEs x "
    return f"{pes}{trace.num_workers} {noun}"


# What a run is known by, in the order of a title.
FACTS = {
    "how": "{}",
    "machine": "{}",
    "model": "{}",
    "policy": "policy {}",
    "tokens": "{} tokens per PE",
    "ep": "EP {}",
    "routing": "routing {}",
    "layers": "{} layers",
}


def facts_of(trace: Trace) -> dict[str, Any]:
    """The facts of a trace's header, by the names of FACTS."""
    header = trace.header
    model, tokens = header.get("model"), header.get("num_tokens")
    if isinstance(tokens, list):
        tokens = tokens[0] if len(set(tokens)) == 1 else None
    return {
        "how": how(trace),
        "machine": header.get("machine"),
        "model": model.get("name") if isinstance(model, dict) else model,
        "policy": header.get("policy"),
        "tokens": tokens,
        "ep": trace.num_pes,
        "routing": header.get("routing_name"),
        "layers": num_layers(trace),
    }


def common_title(runs: Sequence[Mapping[str, Any]]) -> str:
    """What all runs of a figure have in common, in two lines at most."""
    parts = []
    for name, form in FACTS.items():
        values = {run.get(name) for run in runs}
        value = values.pop() if len(values) == 1 else None
        if value is not None and (name, value) != ("layers", 1):
            parts.append(form.format(value))
    lines = textwrap.wrap(", ".join(parts), width=78, break_on_hyphens=False)
    return "\n".join(lines)
