"""flashmoe run on a GPU, and what reads its trace."""

import json

import pytest
from cards import BACKENDS
from typer.testing import CliRunner

from flashmoe.cli import app
from flashmoe.model import MODEL_PRESETS
from flashmoe.trace import Trace

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODEL_PRESETS, "tiny", {"d_model": 128, "d_ff": 64, "num_experts": 8, "top_k": 2})


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("options", [[], ["--pes", "2", "--tokens", "20"], ["--routing", "zipf:1", "--tokens", "8"]])
def test_it_agrees_with_the_reference_and_leaves_a_trace(backend, options):
    line = ["run", "--backend", backend, "--model", "tiny", *options, "--out", "gpu.npz", "--json"]
    result = json.loads(call(*line))
    assert 0 < result["relative_error"] < 1e-2
    assert result["inputs"]["policy"] == "tuned"
    trace = Trace.load("gpu.npz")
    assert result["tasks"] == len(trace.records) and len(trace.critical_path) > 0
    assert trace.header["device"] and trace.header["driver"]


def test_a_schedule_is_replayed_and_compared(backend):
    call("run", "--backend", backend, "--model", "tiny", "--tokens", "9", "--out", "first.npz")
    call("run", "--backend", backend, "--replay", "first.npz", "--out", "again.npz")
    first, again = Trace.load("first.npz"), Trace.load("again.npz")
    assert first.header["plan_digests"] == again.header["plan_digests"]
    who = [
        sorted(zip(t.records["task_id"].tolist(), t.records["worker"].tolist(), strict=True)) for t in (first, again)
    ]
    assert who[0] == who[1]
    comparison = json.loads(call("compare", "first.npz", "again.npz", "--plot", "mirrored.png", "--json"))
    assert comparison["unmatched_left"] == comparison["unmatched_right"] == 0
    call("trace", "export", "first.npz", "both.json", "--with", "again.npz")
