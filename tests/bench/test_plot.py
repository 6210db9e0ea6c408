"""The figure of a benchmark: its points are the shares, its lines are told apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench.measured import small_result
from matplotlib.figure import Figure

from flashmoe.bench.result import Result
from flashmoe.plots import figure_ceiling_share, plot_ceiling_share


def test_lines_are_shares_of_the_ceiling() -> None:
    ax = plot_ceiling_share(small_result(), Figure().subplots())
    lines = {line.get_label(): (list(line.get_xdata()), np.round(line.get_ydata(), 1).tolist()) for line in ax.lines}
    assert lines["flashmoe"] == ([1, 8], [80.0, 80.0])
    assert lines["flashmoe, routing given"] == ([1, 8], [90.9, 90.9])
    assert lines["torch"] == ([1], [20.0])  # wrong at 8 tokens
    assert ax.get_xlabel() == "tokens"
    assert "measured on NVIDIA H200, 2026-11-23" in ax.get_title(loc="left")


def test_the_band_is_the_spread() -> None:
    ax = plot_ceiling_share(small_result(), Figure().subplots())
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(80 / 1.1) and band[:, 1].max() == pytest.approx(80 / 0.9)


def test_each_routing_has_its_axes() -> None:
    rows = small_result().measurements
    other = [replace(row, routing="zipf:1.2") for row in rows if row.how in ("read", "given")]
    made = figure_ceiling_share(Result(small_result().header, rows + other, []))
    assert len(made.axes) == 2
    labels = [line.get_label() for line in made.axes[1].lines]
    assert "flashmoe" in labels and "flashmoe, routing given" not in labels
