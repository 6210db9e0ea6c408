"""The command line: what the Python API does, for people and (with --json) for scripts.

Exit status: 0 done; 1 the work failed (a deadline, a deadlock, a wrong result); 2 bad input.
"""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashmoe.cli import (
    bench,
    build,
    calibrate,
    check,
    compare,
    demo,
    doctor,
    explain,
    export,
    presets,
    run,
    simulate,
    sweep,
    tune,
    validate,
)
from flashmoe.cli.screen import errors_as_exit_status

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """All commands turn errors into an exit status in this one place."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_exit_status():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    name="flashmoe",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]flashmoe demo[/bold]: under a minute, needs no GPU.",
)
# a docstring's first paragraph is the help; examples are epilogs, which keep their line ends
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=simulate.EXAMPLES)(simulate.simulate)
app.command(epilog=run.EXAMPLES)(run.run)
app.command(epilog=check.EXAMPLES)(check.check)
app.command(epilog=build.EXAMPLES)(build.build)
app.command(epilog=explain.EXAMPLES)(explain.explain)
app.command(epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(epilog=tune.EXAMPLES)(tune.tune)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.add_typer(export.trace_app)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command("validate", epilog=validate.EXAMPLES)(validate.validate_command)
app.command(epilog=presets.EXAMPLES)(presets.presets)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashmoe {metadata.version('flashmoe')}")
        raise typer.Exit


@app.callback()
def flashmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One mixture-of-experts layer as small tasks that workers pull from queues.

    Simulate a schedule on GPUs that are not at hand, compute the layer on CPU threads, and compare the timelines.
    """


def main() -> None:
    """Entry point of the `flashmoe` command."""
    app()
