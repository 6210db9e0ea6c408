"""Queueing stations made of tasks: customers arrive when source tasks end, and each of them is one more task.

A PE is one replication: as no signal crosses PEs, they are independent, and one run makes them all. One worker of a
PE runs the sources as one chain, so it never goes back to the queue, and then a last task that outlasts every
customer; the other workers serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sim.tables import HandTable, plain_machine, run_engine

from flashmoe.machine import Machine


@dataclass(frozen=True)
class Visits:
    """Customers of a station, in the order of arrival: (num_replications, num_customers) int64 [ps] each."""

    arrival_ps: Any
    start_ps: Any
    end_ps: Any

    @property
    def wait_ps(self) -> Any:
        return self.start_ps - self.arrival_ps

    @property
    def sojourn_ps(self) -> Any:
        return self.end_ps - self.arrival_ps


def unit_machine(**overrides: Any) -> Machine:
    """A machine without any latency, on which one byte (of memory or of a link) and one flop take 1 ps, alone."""
    rate = 1000.0  # per ns
    values = {
        "prefetch": False,
        "hbm_bytes_per_ns": rate,
        "cu_bytes_per_ns": rate,
        "cu_flops_per_ns": rate,
        "cache_bytes_per_ns": rate,
        "link_bytes_per_ns": rate,
        "store_bytes_per_ns": 1e15,
    }
    return plain_machine(**(values | overrides))


def worker_station(
    engine: str, gaps_ps: Any, service: Any, num_servers: int, *, queue: str = "ticket", machine: Machine | None = None
) -> Visits:
    """First come, first served by workers. gaps_ps, service: (num_replications, num_customers) int [ps]."""
    return _serve(engine, gaps_ps, service, "flops", num_servers, queue, machine or unit_machine())


def memory_station(
    engine: str, gaps_ps: Any, num_bytes: Any, *, machine: Machine | None = None, num_workers: int = 60
) -> Visits:
    """Each customer streams its bytes on a worker of its own. num_workers: more than are ever there together."""
    return _serve(engine, gaps_ps, num_bytes, "weights", num_workers, "ticket", machine or unit_machine())


def _serve(
    engine: str, gaps_ps: Any, service: Any, cost: str, num_servers: int, queue: str, machine: Machine
) -> Visits:
    num_replications, num_customers = gaps_ps.shape
    table = HandTable(num_replications)
    for pe in range(num_replications):
        arrivals = [table.event("gated", pe) for _ in range(num_customers)]
        for turn, (gap_ps, event) in enumerate(zip(gaps_ps[pe].tolist(), arrivals, strict=True)):
            table.task("gate", pe=pe, flops=gap_ps, signals=[event], chain=0 if turn else num_customers + 1)
        table.task("gate", pe=pe, flops=int(service[pe].sum()), chain=0)
        for amount, event in zip(service[pe].tolist(), arrivals, strict=True):
            table.task("gate", pe=pe, waits=[event], **{cost: amount})
    records = run_engine(engine, table, machine, num_servers + 1, queue=queue)
    customers = records.reshape(num_replications, -1)[:, num_customers + 1 :]
    return Visits(customers["ready_ps"], customers["start_ps"], customers["end_ps"])


def link_station(engine: str, gaps_ps: Any, num_bytes: Any, *, machine: Machine | None = None) -> Visits:
    """Messages from one PE to another, a pair of PEs for each replication; gaps and bytes as for worker_station.

    The start of a message's service leaves no record: start_ps is worked out for a byte a ps.
    """
    num_replications, num_customers = gaps_ps.shape
    table = HandTable(2 * num_replications)
    for pair in range(num_replications):
        sender, receiver = 2 * pair, 2 * pair + 1
        landed = [table.event("gated", receiver) for _ in range(num_customers)]
        messages = zip(gaps_ps[pair].tolist(), num_bytes[pair].tolist(), landed, strict=True)
        for gap_ps, size, event in messages:
            table.task("gate", pe=sender, flops=gap_ps, signals=[(event, size)], peer=receiver)
        for event in landed:
            table.task("gate", pe=receiver, waits=[event])
    records = run_engine(engine, table, machine or unit_machine(), 1, queue="ticket")
    sent, seen = np.moveaxis(records.reshape(num_replications, 2, num_customers), 1, 0)
    return Visits(sent["end_ps"], seen["ready_ps"] - num_bytes, seen["ready_ps"])


def counter_station(engine: str, gaps_ps: Any, service_ps: int) -> Visits:
    """Requests to a ticket counter, one from each worker of a PE; gaps_ps: (num_replications, num_workers).

    All workers ask at the launch, and get their first tickets one by one. Their first tasks are as long as it takes
    to ask again when they should arrive; the second tasks keep everybody from asking a third time too early.
    """
    num_replications, num_workers = gaps_ps.shape
    launch_ps = num_workers * service_ps
    asks_ps = np.cumsum(gaps_ps, axis=1) + launch_ps
    first_ticket_ps = service_ps * np.arange(1, num_workers + 1)
    table = HandTable(num_replications)
    for pe in range(num_replications):
        for length_ps in (asks_ps[pe] - first_ticket_ps).tolist():
            table.task("gate", pe=pe, flops=length_ps)
        for _ in range(num_workers):
            table.task("gate", pe=pe, flops=int(asks_ps[pe, -1]) + launch_ps)
    records = run_engine(engine, table, unit_machine(ticket_service_ps=service_ps), num_workers, queue="ticket")
    second = records.reshape(num_replications, 2, num_workers)[:, 1]
    return Visits(second["asked_ps"], second["ticket_ps"] - service_ps, second["ticket_ps"])
