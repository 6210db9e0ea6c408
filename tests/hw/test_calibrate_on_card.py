"""Calibration and validation on a card."""

import time

import numpy as np
import pytest
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe.calibrate.launches import Launch, measure_layers
from flashmoe.cli import app
from flashmoe.hw.tuned import tuned
from flashmoe.machine import Machine
from flashmoe.policy import resolve
from flashmoe.validate import validate

pytestmark = pytest.mark.cuda
MODEL = fm.MoEModel(d_model=512, d_ff=256, num_experts=32, top_k=4)


@pytest.mark.parametrize("skew", ["uniform", "hot:8"])
def test_layers_are_launched_with_the_routing_that_is_wanted(skew):
    launches = [
        Launch(resolve(policy, tuned(tokens).tiling), fm.Routing.parse(skew, MODEL, tokens, 1, 0), workers)
        for policy, tokens, workers in (("ticket", 3, 0), ("static_phase", 40, 0), ("static_phase", 40, 1))
    ]
    layers = measure_layers(MODEL, launches, repeats=3)
    for layer, launch in zip(layers, launches, strict=True):
        wanted, used = (np.sort(routing.topk_idx[0]) for routing in (launch.routing, layer.routing))
        assert np.array_equal(wanted, used)
        assert len(layer.makespan_us) == 3 and layer.makespan_us.min() > 0
        assert len(layer.trace.records) == len(layer.table)
        assert launch.workers in (0, layer.trace.num_workers)
    assert all(cell.simulated_us > 0 for cell in validate(layers, "h200").cells)


def test_a_card_is_calibrated_in_less_than_two_minutes(tmp_path):
    started = time.monotonic()
    command = ["calibrate", "--backend", "cuda", "--out", str(tmp_path / "mine.toml"), "--keep", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert time.monotonic() - started < 120
    machine, preset = Machine.load(tmp_path / "mine.toml"), Machine.preset("h200")
    assert machine.origins.keys() == preset.origins.keys()
    assert machine.cu_bytes_per_ns == pytest.approx(preset.cu_bytes_per_ns, rel=0.2)
