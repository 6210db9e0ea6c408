"""Recorded routing: every format read back from a file written here, and every refusal."""

import builtins
import json
import re

import numpy as np
import pytest

from flashmoe.model import MoEModel
from flashmoe.routing import Routing

MODEL = MoEModel(d_model=8, d_ff=8, num_experts=6, top_k=2, name="six")
TABLE = [[1, 2, 3, 0, 2, 0], [4, 4, 0, 0, 0, 0]]  # of 4 tokens each: no count above 4, 8 in all


def experts_of(routing):
    return [idx.tolist() for idx in routing.topk_idx]


def write_lines(path, *tokens):
    path.write_text("".join(f"{token if isinstance(token, str) else json.dumps(token)}\n" for token in tokens))
    return str(path)


# ---- tokens in .jsonl


def test_jsonl_with_everything(tmp_path):
    path = write_lines(
        tmp_path / "r.jsonl",
        {"topk_experts": [4, 1], "topk_weights": [0.75, 0.25], "pe": 2, "layer": 7},
        {"topk_experts": [0, -1], "topk_weights": [1.0, 0], "pe": 0, "layer": 7, "text": "ignored"},
        "",
        {"topk_experts": [5, 3], "topk_weights": [0.5, 0.5], "pe": 2, "layer": 7},
        {"topk_experts": [2, 0], "topk_weights": [1, 1], "pe": 2, "layer": 3},
        {"topk_experts": [1, 0], "topk_weights": [2, 1], "pe": 2, "layer": 3},
        {"topk_experts": [3, 0], "topk_weights": [3, 1], "pe": 0, "layer": 3},
    )
    third, seventh = Routing.layers(path, MODEL)
    assert (third.name, seventh.name) == ("r:3", "r:7")
    assert experts_of(third) == [[[3, 0]], [], [[2, 0], [1, 0]]]
    assert experts_of(seventh) == [[[0, -1]], [], [[4, 1], [5, 3]]]
    assert [weights.tolist() for weights in seventh.topk_weights] == [[[1.0, 0.0]], [], [[0.75, 0.25], [0.5, 0.5]]]
    assert experts_of(Routing.parse(f"{path}:7", MODEL)) == experts_of(seventh)
    (only,) = Routing.layers(path, MODEL, num_layers=1)
    assert only.digest == third.digest


