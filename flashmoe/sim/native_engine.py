"""The engine to search with: `hip_src/engine/`, event by event the same as the SimPy engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.policy import QUEUES, Policy  # in the order of enum class QueueKind
from flashmoe.sim.costs import first_of_same_weights, num_active_experts
from flashmoe.sim.deadlock import DeadlockError, Input, Stuck, deadlock_message
from flashmoe.sim.parameters import Parameters
from flashmoe.sim.records import make_records
from flashmoe.sim.simpy_engine import Progress, Schedule
from flashmoe.tasks import ORDERS, TaskTable
from flashmoe.trace import KINDS


def run_native(
    tables: Sequence[TaskTable],
    parameters: Parameters,
    policy: Policy,
    schedules: Sequence[Schedule | None],
    *,
    gap_ps: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.void]:
    """Run one layer after the other; arguments, result and errors are those of `run_simpy`."""
    layers = []
    for table, schedule in zip(tables, schedules, strict=True):
        layer = _native.ListedLayer(_listed(table))
        if policy.queue == "replay":
            layer.ids_by_worker = _checked_lists(schedule, parameters.num_workers)
        else:
            layer.ids_by_rank = [[int(task_id) for task_id in picks] for picks in policy.picks(table)]
        layers.append(layer)
    num_tasks = sum(len(table.tasks) for table in tables)
    result = run_layers(
        layers,
        parameters,
        policy,
        gap_ps=gap_ps,
        keep_records=True,
        progress=(lambda done: progress(done, num_tasks)) if progress else None,
    )
    if result["tasks_done"] < num_tasks:
        raise DeadlockError(_message(result, tables, num_tasks))
    return np.concatenate(
        [
            make_records(table, number, {name: run[name] for name in run.dtype.names}, parameters.num_domains)
            for number, (table, run) in enumerate(zip(tables, result["records"], strict=True))
        ]
    )


def run_layers(
    layers: Sequence[Any],
    parameters: Parameters,
    policy: Policy,
    *,
    gap_ps: int | None,
    keep_records: bool = False,
    with_bounds: bool = False,
    ranked: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """Run layers of the native module. ranked: in the policy's built-in order, else by the layers' own ids.

    Returns: num_tasks, tasks_done, makespan_ps, time_ps and so on, as `result_dict` in engine_module.cpp writes them.
    """
    if policy.queue not in QUEUES:
        raise ValueError(f"unknown queue {policy.queue!r} (queues: {', '.join(QUEUES)})")
    return _native.run_layers(
        _parameters(parameters),
        list(layers),
        queue=QUEUES.index(policy.queue),
        order=ORDERS.index(policy.order) if ranked else None,
        look_ahead=policy.look_ahead,
        sorts_experts=policy.sorts_experts(parameters.num_pes),
        gap_ps=gap_ps,
        keep_records=keep_records,
        with_bounds=with_bounds,
        progress=progress,
    )


def _parameters(parameters: Parameters) -> dict[str, Any]:
    """What `make_parameters` in engine_module.cpp reads."""
    machine = parameters.machine
    return {
        **machine.to_dict(),
        **{field.name: getattr(parameters, field.name) for field in fields(parameters)},
        "num_domains": parameters.num_domains,
        "jitters": parameters.jitters,
        "overheads": [machine.overheads(kind) for kind in KINDS],
    }


def _listed(table: TaskTable) -> dict[str, Any]:
    tasks, first = table.tasks, np.asarray(table.first)
    edges = ("event_target", "planned_event", "wait_event", "signal_event", "event_pe", "wait_ptr", "signal_ptr")
    columns = ("pe", "kind", "num_tokens", "num_rows", "chain", "weight_bytes", "io_bytes", "flops")
    # a PE without tasks has no first id; none will be asked for
    heads = np.minimum(first[:-1], max(0, len(tasks) - 1))
    first_id = np.where(first[:-1] < first[1:], tasks["task_id"][heads], 0) if len(tasks) else np.zeros(len(heads))
    return {
        **{name: np.ascontiguousarray(tasks[name]) for name in columns},
        **{name: np.asarray(getattr(table, name)) for name in edges},
        "weights": first_of_same_weights(tasks),
        "num_active": num_active_experts(tasks, len(first) - 1),
        "signal_bytes": np.asarray(table.signal_bytes),
        "first": first,
        "first_id": first_id,
        "by_rows": table.tiling.down == "rows",
    }


def _checked_lists(schedule: Schedule | None, num_workers: int) -> list[list[list[int]]]:
    if schedule is None:
        raise ValueError(f"replay on PE 0 has none lists (must be one a worker: {num_workers})")
    for pe, of_workers in enumerate(schedule):
        if len(of_workers) != num_workers:
            raise ValueError(f"replay on PE {pe} has {len(of_workers)} lists (must be one a worker: {num_workers})")
    return [[[int(task_id) for task_id in ids] for ids in of_workers] for of_workers in schedule]


def _message(result: dict[str, Any], tables: Sequence[TaskTable], num_tasks: int) -> str:
    stuck = [
        Stuck(pe, worker, layer, slot, [Input(*entry) for entry in inputs])
        for pe, worker, layer, slot, inputs in result["stuck"]
    ]
    return deadlock_message(
        tables,
        result["end_ps"],
        missing=num_tasks - result["tasks_done"],
        num_tasks=num_tasks,
        stuck=stuck,
        num_stuck=result["num_stuck"],
        not_taken=result["not_taken"],
    )
