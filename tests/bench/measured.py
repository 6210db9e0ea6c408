"""A result as a run would leave it, with round numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

from flashmoe.bench.result import Measurement, Missing, Result

HEADER: dict[str, Any] = {
    "version": "0.1.0",
    "date": "2026-11-23T10:00:00+00:00",
    "device": "NVIDIA H200",
    "num_cus": 132,
    "clocks": {"driver_version": "580.1"},
    "torch": "2.11.0",
    "cuda": "13.0",
    "commit": None,
    "model": {
        "name": "qwen3-30b-a3b", "d_model": 2048, "d_ff": 768, "num_experts": 128, "top_k": 8, "dtype": "bf16",
        "norm_topk_prob": True,
    },
    "num_layers": 8,
    "repeats": 30,
    "seed": 0,
    "weight_sets": 2,
    "weight_sets_bytes": 2_415_919_104,
    "empty_graph_us": 2.5,
    "command": "flashmoe bench --tokens 1,8",
}  # fmt: skip


def row(tokens: int, who: str, how: Any, variant: str, median_us: float, **more: Any) -> Measurement:
    distinct = {1: 8.0, 8: 50.0}[tokens]
    about = {"error": None if who == "read" else 2e-3, "same_bits": None if who == "read" else True} | more
    return Measurement(
        tokens=tokens,
        routing=about.pop("routing", "gate"),
        who=who,
        how=how,
        variant=variant,
        distinct_experts=distinct,
        weight_bytes=distinct * 9_437_184,
        median_us=median_us,
        p10_us=0.9 * median_us,
        p90_us=1.1 * median_us,
        replays=30,
        **about,
    )


def small_result() -> Result:
    rows = [
        row(1, "read", "read", "loads", 25.0),
        row(1, "read", "read", "bulk copies", 20.0),
        row(1, "flashmoe", "gate", "tuned", 25.0, kernel="pipeline"),
        row(1, "flashmoe", "given", "tuned", 22.0, kernel="pipeline"),
        row(1, "flashmoe", "alone", "tuned", 30.0, kernel="pipeline"),
        row(1, "torch", "gate", "", 100.0),
        row(1, "torch", "given", "", 80.0),
        row(8, "read", "read", "loads", 100.0),
        row(8, "read", "read", "bulk copies", 104.0),
        row(8, "flashmoe", "gate", "tuned", 125.0, kernel="pipeline, lists of 16"),
        row(8, "flashmoe", "given", "tuned", 110.0, kernel="pipeline"),
        row(8, "flashmoe", "alone", "tuned", 130.0, kernel="pipeline"),
        row(8, "torch", "gate", "", 250.0, error=float("nan"), same_bits=False),
        row(1, "flashmoe", "gate", "push", 40.0, kernel="general"),
        row(8, "flashmoe", "gate", "push", 200.0, kernel="general"),
    ]
    missing = [
        Missing(who="vllm", tokens=None, reason="not installed"),
        Missing(who="torch", tokens=8, reason="RuntimeError: no"),
    ]
    return Result(HEADER, rows, missing)
