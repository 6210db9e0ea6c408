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
pytest.importorskip("pandas")
import pandas
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from flashmoe.compare import compare
from flashmoe.model import MoEModel
from flashmoe.plots import (
    KIND_COLOURS,
    figure,
    figure_mirrored,
    figure_overview,
    figure_timeline,
    plot_comparison,
    plot_hbm,
    plot_heat_map,
    plot_makespan,
    plot_mirrored,
    plot_queue_length,
    plot_roofline,
    plot_timeline,
    plot_utilisation,
    plot_worker_time,
)
from flashmoe.plots.roofline import flops_of
from flashmoe.plots.style import TIME_COLOURS
from flashmoe.plots.sweeps import column_label
from flashmoe.routing import Routing
from flashmoe.sim import TIME_SHARES, Totals
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import KINDS, TRACE_DTYPE, Trace

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
    assert ax.get_title(loc="left") == f"{small_trace().describe()}\nmakespan 10 µs"
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
    # a collection a colour (6 kinds, waiting, four for the critical path), never an artist a task
    assert len(ax.collections) <= 11
    assert len(ax.patches) == 0


def test_critical_path_can_be_left_out() -> None:
    with_path = plot_timeline(small_trace(), new_ax())
    without = plot_timeline(small_trace(), new_ax(), critical_path=False)
    assert len(with_path.collections) == len(without.collections) + 4
    assert "critical path" not in legend(without)


def test_critical_path_is_drawn_from_task_to_task() -> None:
    ax = plot_timeline(small_trace(), new_ax())
    tasks, steps_between = (ax.collections[-1].get_segments(), ax.collections[-2].get_segments())
    # task 0 in row 0 over 0..4 µs, then task 2 in row 2 over 2..6 µs
    np.testing.assert_allclose(tasks, [[(0, 0.5), (4, 0.5)], [(2, 2.5), (6, 2.5)]])
    np.testing.assert_allclose(steps_between, [[(4, 0.5), (2, 2.5)]])


def test_title_tells_bound_routing_layers_and_what_was_switched_off() -> None:
    trace = small_trace(bound_ps=8 * US, headroom=0.25, routing_name="zipf:1", without=["knee"])
    assert plot_timeline(trace, new_ax()).get_title(loc="left").split("\n")[1] == (
        "makespan 10 µs, 25 % above its lower bound; routing zipf:1; without knee"
    )
    two = make_trace([{"end_ps": US}, {"layer": 1, "start_ps": US, "end_ps": 3 * US}], gap_us=4)
    assert plot_timeline(two, new_ax()).get_title(loc="left").endswith("2 layers with 4 µs of dense compute between")


def test_waiting_for_a_ticket_is_told_from_waiting_for_inputs() -> None:
    trace = make_trace([{"asked_ps": US, "ticket_ps": 3 * US, "start_ps": 4 * US, "end_ps": 5 * US}], num_workers=1)
    ax = plot_timeline(trace, new_ax())
    np.testing.assert_allclose(bars(ax, TIME_COLOURS["ticket"])[:, :2], [(1, 3)])
    np.testing.assert_allclose(bars(ax, TIME_COLOURS["inputs"])[:, :2], [(3, 4)])
    assert "waits for\na ticket" in legend(ax)


def test_layers_are_told_apart() -> None:
    trace = make_trace(
        [
            {"end_ps": 2 * US},
            {"pe": 1, "task_id": 0, "end_ps": 4 * US},
            {"layer": 1, "task_id": 0, "start_ps": 5 * US, "end_ps": 10 * US},
        ],
        ep_size=2,
        num_workers=1,
    )
    ax = plot_timeline(trace, new_ax())
    ends = ax.collections[-1].get_segments()  # of layer 0, on each PE; the end of the last layer is the makespan
    np.testing.assert_allclose(ends, [[(2, 0), (2, 1)], [(4, 1), (4, 2)]])
    [above] = ax.child_axes
    assert [label.get_text() for label in above.get_xticklabels()] == ["layer 0", "layer 1"]
    np.testing.assert_allclose(above.get_xticks(), [2, 7])  # the middles of 0..4 and 4..10 µs
    assert "layer ended\non this PE" in legend(ax)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"machine": "mi300x", "machine_parameters": {"num_cores": 0}}, "XCD"),
        ({"machine": "host", "executor": "cpu"}, "group"),
        ({"machine": "h200", "machine_parameters": {"num_cores": 0}}, "group"),
        ({"machine": "sm_90", "executor": "cuda"}, "group"),
        ({"machine": "small", "machine_parameters": {"num_cores": 4}}, "group"),
    ],
)
def test_domains_are_called_what_they_are(header: dict[str, Any], word: str) -> None:
    assert small_trace(**header).domain_word == word
    minor = plot_timeline(small_trace(**header), new_ax()).get_yticklabels(minor=True)
    assert minor[0].get_text() == f"{word} 0, worker 0"


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


