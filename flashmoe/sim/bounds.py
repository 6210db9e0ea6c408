"""Times that no schedule can beat on a machine, task by task. `hip_src/engine/bounds.hpp` does the same by classes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flashmoe.sim.costs import FINISHED_KINDS, PLANNED_KINDS, task_costs
from flashmoe.sim.parameters import Parameters
from flashmoe.tasks import TaskTable, segment_owner

SAFETY = 1.0 - 1e-9  # rounding of shared bandwidth to float64 may end a stream this much early


def lower_bounds(tables: Sequence[TaskTable], parameters: Parameters, gap_ps: int | None = None) -> dict[str, int]:
    """Lower bounds of the makespan by name [ps], each valid for every queue, order and look-ahead.

    hbm: distinct weight bytes of the busiest PE over its bandwidth (on a host: of all PEs, they share a memory).
    workers: work of the busiest PE over its workers (on a host: of all PEs over the cores).
    longest_task: the longest pick alone on the machine.
    critical_path: the longest chain of dependences with unlimited workers.
    links: the busiest direction of a link or of a port.
    Jitter is left out: with luck a run may beat a bound by a little.
    tables: one a layer. gap_ps: dense compute between layers, as in `run_simpy`.
    """
    layers = [_Layer(table, parameters) for table in tables]
    machine, num_workers = parameters.machine, parameters.num_workers
    is_host = machine.num_cores > 0
    idle_ps = _idle_ps(layers, parameters, gap_ps)
    hbm_ps = np.sum([layer.hbm_ps() for layer in layers], axis=0)
    stages_ps = np.sum([layer.stages_ps() for layer in layers], axis=0)  # (stages, num_pes)
    workers_ps = (stages_ps / num_workers + idle_ps).max()
    launch_ps = int(parameters.start_ps.min())
    # between its launches a PE of a host leaves memory and cores to the others
    least_idle_ps = idle_ps.min() if len(idle_ps) == 1 else min(idle_ps.min(), launch_ps)
    if is_host:
        workers_ps = max(workers_ps, max(stage.sum() for stage in stages_ps) / machine.num_cores + least_idle_ps)
    links_ps = _links_ps(layers, parameters)
    bounds_ps = {
        "hbm": hbm_ps.sum() + least_idle_ps if is_host else (hbm_ps + idle_ps).max(),
        "workers": workers_ps,
        "longest_task": max((layer.longest_pick_ps() + launch_ps for layer in layers if len(layer.table)), default=0),
        "critical_path": _critical_path_ps(layers, parameters, gap_ps),
        "links": links_ps + launch_ps if links_ps > 0 else 0,  # a link may go on while its PE is idle
    }
    return {name: int(bound * SAFETY) for name, bound in bounds_ps.items()}


def busiest_link_ps(tables: Sequence[TaskTable], parameters: Parameters) -> float:
    """Least time that the busiest direction of a link or of a port is busy [ps]."""
    return _links_ps([_Layer(table, parameters) for table in tables], parameters)


def _idle_ps(layers: Sequence[_Layer], parameters: Parameters, gap_ps: int | None) -> NDArray[np.float64]:
    """(num_pes,) while nothing happens on a PE: before its first worker starts, and between launches up to its last."""
    launch_ps = int(parameters.start_ps.min())
    idle_ps = np.zeros(parameters.num_pes)
    for number, layer in enumerate(layers):
        launches_ps = launch_ps if gap_ps is None else launch_ps + number * (launch_ps + gap_ps)
        idle_ps[np.unique(layer.table.tasks["pe"])] = launches_ps
    return idle_ps


def distinct_weight_bytes(table: TaskTable) -> NDArray[np.float64]:
    """(num_pes,) float64, weights that each PE reads at least once, however often tasks stream them [bytes].

    Tasks of one kind, expert and tile read the same weights.
    """
    tasks = table.tasks
    _, index, tile = np.unique(tasks[["pe", "kind", "expert", "tile"]], return_index=True, return_inverse=True)
    largest = np.zeros(len(index))
    np.maximum.at(largest, tile.reshape(-1), tasks["weight_bytes"].astype(np.float64))
    return np.bincount(tasks["pe"][index], weights=largest, minlength=table.num_pes).astype(np.float64)


class _Layer:
    """What one layer adds to each bound."""

    def __init__(self, table: TaskTable, parameters: Parameters) -> None:
        average = replace(parameters, machine=replace(parameters.machine, jitter=0.0), stall_threshold=0)
        self.table, self.parameters = table, parameters
        self.costs = task_costs(table, average)
        # what ends beside the worker's next task
        self.is_beside = np.isin(table.tasks["kind"], FINISHED_KINDS) & parameters.machine.finish_beside

    def hbm_ps(self) -> NDArray[np.float64]:
        """(num_pes,)"""
        rate = self.parameters.machine.hbm_bytes_per_ns * self.parameters.speeds
        return distinct_weight_bytes(self.table) / rate * 1000.0

    def stages_ps(self) -> list[NDArray[np.float64]]:
        """(num_pes,) each: sums of what workers do one task after the other."""
        pe = self.table.tasks["pe"]
        return [
            np.bincount(pe, weights=work, minlength=self.table.num_pes).astype(np.float64) for work in self._stages()
        ]

    def _stages(self) -> list[NDArray[np.int64]]:
        """What a worker does one task after the other: with prefetch it streams for one while it runs another."""
        costs = self.costs
        after_ps = np.where(self.is_beside, 0, costs.after_ps)
        beside_ps = costs.after_ps - after_ps
        if costs.early:
            return [costs.stream_ps, costs.compute_ps + after_ps, beside_ps]
        return [np.maximum(costs.stream_ps, costs.compute_ps) + after_ps, beside_ps]

    def longest_pick_ps(self) -> float:
        tasks, costs = self.table.tasks, self.costs
        if len(tasks) == 0:
            return 0.0
        heads = np.flatnonzero(tasks["chain"])
        stages = [*self._stages(), np.where(tasks["chain"] > 0, costs.least_ps, 0)]
        return float(max(np.add.reduceat(stage, heads).max() for stage in stages))

    def is_output(self) -> NDArray[np.bool_]:
        """(num_tasks,) whether a task signals nothing: it writes what the layer leaves."""
        signals: NDArray[np.bool_] = np.diff(self.table.signal_ptr.astype(np.int64)) == 0
        return signals

    def traffic(self) -> NDArray[np.float64]:
        """(num_pes, num_pes) bytes from each PE to each other one."""
        table = self.table
        source = table.tasks["pe"][segment_owner(table.signal_ptr)].astype(np.int64)
        destination = table.event_pe[table.signal_event].astype(np.int64)
        traffic = np.zeros((table.num_pes, table.num_pes))
        np.add.at(traffic, (source, destination), table.signal_bytes)
        np.fill_diagonal(traffic, 0.0)
        return traffic


def _links_ps(layers: Sequence[_Layer], parameters: Parameters) -> float:
    machine = parameters.machine
    traffic = np.sum([layer.traffic() for layer in layers], axis=0)
    busiest_ns = traffic.max(initial=0.0) / machine.link_bytes_per_ns
    if machine.port_bytes_per_ns > 0:
        at_ports = max(traffic.sum(axis=0).max(initial=0.0), traffic.sum(axis=1).max(initial=0.0))
        busiest_ns = max(busiest_ns, at_ports / machine.port_bytes_per_ns)
    return float(busiest_ns * 1000.0)


def _critical_path_ps(layers: Sequence[_Layer], parameters: Parameters, gap_ps: int | None) -> float:
    """Earliest end of the last task, layer after layer."""
    launch_ps = float(parameters.start_ps.min())
    entry_ps = np.full(parameters.num_pes, launch_ps)
    last_ps = 0.0
    for number, layer in enumerate(layers):
        if number > 0 and gap_ps is not None:
            entry_ps = entry_ps + gap_ps + launch_ps
        end_ps = _earliest_ends(layer, parameters, entry_ps.tolist(), launch_ps)
        last_ps = max(last_ps, float(end_ps.max(initial=0.0)))
        pe = layer.table.tasks["pe"]
        is_next_input = np.ones(len(end_ps), bool) if gap_ps is not None else layer.is_output()
        np.maximum.at(entry_ps, pe[is_next_input], end_ps[is_next_input])
    return last_ps


def _earliest_ends(
    layer: _Layer, parameters: Parameters, entry_ps: list[float], launch_ps: float
) -> NDArray[np.float64]:
    """(num_tasks,) with unlimited workers. Signals inside a PE cost nothing: one worker may run both ends."""
    table, costs, machine = layer.table, layer.costs, parameters.machine
    tasks = table.tasks
    pe, kind = tasks["pe"].tolist(), tasks["kind"].tolist()
    inside_chain = (tasks["chain"] == 0).tolist()
    stream_ps, compute_ps, after_ps = (
        costs.stream_ps.tolist(),
        costs.compute_ps.tolist(),
        costs.after_ps.tolist(),
    )
    wait_ptr, wait_event = table.wait_ptr.tolist(), table.wait_event.tolist()
    signal_ptr, signal_event = table.signal_ptr.tolist(), table.signal_event.tolist()
    slowest = machine.link_bytes_per_ns
    if machine.port_bytes_per_ns > 0:
        slowest = min(slowest, machine.port_bytes_per_ns)
    remote = tasks["pe"][segment_owner(table.signal_ptr)] != table.event_pe[table.signal_event]
    trip_ps = np.where(remote, machine.put_ps + table.signal_bytes / slowest * 1000.0, 0.0).tolist()
    wanted: list[int] = table.event_target.tolist()
    planned = table.planned_event.tolist()
    event_ps = [0.0] * len(wanted)  # earliest time at which an event is complete
    waiters: list[list[int]] = [[] for _ in wanted]
    missing = [0] * len(tasks)  # inputs, the plan and the task before in the chain, each until it is known
    for row in range(len(tasks)):
        needs = [event for event in wait_event[wait_ptr[row] : wait_ptr[row + 1]] if wanted[event] > 0]
        if kind[row] in PLANNED_KINDS and wanted[planned[pe[row]]] > 0:
            needs.append(planned[pe[row]])
        missing[row] = len(needs) + inside_chain[row]
        for event in needs:
            waiters[event].append(row)
    end_ps = [0.0] * len(tasks)
    free_ps = [0.0] * len(tasks)  # when the chain can go on
    is_beside = layer.is_beside.tolist()
    weights_ps = [0.0] * len(tasks)  # earliest time at which a task's weights are there
    known = deque(row for row, count in enumerate(missing) if count == 0)
    while known:
        row = known.popleft()
        is_planned = kind[row] in PLANNED_KINDS
        start_ps = free_ps[row - 1] if inside_chain[row] else (0.0 if is_planned else entry_ps[pe[row]])
        for event in wait_event[wait_ptr[row] : wait_ptr[row + 1]]:
            start_ps = max(start_ps, event_ps[event])
        weights_from_ps = start_ps
        if costs.early:
            # the next task of a chain streams as soon as the one before has its weights
            weights_from_ps = event_ps[planned[pe[row]]] if is_planned else launch_ps
            if inside_chain[row]:
                weights_from_ps = max(weights_from_ps, weights_ps[row - 1])
        weights_ps[row] = weights_from_ps + stream_ps[row]
        done_ps = max(start_ps + compute_ps[row], weights_ps[row])
        end_ps[row] = done_ps + after_ps[row]
        free_ps[row] = done_ps if is_beside[row] else end_ps[row]
        if row + 1 < len(tasks) and inside_chain[row + 1]:
            missing[row + 1] -= 1
            if missing[row + 1] == 0:
                known.append(row + 1)
        for i in range(signal_ptr[row], signal_ptr[row + 1]):
            event = signal_event[i]
            event_ps[event] = max(event_ps[event], end_ps[row] + trip_ps[i])
            wanted[event] -= 1
            if wanted[event] == 0:
                for waiter in waiters[event]:
                    missing[waiter] -= 1
                    if missing[waiter] == 0:
                        known.append(waiter)
    return np.array(end_ps)
