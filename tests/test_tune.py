"""Tuning: the candidates are what they say, the best is no worse than what was known, and the cores decide nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe.cli import app
from flashmoe.policy import policy_names, resolve
from flashmoe.tune import Candidate, tune

TINY = fm.MoEModel(d_model=64, d_ff=32, num_experts=8, top_k=2, name="tiny")
SMALL: dict[str, Any] = {"ep": 2, "tokens": 4, "workers": 4, "trials": 60, "seeds": 3, "processes": 1}


def makespans_us(policy: str, tiling: fm.Tiling | None, seeds: list[int]) -> tuple[float, ...]:
    routings = {seed: fm.Routing.zipf(TINY, 4, 2, seed=seed) for seed in seeds}
    return tuple(
        fm.evaluate(TINY, routing=routing, policy=policy, tiling=tiling, seed=seed, workers=4).makespan_us
        for seed, routing in routings.items()
    )


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    return tune(TINY, routing="zipf:1", seed=5, **SMALL)


def test_candidates_are_what_they_say(found: list[Candidate]) -> None:
    assert 5 <= len(found) <= 6
    for candidate in found:
        assert candidate.makespans_us == makespans_us(candidate.policy, candidate.tiling, [5, 6, 7])
        assert candidate.makespan_us == pytest.approx(sum(candidate.makespans_us) / 3)
        assert sum(candidate.time_us.values()) == pytest.approx(candidate.makespan_us)
        assert candidate.is_usual == (candidate.tiling == resolve(candidate.policy).tiling)
    assert [c.makespan_us for c in found[:5]] == sorted(c.makespan_us for c in found[:5])
    assert len({(c.policy, c.makespans_us) for c in found}) == len(found)


def test_the_best_is_no_worse_than_any_policy_with_its_own_tiling(found: list[Candidate]) -> None:
    usual = {name: sum(makespans_us(name, None, [5, 6, 7])) / 3 for name in policy_names()}
    assert found[0].makespan_us <= min(usual.values())
    [baseline] = [candidate for candidate in found if candidate.is_usual][-1:]
    assert baseline.makespan_us == pytest.approx(min(usual.values()))


def test_what_separates_two_candidates(found: list[Candidate]) -> None:
    first, last = found[0], found[-1]
    shares = last.against(first)
    assert sum(shares.values()) == pytest.approx(last.makespan_us - first.makespan_us)
    assert [abs(us) for us in shares.values()] == sorted((abs(us) for us in shares.values()), reverse=True)
    assert shares["stream"] == last.time_us["stream"] - first.time_us["stream"]
    differences = [b - a for a, b in zip(first.makespans_us, last.makespans_us, strict=True)]
    behind = last.behind(first)
    assert behind.value == pytest.approx(sum(differences) / 3)
    half = scipy.stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / np.sqrt(3)
    assert behind.low == pytest.approx(behind.value - half)


def test_the_same_seed_finds_the_same_on_any_number_of_cores(found: list[Candidate]) -> None:
    assert tune(TINY, routing="zipf:1", seed=5, **{**SMALL, "processes": 2}) == found


def test_tasks_that_cost_much_by_themselves_are_few() -> None:
    # a millisecond a task, ten a whole expert: a lone worker takes as few as there can be
    slow = {"up_overhead_ps": 10**9, "down_overhead_ps": 10**9, "expert_overhead_ps": 10**10}
    machine = replace(fm.Machine.preset("h200"), **slow, jitter=0.0, stall_probability=0.0)
    best = tune(TINY, machine=machine, **{**SMALL, "tokens": 1, "ep": 1, "workers": 1, "trials": 150})[0]
    assert best.tiling.up_rows >= TINY.d_ff
    assert best.tiling.down_rows >= TINY.d_model or best.tiling.down == "rows"


def test_policies_that_come_to_the_same_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # a lone PE has nothing to steal from others and none of its tasks comes from elsewhere
    found = tune(TINY, **{**SMALL, "ep": 1, "trials": len(policy_names()), "best": 20})
    [together] = [(c.policy, *c.same) for c in found if "remote_first" in (c.policy, *c.same)]
    assert together == ("domain_steal", "local_first", "remote_first")
    assert len({(c.makespans_us, c.headroom, *c.time_us.values()) for c in found}) == len(found)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--ep", "1", "--tokens", "1", "--workers", "16", "--trials", "12", "--seeds", "1", "--processes", "1"]
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    row = lines.index("local_first,")  # the first is beside the numbers, the others are below
    assert "domain_steal," in lines[row - 1] and lines[row + 1] == "remote_first"


def test_progress_ends_at_its_end() -> None:
    told: list[tuple[int, int]] = []
    tune(TINY, **SMALL, progress=lambda *counts: told.append(counts))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({total for _, total in told}) == 1 and told[-1][0] == told[-1][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"best": 0}, "best=0"),
        ({"model": "qwen4"}, "model 'qwen4' is unknown"),
        ({"machine": "mi400"}, "unknown machine 'mi400'"),
        ({"ep": 3}, "ep_size=3"),
        ({"routing": "zip"}, "routing 'zip' is unknown|cannot read|zip"),
        ({"processes": 0}, "processes=0"),
        ({"tokens": 4, "workers": -1}, "nothing could be simulated: ValueError: workers=-1"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    arguments = {**SMALL, "trials": 8, **given}
    with pytest.raises(ValueError, match=message):
        tune(arguments.pop("model", TINY), **arguments)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tuning needs optuna: pip install 'flashmoe\[tune\]'"):
        tune(TINY, **SMALL)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "best.json"
    arguments = ["--ep", "8", "--tokens", "1", "--workers", "32", "--trials", "12", "--seeds", "2", "--processes", "1"]
    result = CliRunner().invoke(app, ["tune", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["policy", "makespan", "against", "1"]
    held = json.loads(out.read_text())
    best = held["candidates"][0]
    assert lines[1].split()[0] in ("1", "1*") and lines[1].split()[1] == best["policy"]
    shares = lines.index("A worker's time [µs]: of 1, and how much more or less of it the others spend") + 1
    spent = [float(us) for us in lines[shares + 1].removeprefix("1*").removeprefix("1 ").split()[1:]]
    assert sum(spent) == pytest.approx(best["makespan_us"], abs=0.1)  # each is rounded
    assert held["inputs"]["machine"] == "mi300x" and held["inputs"]["trials"] == 12
    # what was written is enough to have the winner again
    model = fm.MoEModel.preset("qwen3-30b-a3b")
    routing = fm.Routing.uniform(model, 1, 8, seed=1)
    options: dict[str, Any] = {"policy": best["policy"], "tiling": fm.Tiling(**best["tiling"]), "workers": 32}
    assert fm.evaluate(model, routing=routing, seed=1, **options).makespan_us == best["makespans_us"][1]

    result = CliRunner().invoke(app, ["tune", *arguments, "--json"])
    assert json.loads(result.stdout)["candidates"] == held["candidates"]
    result = CliRunner().invoke(app, ["tune", "--trials", "0"])
    assert (result.exit_code, result.stderr) == (2, "error: trials=0 (must be at least 1)\n")
