"""Layers of many shapes on a GPU, up to the largest that the kernels take, against transformers' block on the card."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cards import BACKENDS, launch
from layers import ERROR, skewed_routing
from qwen import make_block, torch
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe.cli import app
from flashmoe.hw.build import build_library
from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.library import TARGETS
from flashmoe.hw.packed import PackedWeights
from flashmoe.model import MoEModel
from flashmoe.reference import relative_error

NUM_TOKENS = (0, 1, 7, 8, 9, 16, 17, 64, 100, 256, 1000, 1024)
SHAPES = {
    "30b": MoEModel.preset("qwen3-30b-a3b"),
    "235b": MoEModel.preset("qwen3-235b-a22b"),
    "smallest": MoEModel(d_model=64, d_ff=64, num_experts=1, top_k=1),
    "wide": MoEModel(d_model=8192, d_ff=64, num_experts=8, top_k=2),
    "deep": MoEModel(d_model=64, d_ff=8192, num_experts=8, top_k=2),
    "largest": MoEModel(d_model=8192, d_ff=8192, num_experts=8, top_k=4),
    "crowd": MoEModel(d_model=192, d_ff=320, num_experts=512, top_k=16),
    "odd": MoEModel(d_model=1344, d_ff=704, num_experts=60, top_k=6, norm_topk_prob=False),
}


@functools.cache
def build_all(backend):
    """All at once: a compile keeps one core busy for half a minute."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda model: build_library(model, TARGETS[backend]), SHAPES.values()))


@pytest.fixture(autouse=True)
def _return_memory():
    yield
    torch.cuda.empty_cache()  # the next test's layer allocates its own


def draw(model, seed):
    """gate, gate_up and down as `Weights.random` scales them, on the card."""
    generator = torch.Generator("cuda").manual_seed(seed)
    experts, rows, columns = model.num_experts, model.d_model, model.d_ff
    shapes = (experts, rows), (experts, 2 * columns, rows), (experts, rows, columns)
    return [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_(
            -((3 / shape[-1]) ** 0.5), (3 / shape[-1]) ** 0.5, generator=generator
        )
        for shape in shapes
    ]


def on_card(routing):
    """topk_idx and topk_weights of all PEs' tokens."""
    return [torch.from_numpy(np.concatenate(values)).cuda() for values in (routing.topk_idx, routing.topk_weights)]


def from_transformers(block, x, routing):
    """Outputs in bf16 for all PEs' tokens, with the routing that the layer used."""
    idx, scores = (
        torch.from_numpy(np.concatenate(values)).cuda() for values in (routing.topk_idx, routing.topk_weights)
    )
    with torch.no_grad():  # a dropped slot: any expert, with no weight
        return block.experts(x, idx.clamp(min=0).long(), torch.where(idx < 0, 0, scores)).float().cpu().numpy()


def assert_chosen_by_the_gate(block, x, routing):
    """No refused expert is better than a chosen one by more than two roundings to bf16, and the weights are theirs."""
    with torch.no_grad():
        logits, _, _ = block.gate(x)
    logits = logits.float()
    idx, scores = (
        torch.from_numpy(np.concatenate(values)).cuda() for values in (routing.topk_idx, routing.topk_weights)
    )
    chosen = logits.gather(1, idx.long())
    refused = logits.scatter(1, idx.long(), -torch.inf).amax(1)
    assert (idx.sort(1).values.diff(dim=1) > 0).all()  # distinct
    assert (chosen.amin(1) >= refused - 2**-7 * logits.abs().amax(1)).all()
    wanted = logits.softmax(1).gather(1, idx.long())
    if block.gate.norm_topk_prob:
        wanted /= wanted.sum(1, keepdim=True)
    torch.testing.assert_close(scores, wanted, rtol=5e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "ep_size"),
    [*((shape, 1) for shape in SHAPES), ("30b", 2), ("30b", 8), ("235b", 4), ("largest", 2), ("crowd", 8), ("odd", 4)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_shape_and_number_of_tokens_agrees_with_transformers(backend, shape, ep_size):
    build_all(backend)
    model = SHAPES[shape]
    weights = draw(model, seed=ep_size)
    block = make_block(model, *(tensor.clone() for tensor in weights))
    packed = PackedWeights.in_place(model, *weights, backend=backend)
    layer = DeviceLayer(
        model, packed, backend=backend, ep_size=ep_size, max_tokens=1024, policy="tuned", deadline_s=10, trace=False
    )
    generator = torch.Generator("cuda").manual_seed(7)
    for turn in range(len(NUM_TOKENS)):
        # the last PEs have other numbers of tokens than the first, and some none
        counts = [NUM_TOKENS[(turn - 5 * pe) % len(NUM_TOKENS)] for pe in range(ep_size)]
        x = [torch.randn(n, model.d_model, device="cuda", generator=generator).bfloat16() for n in counts]
        together = torch.cat(x)
        for routing in (None, skewed_routing(model, counts, seed=turn, skew=1.2, dropped=0.1)):
            result = launch(layer, x, routing)
            if routing is None:
                assert_chosen_by_the_gate(block, together, result.routing)
            wanted = from_transformers(block, together, result.routing)
            error = relative_error(np.concatenate(result.outputs), wanted)
            assert error < ERROR["bf16"], f"{counts} tokens, {'gate' if routing is None else 'given'}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_simulated_schedule_runs_on_the_card_from_the_command_line(backend, tmp_path, monkeypatch):
    build_all(backend)
    monkeypatch.chdir(tmp_path)
    for line in (
        f"run --backend {backend} --tokens 8 --save-routing routing.npz --out gate.npz",
        "simulate --machine h200 --routing routing.npz --policy expert_lpt --out plan.npz",
        f"run --backend {backend} --replay plan.npz --out run.npz",
        "compare plan.npz run.npz",
    ):
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, done.output
    plan, measured = (fm.Trace.load(f"{name}.npz") for name in ("plan", "run"))
    np.testing.assert_array_equal(measured.records["worker"], plan.records["worker"])
    assert fm.Trace.load("gate.npz").header["policy"] == "tuned"
