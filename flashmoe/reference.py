"""The layer once more in slow, plain numpy: what an executor's numbers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.model import MoEModel
from flashmoe.weights import Weights

Float32 = NDArray[np.float32]


def gate_logits(model: MoEModel, weights: Weights, x: NDArray[Any]) -> Float32:
    """Return the router's logits (num_tokens, num_experts) of x (num_tokens, d_model), summed in float32.

    For bf16 they are then rounded to bf16, like the output of the linear layer in transformers and vLLM:
    the rounding decides which of two close experts is chosen.
    """
    _check_inputs(model, weights, x)
    return router_logits(model, weights.gate, x)


def router_logits(model: MoEModel, gate: NDArray[Any], x: NDArray[Any]) -> Float32:
    """`gate_logits` with the router's matrix (num_experts, d_model) alone."""
    return _rounded(_rounded(x, model) @ _rounded(gate, model).T, model)


def route(logits: Float32, model: MoEModel) -> tuple[NDArray[np.int32], Float32]:
    """Choose top_k experts a token by softmax over all experts; of equal ones the lower expert goes first.

    logits: (num_tokens, num_experts).
    Returns: topk_idx (num_tokens, top_k) int32 and topk_weights, float32 of the same shape, descending.
    Source: Qwen3MoeTopKRouter in transformers 5.
    """
    if logits.ndim != 2 or logits.shape[1] != model.num_experts:
        raise ValueError(f"logits has shape {logits.shape} (must be (num_tokens, {model.num_experts}))")
    # Ranked by logit: the same order as by probability, but no rounding of exp can make a tie.
    topk_idx = np.argsort(-logits, axis=1, kind="stable")[:, : model.top_k].astype(np.int32)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    topk_weights = np.take_along_axis(exp / exp.sum(axis=1, keepdims=True), topk_idx, axis=1)
    if model.norm_topk_prob:
        topk_weights /= topk_weights.sum(axis=1, keepdims=True)
    return topk_idx, topk_weights


def moe_layer(
    model: MoEModel,
    weights: Weights,
    x: NDArray[Any],
    routing: tuple[NDArray[np.integer[Any]], NDArray[Any]] | None = None,
) -> Float32:
    """Compute the layer for x (num_tokens, d_model); returns float32 of the same shape.

    routing: (topk_idx, topk_weights) of these tokens, -1 for a dropped slot; None: the gate decides.
    Sums are float32 throughout; for bf16, x, weights and silu(gate) * up are rounded to bf16.
    Raises: ValueError naming the shape or expert that does not fit.
    """
    _check_inputs(model, weights, x)
    topk_idx, topk_weights = route(gate_logits(model, weights, x), model) if routing is None else routing
    if topk_idx.ndim != 2 or len(topk_idx) != len(x) or topk_idx.shape != topk_weights.shape:
        raise ValueError(
            f"routing has shapes {topk_idx.shape} and {topk_weights.shape} (must be ({len(x)}, top_k), both)"
        )
    wrong = topk_idx[(topk_idx < -1) | (topk_idx >= model.num_experts)]
    if wrong.size:
        raise ValueError(f"routing has expert {wrong[0]} (must be in 0..{model.num_experts - 1}, or -1)")
    rows = _rounded(x, model)
    outputs = np.zeros(x.shape, dtype=np.float32)
    for expert in np.unique(topk_idx[topk_idx >= 0]):  # one at a time: a whole layer in float32 is 2.4 GB
        tokens, slots = np.nonzero(topk_idx == expert)
        gate, up = np.split(rows[tokens] @ _rounded(weights.gate_up[expert], model).T, 2, axis=1)
        hidden = _rounded(_silu(gate) * up, model)
        results = hidden @ _rounded(weights.down[expert], model).T
        outputs[tokens] += topk_weights[tokens, slots, None].astype(np.float32) * results
    return outputs


def relative_error(
    outputs: NDArray[Any] | Sequence[NDArray[Any]], reference: NDArray[Any] | Sequence[NDArray[Any]]
) -> float:
    """Return the Frobenius norm of outputs - reference over that of reference: one array, or one per PE.

    0.0 when nothing differs, also for empty or all-zero arrays; inf when only the reference is zero.
    """
    left = [outputs] if isinstance(outputs, np.ndarray) else outputs
    right = [reference] if isinstance(reference, np.ndarray) else reference
    shapes = [array.shape for array in left], [array.shape for array in right]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs have shapes {shapes[0]} (reference: {shapes[1]})")
    difference = size = 0.0
    with np.errstate(invalid="ignore"):  # inf - inf is nan, and nan is the answer
        for ours, theirs in zip(left, right, strict=True):
            exact = theirs.astype(np.float64)
            difference += float(np.sum((ours.astype(np.float64) - exact) ** 2))
            size += float(np.sum(exact**2))
    if difference == 0.0:
        return 0.0
    return float(np.sqrt(difference / size)) if size > 0.0 else float("inf")


def _check_inputs(model: MoEModel, weights: Weights, x: NDArray[Any]) -> None:
    weights.check(model)
    if x.ndim != 2 or x.shape[1] != model.d_model:
        raise ValueError(f"x has shape {x.shape} (must be (num_tokens, d_model={model.d_model}))")


def _rounded(array: NDArray[Any], model: MoEModel) -> Float32:
    """Return float32 that holds what the model's dtype can hold."""
    return array.astype(model.numpy_dtype, copy=False).astype(np.float32, copy=False)


def _silu(x: Float32) -> Float32:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        activated: Float32 = x / (1 + np.exp(-x))
    return activated
