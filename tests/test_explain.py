"""Explanations: the sentences say what the numbers say, and hold for any trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from traces import make_trace
from typer.testing import CliRunner

from flashmoe import MoEModel, Routing, Trace
from flashmoe.answers import WORKER_TIMES
from flashmoe.cli import app
from flashmoe.explain import BOUNDS, PATH_WORDS, explain, summarise
from flashmoe.sim import simulate

QWEN = MoEModel.preset("qwen3-30b-a3b")
SMALL = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16")
US = 1_000_000

MACHINE: dict[str, Any] = {
    "cu_bytes_per_ns": 1.0,
    "hbm_bytes_per_ns": 2.0,
    "store_bytes_per_ns": 1.0,
    "link_bytes_per_ns": 1.0,
    "launch_ps": US,
    "prefetch": True,
}


def two_readers(bounds_us: dict[str, float], end_us: int = 9) -> Trace:
    """Two workers read 4 kB each from 3 µs to 7 µs, as fast as they can; the combine ends at end_us."""
    reads = {"kind": "up", "ready_ps": 3 * US, "asked_ps": 2 * US, "ticket_ps": 2 * US, "start_ps": 3 * US}
    reads |= {"loaded_ps": 7 * US, "done_ps": 7 * US, "end_ps": 7 * US, "hbm_bytes": 4_000}
    waits = {"kind": "combine", "asked_ps": 7 * US, "ticket_ps": 7 * US, "ready_ps": 8 * US, "start_ps": 8 * US}
    bounds_ps = {name: round(bounds_us.get(name, 0) * US) for name in BOUNDS}
    return make_trace(
        [{**reads, "expert": 0}, {**reads, "expert": 1, "worker": 1}, {**waits, "end_ps": end_us * US}],
        critical_path=[1, 2],
        num_workers=2,
        machine_parameters=MACHINE,
        bounds_ps=bounds_ps,
        bound_ps=max(bounds_ps.values()),
        headroom=end_us * US / max(bounds_ps.values()) - 1,
    )


def test_the_time_over_the_memorys_bound_by_hand() -> None:
    # 8 kB at 2 bytes/ns and the launch: 5 µs
    lines = explain(two_readers({"hbm": 5})).splitlines()
    assert lines == [
        "The makespan is 9.0 µs, 1.80 times its largest bound: the distinct weights of the busiest PE at full memory "
        "bandwidth, 5.0 µs with the launch.",
        "Of the 4.0 µs above it, as the memory of PE 0, which has most to read, saw them: 2.0 µs were lost in the 2.0 "
        "µs before it was asked for the first expert weights (on the critical path in that time, mostly: 1.0 µs "
        "launch, 1.0 µs other inputs); 2.0 µs were lost in the 2.0 µs after the last of them (on the critical path in "
        "that time, mostly: 1.0 µs signals inside a PE, 1.0 µs arithmetic).",
        "The critical path, 2 tasks all on PE 0, is made of 4.0 µs weights at a worker's own rate, 2.0 µs launch, 1.0 "
        "µs signals inside a PE, 1.0 µs other inputs, 1.0 µs arithmetic.",
        "On PE 0, the last to end, workers spend 44% waiting for a task's weights, 33% without a task (not launched "
        "yet, or none left), 17% waiting for a task's inputs, 6% computing.",
    ]


def test_weights_that_are_read_again_are_named() -> None:
    trace = two_readers({"hbm": 3})
    records = trace.records.copy()
    records["expert"] = 0
    text = explain(Trace(records, trace.header, trace.critical_path))
    assert "2.0 µs went into weights read more than once (0.0 MB on all PEs, 2.0 times" in text


def test_the_time_over_the_workers_bound_by_hand() -> None:
    # the workers compute 1 µs in all, 0.5 µs each, and the bound says that it could be 0.4
    text = explain(two_readers({"workers": 0.4}))
    assert (
        "Of the 8.6 µs above it an average worker of PE 0 spent: 4.0 µs waiting for a task's weights, 3.0 µs without "
        "a task (not launched yet, or none left), 1.5 µs waiting for a task's inputs." in text
    )


@pytest.mark.parametrize("bound", ["longest_task", "critical_path", "links"])
def test_other_bounds_are_named_and_the_memory_is_told_apart(bound: str) -> None:
    text = explain(two_readers({bound: 6, "hbm": 5}))
    assert f"{BOUNDS[bound]}, 6.0 µs" in text
    assert "Of the 4.0 µs above the 5.0 µs that the memory needs for everything, as the memory of PE 0" in text


def test_one_token_in_whole_experts_is_slow_and_says_why() -> None:
    routing = Routing.uniform(QWEN, 1, ep_size=1, seed=0)
    why = explain(simulate(QWEN, routing=routing, policy="ancestor"))
    assert "Only 8 of 304 workers ever had a part of an expert" in why
    # 3 * 2048 * 768 * 2 bytes at 40 GB/s
    assert "a whole expert is 9.44 MB, which one worker streams in 235.9 µs at its cap of 40 GB/s" in why


def test_only_is_not_said_of_all_workers() -> None:
    trace = two_readers({"longest_task": 6, "hbm": 5})
    text = explain(trace)
    # 4 kB at 1 byte/ns
    assert "The longest pick alone needs 6.0 µs against 5.0 µs that the memory needs for everything" in text
    assert "one worker streams in 4.0 µs at its cap" in text and "Only" not in text
    assert "Only 2 of 3 workers ever had" in explain(
        Trace(trace.records, trace.header | {"num_workers": 3}, trace.critical_path)
    )


def test_the_time_while_the_memory_reads_is_told_with_its_window() -> None:
    trace = two_readers({"hbm": 5})
    records = trace.records.copy()
    records["hbm_bytes"][:2] = [1_000, 10]  # of 8 kB in the 4 µs from 3 to 7 µs
    text = explain(Trace(records, trace.header, trace.critical_path))
    assert "3.5 µs were lost in the 4.0 µs in which it read them, at 13% of its bandwidth" in text
    records["hbm_bytes"][:2] = [10, 10]
    text = explain(Trace(records, trace.header, trace.critical_path))
    assert "4.0 µs were lost in the 4.0 µs in which it read them, at less than 1% of its bandwidth" in text


@pytest.mark.parametrize(
    ("pe_speed", "why"),
    [
        ([1.0, 1.0], "which has most to read"),
        ([1.005, 1.0], "which has most to read"),
        ([0.5, 1.0], "which needs longest for what it has to read, at 0.50 times the nominal speed"),
    ],
)
def test_a_slow_pe_is_said_to_be_slow(pe_speed: list[float], why: str) -> None:
    trace = two_readers({"hbm": 5})
    text = explain(Trace(trace.records, trace.header | {"ep_size": 2, "pe_speed": pe_speed}, trace.critical_path))
    assert f"as the memory of PE 0, {why}, saw them" in text


@pytest.mark.parametrize("options", [{}, {"gap_us": 3.0}])
def test_a_layer_without_tokens_reads_nothing(options: dict[str, Any]) -> None:
    trace = simulate(SMALL, routing=Routing.uniform(SMALL, 0, ep_size=2, seed=0), workers=3, **options)
    text = explain(trace)
    assert "No task reads any weights." in text.splitlines() and "the memory of" not in text
    assert json.loads(json.dumps(summarise(trace), allow_nan=False))["text"] == text


def test_a_measured_trace_has_no_bound_and_says_so() -> None:
    trace = make_trace(
        [{"end_ps": 2 * US}, {"ready_ps": 2 * US, "ticket_ps": 2 * US, "start_ps": 3 * US, "end_ps": 4 * US}],
        critical_path=[0, 1],
        num_workers=1,
        executor="cpu",
    )
    lines = explain(trace).splitlines()
    assert lines[0] == "The makespan is 4.0 µs. A trace of executor 'cpu' has no bounds to hold it against."
    assert lines[1].endswith("is made of 3.0 µs arithmetic, 1.0 µs other inputs.")
    assert lines[2].endswith("workers spend 75% computing, 25% waiting for a task's inputs.")


def test_nothing_to_explain() -> None:
    assert explain(make_trace([])) == "No tasks: nothing to do, nothing to explain."
    assert summarise(make_trace([]))["makespan_us"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "ancestor"},
        {"policy": "push", "machine": "h200"},
        {"without": ["memory_sharing", "matrix_rate"]},
        {"workers": 1},
        {"gap_us": 3.0},
    ],
)
def test_any_simulated_trace_can_be_explained(options: dict[str, Any]) -> None:
    routing = [Routing.zipf(SMALL, 9, ep_size=2, exponent=1.0, seed=seed) for seed in range(2)]
    trace = simulate(SMALL, routing=routing, **({"workers": 6} | options))
    summary = json.loads(json.dumps(summarise(trace), allow_nan=False))
    assert summary["text"] == explain(trace)
    assert " us" not in summary["text"]
    assert sum(summary["critical_path"]["time_us"].values()) == pytest.approx(trace.makespan_us)
    assert len(summary["critical_path"]["tasks"]) == len(trace.critical_path)
    memory = summary["memory"]
    assert sum(time_us for name, time_us in memory.items() if name != "pe") == pytest.approx(trace.makespan_us)
    for pe in range(2):
        of_pe = sum(summary["worker_time_us"][name][pe] for name in WORKER_TIMES)
        assert of_pe == pytest.approx(trace.makespan_us)


# ---- the command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    two_readers({"hbm": 5}).save(tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_explain_for_people(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(app, ["explain", str(saved)])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "Of the 4.0 µs above it, as the memory of PE 0, which has most to read, saw them:" in text
    assert "up 1 on PE 0 → combine 2 on PE 0" in text
    # busy 4 + 4 + 1 of 18 µs; 8 kB of 18; tasks ready at 3, 3 and 8 µs started at once
    assert "PE 0 50% 44% 0.0 0" in text


def test_explain_for_scripts(saved: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(saved), "--json"])
    assert json.loads(result.stdout) == summarise(two_readers({"hbm": 5}))


def test_explain_refuses_what_is_no_trace(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "none.npz")])
    assert result.exit_code == 2 and "none.npz: no such file" in result.stderr


def test_every_effect_has_words() -> None:
    from flashmoe.answers import PATH_EFFECTS

    assert set(PATH_WORDS) == set(PATH_EFFECTS)
