"""The benchmark's course on CPU tensors: graphs, events and the device library have stand-ins, all else is real."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from flashmoe.bench import inputs, ours, timing
from flashmoe.bench import run as bench_run
from flashmoe.bench.peers import torch_grouped
from flashmoe.hw import LaunchError
from flashmoe.model import MoEModel

MODEL = MoEModel(d_model=64, d_ff=32, num_experts=16, top_k=4)


class EagerGraph:
    """A CUDA graph's stand-in: a replay computes again, into the outputs of the first time."""

    def __init__(self, layers: list[Callable[[], Any]]) -> None:
        self._layers, self.num_layers = layers, len(layers)
        self.outputs = [layer() for layer in layers]

    def replay(self) -> None:
        for out, layer in zip(self.outputs, self._layers, strict=True):
            out.copy_(layer())


class Event:
    """Time that passes by 80 us between any two of them."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        Event.now_ms += 0.080
        self.at_ms = Event.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(bench_run, "Graph", EagerGraph)
    monkeypatch.setattr(bench_run, "run_once", lambda launches: [launch() for launch in launches])
    monkeypatch.setattr(bench_run, "as_forward", lambda layer: layer)


class Reads:
    names = ("one way", "another")

    def __init__(self) -> None:
        self.num_bytes: list[list[int]] = []

    def layers(self, variant: int, num_bytes: list[int]) -> list[Callable[[], Any]]:
        self.num_bytes.append(num_bytes)
        return [lambda: torch.zeros(1) for _ in num_bytes]


def make(routing: str, tokens: int = 4) -> tuple[bench_run._Run, inputs.Cell, list[Any]]:
    sets = inputs.WeightSets(MODEL, 2, "cpu")
    steps: list[Any] = []
    run = bench_run._Run(MODEL, sets, repeats=5, progress=lambda *step: steps.append(step), num_steps=2)
    return run, inputs.make_cell(MODEL, sets, tokens, routing, 3, seed=0), steps


class Layer:
    """A device layer's stand-in."""

    def __init__(self, forward: Callable[..., Any], fault: Exception | None = None) -> None:
        self._forward, self._fault = forward, fault

    def __call__(self, *arguments: Any) -> Any:
        return self._forward(*arguments)

    def kernel_name(self, num_tokens: int) -> str:
        return f"pipeline for {num_tokens}"

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault


class Packed:
    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers

    def layers(self, variant: str, max_tokens: int) -> list[Layer]:
        return self._layers


def grouped(run: bench_run._Run) -> list[Any]:
    return [Layer(torch_grouped(MODEL, weights)) for weights in run.sets.layers]


def test_a_graph_s_time_is_divided_by_its_layers() -> None:
    times = timing.time_graphs([EagerGraph([lambda: torch.zeros(1)] * 8)], repeats=5)  # type: ignore[list-item]
    assert times.median_us == pytest.approx(10.0) and times.p90_us == pytest.approx(10.0)


def test_reads_get_the_bytes_of_each_layer_s_experts() -> None:
    run, cell, _ = make("gate")
    reads = Reads()
    run.measure_reads(cell, reads)  # type: ignore[arg-type]
    wanted = [distinct * 3 * 64 * 32 * 2 for distinct in cell.distinct]
    assert reads.num_bytes == [wanted, wanted]
    assert [(row.who, row.variant) for row in run.measurements] == [("read", "one way"), ("read", "another")]
    assert run.measurements[0].weight_bytes == pytest.approx(sum(wanted) / 3)
    assert run.measurements[0].error is None


def test_ours_is_measured_with_the_gate_given_and_alone() -> None:
    run, cell, steps = make("gate")
    run.measure_ours(cell, grouped(run))
    assert [row.how for row in run.measurements] == ["gate", "alone", "given"]
    assert all(row.right and row.same_bits and row.error for row in run.measurements)
    assert run.measurements[0].median_us == pytest.approx(80 / 3)  # three layers in one graph
    assert run.measurements[1].median_us == pytest.approx(80)
    assert {row.kernel for row in run.measurements} == {"pipeline for 4"}
    assert [row.replays for row in run.measurements] == [5, 15, 5]
    assert steps == [(1, 2)]


def test_a_policy_is_measured_as_a_whole_only() -> None:
    run, cell, _ = make("gate")
    run.measure_policy(cell, "ticket", Packed(grouped(run)))  # type: ignore[arg-type]
    assert [(row.variant, row.how, row.right) for row in run.measurements] == [("ticket", "gate", True)]


def test_a_family_s_routing_is_always_given() -> None:
    run, cell, _ = make("zipf:1.2")
    run.measure_ours(cell, grouped(run))
    run.measure_peer(cell, "torch", grouped(run))
    assert [(row.who, row.how) for row in run.measurements] == [
        ("flashmoe", "given"), ("flashmoe", "alone"), ("torch", "given"),
    ]  # fmt: skip
    assert all(row.right for row in run.measurements)


