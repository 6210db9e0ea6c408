"""What a layer is said to take on a card, beside what it takes."""

import pytest
from cards import BACKENDS

import flashmoe as fm
from flashmoe.hw import DeviceLayer, PackedWeights
from flashmoe.hw.memory import layer_memory

SMALL = fm.MoEModel(d_model=128, d_ff=64, num_experts=8, top_k=2)


def test_weights_and_scratch():
    memory = layer_memory(SMALL, 64)
    assert memory.weights == 2 * (8 * 128 + 8 * 3 * 128 * 64)
    assert memory.packing == 2 * 2 * 64 * 128  # one expert's gate and up rows, larger than its down rows


def test_the_workspace_holds_what_the_layer_is_made_of():
    """At least hidden rows and router logits of all tokens. The tunings for fewer tokens have their own on top."""
    model = fm.MoEModel.preset("qwen3-30b-a3b")
    few, many = (layer_memory(model, count).workspace for count in (512, 1024))
    assert many >= 1024 * (model.top_k * model.d_ff * 2 + model.num_experts * 4)
    assert 2 * few < many < 3 * few  # 1024 tokens have what 512 have, and as much again for each half of theirs
    # a thousand tokens need no more than the weights of an eighth of the experts
    assert many < layer_memory(model, 1024).weights / 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_tokens", [0, 8, 40])
def test_it_is_what_the_library_says(backend, max_tokens):
    packed = PackedWeights(SMALL, fm.Weights.random(SMALL), backend=backend)
    layer = DeviceLayer(
        SMALL, packed, ep_size=1, max_tokens=max_tokens, trace=False, backend=backend, kernel="pipeline"
    )
    assert layer.workspace_bytes == layer_memory(SMALL, max_tokens, workers=layer.workers).workspace
    assert packed.library.get("pack_scratch") == layer_memory(SMALL, max_tokens).packing
