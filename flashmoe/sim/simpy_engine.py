"""The discrete-event engine that is meant to be read: workers, memory, signals and links on a SimPy clock.

Start at `Worker.work`: it is all that a worker does. Time is whole picoseconds from the launch.

Ties. SimPy orders events by (time, priority, sequence). Only process starts are urgent, so at one moment
things happen in the order in which they were scheduled; workers start by PE, then by number. A task's local
signals land together, in the table's order; a landing that completes an event first starts the weights that
waited for the plan, in the order of their tickets, and then wakes the workers, in the order in which they
began to wait.

A worker sees its own signals at once, and everybody else's when they land: signal_ps later within a PE
(stretched by the memory load at that moment), through the links from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from flashmoe.machine import Machine
from flashmoe.policy import Policy
from flashmoe.sim.bandwidth import CappedSharing
from flashmoe.sim.costs import PLANNED_KINDS, remote_bytes, task_costs
from flashmoe.sim.queues import Steps, make_queue
from flashmoe.sim.servers import Cores, Links
from flashmoe.tasks import OWN_PE_KINDS, TaskTable
from flashmoe.trace import KINDS, TRACE_DTYPE

Progress = Callable[[int, int], None]  # (tasks done, tasks in all)
Schedule = Sequence[Sequence[Sequence[int]]]  # [pe][worker][turn]: first tasks of picks

_PROGRESS_STEP = 500  # tasks between two calls of progress
_NAMED_WAITS = 8  # waiting workers that a deadlock message spells out


class DeadlockError(RuntimeError):
    """Nothing can happen any more, and tasks have not run. The message names who waits for what."""


class Pick:
    """A task that a worker has taken: its row, when, inputs that the worker does not see yet, its weights."""

    def __init__(self, row: int, ticket_ps: int, unseen: list[int]) -> None:
        self.row = row
        self.ticket_ps = ticket_ps
        self.unseen = unseen
        self.weights: simpy.Event | None = None  # done when they are all there; None: not asked for yet


class Worker:
    """One CU, resident from launch to end."""

    def __init__(self, pe: Pe, index: int) -> None:
        self.pe, self.layer, self.env = pe, pe.layer, pe.env
        self.index = index
        self.domain = index % pe.num_domains
        self.held: list[Pick] = []  # oldest first
        self.waits_for: int | str = "nothing"  # a slot number (push), "inputs" or "nothing"
        self._on_their_way: dict[int, int] = {}  # event -> own signals that the others don't see yet
        self._last_end_ps = 0
        self._last_weights: simpy.Event | None = None
        self._more = True  # the queue has more picks for this worker
        self._fetching: simpy.Event | None = None  # the next pick, on its way while a task runs
        self._following: Pick | None = None  # the next task of a chain, its weights streaming while a task runs
        self._core_since_ps = 0

    def work(self) -> Steps:
        """Run the oldest pick that is ready; without one take another, if allowed; else wait for an input."""
        yield from self._start()
        while True:
            pick = self._oldest_ready()
            if pick is not None:
                self.held.remove(pick)
                yield from self._run(pick)
            elif self._fetching is not None:
                yield self._fetching
            elif self._more and self._may_take():
                yield from self._take()
            elif self.held:
                yield from self.wait(self._any_input(self.held))
            else:
                break
            self.waits_for = "nothing"
        if self.layer.cores is not None:
            self.layer.cores.release()

    def wait(self, wake: simpy.Event) -> Steps:
        """Wait with nothing to do; on a host that means without a core."""
        cores = self.layer.cores
        if cores is not None:
            cores.release()
        yield wake
        if cores is not None:
            self._core_since_ps = yield cores.acquire()

    def sees(self, event: int) -> bool:
        """Whether this worker sees an event as complete: what has landed, and its own signals."""
        seen = self.layer.landed[event] + self._on_their_way.get(event, 0)
        return seen >= self.layer.target[event]

    def sleep(self, waits_for: int | str) -> simpy.Event:
        """An event to wait for, noting why in case nobody ever wakes this worker."""
        self.waits_for = waits_for
        return self.env.event()

    def start_weights(self, pick: Pick) -> None:
        """Stream a pick's weights. A CU streams for one task at a time, in the order in which it asks."""
        done, num_bytes, channel = self.env.event(), self.layer.stream_bytes[pick.row], self.pe.channel
        before = self._last_weights
        if before is None or before.triggered:
            channel.start(num_bytes, done)
        else:
            before.callbacks.append(lambda _: channel.start(num_bytes, done))
        pick.weights = self._last_weights = done

    def _start(self) -> Steps:
        layer = self.layer
        if self.index * layer.machine.launch_step_ps > 0:
            yield self.env.timeout(self.index * layer.machine.launch_step_ps)
        if layer.cores is not None:
            self._core_since_ps = yield layer.cores.acquire()
        if self.index == 0:
            yield from self.pe.queue.launch(self)

    def _take(self) -> Steps:
        row = yield from self.pe.queue.take(self)
        self._more = row is not None
        if row is not None:
            self.held.append(self._hold(row))

    def _fetch_ahead(self) -> None:
        """With the weights of a task there, its worker's stream is free: take the next pick while the task runs.

        One pick, and only if nothing else is held: a CU has room for one task's weights beside those in use.
        """

        def fetch() -> Steps:
            yield from self._take()
            self._fetching = None

        if self._more and not self.held and self.pe.queue.runs_ahead:
            self._fetching = self.env.process(fetch())

    def _oldest_ready(self) -> Pick | None:
        for pick in self.held:
            if self._is_ready(pick) and (len(self.held) == 1 or self._whole_chain_is_ready(pick)):
                return pick
        return None

    def _whole_chain_is_ready(self, pick: Pick) -> bool:
        """A chain beside others in hand must not wait inside: one of them may make what it waits for."""
        layer = self.layer
        rest = range(pick.row + 1, pick.row + layer.chain[pick.row])
        return all(self.sees(event) for row in rest for event in layer.inputs[row])

    def _may_take(self) -> bool:
        if not self.held:
            return True
        kind = self.layer.kind[self.held[0].row]
        # a down that cannot be decoded yet waits for the plan, and so for other PEs
        waits_for_own_pe = kind in OWN_PE_KINDS and (kind not in PLANNED_KINDS or self.sees(self.pe.planned))
        return waits_for_own_pe and len(self.held) < 1 + self.pe.look_ahead

    def _is_ready(self, pick: Pick) -> bool:
        if pick.unseen:
            pick.unseen = [event for event in pick.unseen if not self.sees(event)]
        return not pick.unseen

    def _any_input(self, picks: Sequence[Pick]) -> simpy.Event:
        wake = self.sleep("inputs")
        for pick in picks:
            rows = range(pick.row, pick.row + max(1, self.layer.chain[pick.row]))
            unseen = pick.unseen or [e for row in rows for e in self.layer.inputs[row] if not self.sees(e)]
            self.layer.wake_on(unseen[0], wake)
        return wake

    def _hold(self, row: int) -> Pick:
        """Take or reach a task: from now on its weights may stream, or from the plan on if it needs that."""
        layer = self.layer
        pick = Pick(row, int(self.env.now), [event for event in layer.inputs[row] if not self.sees(event)])
        unplanned = layer.kind[row] in PLANNED_KINDS and not self.sees(self.pe.planned)
        if unplanned:
            pick.unseen.insert(0, self.pe.planned)  # until then an id of a later stage is only a number
        if layer.early and layer.stream_bytes[row] > 0:
            if unplanned:
                self.pe.unplanned.append((self, pick))
            else:
                self.start_weights(pick)
        return pick

    def _run(self, pick: Pick) -> Steps:
        """Run a chain in order, never going back to the queue in between."""
        end = pick.row + self.layer.chain[pick.row]
        while True:
            following = pick.row + 1 if pick.row + 1 < end else None
            yield from self._execute(pick, following)
            if following is None:
                return
            pick = self._following or self._hold(following)
            self._following = None
            self.held.insert(0, pick)
            while not self._is_ready(pick):
                yield from self.wait(self._any_input([pick]))
            self.held.remove(pick)

    def _execute(self, pick: Pick, following: int | None) -> Steps:
        """The task itself: weights and arithmetic side by side, then the fixed part and the remote stores.

        following: the row of the next task of the chain, if there is one.
        """
        layer, env, row = self.layer, self.env, pick.row
        start_ps = int(env.now)
        ready_ps = 0
        for event in layer.inputs[row]:
            ready_ps = max(ready_ps, self._seen_ps(event))
        if layer.stream_bytes[row] > 0:
            if pick.weights is None:
                self.start_weights(pick)
            assert pick.weights is not None
            yield pick.weights
        if layer.early and following is not None:
            self._following = self._hold(following)
        elif layer.early:
            self._fetch_ahead()
        end_ps = max(int(env.now), start_ps + layer.compute_ps[row]) + layer.after_ps[row]
        if end_ps > env.now:
            yield env.timeout(end_ps - env.now)
        self._last_end_ps = end_ps
        layer.record(row, self, ready_ps, pick.ticket_ps, start_ps, end_ps)
        yield from self.pe.queue.completed(self, self._signal(row))
        if layer.machine.gap_ps > 0:
            yield env.timeout(layer.machine.gap_ps)
        if layer.cores is not None and layer.cores.is_over(self._core_since_ps):
            layer.cores.release()
            self._core_since_ps = yield layer.cores.acquire()

    def _seen_ps(self, event: int) -> int:
        if self.layer.has_landed(event):
            return self.layer.landed_ps[event]
        return max(self.layer.landed_ps[event], self._last_end_ps)  # complete by own signals, the last at that time

    def _signal(self, row: int) -> list[int]:
        """Send a finished task's signals; returns the events of this PE."""
        layer, local = self.layer, []
        for event, num_bytes in layer.signals[row]:
            if layer.event_pe[event] == self.pe.index:
                local.append(event)
                self._on_their_way[event] = self._on_their_way.get(event, 0) + 1
            else:
                layer.put(self.pe.index, event, num_bytes)
        if local:
            self.env.timeout(self.pe.signal_ps(), local).callbacks.append(self._land)
        return local

    def _land(self, signals: Any) -> None:
        for event in signals.value:
            self._on_their_way[event] -= 1
            self.layer.land(event)