def test_an_output_that_is_not_written_is_wrong() -> None:
    run, cell, _ = make("gate")

    def lazy(x: Any, *given: Any) -> Any:
        return torch.full_like(x, float("nan"))

    run.measure_policy(cell, "ticket", Packed([Layer(lazy), Layer(lazy)]))  # type: ignore[arg-type]
    assert [row.right for row in run.measurements] == [False]
    assert math.isnan(run.measurements[0].error or 0.0)


def test_a_result_that_goes_wrong_later_is_wrong() -> None:
    run, cell, _ = make("gate")
    good, calls = grouped(run), []

    def spoiled(x: Any, *given: Any) -> Any:
        calls.append(1)
        out = good[0](x, *given)
        return out if len(calls) < 12 else 2 * out

    # two of the three layers run on the first set: 6 calls until the replay that is looked at first has passed
    run.measure_policy(cell, "ticket", Packed([Layer(spoiled), good[1]]))  # type: ignore[arg-type]
    assert not run.measurements[0].right
    assert run.measurements[0].error == pytest.approx(1.0, abs=0.02)  # twice as much
    assert run.measurements[0].same_bits is False


def test_weight_sets_take_turns() -> None:
    _, cell, _ = make("gate")
    seen: list[str] = []
    launches = bench_run._launches(cell, [lambda x: seen.append("a"), lambda x: seen.append("b")], "gate")
    for launch in launches:
        launch()
    assert seen == ["a", "b", "a"]


def test_a_peer_that_fails_costs_only_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    run, cell, steps = make("gate")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel\nwith a long story")

    monkeypatch.setitem(bench_run.PEERS, "torch", broken)
    assert run.make_peer("torch") is None
    run.measure_peer(cell, "transformers", [broken, broken])
    assert [(m.who, m.tokens, m.reason) for m in run.missing] == [
        ("torch", None, "RuntimeError: no kernel"),
        ("transformers", 4, "RuntimeError: no kernel"),
    ]
    assert run.measurements == [] and steps == [(1, 2)]


def test_a_peer_that_is_not_there_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = make("gate")

    def absent(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setitem(bench_run.PEERS, "vllm", absent)
    assert run.make_peer("vllm") is None
    assert run.missing[0].reason == "not installed"


def test_a_policy_that_no_kernel_can_do_is_missing_with_the_reason() -> None:
    run, cell, steps = make("gate")

    class Refusing:
        def layers(self, variant: str, max_tokens: int) -> Any:
            raise ValueError("queue push (the kernel does ticket)")

    run.measure_policy(cell, "push", Refusing())  # type: ignore[arg-type]
    assert [(m.who, m.tokens, m.reason) for m in run.missing] == [
        ("flashmoe push", 4, "ValueError: queue push (the kernel does ticket)")
    ]
    assert run.measurements == [] and steps == [(1, 2)]


def test_a_launch_that_cannot_go_on_ends_its_policy_at_once() -> None:
    run, cell, _ = make("gate")
    hanging = Layer(lambda x: x.clone(), LaunchError("worker 3 waits", {}))
    run.measure_policy(cell, "push", Packed([hanging, hanging]))  # type: ignore[arg-type]
    assert [m.reason for m in run.missing] == ["LaunchError: worker 3 waits"] and run.measurements == []
    with pytest.raises(LaunchError):
        run.measure_ours(cell, [hanging, hanging])  # type: ignore[list-item]


def test_what_is_slow_gets_fewer_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    times = timing.time_graphs([EagerGraph([lambda: torch.zeros(1)])], repeats=30)  # type: ignore[list-item]
    assert times.replays == 3  # a clock that ticks when it is read is past 2 s before the last of the warm-up


def test_policies_are_cut_in_their_own_way_and_as_tuned() -> None:
    assert ours.policy_variants(["ticket", "ancestor"]) == ["ticket", "ticket, tuned tiling", "ancestor"]
    with pytest.raises(ValueError, match="policy='fifo'"):
        ours.policy_variants(["fifo"])


def test_reads_rotate_through_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def text(self, name: str, variant: int) -> str | None:
            return None if variant == 2 else "a way"

        def call(self, name: str, pointer: Any, count: Any, variant: Any, stream: Any) -> None:
            calls.append((pointer.value, count.value))

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(ours, "load_library", lambda model, backend: Library())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    data = torch.zeros(500, dtype=torch.bfloat16)  # 1000 bytes
    kernels = ours.ReadKernels(MODEL, data)
    assert kernels.names == ["a way", "a way"]
    for layer in kernels.layers(1, [400, 480, 160, 400]):
        layer()
    start = data.data_ptr()
    assert calls == [(start, 400), (start + 400, 480), (start, 160), (start + 160, 400)]
