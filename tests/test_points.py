"""Points: what inputs by name resolve to, what tells one simulation from another, and what it returns."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashmoe as fm
from flashmoe import points
from flashmoe.points import INPUTS, resolve
from flashmoe.tasks import Tiling

TINY = {"model.d_model": 64, "model.d_ff": 32, "model.num_experts": 8, "model.top_k": 2, "ep": 2, "workers": 4}
TINY_MODEL = fm.MoEModel.preset("qwen3-30b-a3b", d_model=64, d_ff=32, num_experts=8, top_k=2)


def digest(**inputs: Any) -> str:
    return resolve({**TINY, **inputs}).digest


def test_a_point_is_the_simulation_that_one_would_write_by_hand() -> None:
    given = {"policy": "ticket", "routing": "zipf:1", "tokens": 3, "layers": 2, "seed": 5, "gap_us": 2.0}
    given |= {"machine.put_ps": 5_000_000, "tiling.up_rows": 16, "policy.look_ahead": 0, "gate": False}
    given |= {"without": ("jitter",), "pe_speed": (1.0, 0.5), "engine": "simpy", "correlation": 0.5}
    row = pickle.loads(pickle.dumps(resolve({**TINY, **given}))).evaluate()  # as another process does it
    by_hand = fm.evaluate(
        TINY_MODEL,
        routing=fm.Routing.layers("zipf:1", TINY_MODEL, 3, 2, 5, num_layers=2, correlation=0.5),
        machine=replace(fm.Machine.preset("mi300x"), put_ps=5_000_000),
        policy=fm.Policy(name="ticket", queue="ticket", look_ahead=0, tiling=Tiling(up_rows=16)),
        engine="simpy",
        seed=5,
        workers=4,
        gate=False,
        gap_us=2.0,
        without=["jitter"],
        pe_speed=[1.0, 0.5],
    )
    assert row["error"] is None
    assert row["wall_s"] > 0
    assert {name: row[name] for name in by_hand.to_dict()} == by_hand.to_dict()
    assert row["machine.put_ps"] == 5_000_000 and row["tokens"] == 3 and row["version"] == points.version()


def test_defaults_are_resolved() -> None:
    inputs = resolve({}).inputs
    assert list(inputs) == list(INPUTS)
    assert (inputs["ep"], inputs["tokens"], inputs["layers"], inputs["workers"]) == (8, 8, 1, 304)


def test_sizes_that_are_not_given_belong_to_the_way_the_layer_is_cut() -> None:
    assert resolve({"tiling.down": "rows"}).policy.tiling == Tiling(down="rows")
    assert resolve({"tiling.up_rows": 16}).policy.tiling == Tiling(up_rows=16)
    assert resolve({"policy": "ancestor"}).policy.tiling == Tiling(granularity="token")
    assert resolve({"policy": "ancestor", "tiling.granularity": "tile"}).policy.tiling == Tiling()
    assert resolve({"tiling.up_rows": 0}).inputs["tiling.up_rows"] == Tiling().up_rows


def test_what_is_the_same_simulation_has_the_same_digest() -> None:
    assert digest() == digest(tokens=8, routing="uniform", seed=0, **{"tiling.up_rows": Tiling().up_rows})
    assert digest(without=("jitter", "stalls")) == digest(without=("stalls", "jitter"))
    assert digest(machine="h200") == digest(machine=fm.Machine.preset("h200"))


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 9},
        {"seed": 1},
        {"workers": 5},
        {"gap_us": 0.0},
        {"engine": "simpy"},
        {"policy": "ticket"},
        {"policy.look_ahead": 0},
        {"tiling.up_rows": 16},
        {"machine.put_ps": 1},
        {"model.dtype": "f32"},
        {"without": ("jitter",)},
        {"pe_speed": (1.0, 1.0)},
        {"correlation": 0.5},
    ],
)
def test_what_is_another_simulation_has_another_digest(other: dict[str, Any]) -> None:
    assert digest(**other) != digest()


def test_only_the_seed_is_not_part_of_the_point() -> None:
    one, other, third = (resolve({"seed": seed, "tokens": n}).row["point"] for seed, n in ((0, 8), (1, 8), (0, 9)))
    assert one == other != third


def test_a_new_version_has_other_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    old = digest()
    monkeypatch.setattr(points, "version", lambda: "0.0.0, model 99")
    assert digest() != old


def test_files_count_by_what_is_in_them(tmp_path: Path) -> None:
    machine = tmp_path / "mine.toml"
    source = 'base = "mi300x"\nput_ps = { value = %d, unit = "ns", origin = "estimate", source = "a guess" }\n'
    machine.write_text(source % 1000)
    points._machine_file.cache_clear()
    slow = digest(machine=str(machine))
    assert slow == digest(machine=str(machine))
    machine.write_text(source % 500)
    points._machine_file.cache_clear()  # as in the process of another sweep
    points.load_machine.cache_clear()
    assert digest(machine=str(machine)) != slow


def test_recorded_routing(tmp_path: Path) -> None:
    path = tmp_path / "recorded.npz"
    routing = fm.Routing.zipf(TINY_MODEL, [3, 3, 3, 3], 4, seed=1)
    routing.save(path)
    tiny = {name: value for name, value in TINY.items() if name != "ep"}
    point = resolve({**tiny, "routing": str(path)})
    assert (point.inputs["ep"], point.inputs["tokens"], point.inputs["layers"]) == (4, 3, 1)
    assert point.recorded == (routing.digest,)
    assert point.evaluate()["makespan_ps"] == fm.evaluate(TINY_MODEL, routing=routing, workers=4).makespan_ps

    copy = tmp_path / "copy.npz"
    copy.write_bytes(path.read_bytes())
    assert resolve({**tiny, "routing": str(copy)}).digest == point.digest
    # the file of the same name on another machine, or later
    fm.Routing.zipf(TINY_MODEL, [3, 3, 3, 3], 4, seed=2).save(path)
    points._draw.cache_clear()
    assert resolve({**tiny, "routing": str(path)}).digest != point.digest
    assert "has changed since" in point.evaluate()["error"]


def test_what_fails_is_a_row_with_an_error() -> None:
    row = resolve({**TINY, "ep": 3}).evaluate()
    assert row["error"].startswith("ValueError: ep_size=3") and row["ep"] == 3
    assert "makespan_ps" not in row


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"engine": "fast"}, r"engine='fast' \(engines: "),
        ({"machine.knee": 0.5}, "knee=0.5"),
        ({"tiling.down": "rows", "tiling.granularity": "token"}, "down='rows' with granularity='token'"),
        ({"policy.queue": "replay"}, "queue='replay'"),
        ({"routing": "recorded.npz"}, "cannot read a routing from recorded.npz"),
        ({"routing": "zipf"}, None),
    ],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert "ValueError" in resolve(inputs).evaluate()["error"]
        return
    with pytest.raises(ValueError, match=message):
        resolve(inputs)


def test_policies_written_in_python_stay_at_home() -> None:
    mine = fm.Policy(name="mine", rank=lambda task: task.expert)
    with pytest.raises(ValueError, match="policy 'mine' is written in Python"):
        resolve({"policy": mine})
