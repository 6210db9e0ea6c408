"""A layer that was launched again and again with the same tokens: one trace in full, of the others the makespans.

A file of it takes some bytes a task: what the task graph knows is not written.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.hw.launches import RECORD_DTYPE, launch_trace
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, resolve
from flashmoe.recorded import equal_weights
from flashmoe.routing import Routing
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import Trace

_FORMAT = 1
_TIMES = ("start_ns", "duration_ns", "ticket_delta")


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """trace: of one launch, of one PE. routing: what it used. makespan_us: (repeats,) of every launch, it included."""

    trace: Trace
    routing: Routing
    makespan_us: NDArray[np.float64]

    @classmethod
    def of(cls, traces: list[Trace], routing: Routing) -> MeasuredLayer:
        """Of several launches, in full the one with the middle makespan."""
        makespans = np.array([trace.makespan_us for trace in traces])
        middle = int(np.argsort(makespans, kind="stable")[len(traces) // 2])
        return cls(traces[middle], routing, makespans)

    @property
    def policy(self) -> Policy:
        header = self.trace.header
        return resolve(header["policy"], Tiling(**header["tiling"]))

    @property
    def table(self) -> TaskTable:
        header = self.trace.header
        return TaskTable(_model(header), self.routing, Tiling(**header["tiling"]), gate=header["gate_inside"])

    def save(self, path: str | Path) -> None:
        """Write to one .npz, without the tokens' weights, which no time depends on."""
        raw = raw_records(self.trace)
        tick_ns = int(np.gcd.reduce(np.concatenate([raw[name].astype(np.int64) for name in _TIMES]), initial=0)) or 1
        columns: dict[str, Any] = {name: _small(raw[name] // tick_ns) for name in _TIMES}
        columns |= {name: _small(raw[name]) for name in ("worker", "flags")}
        about = {"format": _FORMAT, "tick_ns": tick_ns, "routing": self.routing.name, "header": self.trace.header}
        about["makespan_us"] = [round(float(value), 3) for value in self.makespan_us]
        topk_idx = self.routing.topk_idx[0].astype(np.int16)
        with open(path, "wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), topk_idx=topk_idx, **columns)

    @classmethod
    def load(cls, path: str | Path) -> MeasuredLayer:
        """Read what save() wrote. Raises: ValueError naming the path: no such file, or another kind of file."""
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as members:
                about = json.loads(str(members["about"]))
                columns = {name: members[name] for name in (*_TIMES, "worker", "flags")}
                topk_idx = members["topk_idx"].astype(np.int32)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a measured layer ({error})") from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path}: format {about.get('format')!r} (this flashmoe reads {_FORMAT})")
        header = about["header"]
        model = _model(header)
        routing = Routing((topk_idx,), (equal_weights(topk_idx),), model.num_experts, name=about["routing"])
        table = TaskTable(model, routing, Tiling(**header["tiling"]), gate=header["gate_inside"])
        raw = np.zeros(len(table), RECORD_DTYPE)
        raw["task_id"] = table.tasks["task_id"]
        for name in _TIMES:
            raw[name] = columns[name].astype(np.int64) * about["tick_ns"]
        raw["worker"], raw["flags"] = columns["worker"], columns["flags"]
        raw["domain"] = raw["worker"] % header["num_domains"]
        kept = {key: value for key, value in header.items() if key not in table.header()}
        buffers = [raw[raw["worker"] == worker] for worker in range(header["num_workers"])]
        return cls(launch_trace(table, buffers, kept), routing, np.array(about["makespan_us"]))


def raw_records(trace: Trace) -> NDArray[Any]:
    """(num_tasks,) RECORD_DTYPE by task: what the workers had written. Raises: ValueError unless of one PE."""
    if trace.num_pes != 1:
        raise ValueError(f"trace of {trace.num_pes} PEs (accepted: 1)")
    records = np.sort(trace.records, order="task_id")
    start_ns = records["start_ps"] // 1000
    raw = np.zeros(len(records), RECORD_DTYPE)
    raw["start_ns"], raw["duration_ns"] = start_ns, records["end_ps"] // 1000 - start_ns
    raw["ticket_delta"] = start_ns - records["ticket_ps"] // 1000
    for name in ("task_id", "worker", "flags", "domain"):
        raw[name] = records[name]
    return raw


def _model(header: dict[str, Any]) -> MoEModel:
    return MoEModel(**header["model"])


def _small(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
