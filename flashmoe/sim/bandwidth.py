"""Memory bandwidth shared by the workers that stream, capped processor sharing in virtual time; and its cache."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import simpy
from numpy.typing import NDArray

ROUNDING_PS = 1e-3  # float64 noise: 25.0000000004 ps is 25 ps, not 26


def ceil_ps(ps: float) -> int:
    """The first whole picosecond that is not before `ps`."""
    return math.ceil(ps - ROUNDING_PS)


class CappedSharing:
    """A memory channel: each of n streams gets the same rate, rates[n], at every moment.

    As all streams always have the same rate, one virtual clock [bytes] says how far each of them is: a stream
    that starts when the clock shows v ends when it shows v + its bytes. An arrival or a departure changes how
    fast the clock runs and nothing else, so it costs O(log n), and only the first to end is ever looked at.
    A second engine gives the same bits if it does the same float64 operations in the same order: at every
    arrival and departure `clock += rate * (now - last)`, then the rate, then
    ceil_ps((end of the first - clock) / rate). The clock restarts at 0 whenever the channel falls idle.

    Source: virtual time as in fair queueing, Demers, Keshav and Shenker 1989, SIGCOMM.
    """

    def __init__(self, env: simpy.Environment, rates: NDArray[Any], rank: int) -> None:
        """rates: (n + 1,) rate of each of n streams [bytes/ps]. rank: of channels that wake up together, the
        lowest comes first; all of them come before whatever else happens at that moment."""
        self._env = env
        self._rates: list[float] = rates.tolist()
        self._priority = rank - (1 << 20)  # SimPy's own priorities are 0 and 1, lower first
        self._clock = 0.0  # [bytes]
        self._rate = 0.0  # of the clock, which is the rate of each stream [bytes/ps]
        self._last_ps = 0  # time of the last change
        # heap: (clock at its end, sequence, what to call then)
        self._streams: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0  # streams that end together are done in the order in which they started
        self._generation = 0  # a wake-up of an older generation has been overtaken by a change of rate

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def start(self, num_bytes: float, finished: Callable[[], None]) -> None:
        """Stream num_bytes (> 0) from now on; `finished` is called when the last byte is there."""
        self._advance()
        heapq.heappush(self._streams, (self._clock + num_bytes, self._sequence, finished))
        self._sequence += 1
        self._change_rate()

    def _advance(self) -> None:
        now_ps = int(self._env.now)
        if self._streams:
            self._clock += self._rate * (now_ps - self._last_ps)
        else:
            self._clock = 0.0
        self._last_ps = now_ps

    def _change_rate(self) -> None:
        self._generation += 1
        if not self._streams:
            return
        self._rate = self._rates[len(self._streams)]
        delay_ps = max(0, ceil_ps((self._streams[0][0] - self._clock) / self._rate))
        wake_up = self._env.event()
        wake_up._ok, wake_up._value = True, self._generation
        wake_up.callbacks.append(self._finish)
        self._env.schedule(wake_up, cast(Any, self._priority), delay_ps)

    def _finish(self, wake_up: Any) -> None:
        if wake_up.value != self._generation:
            return
        self._advance()
        # rounding leaves the clock a hair before the end that this wake-up was computed for
        self._clock = max(self._clock, self._streams[0][0])
        ended = []
        while self._streams and self._streams[0][0] <= self._clock:
            ended.append(heapq.heappop(self._streams)[2])
        self._change_rate()
        for finished in ended:
            finished()


@dataclass(eq=False)
class Weights:
    """Some weights of a layer, which one task or several stream: when they were asked for, and whether they are there.

    asked_bytes: what the memory had been asked for when they were last asked for, they themselves included [bytes].
    waiting: who follows the stream that is on its way: not before which time, and what to call then.
    """

    asked_bytes: float = -math.inf
    is_on_its_way: bool = False
    waiting: list[tuple[int, Callable[[], None]]] = field(default_factory=list)


class Cache:
    """What lies before a memory channel and keeps weights for the next task that wants them.

    Who asks for weights before the memory has been asked for so many bytes of others since they were last asked for,
    gets them as fast as one CU can take them, but not before they are there; the channel has no part in it.
    """

    def __init__(self, env: simpy.Environment, channel: CappedSharing) -> None:
        self._env, self._channel = env, channel
        self._asked_bytes = 0.0  # of the memory, so far

    def stream(
        self, weights: Weights, num_bytes: float, least_ps: int, stay_bytes: float, finished: Callable[[], None]
    ) -> bool:
        """Stream weights from now on; `finished` is called when all are there. Returns whether the cache has them.

        least_ps: what a CU that has the memory to itself takes. stay_bytes: after so many of others they have left.
        """
        if self._asked_bytes - weights.asked_bytes > stay_bytes:
            self._asked_bytes += num_bytes
            weights.asked_bytes = self._asked_bytes
            if weights.is_on_its_way:  # for another, whose first bytes have left already
                self._channel.start(num_bytes, finished)
            else:
                weights.is_on_its_way = True
                self._channel.start(num_bytes, lambda: self._read(weights, finished))
            return False
        weights.asked_bytes = self._asked_bytes
        there_ps = int(self._env.now) + least_ps
        if weights.is_on_its_way:
            weights.waiting.append((there_ps, finished))
        else:
            self._at(there_ps, finished)
        return True

    def _read(self, weights: Weights, finished: Callable[[], None]) -> None:
        weights.is_on_its_way = False
        waiting, weights.waiting = weights.waiting, []
        for there_ps, call in waiting:
            self._at(max(int(self._env.now), there_ps), call)
        finished()

    def _at(self, time_ps: int, call: Callable[[], None]) -> None:
        self._env.timeout(time_ps - int(self._env.now)).callbacks.append(lambda _: call())
