"""What tasks wait for: counters that signals add to, and who sees when that one is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import simpy

if TYPE_CHECKING:
    from flashmoe.sim.simpy_worker import Worker


@dataclass(slots=True)
class _Visibility:
    """When signals to one event are seen, by whom [ps]."""

    far_ps: int = 0  # the last of all signals so far, in other domains than its maker's
    worker: Worker | None = None  # who made the last one; None: another PE
    others_ps: int = 0  # the last signal from before this worker's turn, in other domains
    domain: int = -1  # of the last maker
    other_domains_ps: int = 0  # the last signal from before this domain's turn
    near_ps: int = 0  # complete and seen in that domain
    own_ps: int = 0  # complete and seen by that worker


class Events:
    """The events of one layer.

    A worker sees its own signals at once, those of its domain near_ps later, other domains' far_ps later, another
    PE's when they land. An event is complete for a worker when it sees all of them; what is kept is the last maker's
    signal and the last of the others, so a worker may see an event a little later than that, never earlier. Who
    waits is woken when the event lands: in the domain of the last signal's maker, then in the others; in the order
    of waiting.
    """

    def __init__(self, env: simpy.Environment, target: list[int], use_ps: dict[int, int] | None = None) -> None:
        """use_ps: by event, what every worker, its maker too, has to do with it before it counts as seen [ps]."""
        self._env = env
        self.target = target
        self._use_ps = use_ps or {}
        self.count = [0] * len(target)
        self._visibility = [_Visibility() for _ in target]
        self._waiters: dict[int, list[tuple[int, Callable[[], None]]]] = {}  # event -> (domain, what to call)

    def signal(self, event: int, worker: Worker | None, far_ps: int, near_ps: int) -> None:
        """Add one. worker: who does; None for another PE. far_ps, near_ps: when others see it [ps since launch]."""
        self.count[event] += 1
        if self.count[event] > self.target[event]:
            return  # a task that ran twice: the event was complete before
        if (later_ps := self._use_ps.get(event, 0)) > 0:
            worker, far_ps, near_ps = None, far_ps + later_ps, far_ps + later_ps
        seen = self._visibility[event]
        domain = -1 if worker is None else worker.domain
        if worker is None or worker is not seen.worker:
            seen.others_ps, seen.worker = seen.far_ps, worker
        if worker is None or domain != seen.domain:
            seen.other_domains_ps, seen.domain = seen.far_ps, domain
        seen.far_ps = max(seen.far_ps, far_ps)
        if self.count[event] == self.target[event]:
            now_ps = int(self._env.now)
            seen.near_ps = min(seen.far_ps, max(near_ps, seen.other_domains_ps))
            seen.own_ps = now_ps if seen.others_ps <= now_ps else seen.near_ps
            if seen.near_ps < seen.far_ps:
                self._land_later(event, seen.domain, seen.near_ps - now_ps)
            self._land_later(event, None, seen.far_ps - now_ps)

    def seen_ps(self, event: int, worker: Worker | None) -> int:
        """When a worker sees a complete event as such; with None, when the last of them does."""
        seen = self._visibility[event]
        if worker is None:
            return seen.far_ps
        if worker is seen.worker:
            return seen.own_ps
        return seen.near_ps if worker.domain == seen.domain else seen.far_ps

    def is_seen(self, event: int, worker: Worker | None) -> bool:
        """Whether a worker, or with None everybody, sees an event as complete."""
        return self.count[event] >= self.target[event] and self.seen_ps(event, worker) <= self._env.now

    def call_when_landed(self, event: int, call: Callable[[], None], domain: int = -1) -> None:
        """Call something when an event lands in a domain, or everywhere."""
        self._waiters.setdefault(event, []).append((domain, call))

    def _land_later(self, event: int, domain: int | None, delay_ps: int) -> None:
        def land(_: simpy.Event) -> None:
            waiting = self._waiters.pop(event, [])
            here = [call for where, call in waiting if domain is None or where == domain]
            if elsewhere := [entry for entry in waiting if domain is not None and entry[0] != domain]:
                self._waiters[event] = elsewhere
            for call in here:
                call()

        self._env.timeout(delay_ps).callbacks.append(land)
