"""Results on disk: whatever is killed when, no row that was written is lost, and none is there twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from flashmoe.results import Results


def row(digest: str, **values: Any) -> dict[str, Any]:
    return {"digest": digest, "error": None, **values}


def test_rows_come_back_in_the_order_that_one_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with Results(path) as results:
        results.append([row("a", makespan_us=1.5, layers=[1, 2]), row("b", makespan_us=2, note="x")])
        frame = results.frame(["b", "a"])
        assert frame["makespan_us"].tolist() == [2.0, 1.5]
        assert frame["note"].tolist()[0] == "x" and frame["layers"][1].tolist() == [1, 2]
    assert [item.name for item in tmp_path.iterdir()] == ["r.parquet"]
    assert pandas.read_parquet(path)["digest"].tolist() == ["a", "b"]


def test_nothing_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with Results(tmp_path / "r.parquet") as results:
        assert results.errors() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_byte(tmp_path: Path) -> None:
    lines = [json.dumps(row(digest, error=error)) + "\n" for digest, error in (("a", None), ("bé", "no"), ("c", None))]
    held = "".join(lines).encode()
    ends = [len("".join(lines[:n]).encode()) for n in range(4)]
    path = tmp_path / "r.parquet"
    for length in range(len(held) + 1):
        path.unlink(missing_ok=True)
        (tmp_path / "r.parquet.journal").write_bytes(held[:length])
        whole = sum(end <= length for end in ends[1:])
        with Results(path) as results:
            assert list(results.errors().items()) == [("a", None), ("bé", "no"), ("c", None)][:whole]
            results.append([row("d")])
        assert pandas.read_parquet(path)["digest"].tolist() == [*["a", "bé", "c"][:whole], "d"]


def test_a_kill_while_the_journal_is_moved(tmp_path: Path) -> None:
    path, journal = tmp_path / "r.parquet", tmp_path / "r.parquet.journal"
    results = Results(path)
    results.append([row("a", value=1), row("b", value=2)])
    held = journal.read_bytes()
    results.__exit__(None, None, None)
    journal.write_bytes(held)  # killed between the two steps: the rows are in both files
    (tmp_path / "r.parquet.new").write_bytes(b"PAR1 half of a file")  # and once before, in the middle of the first
    with Results(path) as results:
        results.append([row("c", value=3)])
    frame = pandas.read_parquet(path)
    assert (frame["digest"].tolist(), frame["value"].tolist()) == (["a", "b", "c"], [1, 2, 3])


def test_compacting_now_and_then_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with Results(path) as results:
        results.append([row("a", value=1)])
        results.compact()
        assert pandas.read_parquet(path)["value"].tolist() == [1]
        results.append([row("b", other="x")])  # a column that the file does not have yet
        assert results.frame(["a", "b"])["other"].tolist()[1] == "x"
        results.append([{**row("a", value=5), "error": "again"}])  # the later row counts
        assert results.errors() == {"a": "again", "b": None}
    frame = pandas.read_parquet(path).set_index("digest")
    assert len(frame) == 2 and frame.loc["a", "value"] == 5 and frame.loc["b", "other"] == "x"


def test_an_error_inside_keeps_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(KeyboardInterrupt), Results(path) as results:
        results.append([row("a")])
        raise KeyboardInterrupt
    assert pandas.read_parquet(path)["digest"].tolist() == ["a"]


def test_an_interrupt_while_rows_are_written_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    path = tmp_path / "r.parquet"
    with pytest.raises(KeyboardInterrupt), Results(path) as results:
        monkeypatch.setattr("os.fsync", interrupt)
        results.append([row("a")])
    assert pandas.read_parquet(path)["digest"].tolist() == ["a"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with Results(path), pytest.raises(ValueError, match=r"another process is writing to .*r\.parquet\.journal"):
        Results(path)
    with Results(path):
        pass


def test_other_files_are_refused_and_kept(tmp_path: Path) -> None:
    path, journal = tmp_path / "r.parquet", tmp_path / "r.parquet.journal"
    path.write_text("no table")
    with pytest.raises(ValueError, match=r"cannot read .*r\.parquet"):
        Results(path)
    assert path.read_text() == "no table"
    pandas.DataFrame({"x": [1]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"r\.parquet is not a table of results"):
        Results(path)
    path.unlink()
    journal.write_text('{"digest": "a", "error": null}\nspoilt\n{"digest": "c", "error": null}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        Results(path)
    journal.write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no row of results"):
        Results(path)
    assert journal.read_text() == '{"x": 1}\n'