def test_mirrored_names_policies_where_both_are_simulated() -> None:
    ax = plot_mirrored(small_trace(), small_trace(policy="ticket"), new_ax())
    assert ax.get_ylabel() == "ticket, below   |   static_phase, above"


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
    how = "(curve: each stream\nspread evenly)"
    assert legend(ax) == ["all kinds", f"ceiling 6 GB/s\n{how}"]
    per_pe = plot_hbm(small_trace(), new_ax(), per_pe=True, ceiling_bytes_per_ns=3.0)
    np.testing.assert_allclose(steps(per_pe)[1].values, np.where((middle > 2) & (middle < 6), 1, 0), atol=1e-9)
    assert legend(per_pe) == ["PE 0", "PE 1", f"ceiling 3 GB/s\n{how}"]


def test_the_ceiling_is_that_of_pes_at_their_speed() -> None:
    trace = small_trace(pe_speed=[1.0, 0.5])
    ax = plot_hbm(trace, new_ax(), ceiling_bytes_per_ns=4.0)
    assert [line.get_ydata()[0] for line in ax.lines] == [6]
    assert legend(ax)[-1].startswith("ceiling 6 GB/s")
    per_pe = plot_hbm(trace, new_ax(), per_pe=True, ceiling_bytes_per_ns=4.0)
    assert [line.get_ydata()[0] for line in per_pe.lines] == [2, 4]
    assert legend(per_pe)[-1].startswith("ceiling 2 to 4 GB/s")


def test_hbm_follows_the_stream() -> None:
    # streams from 1 µs (its ticket) to 3 µs, runs from 2 to 6 µs
    task = {"ticket_ps": 1 * US, "start_ps": 2 * US, "loaded_ps": 3 * US, "end_ps": 6 * US, "hbm_bytes": 4_000}
    trace = make_trace([task], num_workers=1, machine_parameters={"prefetch": True})
    [total] = steps(plot_hbm(trace, new_ax()))
    middle = (total.edges[:-1] + total.edges[1:]) / 2
    # the steps at whose edge the stream begins or ends are partly filled
    inside, outside = (middle > 1.02) & (middle < 2.98), (middle < 0.98) | (middle > 3.02)
    np.testing.assert_allclose(total.values[inside], 2, atol=1e-9)  # 4000 bytes in 2000 ns
    np.testing.assert_allclose(total.values[outside], 0, atol=1e-9)


def test_queue_length_by_hand() -> None:
    trace = make_trace(
        [
            {"end_ps": 4 * US},
            {"worker": 1, "ready_ps": 2 * US, "ticket_ps": 2 * US, "start_ps": 5 * US, "end_ps": 10 * US},
            {"ready_ps": 3 * US, "ticket_ps": 4 * US, "start_ps": 6 * US, "end_ps": 8 * US, "kind": "down"},
        ],
        num_workers=2,
    )
    ax = plot_queue_length(trace, new_ax())
    up, down, idle = steps(ax)
    middle = (up.edges[:-1] + up.edges[1:]) / 2
    expected_up = np.where((middle > 2) & (middle < 5), 1, 0)
    np.testing.assert_allclose(up.values, expected_up, atol=1e-6)
    np.testing.assert_allclose(down.values, expected_up + np.where((middle > 3) & (middle < 6), 1, 0), atol=1e-6)
    # of two workers: one busy in 0..4 µs, none in 4..5, one in 5..6, two in 6..8, one in 8..10
    np.testing.assert_allclose(
        idle.values, np.select([middle < 4, middle < 5, middle < 6, middle < 8], [1, 2, 1, 0], 1), atol=1e-6
    )
    assert ax.get_ylabel() == "tasks ready, not started\n(all PEs)"


