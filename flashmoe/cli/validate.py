"""flashmoe validate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import check_folder, print_json, print_table, print_written, progress, say
from flashmoe.machine import Machine
from flashmoe.validate import CELLS, Cell, Validation, load_cells, measure_cells, save_cells, validate

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe validate --machine h200.toml --cells full --out traces/\n\n"
    "[dim]# the comparison again, without a GPU[/dim]\n\n"
    "flashmoe validate --machine h200.toml --traces traces/"
)


def validate_command(
    machine: Annotated[str, typer.Option(help="Preset, or a file of flashmoe calibrate.")] = "h200",
    cells: Annotated[str, typer.Option(help=f"Numbers of tokens: {', '.join(CELLS)}.")] = "quick",
    model: Annotated[str, typer.Option(help="Preset, with random weights.")] = "qwen3-30b-a3b",
    repeats: Annotated[int, typer.Option(min=1, help="Launches of each cell: their spread is the noise.")] = 5,
    traces: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Measure nothing: take the layers that --out has saved.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the measured layers, for --traces; some kB each.")
    ] = None,
    seed: inputs.Seed = 0,
    as_json: inputs.Json = False,
) -> None:
    """Launch layers on the GPU, simulate the same ones on a calibrated machine, and say how far the model is off.

    Tokens times three skews of routing times four policies, with the tiling that is tuned for the number of tokens.
    """
    if cells not in CELLS:
        raise ValueError(f"cells={cells!r} (accepted: {', '.join(CELLS)})")
    check_folder(out)
    if out is not None and traces is not None:
        raise ValueError("--out and --traces are both given (accepted: one of them)")
    there = Machine.load(machine)
    if traces is not None:
        layers = load_cells(traces)
    else:
        sizes = inputs.load_model(model, "bf16")
        with progress("launching layers") as tick:
            layers = measure_cells(sizes, tokens=CELLS[cells], repeats=repeats, seed=seed, progress=tick)
    if out is not None:
        out.mkdir(exist_ok=True)
        save_cells(layers, out)
    with progress("simulating them") as tick:
        result = validate(layers, there, progress=tick)
    if as_json:
        print_json(_as_dict(result, machine))
        return
    _print(result)
    print_written(out, "measured layers")


def _print(result: Validation) -> None:
    print_table(
        ["skew", "policy", "tokens", "measured µs", "noise", "simulated µs", "error"],
        [_row(cell) for cell in result.cells],
        num_names=2,
    )
    say("\nDuration of a pick, by kind:")
    print_table(
        ["kind", "picks", "measured µs", "simulated µs", "bias", "MAPE"],
        [
            [
                kind,
                f"{error.count:,}",
                f"{error.measured_us:.2f}",
                f"{error.simulated_us:.2f}",
                f"{error.bias_pct:+.1f} %",
                f"{error.mape_pct:.1f} %",
            ]
            for kind, error in result.by_kind().items()
        ],
    )
    say("\nBlame by replay, means in µs; at the right, what durations of one kind alone change:")
    _print_blame(result)
    say("\nRanks of the policies, Kendall's tau:")
    print_table(
        ["skew", "tokens", "tau"],
        [
            [skew, str(tokens), "no two differ by more than the noise" if tau is None else f"{tau:+.2f}"]
            for (tokens, skew), tau in result.rank_agreement().items()
        ],
    )
    worst = result.worst
    say(
        f"\nMakespans: mean absolute error {result.mean_error_pct:.1f} %, the largest {worst.error_pct:+.1f} % "
        f"({worst.tokens} tokens, {worst.skew}, {worst.policy})."
    )


def _row(cell: Cell) -> list[str]:
    numbers = [f"{value:.1f}" for value in (cell.measured_us, cell.noise_us, cell.simulated_us)]
    return [cell.skew, cell.policy, str(cell.tokens), *numbers, f"{cell.error_pct:+.1f} %"]


def _print_blame(result: Validation) -> None:
    """Means over the cells of a size, of the error and of what it is due to."""
    kinds = list(result.by_kind())
    rows = []
    for tokens in sorted({cell.tokens for cell in result.cells}):
        blames = [cell.blame for cell in result.cells if cell.tokens == tokens and cell.blame is not None]
        parts = [[one.error_us, one.schedule_us, one.durations_us] for one in blames]
        by_kind = [[one.by_kind.get(kind, 0.0) for kind in kinds] for one in blames]
        rows.append([str(tokens), *(f"{value:+.1f}" for value in np.mean(np.hstack([parts, by_kind]), axis=0))])
    print_table(["tokens", "error", "schedule", "durations", *kinds], rows)


def _as_dict(result: Validation, machine: str) -> dict[str, Any]:
    return {
        "machine": machine,
        "mean_error_pct": result.mean_error_pct,
        "cells": [{**asdict(cell), "error_pct": cell.error_pct} for cell in result.cells],
        "by_kind": {kind: asdict(error) for kind, error in result.by_kind().items()},
        "kendall_tau": [
            {"tokens": tokens, "skew": skew, "tau": tau} for (tokens, skew), tau in result.rank_agreement().items()
        ],
    }
