"""Rows of results on disk, such that a killed process loses none that was written."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd  # what pyarrow makes a frame with, and better missed now than at the end of a sweep
import pyarrow as pa
import pyarrow.parquet as pq


class Results:
    """A Parquet file of rows, each with a digest, and beside it a journal: the rows that are not in there yet.

    The journal is a line of JSON a row. `append` has it on the disk when it returns; a line that a kill cut short is
    dropped. `compact` moves the rows to the Parquet file. One process at a time may have it open.
    Raises: ValueError when another process has, or when a file is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path.with_name(f"{path.name}.journal")
        self._file = _open_alone(self.journal)
        try:
            self._table = self._read_table()
            self._rows = self._read_journal()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.compact()
            self.journal.unlink()
        finally:
            os.close(self._file)  # and with it the lock

    def errors(self) -> dict[str, str | None]:
        """Of each row by its digest: None, or what went wrong; of several with one digest the last counts."""
        stored = self._table.select(["digest", "error"]).to_pylist() if self._table.num_rows else []
        return {row["digest"]: row["error"] for row in (*stored, *self._rows)}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows that JSON knows, each with `digest` and `error`."""
        self._rows += [dict(row) for row in rows]  # first: Ctrl-C may come at any line, and __exit__ moves these
        lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        while lines:
            lines = lines[os.write(self._file, lines) :]
        os.fsync(self._file)

    def compact(self) -> None:
        """Move the journal's rows to the Parquet file; one with a known digest replaces the older row."""
        if not self._rows:
            return
        table = self._merged()
        whole = self.path.with_name(f"{self.path.name}.new")
        with open(whole, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.path)
        # a kill between these two leaves rows in both places, and _merged takes each of them once
        os.ftruncate(self._file, 0)
        self._table, self._rows = table, []

    def frame(self, digests: Sequence[str]) -> pd.DataFrame:
        """The rows of these digests, in this order."""
        table = self._merged()
        places = {digest: place for place, digest in enumerate(table["digest"].to_pylist())}
        return table.take([places[digest] for digest in digests]).to_pandas()

    def _merged(self) -> pa.Table:
        new = {row["digest"]: row for row in self._rows}
        names = dict.fromkeys(name for row in new.values() for name in row)
        table = pa.table({name: [row.get(name) for row in new.values()] for name in names})
        if not self._table.num_rows:
            return table
        kept = self._table.filter(pa.array([digest not in new for digest in self._table["digest"].to_pylist()]))
        return pa.concat_tables([kept, table], promote_options="permissive")

    def _read_table(self) -> pa.Table:
        if not self.path.exists():
            return pa.table({})
        try:
            table = pq.read_table(self.path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"cannot read {self.path} ({error})") from error
        if not {"digest", "error"} <= set(table.column_names):
            raise ValueError(f"{self.path} is not a table of results (it lacks the columns digest and error)")
        return table

    def _read_journal(self) -> list[dict[str, Any]]:
        held = self.journal.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.journal}: line {number} is no JSON ({error})") from None
            if not (isinstance(row, dict) and {"digest", "error"} <= row.keys()):
                raise ValueError(f"{self.journal}: line {number} is no row of results")
            rows.append(row)
        return rows


def _open_alone(journal: Path) -> int:
    """Open for appending, with a lock that ends with this process."""
    while True:
        file = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"another process is writing to {journal}") from None
        if journal.exists() and os.path.samestat(os.fstat(file), journal.stat()):
            return file
        os.close(file)  # its owner was done and took it away meanwhile
