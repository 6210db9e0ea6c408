"""flashmoe calibrate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import check_folder, check_writable, err, print_json, print_table, print_written, say
from flashmoe.machine import Machine, Times, parameter_units

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe calibrate --out host.toml\n\n"
    "flashmoe calibrate --backend cuda --out h200.toml --keep measured/\n\n"
    "[dim]# again from what was measured, without a GPU[/dim]\n\n"
    "flashmoe calibrate --backend cuda --from measured/ --out h200.toml"
)

BACKENDS = ("cpu", "cuda")


def calibrate(
    backend: Annotated[str, typer.Option(help="cpu: this host, two seconds. cuda: the GPU here, a minute.")] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Write the machine to this file.")] = None,
    base: Annotated[str, typer.Option(help="Where parameters come from that cannot be measured on one GPU.")] = "h200",
    model: Annotated[str, typer.Option(help="Preset whose layers are launched, with one worker.")] = "qwen3-30b-a3b",
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep what was measured, for --from (cuda).")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="Measure nothing: take what --keep kept (cuda).")
    ] = None,
    as_json: inputs.Json = False,
) -> None:
    """Measure what the machine model needs, by microbenchmarks and single tasks, and write a machine file.

    No layer that anybody wants to predict is looked at. `flashmoe validate` holds the result to layers.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} (accepted: {', '.join(BACKENDS)})")
    check_writable(out, (".toml",))
    if backend == "cpu" and (keep is not None or source is not None):
        raise ValueError("--keep and --from are for the GPU (accepted with --backend cuda)")
    if keep is not None and source is not None:
        raise ValueError("--keep and --from are both given (accepted: one of them)")
    check_folder(keep)
    started = time.monotonic()
    rows: list[list[str]] = []
    if backend == "cpu":
        from flashmoe.calibrate import host_machine

        machine = host_machine()
        rows = [[key, _as_text(getattr(machine, key)), "", origin.unit] for key, origin in machine.origins.items()]
    else:
        machine, found = _gpu(base, model, keep, source, "gpu" if out is None else out.stem)
        rows = [
            [key, _as_text(parameter.value), f"{parameter.spread:.2g}", parameter_units()[key]]
            for key, parameter in found.items()
        ]
    seconds = time.monotonic() - started
    if out is not None:
        machine.save(out)
    if as_json:
        spreads: dict[str, Any] = {} if backend == "cpu" else {key: one.spread for key, one in found.items()}
        print_json({"machine": machine.to_dict(), "spread": spreads, "seconds": seconds, "out": out and str(out)})
        return
    say(machine.description or f"this host, {machine.num_cus} workers")
    print_table(["parameter", "value", "spread", "unit"], rows)
    say(f"{len(rows)} of {len(parameter_units())} parameters measured in {seconds:.0f} s")
    print_written(out, "machine")


def _as_text(value: float | Times) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{size}: {time:g}" for size, time in value)
    return f"{value:g}"


def _gpu(base: str, model: str, keep: Path | None, source: Path | None, name: str) -> tuple[Machine, dict[str, Any]]:
    from flashmoe.calibrate.gpu import calibrate_gpu, gpu_machine, load_measured

    there = Machine.load(base)
    if source is not None:
        return gpu_machine(name, there, *load_measured(source))
    return calibrate_gpu(
        name,
        there,
        inputs.load_model(model, "bf16"),
        folder=keep,
        tell=lambda line: err.print(line, style="dim", markup=False, soft_wrap=True),
    )