class Pe:
    """One GPU: its workers, its queue and its memory channel."""

    def __init__(self, layer: Layer, index: int, num_workers: int, look_ahead: int, channel: CappedSharing) -> None:
        machine = layer.machine
        self.layer, self.env, self.index, self.channel = layer, layer.env, index, channel
        self.num_workers = num_workers
        self.num_domains = min(machine.num_domains, num_workers)
        self.look_ahead = look_ahead
        self.near_ticket_ps = (machine.ticket_service_ps, machine.ticket_ps)
        far_ps = (machine.ticket_far_service_ps, machine.ticket_far_ps)
        self.shared_ticket_ps = far_ps if self.num_domains > 1 else self.near_ticket_ps
        self.planned = int(layer.table.planned_event[index])
        self.unplanned: list[tuple[Worker, Pick]] = []  # their weights start when the plan lands
        self.workers = [Worker(self, worker) for worker in range(num_workers)]

    def set_queue(self, queue: str, picks: Any, lists: Sequence[Any] | None) -> None:
        """Give this PE its queue. picks: task ids by rank; lists: task ids for each worker (replay only)."""

        def rows_of(task_ids: Any) -> list[int]:
            rows: list[int] = self.layer.table.row(self.index, np.asarray(task_ids, np.int64)).tolist()
            return rows

        rows = None if lists is None else [rows_of(task_ids) for task_ids in lists]
        self.queue = make_queue(self, queue, rows_of(picks), rows, self.layer.table.tiling.down == "rows")

    def signal_ps(self) -> int:
        """How long a signal released now takes to be seen on this PE [ps]."""
        machine = self.layer.machine
        return round(machine.signal_ps * (1.0 + (machine.signal_load_factor - 1.0) * self.channel.load))

    def plan(self) -> None:
        """The plan has landed: everybody knows which tasks there are, and their weights start."""
        for worker, pick in self.unplanned:
            if pick.weights is None:  # its worker may have seen the plan before the others
                worker.start_weights(pick)
        self.unplanned.clear()


