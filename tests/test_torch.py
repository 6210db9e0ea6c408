"""The torch module and its operators, on CPU tensors."""

import gc
import subprocess
import sys

import numpy as np
import pytest
from layers import ERROR, tokens_without_ties
from qwen import make_block, to_torch, torch

import flashmoe as fm
from flashmoe.hw import tuned
from flashmoe.reference import relative_error
from flashmoe.torch import MoE

MODEL = fm.MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2)
WEIGHTS = fm.Weights.random(MODEL, seed=21)


def tensors_of(weights=WEIGHTS):
    return [to_torch(array) for array in (weights.gate, weights.gate_up, weights.down)]


def make(**options):
    return MoE(MODEL, *tensors_of(), **{"max_tokens": 16, **options})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def draw_routing(num_tokens, seed=0):
    routing = fm.Routing.zipf(MODEL, [num_tokens], 1, seed)
    return *map(torch.tensor, (routing.topk_idx[0], routing.topk_weights[0])), routing


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_same_bits_as_run():
    x = draw(7, MODEL.d_model)
    array = x.view(torch.int16).numpy().view(MODEL.numpy_dtype)
    idx, weights, routing = draw_routing(7)
    for policy in ("tuned", "ancestor"):
        module = make(policy=policy, workers=2)
        chosen = tuned(16) if policy == "tuned" else policy
        for given, ours in ((None, module(x)), (routing, module(x, idx, weights))):
            theirs = fm.run(MODEL, WEIGHTS, [array], policy=chosen, routing=given).outputs[0]
            assert torch.equal(ours, to_torch(theirs))


def test_shapes_and_numbers_of_tokens():
    module = make()
    x = draw(2, 3, MODEL.d_model)
    whole = module(x)
    assert whole.shape == x.shape and whole.dtype == torch.bfloat16
    assert torch.equal(whole[1], module(x[1]))
    assert torch.equal(whole[:, 1], module(x[:, 1]))  # not contiguous
    assert module(x[:, :0]).shape == (2, 0, MODEL.d_model)
    idx, weights, _ = draw_routing(6)
    routed = module(x, idx.view(2, 3, 2).long(), weights.view(2, 3, 2).bfloat16())  # as transformers has them
    assert torch.equal(routed, module(x, idx.view(2, 3, 2), weights.view(2, 3, 2).bfloat16().float()))
    assert not module(x, torch.full_like(idx, -1).view(2, 3, 2), weights.view(2, 3, 2)).any()  # all dropped


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_made_of_transformers_own_block(dtype, norm):
    model = fm.MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype=dtype, norm_topk_prob=norm)
    weights = fm.Weights.random(model, seed=5)
    block = make_block(model, *tensors_of(weights))
    x = to_torch(tokens_without_ties(model, weights, [8])[0])[None]
    theirs = block(x)
    module = MoE.from_hf(block, max_tokens=8)
    assert module.model == fm.MoEModel(**{**model.to_dict(), "name": "hugging face"})
    _, scores, chosen = block.gate(x)
    for ours in (module(x), module(x, chosen[None], scores[None])):
        error = relative_error(ours.float().numpy(), theirs.float().numpy())
        assert error < ERROR[dtype]
    assert torch.equal(block(x), theirs)  # on a CPU the block stays as it is


class ListOfExperts(torch.nn.Module):
    """The names of transformers 4: an expert is a module, and the block knows top_k."""

    def __init__(self, activation):
        super().__init__()
        self.top_k, self.norm_topk_prob = MODEL.top_k, True
        gate, gate_up, down = tensors_of()
        self.gate = self.linear(gate)
        self.experts = torch.nn.ModuleList()
        for rows, columns in zip(gate_up, down, strict=True):
            expert = torch.nn.Module()
            expert.gate_proj, expert.up_proj = map(self.linear, rows.chunk(2))
            expert.down_proj, expert.act_fn = self.linear(columns), activation
            self.experts.append(expert)

    @staticmethod
    def linear(weight):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = torch.nn.Parameter(weight.clone())
        return made


def test_experts_may_be_a_list_or_a_state_dict():
    x, wanted = draw(5, MODEL.d_model), make()(draw(5, MODEL.d_model))
    listed = ListOfExperts(torch.nn.SiLU())
    fused = dict(zip(("gate.weight", "experts.gate_up_proj", "experts.down_proj"), tensors_of(), strict=True))
    known = {"top_k": MODEL.top_k, "norm_topk_prob": True}
    for source, options in ((listed, {}), (listed.state_dict(), known), (fused, known)):
        assert torch.equal(MoE.from_hf(source, max_tokens=16, **options)(x), wanted)


def test_what_from_hf_refuses():
    state = ListOfExperts(torch.nn.SiLU()).state_dict()
    known = {"top_k": MODEL.top_k, "norm_topk_prob": True}
    without = {name: tensor for name, tensor in state.items() if name != "experts.3.up_proj.weight"}
    for source, options, named in (
        (state, {"top_k": 2}, "norm_topk_prob=None"),
        (without, known, "no experts.3.up_proj.weight"),
        ({**state, "shared_expert.up_proj.weight": state["gate.weight"]}, known, "shared_expert"),
        (
            {name: tensor.half() for name, tensor in state.items()},
            known,
            r"torch.float16 \(accepted: bfloat16, float32",
        ),
        (state, {"top_k": 7, "norm_topk_prob": True}, "top_k=7"),
        (torch.nn.Linear(4, 4), {}, "Linear has no top_k"),
        (ListOfExperts(torch.nn.GELU()), {}, r"activation is GELU.*\(accepted: SiLU\)"),
    ):
        with pytest.raises(ValueError, match=named):
            MoE.from_hf(source, **options)


