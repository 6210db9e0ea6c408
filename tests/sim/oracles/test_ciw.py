"""The same arrivals and services in Ciw, an independent simulator of queueing networks (float64, here of whole ps)."""

import ciw
import numpy as np
import pytest
from sim.oracles.estimates import exponential
from sim.oracles.stations import memory_station, unit_machine, worker_station
from sim.tables import HandTable, run_engine

NUM_CUSTOMERS = 600


def draw(seed, *means_ps):
    rng = np.random.default_rng(seed)
    return [exponential(rng, mean_ps, (1, NUM_CUSTOMERS)) for mean_ps in means_ps]


def ciw_ends(gaps_ps, services, routing=None, node_class=None, **network):
    """(nodes, customers) time at which each customer leaves each node [ps]."""
    never = [float("inf")]
    dists = ciw.dists
    arrivals = [dists.Sequential(gaps_ps[0].astype(float).tolist() + never)] + [None] * (len(services) - 1)
    simulation = ciw.Simulation(
        ciw.create_network(
            arrival_distributions=arrivals,
            service_distributions=[dists.Sequential(service[0].astype(float).tolist()) for service in services],
            routing=routing or [[0.0]],
            **network,
        ),
        node_class=node_class,
    )
    simulation.simulate_until_max_customers(NUM_CUSTOMERS, method="Finish")
    visits = simulation.get_all_records()
    return np.array(
        [
            [visit.exit_date for visit in sorted(visits, key=lambda visit: visit.id_number) if visit.node == node + 1]
            for node in range(len(services))
        ]
    )


@pytest.mark.parametrize("num_servers", [1, 4])
def test_workers(engine, num_servers):
    gaps_ps, service_ps = draw(num_servers, 1e6, 0.9e6 * num_servers)
    visits = worker_station(engine, gaps_ps, service_ps, num_servers)
    assert np.array_equal(visits.end_ps, ciw_ends(gaps_ps, [service_ps], number_of_servers=[num_servers]))


@pytest.mark.parametrize("full_at", [1, 4])
def test_shared_memory(engine, full_at):
    gaps_ps, num_bytes = draw(10 + full_at, 1e6, 0.8e6)
    visits = memory_station(engine, gaps_ps, num_bytes, machine=unit_machine(cu_bytes_per_ns=1000.0 / full_at))
    # Ciw's service time is what a customer takes at its cap
    ends_ps = ciw_ends(
        gaps_ps,
        [num_bytes * full_at],
        node_class=ciw.PSNode,
        number_of_servers=[float("inf")],
        ps_thresholds=[full_at],
    )
    assert np.abs(visits.end_ps - ends_ps).mean() < 5  # ends are rounded up to a whole ps


def test_a_tandem_of_two_pes(engine):
    """One worker serves on the first PE, then two on the second: each message goes on to them at once."""
    gaps_ps, first_ps, second_ps = draw(20, 1e6, 0.8e6, 1.6e6)
    table = HandTable(num_pes=2)
    arrivals = [table.event("gated", 0) for _ in range(NUM_CUSTOMERS)]
    served = [table.event("gated", 1) for _ in range(NUM_CUSTOMERS)]
    for turn, (gap_ps, event) in enumerate(zip(gaps_ps[0].tolist(), arrivals, strict=True)):
        table.task("gate", pe=0, flops=gap_ps, signals=[event], chain=0 if turn else NUM_CUSTOMERS + 1)
    table.task("gate", pe=0, flops=int(first_ps.sum()), chain=0)
    for length_ps, arrival, event in zip(first_ps[0].tolist(), arrivals, served, strict=True):
        table.task("gate", pe=0, flops=length_ps, waits=[arrival], signals=[event])
    for length_ps, event in zip(second_ps[0].tolist(), served, strict=True):
        table.task("gate", pe=1, flops=length_ps, waits=[event])
    records = run_engine(engine, table, unit_machine(), 2, queue="ticket")
    ends_ps = records["end_ps"][NUM_CUSTOMERS + 1 :].reshape(2, NUM_CUSTOMERS)
    expected_ps = ciw_ends(gaps_ps, [first_ps, second_ps], routing=[[0.0, 1.0], [0.0, 0.0]], number_of_servers=[1, 2])
    assert np.array_equal(ends_ps, expected_ps)
