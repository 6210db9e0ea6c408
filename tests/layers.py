"""Random layers for tests: sizes that divide nothing, skewed and dropped routings, every tiling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.model import MoEModel
from flashmoe.reference import gate_logits, moe_layer, relative_error
from flashmoe.routing import Routing
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.weights import Weights

BUILT_IN_POLICIES = [
    "ancestor",
    "push",
    "ticket",
    "domain_steal",
    "static_phase",
    "expert_lpt",
    "local_first",
    "remote_first",
]

ODD = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="f32", name="odd")
EIGHT = MoEModel(d_model=24, d_ff=20, num_experts=8, top_k=3, dtype="f32", name="eight")  # for 1, 2, 4 and 8 PEs
ERROR = {"f32": 1e-5, "bf16": 1e-2}  # relative, of an executor against the reference or transformers


@functools.cache
def weights_of(model: MoEModel) -> Weights:
    return Weights.random(model, seed=5)


def tokens(model: MoEModel, counts: Sequence[int], seed: int = 0) -> list[NDArray[Any]]:
    """One (count, d_model) array of normal numbers per PE. All tokens lie in one stream: only the cuts differ."""
    rows = np.random.default_rng(seed).standard_normal((sum(counts), model.d_model)).astype(model.numpy_dtype)
    return np.split(rows, np.cumsum(counts)[:-1])


def tokens_without_ties(model: MoEModel, weights: Weights, counts: Sequence[int]) -> list[NDArray[Any]]:
    """Tokens whose last chosen and first refused expert are far enough apart that rounding cannot swap them.

    In bf16 logits are rounded to 8 bits, so two experts are equal now and then; which one is chosen then depends on
    the order in which a product was summed. That is no error, and another expert is another result.
    """
    for seed in range(200):
        x = tokens(model, counts, seed)
        logits = -np.sort(-gate_logits(model, weights, np.concatenate(x)), axis=1)
        gap = logits[:, model.top_k - 1] - logits[:, model.top_k]
        # two steps of bf16 at this size; many times the noise of a float32 sum
        if (gap > 2**-6 * np.abs(logits).max(axis=1)).all():
            return x
    raise AssertionError("no seed without near-ties")


def expected(model: MoEModel, x: Sequence[NDArray[Any]], routing: Routing) -> list[NDArray[Any]]:
    """The reference, for the experts that were really used: a near-tie in the gate must not count as an error."""
    pairs = zip(routing.topk_idx, routing.topk_weights, strict=True)
    return [moe_layer(model, weights_of(model), rows, pair) for rows, pair in zip(x, pairs, strict=True)]


def assert_right(model: MoEModel, x: Sequence[NDArray[Any]], result: Any) -> None:
    """result: what a run with weights_of(model) gave."""
    assert relative_error(result.outputs, expected(model, x, result.routing)) < ERROR[model.dtype]


def bits(outputs: Sequence[NDArray[Any]]) -> list[bytes]:
    return [rows.tobytes() for rows in outputs]


def routing_from(rows: Sequence[Sequence[Sequence[int]]], num_experts: int) -> Routing:
    """rows: per PE, per token its experts. Each slot weighs 1 / top_k."""
    top_k = max(len(experts) for pe in rows for experts in pe)
    idx = tuple(np.array(pe, np.int32).reshape(len(pe), top_k) for pe in rows)
    return Routing(idx, tuple(np.full(i.shape, 1 / top_k, np.float32) for i in idx), num_experts)


def skewed_routing(model: MoEModel, counts: Sequence[int], seed: int, skew: float, dropped: float) -> Routing:
    """Experts drawn with probability ~ rank**-skew; each slot is dropped with probability `dropped`."""
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, model.num_experts + 1) ** -skew
    idx, weights = [], []
    for count in counts:
        chosen = np.zeros((count, model.top_k), np.int32)
        for token in range(count):
            chosen[token] = rng.choice(model.num_experts, model.top_k, replace=False, p=popularity / popularity.sum())
        chosen[rng.random(chosen.shape) < dropped] = -1
        idx.append(chosen)
        weights.append(rng.random(chosen.shape, np.float32))
    return Routing(tuple(idx), tuple(weights), model.num_experts, "skewed")


def pairs_of(routing: Routing) -> list[list[tuple[int, int, int]]]:
    """For each expert the (PE, token, slot) that go to it, counted by hand."""
    pairs: list[list[tuple[int, int, int]]] = [[] for _ in range(routing.num_experts)]
    for pe, idx in enumerate(routing.topk_idx):
        for token, experts in enumerate(idx.tolist()):
            for slot, expert in enumerate(experts):
                if expert >= 0:
                    pairs[expert].append((pe, token, slot))
    return pairs


def edges(ptr: NDArray[Any], values: NDArray[Any], row: int) -> list[int]:
    """Row of a compressed edge list."""
    return [int(value) for value in values[int(ptr[row]) : int(ptr[row + 1])]]


def assert_sound(table: TaskTable, order: Sequence[int]) -> None:
    """The rows of `order`, with their chains, are all tasks once, none before a task that it waits for."""
    done = np.zeros(len(table.event_target), np.int64)
    ran = []
    for head in order:
        assert table.tasks["chain"][head] > 0
        for row in range(head, head + int(table.tasks["chain"][head])):
            for event in edges(table.wait_ptr, table.wait_event, row):
                assert done[event] == table.event_target[event], (
                    f"{table.describe(row)} before its inputs ({table.describe_event(event)})"
                )
            for event in edges(table.signal_ptr, table.signal_event, row):
                done[event] += 1
            ran.append(row)
    assert sorted(ran) == list(range(len(table)))


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    dispatch_tokens = draw(st.integers(1, 3))
    sizes: dict[str, Any] = {
        "gate_tokens": dispatch_tokens * draw(st.integers(1, 3)),
        "dispatch_tokens": dispatch_tokens,
        "gate_experts": draw(st.integers(1, 17)),
        "up_rows": draw(st.integers(1, 50)),
        "down_rows": draw(st.integers(1, 100)),
        "combine_tokens": draw(st.integers(1, 3)),
    }
    if draw(st.integers(0, 3)) == 0:
        return Tiling(granularity="token", **sizes)
    return Tiling(
        down=draw(st.sampled_from(["tile", "rows"])),
        block_tokens=draw(st.sampled_from([1, 2, 3, 64])),
        experts_per_pick=draw(st.integers(0, 3)),
        **sizes,
    )


@st.composite
def layers(draw: st.DrawFn, max_tokens: int = 6) -> tuple[MoEModel, Routing, Tiling]:
    num_pes = draw(st.sampled_from([1, 2, 4, 8]))
    num_experts = num_pes * draw(st.integers(1, 16 // num_pes))
    model = MoEModel(
        d_model=draw(st.integers(1, 96)),
        d_ff=draw(st.integers(1, 48)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        dtype=draw(st.sampled_from(["bf16", "f32"])),
    )
    counts = draw(st.lists(st.integers(0, max_tokens), min_size=num_pes, max_size=num_pes))
    routing = skewed_routing(
        model,
        counts,
        seed=draw(st.integers(0, 99)),
        skew=draw(st.sampled_from([0.0, 2.0, 30.0])),  # 30: all tokens on the same top_k experts
        dropped=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    )
    return model, routing, draw(tilings())