def test_jsonl_without_pes_is_dealt_in_blocks(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", *({"topk_experts": [e, (e + 1) % 6]} for e in (0, 1, 2, 3, 4)))
    routing = Routing.parse(path, MODEL, ep_size=3)
    assert experts_of(routing) == [[[0, 1], [1, 2]], [[2, 3], [3, 4]], [[4, 5]]]
    assert routing.topk_weights[2].tolist() == [[0.5, 0.5]]
    assert routing.name == "r"
    assert Routing.parse(path, MODEL, default=(99, 3)).digest == routing.digest
    # With a number of tokens: so many a PE, from the start of the file.
    assert experts_of(Routing.parse(path, MODEL, 1, 2)) == [[[0, 1]], [[1, 2]]]
    assert experts_of(Routing.parse(path, MODEL, [0, 3], 2)) == [[], [[0, 1], [1, 2], [2, 3]]]
    with pytest.raises(ValueError, match=r"num_tokens=3 on 2 PEs, but .*r\.jsonl has 5 tokens"):
        Routing.parse(path, MODEL, 3, 2)
    with pytest.raises(ValueError, match=r"r\.jsonl' names no PEs and needs ep_size"):
        Routing.parse(path, MODEL)
    with pytest.raises(ValueError, match=r"ep_size=4 \(must divide num_experts=6"):
        Routing.parse(path, MODEL, ep_size=4)


def test_jsonl_pes_without_tokens_can_be_added(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", {"topk_experts": [0, 1], "rank": 1})
    assert Routing.parse(path, MODEL).num_tokens == (0, 1)
    assert Routing.parse(path, MODEL, ep_size=6).num_tokens == (0, 1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"ep_size=1, but .*r\.jsonl is for 2 PEs"):
        Routing.parse(path, MODEL, ep_size=1)
    with pytest.raises(ValueError, match=r"num_tokens=1, but .*r\.jsonl has \[0, 1\]"):
        Routing.parse(path, MODEL, num_tokens=1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: Expecting property name"),
        ("[1, 2]", "line 2: [1, 2] (must be an object with topk_experts)"),
        ({"experts": [1, 2]}, "(must be an object with topk_experts)"),
        ({"topk_experts": [1, 6]}, "line 2: topk_experts=[1, 6] (must be a list of distinct experts in 0..5; -1 for"),
        ({"topk_experts": [1, 1]}, "line 2: topk_experts=[1, 1] (must"),
        ({"topk_experts": [1, -2]}, "line 2: topk_experts=[1, -2] (must"),
        ({"topk_experts": [1, 2.5]}, "line 2: topk_experts=[1, 2.5] (must"),
        ({"topk_experts": [1, True]}, "line 2: topk_experts=[1, True] (must"),
        ({"topk_experts": []}, "line 2: topk_experts=[] (must"),
        ({"topk_experts": 3}, "line 2: topk_experts=3 (must"),
        ({"topk_experts": [1]}, "line 2: topk_experts=[1] (lines before have 2 experts)"),
        ({"topk_experts": [1, 2], "topk_weights": [1]}, "line 2: topk_weights=[1] (must be 2 numbers, one an expert)"),
        ({"topk_experts": [1, 2], "topk_weights": "no"}, "line 2: topk_weights=no (must be 2 numbers"),
        ({"topk_experts": [1, 2], "topk_weights": [1, 1]}, "line 1: no topk_weights, which other lines have"),
        ({"topk_experts": [1, 2], "pe": 0}, "line 1: no pe, which other lines have (must be in all or none)"),
        ({"topk_experts": [1, 2], "layer": 0}, "line 1: no layer, which other lines have"),
        ({"topk_experts": [1, 2], "pe": -1}, "line 2: pe=-1 (must be an integer of at least 0)"),
        ({"topk_experts": [1, 2], "layer": "3"}, "line 2: layer='3' (must be an integer of at least 0)"),
        ({"topk_experts": [1, 2], "pe": 0, "rank": 0}, "line 2: pe and rank are both given"),
    ],
)
def test_jsonl_lines_that_do_not_fit_are_named(tmp_path, line, message):
    path = write_lines(tmp_path / "r.jsonl", {"topk_experts": [0, 1]}, line)
    with pytest.raises(ValueError, match="cannot read a routing from .*r.jsonl .*" + re.escape(message)):
        Routing.parse(path, MODEL, ep_size=1)


def test_jsonl_must_fit_the_model_and_itself(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", {"topk_experts": [0, 1, 2]})
    with pytest.raises(ValueError, match=re.escape("has top_k=3 (model 'six': 2)")):
        Routing.parse(path, MODEL, ep_size=1)
    path = write_lines(tmp_path / "r.jsonl", *({"topk_experts": [0, 1], "layer": layer} for layer in (0, 0, 1)))
    with pytest.raises(ValueError, match=re.escape("[(1, 1), (1, 0)] tokens (must be the same in all layers)")):
        Routing.layers(path, MODEL, ep_size=2)
    with pytest.raises(ValueError, match=r"r\.jsonl \(it is empty\)"):
        Routing.parse(write_lines(tmp_path / "r.jsonl"), MODEL, ep_size=1)


# ---- several layers


def test_layers_round_trip(tmp_path):
    path = tmp_path / "r.npz"
    layers = Routing.layers("zipf:1", MODEL, [2, 0, 3], 3, num_layers=3, correlation=0.5)
    Routing.save_layers(path, layers)
    back = Routing.layers(str(path), MODEL, [2, 0, 3], 3)
    assert [layer.digest for layer in back] == [layer.digest for layer in layers]
    assert [layer.name for layer in back] == ["zipf:1"] * 3
    for ours, theirs in zip(back[2].topk_weights, layers[2].topk_weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Routing.parse(f"{path}:1", MODEL).digest == layers[1].digest
    with pytest.raises(ValueError, match=r"r\.npz has 3 layers \(Routing.layers reads them\)"):
        Routing.load(path)
    with pytest.raises(ValueError, match=r"r\.npz has 3 layers \(accepted for one layer: FILE:LAYER\)"):
        Routing.parse(str(path), MODEL)
    with pytest.raises(ValueError, match=r"r\.npz has no layer 3 \(it has 0, 1, 2\)"):
        Routing.parse(f"{path}:3", MODEL)
    with pytest.raises(ValueError, match=r"num_layers=4, but .*r\.npz has 3"):
        Routing.layers(str(path), MODEL, num_layers=4)
    with pytest.raises(ValueError, match=r"correlation=0.5, but .*r\.npz has its own layers"):
        Routing.layers(str(path), MODEL, correlation=0.5)


def test_layers_that_differ_are_not_saved(tmp_path):
    layers = [Routing.uniform(MODEL, count, 1) for count in (2, 3)]
    with pytest.raises(ValueError, match=re.escape("num_tokens=[(2,), (3,)] (must be the same in all layers)")):
        Routing.save_layers(tmp_path / "r.npz", layers)
    assert not (tmp_path / "r.npz").exists()


# ---- count tables


def sglang_stat(torch, path):
    """One table for each of two recorded steps; the first layer is dense."""
    table = torch.tensor([[[0] * 6, TABLE[0], TABLE[1]], [[0] * 6, [0] * 6, [0] * 6]], dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": table, "average_utilization_rate_over_window": None}, path)
    return {1: TABLE[0], 2: TABLE[1]}


def sglang_per_pass(torch, path):
    """Two passes; expert 0 has two copies: physical experts 0 and 6."""
    first = torch.tensor([[1, 2, 0, 0, 2, 0, 0], [1, 4, 0, 0, 0, 0, 2]])
    second = torch.tensor([[0, 0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
    records = [
        {"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": count}
        for i, count in enumerate((first, second))
    ]
    logical = torch.tensor([[0, 1, 2, 3, 4, 5, 0]] * 2)
    torch.save({"records": records, "last_physical_to_logical_map": logical}, path)
    return {0: TABLE[0], 1: TABLE[1]}


def lmdeploy(torch, path):
    table = torch.tensor(TABLE)
    held = {"counts": table, "balancedness": torch.ones(2), "total_tokens": table.sum(dim=1), "step": 3, "rank": 0}
    torch.save(held, path)
    return {0: TABLE[0], 1: TABLE[1]}


@pytest.mark.parametrize("write", [sglang_stat, sglang_per_pass, lmdeploy])
def test_recorders_count_tables(tmp_path, write):
    path = str(tmp_path / "r.pt")
    tables = write(pytest.importorskip("torch"), path)
    layers = Routing.layers(path, MODEL, 2, 2)
    assert [layer.name for layer in layers] == [f"r:{number}" for number in tables]
    assert [layer.expert_load().tolist() for layer in layers] == list(tables.values())
    for number, layer in zip(tables, layers, strict=True):
        assert Routing.parse(f"{path}:{number}", MODEL, 2, 2).digest == layer.digest


def test_sglang_tokens(tmp_path):
    torch = pytest.importorskip("torch")
    # Layer 0 is dense; the recorder has 8 columns for any model; physical experts 6 and 7 are copies of 0 and 1.
    first, second = torch.full((2, 2, 8), -1), torch.full((2, 1, 8), -1)
    first[1, :, :2] = torch.tensor([[6, 4], [5, 7]])
    second[1, :, :2] = torch.tensor([[2, -1]])
    records = [{"rank": 3, "topk_ids_of_layer": ids, "global_physical_count": None} for ids in (first, second)]
    logical = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]] * 2)
    torch.save({"records": records, "last_physical_to_logical_map": logical}, tmp_path / "r.pt")
    (layer,) = Routing.layers(str(tmp_path / "r.pt"), MODEL, ep_size=2)
    assert experts_of(layer) == [[[0, 4], [5, 1]], [[2, -1]]]


def test_pt_without_torch_says_so(tmp_path, monkeypatch):
    def refuse(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"r\.pt \(a \.pt file needs torch: pip install 'flashmoe\[torch\]'\)"):
        Routing.parse(str(tmp_path / "r.pt"), MODEL, 2, 2)


@pytest.mark.parametrize("held", [{"records": []}, {"records": [{"rank": 0}], "last_physical_to_logical_map": []}, {}])
def test_pt_of_another_kind_is_named(tmp_path, held):
    torch = pytest.importorskip("torch")
    torch.save(held, tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"r\.pt .*(records|must have logical_count or counts)"):
        Routing.parse(str(tmp_path / "r.pt"), MODEL, 2, 2)
    (tmp_path / "r.pt").write_text("text")
    with pytest.raises(ValueError, match="cannot read a routing from"):
        Routing.parse(str(tmp_path / "r.pt"), MODEL, 2, 2)


def save_npz(path, table):
    np.savez(path, counts=table)


def save_json(path, table):
    path.write_text(json.dumps(np.array(table).tolist()))


def save_json_object(path, table):
    path.write_text(json.dumps({"logical_count": np.array(table).tolist()}))


def save_csv(path, table):
    np.savetxt(path, np.atleast_2d(table), delimiter=",", fmt="%d")


def save_listed(path, table):
    rows = [f"{layer},{expert},{count}" for (layer, expert), count in np.ndenumerate(np.atleast_2d(table)) if count]
    path.write_text("\n".join(["layer_id,expert_id,count", *rows[::-1]]))


WRITERS = [
    ("r.npy", np.save),
    ("r.npz", save_npz),
    ("r.json", save_json),
    ("r.json", save_json_object),
    ("r.csv", save_csv),
    ("r.csv", save_listed),
]


@pytest.mark.parametrize("name, write", WRITERS)
def test_count_tables(tmp_path, name, write):
    write(tmp_path / name, TABLE)
    layers = Routing.layers(str(tmp_path / name), MODEL, [1, 3], 2, seed=5)
    assert [layer.expert_load().tolist() for layer in layers] == TABLE
    assert {layer.num_tokens for layer in layers} == {(1, 3)}
    write(tmp_path / name, TABLE[1])
    one = Routing.parse(str(tmp_path / name), MODEL, 2, 2)
    assert (one.name, one.expert_load().tolist()) == ("r", TABLE[1])
    with pytest.raises(ValueError, match=rf"{name}' needs num_tokens and ep_size"):
        Routing.parse(str(tmp_path / name), MODEL, 2)


def test_counts_for_other_numbers_of_tokens_are_scaled(tmp_path):
    save_json(tmp_path / "r.json", [10, 20, 30, 0, 20, 0])
    assert Routing.parse(str(tmp_path / "r.json"), MODEL, 2, 2).expert_load().tolist() == TABLE[0]


def test_listed_counts_of_several_ranks_are_added(tmp_path):
    (tmp_path / "r.csv").write_text("layer_id, expert_id, count\n4,5,1\n4,0,1\n4,5,1\n4,2,1\n")
    (layer,) = Routing.layers(str(tmp_path / "r.csv"), MODEL, 2, 1)
    assert layer.expert_load().tolist() == [1, 0, 1, 0, 0, 2]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("r.json", "[1, 2", "r.json (Expecting"),
        ("r.json", "[[1, 2], [3]]", "r.json (setting an array element"),
        ("r.json", '{"count": [1]}', "it has count (must have logical_count or counts)"),
        ("r.json", "[1, 2, 3]", "layer 0 has counts of 3 experts (the model has 6)"),
        ("r.json", '["a"]', "(must be numbers (num_layers, num_experts))"),
        ("r.json", "[0, 0, 0, 0, 0, 0]", "all counts are 0"),
        ("r.json", "[1, 2, 3, -4, 5, 6]", "counts have -4 (must be finite and at least 0)"),
        ("r.csv", "", "it is empty"),
        ("r.csv", "1,2,3\n4,5\n", "line 2: 4,5 (must be 3 counts, one an expert; or lines under the header layer_id,"),
        ("r.csv", "expert,count\n", "line 1: expert,count (must be"),
        ("r.csv", "layer_id,expert_id,count\n0,1\n", "line 2: 0,1 (must be layer_id,expert_id,count)"),
        ("r.csv", "layer_id,expert_id,count\n0,1.5,3\n", "line 2: 0,1.5,3 (must be layer_id,expert_id,count)"),
        ("r.csv", "layer_id,expert_id,count\n0,6,3\n", "line 2: 0,6,3 (expert must be in 0..5, layer at least 0)"),
        ("r.csv", "layer_id,expert_id,count\n", "counts are"),
        ("r.csv", "layer_id,expert_id,count\n0,1,nan\n", "counts have nan"),
        ("r.npy", "text", "r.npy ("),
        ("r.npz", "text", "not an npz file"),
    ],
)
def test_count_tables_that_do_not_fit_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="cannot read a routing from .*" + re.escape(message)):
        Routing.layers(str(tmp_path / name), MODEL, 2, 2)


def test_a_missing_file_is_named(tmp_path):
    for suffix in ("npz", "npy", "jsonl", "json", "csv"):
        with pytest.raises(ValueError, match=rf"none\.{suffix} .*No such file"):
            Routing.parse(str(tmp_path / f"none.{suffix}"), MODEL, 2, 2)


def test_npz_names_what_is_missing(tmp_path):
    np.savez(tmp_path / "r.npz", other=1)
    with pytest.raises(ValueError, match="needs topk_idx, topk_weights, num_tokens, num_experts; or logical_count or"):
        Routing.parse(str(tmp_path / "r.npz"), MODEL)
    np.savez(tmp_path / "r.npz", counts=TABLE)
    with pytest.raises(ValueError, match="it holds counts"):
        Routing.load(tmp_path / "r.npz")
    arrays = {"num_tokens": [2], "num_experts": 6, "topk_weights": np.ones((2, 2))}
    np.savez(tmp_path / "r.npz", topk_idx=np.zeros((1, 2, 2), int), **arrays)
    with pytest.raises(ValueError, match=re.escape("topk_idx is (1, 2, 2) and topk_weights (2, 2) (must be the same")):
        Routing.parse(str(tmp_path / "r.npz"), MODEL)
