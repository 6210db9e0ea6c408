"""The demo's steps, on cases small enough to check what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flashmoe import MoEModel, Routing, Trace, demo, simulate
from flashmoe.cli import app
from flashmoe.machine import Machine

TINY = MoEModel(d_model=64, d_ff=16, num_experts=8, top_k=2, name="tiny")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny layer on both sides and a machine that needs no measuring."""
    monkeypatch.setattr(demo, "SMALL", TINY)
    monkeypatch.setattr(demo, "NUM_TOKENS", 2)
    monkeypatch.setattr(demo, "host_machine", lambda: Machine.preset("h200"))
    monkeypatch.setattr(demo, "simulate_policies", simulated)
    monkeypatch.setattr(demo, "check_transformers", lambda small: None)


def simulated(progress: demo.Progress | None = None) -> demo.Simulated:
    routing = Routing.zipf(TINY, 2, 2, exponent=1.0)
    traces = {name: simulate(TINY, routing=routing, policy=name, workers=8) for name in ("ancestor", "static_phase")}
    return demo.Simulated(routing, Machine.preset("mi300x"), traces)


@pytest.mark.usefixtures("tiny")
def test_every_policy_computes_the_same_bits() -> None:
    small = demo.compute_policies()
    assert small.same_bits
    assert [run.policy for run in small.runs[: len(demo.POLICIES)]] == list(demo.POLICIES)
    assert {run.policy for run in small.runs if run.own_tiling} == {"ancestor"}
    assert max(run.relative_error for run in small.runs) < 1e-2


@pytest.mark.usefixtures("tiny")
def test_the_host_is_compared_with_the_median_run() -> None:
    hosted = demo.compare_with_host(demo.compute_policies())
    assert len(hosted.makespans_us) == demo.NUM_RUNS
    assert hosted.measured.makespan_us == sorted(hosted.makespans_us)[demo.NUM_RUNS // 2]
    assert hosted.comparison.matched == len(hosted.measured.records) == len(hosted.simulated.records)
    assert hosted.comparison.warnings == []
    for kind, row in hosted.comparison.by_kind.items():
        means = hosted.kind_means_us[kind]
        assert any(row["right_mean_us"] == pytest.approx(mean) for mean in means)


@pytest.mark.usefixtures("tiny")
def test_the_command_tells_and_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    folder = tmp_path / "new" / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    for words in ("model is off", "gave the same bits", "Why ancestor takes", "Not checked against transformers"):
        assert words in result.stdout
    for file in folder.iterdir():
        assert file.name in result.stdout
    assert Trace.load(folder / "host-measured.npz").header["executor"] == "cpu"
    assert (folder / "host-mirrored.png").read_bytes().startswith(b"\x89PNG")
    assert {file.suffix for file in folder.iterdir()} == {".png", ".npz", ".gz"}


@pytest.mark.usefixtures("tiny")
def test_other_bits_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.Small, "same_bits", property(lambda small: False))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "different bits" in result.stderr


def test_bars_stand_beside_their_bounds() -> None:
    ax = demo.figure_policies(simulated()).axes[0]
    traces = simulated().traces
    assert [bar.get_width() for bar in ax.patches] == [trace.makespan_us for trace in traces.values()]
    bounds = [path.vertices[0, 0] for path in ax.collections[0].get_paths()]
    assert bounds == pytest.approx([trace.header["bound_ps"] / 1e6 for trace in traces.values()])


def test_a_task_without_its_core_is_held_up() -> None:
    trace = simulated().traces["static_phase"]
    records = trace.records.copy()
    up = np.flatnonzero(trace.kind_names == "up")
    records["end_ps"][up] = records["start_ps"][up] + 5_000_000
    records["end_ps"][up[0]] = records["start_ps"][up[0]] + 4_000_000_000  # 4 ms among tasks of 5 us
    times = demo._held_up_us(Trace(records, json.loads(json.dumps(trace.header)), trace.critical_path))
    assert times == [4000.0]


@pytest.mark.usefixtures("tiny")
def test_transformers_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.undo()
    monkeypatch.setattr(demo, "SMALL", TINY)
    check = demo.check_transformers(demo.compute_policies())
    assert check is not None
    assert check.relative_error < 1e-2
