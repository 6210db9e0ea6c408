from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from traces import layer_trace, make_trace

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from flashmoe.compare import compare
from flashmoe.plots import (
    KIND_COLOURS,
    figure_mirrored,
    figure_overview,
    figure_timeline,
    plot_comparison,
    plot_hbm,
    plot_mirrored,
    plot_timeline,
    plot_utilisation,
)
from flashmoe.trace import KINDS, Trace

US = 1_000_000  # ps


def new_ax() -> Axes:
    return Figure().subplots()


def bars(ax: Axes, colour: str) -> NDArray[np.float64]:
    """(num_bars, 4): left, right, lowest and highest y of each bar of one colour."""
    found = []
    for collection in ax.collections:
        colours: Any = collection.get_facecolor()
        if isinstance(collection, PolyCollection) and to_hex(colours[0]) == colour.lower():
            for path in collection.get_paths():
                x, y = np.asarray(path.vertices).T
                found.append((x.min(), x.max(), y.min(), y.max()))
    return np.array(found)


def steps(ax: Axes) -> list[Any]:
    return [patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


def small_trace(**header: Any) -> Trace:
    """2 PEs x 2 workers, worker w on XCD w; 10 µs in all."""
    return make_trace(
        [
            {"end_ps": 4 * US, "hbm_bytes": 8_000},
            {"worker": 1, "domain": 1, "end_ps": 10 * US, "kind": "down"},
            {
                "pe": 1,
                "task_id": 0,
                "ticket_ps": 1 * US,
                "start_ps": 2 * US,
                "end_ps": 6 * US,
                "hbm_bytes": 4_000,
            },
        ],
        **{"ep_size": 2, "num_workers": 2, "num_domains": 2, "critical_path": [0, 2], **header},
    )


def test_every_kind_has_its_colour() -> None:
    assert tuple(KIND_COLOURS) == KINDS
    assert len(set(KIND_COLOURS.values())) == len(KINDS)


def test_timeline_draws_each_task_in_its_row() -> None:
    ax = plot_timeline(small_trace(), new_ax())
    # rows from the top: PE 0 workers 0 and 1, PE 1 workers 0 and 1
    np.testing.assert_allclose(bars(ax, KIND_COLOURS["up"]), [(0, 4, 0.12, 0.88), (2, 6, 2.12, 2.88)])
    np.testing.assert_allclose(bars(ax, KIND_COLOURS["down"]), [(0, 10, 1.12, 1.88)])
    np.testing.assert_allclose(bars(ax, "#d9d9d9"), [(1, 2, 2.12, 2.88)])  # holds its task, waits for inputs
    assert ax.get_ylim() == (4, 0)
    assert ax.get_xlim()[1] >= 10


def test_timeline_says_what_it_shows() -> None:
    ax = plot_timeline(small_trace(), new_ax())
    assert ax.get_title(loc="left") == f"{small_trace().describe()}, makespan 10 µs"
    assert ax.get_xlabel() == "time since launch [µs]"
    assert legend(ax) == ["up", "down", "waits for\nits inputs", "no task", "critical path"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["PE 0", "PE 1"]
    minor = [label.get_text() for label in ax.get_yticklabels(minor=True)]
    assert minor == ["XCD 0, worker 0", "XCD 1, worker 1"] * 2


def test_rows_of_one_xcd_lie_together() -> None:
    trace = make_trace(
        [{"worker": 1, "domain": 1, "end_ps": US}, {"worker": 2, "domain": 0, "end_ps": US, "kind": "down"}],
        num_workers=4,
        num_domains=2,
    )
    ax = plot_timeline(trace, new_ax())
    # workers 0 and 2 on XCD 0, then 1 and 3 on XCD 1
    assert [round(low) for _, _, low, _ in bars(ax, KIND_COLOURS["down"])] == [1]
    assert [round(low) for _, _, low, _ in bars(ax, KIND_COLOURS["up"])] == [2]


def test_many_rows_are_named_by_xcd() -> None:
    ax = plot_timeline(layer_trace(ep_size=2, num_workers=40, num_domains=4), new_ax())
    assert [label.get_text() for label in ax.get_yticklabels(minor=True)] == [f"XCD {d}" for d in range(4)] * 2
    # a collection a colour (6 kinds, waiting, three for the critical path), never an artist a task
    assert len(ax.collections) <= 10
    assert len(ax.patches) == 0


def test_critical_path_can_be_left_out() -> None:
    with_path = plot_timeline(small_trace(), new_ax())
    without = plot_timeline(small_trace(), new_ax(), critical_path=False)
    assert len(with_path.collections) == len(without.collections) + 3
    assert "critical path" not in legend(without)


def test_mirrored_puts_the_second_below_the_middle() -> None:
    measured = small_trace(executor="cpu", machine="host")
    ax = plot_mirrored(small_trace(), measured, new_ax())
    # 4 rows in each half; worker 0 of PE 0 next to the middle line on both sides
    expected = [(0, 10, 1.12 / 4, 1.88 / 4), (0, 10, -1.88 / 4, -1.12 / 4)]
    np.testing.assert_allclose(bars(ax, KIND_COLOURS["down"]), expected)
    assert ax.get_title(loc="left").startswith("above: simulated (simpy), mi300x")
    assert "\nbelow: measured (cpu), host" in ax.get_title(loc="left")
    assert ax.get_ylabel() == "measured, below   |   simulated, above"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["PE 0", "PE 1", "PE 0", "PE 1"]


def test_mirrored_shares_the_longer_time_axis() -> None:
    longer = make_trace([{"end_ps": 30 * US}], executor="cpu")
    for pair in ((small_trace(), longer), (longer, small_trace())):
        assert plot_mirrored(*pair, new_ax()).get_xlim()[1] == pytest.approx(30 * 1.01)


def test_utilisation_by_hand() -> None:
    ax = plot_utilisation(small_trace(), new_ax())
    up, down = steps(ax)  # 400 steps of 0.025 µs, stacked
    middle = (up.edges[:-1] + up.edges[1:]) / 2
    # of four workers: one on `up` in 0..2 µs, two in 2..4, one in 4..6, none after; `down` always one more
    expected_up = np.select([middle < 2, middle < 4, middle < 6], [25, 50, 25], 0)
    np.testing.assert_allclose(up.values, expected_up, atol=1e-6)
    np.testing.assert_allclose(down.values, expected_up + 25, atol=1e-6)
    assert legend(ax) == ["up", "down", "mean 45 %"]  # (4 + 10 + 4) / 40
    assert ax.get_ylabel() == "utilisation\n[% of 4 workers]"


def test_hbm_by_hand() -> None:
    ax = plot_hbm(small_trace(), new_ax(), ceiling_bytes_per_ns=3.0)
    [total] = steps(ax)
    middle = (total.edges[:-1] + total.edges[1:]) / 2
    # 8000 bytes over 0..4 µs are 2 bytes a ns; 4000 over 2..6 are 1
    expected = np.select([middle < 2, middle < 4, middle < 6], [2, 3, 1], 0)
    np.testing.assert_allclose(total.values, expected, atol=1e-9)
    assert ax.get_ylabel() == "HBM traffic\nof 2 PEs [GB/s]"
    assert legend(ax) == ["all kinds", "ceiling 6 GB/s"]
    per_pe = plot_hbm(small_trace(), new_ax(), per_pe=True, ceiling_bytes_per_ns=3.0)
    np.testing.assert_allclose(steps(per_pe)[1].values, np.where((middle > 2) & (middle < 6), 1, 0), atol=1e-9)
    assert legend(per_pe) == ["PE 0", "PE 1", "ceiling 3 GB/s"]


def test_comparison_draws_each_matched_task() -> None:
    left = layer_trace(ep_size=1, num_workers=4)
    right = layer_trace(ep_size=1, num_workers=4, seed=1, executor="cpu")
    comparison = compare(left, right)
    ax = plot_comparison(comparison, new_ax())
    assert sum(len(np.asarray(points.get_offsets())) for points in ax.collections) == comparison.matched
    x, y = np.asarray(ax.collections[0].get_offsets()).T
    gates = np.flatnonzero(left.kind_names == "gate")
    np.testing.assert_allclose(y, left.duration_ps[gates] / 1e6)
    np.testing.assert_allclose(x, right.duration_ps[gates] / 1e6)
    assert ax.get_xlabel() == "measured duration of a task [µs]"
    assert ax.get_ylabel() == "simulated duration of a task [µs]"


@pytest.mark.parametrize(("makespan_ps", "unit"), [(19 * 10**9, "µs"), (21 * 10**9, "ms"), (21 * 10**12, "s")])
def test_long_runs_get_a_larger_unit(makespan_ps: int, unit: str) -> None:
    ax = plot_timeline(make_trace([{"end_ps": makespan_ps}]), new_ax())
    assert ax.get_xlabel() == f"time since launch [{unit}]"


def test_figures_save_themselves() -> None:
    simulated = layer_trace(ep_size=2, num_workers=4, tiles=1)
    measured = layer_trace(ep_size=2, num_workers=3, tiles=1, seed=1, executor="cpu")
    for figure in (
        figure_timeline(simulated),
        figure_mirrored(simulated, measured),
        figure_overview(simulated, ceiling_bytes_per_ns=4_200),
    ):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=50)
        assert picture.getvalue().startswith(b"\x89PNG")


def test_a_trace_without_tasks_can_be_drawn() -> None:
    empty = make_trace([])
    figure_overview(empty).savefig(io.BytesIO(), dpi=30)
    plot_mirrored(empty, empty, new_ax())
    plot_comparison(compare(empty, empty), new_ax())


def test_neither_pyplot_nor_a_display_is_needed() -> None:
    code = (
        "import sys, flashmoe.plots as plots; assert 'matplotlib' not in sys.modules; import traces;"
        "plots.figure_timeline(traces.make_trace([])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "TkAgg"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
