"""What all commands share of the terminal: consoles, progress bars, tables, errors and output files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Results go to stdout, progress and errors to stderr. No highlighting: colour is for what we mean to stress.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Tick = Callable[[int, int], None]  # called with (done, all)


class WorkFailed(Exception):
    """The work was done or tried, and its result is not right: exit status 1."""


@contextmanager
def errors_as_exit_status() -> Iterator[None]:
    """One line on stderr instead of a traceback for every error that a user can do something about."""
    try:
        yield
    except BrokenPipeError:
        raise  # typer knows what to do when `head` has seen enough
    except WorkFailed as error:
        _exit(error, 1)
    except MemoryError as error:
        _exit(f"out of memory ({error})", 1)
    except (ValueError, ImportError, OSError) as error:
        _exit(error, 2)
    except RuntimeError as error:
        from flashmoe.hw import BuildError, DeviceError, LaunchError
        from flashmoe.sim import DeadlockError

        if not isinstance(error, BuildError | DeviceError | LaunchError | DeadlockError):
            raise  # a bug: its traceback is wanted
        _exit(error, 1)


def _exit(error: Exception | str, status: int) -> None:
    lines = [line.strip() for line in str(error).splitlines()]
    typer.echo(f"error: {'; '.join(line for line in lines if line)}", err=True)
    raise typer.Exit(status)


@contextmanager
def progress(what: str) -> Iterator[Tick]:
    """A bar on stderr, gone when done; nothing when stderr is no terminal. Yields a function (done, all)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def print_json(result: dict[str, Any]) -> None:
    """One JSON object, and nothing else, on stdout."""
    typer.echo(json.dumps(result, allow_nan=False))


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def check_writable(path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError now rather than lose the work later: no folder, not writable, an unknown suffix."""
    if path is None:
        return
    if suffixes and not path.name.endswith(tuple(suffixes)):
        raise ValueError(f"{path}: unknown suffix (accepted: {', '.join(suffixes)})")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is no folder")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def check_folder(folder: Path | None) -> None:
    """As check_writable, for a folder that is made unless it is there."""
    if folder is not None:
        check_writable(folder / "file" if folder.is_dir() else folder)
        if folder.is_file():
            raise ValueError(f"cannot write to {folder}: it is no folder")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", num_names: int = 1) -> None:
    """A table whose first num_names columns are words, to the left, and whose others are numbers."""
    table = Table(pad_edge=False, box=None, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < num_names else "right", header_style="bold dim")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def say(text: str, style: str = "") -> None:
    """A paragraph, wrapped at the terminal's width; brackets are just brackets."""
    out.print(Text(text, style=style))


def print_written(path: Path | None, what: str) -> None:
    if path is not None:
        out.print(Text(f"{what}: {path}", style="dim"), soft_wrap=True)


def as_time(us: float) -> str:
    """A time with its unit: 45.2 µs, 14.25 ms."""
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:,.2f} ms"


def as_bytes(count: float) -> str:
    """A size with its unit, in powers of ten as bandwidths are: 9.44 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"
