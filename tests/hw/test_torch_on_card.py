"""What the torch module does on a GPU only: weights in place, faults seen late, traces of replays."""

import pytest
from cards import BACKENDS
from layers import ERROR, skewed_routing, tokens_without_ties, weights_of
from qwen import make_block, to_torch, torch

from flashmoe.hw import LaunchError, tuned
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.reference import relative_error
from flashmoe.tasks import Tiling
from flashmoe.torch import MoE

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

MODEL = MoEModel(d_model=320, d_ff=192, num_experts=16, top_k=4, name="card")
ROWS = Tiling(down="rows", down_rows=16, block_tokens=8)


def tensors_of():
    weights = weights_of(MODEL)
    return [to_torch(array).cuda() for array in (weights.gate, weights.gate_up, weights.down)]


def make(**options):
    return MoE(MODEL, *tensors_of(), **{"max_tokens": 40, **options})


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_a_blocks_weights_are_packed_where_they_are(backend):
    gate, gate_up, down = tensors_of()
    block = make_block(MODEL, gate, gate_up, down)
    x = to_torch(tokens_without_ties(MODEL, weights_of(MODEL), [7])[0]).cuda()[None]
    theirs, before = block(x), torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match="flashmoe"):
        MoE.from_hf(block, policy="flashmoe")
    assert torch.equal(block(x), theirs)  # nothing is lost
    module = MoE.from_hf(block, max_tokens=40)
    assert torch.cuda.memory_allocated() == before
    assert module.gate_up.data_ptr() == gate_up.data_ptr() and module.down.data_ptr() == down.data_ptr()
    assert relative_error(module(x).float().cpu().numpy(), theirs.float().cpu().numpy()) < ERROR["bf16"]
    assert block.experts.gate_up_proj.numel() == block.experts.down_proj.numel() == 0
    copied = make(copy=True)
    assert torch.equal(copied(x), module(x))


def test_tensors_that_are_not_its_own(backend):
    module, x = make(), torch.randn(5, 2 * MODEL.d_model, device="cuda").bfloat16()
    half = x[:, : MODEL.d_model]
    assert torch.equal(module(half), module(half.contiguous()))
    assert module(x[:0, : MODEL.d_model]).shape == (0, MODEL.d_model)
    for wrong, named in (
        (half.cpu(), "x is on cpu"),
        (half.float(), "x is torch.float32"),
        (x, "x: shape"),
        (half.repeat(9, 1), "45 tokens .*max_tokens=40"),
    ):
        with pytest.raises(ValueError, match=named):
            module(wrong)
    module.check()


def test_operators_on_the_card(backend):
    module, x = make(), torch.randn(9, MODEL.d_model, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.flashmoe.moe.default, (x, module.handle))
    idx = torch.arange(36, device="cuda", dtype=torch.int32).view(9, 4) % MODEL.num_experts
    weights = torch.full((9, 4), 0.25, device="cuda")
    torch.library.opcheck(torch.ops.flashmoe.moe_routed.default, (x, idx, weights, module.handle))


@pytest.mark.parametrize("count", [3, 20])
def test_the_trace_of_a_replayed_graph(backend, count):
    module, x = make(trace=True), torch.randn(count, MODEL.d_model, device="cuda").bfloat16()
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    digests = set()
    for _ in range(3):
        x.normal_()
        graph.replay()
        trace = module.last_trace()
        digests.add(trace.header["routing"])
        assert trace.header["num_tokens"] == [count] and trace.header["drops"] == 0
        assert trace.header["tiling"] == tuned(count).tiling.to_dict()
        assert len(trace.critical_path) > 0  # every task is there
        assert torch.equal(out, module(x))
    assert len(digests) == 3


def test_a_launch_that_cannot_go_on_is_told_by_check(backend):
    """Lists for one routing, launched with another: the plan's builder sees it."""
    module = make(policy=Policy(name="big_first", queue="static", rank=lambda task: -task.num_tokens, tiling=ROWS))
    x = torch.randn(20, MODEL.d_model, device="cuda").bfloat16()
    expected, other = (skewed_routing(MODEL, [20], seed, skew=1.0, dropped=0.0) for seed in (1, 2))
    given = {
        routing: [torch.from_numpy(values[0].copy()).cuda() for values in (routing.topk_idx, routing.topk_weights)]
        for routing in (expected, other)
    }
    module._runner.layer.follow(expected, gate=False)
    wanted = module(x, *given[expected])
    module.check()
    module(x, *given[other])  # is not told
    with pytest.raises(LaunchError, match="another routing"):
        module.check()
    assert torch.equal(module(x, *given[expected]), wanted)
    module.check()
