"""The layer's sizes: presets, derived numbers, configs of checkpoints, and what is refused."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from flashmoe.model import MoEModel

QWEN3_CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 96,
    "moe_intermediate_size": 40,
    "intermediate_size": 64,  # of dense layers: must not be taken for d_ff
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


def write_config(folder, **changes):
    config = {key: value for key, value in {**QWEN3_CONFIG, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_preset_has_the_published_sizes():
    small, large = MoEModel.preset("qwen3-30b-a3b"), MoEModel.preset("qwen3-235b-a22b")
    assert (small.d_model, small.d_ff, small.num_experts, small.top_k) == (2048, 768, 128, 8)
    assert (large.d_model, large.d_ff, large.num_experts, large.top_k) == (4096, 1536, 128, 8)
    assert small.norm_topk_prob and large.norm_topk_prob
    assert small.expert_bytes == 9_437_184  # 3 * 2048 * 768 * 2
    assert small.gate_bytes == 524_288  # 128 * 2048 * 2


def test_preset_takes_overrides():
    model = MoEModel.preset("qwen3-30b-a3b", dtype="f32", top_k=4)
    assert (model.dtype, model.top_k, model.d_ff, model.name) == ("f32", 4, 768, "qwen3-30b-a3b")
    assert model.expert_bytes == 18_874_368


@pytest.mark.parametrize("dtype, numpy_dtype", [("bf16", ml_dtypes.bfloat16), ("f32", np.float32)])
def test_dtype_decides_the_element(dtype, numpy_dtype):
    model = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2, dtype=dtype)
    assert model.numpy_dtype == numpy_dtype
    assert model.element_bytes == {"bf16": 2, "f32": 4}[dtype]


def test_to_dict_goes_through_json_and_back():
    model = MoEModel(d_model=np.int64(96), d_ff=40, num_experts=np.uint8(6), top_k=2, norm_topk_prob=False)
    assert MoEModel(**json.loads(json.dumps(model.to_dict()))) == model


def test_experts_are_split_evenly():
    model = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2)
    assert [model.experts_per_pe(ep_size) for ep_size in (1, 2, 3, 6)] == [6, 3, 2, 1]


@pytest.mark.parametrize("ep_size", [0, -1, 4, 12])
def test_uneven_experts_are_refused(ep_size):
    model = MoEModel(d_model=96, d_ff=40, num_experts=6, top_k=2)
    with pytest.raises(ValueError, match=rf"ep_size={ep_size} \(must divide num_experts=6: 1, 2, 3, 6\)"):
        model.experts_per_pe(ep_size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 0}, "d_model=0 (must be an integer of at least 1)"),
        ({"d_ff": -1}, "d_ff=-1 (must be"),
        ({"num_experts": 6.0}, "num_experts=6.0 (must be"),
        ({"top_k": True}, "top_k=True (must be"),
        ({"top_k": 7}, "top_k=7 (must be in 1..num_experts=6)"),
        ({"dtype": "fp8"}, "dtype='fp8' (accepted: bf16, f32)"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoEModel(**{"d_model": 96, "d_ff": 40, "num_experts": 6, "top_k": 2, **change})


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'mixtral' is unknown .*qwen3-30b-a3b, qwen3-235b-a22b"):
        MoEModel.preset("mixtral")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": "absent", "num_local_experts": 6, "torch_dtype": "absent", "dtype": "bfloat16"},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_from_checkpoint_reads_either_spelling(tmp_path, changes):
    folder = tmp_path / "tiny-moe"
    folder.mkdir()
    assert MoEModel.from_checkpoint(write_config(folder, **changes)) == MoEModel(
        d_model=96, d_ff=40, num_experts=6, top_k=2, dtype="bf16", norm_topk_prob=True, name="tiny-moe"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", None, "absent"])
def test_from_checkpoint_takes_other_floats_as_f32(tmp_path, dtype):
    assert MoEModel.from_checkpoint(write_config(tmp_path, torch_dtype=dtype)).dtype == "f32"


def test_from_checkpoint_knows_the_default_of_norm_topk_prob(tmp_path):
    assert not MoEModel.from_checkpoint(write_config(tmp_path, norm_topk_prob="absent")).norm_topk_prob


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' (accepted: 'qwen3_moe')"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' (accepted: 'silu')"),
        ({"torch_dtype": "int8"}, "dtype='int8' (accepted: bfloat16, float32, float16)"),
        ({"num_experts": "absent"}, "has no num_experts or num_local_experts"),
        ({"moe_intermediate_size": "absent"}, "has no moe_intermediate_size"),
        ({"hidden_size": None}, "d_model=None (must be an integer"),
    ],
)
def test_from_checkpoint_refuses_what_it_cannot_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoEModel.from_checkpoint(write_config(tmp_path, **changes))


@pytest.mark.parametrize("text", [None, "{not json", "[]"])
def test_from_checkpoint_names_an_unreadable_config(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        MoEModel.from_checkpoint(tmp_path)
