"""Ticket counters, cores and links by hand."""

import simpy
from sim.tables import plain_machine

from flashmoe.sim.servers import Cores, Counter, Links


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


def test_a_counter_that_was_idle_serves_at_once_and_adds_any_amount():
    env = simpy.Environment(0)
    counter = Counter(env)
    got = []

    def worker(at_ps, amount):
        yield env.timeout(at_ps)
        ticket = yield counter.add(100, 5, amount)
        got.append((ticket, env.now))

    for at_ps, amount in ((0, 3), (1_000, 2), (1_050, 1)):
        env.process(worker(at_ps, amount))
    env.run()
    assert got == [(0, 105), (3, 1_105), (5, 1_205)]


def test_cores_go_to_who_has_waited_longest():
    env = simpy.Environment(0)
    cores = Cores(env, num_cores=2, slice_ps=300)
    got = []

    def worker(name, keeps_ps):
        since_ps = yield cores.acquire()
        got.append((name, since_ps))
        yield env.timeout(keeps_ps)
        assert cores.is_over(since_ps) == (name == "a")  # b has its core for too short, for c nobody waits
        cores.release()

    for name, keeps_ps in (("a", 400), ("b", 200), ("c", 900), ("d", 500)):
        env.process(worker(name, keeps_ps))
    env.run()
    assert got == [("a", 0), ("b", 0), ("c", 200), ("d", 400)]


def land_times(machine, messages):
    """(source, destination, bytes), all sent at 0 -> when each signal is seen [ps]."""
    env = simpy.Environment(0)
    links = Links(env, machine)
    times = [-1] * len(messages)
    for index, (source, destination, num_bytes) in enumerate(messages):
        links.send(source, destination, num_bytes, lambda seen_ps, index=index: times.__setitem__(index, seen_ps))
    env.run()
    return times


def test_a_mesh_serialises_a_pair_and_nothing_else():
    machine = plain_machine(link_bytes_per_ns=2.0, put_ps=1000)
    # 100 bytes at 2 GB/s: 50 ns
    times = land_times(machine, [(0, 1, 100), (0, 1, 100), (0, 2, 100), (1, 0, 100), (2, 1, 0)])
    assert times == [51_000, 101_000, 51_000, 51_000, 1_000]


def test_a_message_holds_its_link_beyond_its_bytes():
    machine = plain_machine(link_bytes_per_ns=2.0, put_ps=1000, link_message_ps=300)
    assert land_times(machine, [(0, 1, 100), (0, 1, 0), (0, 1, 0)]) == [51_300, 51_600, 51_900]


def test_an_ideal_switch_serialises_egress_then_ingress():
    machine = plain_machine(link_bytes_per_ns=1e30, port_bytes_per_ns=2.0, put_ps=1000)
    # heads leave PE 0 at 0 and 50 ns, PE 2 at 0. The port of PE 1 takes that of PE 0 until 50, of PE 2 until 100.
    times = land_times(machine, [(0, 1, 100), (0, 3, 100), (2, 1, 100)])
    assert times == [51_000, 101_000, 101_000]


def test_an_idle_fabric_takes_as_long_as_its_slowest_part():
    for link, port in ((2.0, 8.0), (8.0, 2.0), (2.0, 2.0)):
        machine = plain_machine(link_bytes_per_ns=link, port_bytes_per_ns=port, put_ps=7)
        assert land_times(machine, [(0, 1, 100)]) == [50_007]  # the head goes on at once: not the sum


def test_links_side_by_side_share_a_port_that_is_faster_than_each():
    machine = plain_machine(link_bytes_per_ns=2.0, port_bytes_per_ns=4.0)
    # 100 bytes: 25 ns at a port, 50 on a link. Heads leave at 0, 25 and 50 ns.
    assert land_times(machine, [(0, 1, 100), (0, 2, 100), (0, 3, 100)]) == [50_000, 75_000, 100_000]
    # two at the same destination: its port takes the second one's bytes from 25 to 50 ns, none late
    assert land_times(machine, [(0, 2, 100), (1, 2, 100)]) == [50_000, 50_000]
    # the third one's from 50 to 75
    assert land_times(machine, [(0, 3, 100), (1, 3, 100), (2, 3, 100)]) == [50_000, 50_000, 75_000]


def test_a_second_message_waits_for_its_link_and_others_do_not_wait_behind_it():
    machine = plain_machine(link_bytes_per_ns=2.0, port_bytes_per_ns=4.0)
    # the egress port is free at 25 ns, the link to PE 1 at 50; the port is done with the second at 50 all the same
    assert land_times(machine, [(0, 1, 100), (0, 1, 100), (0, 2, 100)]) == [50_000, 100_000, 100_000]


def test_ports_are_held_by_a_message_beyond_its_bytes():
    machine = plain_machine(link_bytes_per_ns=1e30, port_bytes_per_ns=1.0, link_message_ps=500)
    assert land_times(machine, [(0, 1, 2), (0, 2, 0), (0, 3, 0)]) == [2_500, 3_000, 3_500]


def test_ingress_serves_in_order_of_arrival_not_of_sending():
    machine = plain_machine(link_bytes_per_ns=1e30, port_bytes_per_ns=1.0)
    # the second message leaves its port at 300 ns; the third was sent after it, and is through long before
    assert land_times(machine, [(0, 1, 300), (0, 2, 10), (1, 2, 10)]) == [300_000, 310_000, 10_000]
