"""A worker of the SimPy engine: it takes picks, streams their weights, waits for inputs, runs tasks and tells of them.

Start at `Worker.work`. `hip_src/engine/workers.hpp` does the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import simpy

from flashmoe.sim.costs import PLANNED_KINDS
from flashmoe.sim.queues import ELSEWHERE
from flashmoe.tasks import OWN_PE_KINDS
from flashmoe.trace import FROM_CACHE

if TYPE_CHECKING:
    from flashmoe.sim.simpy_engine import Pe, Stage

Steps = Generator[simpy.Event, Any, None]


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
        if self.layer.in_order:  # and of a chain the stream must have come to the last task, which takes inputs
            return len(self.held) == 1 and not self.is_away and self.layer.chain[self.held[0].row] <= 1
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