# ---- what torch does with operators


def test_the_operators_are_registered_as_torch_wants_them():
    module = make()
    idx, weights, _ = draw_routing(5)
    for count in (5, 0):
        x = draw(count, MODEL.d_model)
        torch.library.opcheck(torch.ops.flashmoe.moe.default, (x, module.handle))
        torch.library.opcheck(torch.ops.flashmoe.moe_routed.default, (x, idx[:count], weights[:count], module.handle))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_gives_the_same_bits(backend):
    first, second = make(), MoE(MODEL, *tensors_of(fm.Weights.random(MODEL, seed=22)), max_tokens=16)

    def stack(x, idx, weights):
        return second(first(x) + x, idx, weights) * 2

    torch.compiler.reset()
    compiled = torch.compile(stack, fullgraph=True, backend=backend)
    for count in (4, 9, 1, 0, 16):
        idx, weights, _ = draw_routing(count, seed=count)
        x = draw(count, MODEL.d_model, seed=count)
        assert torch.equal(compiled(x, idx, weights), stack(x, idx, weights))


def test_there_are_no_gradients():
    module, x = make(), draw(3, MODEL.d_model)
    with torch.enable_grad():
        with pytest.raises(ValueError, match="computes no gradients"):
            module(x.requires_grad_())
        with torch.no_grad():
            module(x)
        assert not module(x.detach()).requires_grad
    assert list(module.parameters()) == []
    with torch.inference_mode():
        module(draw(3, MODEL.d_model))


# ---- the module


def test_tensors_that_do_not_fit():
    gate, gate_up, down = tensors_of()
    for tensors, named in (
        ((gate[:, :95], gate_up, down), r"gate: shape \(6, 95\) \(must be \(6, 96\)\)"),
        ((gate, gate_up.float(), down), r"gate_up is torch.float32 \(must be torch.bfloat16\)"),
        ((gate, gate_up, down.to("meta")), "down is on meta and gate on cpu"),
        ([tensor.to("meta") for tensor in (gate, gate_up, down)], r"on meta \(accepted: cpu, cuda\)"),
    ):
        with pytest.raises(ValueError, match=named):
            MoE(MODEL, *tensors)
    module = make()
    for arguments, named in (
        ((draw(2, 95),), r"x: shape \(2, 95\)"),
        ((draw(2, 96).float(),), "x is torch.float32"),
        ((draw(17, 96),), "17 tokens .*max_tokens=16"),
        ((draw(2, 96), torch.zeros(2, 2, dtype=torch.int32)), "both or neither"),
        ((draw(2, 96), torch.full((2, 2), 6), torch.ones(2, 2)), "6"),
        ((draw(2, 96), draw_routing(3)[0], torch.ones(3, 2)), r"\[3\] tokens per PE \(x has \[2\]\)"),
    ):
        with pytest.raises(ValueError, match=named):
            module(*arguments)


def test_weights_are_shared_unless_copied():
    gate, gate_up, down = tensors_of()
    shared, copied = MoE(MODEL, gate, gate_up, down), MoE(MODEL, gate, gate_up, down, copy=True)
    x = draw(4, MODEL.d_model)
    before = shared(x)
    down.mul_(2)
    assert torch.equal(copied(x), before)
    assert torch.equal(shared(x), before * 2)


def test_the_module_stays_where_it_is():
    module, x = make(), draw(4, MODEL.d_model)
    before = module(x)
    assert module.state_dict() == {}
    holder = torch.nn.Sequential(module).eval()
    assert torch.equal(holder.to("cpu").bfloat16()(x), before)
    for move in (holder.float, lambda: holder.to("meta")):
        with pytest.raises(ValueError, match=r"stays on cpu as torch\.bfloat16"):
            move()
    assert torch.equal(module(x), before)


def test_a_handle_dies_with_its_module():
    module, x = make(), draw(1, MODEL.d_model)
    handle = module.handle
    assert torch.equal(torch.ops.flashmoe.moe(x, handle), module(x))
    del module
    gc.collect()
    with pytest.raises(ValueError, match=f"handle={handle}"):
        torch.ops.flashmoe.moe(x, handle)
    assert make().handle != handle


def test_a_trace_of_the_last_call():
    module = make(trace=True)
    with pytest.raises(ValueError, match="after a call"):
        module.last_trace()
    for count in (3, 9):
        module(draw(count, MODEL.d_model))
        trace = module.last_trace()
        assert (trace.header["num_tokens"], trace.header["gate_inside"]) == ([count], True)
        assert len(trace.critical_path) > 0
    idx, weights, routing = draw_routing(4)
    module(draw(4, MODEL.d_model), idx, weights)
    trace = module.last_trace()
    assert trace.header["routing"] == routing.digest
    assert not (trace.kind_names == "gate").any()
    with pytest.raises(ValueError, match="trace=True"):
        make().last_trace()
    module.check()


def test_it_says_how_much_memory_it_takes():
    few, many = make(max_tokens=1), make(max_tokens=64)
    assert 0 < few.workspace_bytes < many.workspace_bytes
    assert "max_tokens=64" in repr(many) and f"workspace={many.workspace_bytes / 2**20:.1f} MiB" in repr(many)


def test_flashmoe_itself_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import flashmoe, flashmoe.hw.device, flashmoe.cli"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert np.isfinite(WEIGHTS.gate.astype(np.float32)).all()
