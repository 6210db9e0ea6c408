"""The discrete-event engine that is meant to be read: workers, memory, signals and links on a SimPy clock.

Start at `Worker.work`: it is all that a worker does. Time is whole picoseconds from the launch. The native engine
(`hip_src/engine/`) is its twin, event by event.

Ties. At one moment the memory channels come first, by PE; everything else happens in the order in which it was
scheduled, and what is scheduled without delay comes last. Workers start by PE, then by number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from flashmoe.policy import Policy
from flashmoe.sim.bandwidth import Cache, CappedSharing, Weights
from flashmoe.sim.costs import FINISHED_KINDS, FIRST_KINDS, PLANNED_KINDS, num_active_experts, task_costs
from flashmoe.sim.deadlock import DeadlockError, Input, Stuck, deadlock_message
from flashmoe.sim.events import Events
from flashmoe.sim.parameters import Parameters
from flashmoe.sim.queues import ELSEWHERE, make_queue
from flashmoe.sim.records import RUN_COLUMNS, make_records
from flashmoe.sim.servers import Cores, Links
from flashmoe.tasks import OWN_PE_KINDS, TaskTable
from flashmoe.trace import FROM_CACHE, KINDS

Steps = Generator[simpy.Event, Any, None]
Progress = Callable[[int, int], None]  # (tasks done, tasks in all)
Schedule = Sequence[Sequence[Sequence[int]]]  # [pe][worker][turn]: first tasks of picks

_PROGRESS_STEP = 500  # tasks between two calls of progress


class Pick:
    """A task that a worker has taken: its row, when, inputs that the worker does not see yet, its weights."""

    def __init__(self, row: int, asked_ps: int, ticket_ps: int, unseen: list[int]) -> None:
        self.row = row
        self.asked_ps, self.ticket_ps = asked_ps, ticket_ps
        self.unseen = unseen
        self.streaming = False  # its weights have been asked for
        self.from_cache = False  # and the memory had no part in that
        self.loaded_ps: int | None = None  # all of them are there since then


class Worker:
    """One CU, resident from the first layer's launch to the last one's end."""

    def __init__(self, pe: Pe, index: int) -> None:
        self.pe, self.env = pe, pe.env
        self.index = index
        self.domain = index % pe.num_domains
        self.held: list[Pick] = []  # oldest first
        self.is_away = False  # its own domain has no more picks: it takes those of others
        self.waits_for = "nothing"  # "inputs", "slot" (of the push queue) or "nothing": for who asks after a deadlock
        self.slot = 0
        self._more = True  # the queue has more picks for this worker
        self._is_running = False
        self._asking = False  # the queue is looking up the next pick, perhaps while a task runs
        self._asked_ps = 0
        self._following: Pick | None = None  # the next task of a chain, its weights streaming while a task runs
        self._streams: deque[Pick] = deque()  # whose weights have been asked for, the first one on its way
        self._sleep: simpy.Event | None = None  # what wakes this worker
        self._sleeps_for: Pick | str = "nothing"  # a pick's weights, "pick" or "inputs"
        self._core_since_ps = 0
        # until then warps of this worker are at the ends of tasks before, and at their releases
        self._finished_ps, self._released_ps = 0, 0
        self._untold = 0  # tasks of which others still have to be told, which may be at this very moment

    def work(self) -> Steps:
        """Run the oldest pick that is ready; without one take another, if allowed; else wait for an input."""
        for stage in self.pe.stages:
            yield from self._enter(stage)
            while True:
                pick = self._oldest_ready()
                if pick is not None:
                    self.held.remove(pick)
                    yield from self._run(pick)
                elif self._asking:
                    yield from self._wait("pick", with_core=stage.queue.runs_ahead)
                elif self._more and self._may_take():
                    self._ask()
                elif self.held:
                    self._listen(self._eligible)
                    yield from self._wait("inputs")
                else:
                    break
            yield from self._leave(stage)

    # --- from layer to layer

    def _enter(self, stage: Stage) -> Steps:
        """Launched with the layer, or on from the one before."""
        self.stage, self.layer = stage, stage.layer
        self._more, self.is_away = True, False
        if stage.is_launch:
            start_ps = self.pe.start_ps[self.index]
            if stage.before is not None:
                yield stage.launched
                start_ps += self.layer.gap_ps or 0
            if start_ps > 0:
                yield self.env.timeout(start_ps)
            yield from self._get_core()
        if self.index == 0 and (launched := stage.queue.launch(self)) is not None:
            yield launched

    def _leave(self, stage: Stage) -> Steps:
        """On to the next layer, or the end. Nobody knows before the plan that there is nothing left to do."""
        while (busy_ps := max(self._finished_ps, self._released_ps)) > self.env.now or self._untold > 0:
            yield self.env.timeout(busy_ps - int(self.env.now))
        if stage.next is None:
            self._give_core()
            return
        if stage.next.is_launch:
            self._give_core()
            stage.next.arrive()
            return
        while not self.sees(stage.planned):
            self._listen_to(stage.planned)
            yield from self._wait("inputs")

    # --- waiting

    def _wait(self, what: Pick | str, *, with_core: bool = False) -> Steps:
        """Sleep until woken; on a host that means without a core, unless the wait is short."""
        if not with_core:
            self._give_core()
        self._sleep, self._sleeps_for = self.env.event(), what
        if what == "inputs":
            self.waits_for = "inputs"
        yield self._sleep
        self._sleep, self._sleeps_for, self.waits_for = None, "nothing", "nothing"
        if not with_core:
            yield from self._get_core()

    def _wake(self, what: Pick | str) -> None:
        if self._sleep is not None and self._sleeps_for is what and not self._sleep.triggered:
            self._sleep.succeed()

    def _get_core(self) -> Steps:
        if self.pe.cores is not None:
            self._core_since_ps = yield self.pe.cores.acquire()

    def _give_core(self) -> None:
        if self.pe.cores is not None:
            self.pe.cores.release()

    @property
    def is_busy(self) -> bool:
        """Whether it runs a task or holds one."""
        return self._is_running or len(self.held) > 0

    def sees(self, event: int) -> bool:
        """Whether this worker sees an event of its layer as complete."""
        return self.layer.events.is_seen(event, self)

    def _listen(self, picks: Sequence[Pick]) -> None:
        """Be woken by the first input that is missing, of each of these picks."""
        for pick in picks:
            rows = range(pick.row, pick.row + max(1, self.layer.chain[pick.row]))
            unseen = pick.unseen or [e for row in rows for e in self.layer.inputs[row] if not self.sees(e)]
            self._listen_to(unseen[0])

    def _listen_to(self, event: int) -> None:
        self.layer.events.call_when_landed(event, lambda: self._wake("inputs"), self.domain)

    # --- picks

    def _ask(self) -> None:
        self._asking, self._asked_ps = True, int(self.env.now)
        self.stage.queue.ask(self, self._got)

    def _got(self, row: int | None) -> None:
        self._asking = False
        if row is None:
            self._more = False
        elif row != ELSEWHERE:
            self.held.append(self._hold(row, self._asked_ps))
        self._wake("pick")

    def _fetch_ahead(self) -> None:
        """With the weights of a task there, its worker's stream is free: take the next pick while the task runs.

        Or have it at hand by then, if the machine asks early. One pick, and only if nothing else is held: a CU has
        room for one task's weights beside those in use.
        """
        stays = self.layer.in_order and self.is_away  # until it has nothing in hand, see ELSEWHERE
        if self._more and not stays and not self._asking and not self.held and self.stage.queue.runs_ahead:
            self._ask()

    @property
    def _eligible(self) -> list[Pick]:
        """Picks in hand that may be the next to run."""
        return self.held[:1] if self.layer.in_order else self.held

    def _oldest_ready(self) -> Pick | None:
        for pick in self._eligible:
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
        if self.layer.in_order:
            return len(self.held) == 1 and not self.is_away
        kind = self.layer.kind[self.held[0].row]
        # a down that cannot be decoded yet waits for the plan, and so for other PEs
        waits_for_own_pe = kind in OWN_PE_KINDS and (kind not in PLANNED_KINDS or self.sees(self.stage.planned))
        return waits_for_own_pe and len(self.held) < 1 + self.layer.look_ahead

    def _is_ready(self, pick: Pick) -> bool:
        if pick.unseen:
            pick.unseen = [event for event in pick.unseen if not self.sees(event)]
        return not pick.unseen

    def _hold(self, row: int, asked_ps: int) -> Pick:
        """Take or reach a task: from now on its weights may stream, or from the plan on if it needs that."""
        layer, planned = self.layer, self.stage.planned
        pick = Pick(row, asked_ps, int(self.env.now), [event for event in layer.inputs[row] if not self.sees(event)])
        unplanned = layer.kind[row] in PLANNED_KINDS and not self.sees(planned)
        if unplanned:
            pick.unseen.insert(0, planned)  # until then an id of a later stage is only a number
        if layer.early and layer.stream_bytes[row] > 0:
            if unplanned:
                layer.events.call_when_landed(planned, lambda: self._stream(pick), self.domain)
            else:
                self._stream(pick)
        return pick

    # --- weights

    def _stream(self, pick: Pick) -> None:
        """Ask for a pick's weights. A CU streams for one task at a time, in the order in which it asks."""
        if pick.streaming:
            return  # its worker may have seen the plan before the others
        pick.streaming = True
        self._streams.append(pick)
        if len(self._streams) == 1:
            self._start_stream()

    def _start_stream(self) -> None:
        pick, layer = self._streams[0], self.layer
        weights, num_bytes = layer.weights[pick.row], layer.stream_bytes[pick.row]
        least_ps, stay_bytes = layer.stream_ps[pick.row], layer.stay_bytes[pick.row]
        pick.from_cache = self.pe.cache.stream(weights, num_bytes, least_ps, stay_bytes, self._loaded)

    def _loaded(self) -> None:
        pick = self._streams.popleft()
        pick.loaded_ps = int(self.env.now)
        if self._streams:
            self._start_stream()
        self._wake(pick)

    # --- tasks

    def _run(self, pick: Pick) -> Steps:
        """Run a chain in order, never going back to the queue in between."""
        end = pick.row + self.layer.chain[pick.row]
        self._is_running = True
        while True:
            following = pick.row + 1 if pick.row + 1 < end else None
            yield from self._execute(pick, following)
            if following is None:
                self._is_running = False
                return
            pick = self._following or self._hold(following, int(self.env.now))
            self._following = None
            self.held.insert(0, pick)
            while not self._is_ready(pick):
                self._listen([pick])
                yield from self._wait("inputs")
            self.held.remove(pick)

    def _execute(self, pick: Pick, following: int | None) -> Steps:
        """The task itself: weights and arithmetic side by side, then the fixed part and the remote stores.

        following: the row of the next task of the chain, if there is one.
        """
        layer, env, row = self.layer, self.env, pick.row
        start_ps = int(env.now)
        ready_ps = max((layer.events.seen_ps(event, self) for event in layer.inputs[row]), default=0)
        if layer.early and self.pe.asks_early and following is None:
            self._fetch_ahead()
        if layer.stream_bytes[row] > 0 and pick.loaded_ps is None:
            self._stream(pick)
            yield from self._wait(pick, with_core=True)
        if layer.early and following is not None:
            self._following = self._hold(following, int(env.now))
        elif layer.early:
            self._fetch_ahead()
        loaded_ps = start_ps if pick.loaded_ps is None else pick.loaded_ps
        done_ps = max(int(env.now), start_ps + layer.compute_ps[row])
        if layer.ends_beside[row] and self.stage.queue.runs_ahead:
            if done_ps > env.now:
                yield env.timeout(done_ps - int(env.now))
            end_ps = max(done_ps, self._finished_ps) + self._after_ps(row)
            self._finished_ps = end_ps
        else:
            end_ps = done_ps + self._after_ps(row)
            if end_ps > env.now:
                yield env.timeout(end_ps - int(env.now))
        flags = FROM_CACHE if pick.from_cache else 0
        times_ps = (ready_ps, pick.asked_ps, pick.ticket_ps, start_ps, loaded_ps, done_ps, end_ps)
        layer.record(row, (self.index, flags, *times_ps))
        if end_ps > env.now:
            self._later(end_ps, self._tell, row)
        elif self.stage.queue.runs_ahead:
            self._tell(row)
        elif (appended := self.stage.queue.completed(self, self._signal(row))) is not None:
            yield appended
        if self.pe.bookkeeping_ps > 0:
            yield env.timeout(self.pe.bookkeeping_ps)
        if self.pe.cores is not None and self.pe.cores.is_over(self._core_since_ps):
            self._give_core()
            yield from self._get_core()

    def _after_ps(self, row: int) -> int:
        """What follows a task's weights and arithmetic, if it begins now [ps]."""
        # who pushes has to wait for its release: it appends what the signals have made ready
        releases = self.layer.releases[row] and not self.stage.queue.runs_ahead
        return self.layer.after_ps[row] + (self.pe.release_ps() if releases else 0)

    def _tell(self, row: int) -> None:
        """Signal the end of a task, where need be after a release: a worker makes one at a time, beside its tasks."""
        if self.layer.releases[row]:
            self._released_ps = max(int(self.env.now), self._released_ps) + self.pe.release_ps()
            if self._released_ps > self.env.now:
                self._later(self._released_ps, self._signal, row)
                return
        self._signal(row)

    def _later(self, time_ps: int, call: Callable[[int], Any], row: int) -> None:
        def now(_: simpy.Event) -> None:
            self._untold -= 1
            call(row)

        self._untold += 1
        self.env.timeout(time_ps - int(self.env.now)).callbacks.append(now)

    def _signal(self, row: int) -> list[int]:
        """Send a finished task's signals; returns the events of this PE."""
        layer, now_ps = self.layer, int(self.env.now)
        far_ps, near_ps = now_ps + self.pe.far_ps(), now_ps + self.pe.near_ps()
        local = []
        for event, num_bytes in layer.signals[row]:
            if layer.event_pe[event] == self.pe.index:
                local.append(event)
                # with words every worker routes for itself, and has the routing as this one has it
                is_own = event == self.stage.planned and layer.sends_words[self.pe.index]
                layer.events.signal(event, self, now_ps if is_own else far_ps, now_ps if is_own else near_ps)
            else:
                layer.put(self.pe.index, event, num_bytes)
        if not layer.signals[row] and self.stage.next is not None and not self.stage.next.is_launch:
            # the output is part of the next layer's input
            self.stage.next.layer.events.signal(self.stage.next.entry, self, far_ps, near_ps)
        return local


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
        is_route = tasks["kind"] == KINDS.index("route")
        num_tokens = np.bincount(tasks["pe"][is_route], tasks["num_tokens"][is_route], table.num_pes)
        self.sends_words: list[bool] = ((machine.word_tokens > 0) & (num_tokens <= machine.word_tokens)).tolist()
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
        plan_ps = [run.parameters.plan_ps(int(num_tokens.sum()), num_sorted) for num_sorted in active]
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
