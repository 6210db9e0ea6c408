"""What serves one at a time: ticket counters, cores of a host, links."""

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
        self.value = 0
        self._free_ps = 0

    def add(self, service_ps: int, latency_ps: int, amount: int = 1) -> simpy.Event:
        """Add an amount; the event's value is what the word was before, known a latency after the service."""
        ticket = self.value
        self.value += amount
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
    """The fabric between PEs: three servers in a row, first come, first served, cut-through.

    A message passes its source's port (what all its links share), the link to its destination, and the
    destination's port. Each is busy for bytes over bandwidth [ps, rounded up] plus link_message_ps.
    The head of a message goes on at once, so an idle fabric takes as long as the slowest of the three; the
    signal is seen put_ps after the tail is through. A mesh has no limit at its ports (port_bytes_per_ns = 0),
    an ideal switch none on its links.
    """

    def __init__(self, env: simpy.Environment, machine: Machine) -> None:
        self._env = env
        self._put_ps, self._message_ps = machine.put_ps, machine.link_message_ps
        self._link_bytes_per_ps = machine.link_bytes_per_ns / 1000.0
        self._port_bytes_per_ps = machine.port_bytes_per_ns / 1000.0
        self._egress_free_ps: dict[int, int] = {}
        self._link_free_ps: dict[tuple[int, int], int] = {}
        self._ingress_free_ps: dict[int, int] = {}

    def send(self, source: int, destination: int, num_bytes: int, landed: Callable[[int], None]) -> None:
        """Send a message now. `landed` is called with the time [ps] at which its signal is seen at the destination:
        at once if that is known already, else as the message reaches the destination's port."""
        now_ps = int(self._env.now)
        on_link_ps = self._busy_ps(num_bytes, self._link_bytes_per_ps)
        link = (source, destination)
        if self._port_bytes_per_ps == 0:
            self._link_free_ps[link] = tail_ps = max(now_ps, self._link_free_ps.get(link, 0)) + on_link_ps
            landed(tail_ps + self._put_ps)
            return
        at_port_ps = self._busy_ps(num_bytes, self._port_bytes_per_ps)
        head_ps = max(now_ps, self._egress_free_ps.get(source, 0))
        self._egress_free_ps[source] = head_ps + at_port_ps
        # a link serves the messages of one port only, so their order is known here
        head_ps = max(head_ps, self._link_free_ps.get(link, 0))
        self._link_free_ps[link] = head_ps + on_link_ps
        tail_ps = max(head_ps + on_link_ps, head_ps + at_port_ps)

        def enter(_: simpy.Event) -> None:
            free_ps = max(head_ps, self._ingress_free_ps.get(destination, 0)) + at_port_ps
            self._ingress_free_ps[destination] = free_ps
            landed(max(free_ps, tail_ps) + self._put_ps)

        self._env.timeout(head_ps - now_ps).callbacks.append(enter)

    def _busy_ps(self, num_bytes: int, bytes_per_ps: float) -> int:
        return self._message_ps + ceil_ps(num_bytes / bytes_per_ps)
