"""flashmoe validate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import print_json, print_table, print_written, progress, say
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
    if out is not None and not out.is_dir():
        raise ValueError(f"cannot write to {out}: it is no folder")
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
        [
            "skew",
            "policy",
            "tokens",
            "measured µs",
            "noise",
            "simulated µs",
            "error",
            "of durations µs",
            "of schedule µs",
        ],
        [_row(cell) for cell in result.cells],
        num_names=2,
    )
    say("")
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
        title="Duration of a pick, by kind",
    )
    say("")
    agreement = result.rank_agreement()
    print_table(
        ["skew", "tokens", "Kendall's tau of the policies"],
        [
            [skew, str(tokens), "none differ by more than the noise" if tau is None else f"{tau:+.2f}"]
            for (tokens, skew), tau in agreement.items()
        ],
    )
    worst = result.worst
    say(
        f"\nMakespans: mean absolute error {result.mean_error_pct:.1f} %, the largest {worst.error_pct:+.1f} % "
        f"({worst.tokens} tokens, {worst.skew}, {worst.policy})."
    )


def _row(cell: Cell) -> list[str]:
    return [
        cell.skew,
        cell.policy,
        str(cell.tokens),
        f"{cell.measured_us:.1f}",
        f"{cell.noise_us:.1f}",
        f"{cell.simulated_us:.1f}",
        f"{cell.error_pct:+.1f} %",
        *([] if cell.blame is None else [f"{cell.blame.durations_us:+.1f}", f"{cell.blame.schedule_us:+.1f}"]),
    ]


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
