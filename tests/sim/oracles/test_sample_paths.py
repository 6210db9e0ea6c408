"""Stations customer by customer, to the picosecond, against recursions of a few lines that know no engine."""

import heapq

import numpy as np
import pytest
from sim.oracles.estimates import exponential
from sim.oracles.stations import counter_station, link_station, memory_station, unit_machine, worker_station
from sim.tables import HandTable, run_engine

SHAPE = (2, 400)  # replications, customers


def draw(seed, load):
    """(gaps, service), exponential, of one server at this load."""
    rng = np.random.default_rng(seed)
    return exponential(rng, 1e6, SHAPE), exponential(rng, load * 1e6, SHAPE)


def first_come_first_served(gaps_ps, service_ps, num_servers):
    """(starts, ends): the next customer gets the server that is free first. Source: Kiefer and Wolfowitz 1955."""
    starts, ends = [], []
    for gaps, services in zip(gaps_ps.tolist(), service_ps.tolist(), strict=True):
        free, now = [0] * num_servers, 0
        for gap, service in zip(gaps, services, strict=True):
            now += gap
            start = max(now, heapq.heappop(free))
            heapq.heappush(free, start + service)
            starts.append(start)
            ends.append(start + service)
    return np.reshape(starts, gaps_ps.shape), np.reshape(ends, gaps_ps.shape)


def assert_same(visits, gaps_ps, starts_ps, ends_ps):
    assert np.array_equal(visits.arrival_ps, np.cumsum(gaps_ps, axis=1) + visits.arrival_ps[:, :1] - gaps_ps[:, :1])
    assert np.array_equal(visits.start_ps, starts_ps)
    assert np.array_equal(visits.end_ps, ends_ps)


@pytest.mark.parametrize("queue", ["ticket", "domain", "push"])
@pytest.mark.parametrize("num_servers", [1, 3, 8])
def test_workers_serve_first_come_first_served(engine, queue, num_servers):
    gaps_ps, service_ps = draw(num_servers, 0.9 * num_servers)
    visits = worker_station(engine, gaps_ps, service_ps, num_servers, queue=queue)
    assert_same(visits, gaps_ps, *first_come_first_served(gaps_ps, service_ps, num_servers))


def test_a_link_serves_first_come_first_served(engine):
    gaps_ps, num_bytes = draw(11, 0.9)
    assert_same(link_station(engine, gaps_ps, num_bytes), gaps_ps, *first_come_first_served(gaps_ps, num_bytes, 1))


def test_a_message_holds_its_link_beyond_its_bytes(engine):
    gaps_ps, num_bytes = draw(12, 0.5)
    visits = link_station(engine, gaps_ps, num_bytes, machine=unit_machine(link_message_ps=400_000, put_ps=123))
    _, ends_ps = first_come_first_served(gaps_ps, num_bytes + 400_000, 1)
    assert np.array_equal(visits.end_ps, ends_ps + 123)


def test_a_ticket_counter_serves_first_come_first_served(engine):
    gaps_ps, _ = draw(13, 0.9)
    visits = counter_station(engine, gaps_ps, 900_000)
    asks_ps = gaps_ps.copy()
    asks_ps[:, 0] += SHAPE[1] * 900_000  # everybody's first ticket comes before
    assert_same(visits, gaps_ps, *first_come_first_served(asks_ps, np.full(SHAPE, 900_000), 1))


def test_workers_go_round_between_their_tasks_and_the_counter(engine):
    """A closed queue: as many customers as there are workers."""
    num_workers, service_ps, latency_ps = 7, 200_000, 30_000
    think_ps = exponential(np.random.default_rng(14), 1e6, (1, 500))[0].tolist()
    table = HandTable()
    for length_ps in think_ps:
        table.task("gate", flops=length_ps)
    machine = unit_machine(ticket_service_ps=service_ps, ticket_ps=latency_ps)
    records = run_engine(engine, table, machine, num_workers, queue="ticket")
    asks, counter_free, ends = [0] * num_workers, 0, []
    for length_ps in think_ps:
        counter_free = max(heapq.heappop(asks), counter_free) + service_ps
        ends.append(counter_free + latency_ps + length_ps)
        heapq.heappush(asks, ends[-1])
    assert records["end_ps"].tolist() == ends


def shared(gaps_ps, num_bytes, rate_of_all):
    """When each stream ends, with equal shares of rate_of_all(number of streams) [bytes/ps]; every one is rescanned
    at every event."""
    arrivals_ps = np.cumsum(gaps_ps).astype(float)
    left, ends_ps = num_bytes.astype(float), np.zeros(len(gaps_ps))
    active: list[int] = []
    now, coming = 0.0, 0
    while coming < len(left) or active:
        rate = rate_of_all(len(active)) / len(active) if active else 1.0
        next_end = now + left[active].min() / rate if active else np.inf
        next_arrival = arrivals_ps[coming] if coming < len(left) else np.inf
        until = min(next_end, next_arrival)
        left[active] -= rate * (until - now)
        now = until
        if next_arrival <= next_end:
            active.append(coming)
            coming += 1
        else:
            first = min(active, key=lambda stream: left[stream])
            active.remove(first)
            ends_ps[first] = now
    return ends_ps


@pytest.mark.parametrize(("full_at", "knee"), [(1.0, 0.0), (3.5, 0.0), (3.0, 4.0)])
def test_memory_shares_like_a_fluid(engine, full_at, knee):
    """full_at: so many streams at their cap take all of the bandwidth."""
    gaps_ps, num_bytes = draw(15, 0.8)
    machine = unit_machine(cu_bytes_per_ns=1000.0 / full_at, knee=knee)
    visits = memory_station(engine, gaps_ps, num_bytes, machine=machine)

    def rate_of_all(n):
        if knee:
            return n * ((1 / full_at) ** -knee + (1 / n) ** -knee) ** (-1 / knee)
        return min(n / full_at, 1.0)

    ends_ps = np.array([shared(*path, rate_of_all) for path in zip(gaps_ps, num_bytes, strict=True)])
    # a channel rounds each end up to a whole picosecond, and the others may lose as much
    assert np.abs(visits.end_ps - ends_ps).max() < SHAPE[1]
    assert np.abs(visits.end_ps - ends_ps).mean() < 5