class Layer:
    """The whole run: the task table as lists (numpy scalars are slow to loop over), its events, all PEs."""

    def __init__(
        self,
        table: TaskTable,
        machine: Machine,
        policy: Policy,
        num_workers: int,
        schedule: Schedule | None,
        progress: Progress | None,
    ) -> None:
        self.env = simpy.Environment(0)
        self.table, self.machine = table, machine
        costs = task_costs(table, machine)
        self.early = costs.early
        self.stream_bytes: list[float] = costs.stream_bytes.tolist()
        self.compute_ps: list[int] = costs.compute_ps.tolist()
        self.after_ps: list[int] = costs.after_ps.tolist()
        self.kind: list[int] = table.tasks["kind"].tolist()
        self.chain: list[int] = table.tasks["chain"].tolist()
        self.event_pe: list[int] = table.event_pe.tolist()
        self.target: list[int] = table.event_target.tolist()
        self.landed = [0] * len(self.target)
        self.landed_ps = [0] * len(self.target)  # the last signal that counted
        self._waiters: dict[int, list[simpy.Event]] = {}
        # of each row: the events that the task waits for; those it signals, with the bytes that travel along
        self.inputs: list[list[int]] = _split(table.wait_event.tolist(), table.wait_ptr)
        signals = list(zip(table.signal_event.tolist(), table.signal_bytes.tolist(), strict=True))
        self.signals: list[list[tuple[int, int]]] = _split(signals, table.signal_ptr)
        self._links = Links(self.env, machine)
        self._records: list[tuple[int, int, int, int, int, int]] = []  # row, worker, ready, ticket, start, end
        self._progress = progress
        self.pes: list[Pe] = []
        look_ahead = 0 if policy.queue == "push" else policy.look_ahead
        picks: Sequence[Any] = [()] * table.num_pes if policy.queue == "replay" else policy.picks(table)
        self.cores = Cores(self.env, machine.num_cores, machine.slice_ps) if machine.num_cores > 0 else None
        for index in range(table.num_pes):
            if index == 0 or self.cores is None:  # the cores of a host share one memory
                channel = CappedSharing(self.env, machine.hbm_bytes_per_ns, machine.cu_bytes_per_ns)
            self.pes.append(Pe(self, index, num_workers, look_ahead, channel))
            self.pes[index].set_queue(policy.queue, picks[index], None if schedule is None else schedule[index])
        self._pe_of_plan = {pe.planned: pe for pe in self.pes}

    def run(self) -> NDArray[np.void]:
        """Run every worker to its end. Returns the records, (n,) TRACE_DTYPE by row. Raises DeadlockError."""
        for pe in self.pes:
            for worker in pe.workers:
                self.env.process(worker.work())
        self.env.run()
        if len({record[0] for record in self._records}) < len(self.kind):
            raise DeadlockError(self._who_waits())
        return self._make_records()

    def kind_name(self, row: int) -> str:
        """Kind of a task, as a word."""
        return KINDS[self.kind[row]]

    def has_landed(self, event: int) -> bool:
        """Whether everybody on the event's PE sees it as complete."""
        return self.landed[event] >= self.target[event]

    def wake_on(self, event: int, wake: simpy.Event) -> None:
        """Have `wake` succeed, if nothing else did that before, when an event is complete."""
        self._waiters.setdefault(event, []).append(wake)

    def put(self, source: int, event: int, num_bytes: int) -> None:
        """Send bytes and a signal to the PE of an event."""
        self._links.send(source, self.event_pe[event], num_bytes, lambda: self.land(event))

    def land(self, event: int) -> None:
        """One signal of an event is seen by its whole PE."""
        self.landed[event] += 1
        if self.landed[event] > self.target[event]:
            return  # a task that ran twice: the event was complete before
        self.landed_ps[event] = int(self.env.now)
        if self.landed[event] < self.target[event]:
            return
        if event in self._pe_of_plan:
            self._pe_of_plan[event].plan()
        for wake in self._waiters.pop(event, ()):
            if not wake.triggered:
                wake.succeed()

    def record(self, row: int, worker: Worker, ready_ps: int, ticket_ps: int, start_ps: int, end_ps: int) -> None:
        """Note a finished task."""
        self._records.append((row, worker.index, ready_ps, ticket_ps, start_ps, end_ps))
        if self._progress and len(self._records) % _PROGRESS_STEP == 0:
            self._progress(len(self._records), len(self.kind))

    def _make_records(self) -> NDArray[np.void]:
        tasks = self.table.tasks
        records = np.zeros(len(tasks), dtype=TRACE_DTYPE)
        for name in ("pe", "task_id", "kind", "expert", "tile", "num_tokens", "peer"):
            records[name] = tasks[name]
        run = np.array(self._records, dtype=np.int64).reshape(-1, 6)
        for column, name in enumerate(("worker", "ready_ps", "ticket_ps", "start_ps", "end_ps"), start=1):
            records[name][run[:, 0]] = run[:, column]
        records["domain"] = records["worker"] % self.pes[0].num_domains
        records["hbm_bytes"] = tasks["weight_bytes"]
        records["link_bytes"] = remote_bytes(self.table).astype(np.uint64)
        return records

    def _who_waits(self) -> str:
        done = {record[0] for record in self._records}
        waits = [self._wait_of(worker) for pe in self.pes for worker in pe.workers if worker.waits_for != "nothing"]
        missing = [row for row in range(len(self.kind)) if row not in done]
        lines = [f"deadlock at {int(self.env.now)} ps: {len(missing)} of {len(self.kind)} tasks have not run"]
        lines += waits[:_NAMED_WAITS]
        if len(waits) > _NAMED_WAITS:
            lines.append(f"and {len(waits) - _NAMED_WAITS} more workers")
        if not waits:
            lines += [f"nobody took {self.table.describe(row)}" for row in missing[:_NAMED_WAITS]]
        return "\n  ".join(lines)

    def _wait_of(self, worker: Worker) -> str:
        who = f"PE {worker.pe.index} worker {worker.index}"
        if isinstance(worker.waits_for, int):
            return f"{who} waits for slot {worker.waits_for} to be filled"
        holds = []
        for pick in worker.held:
            for event in pick.unseen:
                counts = f"seen {self.landed[event]}, wanted {self.target[event]}"
                task, wanted = self.table.describe(pick.row), self.table.describe_event(event)
                holds.append(f"{task}, which waits for {wanted}: {counts}")
        return f"{who} holds {'; '.join(holds)}"


def _split(edges: list[Any], ptr: NDArray[np.integer[Any]]) -> list[list[Any]]:
    bounds = ptr.tolist()
    return [edges[begin:end] for begin, end in pairwise(bounds)]


def run_simpy(
    table: TaskTable,
    machine: Machine,
    policy: Policy,
    num_workers: int,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> NDArray[np.void]:
    """Run one layer. schedule: for queue="replay", per PE and worker the ids of the picks to run.

    Returns: the records, (num_tasks,) TRACE_DTYPE in the table's order.
    Raises: DeadlockError; ValueError for an unknown queue or a schedule for another number of workers.
    """
    return Layer(table, machine, policy, num_workers, schedule, progress).run()
