"""Stations against queueing theory. Tolerances come from replications: see `estimates.assert_agrees`.

All service times have a mean of SERVICE_PS, so that one is the natural unit of time.
"""

import math

import numpy as np
import pytest
from sim.oracles.estimates import assert_agrees, exponential
from sim.oracles.stations import counter_station, link_station, memory_station, unit_machine, worker_station
from sim.oracles.theory import birth_death, closed_deterministic_throughput, erlang_c, mean_wait
from sim.tables import HandTable, run_engine

SHAPE = (20, 1500)  # replications, customers
WARM_UP = 150  # customers left out; at half load a station forgets its start after some 10
SERVICE_PS = 1_000_000


def draw_service(distribution, rng, shape=SHAPE):
    """(replications, customers) int [ps or bytes]."""
    if distribution == "exponential":
        return exponential(rng, SERVICE_PS, shape)
    if distribution == "bimodal":  # one in ten takes eleven times as long as the others
        return np.where(rng.random(shape) < 0.1, 11, 1) * (SERVICE_PS // 2)
    return np.full(shape, SERVICE_PS)


class Arrivals:
    """Poisson arrivals at a given load of one server, and the customers' service."""

    def __init__(self, load, distribution, seed, shape=SHAPE):
        rng = np.random.default_rng(seed)
        self.rate = load / SERVICE_PS
        self.gaps_ps = exponential(rng, 1 / self.rate, shape)
        self.service = draw_service(distribution, rng, shape)

    @property
    def controls(self):
        """How far each replication's draws are from their means."""
        relative = [(self.gaps_ps * self.rate).mean(axis=1) - 1]
        if np.ptp(self.service):
            relative.append((self.service / SERVICE_PS).mean(axis=1) - 1)
        return relative


def means(values):
    """Mean of each replication, without the warm-up."""
    return values[:, WARM_UP:].mean(axis=1)


def assert_mean_time(arrivals, entered_ps, left_ps, theory_ps, *, sharp=0.02):
    """Customers stay for this time on average; and by Little's law, on a time average so many are there."""
    assert_agrees(means(left_ps - entered_ps), theory_ps, arrivals.controls, sharp=sharp)
    begin_ps, end_ps = entered_ps[:, WARM_UP, None], entered_ps[:, -1:]
    there_ps = np.clip(left_ps, begin_ps, end_ps) - np.clip(entered_ps, begin_ps, end_ps)
    mean_number = there_ps.sum(axis=1) / (end_ps - begin_ps)[:, 0]
    assert_agrees(mean_number, arrivals.rate * theory_ps, arrivals.controls, sharp=1.5 * sharp)


# --- one after the other


@pytest.mark.parametrize(("num_servers", "load"), [(1, 0.5), (5, 3.5)])
def test_workers_are_an_m_m_c_queue(engine, num_servers, load):
    arrivals = Arrivals(load, "exponential", seed=num_servers)
    visits = worker_station(engine, arrivals.gaps_ps, arrivals.service, num_servers)
    has_to_wait = erlang_c(num_servers, load)
    while_waiting_ps = SERVICE_PS / (num_servers - load)  # exponential
    sojourn_ps = has_to_wait * while_waiting_ps + SERVICE_PS
    assert_mean_time(arrivals, visits.arrival_ps, visits.end_ps, sojourn_ps)
    assert_agrees(means(visits.wait_ps > 0), has_to_wait, arrivals.controls, sharp=0.03)
    waits_long = means(visits.wait_ps > while_waiting_ps)
    assert_agrees(waits_long, has_to_wait * math.exp(-1), arrivals.controls, sharp=0.08)


def test_a_worker_keeps_to_pollaczek_and_khinchine(engine):
    arrivals = Arrivals(0.5, "bimodal", seed=11)
    visits = worker_station(engine, arrivals.gaps_ps, arrivals.service, 1)
    second_moment = (0.9 * 0.5**2 + 0.1 * 5.5**2) * SERVICE_PS**2
    wait_ps = mean_wait(arrivals.rate, SERVICE_PS, second_moment)
    assert_mean_time(arrivals, visits.arrival_ps, visits.start_ps, wait_ps, sharp=0.04)


def test_a_link_is_an_m_m_1_queue(engine):
    arrivals = Arrivals(0.5, "exponential", seed=21)
    visits = link_station(engine, arrivals.gaps_ps, arrivals.service)
    assert_mean_time(arrivals, visits.arrival_ps, visits.end_ps, SERVICE_PS / (1 - 0.5))


@pytest.mark.parametrize("limits", ["link", "port"])
def test_equal_messages_make_an_m_d_1_queue(engine, limits):
    arrivals = Arrivals(0.5, "constant", seed=22)
    # what leaves an egress port at equal distances finds its way free: the ports are one queue, not three
    ports = {"link_bytes_per_ns": 1e15, "port_bytes_per_ns": 1000.0} if limits == "port" else {}
    visits = link_station(engine, arrivals.gaps_ps, arrivals.service, machine=unit_machine(**ports))
    wait_ps = mean_wait(arrivals.rate, SERVICE_PS, SERVICE_PS**2)
    assert_mean_time(arrivals, visits.arrival_ps, visits.start_ps, wait_ps, sharp=0.03)


def test_a_ticket_counter_is_an_m_d_1_queue(engine):
    arrivals = Arrivals(0.5, "constant", seed=23)
    visits = counter_station(engine, arrivals.gaps_ps, SERVICE_PS)
    wait_ps = mean_wait(arrivals.rate, SERVICE_PS, SERVICE_PS**2)
    assert_mean_time(arrivals, visits.arrival_ps, visits.start_ps, wait_ps, sharp=0.03)


# --- shared


@pytest.mark.parametrize("distribution", ["constant", "bimodal"])
def test_memory_without_a_cap_is_m_g_1_processor_sharing(engine, distribution):
    """Whatever the distribution, a stream takes 1 / (1 - load) times as long as alone, a short one like a long one."""
    arrivals = Arrivals(0.5, distribution, seed=31)
    visits = memory_station(engine, arrivals.gaps_ps, arrivals.service)
    assert_mean_time(arrivals, visits.arrival_ps, visits.end_ps, SERVICE_PS / (1 - 0.5))
    for size in np.unique(arrivals.service):
        sojourn_ps = np.where(arrivals.service == size, visits.sojourn_ps, 0)[:, WARM_UP:].sum(axis=1)
        number = (arrivals.service == size)[:, WARM_UP:].sum(axis=1)
        assert_agrees(sojourn_ps / number, size / (1 - 0.5), arrivals.controls, sharp=0.03)


@pytest.mark.parametrize(
    ("full_at", "knee", "distribution"), [(4, 0.0, "exponential"), (2.5, 0.0, "bimodal"), (4, 3.0, "exponential")]
)
def test_memory_with_a_cap_is_a_birth_death_process(engine, full_at, knee, distribution):
    """full_at: so many streams at their cap take all of the bandwidth. Equal shares do not care how sizes differ."""
    arrivals = Arrivals(0.5, distribution, seed=41)
    machine = unit_machine(cu_bytes_per_ns=1000.0 / full_at, knee=knee)
    visits = memory_station(engine, arrivals.gaps_ps, arrivals.service, machine=machine)

    def ends(n):
        """Rate of ends when n stream."""
        if knee:  # the cap is 1 / full_at and the even share 1 / n of the bandwidth
            return n * (full_at**knee + n**knee) ** (-1 / knee) / SERVICE_PS
        return min(n / full_at, 1.0) / SERVICE_PS

    mean_number = birth_death(lambda n: arrivals.rate, ends) @ np.arange(400)
    assert_mean_time(arrivals, visits.arrival_ps, visits.end_ps, mean_number / arrivals.rate)


def test_birth_and_death_with_a_cap_that_divides_the_total_is_m_m_c():
    mean_number = birth_death(lambda n: 2.8, lambda n: min(n, 4)) @ np.arange(400)
    assert mean_number == pytest.approx(2.8 + erlang_c(4, 2.8) * 2.8 / (4 - 2.8), rel=1e-9)


# --- closed: N workers that think, and then want the same thing


def middle_rate(ends_ps):
    """Ends per ps in each replication, (replications, n), while everybody is still there."""
    ends_ps = np.sort(ends_ps, axis=1)
    begin, end = ends_ps.shape[1] // 5, ends_ps.shape[1] * 4 // 5
    return (end - begin) / (ends_ps[:, end] - ends_ps[:, begin])


@pytest.mark.parametrize("population", [2, 12])
def test_workers_at_a_ticket_counter_are_m_d_1_n(engine, population):
    """A task is to think, exponentially; the next one costs a ticket. With 12 the counter is nearly always busy."""
    think_ps, ticket_ps = SERVICE_PS, SERVICE_PS // 8
    replications = SHAPE[0]
    think = exponential(np.random.default_rng(51), think_ps, SHAPE)
    table = HandTable(replications)
    for pe in range(replications):
        for length_ps in think[pe].tolist():
            table.task("gate", pe=pe, flops=length_ps)
    machine = unit_machine(ticket_service_ps=ticket_ps)
    records = run_engine(engine, table, machine, population, queue="ticket").reshape(SHAPE)
    controls = [(think / think_ps).mean(axis=1) - 1]
    theory = closed_deterministic_throughput(population, think_ps, ticket_ps)
    assert theory < min(population / (think_ps + ticket_ps), 1 / ticket_ps)  # the asymptotic bounds
    assert_agrees(middle_rate(records["end_ps"]), theory, controls)
    at_counter_ps = (records["ticket_ps"] - records["asked_ps"])[:, WARM_UP:-population].mean(axis=1)
    assert_agrees(at_counter_ps, population / theory - think_ps, controls)  # Little's law over the whole cycle


@pytest.mark.parametrize("distribution", ["exponential", "bimodal"])
def test_workers_that_stream_and_compute_are_m_m_1_n(engine, distribution):
    """Each worker computes, then streams, and so on. With equal shares the number that stream is distributed as in
    M/M/1//N, whatever the distributions. Source: Baskett, Chandy, Muntz and Palacios 1975, Journal of the ACM 22(2).
    """
    population, rounds, replications = 5, 240, SHAPE[0]
    think_ps = 3 * SERVICE_PS
    rng = np.random.default_rng(61)
    shape = (replications, rounds, population)
    think, num_bytes = 3 * draw_service(distribution, rng, shape), draw_service(distribution, rng, shape)
    table = HandTable(replications)
    for pe in range(replications):
        for turn in range(rounds):
            for length_ps in think[pe, turn].tolist():
                table.task("gate", pe=pe, flops=length_ps)
            for size in num_bytes[pe, turn].tolist():
                table.task("gate", pe=pe, weights=size)
    records = run_engine(engine, table, unit_machine(), population, queue="static")
    streams = records.reshape(replications, rounds, 2, population)[:, :, 1]
    states = birth_death(lambda n: (population - n) / think_ps, lambda n: 1 / SERVICE_PS, population + 1)
    theory = (1 - states[0]) / SERVICE_PS
    controls = [
        (draws / mean_ps).mean(axis=(1, 2)) - 1 for draws, mean_ps in ((think, think_ps), (num_bytes, SERVICE_PS))
    ]
    assert_agrees(middle_rate(streams["end_ps"].reshape(replications, -1)), theory, controls)
    sojourn_ps = (streams["end_ps"] - streams["start_ps"])[:, 20:-20].mean(axis=(1, 2))
    assert_agrees(sojourn_ps, population / theory - think_ps, controls)
