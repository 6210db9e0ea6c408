"""The discrete-event engine that is meant to be read: workers, memory, signals and links on a SimPy clock.

Start at `Worker.work` (`simpy_worker.py`): it is all that a worker does. Time is whole picoseconds from the launch. The
native engine (`hip_src/engine/`) is its twin, event by event.

Ties. At one moment the memory channels come first, by PE; everything else happens in the order in which it was
scheduled, and what is scheduled without delay comes last. Workers start by PE, then by number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from flashmoe.policy import Policy
from flashmoe.sim.bandwidth import Cache, CappedSharing, Weights
from flashmoe.sim.costs import FINISHED_KINDS, FIRST_KINDS, num_active_experts, sends_words, task_costs, tokens_by_pe
from flashmoe.sim.deadlock import DeadlockError, Input, Stuck, deadlock_message
from flashmoe.sim.events import Events
from flashmoe.sim.parameters import Parameters
from flashmoe.sim.queues import make_queue
from flashmoe.sim.records import RUN_COLUMNS, make_records
from flashmoe.sim.servers import Cores, Links
from flashmoe.sim.simpy_worker import Worker
from flashmoe.tasks import TaskTable
from flashmoe.trace import KINDS

Progress = Callable[[int, int], None]  # (tasks done, tasks in all)
Schedule = Sequence[Sequence[Sequence[int]]]  # [pe][worker][turn]: first tasks of picks

_PROGRESS_STEP = 500  # tasks between two calls of progress


class Stage:
    """One PE's share of one layer."""

    def __init__(self, layer: Layer, pe: Pe, before: Stage | None) -> None:
        self.layer, self.pe, self.env, self.before = layer, pe, pe.env, before
        self.next: Stage | None = None
        self.is_launch: bool = before is None or layer.gap_ps is not None
        self.planned = int(layer.table.planned_event[pe.index])
        self.entry: int = layer.first_entry + pe.index  # event: what the layer before left is there
        machine = pe.parameters.machine
        self.near_ticket_ps: tuple[int, int] = (machine.ticket_service_ps, machine.ticket_ps)
        far_ps = (machine.ticket_far_service_ps, machine.ticket_far_ps)
        self.shared_ticket_ps: tuple[int, int] = far_ps if pe.num_domains > 1 else self.near_ticket_ps
        self.first_given: bool = machine.first_given
        self.launched: simpy.Event = pe.env.event()
        self._arrived = 0

    def arrive(self) -> None:
        """One more worker has ended the layer before; with the last one this layer can be launched."""
        self._arrived += 1
        if self._arrived == self.pe.num_workers:
            self.launched.succeed()

    def set_queue(self, queue: str, picks: Any, lists: Sequence[Any] | None) -> None:
        """picks: task ids by rank. lists: task ids for each worker (replay only)."""
        table = self.layer.table

        def rows_of(task_ids: Any) -> list[int]:
            rows: list[int] = table.row(self.pe.index, np.asarray(task_ids, np.int64)).tolist()
            return rows

        rows = None if lists is None else [rows_of(task_ids) for task_ids in lists]
        self.queue = make_queue(self, queue, rows_of(picks), rows, table.tiling.down == "rows")


