"""Studies: which points they name, and what they refuse."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashmoe import Machine
from flashmoe.study import Study


def points(**entries: Any) -> list[dict[str, Any]]:
    return Study.load(entries).points()


def drawn(name: str, values: Any, number: int, **options: Any) -> list[Any]:
    return [point[name] for point in points(sample={"points": number, "over": {name: values}, **options})]


# ---- grids and replications


def test_grid_is_every_combination_over_what_is_fixed() -> None:
    assert points(fixed={"ep": 2}, grid={"policy": ["push", "ticket"], "tokens": [1, 4]}) == [
        {"ep": 2, "policy": "push", "tokens": 1},
        {"ep": 2, "policy": "push", "tokens": 4},
        {"ep": 2, "policy": "ticket", "tokens": 1},
        {"ep": 2, "policy": "ticket", "tokens": 4},
    ]
    assert points() == [{}]


def test_grid_over_a_range() -> None:
    one = {"tokens": {"low": 1, "high": 8, "log": True, "num": 4}}
    assert [point["tokens"] for point in points(grid=one)] == [1, 2, 4, 8]
    one = {"machine.jitter": {"low": 0, "high": 0.5, "num": 3}}
    assert [point["machine.jitter"] for point in points(grid=one)] == [0, 0.25, 0.5]
    one = {"ep": {"low": 1, "high": 2, "num": 9}}  # rounded, and no value twice
    assert [point["ep"] for point in points(grid=one)] == [1, 2]


def test_replications_have_the_same_seeds_at_every_point() -> None:
    made = points(fixed={"seed": 7}, grid={"tokens": [1, 2]}, replications=3)
    assert [(point["seed"], point["tokens"]) for point in made] == [(7, 1), (7, 2), (8, 1), (8, 2), (9, 1), (9, 2)]


def test_a_sample_meets_every_combination_of_the_grid() -> None:
    over = {"machine.put_ps": {"low": 1, "high": 1_000_000}}
    made = points(grid={"policy": ["push", "ticket"]}, sample={"points": 3, "over": over})
    assert [point["policy"] for point in made] == ["push", "ticket"] * 3
    assert [made[i]["machine.put_ps"] == made[i + 1]["machine.put_ps"] for i in (0, 2, 4)] == [True] * 3
    assert len({point["machine.put_ps"] for point in made}) == 3


# ---- samples


@pytest.mark.parametrize("log", [False, True])
def test_latin_hypercube_has_one_point_in_each_stratum(log: bool) -> None:
    values = drawn("machine.hbm_bytes_per_ns", {"low": 10.0, "high": 1000.0, "log": log}, 16)
    shares = [math.log10(value / 10) / 2 if log else (value - 10) / 990 for value in values]
    assert sorted(int(16 * share) for share in shares) == list(range(16))


def test_latin_hypercube_takes_each_entry_of_a_list_as_often() -> None:
    assert Counter(drawn("policy", ["push", "ticket", "static_phase"], 12)) == {
        "push": 4,
        "ticket": 4,
        "static_phase": 4,
    }


def test_random_whole_numbers_are_even_and_reach_both_ends() -> None:
    counts = Counter(drawn("tokens", {"low": 1, "high": 3}, 3000, method="random"))
    assert set(counts) == {1, 2, 3}
    # binomial(3000, 1/3): a standard deviation of 26
    assert all(abs(count - 1000) < 4 * 26 for count in counts.values())


def test_the_sample_depends_on_its_seed_alone() -> None:
    span = {"low": 0.0, "high": 1.0}
    for method in ("random", "latin_hypercube"):
        one, again, other = (drawn("machine.jitter", span, 5, method=method, seed=seed) for seed in (1, 1, 2))
        assert one == again != other


# ---- files, types and errors


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    # YAML 1.1 takes 1e6 for a text
    path.write_text("fixed: {machine.put_ps: 1e6, gap_us: 5}\ngrid: {without: [[], [jitter]], gate: [on, off]}\n")
    made = Study.load(path).points()
    assert [point["machine.put_ps"] for point in made] == [1_000_000] * 4
    assert [(point["without"], point["gate"]) for point in made] == [
        ((), True),
        ((), False),
        (("jitter",), True),
        (("jitter",), False),
    ]


def test_the_studies_that_come_along_load() -> None:
    paths = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        assert Study.load(path).points()


def test_a_machine_as_an_object() -> None:
    machine = Machine.preset("h200")
    assert points(grid={"machine": ["mi300x", machine]})[1]["machine"] is machine


SPAN = {"low": 1, "high": 2}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"tokns": [1]}}, r"grid\.tokns: unknown input \(accepted: model, machine, .*, tiling\.FIELD\)"),
        ({"fixed": {"tiling.rows": 1}}, r"fixed\.tiling\.rows: unknown .*tiling\.granularity, tiling\.down"),
        ({"fixed": {"machine.name": "x"}}, r"fixed\.machine\.name: unknown .*machine\.num_cus"),
        ({"gird": {}}, r"unknown entry 'gird' \(accepted: fixed, grid, sample, replications\)"),
        ({"sample": {"pionts": 1}}, r"sample: unknown entry 'pionts' \(accepted: method, points, seed, over\)"),
        ({"sample": 3}, r"sample: 3 \(must be entries by name: method, points, seed, over\)"),
        ({"fixed": {"tokens": "many"}}, r"fixed\.tokens: 'many': input should be a valid integer"),
        ({"fixed": {"tokens": 1.5}}, r"fixed\.tokens: 1\.5"),
        ({"grid": {"tiling.down": ["tile", "row"]}}, r"grid\.tiling\.down: 'row': .*'tile' or 'rows'"),
        ({"grid": {"tokens": 1}}, r"grid\.tokens: must be a list of values, or a range"),
        ({"grid": {"tokens": []}}, r"grid\.tokens: must have at least one value"),
        ({"grid": {"tokens": SPAN}}, r"grid\.tokens: a range in a grid needs num"),
        ({"grid": {"policy": {**SPAN, "num": 2}}}, r"grid\.policy: takes no range"),
        ({"grid": {"tokens": {"low": 2, "high": 1, "num": 2}}}, "low=2 .must be less than high=1"),
        ({"grid": {"tokens": {"low": 0, "high": 1, "num": 2, "log": True}}}, "low=0 with log"),
        (
            {"grid": {"tokens": {"low": 1, "hihg": 2}}},
            r"grid\.tokens: unknown entry 'hihg' \(accepted: low, high, log, num",
        ),
        ({"sample": {"points": 0, "over": {"tokens": SPAN}}}, r"sample\.points: 0"),
        ({"sample": {"points": 1, "over": {}}}, r"sample\.over"),
        ({"sample": {"points": 1, "over": {"tokens": {**SPAN, "num": 3}}}}, "num is for a grid"),
        (
            {"sample": {"method": "sobol", "points": 1, "over": {"ep": SPAN}}},
            "'sobol': .*'latin_hypercube' or 'random'",
        ),
        ({"fixed": {"ep": 1}, "grid": {"ep": [1]}}, r"grid\.ep: is under fixed, too"),
        ({"grid": {"seed": [1, 2]}, "replications": 2}, r"grid\.seed with replications=2"),
        ({"replications": 0}, "replications: 0"),
        ({"fixed": {"model": "qwen4"}}, r"fixed\.model: model 'qwen4' is unknown \(presets: qwen3"),
        ({"fixed": {"machine": "mi400"}}, r"fixed\.machine: unknown machine 'mi400' \(presets: "),
        ({"fixed": {"machine": "host"}}, "machine='host' is measured anew"),
        ({"grid": {"policy": ["fifo"]}}, r"grid\.policy: policy='fifo' \(accepted: ancestor"),
        ({"fixed": {"policy": 3}}, r"fixed\.policy: 3 .must be a name"),
        (["fixed"], r"\['fixed'\] \(must be entries by name: fixed, grid, sample, replications\)"),
        (None, r"nothing \(must be entries by name: fixed, grid, sample, replications\)"),
    ],
)
def test_errors_name_the_entry_and_what_is_accepted(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Study.load(entries)
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(ValueError, match=r"cannot read the study .*study\.yaml"):
        Study.load(path)
    path.write_text("grid: [")
    with pytest.raises(ValueError, match=r"cannot read the study .*study\.yaml"):
        Study.load(path)
    path.write_text("# nothing but this\n")
    with pytest.raises(ValueError, match=r"study\.yaml: nothing .*fixed, grid, sample, replications"):
        Study.load(path)
    path.write_text("replications: -1")
    with pytest.raises(ValueError, match=r"study\.yaml: replications: -1"):
        Study.load(path)
