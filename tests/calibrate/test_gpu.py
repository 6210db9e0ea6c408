"""A GPU's machine file: complete, with origins, from what was measured on one H200; and the command that makes it."""

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmoe.calibrate.gpu import (
    OPENING_ROUTINGS,
    OPENING_TOKENS,
    ROUTINGS,
    SORTED_TOKENS,
    gpu_machine,
    load_measured,
)
from flashmoe.cli import app
from flashmoe.machine import Machine, parameter_units
from flashmoe.sim.effects import without

KEPT = Path(__file__).parents[2] / "results" / "2026-11-27-h200-validation" / "calibration"


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def measured():
    return load_measured(KEPT)


def test_launches_were_kept(measured):
    _, layers = measured
    alone = [layer for layer in layers if layer.trace.num_workers == 1]
    plain, ranked = (
        [layer.trace.header["num_tokens"][0] for layer in alone if layer.policy.sorts_experts(1) == sorts]
        for sorts in (False, True)
    )
    assert (plain, ranked) == (list(ROUTINGS), list(SORTED_TOKENS))
    opened = [layer for layer in layers if layer.trace.num_workers > 1]
    assert {layer.trace.num_workers for layer in opened} == {132}
    cells = {(layer.trace.header["num_tokens"][0], layer.routing.name) for layer in opened}
    assert cells == set(itertools.product(OPENING_TOKENS, OPENING_ROUTINGS))
    assert len(opened) == len(cells)


def test_a_machine_is_complete_and_says_what_was_measured(measured):
    machine, found = gpu_machine("mine", "h200", *measured)
    base = Machine.preset("h200")
    assert machine.name == "mine"
    assert machine.origins.keys() == base.origins.keys()
    for key in parameter_units():
        if key in found:
            assert getattr(machine, key) == found[key].value
            assert machine.origins[key].origin in ("measured", "fitted")
        else:
            assert getattr(machine, key) == getattr(base, key)
            assert machine.origins.get(key) == base.origins.get(key)
    assert {"up_overhead_ps", "plan_ps", "prologue_ps", "signal_ps", "knee"} <= found.keys()
    assert found.keys().isdisjoint({"put_ps", "link_bytes_per_ns", "num_pes_max", "finish_beside"})


def test_a_file_gives_the_same_machine(measured, tmp_path):
    machine, _ = gpu_machine("mine", "h200", *measured)
    machine.save(tmp_path / "mine.toml")
    loaded = Machine.load(tmp_path / "mine.toml")
    assert loaded == machine
    assert loaded.origins == machine.origins
    assert loaded.description == machine.description


def test_a_machine_without_an_origin_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="gate_overhead_ps=0 has no origin"):
        without(Machine.preset("h200"), ["overhead"]).save(tmp_path / "no.toml")


def test_the_command_makes_the_preset_from_what_was_kept(tmp_path):
    out = tmp_path / "h200.toml"
    done = run("calibrate", "--backend", "cuda", "--from", str(KEPT), "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["machine"]["name"] == "h200"
    assert told["spread"]["signal_ps"] > 0
    written = Machine.load(out)
    preset = Machine.preset("h200")
    assert dict(told["machine"]["gate_overhead_ps"]) == dict(written.overheads("gate"))
    assert {key: getattr(written, key) for key in told["spread"]} == {
        key: getattr(preset, key) for key in told["spread"]
    }


def test_the_host_can_be_written_too(tmp_path):
    out = tmp_path / "host.toml"
    done = run("calibrate", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "parameters measured" in done.output
    assert Machine.load(out).name == "host"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "opencl"], "backend='opencl' (accepted: cpu, cuda)"),
        (["--from", "."], "--keep and --from are for the GPU"),
        (["--backend", "cuda", "--from", "nowhere"], "a calibrate.json was expected"),
        (["--backend", "cuda", "--keep", "no/where"], "no is no folder"),
        (["--backend", "cuda", "--keep", ".", "--from", "."], "both given"),
        (["--backend", "cuda", "--base", "m5"], "unknown machine 'm5'"),
        (["--out", "machine.json"], "unknown suffix"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    done = run("calibrate", *arguments)
    assert done.exit_code == 2
    assert message in done.output
