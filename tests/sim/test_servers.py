"""Ticket counters and links by hand."""

import simpy
from sim.tables import plain_machine

from flashmoe.sim.servers import Counter, Links


def test_tickets_are_served_one_at_a_time_in_order_of_arrival():
    env = simpy.Environment(0)
    counter = Counter(env)
    got = []

    def worker():
        ticket = yield counter.add(190, 12)
        got.append((ticket, env.now))

    for _ in range(3):
        env.process(worker())
    env.run()
    assert got == [(0, 202), (1, 392), (2, 582)]  # service 190 each, then 12


def land_times(machine, messages):
    """(source, destination, bytes) all sent at 0 -> landing times [ps]."""
    env = simpy.Environment(0)
    links = Links(env, machine)
    times = [-1] * len(messages)

    def note(index):
        times[index] = env.now

    for index, (source, destination, num_bytes) in enumerate(messages):
        links.send(source, destination, num_bytes, lambda index=index: note(index))
    env.run()
    return times


def test_mesh_serialises_a_pair_and_nothing_else():
    machine = plain_machine(link_topology="mesh", link_bytes_per_ns=2.0, put_ps=1000)
    # 100 bytes at 2 GB/s: 50 ns
    times = land_times(machine, [(0, 1, 100), (0, 1, 100), (0, 2, 100), (1, 0, 100), (2, 1, 0)])
    assert times == [51_000, 101_000, 51_000, 51_000, 1_000]


def test_switch_serialises_egress_then_ingress():
    machine = plain_machine(link_topology="switch", link_bytes_per_ns=2.0, put_ps=1000)
    # egress of 0: ends at 50, 100 ns; PE 2's own at 50. Ingress of 1: message of 0 50..100, of 2 100..150.
    times = land_times(machine, [(0, 1, 100), (0, 3, 100), (2, 1, 100)])
    assert times == [101_000, 151_000, 151_000]


def test_ingress_serves_in_order_of_arrival_not_of_sending():
    machine = plain_machine(link_topology="switch", link_bytes_per_ns=1.0)
    # sent first, but 300 ns at its egress; the short one is through the ingress before
    assert land_times(machine, [(0, 2, 300), (1, 2, 10)]) == [600_000, 20_000]
