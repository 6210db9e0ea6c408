"""Figures of runs. plot_x draws on the axes it is given and returns them; figure_x makes a figure to save.

`figure(plot_x, ...)` does that for any of them. No pyplot and no display is needed.
"""

from flashmoe.plots.bench import figure_ceiling_share, plot_ceiling_share
from flashmoe.plots.comparison import plot_comparison
from flashmoe.plots.over_time import plot_hbm, plot_queue_length, plot_utilisation
from flashmoe.plots.roofline import plot_roofline
from flashmoe.plots.runs import plot_worker_time
from flashmoe.plots.style import KIND_COLOURS, figure
from flashmoe.plots.sweeps import plot_heat_map, plot_makespan
from flashmoe.plots.timeline import (
    figure_mirrored,
    figure_overview,
    figure_timeline,
    plot_mirrored,
    plot_timeline,
)

__all__ = [
    "KIND_COLOURS",
    "figure",
    "figure_ceiling_share",
    "figure_mirrored",
    "figure_overview",
    "figure_timeline",
    "plot_ceiling_share",
    "plot_comparison",
    "plot_hbm",
    "plot_heat_map",
    "plot_makespan",
    "plot_mirrored",
    "plot_queue_length",
    "plot_roofline",
    "plot_timeline",
    "plot_utilisation",
    "plot_worker_time",
]
