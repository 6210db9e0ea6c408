"""flashmoe trace export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli.screen import check_writable, print_written, progress
from flashmoe.trace import Trace

trace_app = typer.Typer(name="trace", no_args_is_help=True, help="Traces for other tools.", rich_markup_mode="rich")


@trace_app.callback()
def _trace() -> None:
    """Traces for other tools."""


@trace_app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "flashmoe trace export t.npz t.json\n\n"
    "flashmoe trace export simulated.npz both.json.gz --with measured.npz"
)
def export(
    trace: Annotated[Path, typer.Argument(metavar="T.npz", help="Trace.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.json", help="File to write, .json or .json.gz.")],
    beside: Annotated[
        Path | None, typer.Option("--with", metavar="U.npz", help="Second trace, shown beside the first.")
    ] = None,
) -> None:
    """Write a trace as Chrome JSON, to be opened at https://ui.perfetto.dev."""
    from flashmoe.chrome import SUFFIXES, write_chrome

    check_writable(output, SUFFIXES)
    with progress("writing"):
        write_chrome([Trace.load(path) for path in (trace, beside) if path is not None], output)
    print_written(output, "open at https://ui.perfetto.dev")
