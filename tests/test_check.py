"""flashmoe check: what it prints, and its exit status."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from flashmoe.cli import app
from flashmoe.trace import KINDS, Trace

SMALL = ["--ep", "2", "--tokens", "1", "--workers", "4"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def plan():
    call("simulate", *SMALL, "--seed", "3", "--no-gate", "--out", "plan.npz")
    return "plan.npz"


@pytest.fixture
def broken(plan):
    """The plan, with a down in the place of an up that it needs."""
    trace = Trace.load(plan)
    records = trace.records.copy()
    of_worker = (records["pe"] == 1) & (records["worker"] == 2)
    down = np.flatnonzero(of_worker & (records["kind"] == KINDS.index("down")))[0]
    same = records["expert"] == records["expert"][down]
    up = np.flatnonzero(of_worker & same & (records["kind"] == KINDS.index("up")))[0]
    for name in ("start_ps", "end_ps"):
        records[name][[up, down]] = records[name][[down, up]]
    Trace(records, trace.header, np.zeros(0, np.int64)).save("broken.npz")
    return "broken.npz", int(records["task_id"][up]), int(records["task_id"][down])


@pytest.mark.parametrize("policy", ["ancestor", "static_phase", "expert_lpt"])
def test_built_in_policies_pass(policy):
    shown = call("check", "--policy", policy, *SMALL, "--layers", "2").stdout
    assert shown.startswith(f"{policy}: qwen3-30b-a3b on 2 PEs of 4 workers\n")
    assert "of 2 layers" in shown and shown.endswith("No deadlock under any timing.\n")


def test_a_trace_is_checked_as_it_was_made(plan):
    assert "No deadlock under any timing." in call("check", "--replay", plan).stdout
    result = json.loads(call("check", "--replay", plan, "--json").stdout)
    assert result["ok"] and result["problem"] is None and result["cycle"] == []
    inputs = result["inputs"]
    assert (inputs["ep"], inputs["workers"], inputs["seed"], inputs["gate"]) == (2, 4, 3, False)
    assert (inputs["policy"], inputs["queue"]) == ("replay of static_phase", "replay")


def test_a_deadlock_is_shown_as_task_ids(broken):
    path, up, down = broken
    shown = call("check", "--replay", path, status=1).stdout
    assert "deadlock: " in shown and "No deadlock" not in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    begin = lines.index("a cycle of waits, each for the next")
    steps = lines[begin + 1 : lines.index("", begin)]
    assert len(steps) >= 3 and steps[0].startswith(steps[-1])
    assert any(line.startswith(f"PE 1 worker 2 holds task {down} of PE 1: down") for line in lines)
    result = json.loads(call("check", "--replay", path, "--json", status=1).stdout)
    assert not result["ok"] and result["problem"].startswith("policy 'replay of static_phase': deadlock: ")
    assert {"pe", "task_id", "kind", "why"} == result["cycle"][0].keys()
    assert (1, up, "up") in [(wait["pe"], wait["task_id"], wait["kind"]) for wait in result["cycle"]]


def test_a_trace_that_does_not_fit_is_refused(plan):
    assert "PE 0: lists for 4 workers (there are 3)" in call("check", "--replay", plan, "--workers", 3, status=1).stdout
    shown = call("check", "--replay", plan, "--seed", 4, status=1).stdout
    assert "made for another routing" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "best"], "policy='best' (accepted: ancestor, "),
        (["--replay", "plan.npz", "--policy", "push"], "cannot change a schedule"),
        (["--replay", "gone.npz"], "gone.npz: no such file"),
        (["--workers", "-2"], "workers=-2"),
        (["--workers", "0"], "workers=0"),
        (["--tokens", "-1"], "-1"),
        (["--ep", "0"], "0"),
    ],
)
def test_bad_input_has_status_2(plan, arguments, named):
    result = call("check", *arguments, status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and named in result.stderr
