"""What serves one at a time: ticket counters and links."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import simpy

from flashmoe.machine import Machine
from flashmoe.sim.bandwidth import ceil_ps


class Counter:
    """A word that workers fetch-and-add: increments are served one at a time, in order of arrival.

    With a known service time, first come, first served needs no queue, only the time when the server is free
    next; simpy.Resource gives the same times for three events a ticket instead of one.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._value = 0
        self._free_ps = 0

    def add(self, service_ps: int, latency_ps: int, amount: int = 1) -> simpy.Event:
        """Add an amount; the event's value is what the word was before, known a latency after the service."""
        ticket = self._value
        self._value += amount
        now_ps = int(self._env.now)
        self._free_ps = max(now_ps, self._free_ps) + service_ps
        return self._env.timeout(self._free_ps + latency_ps - now_ps, ticket)


class Cores:
    """Cores of a host, shared by more workers than there are: first come, first served, a slice of time each."""

    def __init__(self, env: simpy.Environment, num_cores: int, slice_ps: int) -> None:
        self._env = env
        self._free = num_cores
        self._slice_ps = slice_ps
        self._waiting: deque[simpy.Event] = deque()

    def acquire(self) -> simpy.Event:
        """An event that succeeds, with the time as its value, when the caller has a core."""
        has_core = self._env.event()
        self._waiting.append(has_core)
        if self._free > 0:
            self._free -= 1
            self._pass_on()
        return has_core

    def release(self) -> None:
        """Give a core to whoever has waited longest."""
        if self._waiting:
            self._pass_on()
        else:
            self._free += 1

    def is_over(self, since_ps: int) -> bool:
        """Whether a worker that got its core at that time should let another one have it."""
        return bool(self._waiting) and self._env.now - since_ps >= self._slice_ps

    def _pass_on(self) -> None:
        self._waiting.popleft().succeed(int(self._env.now))


class Links:
    """The fabric between PEs. mesh: a serial server for each (source, destination) pair.
    switch: the source's egress server, then the destination's ingress server (store and forward).

    A message holds each server for bytes / link_bytes_per_ns [ps, rounded up], and lands put_ps later.
    """

    def __init__(self, env: simpy.Environment, machine: Machine) -> None:
        self._env = env
        self._put_ps = machine.put_ps
        self._bytes_per_ps = machine.link_bytes_per_ns / 1000.0
        self._mesh = machine.link_topology == "mesh"
        self._free_ps: dict[tuple[str, int, int], int] = {}

    def send(self, source: int, destination: int, num_bytes: int, land: Callable[[], None]) -> None:
        """Send a message now; `land` is called when its signal is seen at the destination."""
        service_ps = ceil_ps(num_bytes / self._bytes_per_ps)
        if self._mesh:
            self._serve(("link", source, destination), service_ps, self._put_ps, land)
            return

        def enter() -> None:
            self._serve(("ingress", destination, 0), service_ps, self._put_ps, land)

        self._serve(("egress", source, 0), service_ps, 0, enter)

    def _serve(self, server: tuple[str, int, int], service_ps: int, latency_ps: int, then: Callable[[], None]) -> None:
        now_ps = int(self._env.now)
        self._free_ps[server] = max(now_ps, self._free_ps.get(server, 0)) + service_ps
        event = self._env.timeout(self._free_ps[server] + latency_ps - now_ps)
        event.callbacks.append(lambda _: then())
