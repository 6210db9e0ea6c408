"""The model against layers that were measured on one H200, and the arithmetic of the comparison."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe.calibrate.launches import tokens_for
from flashmoe.cli import app
from flashmoe.machine import Machine
from flashmoe.measured import MeasuredLayer
from flashmoe.trace import KINDS
from flashmoe.validate import Cell, Validation, kendall_tau, kind_errors, load_cells, save_cells, simulate_as, validate

RESULTS = Path(__file__).parents[1] / "results" / "2026-11-27-h200-validation"
MODEL = fm.MoEModel(d_model=256, d_ff=128, num_experts=16, top_k=2)


# ---- measured layers, simulated again


@pytest.fixture(scope="module")
def recorded():
    """What `flashmoe validate` said when the traces were committed, by (tokens, skew, policy)."""
    told = json.loads((RESULTS / "validation.json").read_text())
    return told | {"cells": {(cell["tokens"], cell["skew"], cell["policy"]): cell for cell in told["cells"]}}


@pytest.fixture(scope="module")
def again():
    return validate(load_cells(RESULTS / "traces"), "h200", blames=False)


def test_no_makespan_is_predicted_worse_than_it_was(recorded, again):
    """By more than a tenth of the error; half a percent is what another draw of the jitter may change."""
    assert {(cell.tokens, cell.skew, cell.policy) for cell in again.cells} == recorded["cells"].keys()
    for cell in again.cells:
        before = recorded["cells"][cell.tokens, cell.skew, cell.policy]
        assert cell.measured_us == pytest.approx(before["measured_us"])
        assert abs(cell.error_pct) <= 1.1 * abs(before["error_pct"]) + 0.5, (cell.tokens, cell.skew, cell.policy)
    assert again.mean_error_pct <= 1.1 * recorded["mean_error_pct"]


def test_no_kind_is_predicted_worse_than_it_was(recorded, again):
    for kind, error in again.by_kind().items():
        assert abs(error.bias_pct) <= 1.1 * abs(recorded["by_kind"][kind]["bias_pct"]) + 0.5, kind


def test_policies_are_ranked_as_well_as_they_were(recorded, again):
    before = {(row["tokens"], row["skew"]): row["tau"] for row in recorded["kendall_tau"]}
    for place, tau in again.rank_agreement().items():
        assert (tau is None) == (before[place] is None)
        assert tau is None or tau >= before[place]


# ---- the comparison


def simulated(machine, tokens=4, policy="ticket", seed=0):
    routing = fm.Routing.zipf(MODEL, tokens, 1, seed=3)
    clock = replace(machine, launch_ps=0, pe_spread=0.0, num_domains=2)
    trace = fm.simulate(MODEL, machine=clock, routing=routing, policy=policy, workers=5, seed=seed)
    return MeasuredLayer(trace, routing, np.array([trace.makespan_us, trace.makespan_us + 1.0]))


def test_a_machine_predicts_itself(tmp_path):
    machine = replace(Machine.preset("h200"), jitter=0.0)
    layers = [simulated(machine, policy=policy) for policy in ("ticket", "static_phase")]
    (cell, _) = validate(layers, machine).cells
    assert simulate_as(layers[0], machine).makespan_ps == layers[0].trace.makespan_ps
    # the middle of the two makespans above is half a microsecond more; noise: standard deviation of x and x + 1
    assert cell.measured_us - cell.simulated_us == pytest.approx(0.5)
    assert cell.noise_us == pytest.approx(np.sqrt(0.5))
    assert all(error.bias_pct == error.mape_pct == 0 for error in cell.by_kind.values())
    assert (cell.blame.error_us, cell.blame.durations_us, cell.blame.schedule_us) == (0, 0, 0)


def test_a_slower_machine_is_told_from_a_faster_one():
    machine = replace(Machine.preset("h200"), jitter=0.0, finish_beside=False)
    slower = replace(machine, up_overhead_ps=machine.up_overhead_ps + 1_000_000)
    result = validate([simulated(slower)], machine)
    assert result.cells[0].error_pct < 0
    up = result.by_kind()["up"]
    assert up.measured_us - up.simulated_us == pytest.approx(1.0, abs=0.1)  # another worker may get a task
    assert result.worst is result.cells[0]
    assert result.mean_error_pct == -result.cells[0].error_pct


def test_a_chain_counts_as_one_and_waiting_for_inputs_does_not_count():
    machine = replace(Machine.preset("h200"), jitter=0.0)
    routing = fm.Routing.uniform(MODEL, 4, 1, seed=0)
    tiling = fm.Tiling(down="rows", down_rows=64)
    trace = fm.simulate(MODEL, machine=machine, routing=routing, policy="ticket", workers=3, tiling=tiling)
    layer = MeasuredLayer(trace, routing, np.array([trace.makespan_us]))
    late = trace.records.copy()
    early = late["kind"] == KINDS.index("up")
    late["start_ps"][early] = 0  # as a kernel that holds a task while it waits for its inputs
    again = fm.Trace(late, trace.header, np.zeros(0, np.int64))
    errors = kind_errors(layer.table, trace, again)
    assert errors["down"].count == 256 // 64
    records = trace.records
    waited_us = (records["start_ps"] - records["ready_ps"])[early].mean() / 1e6
    assert errors["up"].measured_us - errors["up"].simulated_us == pytest.approx(waited_us)


def cell(policy, measured_us, simulated_us, noise_us=0.1, tokens=1):
    return Cell(tokens, "uniform", policy, measured_us, noise_us, simulated_us, {}, None)


def test_ranks_count_where_policies_differ_by_more_than_the_noise():
    # of the pairs of 1, 2, 3 against 10, 30, 20 only the last two are swapped
    assert kendall_tau([cell("a", 10, 1), cell("b", 30, 2), cell("c", 20, 3)]) == pytest.approx(1 / 3)
    assert kendall_tau([cell("a", 10, 1), cell("b", 30, 2), cell("c", 10.1, 0)]) == 1
    assert kendall_tau([cell("a", 10, 1), cell("b", 10.2, 2)]) is None
    both = Validation((cell("a", 10, 1), cell("a", 5, 2, tokens=2), cell("b", 30, 2), cell("b", 9, 1, tokens=2)))
    assert both.rank_agreement() == {(1, "uniform"): 1, (2, "uniform"): -1}


def test_layers_are_saved_by_name_and_found_again(tmp_path):
    machine = replace(Machine.preset("h200"), jitter=0.0)
    save_cells([simulated(machine), simulated(machine, policy="static_phase")], tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "004-zipf-1-static_phase.npz",
        "004-zipf-1-ticket.npz",
    ]
    assert [layer.policy.name for layer in load_cells(tmp_path)] == ["static_phase", "ticket"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no measured layers"):
        load_cells(tmp_path / "none")


@pytest.mark.parametrize("skew", ["uniform", "zipf:1.2", "hot:8", "one"])
def test_a_router_chooses_what_it_is_meant_to(skew):
    routing = fm.Routing.parse(skew, MODEL, 7, 1, 0)
    gate = np.random.default_rng(1).standard_normal((MODEL.num_experts, MODEL.d_model)).astype(np.float32)
    x = tokens_for(routing, gate).astype(MODEL.numpy_dtype).astype(np.float32)  # rounded as the kernel sees them
    logits = x @ gate.astype(MODEL.numpy_dtype).astype(np.float32).T
    chosen = np.argsort(-logits, axis=1)[:, : MODEL.top_k]
    assert np.array_equal(np.sort(chosen), np.sort(routing.topk_idx[0]))


# ---- the command


def run(*arguments):
    return CliRunner().invoke(app, ["validate", *arguments])


def test_the_command_tells_of_saved_layers(tmp_path):
    machine = replace(Machine.preset("h200"), jitter=0.0)
    save_cells([simulated(machine, policy=policy) for policy in ("ticket", "static_phase")], tmp_path)
    done = run("--traces", str(tmp_path))
    assert done.exit_code == 0, done.output
    for word in ("static_phase", "simulated µs", "Kendall's tau", "Blame by replay", "absolute error"):
        assert word in done.output
    told = json.loads(run("--traces", str(tmp_path), "--json").stdout)
    assert [cell["policy"] for cell in told["cells"]] == ["static_phase", "ticket"]
    assert told["cells"][0]["blame"]["by_kind"].keys() == told["by_kind"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "some"], "cells='some' (accepted: quick, full)"),
        (["--traces", "nowhere"], "nowhere: no measured layers"),
        (["--out", "no/where"], "no is no folder"),
        (["--out", ".", "--traces", "."], "both given"),
        (["--machine", "m5"], "unknown machine 'm5'"),
        (["--model", "m5"], "m5"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