class Pe:
    """One GPU: its workers, its memory channel and the cache before it."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        parameters: Parameters,
        channel: CappedSharing,
        cache: Cache,
        cores: Cores | None,
    ) -> None:
        self.env, self.index, self.parameters, self.cores = env, index, parameters, cores
        self.channel, self.cache = channel, cache
        self.num_workers, self.num_domains = parameters.num_workers, parameters.num_domains
        self.start_ps: list[int] = parameters.start_ps.tolist()
        self.bookkeeping_ps = parameters.machine.gap_ps
        self.asks_early = parameters.machine.ask_early
        self._far_ps: list[int] = parameters.far_ps.tolist()
        self._near_ps: list[int] = parameters.near_ps.tolist()
        self._release_ps: list[int] = parameters.release_ps.tolist()
        self.stages: list[Stage] = []
        self.workers = [Worker(self, worker) for worker in range(self.num_workers)]

    def far_ps(self) -> int:
        """How long a signal released now takes to another domain [ps]."""
        return self._far_ps[self.channel.num_streams]

    def near_ps(self) -> int:
        """How long a signal released now takes within a domain [ps]."""
        return self._near_ps[self.channel.num_streams]

    def release_ps(self) -> int:
        """How long a release that begins now takes [ps]."""
        return self._release_ps[self.channel.num_streams]


class Layer:
    """One layer on all PEs: its task table as lists (numpy scalars are slow to loop over) and its events."""

    def __init__(self, run: Run, number: int, table: TaskTable, policy: Policy) -> None:
        self.table, self.number, self._run = table, number, run
        self.gap_ps = run.gap_ps
        # who pushes holds one pick at a time
        self.look_ahead = 0 if policy.queue == "push" else policy.look_ahead
        self.in_order = run.parameters.machine.in_order and policy.queue != "push"
        costs = task_costs(table, run.parameters, number)
        self.early = costs.early
        self.stream_bytes: list[float] = costs.stream_bytes.tolist()
        self.stream_ps: list[int] = costs.stream_ps.tolist()
        self.stay_bytes: list[float] = costs.stay_bytes.tolist()
        first: list[int] = costs.weights.tolist()
        made = {row: Weights() for row in set(first)}
        self.weights: list[Weights] = [made[row] for row in first]
        self.compute_ps: list[int] = costs.compute_ps.tolist()
        self.after_ps: list[int] = costs.after_ps.tolist()
        self.kind: list[int] = table.tasks["kind"].tolist()
        self.chain: list[int] = table.tasks["chain"].tolist()
        # of each row: the events that the task waits for; those it signals, with the bytes that travel along
        self.inputs: list[list[int]] = _split(table.wait_event.tolist(), table.wait_ptr)
        signals = list(zip(table.signal_event.tolist(), table.signal_bytes.tolist(), strict=True))
        self.signals: list[list[tuple[int, int]]] = _split(signals, table.signal_ptr)
        machine, tasks = run.parameters.machine, table.tasks
        is_finished = np.isin(tasks["kind"], FINISHED_KINDS)
        self.ends_beside: list[bool] = (is_finished & machine.finish_beside).tolist()
        self.sends_words: list[bool] = sends_words(table, machine.word_tokens).tolist()
        has_signals = np.diff(table.signal_ptr) > 0
        self.releases: list[bool] = (is_finished & has_signals & ~np.array(self.sends_words)[tasks["pe"]]).tolist()
        self.event_pe: list[int] = table.event_pe.tolist() + list(range(table.num_pes))
        self.first_entry = len(table.event_pe)
        self.outputs = [0] * table.num_pes  # tasks that signal nothing: they write what the layer leaves
        for pe, signalled in zip(table.tasks["pe"].tolist(), self.signals, strict=True):
            self.outputs[pe] += 0 if signalled else 1
        before = run.layers[-1] if run.layers else None
        pipelined = before is not None and self.gap_ps is None
        entry_target = before.outputs if before is not None and pipelined else [0] * table.num_pes
        active: list[int | None] = [None] * table.num_pes
        if policy.sorts_experts(table.num_pes):
            active = num_active_experts(tasks, table.num_pes).tolist()
        num_tokens = int(tokens_by_pe(table).sum())
        plan_ps = [run.parameters.plan_ps(num_tokens, num_sorted) for num_sorted in active]
        use_ps = dict(zip(table.planned_event.tolist(), plan_ps, strict=True))
        self.events = Events(run.env, table.event_target.tolist() + entry_target, use_ps)
        if pipelined:
            for row, (pe, kind) in enumerate(zip(table.tasks["pe"].tolist(), self.kind, strict=True)):
                if kind in FIRST_KINDS:
                    self.inputs[row] = [self.first_entry + pe, *self.inputs[row]]
        self.records: dict[int, tuple[int, ...]] = {}

    def kind_name(self, row: int) -> str:
        """Kind of a task, as a word."""
        return KINDS[self.kind[row]]

    def put(self, source: int, event: int, num_bytes: int) -> None:
        """Send bytes and a signal to the PE of an event."""

        def landed(seen_ps: int) -> None:
            self.events.signal(event, None, seen_ps, seen_ps)

        self._run.links.send(source, self.event_pe[event], num_bytes, landed)

    def record(self, row: int, columns: tuple[int, ...]) -> None:
        """Note a finished task: RUN_COLUMNS."""
        self.records[row] = columns
        self._run.count_task()

    def make_records(self) -> NDArray[np.void]:
        """(n,) TRACE_DTYPE by row."""
        run = np.array([self.records[row] for row in range(len(self.kind))], dtype=np.int64).reshape(
            -1, len(RUN_COLUMNS)
        )
        columns = dict(zip(RUN_COLUMNS, run.T, strict=True))
        return make_records(self.table, self.number, columns, self._run.parameters.num_domains)


class Run:
    """All layers on all PEs."""

    def __init__(
        self,
        tables: Sequence[TaskTable],
        parameters: Parameters,
        policy: Policy,
        schedules: Sequence[Schedule | None],
        gap_ps: int | None,
        progress: Progress | None,
    ) -> None:
        self.env = simpy.Environment(0)
        self.parameters, self.gap_ps = parameters, gap_ps
        machine = parameters.machine
        self.links = Links(self.env, machine)
        cores = Cores(self.env, machine.num_cores, machine.slice_ps) if machine.num_cores > 0 else None
        self._progress, self._tasks_done, self._num_tasks = progress, 0, sum(len(table.tasks) for table in tables)
        self.pes: list[Pe] = []
        for index in range(parameters.num_pes):
            if index == 0 or cores is None:  # the cores of a host share one memory
                channel = CappedSharing(self.env, parameters.rates[index], index)
                cache = Cache(self.env, channel)
            self.pes.append(Pe(self.env, index, parameters, channel, cache, cores))
        self.layers: list[Layer] = []
        for number, (table, schedule) in enumerate(zip(tables, schedules, strict=True)):
            layer = Layer(self, number, table, policy)
            self.layers.append(layer)
            picks: Sequence[Any] = [()] * table.num_pes if policy.queue == "replay" else policy.picks(table)
            for pe in self.pes:
                before = pe.stages[-1] if pe.stages else None
                stage = Stage(layer, pe, before)
                stage.set_queue(policy.queue, picks[pe.index], None if schedule is None else schedule[pe.index])
                if before is not None:
                    before.next = stage
                pe.stages.append(stage)

    def run(self) -> NDArray[np.void]:
        """Run every worker to its end. Returns the records by layer and row. Raises DeadlockError."""
        for pe in self.pes:
            for worker in pe.workers:
                self.env.process(worker.work())
        self.env.run()
        if self._tasks_done < self._num_tasks or any(len(layer.records) < len(layer.kind) for layer in self.layers):
            raise self._deadlock()
        return np.concatenate([layer.make_records() for layer in self.layers])

    def count_task(self) -> None:
        """One more task has run."""
        self._tasks_done += 1
        if self._progress and self._tasks_done % _PROGRESS_STEP == 0:
            self._progress(self._tasks_done, self._num_tasks)

    def _deadlock(self) -> DeadlockError:
        stuck = [stuck_of(worker) for pe in self.pes for worker in pe.workers if worker.waits_for in ("inputs", "slot")]
        missing = [
            (layer.number, row) for layer in self.layers for row in range(len(layer.kind)) if row not in layer.records
        ]
        return DeadlockError(
            deadlock_message(
                [layer.table for layer in self.layers],
                int(self.env.now),
                missing=len(missing),
                num_tasks=self._num_tasks,
                stuck=stuck,
                num_stuck=len(stuck),
                not_taken=missing,
            )
        )


def stuck_of(worker: Worker) -> Stuck:
    """What a worker waits for."""
    events = worker.layer.events
    slot = worker.slot if worker.waits_for == "slot" else None
    inputs = [
        Input(pick.row, event, events.count[event], events.target[event])
        for pick in worker.held
        for event in pick.unseen
        if slot is None and not worker.sees(event)
    ]
    return Stuck(worker.pe.index, worker.index, worker.layer.number, slot, inputs)


def _split(edges: list[Any], ptr: NDArray[np.integer[Any]]) -> list[list[Any]]:
    bounds = ptr.tolist()
    return [edges[begin:end] for begin, end in pairwise(bounds)]


def run_simpy(
    tables: Sequence[TaskTable],
    parameters: Parameters,
    policy: Policy,
    schedules: Sequence[Schedule | None],
    *,
    gap_ps: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.void]:
    """Run one layer after the other.

    tables: one a layer. schedules: for queue="replay", a layer, per PE and worker the ids of the picks to run.
    gap_ps: dense compute between layers, each of which is then a launch of its own; None: one launch runs them all.
    Returns: the records, TRACE_DTYPE, by layer and then in its table's order.
    Raises: DeadlockError; ValueError for an unknown queue or a schedule for another number of workers.
    """
    return Run(tables, parameters, policy, schedules, gap_ps, progress).run()
