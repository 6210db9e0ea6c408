from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from traces import layer_trace, make_trace

from flashmoe.compare import compare
from flashmoe.trace import Trace

US = 1_000_000  # ps


def simulated() -> Trace:
    return make_trace(
        [
            {
                "kind": "gate",
                "task_id": 0,
                "ready_ps": 0,
                "ticket_ps": 1 * US,
                "start_ps": 1 * US,
                "end_ps": 3 * US,
            },
            {"task_id": 1, "ready_ps": 4 * US, "ticket_ps": 3 * US, "start_ps": 5 * US, "end_ps": 9 * US},
            {"task_id": 2, "ready_ps": 4 * US, "ticket_ps": 9 * US, "start_ps": 9 * US, "end_ps": 15 * US},
            {"task_id": 3, "end_ps": 1 * US, "expert": 4, "tile": 7},
        ]
    )


def measured(**header: Any) -> Trace:
    return make_trace(
        [
            {"task_id": 9, "kind": "combine", "end_ps": 20 * US},
            {"task_id": 2, "start_ps": 0, "end_ps": 8 * US},
            {"task_id": 1, "start_ps": 8 * US, "end_ps": 10 * US},
            {"task_id": 0, "kind": "gate", "start_ps": 8 * US, "end_ps": 8 * US},
        ],
        executor="cpu",
        machine="host",
        **header,
    )


