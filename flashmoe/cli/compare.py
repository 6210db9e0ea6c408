"""flashmoe compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import check_writable, out, print_json, print_written, progress
from flashmoe.cli.simulate import FIGURES
from flashmoe.trace import Trace

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe compare simulated.npz measured.npz\n\n"
    "flashmoe compare simulated.npz measured.npz --plot mirrored.png --json"
)


def compare(
    left: Annotated[Path, typer.Argument(metavar="A.npz", help="Trace, usually the simulated one.")],
    right: Annotated[Path, typer.Argument(metavar="B.npz", help="Trace that counts as the truth.")],
    plot: Annotated[
        Path | None, typer.Option(help="Write the two timelines, mirrored on one time axis, as a figure.")
    ] = None,
    as_json: inputs.Json = False,
) -> None:
    """Lay two traces of the same layer over each other, task by task: A's errors against B."""
    check_writable(plot, FIGURES)
    from flashmoe.compare import compare as join

    a, b = Trace.load(left), Trace.load(right)
    comparison = join(a, b)
    if plot is not None:
        from flashmoe.plots import figure_mirrored

        with progress("drawing"):
            figure_mirrored(a, b).savefig(plot)
    if as_json:
        print_json(comparison.to_dict())
        return
    out.print(comparison.table(), markup=False, soft_wrap=True)
    print_written(plot, "figure")
