"""Launches among other work on a GPU: streams, captured graphs replayed with fresh inputs, torch.compile."""

import os

import numpy as np
import pytest
from cards import BACKENDS, MODEL, POISON, launch, make_layer
from layers import ERROR, assert_right, skewed_routing, tokens, tokens_without_ties, weights_of
from qwen import make_block, to_torch, torch

from flashmoe.reference import relative_error
from flashmoe.tasks import Tiling
from flashmoe.torch import MoE

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

NUM_REPLAYS = int(os.environ.get("FLASHMOE_REPLAYS", "2000"))
NUM_INPUTS = 16


class Static:
    """Inputs and outputs at fixed places, as a graph needs them, and drawn inputs with their outputs to take from."""

    def __init__(self, layer, counts, *, given):
        self.layer, self.counts, self.given = layer, counts, given
        routings = [
            skewed_routing(MODEL, counts, seed, skew=[0.0, 1.2, 30.0][seed % 3], dropped=0.1 * (seed % 2))
            for seed in range(NUM_INPUTS)
        ]
        x, wanted = [], []
        for seed, routing in enumerate(routings):
            x.append(tokens(MODEL, counts, seed))
            result = launch(layer, x[-1], routing if given else None)
            assert_right(MODEL, x[-1], result)
            wanted.append(result.outputs)
        self.drawn, self.wanted = map(self._together, (x, wanted))
        for name in ("topk_idx", "topk_weights"):
            values = [np.concatenate(getattr(routing, name)) for routing in routings]
            setattr(self, f"drawn_{name}", torch.from_numpy(np.stack(values)).cuda())
        self.x, self.out = torch.empty_like(self.drawn[0]), torch.empty_like(self.drawn[0])
        self.topk_idx, self.topk_weights = map(torch.empty_like, (self.drawn_topk_idx[0], self.drawn_topk_weights[0]))

    def _together(self, per_input):
        return torch.stack([to_torch(np.concatenate(per_pe)) for per_pe in per_input]).cuda()

    def take(self, which):
        self.x.copy_(self.drawn[which])
        self.topk_idx.copy_(self.drawn_topk_idx[which])
        self.topk_weights.copy_(self.drawn_topk_weights[which])
        self.out.view(torch.int16).fill_(POISON)

    def launch(self):
        def pointers(tensor):
            return [rows.data_ptr() for rows in tensor.split(self.counts)]

        given = {name: pointers(getattr(self, name)) for name in ("topk_idx", "topk_weights")} if self.given else {}
        stream = torch.cuda.current_stream().cuda_stream
        self.layer.launch(pointers(self.x), pointers(self.out), self.counts, **given, stream=stream)

    def wrong(self, which):
        """A tensor: whether any bit of the output differs."""
        return (self.out.view(torch.int16) != self.wanted[which].view(torch.int16)).any()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("policy", "tiling", "counts"),
    [
        ("tuned", None, [1]),
        ("tuned", None, [8]),
        ("tuned", None, [40]),
        ("push", Tiling(), [40]),
        ("ticket", Tiling(), [3, 0, 9, 16, 0, 1, 5, 2]),
        ("push", Tiling(down="rows", down_rows=16), [7, 12]),
        ("domain_steal", Tiling(granularity="token"), [4, 0, 6, 1]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_graph_replayed_with_fresh_inputs(backend, policy, tiling, counts, given):
    layer = make_layer(
        MODEL, backend, ep_size=len(counts), max_tokens=max(counts), policy=policy, tiling=tiling, trace=False
    )
    static, graph = Static(layer, counts, given=given), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.launch()
    num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for which in np.random.default_rng(1).integers(NUM_INPUTS, size=NUM_REPLAYS).tolist():
        static.take(which)
        graph.replay()
        num_wrong += static.wrong(which)
    layer.check()
    assert num_wrong.item() == 0


def test_a_launch_takes_its_turn_on_its_stream_and_does_not_wait(backend):
    layer = make_layer(MODEL, backend, policy="tuned", trace=False)
    static, stream = Static(layer, [24], given=False), torch.cuda.Stream()
    for which in range(4):
        with torch.cuda.stream(stream):
            static.take((which + 1) % 4)
            torch.cuda._sleep(50_000_000)  # some 30 ms: had the launch not waited for it, x would be the old one
            static.take(which)
            static.launch()
            kept = static.out.clone()
            static.x.zero_()  # the launch has read it
            assert not stream.query(), "the call waited for the device"
        stream.synchronize()
        assert torch.equal(kept.view(torch.int16), static.wanted[which].view(torch.int16))
    layer.check()


# ---- as a module of torch


def make_module(**options):
    weights = weights_of(MODEL)
    tensors = (to_torch(array).cuda() for array in (weights.gate, weights.gate_up, weights.down))
    return MoE(MODEL, *tensors, max_tokens=64, **options)


def routed(seed, count):
    routing = skewed_routing(MODEL, [count], seed, skew=1.0, dropped=0.2)
    return [torch.from_numpy(values[0].copy()).cuda() for values in (routing.topk_idx, routing.topk_weights)]


@pytest.mark.parametrize("count", [1, 8, 9, 64])
def test_a_stack_of_modules_in_a_graph(backend, count):
    modules = [make_module() for _ in range(3)]

    def stack(x, idx, weights):
        for module in modules:
            x = x + module(x) + module(x, idx, weights)
        return x

    x = torch.randn(count, MODEL.d_model, device="cuda").bfloat16()
    idx, weights = routed(0, count)
    with torch.no_grad():
        stack(x, idx, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = stack(x, idx, weights)
        for seed in range(20):
            x.normal_()
            fresh = routed(seed, count)
            idx.copy_(fresh[0])
            weights.copy_(fresh[1])
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, stack(x, idx, weights))
    for module in modules:
        module.check()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch makes one for itself
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_gives_the_same_bits(backend, mode):
    module = make_module()

    def twice(x, idx, weights):
        return module(module(x), idx, weights)

    compiled = torch.compile(twice, fullgraph=True, mode=mode)
    for seed in range(5):
        x = torch.randn(20, MODEL.d_model, device="cuda").bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x, *routed(seed, 20)), twice(x, *routed(seed, 20)))
    module.check()


def test_a_module_agrees_with_the_block_that_it_was_made_of(backend):
    weights = weights_of(MODEL)
    block = make_block(MODEL, *(to_torch(array).cuda() for array in (weights.gate, weights.gate_up, weights.down)))
    module = MoE.from_hf(block, copy=True, max_tokens=64)
    x = to_torch(tokens_without_ties(MODEL, weights, [7])[0]).cuda()[None]
    with torch.no_grad():
        ours, theirs = module(x), block(x)
        assert ours.shape == theirs.shape
    assert relative_error(ours.float().cpu().numpy(), theirs.float().cpu().numpy()) < ERROR["bf16"]
