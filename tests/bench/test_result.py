"""Rows of a benchmark: shares by hand, files there and back, tables."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from bench.measured import row, small_result

from flashmoe.bench import tables
from flashmoe.bench.result import Missing, Result


def test_the_ceiling_is_the_fastest_read_and_the_share_is_of_it() -> None:
    result = small_result()
    assert result.ceiling("gate", 1).variant == "bulk copies"
    assert result.ceiling("gate", 8).variant == "loads"
    ours = result.find("gate", 8, "flashmoe", "gate")
    assert ours is not None and result.share(ours) == 0.8  # 100 of 125 us


def test_without_a_read_there_is_no_ceiling() -> None:
    with pytest.raises(ValueError, match="no read ceiling for 8 tokens, routing gate"):
        Result({}, [row(8, "flashmoe", "gate", "tuned", 1.0)], []).ceiling("gate", 8)


@pytest.mark.parametrize(
    ("error", "right"), [(None, True), (0.0099, True), (0.01, False), (float("nan"), False), (float("inf"), False)]
)
def test_a_result_is_right_below_the_tolerance_only(error: float | None, right: bool) -> None:
    assert row(1, "torch", "gate", "", 1.0, error=error).right == right


def test_a_saved_result_comes_back(tmp_path: Path) -> None:
    result = small_result()
    result.save(tmp_path / "bench.json")
    again = Result.load(tmp_path / "bench.json")
    assert again.header == result.header and again.missing == result.missing
    wrong = result.find("gate", 8, "torch")
    assert [a for a in again.measurements if a.right] == [b for b in result.measurements if b is not wrong]
    assert [math.isnan(a.error or 0) for a in again.wrong()] == [True]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"header": {}, "measurements": [{"tokens": 1}], "missing": []}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*other.json as a benchmark's result"):
        Result.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot read"):
        Result.load(tmp_path / "nothing.json")


def test_csv_has_every_row_with_its_share(tmp_path: Path) -> None:
    result = small_result()
    result.save_csv(tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.measurements)
    ours = next(r for r in rows if (r["tokens"], r["who"], r["how"]) == ("8", "flashmoe", "gate"))
    assert (ours["median_us"], ours["share_of_ceiling"], ours["error"]) == ("125.000", "0.8000", "2.00e-03")
    assert ours["weight_bytes"] == "471859200"  # 50 experts of 3 x 2048 x 768 bf16


def test_layer_table() -> None:
    columns, rows = tables.layer_table(small_result(), "gate")
    assert columns[3:] == [
        "read\nµs", "TB/s", "ours\nµs", "spread\nµs", "share", "given\nµs", "share", "alone\nµs",
    ]  # fmt: skip
    # 8 experts of 9,437,184 bytes in 20 us are 3.77 TB/s
    assert rows[0] == ["1", "8.0", "75", "20.0", "3.77", "25.0", "5.0", "0.800", "22.0", "0.909", "30.0"]


def test_a_routing_from_outside_has_no_column_for_the_gate() -> None:
    rows = [
        row(8, "read", "read", "loads", 100.0, routing="zipf:1.2"),
        row(8, "flashmoe", "given", "tuned", 125.0, routing="zipf:1.2"),
    ]
    columns, cells = tables.layer_table(Result({}, rows, []), "zipf:1.2")
    assert columns[5:] == ["given\nµs", "spread\nµs", "share", "alone\nµs"]
    assert cells[0][5:] == ["125.0", "25.0", "0.800", "-"]


def test_peers_stand_beside_ours_and_wrong_is_no_time() -> None:
    columns, rows = tables.peer_table(small_result(), "gate")
    assert columns == ["tokens", "ours\nµs", "torch\nµs", "times\nours"]
    assert rows == [["1", "25.0", "100.0", "4.00"], ["8", "125.0", "wrong", "-"]]


def test_policies_name_their_kernel() -> None:
    columns, rows = tables.policy_table(small_result(), "gate")
    assert columns == ["policy", "kernel", "1 tokens", "8 tokens"]
    assert rows == [["tuned", "pipeline", "25.0", "125.0"], ["push", "general", "40.0", "200.0"]]
    alone = Result({}, [r for r in small_result().measurements if r.variant != "push"], [])
    assert tables.policy_table(alone, "gate") == ([], [])


def test_notes_say_what_is_missing_and_what_is_wrong() -> None:
    notes = tables.notes(small_result())
    assert "Not measured: vllm (not installed)." in notes
    assert "Not measured: torch at 8 tokens (RuntimeError: no)." in notes
    assert "Wrong: torch gate, 8 tokens, routing gate: nan." in notes
    assert "All replays gave the same bits." in notes  # of the right ones


def test_what_is_missing_for_one_reason_is_one_line() -> None:
    gaps = [("push", 8), ("push", 64), ("push", 8), ("ancestor", 8), ("ancestor", 64)]
    missing = [Missing(who=who, tokens=tokens, reason="no such kernel") for who, tokens in gaps]
    missing.append(Missing(who="push", tokens=1, reason="other"))
    lines = [line for line in tables.notes(Result(small_result().header, [], missing)) if "Not measured" in line]
    assert lines == [
        "Not measured: push, ancestor at 8, 64 tokens (no such kernel).",
        "Not measured: push at 1 tokens (other).",
    ]


def test_readme_has_the_command_and_the_tables() -> None:
    text = tables.readme(small_result())
    assert "`flashmoe bench --tokens 1,8`" in text
    assert "| tokens | ours µs | torch µs | times ours |\n" in text and "| 8 | 125.0 | wrong | - |\n" in text
    assert "NVIDIA H200, driver 580.1, CUDA 13.0" in text and "2.4 GB" in text


def test_json_has_no_nan(tmp_path: Path) -> None:
    small_result().save(tmp_path / "bench.json")
    told = json.loads((tmp_path / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [r["error"] for r in told["measurements"] if r["who"] == "torch"] == [2e-3, 2e-3, "nan"]
