"""Records of a simulated layer: what its tasks are, from the table, and when they ran, from an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.sim.costs import remote_bytes
from flashmoe.tasks import TaskTable
from flashmoe.trace import TRACE_DTYPE

RUN_COLUMNS = ("worker", "flags", "ready_ps", "asked_ps", "ticket_ps", "start_ps", "loaded_ps", "done_ps", "end_ps")


def make_records(table: TaskTable, layer: int, run: Mapping[str, NDArray[Any]], num_domains: int) -> NDArray[np.void]:
    """(num_tasks,) TRACE_DTYPE in the table's order. run: (num_tasks,) each of RUN_COLUMNS."""
    tasks = table.tasks
    records = np.zeros(len(tasks), dtype=TRACE_DTYPE)
    records["layer"] = layer
    for name in ("pe", "task_id", "kind", "expert", "tile", "num_tokens", "peer"):
        records[name] = tasks[name]
    for name in RUN_COLUMNS:
        records[name] = run[name]
    records["domain"] = records["worker"] % num_domains
    records["hbm_bytes"] = tasks["weight_bytes"]
    records["link_bytes"] = remote_bytes(table).astype(np.uint64)
    return records
