"""Predict a Qwen3-30B-A3B layer on one H200 and print it beside what prototype kernels took.

Nothing here is fitted to the times that are predicted: parameters come from the preset, but for what depends on the
kernel: the prototypes began, signalled and made lists in ways of their own.
"""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import flashmoe as fm
from flashmoe.calibrate.measurements import Measurements
from flashmoe.machine import Machine
from flashmoe.sim.parameters import resolve

RESULTS = Path(__file__).parents[1] / "results"
CALIBRATION = RESULTS / "2026-11-23-h200-calibration" / "calibrate.json"
MEASURED = RESULTS / "2026-11-23-h200-layer" / "measured.csv"
MODEL = fm.MoEModel.preset("qwen3-30b-a3b")
NUM_LAYERS = 8  # back to back, a launch each
# In place of what the preset has from flashmoe's own kernel. Lists, and what comes before the first pick, were traced
# in a prototype as part of `route`; several warps of a prototype release at a time, so that its releases only delay
# signals.
PROTOTYPE = {
    "prologue_ps": 0,
    "release_ps": 0,
    "finish_beside": False,
    "word_tokens": 0,
    "first_given": False,
    "ask_early": False,
    "feed_bytes_per_ns": 0.0,
    "gap_ps": 0,
    "gate_overhead_ps": 600_000,
    "route_overhead_ps": 1_000_000,
    "up_overhead_ps": 300_000,
    "down_overhead_ps": 300_000,
    "combine_overhead_ps": 230_000,
    "plan_ps": 0,
    "plan_token_ps": 0,
    "sort_ps": 0,
    "sort_expert_ps": 0,
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Case(NamedTuple):
    """A kind of kernel that was measured."""

    policy: str
    down: str
    gate: bool = True
    programmatic: bool = True  # launches, up to 64 tokens
    words: bool = True  # up to 8 tokens signals are words that carry their epoch with the data
    tuned: bool = True  # the best configuration of each size, not of the kind: tells one policy from another


CASES = {
    "fused": Case("ticket", "rows"),
    "given": Case("ticket", "rows", gate=False),
    "fused, plain launches": Case("ticket", "rows", programmatic=False),
    "rows, static": Case("static_phase", "rows", tuned=False),
    "rows, ticket": Case("ticket", "rows", tuned=False),
    "tile, static": Case("static_phase", "tile", words=False, tuned=False),
    "tile, ticket": Case("ticket", "tile", words=False, tuned=False),
    "tile, push": Case("push", "tile", words=False, tuned=False),
}


class Cell(NamedTuple):
    """One number of the table. measured_us is None where nothing was measured."""

    case: str
    tokens: int
    predicted_us: float
    spread_us: float  # standard deviation over seeds
    measured_us: float | None

    @property
    def error(self) -> float | None:
        return None if self.measured_us is None else self.predicted_us / self.measured_us - 1.0


def read_measured() -> dict[tuple[str, int], float]:
    """Microseconds a layer by (case, tokens)."""
    with MEASURED.open(newline="") as file:
        return {(row["case"], int(row["tokens"])): float(row["us"]) for row in csv.DictReader(file)}


@cache
def calibrated(benchmark: str, quantity: str, **conditions: object) -> float:
    """Median of a calibrated quantity. Raises: ValueError unless the conditions single one out."""
    return Measurements.load(CALIBRATION).one(benchmark, quantity, **conditions).median


def reading_bytes_per_ns(machine: Machine) -> float:
    """Of all CUs together."""
    return float(resolve(machine, 1, machine.num_cus).rates[0, -1]) * machine.num_cus * 1000


@cache
def machine_for(case: Case, tokens: int) -> Machine:
    """An H200 as the kernel of a case uses it."""
    machine = replace(Machine.preset("h200"), pe_spread=0.0, **PROTOTYPE)  # the mean H200
    # that card's memory: cards differ by 2 %
    here = calibrated("read_bandwidth", "total", slots=3, sms=machine.num_cus)
    machine = replace(machine, hbm_bytes_per_ns=machine.hbm_bytes_per_ns * here / reading_bytes_per_ns(machine))
    if case.programmatic and tokens <= 64:
        ready_ns = calibrated("launch", "gap_last_end_to_first_ready", programmatic=True)
        machine = replace(machine, launch_ps=round(ready_ns * 1000))
    signal: dict[str, object] = {"signal": "red.release", "payload_bytes": 512}
    if case.words and tokens <= 8:
        signal = {"signal": "st.relaxed"}
    idle_ns = calibrated("signal", "one_way", streams="idle", **signal)
    loaded_ns = calibrated("signal", "one_way", streams="all SMs stream", slots=3, **signal)
    load = reading_bytes_per_ns(machine) / machine.hbm_bytes_per_ns
    return replace(
        machine,
        signal_ps=round(idle_ns * 1000),
        signal_near_ps=round(idle_ns * 1000),
        signal_load_factor=1.0 + (loaded_ns / idle_ns - 1.0) / load,
    )


def tiling_for(case: Case, tokens: int) -> fm.Tiling:
    """The tiles of the prototypes. About 128 gate tasks; they cut the router's rows by K as well, flashmoe does not."""
    gate_experts = min(max(tokens // 8, 1), 16)
    tiles = 1 if tokens <= 8 else 4 if tokens <= 128 else 16  # a pick, 8 gate and 8 up rows each
    if case.down == "tile":
        return fm.Tiling(down="tile", up_rows=8 * tiles, down_rows=16 * tiles, gate_experts=gate_experts)
    is_small = tokens <= 8
    return fm.Tiling(
        down="rows",
        up_rows=8 * tiles,
        down_rows=16 if is_small else 32,
        experts_per_pick=0 if is_small else MODEL.num_experts // 2,
        gate_experts=gate_experts,
    )


def predict(case: Case, tokens: int, *, seeds: int = 5, without: tuple[str, ...] = ()) -> tuple[float, float]:
    """Mean time of a layer and its standard deviation over seeds, of routing and jitter [us]."""
    layer_us = []
    for seed in range(seeds):
        routing = [fm.Routing.uniform(MODEL, tokens, ep_size=1, seed=NUM_LAYERS * seed + i) for i in range(NUM_LAYERS)]
        totals = fm.evaluate(
            MODEL,
            routing=routing,
            machine=machine_for(case, tokens),
            policy=case.policy,
            tiling=tiling_for(case, tokens),
            gate=case.gate,
            gap_us=0.0,
            seed=seed,
            without=without,
        )
        layer_us.append(totals.makespan_us / NUM_LAYERS)
    return float(np.mean(layer_us)), float(np.std(layer_us))


def predict_all(*, seeds: int = 5, without: tuple[str, ...] = ()) -> list[Cell]:
    """Every case at every size where it was measured; "fused" at all sizes."""
    measured = read_measured()
    return [
        Cell(name, tokens, *predict(case, tokens, seeds=seeds, without=without), measured.get((name, tokens)))
        for name, case in CASES.items()
        for tokens in TOKENS
        if (name, tokens) in measured or name == "fused"
    ]


def mape(cells: list[Cell]) -> float:
    """Mean absolute relative error of the cells that were measured."""
    return float(np.mean([abs(cell.error) for cell in cells if cell.error is not None]))


def kendall_tau(cells: list[Cell]) -> float:
    """Rank correlation of predicted and measured times: the share of pairs in the same order less the others."""
    pairs = [
        (one.predicted_us - other.predicted_us) * (one.measured_us - other.measured_us)
        for one, other in itertools.combinations(cells, 2)
        if one.measured_us is not None and other.measured_us is not None
    ]
    return float(np.mean(np.sign(pairs)))


def policies_at(cells: list[Cell], tokens: int) -> list[Cell]:
    """What was measured of policies and of ways to cut the down projection, at one size."""
    return [cell for cell in cells if not CASES[cell.case].tuned and cell.tokens == tokens]


def main(
    seeds: Annotated[int, typer.Option(help="Draws of routing and jitter to average over.", min=1)] = 5,
    without: Annotated[list[str] | None, typer.Option(help="An effect to switch off; may be given again.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
) -> None:
    """Predict a layer on one H200 and print it beside the measured times."""
    cells = predict_all(seeds=seeds, without=tuple(without or ()))
    measured = read_measured()
    table = Table("case", "tokens", "predicted us", "spread", "measured us", "error", "read ceiling us")
    for column in table.columns[1:]:
        column.justify = "right"
    for cell in cells:
        ceiling = measured.get(("ceiling", cell.tokens))
        table.add_row(
            cell.case,
            str(cell.tokens),
            f"{cell.predicted_us:.1f}",
            f"{cell.spread_us:.1f}",
            "" if cell.measured_us is None else f"{cell.measured_us:.1f}",
            "" if cell.error is None else f"{cell.error:+.1%}",
            "" if ceiling is None else f"{ceiling:.1f}",
        )
    console = Console()
    console.print(table)
    tuned = [cell for cell in cells if CASES[cell.case].tuned]
    others = [cell for cell in cells if not CASES[cell.case].tuned]
    console.print(f"mean absolute error: best kernels {mape(tuned):.1%}, policies and tilings {mape(others):.1%}")
    for tokens in sorted({cell.tokens for cell in others}):
        ranked = policies_at(cells, tokens)
        console.print(f"{len(ranked)} policies and tilings at tokens={tokens}: Kendall tau {kendall_tau(ranked):+.2f}")
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Cell._fields)
            writer.writerows(
                cell._replace(predicted_us=round(cell.predicted_us, 2), spread_us=round(cell.spread_us, 2))
                for cell in cells
            )


if __name__ == "__main__":
    typer.run(main)
