"""flashmoe bench: options, files, exit status; what needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.measured import small_result
from typer.testing import CliRunner

from flashmoe.bench.result import Result
from flashmoe.cli import app, bench


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    result = small_result()
    right = Result(result.header, [row for row in result.measurements if row.right], result.missing)
    right.save(tmp_path / "bench.json")
    return tmp_path / "bench.json"


def test_a_saved_result_is_shown_and_drawn_without_a_gpu(saved: Path, tmp_path: Path) -> None:
    figure = tmp_path / "share.png"
    status, out, _ = run("--from", str(saved), "--plot", str(figure))
    assert status == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "0.800" in out and "vllm (not installed)" in out and "pipeline" in out


def test_a_folder_of_results_has_all_files(saved: Path, tmp_path: Path) -> None:
    status, _, _ = run("--from", str(saved), "--out", str(tmp_path / "made"))
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "README.md", "bench.csv", "bench.json", "bench.png",
    ]  # fmt: skip
    assert Result.load(tmp_path / "made" / "bench.json") == Result.load(saved)


def test_json_is_the_file(saved: Path) -> None:
    status, out, _ = run("--from", str(saved), "--json")
    assert status == 0 and json.loads(out) == json.loads(saved.read_text())


def test_a_wrong_result_is_shown_and_is_status_1(tmp_path: Path) -> None:
    small_result().save(tmp_path / "wrong.json")
    status, out, err = run("--from", str(tmp_path / "wrong.json"))
    assert status == 1
    assert "wrong" in out and "1 of 15 measurements are of wrong results" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "'0' (accepted: integers in 1..1024, with commas between)"),
        (["--tokens", "8,1025"], "'1025' (accepted: integers in 1..1024"),
        (["--tokens", "8,,16"], "'' (accepted: integers"),
        (["--model", "qwen9"], "model 'qwen9' is unknown (presets: qwen3-30b-a3b"),
        (["--peers", "torch,jax"], "--peers: 'jax' (accepted: all, none, vllm, torch, transformers)"),
        (["--policies", "fifo"], "--policies: 'fifo' (accepted: all, tuned, ancestor"),
        (["--from", "nothing.json"], "cannot read nothing.json"),
        (["--out", "no/such/folder"], "is no folder"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert message in " ".join(err.split())


def test_without_torch_and_without_a_gpu_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run()
    assert status == 2 and "bench needs a CUDA device" in " ".join(err.split())
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    status, _, err = run()
    assert status == 2 and "bench needs torch, with CUDA: pip install torch" in " ".join(err.split())