def test_errors_by_hand() -> None:
    result = compare(simulated(), measured()).to_dict()
    assert (result["matched"], result["unmatched_left"], result["unmatched_right"]) == (3, 1, 1)
    assert result["makespan_us"] == {"left": 15.0, "right": 20.0}
    assert (result["makespan_gap_us"], result["makespan_gap_pct"]) == (-5.0, -25.0)
    # up: 4 and 6 µs on the left, 2 and 8 on the right
    assert result["by_kind"]["up"] == {
        "count": 2,
        "left_mean_us": 5.0,
        "right_mean_us": 5.0,
        "bias_pct": 0.0,
        "mape_pct": 62.5,  # 100 % and 25 %
        "p95_abs_us": 2.0,
    }
    # gate: 2 µs on the left, none at all on the right: no percentage exists
    assert result["by_kind"]["gate"] == {
        "count": 1,
        "left_mean_us": 2.0,
        "right_mean_us": 0.0,
        "bias_pct": None,
        "mape_pct": None,
        "p95_abs_us": 2.0,
    }
    assert list(result["by_kind"]) == ["gate", "up"]
    assert result["warnings"] == ["1 gate tasks took no time on the right; left out of its MAPE"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_task_without_time_is_left_out_of_mape_only() -> None:
    left = make_trace([{"end_ps": 3 * US}, {"end_ps": 3 * US}])
    right = make_trace([{"end_ps": 2 * US}, {"end_ps": 0}])
    row = compare(left, right).by_kind["up"]
    assert (row["count"], row["mape_pct"], row["bias_pct"]) == (2, 50.0, 200.0)
    assert row["p95_abs_us"] == pytest.approx(1 + 0.95 * 2)  # between errors of 1 and 3 µs


def test_components_by_hand() -> None:
    components = compare(simulated(), measured()).components
    assert components["gate"]["left"] == {
        "wait_for_inputs_us": 0.0,
        "wait_for_worker_us": 1.0,
        "wait_to_start_us": 0.0,
        "execute_us": 2.0,
    }
    # task 1 waited 1 µs for inputs and 1 more to start; task 2 waited 5 µs for a worker
    assert components["up"]["left"] == {
        "wait_for_inputs_us": 0.5,
        "wait_for_worker_us": 2.5,
        "wait_to_start_us": 0.5,
        "execute_us": 5.0,
    }


def test_order_of_starts_by_hand() -> None:
    # starts 1, 5, 9 against 8, 8, 0: ranks 1, 2, 3 against 2.5, 2.5, 1; Spearman -1.5 / sqrt(2 * 1.5)
    assert compare(simulated(), measured()).start_order_correlation == pytest.approx(-1.5 / 3**0.5)


def test_order_of_starts_against_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    left = layer_trace(ep_size=2, num_workers=5)
    right = layer_trace(ep_size=2, num_workers=5, seed=1)
    result = compare(left, right)
    starts = pandas.DataFrame({"l": result.matched_left["start_ps"], "r": result.matched_right["start_ps"]})
    assert result.start_order_correlation == pytest.approx(starts.rank().corr().loc["l", "r"], abs=1e-12)


def test_a_trace_agrees_with_itself_in_any_order_of_records() -> None:
    trace = layer_trace(ep_size=3, num_workers=4)
    shuffled = Trace(
        trace.records[np.random.default_rng(0).permutation(len(trace.records))],
        trace.header,
        np.zeros(0, np.int64),
    )
    result = compare(trace, shuffled)
    assert result.matched == len(trace.records)
    assert (result.matched_left == result.matched_right).all()
    assert result.start_order_correlation == pytest.approx(1)
    assert result.warnings == []
    for row in result.by_kind.values():
        assert (row["bias_pct"], row["mape_pct"], row["p95_abs_us"]) == (0, 0, 0)
    assert sum(row["count"] for row in result.by_kind.values()) == result.matched
    assert "the same" in result.table()


def test_pes_are_not_mixed_up() -> None:
    left = make_trace([{"pe": 0, "task_id": 7, "end_ps": 1}, {"pe": 1, "task_id": 7, "end_ps": 2}], ep_size=2)
    right = make_trace([{"pe": 1, "task_id": 7, "end_ps": 2}], ep_size=2)
    result = compare(left, right)
    assert (result.matched, result.unmatched_left["pe"].tolist()) == (1, [0])
    assert result.by_kind["up"]["bias_pct"] == 0


def test_layers_are_not_mixed_up() -> None:
    left = make_trace([{"layer": 0, "task_id": 7, "end_ps": 1}, {"layer": 1, "task_id": 7, "end_ps": 2}], layers=2)
    right = make_trace([{"layer": 1, "task_id": 7, "end_ps": 2}, {"layer": 2, "task_id": 7, "end_ps": 4}], layers=3)
    result = compare(left, right)
    assert (result.matched, result.unmatched_left["layer"].tolist()) == (1, [0])
    assert result.by_kind["up"]["bias_pct"] == 0
    assert result.warnings == ["layers differs: 2 on the left, 3 on the right"]
    assert "Only on the right, 1: layer 2 PE 0 task 7 (up)." in result.table()


def test_a_task_that_is_there_twice_is_named() -> None:
    twice = make_trace([{"task_id": 5}, {"task_id": 6}, {"task_id": 5}])
    with pytest.raises(ValueError, match="left trace holds PE 0 task 5 more than once: 2 times"):
        compare(twice, measured())
    with pytest.raises(ValueError, match="right trace holds PE 0 task 5 more than once: 2 times"):
        compare(measured(), twice)


def test_headers_that_differ_are_named() -> None:
    other = measured(
        model={"name": "qwen3-30b-a3b", "d_model": 96, "d_ff": 768},
        routing="f" * 16,
        tiling={"down": "rows"},
        ep_size=2,
        seed=7,  # another seed is no reason for doubt: the routing is what counts
    )
    warnings = compare(simulated(), other).warnings
    assert warnings[:4] == [
        "model differs: {'d_model': 2048} on the left, {'d_model': 96} on the right",
        "routing differs: 0123456789abcdef on the left, ffffffffffffffff on the right",
        "tiling differs: {'down': 'tile'} on the left, {'down': 'rows'} on the right",
        "ep_size differs: 1 on the left, 2 on the right",
    ]
    assert len(warnings) == 5  # the fifth: the gate task without time


def test_joined_tasks_of_another_kind_are_left_out_of_the_errors() -> None:
    left = make_trace([{"end_ps": 1}, {"end_ps": 1}])
    right = make_trace([{"end_ps": 1}, {"end_ps": 9, "kind": "down"}])
    result = compare(left, right)
    assert (result.matched, result.by_kind["up"]["count"]) == (2, 1)
    assert result.warnings == [
        "1 joined tasks are of another kind on the right, first: PE 0 task 1 (up) is down there; not in by_kind"
    ]


def test_nothing_in_common() -> None:
    result = compare(make_trace([{"task_id": 1, "end_ps": 5 * US}]), make_trace([]))
    as_dict = result.to_dict()
    assert (as_dict["matched"], as_dict["unmatched_left"], as_dict["by_kind"]) == (0, 1, {})
    assert (as_dict["makespan_gap_pct"], as_dict["start_order_correlation"]) == (None, None)
    json.dumps(as_dict, allow_nan=False)
    assert "Makespan: left 5.00 µs, right 0.00 µs." in result.table()


def test_table_names_what_is_unmatched_and_the_gap() -> None:
    table = compare(simulated(), measured()).table()
    assert "left:  simulated (simpy), mi300x" in table
    assert "right: measured (cpu), host" in table
    assert "3 tasks in both" in table
    assert "Only on the left, 1: PE 0 task 3 (up, expert 4 tile 7)." in table
    assert "Only on the right, 1: PE 0 task 9 (combine)." in table
    assert "left is 5.00 µs (25.0 %) shorter." in table
    [row] = [line for line in table.splitlines() if line.split()[:2] == ["up", "2"]]
    assert row.split() == ["up", "2", "5.000", "5.000", "+0.0", "62.5", "2.000"]
    [row] = [line for line in table.splitlines() if line.split()[:2] == ["gate", "1"]]
    assert row.split() == ["gate", "1", "2.000", "0.000", "-", "-", "2.000"]


def test_a_long_list_of_unmatched_is_cut() -> None:
    table = compare(make_trace([{}] * 8), make_trace([])).table()
    assert "Only on the left, 8: PE 0 task 0 (up);" in table
    assert "; and 3 more." in table
