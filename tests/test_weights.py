"""Weights: what is accepted, random ones, and layers read back from folders that transformers wrote."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import flashmoe.weights
from flashmoe.model import MoEModel
from flashmoe.placement import Placement
from flashmoe.weights import Weights

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
MODEL = MoEModel(d_model=12, d_ff=5, num_experts=3, top_k=2, dtype="f32")


def arrays(num_experts=3, d_model=12, d_ff=5, dtype=F32):
    return {
        "gate": np.zeros((num_experts, d_model), dtype),
        "gate_up": np.zeros((num_experts, 2 * d_ff, d_model), dtype),
        "down": np.zeros((num_experts, d_model, d_ff), dtype),
    }


def assert_same(weights, **expected):
    for field, array in expected.items():
        assert getattr(weights, field).dtype == array.dtype
        np.testing.assert_array_equal(getattr(weights, field), array)


# ---- arrays


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_arrays_are_taken_as_they_are(dtype):
    given = arrays(dtype=dtype)
    weights = Weights(**given)
    assert all(getattr(weights, field) is array for field, array in given.items())
    assert weights.nbytes == (3 * 12 + 3 * 10 * 12 + 3 * 12 * 5) * dtype.itemsize
    weights.check(MODEL)


def test_strided_arrays_are_made_contiguous():
    down = np.arange(180, dtype=np.float32).reshape(3, 5, 12).transpose(0, 2, 1)
    weights = Weights(**{**arrays(), "down": down})
    assert weights.down.flags.c_contiguous
    np.testing.assert_array_equal(weights.down, down)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": np.zeros((3, 12))}, "gate is float64 (accepted: numpy float32 or ml_dtypes.bfloat16)"),
        ({"gate": np.zeros((3, 12), ">f4")}, "gate is >f4 (accepted"),
        ({"down": [[[0.0]]]}, "down is list (accepted"),
        ({"down": np.zeros((3, 12, 5), BF16)}, "down is bfloat16 and gate float32 (must be the same)"),
        ({"gate": np.zeros(12, F32)}, "gate has shape (12,) (must have 2 dimensions"),
        ({"down": np.zeros((3, 12, 0), F32)}, "down has shape (3, 12, 0) (must have 3 dimensions, none 0)"),
        ({"gate_up": np.zeros((3, 5, 12), F32)}, "gate_up has shape (3, 5, 12) (must be (3, 10, 12))"),
        ({"down": np.zeros((2, 12, 5), F32)}, "down has shape (2, 12, 5) (must be (3, 12, 5))"),
        ({"gate": np.zeros((3, 11), F32)}, "gate_up has shape (3, 10, 12) (must be (3, 10, 11))"),
    ],
)
def test_bad_arrays_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Weights(**{**arrays(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_ff": 6}, "gate_up has shape (3, 10, 12) (must be (3, 12, 12))"),
        ({"num_experts": 4}, "gate has shape (3, 12) (must be (4, 12))"),
        ({"d_model": 10}, "gate has shape (3, 12) (must be (3, 10))"),
    ],
)
def test_check_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Weights(**arrays()).check(MoEModel(**{**MODEL.to_dict(), **change}))


def test_cast_copies_only_when_it_must():
    weights = Weights.random(MODEL)
    assert weights.cast("f32") is weights
    rounded = weights.cast("bf16")
    assert_same(rounded, gate=weights.gate.astype(BF16), down=weights.down.astype(BF16))
    with pytest.raises(ValueError, match=r"dtype='f64' \(accepted: bf16, f32\)"):
        weights.cast("f64")


def test_placed_moves_each_expert_and_its_router_row():
    weights = Weights.random(MODEL)
    placed = weights.placed(Placement((2, 0, 1)))
    for expert, slot in enumerate((2, 0, 1)):
        for field in ("gate", "gate_up", "down"):
            np.testing.assert_array_equal(getattr(placed, field)[slot], getattr(weights, field)[expert])
    assert weights.placed(Placement.linear(3)) is weights


# ---- random


def test_random_repeats_and_depends_on_the_seed():
    first, again, other = Weights.random(MODEL, 5), Weights.random(MODEL, 5), Weights.random(MODEL, 6)
    assert_same(first, gate=again.gate, gate_up=again.gate_up, down=again.down)
    assert not np.array_equal(first.down, other.down)
    with pytest.raises(ValueError, match="seed=-1"):
        Weights.random(MODEL, -1)


def test_random_bf16_is_the_rounded_f32():
    rounded = Weights.random(MODEL, 5).cast("bf16")
    drawn = Weights.random(MoEModel(**{**MODEL.to_dict(), "dtype": "bf16"}), 5)
    assert_same(drawn, gate=rounded.gate, gate_up=rounded.gate_up, down=rounded.down)


def test_random_experts_do_not_depend_on_how_many_there_are():
    few, many = (Weights.random(MoEModel(**{**MODEL.to_dict(), "num_experts": n})) for n in (3, 5))
    assert_same(few, gate=many.gate[:3], gate_up=many.gate_up[:3], down=many.down[:3])


def test_random_is_uniform_with_variance_one_over_fan_in():
    model = MoEModel(d_model=300, d_ff=200, num_experts=4, top_k=1, dtype="f32")
    weights = Weights.random(model)
    for array, fan_in in ((weights.gate_up, 300), (weights.down, 200)):
        limit = np.sqrt(3 / fan_in) * (1 + 1e-6)  # float32 may round the end outwards
        share = np.histogram(array, bins=10, range=(-limit, limit))[0] / array.size
        assert abs(share.sum() - 1) < 1e-12  # nothing outside
        assert abs(share - 0.1).max() < 5 * np.sqrt(0.09 / array.size)
        assert abs(array.var() * fan_in - 1) < 0.01
    correlation = np.corrcoef(weights.gate_up[0].ravel(), weights.gate_up[1].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(weights.gate_up[0].size)


def test_random_reports_progress():
    seen = []
    Weights.random(MODEL, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- checkpoints written by transformers


@pytest.fixture(scope="module")
def qwen3():
    """Return a tiny Qwen3-MoE with layers 0, 2 and 3 of experts and layer 1 dense, float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=12,
        intermediate_size=8,
        moe_intermediate_size=5,
        num_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        mlp_only_layers=[1],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def parameters(block):
    """Return the block's own weights as numpy arrays, bit for bit."""
    torch = pytest.importorskip("torch")

    def numpy(tensor):
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BF16)
        return tensor.numpy()

    return {
        "gate": numpy(block.gate.weight),
        "gate_up": numpy(block.experts.gate_up_proj),
        "down": numpy(block.experts.down_proj),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("part", ["causal lm", "base model", "fused"])
def test_checkpoint_gives_back_the_parameters(qwen3, tmp_path, dtype, shards, part):
    torch = pytest.importorskip("torch")
    module = qwen3.to(getattr(torch, dtype))
    options = {"max_shard_size": "2KB"} if shards == "shards" else {}
    if part == "fused":
        options["save_original_format"] = False  # the module's own names
    (module.model if part == "base model" else module).save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors").exists() == (shards == "one file")

    model = MoEModel.from_checkpoint(tmp_path)
    assert (model.num_experts, model.dtype) == (3, {"float32": "f32", "bfloat16": "bf16"}[dtype])
    for layer in (0, 2, 3):
        weights = Weights.from_checkpoint(tmp_path, layer)
        assert_same(weights, **parameters(module.model.layers[layer].mlp))
        weights.check(model)


def test_only_the_shards_of_the_layer_are_opened(qwen3, tmp_path):
    qwen3.save_pretrained(tmp_path, max_shard_size="2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "layers.2.mlp" in name}
    others = set(index.values()) - needed
    assert others
    for file in others:
        (tmp_path / file).unlink()
    assert_same(Weights.from_checkpoint(tmp_path, 2), **parameters(qwen3.model.layers[2].mlp))


# ---- checkpoints written by hand


def layer_tensors(prefix="model.layers.0.mlp.", num_experts=3, d_model=12, d_ff=5, dtype=F32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate.weight": (num_experts, d_model)}
    for e in range(num_experts):
        shapes[f"experts.{e}.gate_proj.weight"] = (d_ff, d_model)
        shapes[f"experts.{e}.up_proj.weight"] = (d_ff, d_model)
        shapes[f"experts.{e}.down_proj.weight"] = (d_model, d_ff)
    return {prefix + name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return folder


class RecordingFile:
    """A safetensors file that notes the names of the tensors whose data is asked for."""

    def __init__(self, file, read):
        self.file, self.read = file, read

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        self.read.append(name)
        return self.file.get_tensor(name)

    def get_slice(self, name):
        self.read.append(name)
        return self.file.get_slice(name)


def test_only_the_layers_tensors_are_read(tmp_path, monkeypatch):
    wanted = layer_tensors("model.layers.1.mlp.")
    save(tmp_path, {**layer_tensors(), **wanted, "lm_head.weight": np.zeros((4, 12), F32)})
    read, original = [], flashmoe.weights.safe_open
    monkeypatch.setattr(
        flashmoe.weights, "safe_open", lambda *args, **kwargs: RecordingFile(original(*args, **kwargs), read)
    )
    weights = Weights.from_checkpoint(tmp_path, 1)
    assert sorted(read) == sorted(wanted)
    up = wanted["model.layers.1.mlp.experts.2.up_proj.weight"]
    np.testing.assert_array_equal(weights.gate_up[2, 5:], up)


def test_layer_1_is_not_layer_11(tmp_path):
    one, eleven = layer_tensors("layers.1.mlp.", seed=1), layer_tensors("layers.11.mlp.", seed=11)
    save(tmp_path, {**one, **eleven})
    assert_same(Weights.from_checkpoint(tmp_path, 1), gate=one["layers.1.mlp.gate.weight"])


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), F32, BF16])
def test_other_floats_become_float32_exactly(tmp_path, dtype):
    tensors = layer_tensors(dtype=BF16)
    tensors["model.layers.0.mlp.gate.weight"] = gate = np.full((3, 12), 0.1, dtype)
    weights = Weights.from_checkpoint(save(tmp_path, tensors))
    assert weights.gate.dtype == weights.down.dtype == (BF16 if dtype == BF16 else F32)
    np.testing.assert_array_equal(weights.gate.astype(F32), gate.astype(F32))


def test_progress_counts_experts(tmp_path):
    seen = []
    Weights.from_checkpoint(save(tmp_path, layer_tensors()), progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "layer, message",
    [
        (7, "layer 7 is missing (layers with experts: 0..2, 5)"),
        (-1, "layer -1 is missing (layers with experts: 0..2, 5)"),
        (3, "layer 3 is dense (layers with experts: 0..2, 5)"),
    ],
)
def test_missing_and_dense_layers_are_named(tmp_path, layer, message):
    tensors = {"model.layers.3.mlp.gate_proj.weight": np.zeros((8, 12), F32)}
    for n in (0, 1, 2, 5):
        tensors |= layer_tensors(f"model.layers.{n}.mlp.")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {message}")):
        Weights.from_checkpoint(save(tmp_path, tensors), layer)


def test_a_model_without_experts_has_none(tmp_path):
    save(tmp_path, {"model.layers.0.mlp.gate_proj.weight": np.zeros((8, 12), F32)})
    with pytest.raises(ValueError, match=r"layer 0 is dense \(layers with experts: none\)"):
        Weights.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("gate.weight", None, "has no mlp.gate.weight"),
        ("experts.1.up_proj.weight", None, "has no mlp.experts.1.up_proj.weight"),
        ("experts.1.up_proj.weight", np.zeros((1, 12), F32), "has shape (1, 12) (must be (5, 12))"),
        ("experts.2.down_proj.weight", np.zeros((12, 1), F32), "mlp.experts.0.gate_proj.weight has shape"),
        ("experts.2.down_proj.weight", np.zeros(5, F32), "has shape (5,) (must have 2 dimensions)"),
        ("experts.0.up_proj.weight", np.zeros((5, 12), np.int8), "is I8 (accepted: BF16, F16, F32)"),
        ("experts.0.up_proj.weight", np.zeros((5, 12), ml_dtypes.float8_e4m3fn), "is F8_E4M3 (accepted"),
        ("experts.3.up_proj.weight", np.zeros((5, 12), F32), "layer 0 has mlp.experts.3.up_proj.weight"),
        ("shared_expert.up_proj.weight", np.zeros((5, 12), F32), "has mlp.shared_expert.up_proj.weight"),
    ],
)
def test_broken_layers_are_named(tmp_path, name, tensor, message):
    tensors = layer_tensors()
    if tensor is None:
        del tensors[f"model.layers.0.mlp.{name}"]
    else:
        tensors[f"model.layers.0.mlp.{name}"] = tensor
    with pytest.raises(ValueError, match=re.escape(message)):
        Weights.from_checkpoint(save(tmp_path, tensors))


def test_transposed_fused_experts_are_refused(tmp_path):
    tensors = {"gate.weight": (3, 12), "experts.gate_up_proj": (3, 12, 10), "experts.down_proj": (3, 5, 12)}
    save(tmp_path, {f"model.layers.0.mlp.{name}": np.zeros(shape, F32) for name, shape in tensors.items()})
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj has shape \(3, 12, 10\)"):
        Weights.from_checkpoint(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder with model\.safetensors or"):
        Weights.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors or model\.safetensors\.index\.json"):
        Weights.from_checkpoint(tmp_path)


def write_index(folder: Path, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, dict.fromkeys(layer_tensors(), "model-00001-of-00001.safetensors"))
    with pytest.raises(ValueError, match=r"cannot read .*model-00001-of-00001\.safetensors"):
        Weights.from_checkpoint(tmp_path)


def test_a_shard_that_lacks_a_tensor_is_named(tmp_path):
    tensors = layer_tensors()
    write_index(tmp_path, dict.fromkeys(tensors, "a.safetensors"))
    del tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors lacks model\.layers\.0\.mlp\.gate\.weight"):
        Weights.from_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is not an index"):
        Weights.from_checkpoint(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors as safetensors"):
        Weights.from_checkpoint(tmp_path)
