"""flashmoe sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import (
    WorkFailed,
    as_time,
    check_writable,
    print_json,
    print_table,
    print_written,
    progress,
    say,
)

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST_ROWS = 20  # of points on the screen

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe sweep studies/policies.yaml --out policies.parquet  # after a kill: goes on from there\n\n"
    "flashmoe sweep studies/policies.yaml --out policies.parquet --scheduler tcp://node0:8786\n\n"
    "[bold]A study[/bold] has these sections, all optional; its inputs are those of simulate, and single fields\n"
    "such as machine.signal_ps, policy.order or tiling.up_rows:\n\n"
    "fixed: {tokens: 8, routing: 'zipf:1'}\n\n"
    "grid: {policy: \\[ticket, static_phase], ep: [4, 8]}\n\n"
    "sample: {method: latin_hypercube, points: 16, over: {machine.signal_ps: {low: 800_000, high: 3_000_000}}}\n\n"
    "replications: 5"
)


def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Which simulations to make: see below.")],
    out: Annotated[
        Path, typer.Option(help="Results, .parquet: a row a simulation. What is in there already is not made again.")
    ],
    processes: Annotated[
        int | None, typer.Option(help="Processes that simulate. [dim]default: one for each core[/dim]")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Let the workers of this Dask scheduler simulate instead.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make again what failed before.")] = False,
    as_json: inputs.Json = False,
) -> None:
    """Simulate every point of a study: grids, random points and Latin hypercubes over any input, with replications."""
    check_writable(out, (".parquet",))
    from flashmoe.sweep import summarise
    from flashmoe.sweep import sweep as simulate_all

    reused = None
    with progress("simulating") as tick:

        def count(done: int, total: int) -> None:
            nonlocal reused
            reused = done if reused is None else reused
            tick(done, total)

        frame = simulate_all(
            study, out, processes=processes, scheduler=scheduler, retry_failed=retry_failed, progress=count
        )
    failures = frame["error"].dropna()
    if as_json:
        print_json(
            {
                "points": frame["point"].nunique(),
                "simulations": len(frame),
                "reused": reused,
                "failed": len(failures),
                "errors": failures.value_counts().to_dict(),
                "version": frame["version"].iloc[0],
                "out": str(out),
                "inputs": {
                    "study": str(study),
                    "processes": processes,
                    "scheduler": scheduler,
                    "retry_failed": retry_failed,
                },
            }
        )
    else:
        counts = f"{frame['point'].nunique():,} points, {len(frame):,} simulations, {reused or 0:,} of them made before"
        say(counts, "bold")
        if len(failures) < len(frame):  # else there is nothing to sum up
            _print(summarise(frame))
        print_written(out, "results")
    if len(failures):
        raise WorkFailed(f"{len(failures)} of {len(frame)} simulations failed, the first with: {failures.iloc[0]}")


def _print(summary: DataFrame) -> None:
    shown = summary
    if len(summary) > _MOST_ROWS:
        shown = summary.sort_values("mean").head(_MOST_ROWS)
        say(f"The {_MOST_ROWS} with the shortest mean makespan:", "dim")
    inputs = summary.loc[:, :"runs"].columns[:-1]
    varied = [name for name in inputs if summary[name].astype(str).nunique() > 1]
    replicated = bool((summary["runs"] > 1).any())
    some_failed = bool(summary["failed"].any())
    columns = [*varied, "mean makespan", *(["95 % sure", "p90"] if replicated else []), "runs"]
    rows = []
    for point in shown.to_dict("records"):
        times = ["mean", *(["mean_high", "p90"] if replicated else [])]
        cells = [as_time(point[name]) if point[name] == point[name] else "-" for name in times]
        if replicated and cells[1] != "-":
            cells[1] = f"±{as_time(point['mean_high'] - point['mean'])}"
        counts = [str(point["runs"]), *([str(point["failed"])] if some_failed else [])]
        rows.append([*(_as_cell(point[name]) for name in varied), *cells, *counts])
    say("")
    print_table([*columns, *(["failed"] if some_failed else [])], rows, num_names=len(varied))


def _as_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