# ---- roofline

MACHINE = {"num_cores": 0, "hbm_bytes_per_ns": 100.0, "cu_bytes_per_ns": 60.0, "cu_flops_per_ns": 500.0}
BF16 = {"name": "m", "dtype": "bf16"}


def roofline_trace(**header: Any) -> Trace:
    """2 PEs x 2 workers: 8 tokens x 1000 weights over 4 µs, 2 tokens x 2000 weights over the last 5 of 10 µs."""
    up = {"num_tokens": 8, "hbm_bytes": 2_000, "end_ps": 4 * US}
    down = {"num_tokens": 2, "hbm_bytes": 4_000, "ticket_ps": 5 * US, "start_ps": 6 * US, "end_ps": 10 * US}
    return make_trace(
        [up, {**down, "kind": "down"}],
        **{"ep_size": 2, "num_workers": 2, "model": BF16, "machine_parameters": MACHINE, **header},
    )


def points(ax: Axes) -> dict[str, tuple[float, float]]:
    """x and y of each single point, by its legend."""
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    return {str(line.get_label()): (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines}


def test_roofline_by_hand() -> None:
    ax = plot_roofline(roofline_trace(), new_ax())
    # TFLOP/s = flop/ns / 1000. up: 16 000 flop over 2000 bytes in 4000 ns; down: 8000 over 4000, in hand for 5000 ns
    expected = {
        "up tasks": (8.0, 4e-3),
        "down tasks": (2.0, 1.6e-3),
        # 24 000 flop over 6000 bytes in 10 000 ns: 4 flop/byte at 2.4 flop/ns. Its roof: 4 x 200 bytes/ns = 800 flop/ns
        "the run: 0 % of its roof": (4.0, 2.4e-3),
    }
    drawn = points(ax)
    assert drawn.keys() == expected.keys()
    for name, point in expected.items():
        assert drawn[name] == pytest.approx(point)
    [roof] = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    x, y = np.asarray(roof.get_xdata()), np.asarray(roof.get_ydata())
    # 2 PEs x 100 bytes/ns and 4 workers x 500 flop/ns meet at 10 flop/byte
    assert (x[1], y[1]) == pytest.approx((10, 2.0))
    np.testing.assert_allclose(y, np.minimum(x * 200, 2000) / 1000)
    assert ax.get_ylabel() == "rate of 2 PEs together [TFLOP/s]"


def test_roofline_counts_the_time_of_a_kind_once() -> None:
    spans = [(0, 4), (1, 2), (3, 6), (8, 9)]  # nested, overlapping and apart: 7 µs in all
    tasks = [
        {"worker": worker, "num_tokens": 1, "hbm_bytes": 700, "ticket_ps": a * US, "start_ps": a * US, "end_ps": b * US}
        for worker, (a, b) in enumerate(spans)
    ]
    ax = plot_roofline(make_trace(tasks, model=BF16, machine_parameters=MACHINE), new_ax())
    assert points(ax)["up tasks"] == pytest.approx((1.0, 4 * 700 / 7_000 / 1000))


@pytest.mark.parametrize(
    ("machine", "memory", "arithmetic"),
    [
        ({**MACHINE, "cu_bytes_per_ns": 20.0}, "80 GB/s", "2 TFLOP/s"),  # 4 workers cannot use up the memory
        ({**MACHINE, "num_cores": 3}, "100 GB/s", "1.5 TFLOP/s"),  # the PEs of a host share memory and cores
    ],
)
def test_roofs_of_other_machines(machine: dict[str, Any], memory: str, arithmetic: str) -> None:
    ax = plot_roofline(roofline_trace(machine_parameters=machine), new_ax())
    written = [text.get_text().strip() for text in ax.texts]
    assert written == [f"memory, {memory}", f"arithmetic, {arithmetic}"]


def test_roofline_of_several_runs() -> None:
    ax = plot_roofline({"a": roofline_trace(), "b": roofline_trace(policy="ticket")}, new_ax())
    assert list(points(ax)) == ["a: 0 % of its roof", "b: 0 % of its roof"]
    assert "policy" not in ax.get_title(loc="left")  # what they do not share
    other = roofline_trace(machine_parameters={**MACHINE, "hbm_bytes_per_ns": 50.0})
    with pytest.raises(ValueError, match="2 different machines"):
        plot_roofline({"a": roofline_trace(), "b": other}, new_ax())
    with pytest.raises(ValueError, match="does not say on which machine"):
        plot_roofline(small_trace(), new_ax())
    with pytest.raises(ValueError, match="no traces"):
        plot_roofline({}, new_ax())


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(down="rows"), Tiling(granularity="token")], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_work_of_a_task_is_that_of_the_task_graph(tiling: Tiling, dtype: str) -> None:
    model = MoEModel(d_model=64, d_ff=24, num_experts=8, top_k=2, dtype=dtype)
    table = TaskTable(model, Routing.zipf(model, 5, 2, exponent=1.0), tiling)
    records = np.zeros(len(table), TRACE_DTYPE)
    for field in ("pe", "task_id", "kind", "num_tokens"):
        records[field] = table.tasks[field]
    records["hbm_bytes"] = table.tasks["weight_bytes"]
    trace = Trace(records, {**make_trace([]).header, **table.header()}, np.zeros(0, np.int64))
    in_matrices = np.isin(trace.kind_names, ["gate", "up", "down", "expert"])
    np.testing.assert_array_equal(flops_of(trace)[in_matrices], table.tasks["flops"][in_matrices])


