"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

import flashmoe
from flashmoe import Routing, Trace
from flashmoe.cli import app
from flashmoe.cli.screen import as_bytes, as_time

D_MODEL, D_FF, NUM_EXPERTS, TOP_K = 48, 20, 6, 2
SMALL = ["--ep", "2", "--tokens", "1", "--workers", "16"]  # a simulation of a fraction of a second


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE folder with layer 1 alone, as transformers writes it, in bf16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": D_MODEL,
        "moe_intermediate_size": D_FF,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def draw(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(ml_dtypes.bfloat16)

    tensors = {"model.layers.1.mlp.gate.weight": draw(NUM_EXPERTS, D_MODEL)}
    for e in range(NUM_EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{e}"
        tensors[f"{prefix}.gate_proj.weight"] = draw(D_FF, D_MODEL)
        tensors[f"{prefix}.up_proj.weight"] = draw(D_FF, D_MODEL)
        tensors[f"{prefix}.down_proj.weight"] = draw(D_MODEL, D_FF)
    save_file(tensors, folder / "model.safetensors")
    return folder


def call(*arguments: str | Path, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def error_of(*arguments: str | Path, status: int = 2) -> str:
    """The one line on stderr; nothing may be on stdout."""
    result = call(*arguments, status=status)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def run_on(checkpoint: Path, *arguments: str | Path) -> list[str | Path]:
    return ["run", "--checkpoint", checkpoint, "--layer", "1", *arguments]


# ---- help and version


@pytest.mark.parametrize(
    "command",
    [["demo"], ["simulate"], ["run"], ["compare"], ["build"], ["trace", "export"], ["presets"], ["doctor"]],
    ids=" ".join,
)
def test_help_has_an_example(command: list[str]) -> None:
    text = call(*command, "--help").stdout
    assert "Example" in text and f"flashmoe {' '.join(command)}" in text


def test_help_names_every_command() -> None:
    text = call("--help").stdout
    for command in ("demo", "simulate", "run", "compare", "build", "trace", "presets", "doctor"):
        assert f" {command} " in text


def test_version() -> None:
    assert call("--version").stdout == f"flashmoe {flashmoe.__version__}\n"


def test_presets_and_help_need_neither_figures_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['flashmoe', 'presets']\n"
        "from flashmoe.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'matplotlib', 'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_command_is_installed_and_keeps_stdout_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from flashmoe.cli import main; main()", "simulate", *SMALL, "--json"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["inputs"]["ep"] == 2
    assert done.stderr == ""


# ---- simulate


def test_simulate_json_and_trace() -> None:
    result = json.loads(call("simulate", *SMALL, "--routing", "one", "--out", "t.npz", "--json").stdout)
    assert result.keys() == {
        "makespan_us",
        "bound_us",
        "headroom",
        "utilisation",
        "tasks",
        "hbm_bytes",
        "link_bytes",
        "inputs",
    }
    trace = Trace.load("t.npz")
    assert result["makespan_us"] == trace.makespan_us >= result["bound_us"] > 0
    assert result["headroom"] == pytest.approx(result["makespan_us"] / result["bound_us"] - 1)
    assert result["tasks"] == len(trace.records)
    # everybody's tokens go to experts 0..7 of PE 0, and each PE reads the router for itself
    expert_bytes, gate_bytes = 3 * 2048 * 768 * 2, 128 * 2048 * 2
    assert result["hbm_bytes"] == 8 * expert_bytes + 2 * gate_bytes
    inputs = result["inputs"]
    assert (inputs["machine"], inputs["ep"], inputs["tokens"], inputs["workers"]) == ("mi300x", 2, 1, 16)
    assert (inputs["granularity"], inputs["down"], inputs["policy"]) == ("tile", "tile", "static_phase")
    assert inputs["model"]["name"] == "qwen3-30b-a3b"


def test_simulate_takes_the_policys_tiling_unless_told() -> None:
    own = json.loads(call("simulate", *SMALL, "--policy", "ancestor", "--json").stdout)["inputs"]
    told = json.loads(call("simulate", *SMALL, "--policy", "ticket", "--down", "rows", "--json").stdout)["inputs"]
    assert (own["granularity"], own["down"]) == ("token", "tile")
    assert (told["granularity"], told["down"]) == ("tile", "rows")


def test_simulate_says_why() -> None:
    text = " ".join(call("simulate", *SMALL, "--policy", "ancestor").stdout.split())  # lines end where they like
    for word in ("makespan", "headroom", "critical_path", "Gini", "whole expert", "µs"):
        assert word in text


def test_simulate_layers_and_effects() -> None:
    line = ["simulate", *SMALL, "--layers", "2", "--gap-us", "7", "--without", "jitter", "--without", "launch_ramp"]
    result = json.loads(call(*line, "--out", "t.npz", "--json").stdout)
    first_us, second_us = result["layer_end_us"]
    assert second_us == result["makespan_us"] > first_us + 7
    inputs = result["inputs"]
    assert (inputs["layers"], inputs["gap_us"], inputs["without"]) == (2, 7, ["jitter", "launch_ramp"])
    header = Trace.load("t.npz").header
    assert header["machine_parameters"]["launch_ps"] == header["machine_parameters"]["jitter"] == 0
    assert len(set(header["routing"])) == 2
    assert "2 layers" in call(*line).stdout
    assert "changes nothing" not in call(*line).stdout
    assert "gap_us=5 changes nothing" in call("simulate", *SMALL, "--gap-us", "5").stdout


def test_simulate_places_experts() -> None:
    linear, placed = (
        json.loads(call("simulate", *SMALL, "--routing", "one", *options, "--json").stdout)
        for options in ([], ["--placement", "balanced"])
    )
    assert placed["inputs"]["pe_skew"]["max_over_mean"] < linear["inputs"]["pe_skew"]["max_over_mean"]


def test_simulate_many_seeds() -> None:
    seeds = json.loads(call("simulate", *SMALL, "--seed", "3", "--seeds", "8", "--json").stdout)["seeds"]
    assert seeds["seeds"] == list(range(3, 11))
    assert seeds["p50"]["low"] <= seeds["p50"]["value"] <= seeds["p50"]["high"]
    assert (seeds["p99"]["value"], seeds["p99"]["high"]) == (max(seeds["makespan_us"]), None)
    one = json.loads(call("simulate", *SMALL, "--seed", "5", "--json").stdout)
    assert seeds["makespan_us"][2] == one["makespan_us"]
    assert "over 8 seeds" in call("simulate", *SMALL, "--seeds", "8").stdout


def test_simulate_takes_its_size_from_a_routing_file() -> None:
    model = flashmoe.MoEModel.preset("qwen3-30b-a3b")
    Routing.uniform(model, [3, 0], 2).save("r.npz")
    inputs = json.loads(call("simulate", "--routing", "r.npz", "--workers", "16", "--json").stdout)["inputs"]
    assert (inputs["ep"], inputs["tokens"]) == (2, [3, 0])
    assert "ep_size=4" in error_of("simulate", "--routing", "r.npz", "--ep", "4")


def test_simulate_draws(checkpoint: Path) -> None:
    call("simulate", "--model", checkpoint, *SMALL, "--plot", "overview.png")
    assert Path("overview.png").read_bytes().startswith(b"\x89PNG")


# ---- run


def test_run_json_and_trace(checkpoint: Path) -> None:
    line = run_on(checkpoint, "--tokens", "3", "--workers", "2", "--out", "t.npz", "--json")
    result = json.loads(call(*line).stdout)
    assert result.keys() == {"makespan_us", "relative_error", "tasks", "inputs"}
    assert 0 < result["relative_error"] < 1e-2
    assert result["tasks"] == len(Trace.load("t.npz").records)
    assert result["makespan_us"] == Trace.load("t.npz").makespan_us
    inputs = result["inputs"]
    assert (inputs["pes"], inputs["workers"], inputs["tokens"], inputs["layer"]) == (2, 2, 3, 1)
    assert (inputs["routing"], inputs["policy"], inputs["model"]["dtype"]) == ("gate", "ticket", "bf16")


def test_run_in_f32_with_a_given_routing(checkpoint: Path) -> None:
    line = run_on(checkpoint, "--dtype", "f32", "--routing", "zipf:1", "--pes", "3", "--policy", "push", "--json")
    result = json.loads(call(*line).stdout)
    assert result["relative_error"] < 1e-5
    assert (result["inputs"]["routing"], result["inputs"]["pes"]) == ("zipf:1", 3)


def test_run_for_people(checkpoint: Path) -> None:
    text = call(*run_on(checkpoint)).stdout
    for word in ("makespan", "relative error", "agrees with the numpy reference"):
        assert word in text


def test_run_without_tokens(checkpoint: Path) -> None:
    assert json.loads(call(*run_on(checkpoint, "--tokens", "0", "--json")).stdout)["relative_error"] == 0


def test_a_simulated_schedule_runs_on_threads(checkpoint: Path) -> None:
    call(
        *["simulate", "--model", checkpoint, "--ep", "2", "--tokens", "3", "--workers", "3"],
        *["--routing", "zipf:1", "--seed", "5", "--policy", "expert_lpt", "--out", "plan.npz"],
    )
    line = run_on(checkpoint, "--replay", "plan.npz", "--out", "run.npz", "--json")
    inputs = json.loads(call(*line).stdout)["inputs"]
    assert (inputs["policy"], inputs["routing"], inputs["seed"]) == ("replay of expert_lpt", "zipf:1", 5)
    plan, run = Trace.load("plan.npz"), Trace.load("run.npz")

    def who(trace: Trace) -> set[tuple[int, int, int]]:
        mine = trace.records[trace.kind_names != "gate"]
        return set(zip(mine["pe"].tolist(), mine["task_id"].tolist(), mine["worker"].tolist(), strict=True))

    assert who(plan) == who(run)


def test_the_gates_routing_can_be_kept_and_simulated(checkpoint: Path) -> None:
    call(*run_on(checkpoint, "--save-routing", "r.npz", "--out", "run.npz"))
    call("simulate", "--model", checkpoint, "--routing", "r.npz", "--workers", "4", "--out", "sim.npz")
    comparison = json.loads(call("compare", "sim.npz", "run.npz", "--json").stdout)
    assert comparison["matched"] > 0
    assert comparison["unmatched_left"] == comparison["unmatched_right"] == 0


def test_a_wrong_result_is_told_after_it_is_printed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe.reference.relative_error", lambda ours, wanted: float("nan"))
    result = call(*run_on(checkpoint, "--json"), status=1)
    assert json.loads(result.stdout)["relative_error"] is None
    assert "relative error nan" in result.stderr


def test_a_deadline_is_a_failure(checkpoint: Path) -> None:
    # six PEs cannot have told each other everything within a nanosecond
    message = error_of(*run_on(checkpoint, "--pes", "6", "--deadline", "1e-9"), status=1)
    assert "seen" in message and "wanted" in message


# ---- compare and export


@pytest.fixture
def two_traces() -> None:
    call("simulate", *SMALL, "--policy", "static_phase", "--out", "a.npz")
    call("simulate", *SMALL, "--policy", "ticket", "--out", "b.npz")


@pytest.mark.usefixtures("two_traces")
def test_compare() -> None:
    result = json.loads(call("compare", "a.npz", "b.npz", "--json", "--plot", "m.png").stdout)
    assert Path("m.png").read_bytes().startswith(b"\x89PNG")
    assert result["matched"] == len(Trace.load("a.npz").records)
    assert (result["unmatched_left"], result["unmatched_right"]) == (0, 0)
    assert result["makespan_us"].keys() == {"left", "right"}
    for row in result["by_kind"].values():
        assert row.keys() == {"count", "left_mean_us", "right_mean_us", "bias_pct", "mape_pct", "p95_abs_us"}
    assert "Makespan: left" in call("compare", "a.npz", "b.npz").stdout


@pytest.mark.usefixtures("two_traces")
def test_export() -> None:
    call("trace", "export", "a.npz", "one.json")
    call("trace", "export", "a.npz", "two.json", "--with", "b.npz")
    one, two = (json.loads(Path(name).read_text())["traceEvents"] for name in ("one.json", "two.json"))
    assert len(two) > len(one) > 0


# ---- presets and doctor


def test_presets() -> None:
    text = call("presets").stdout
    for name in ("qwen3-30b-a3b", "qwen3-235b-a22b", "mi300x", "h200", "host"):
        assert name in text


def test_a_machine_shows_unit_origin_and_source_of_each_parameter() -> None:
    machine = flashmoe.Machine.preset("mi300x")
    text = " ".join(call("presets", "mi300x").stdout.split())
    for key, origin in machine.origins.items():
        assert key in text
        assert " ".join(origin.source.split()) in text
    assert "hbm_bytes_per_ns 4200 bytes/ns measured" in text


def test_a_model_shows_its_bytes() -> None:
    text = call("presets", "qwen3-30b-a3b").stdout
    assert "9.44 MB" in text  # 3 x 2048 x 768 x 2


def test_doctor() -> None:
    text = call("doctor").stdout
    assert "Self-test passed" in text and "numpy" in text
    assert "1.21 GB" in text  # 128 x (3 x 2048 x 768 + 2048) x 2, a layer's weights on a GPU


def test_doctor_fails_with_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe.reference.relative_error", lambda ours, wanted: 0.5)
    assert "self-test" in call("doctor", status=1).stderr


# ---- bad input


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ("simulate --model gpt", "qwen3-30b-a3b"),
        ("simulate --machine mi250", "mi300x"),
        ("simulate --machine none.toml", "none.toml"),
        ("simulate --ep 3", "must divide num_experts=128"),
        ("simulate --ep 16", "at most 8 PEs"),
        ("simulate --tokens -1", "num_tokens=-1"),
        ("simulate --routing hot", "hot"),
        ("simulate --routing none.npz", "none.npz"),
        ("simulate --policy fifo", "ancestor"),
        ("simulate --engine fast", "native, simpy"),
        ("simulate --without gravity", "knee"),
        ("simulate --gap-us -1", "gap_us=-1"),
        ("simulate --layers 0", "num_layers=0"),
        ("simulate --seeds 0", "seeds=0"),
        ("simulate --granularity row", "tile, token"),
        ("simulate --granularity token --down rows", "granularity='token'"),
        ("simulate --workers 0", "workers=0"),
        ("simulate --seed -1", "seed=-1"),
        ("simulate --dtype f16", "bf16, f32"),
        ("simulate --out none/t.npz", "none is no folder"),
        ("simulate --out .", "it is a folder"),
        ("simulate --out /proc/t.npz", "cannot write /proc/t.npz: "),
        ("simulate --routing uniform@balanced --placement strided", "placement='strided', but routing"),
        ("simulate --plot t.bmp", ".png"),
        ("run --backend tpu", "cpu, cuda, hip"),
        ("run --model gpt", "qwen3-30b-a3b"),
        ("run --model qwen3-30b-a3b --checkpoint .", "one of them"),
        ("run --checkpoint .", "config.json"),
        ("run --pes 3", "must divide num_experts=128"),
        ("run --tokens -1", "tokens=-1"),
        ("run --policy fifo", "ancestor"),
        ("run --replay none.npz", "none.npz"),
        ("run --replay none.npz --policy push", "--replay"),
        ("run --out none/t.npz", "none is no folder"),
        ("run --save-routing r.txt", ".npz"),
        ("compare none.npz none.npz", "none.npz"),
        ("compare none.npz none.npz --plot none/m.png", "none is no folder"),
        ("trace export none.npz t.json", "none.npz"),
        ("trace export none.npz t.txt", ".json.gz"),
        ("presets mi250", "mi300x"),
        ("demo --out file/demo", "cannot make the folder"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments: str, wanted: str) -> None:
    Path("file").write_text("")
    assert wanted in error_of(*arguments.split())


def test_bad_options_have_status_2() -> None:
    for arguments in ("simulate --ep many", "simulate --nothing", "nothing"):
        result = call(*arguments.split(), status=2)
        assert result.stdout == "" and "Traceback" not in result.stderr


def test_bad_input_of_a_run(checkpoint: Path) -> None:
    assert "layers with experts: 1" in error_of("run", "--checkpoint", checkpoint, "--layer", "0")
    assert "workers=0" in error_of(*run_on(checkpoint, "--workers", "0"))
    assert "deadline_s=0.0" in error_of(*run_on(checkpoint, "--deadline", "0"))
    Path("t.npz").write_text("not a trace")
    assert "not a flashmoe trace" in error_of(*run_on(checkpoint, "--replay", "t.npz"))


def test_a_schedule_for_another_routing_is_refused(checkpoint: Path) -> None:
    call("simulate", "--model", checkpoint, "--ep", "2", "--tokens", "3", "--workers", "2", "--out", "plan.npz")
    assert "another routing" in error_of(*run_on(checkpoint, "--replay", "plan.npz", "--routing", "one"))


# ---- words


def test_sizes_and_times_have_units() -> None:
    assert [as_bytes(count) for count in (0, 999, 1500, 9_437_184, 1.2e9)] == [
        "0 B",
        "999 B",
        "1.50 kB",
        "9.44 MB",
        "1.20 GB",
    ]
    assert [as_time(us) for us in (0.04, 45.24, 14_250)] == ["0.0 µs", "45.2 µs", "14.25 ms"]
