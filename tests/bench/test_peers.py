"""The peers compute the layer: on CPU tensors, against float32."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from flashmoe.bench import inputs
from flashmoe.bench.peers import PEERS
from flashmoe.bench.result import TOLERANCE
from flashmoe.model import MoEModel

MODEL = MoEModel(d_model=64, d_ff=32, num_experts=16, top_k=4)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_peer_is_right_with_its_own_router_and_with_routing_given(
    name: str, tokens: int, norm_topk_prob: bool
) -> None:
    if name == "transformers":
        pytest.importorskip("transformers")
    model = MoEModel(d_model=64, d_ff=32, num_experts=16, top_k=4, norm_topk_prob=norm_topk_prob)
    sets = inputs.WeightSets(model, 2, "cpu")
    cell = inputs.make_cell(model, sets, tokens, "gate", 2, seed=2)
    forwards = [PEERS[name](model, weights) for weights in sets.layers]
    with torch.no_grad():
        inside = [forward(layer.x) for forward, layer in zip(forwards, cell.layers, strict=True)]
        given = [
            forward(layer.x, layer.topk_idx, layer.topk_weights)
            for forward, layer in zip(forwards, cell.layers, strict=True)
        ]
    assert [tuple(out.shape) for out in inside] == [(tokens, 64)] * 2
    assert 0 < inputs.relative_error(inside, cell.layers) < TOLERANCE
    assert 0 < inputs.relative_error(given, cell.layers) < TOLERANCE


def test_vllm_is_called_by_its_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with vLLM's signatures, as vLLM itself needs a GPU: what it is given, and what becomes of it."""
    sets = inputs.WeightSets(MODEL, 1, "cpu")
    cell = inputs.make_cell(MODEL, sets, 3, "gate", 1, seed=0)
    contexts: list[Any] = []

    class Context:
        def __init__(self, config: Any) -> None:
            contexts.append(config)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    def fused_topk(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool) -> Any:
        scales, idx = gating_output.float().softmax(-1).topk(topk)
        return scales / scales.sum(-1, keepdim=True) if renormalize else scales, idx.int(), None

    def fused_experts(hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> Any:
        return inputs.reference(inputs.LayerWeights(None, w1, w2), hidden_states, topk_ids, topk_weights).bfloat16()

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        module(parent)
    module("vllm.config", VllmConfig=object, set_current_vllm_config=Context)
    module("vllm.model_executor.layers.fused_moe", fused_experts=fused_experts, fused_topk=fused_topk)
    forward, layer = PEERS["vllm"](MODEL, sets.layers[0]), cell.layers[0]
    for out in (forward(layer.x), forward(layer.x, layer.topk_idx, layer.topk_weights)):
        assert inputs.relative_error([out], cell.layers) < TOLERANCE
    assert len(contexts) == 2


def test_a_peer_that_is_not_installed_says_so() -> None:
    if "vllm" in sys.modules:
        pytest.skip("vllm is installed")
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        PEERS["vllm"](MODEL, inputs.WeightSets(MODEL, 1, "cpu").layers[0])
