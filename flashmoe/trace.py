"""What a run leaves behind: one record a task and a header, the same whoever ran it."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas

__all__ = ["KINDS", "TRACE_DTYPE", "TRACE_FORMAT", "Trace"]

KINDS = ("gate", "route", "dispatch", "up", "down", "combine", "expert")

TRACE_FORMAT = 2

# How a worker spends its time, in the order in which a task goes through it: waiting for a ticket or for inputs,
# streaming what is not there yet, computing, the fixed part of a task, remote stores; other: the launch,
# bookkeeping, no work left.
TIME_SHARES = ("ticket", "inputs", "stream", "compute", "overhead", "send", "other")

TRACE_DTYPE = np.dtype(
    [
        ("layer", "u2"),
        ("pe", "u2"),
        ("task_id", "u4"),  # stable: unique within its layer and PE, the same in every executor
        ("kind", "u1"),  # index into KINDS
        ("worker", "u2"),  # within its PE
        ("domain", "u2"),  # the XCD of that worker
        ("expert", "i4"),  # -1 where the task belongs to no expert
        ("tile", "i4"),  # -1 where the task is not a tile
        ("num_tokens", "u4"),
        ("ready_ps", "i8"),  # the last input became visible
        ("asked_ps", "i8"),  # the worker asked the queue for the pick; as ticket_ps where that is not recorded
        ("ticket_ps", "i8"),  # the worker took the task
        ("start_ps", "i8"),
        ("loaded_ps", "i8"),  # the last of its weights was there; as start_ps where that is not recorded
        ("done_ps", "i8"),  # weights and arithmetic done, the fixed part and remote stores follow; else as end_ps
        ("end_ps", "i8"),
        ("peer", "i4"),  # the other PE of an exchange, -1 for none
        ("flags", "u4"),  # TraceFlag in hip_src/include/flashmoe/trace.hpp, and FROM_CACHE
        ("hbm_bytes", "u8"),  # weights that the task streams
        ("link_bytes", "u8"),
    ]
)

# A flag: what the task streams lies in the cache, the memory has no part in it. Only simulators know.
FROM_CACHE = 8

# Figures, exports and comparisons cannot do without these; they say "unknown" for any other that is missing.
REQUIRED_KEYS = ("executor", "ep_size", "num_workers", "num_domains")

MEMBERS = ("records", "critical_path", "header")

SIMULATORS = ("simpy", "native")


def memory_bytes(records: NDArray[np.void]) -> NDArray[np.int64]:
    """(num_tasks,) weights that each of these tasks brings from memory, not from a cache [bytes]."""
    num_bytes: NDArray[np.int64] = records["hbm_bytes"].astype(np.int64)
    num_bytes[records["flags"] & FROM_CACHE > 0] = 0
    return num_bytes


@dataclass(frozen=True, eq=False)
class Trace:
    """The tasks of one layer on all PEs, on one clock that reads 0 at the launch.

    records: (num_tasks,) TRACE_DTYPE, in any order; kept as a read-only view.
    header: what was run, where and how; kept as JSON gives it back (tuples become lists).
    critical_path: (n,) int64 indices into records, first to last; empty when unknown.
    Raises: ValueError naming the record or the header key that does not fit.
    """

    records: NDArray[np.void]
    header: dict[str, Any]
    critical_path: NDArray[np.int64]

    def __post_init__(self) -> None:
        # frozen stops assignment, and these three only replace what was given by an equal, safer form
        object.__setattr__(self, "header", _as_json(self.header))
        object.__setattr__(self, "records", _read_only(self.records))
        object.__setattr__(self, "critical_path", _read_only(np.asarray(self.critical_path)))
        self._check_header()
        self._check_records()
        self._check_critical_path()

    def _check_header(self) -> None:
        missing = [key for key in REQUIRED_KEYS if key not in self.header]
        if missing:
            raise ValueError(f"trace header lacks {', '.join(missing)} (required: {', '.join(REQUIRED_KEYS)})")
        for key in ("ep_size", "num_workers", "num_domains"):
            value = self.header[key]
            if type(value) is not int or value < 1:
                raise ValueError(f"trace header has {key}={value!r} (must be an int of 1 or more)")

    def _check_records(self) -> None:
        records = self.records
        if records.dtype != TRACE_DTYPE or records.ndim != 1:
            raise ValueError(f"trace records are {records.ndim}-d of {records.dtype} (must be 1-d of {TRACE_DTYPE})")
        self._refuse(records["kind"] >= len(KINDS), "kind", f"must be below {len(KINDS)}: {', '.join(KINDS)}")
        self._refuse(records["pe"] >= self.num_pes, "pe", f"must be below ep_size={self.num_pes}")
        self._refuse(records["worker"] >= self.num_workers, "worker", f"must be below {self.num_workers}")
        self._refuse(records["start_ps"] < 0, "start_ps", "times count from the launch: must be 0 or more")
        self._refuse(records["end_ps"] < records["start_ps"], "end_ps", "must not be before start_ps")

    def _refuse(self, bad: NDArray[np.bool_], field: str, rule: str) -> None:
        if bad.any():
            record = self.records[int(bad.argmax())]
            where = f"task {record['task_id']} of PE {record['pe']}"
            raise ValueError(f"trace record of {where} has {field}={record[field]} ({rule})")

    def _check_critical_path(self) -> None:
        path, num_tasks = self.critical_path, len(self.records)
        if path.ndim != 1 or path.dtype != np.int64:
            raise ValueError(f"critical_path is {path.ndim}-d of {path.dtype} (must be 1-d of int64)")
        outside = path[(path < 0) | (path >= num_tasks)]
        if len(outside):
            raise ValueError(f"critical_path holds {outside[0]} (must index one of {num_tasks} records)")

    @property
    def num_pes(self) -> int:
        return int(self.header["ep_size"])

    @property
    def num_workers(self) -> int:
        """Workers of one PE."""
        return int(self.header["num_workers"])

    @property
    def num_domains(self) -> int:
        """Domains (XCDs) that the workers of one PE are spread over: no more than there are workers."""
        return min(int(self.header["num_domains"]), self.num_workers)

    @property
    def domain_word(self) -> str:
        """What a domain is called: an XCD of an AMD GPU; elsewhere a group of workers that share a counter."""
        machine = str(self.header.get("machine"))
        on_host = machine == "host" or self.header.get("machine_parameters", {}).get("num_cores", 0) > 0
        return "group" if on_host or machine.startswith(("sm_", "h100", "h200", "b200")) else "XCD"

    @property
    def simulated(self) -> bool:
        return self.header["executor"] in SIMULATORS

    @property
    def makespan_ps(self) -> int:
        """From the launch to the end of the last task on any PE."""
        return int(self.records["end_ps"].max(initial=0))

    @property
    def makespan_us(self) -> float:
        return self.makespan_ps / 1e6

    @property
    def kind_names(self) -> NDArray[np.str_]:
        """(num_tasks,) the name of each record's kind."""
        names: NDArray[np.str_] = np.array(KINDS)[self.records["kind"]]
        return names

    @property
    def duration_ps(self) -> NDArray[np.int64]:
        """(num_tasks,) time from start to end."""
        duration: NDArray[np.int64] = self.records["end_ps"] - self.records["start_ps"]
        return duration

    @property
    def memory_bytes(self) -> NDArray[np.int64]:
        """(num_tasks,) weights that each task brings from memory, not from a cache [bytes]."""
        return memory_bytes(self.records)

    @property
    def busy_ps(self) -> NDArray[np.int64]:
        """(num_pes,) time spent on tasks, summed over the PE's workers."""
        busy = np.zeros(self.num_pes, np.int64)
        np.add.at(busy, self.records["pe"], self.duration_ps)
        return busy

    def utilisation(self) -> float:
        """Busy worker time / (workers x makespan), over all PEs; 0 for a trace without tasks."""
        if self.makespan_ps == 0:
            return 0.0
        return float(self.busy_ps.sum()) / (self.num_pes * self.num_workers * self.makespan_ps)

    @cached_property
    def by_worker(self) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Each worker's tasks in a row.

        Returns: (num_tasks,) indices into records by (pe, worker, start, end); (num_tasks,) whether the task
        at that place follows one of the same worker.
        """
        records = self.records
        order = np.lexsort((records["end_ps"], records["start_ps"], records["worker"], records["pe"]))
        pe, worker = records["pe"][order], records["worker"][order]
        follows = np.zeros(len(records), bool)
        follows[1:] = (pe[1:] == pe[:-1]) & (worker[1:] == worker[:-1])
        return order, follows

    @cached_property
    def idle_since_ps(self) -> NDArray[np.int64]:
        """(num_tasks,) since when the task's worker held it and had nothing else to run.

        The time from here to start_ps is waiting. It can be less than start_ps - ticket_ps: a worker that
        looks ahead holds a task while it runs another.
        """
        order, follows = self.by_worker
        rows = self.records[order]
        previous_end = np.zeros(len(rows), np.int64)
        previous_end[1:] = np.where(follows[1:], rows["end_ps"][:-1], 0)
        since = np.empty(len(rows), np.int64)
        since[order] = np.minimum(rows["start_ps"], np.maximum(rows["ticket_ps"], previous_end))
        return since

    def worker_domains(self) -> NDArray[np.int64]:
        """(num_pes, num_workers) as recorded; worker % num_domains for a worker without tasks."""
        domains = np.tile(np.arange(self.num_workers) % self.num_domains, (self.num_pes, 1))
        domains[self.records["pe"], self.records["worker"]] = self.records["domain"]
        return domains

    def spread(self, amounts: NDArray[Any], edges_ps: NDArray[Any]) -> NDArray[np.float64]:
        """Spread an amount per task evenly over its start..end, and sum it in intervals of time.

        amounts: (num_tasks,), such as hbm_bytes or duration_ps.
        edges_ps: (n + 1,) increasing.
        Returns: (num_pes, n), in the unit of amounts; what lies outside the edges is not counted.
        """
        start_ps = self.records["start_ps"]
        end_ps = np.maximum(self.records["end_ps"], start_ps + 1)  # a task without duration still has its bytes
        slope = amounts / (end_ps - start_ps)
        sums = np.zeros((self.num_pes, len(edges_ps) - 1))
        for pe in range(self.num_pes):
            mine = self.records["pe"] == pe
            # the amount up to a time is piecewise linear: its slope changes where a task starts or ends
            time_ps = np.concatenate((start_ps[mine], end_ps[mine]))
            order = np.argsort(time_ps, kind="stable")
            time_ps = time_ps[order]
            rate = np.cumsum(np.concatenate((slope[mine], -slope[mine]))[order])
            total = np.concatenate(([0.0], np.cumsum(rate[:-1] * np.diff(time_ps))))
            if mine.any():
                sums[pe] = np.diff(np.interp(edges_ps, time_ps, total))
        return sums

    def describe(self) -> str:
        """One line for a title: simulated or measured, machine, model, policy, tokens, EP size, seed."""
        header = self.header
        model = header.get("model")
        model_name = model.get("name", "unknown") if isinstance(model, dict) else model
        how = "simulated" if self.simulated else "measured"
        parts = [
            f"{how} ({header['executor']})",
            str(header.get("machine", "unknown machine")),
            str(model_name or "unknown model"),
            f"policy {header.get('policy', 'unknown')}",
            *_tokens_in_words(header.get("num_tokens")),
            f"EP {self.num_pes}",
            f"seed {header.get('seed', 'unknown')}",
        ]
        return ", ".join(parts)

    def save(self, path: str | Path) -> None:
        """Write records, critical_path and header to one .npz, at exactly this path."""
        with open(path, "wb") as file:  # a name without .npz would otherwise be changed by numpy
            np.savez_compressed(
                file,
                records=self.records,
                critical_path=self.critical_path,
                header=np.array(json.dumps(self.header)),
            )

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what save() wrote.

        Raises: ValueError naming the path: no such file, not a trace, or a trace of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file (a trace written by Trace.save was expected)")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: not a flashmoe trace (an .npz written by Trace.save was expected)")
        try:
            with np.load(path, allow_pickle=False) as members:
                missing = [name for name in MEMBERS if name not in members]
                if missing:
                    raise ValueError(f"it lacks {', '.join(missing)} of {', '.join(MEMBERS)}")
                records, critical_path = members["records"], members["critical_path"]
                header = json.loads(str(members["header"]))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a flashmoe trace ({error})") from error
        if not isinstance(header, dict) or "format" not in header:
            raise ValueError(f"{path}: not a flashmoe trace (its header names no format)")
        try:
            return cls(records, header, critical_path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_pandas(self) -> pandas.DataFrame:
        """The records as a data frame, kinds by name, the header in .attrs["header"].

        Raises: ImportError saying what to install when pandas is not there.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas, which is optional: pip install pandas") from error
        frame = pandas.DataFrame({name: self.records[name] for name in TRACE_DTYPE.names or ()})
        frame["kind"] = pandas.Categorical.from_codes(self.records["kind"].astype(np.int8), list(KINDS))
        frame.attrs["header"] = self.header
        return frame


def stamp() -> dict[str, Any]:
    """What every header says about its making: version and date."""
    return {"version": metadata.version("flashmoe"), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _as_json(header: dict[str, Any]) -> dict[str, Any]:
    """The header as JSON gives it back, with its format: so a trace equals what will be loaded."""
    if header.get("format", TRACE_FORMAT) != TRACE_FORMAT:
        raise ValueError(f"trace format {header['format']!r} (this flashmoe reads and writes format {TRACE_FORMAT})")
    result: dict[str, Any] = {"format": TRACE_FORMAT}
    for key, value in header.items():
        try:
            result[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"trace header has {key}={value!r} (not JSON: {error})") from error
    return result


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _tokens_in_words(num_tokens: Any) -> list[str]:
    """["8 tokens per PE"], ["0 to 8 tokens per PE"], or nothing when the header does not say."""
    if isinstance(num_tokens, int):
        num_tokens = [num_tokens]
    if not num_tokens:
        return []
    low, high = min(num_tokens), max(num_tokens)
    noun = "token" if high == 1 else "tokens"
    return [f"{high} {noun} per PE" if low == high else f"{low} to {high} {noun} per PE"]
