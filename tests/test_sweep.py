"""Sweeps: what they simulate, that a kill loses nothing and repeats nothing, and what they say at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe import points
from flashmoe.cli import app
from flashmoe.sweep import summarise, sweep

TINY = {"model.d_model": 64, "model.d_ff": 32, "model.num_experts": 8, "model.top_k": 2, "ep": 2, "workers": 4}
TINY_MODEL = fm.MoEModel.preset("qwen3-30b-a3b", d_model=64, d_ff=32, num_experts=8, top_k=2)
SWEEP = [sys.executable, "-c", "from flashmoe.cli import main; main()", "sweep"]


def study(replications: int = 1, **grid: list[Any]) -> dict[str, Any]:
    fixed = {name: value for name, value in TINY.items() if name not in grid}
    return {"fixed": fixed, "grid": grid, "replications": replications}


def run_here(made: Any, out: Path | None = None, **options: Any) -> tuple[pandas.DataFrame, list[tuple[int, int]]]:
    """The frame, and what was told of the progress."""
    told: list[tuple[int, int]] = []
    frame = sweep(made, out, processes=1, progress=lambda *counts: told.append(counts), **options)
    return frame, told


# ---- what is simulated


def test_rows_are_what_evaluate_returns() -> None:
    frame, told = run_here(study(2, policy=["ticket", "static_phase"], tokens=[1, 3]))
    inputs = [(policy, tokens, seed) for seed in (0, 1) for policy in ("ticket", "static_phase") for tokens in (1, 3)]
    assert list(zip(frame["policy"], frame["tokens"], frame["seed"], strict=True)) == inputs
    for row, (policy, tokens, seed) in zip(frame.to_dict("records"), inputs, strict=True):
        # common random numbers: the routing depends on the seed, not on the policy
        routing = fm.Routing.uniform(TINY_MODEL, tokens, 2, seed=seed)
        totals = fm.evaluate(TINY_MODEL, routing=routing, policy=policy, seed=seed, workers=4).to_dict()
        assert {name: row[name] for name in totals} == totals
    assert frame["error"].isna().all()
    assert frame["point"].tolist() == frame["point"].tolist()[:4] * 2 and frame["point"].nunique() == 4
    assert told[0] == (0, 8) and told[-1] == (8, 8)


def test_points_that_are_the_same_simulation_are_made_once() -> None:
    default = fm.Tiling().up_rows
    frame, told = run_here(study(**{"tiling.up_rows": [0, default, 2 * default]}))
    assert frame["tiling.up_rows"].tolist() == [default, 2 * default]
    assert told[-1] == (2, 2)


def test_many_processes_give_the_same(tmp_path: Path) -> None:
    made = study(3, policy=["ticket", "static_phase"], tokens=[1, 2, 4])
    here, there = sweep(made, processes=1), sweep(made, tmp_path / "r.parquet", processes=2)
    pandas.testing.assert_frame_equal(here.drop(columns="wall_s"), there.drop(columns="wall_s"))


def test_a_study_in_a_file_and_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(tokens=[2])))
    mine = fm.Machine.load("h200")
    frame = sweep({"fixed": {**TINY, "tokens": 2}, "grid": {"machine": ["mi300x", mine]}}, processes=1)
    assert frame["machine"].tolist() == ["mi300x", "h200"]
    assert sweep(path, processes=1)["digest"].tolist() == frame["digest"].tolist()[:1]


# ---- what is not simulated again


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    first, _ = run_here(study(tokens=[1, 2]), out)
    again, told = run_here(study(tokens=[1, 2]), out)
    pandas.testing.assert_frame_equal(first, again)  # wall_s, too: nothing ran
    assert told == [(2, 2)]
    _, told = run_here(study(tokens=[2, 3, 4]), out)
    assert told[0] == (1, 3)
    assert sorted(pandas.read_parquet(out)["tokens"]) == [1, 2, 3, 4]  # the other study's rows are still there
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_another_version_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.parquet"
    old, _ = run_here(study(tokens=[1, 2]), out)
    monkeypatch.setattr(points, "version", lambda: "9.9.9, model 99")
    new, told = run_here(study(tokens=[1, 2]), out)
    assert told[0] == (0, 2)
    assert not set(new["digest"]) & set(old["digest"])
    assert sorted(set(pandas.read_parquet(out)["version"])) == sorted({old["version"][0], "9.9.9, model 99"})


def test_failed_points_are_kept_unless_one_asks(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    made = study(ep=[2, 3], tokens=[1, 2], **{"tiling.dispatch_tokens": [1, 3]})  # 3 divides neither 8 nor the experts
    frame, told = run_here(made, out)
    failed = frame[frame["error"].notna()]
    assert (len(frame), len(failed)) == (8, 6) and told[-1] == (8, 8)
    assert failed["error"].str.contains("ep_size=3|dispatch_tokens=3").all()
    assert frame["makespan_ps"].notna().sum() == 2
    assert run_here(made, out)[1] == [(8, 8)]
    _, told = run_here(made, out, retry_failed=True)
    # four do not even fit together, and need no simulation to say so
    assert told[0] == (6, 8)
    assert len(pandas.read_parquet(out)) == 8


def test_nothing_to_simulate() -> None:
    with pytest.raises(ValueError, match=r"first point fails with dispatch_tokens=3"):
        sweep(study(**{"tiling.dispatch_tokens": [3, 5]}), processes=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "r.csv"}, r"r\.csv: unknown suffix \(accepted: \.parquet\)"),
        ({"processes": 0}, "processes=0"),
        ({"processes": 1, "scheduler": "tcp://there:1"}, "processes=1 with scheduler='tcp://there:1'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(study(tokens=[1]), **options)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashmoe.study", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match=r"a sweep needs pydantic: pip install 'flashmoe\[sweep\]'"):
        sweep(study(tokens=[1]))


# ---- kill -9


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, out, journal = (tmp_path / name for name in ("study.yaml", "r.parquet", "r.parquet.journal"))
    path.write_text(yaml.safe_dump({"fixed": {"tokens": 2}, "replications": 240}))  # of some ms each
    command = [
        *SWEEP,
        path,
        "--out",
        out,
        "--processes",
        "2",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 60:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        helpers = descendants(first.pid)
        first.kill()
    assert len(helpers) >= 3  # the fork server and two workers, which end by themselves
    while any(is_running(pid) for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    held = journal.read_bytes()
    before = {row["digest"]: row for row in map(json.loads, held[: held.rfind(b"\n")].split(b"\n"))}
    assert 60 <= len(before) < 240 and not out.exists()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(second.stdout)
    assert (said["simulations"], said["reused"], said["failed"]) == (240, len(before), 0)
    frame = pandas.read_parquet(out).set_index("digest")
    assert sorted(frame["seed"]) == list(range(240)) and frame.index.is_unique
    # how long each took would differ if it had been made again
    assert frame.loc[list(before), "wall_s"].tolist() == [row["wall_s"] for row in before.values()]
    assert not journal.exists()


def descendants(pid: int) -> set[int]:
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(descendants, children))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- summary


def test_summary_against_scipy() -> None:
    frame, _ = run_here(study(12, tokens=[1, 4], ep=[2, 3]))
    summary = summarise(frame)
    assert summary[["tokens", "ep", "runs", "failed"]].values.tolist() == [
        [1, 2, 12, 0],
        [1, 3, 0, 12],
        [4, 2, 12, 0],
        [4, 3, 0, 12],
    ]
    for tokens in (1, 4):
        sample = frame[(frame["tokens"] == tokens) & (frame["ep"] == 2)]["makespan_us"].to_numpy()
        row = summary[(summary["tokens"] == tokens) & (summary["ep"] == 2)].iloc[0]
        of_mean = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx((sample.mean(), *of_mean))
        for name, p in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            interval = stats.quantile_test(sample, p=p).confidence_interval(0.95)
            assert row[name] == np.quantile(sample, p, method="inverted_cdf")
            np.testing.assert_equal((row[f"{name}_low"], row[f"{name}_high"]), tuple(interval))
    assert summary["mean"].isna().tolist() == [False, True, False, True]


def test_summary_of_another_column_and_of_single_runs() -> None:
    frame, _ = run_here(study(tokens=[1, 4]))
    summary = summarise(frame, "hbm_bytes")
    assert summary["mean"].tolist() == frame["hbm_bytes"].tolist() == summary["p99"].tolist()
    assert summary[["mean_low", "mean_high", "p50_low", "p99_high"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="no column 'time'"):
        summarise(frame, "time")


# ---- command line


def call(*arguments: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path, out = tmp_path / "study.yaml", tmp_path / "r.parquet"
    path.write_text(yaml.safe_dump(study(3, policy=["ticket", "static_phase"])))
    lines = call(path, "--out", out, "--processes", 1).stdout.splitlines()
    assert lines[0] == "2 points, 6 simulations, 0 of them made before"
    assert lines[2].split() == ["policy", "mean", "makespan", "95", "%", "sure", "p90", "runs"]
    assert [line.split()[0] for line in lines[3:5]] == ["ticket", "static_phase"]
    assert lines[5].startswith("results: ")
    said = json.loads(call(path, "--out", out, "--processes", 1, "--json").stdout)
    assert (said["points"], said["simulations"], said["reused"], said["failed"]) == (2, 6, 6, 0)
    path.write_text(yaml.safe_dump(study(policy=["ticket", "static_phase"])))
    lines = call(path, "--out", out, "--processes", 1).stdout.splitlines()
    assert lines[2].split() == ["policy", "mean", "makespan", "runs"]  # one run says nothing of the spread


def test_command_when_some_fail(tmp_path: Path) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "r.parquet"
    path.write_text(yaml.safe_dump(study(ep=[2, 3])))
    result = call(path, "--out", out, "--processes", 1, "--json", status=1)
    said = json.loads(result.stdout)
    assert (said["failed"], sum(said["errors"].values())) == (1, 1)
    assert result.stderr.startswith("error: 1 of 2 simulations failed, the first with: ValueError: ep_size=3")
    assert len(pandas.read_parquet(out)) == 2


def test_command_when_all_fail(tmp_path: Path) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "r.parquet"
    path.write_text(yaml.safe_dump(study(tokens=[-1, -2])))
    result = call(path, "--out", out, "--processes", 1, status=1)
    assert result.stdout.splitlines()[0] == "2 points, 2 simulations, 0 of them made before"
    assert result.stderr.startswith("error: 2 of 2 simulations failed, the first with: ValueError: num_tokens=-1")
    said = json.loads(call(path, "--out", out, "--processes", 1, "--json", status=1).stdout)
    assert (said["points"], said["failed"], sum(said["errors"].values())) == (2, 2, 2)


def test_command_refuses_before_it_works(tmp_path: Path) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "r.parquet"
    path.write_text("grid: {tokns: [1]}\n")
    assert "unknown input (accepted: model, machine" in call(path, "--out", out, status=2).stderr
    assert call(path, "--out", tmp_path / "r.csv", status=2).stderr.endswith("(accepted: .parquet)\n")
    assert not out.exists()


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "r.parquet"
    path.write_text(yaml.safe_dump({"fixed": {"tokens": 2}, "replications": 400}))
    command = [
        *SWEEP,
        path,
        "--out",
        out,
        "--processes",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        journal = tmp_path / "r.parquet.journal"
        while not journal.exists() or not journal.stat().st_size:
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
        _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in said
    assert 0 < len(pandas.read_parquet(out)) < 400 and not journal.exists()