# ---- several runs


def totals(**times_us: float) -> Totals:
    """Of one PE with one worker, whose time is as given."""
    time_ps = {name: round(times_us.get(name, 0) * US) for name in TIME_SHARES}
    return Totals(
        makespan_ps=sum(time_ps.values()),
        bounds_ps={"hbm": 4 * US},
        bound_ps=4 * US,
        headroom=0.0,
        num_tasks=1,
        ep_size=1,
        num_workers=1,
        layers=1,
        layer_end_ps=[0],
        hbm_bytes=0,
        link_bytes=0,
        distinct_weight_bytes=0,
        time_ps=time_ps,
        utilisation={},
    )


def segments(ax: Axes, colour: str) -> list[tuple[float, float]]:
    """Left end and length of each bar of a colour, from top to bottom."""
    return [(p.get_x(), p.get_width()) for p in ax.patches if to_hex(p.get_facecolor()) == colour.lower()]


def test_worker_time_adds_up_to_the_makespan() -> None:
    runs = {"one": totals(stream=5, other=1), "two": totals(ticket=2, inputs=3, compute=4)}
    ax = plot_worker_time(runs, new_ax(), title="both")
    assert segments(ax, TIME_COLOURS["ticket"]) == [(0, 0), (0, 2)]
    assert segments(ax, TIME_COLOURS["inputs"]) == [(0, 0), (2, 3)]
    assert segments(ax, TIME_COLOURS["stream"]) == [(0, 5), (5, 0)]
    assert segments(ax, TIME_COLOURS["compute"]) == [(5, 0), (5, 4)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert [text.get_text() for text in ax.texts] == ["6 µs", "9 µs"]
    assert [float(line[0][0]) for line in ax.collections[0].get_segments()] == [4, 4]  # the bounds
    assert legend(ax)[-1].startswith("lower bound")
    assert ax.get_title(loc="left") == "both"


def test_worker_time_of_a_trace() -> None:
    # one worker: 1 µs for the ticket, 2 for inputs, 3 for weights, 4 to compute
    task = {"ticket_ps": 1 * US, "start_ps": 3 * US, "loaded_ps": 6 * US, "end_ps": 10 * US}
    ax = plot_worker_time({"run": make_trace([{"asked_ps": 0, **task}], num_workers=1)}, new_ax())
    for name, segment in {"ticket": (0, 1), "inputs": (1, 2), "stream": (3, 3), "compute": (6, 4)}.items():
        assert segments(ax, TIME_COLOURS[name]) == [pytest.approx(segment)]
    assert ax.get_title(loc="left") == "simulated, mi300x, qwen3-30b-a3b, policy static_phase, 8 tokens per PE, EP 1"
    assert not any(label.startswith("lower bound") for label in legend(ax))  # this trace knows none
    with pytest.raises(ValueError, match="no runs"):
        plot_worker_time({}, new_ax())


def sweep_frame() -> Any:
    rows = [
        {"machine": "mi300x", "policy": policy, "tokens": n, "seed": seed, "makespan_us": n * slower + seed}
        for policy, slower in (("ticket", 20.0), ("static", 10.0))
        for n in (32, 1, 4)
        for seed in (0, 2)
    ]
    return pandas.DataFrame(rows).assign(bound_ps=lambda frame: frame["tokens"] * 5 * US)


def test_makespan_over_tokens() -> None:
    ax = plot_makespan(sweep_frame(), new_ax())
    ticket, static, bound = ax.get_lines()
    assert legend(ax) == ["ticket", "static", "lower bound"]  # one bound: it is the same for both
    np.testing.assert_allclose(np.transpose(ticket.get_data()), [(1, 21), (4, 81), (32, 641)])  # means over the seeds
    np.testing.assert_allclose(np.transpose(static.get_data()), [(1, 11), (4, 41), (32, 321)])
    np.testing.assert_allclose(np.transpose(bound.get_data()), [(1, 5), (4, 20), (32, 160)])
    [band, _] = ax.collections
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (20, 642)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens per PE", "makespan [µs]")
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_title(loc="left") == "simulated, mi300x"


def test_makespan_with_bounds_of_their_own_and_a_linear_axis() -> None:
    frame = sweep_frame()[lambda rows: rows["tokens"] < 32]
    frame.loc[frame["policy"] == "ticket", "bound_ps"] *= 2
    ax = plot_makespan(frame, new_ax(), title="two")
    assert legend(ax) == ["ticket", "static", "bound: ticket", "bound: static"]
    assert ax.get_xscale() == ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0
    with pytest.raises(ValueError, match=r"no column 'ep' \(columns: machine, policy"):
        plot_makespan(frame, new_ax(), over="ep")


def test_heat_map_by_hand() -> None:
    frame = sweep_frame()
    missing = (frame["policy"] == "ticket") & (frame["tokens"] == 4)
    ax = plot_heat_map(frame[~missing], new_ax(), x="tokens", y="policy")
    cells = ax.images[0].get_array()
    np.testing.assert_allclose(cells.filled(-1), [[21, -1, 641], [11, 41, 321]])  # columns by number, rows as they come
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "32"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ticket", "static"]
    assert [text.get_text() for text in ax.texts] == ["21", "641", "11", "41", "321"]
    assert ax.images[0].colorbar is not None
    assert ax.images[0].colorbar.ax.get_ylabel() == "makespan [µs]"
    with pytest.raises(ValueError, match="no column 'headroom'"):
        plot_heat_map(frame, new_ax(), x="tokens", y="policy", value="headroom")


@pytest.mark.parametrize(
    ("column", "label", "factor"),
    [
        ("makespan_us", "makespan [µs]", 1),
        ("bound_ps", "bound [µs]", 1e-6),
        ("link_bytes", "link [MB]", 1e-6),
        ("link_bytes_per_ns", "link [GB/s]", 1),
        ("hbm_utilisation", "hbm utilisation [%]", 100),
        ("headroom", "time above the lower bound [%]", 100),
        ("up_rows", "up rows", 1),
    ],
)
def test_columns_have_units(column: str, label: str, factor: float) -> None:
    assert column_label(column) == (label, factor)


# ---- two runs, task by task


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
    for made in (
        figure_timeline(simulated),
        figure_mirrored(simulated, measured),
        figure_overview(simulated, ceiling_bytes_per_ns=4_200),
    ):
        picture = io.BytesIO()
        made.savefig(picture, format="png", dpi=50)
        assert picture.getvalue().startswith(b"\x89PNG")


def test_any_plot_can_be_saved() -> None:
    made = figure(plot_heat_map, sweep_frame(), x="tokens", y="policy", inches=(5, 3))
    assert tuple(made.get_size_inches()) == (5, 3)
    picture = io.BytesIO()
    made.savefig(picture, format="png", dpi=50)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_a_trace_without_tasks_can_be_drawn() -> None:
    empty = make_trace([])
    plot_queue_length(empty, new_ax())
    plot_worker_time({"nothing": empty}, new_ax())
    plot_roofline(make_trace([], machine_parameters=MACHINE), new_ax())
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
