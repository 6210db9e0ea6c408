"""Simulated runs: how long a schedule takes on a machine that need not be at hand, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, resolve
from flashmoe.routing import Routing
from flashmoe.schedule import to_schedule
from flashmoe.sim.bounds import distinct_weight_bytes, explain, lower_bounds
from flashmoe.sim.simpy_engine import DeadlockError, Progress, run_simpy
from flashmoe.tasks import TaskTable, Tiling, critical_path
from flashmoe.trace import Trace, stamp

__all__ = ["ENGINES", "DeadlockError", "explain", "lower_bounds", "simulate"]

ENGINES: dict[str, Callable[..., Any]] = {"simpy": run_simpy}


def simulate(
    model: MoEModel,
    *,
    routing: Routing,
    machine: str | Path | Machine = "mi300x",
    policy: str | Policy = "static_phase",
    engine: str = "simpy",
    seed: int = 0,
    workers: int | None = None,
    gate: bool = True,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Simulate one layer on every PE of a routing.

    machine: a preset, "host", a TOML file or a Machine. policy: a name or a Policy; tiling overrides its own.
    workers: per PE; all CUs of the machine by default. gate: whether the router runs inside the kernel.
    seed: kept in the header; the model has no randomness of its own. progress: called with (tasks done, all).
    Returns: a Trace whose header holds the lower bounds and the headroom above the largest of them.
    Raises: ValueError naming the bad argument and the accepted ones; DeadlockError naming who waits for what.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r} (engines: {', '.join(ENGINES)})")
    machine = Machine.load(machine)
    if routing.ep_size > machine.num_pes_max:
        raise ValueError(
            f"ep_size={routing.ep_size} (machine {machine.name!r} joins at most {machine.num_pes_max} PEs)"
        )
    num_workers = machine.num_cus if workers is None else workers
    if num_workers < 1:
        raise ValueError(f"workers={workers} (must be at least 1)")
    policy = resolve(policy, tiling)
    table = TaskTable(model, routing, policy.tiling, gate=gate)
    schedule = to_schedule(policy, table, num_workers) if policy.queue == "replay" else None
    bounds_ps = lower_bounds(table, machine, num_workers)
    records = ENGINES[engine](table, machine, policy, num_workers, schedule, progress)
    bound_ps = max(bounds_ps.values())
    makespan_ps = int(records["end_ps"].max(initial=0))
    header = {
        **table.header(),
        **stamp(),
        "executor": engine,
        "machine": machine.name,
        "machine_parameters": machine.to_dict(),
        "num_workers": num_workers,
        "num_domains": min(machine.num_domains, num_workers),
        "policy": policy.name,
        "seed": seed,
        "clock": {"unit": "ps", "resolution_ps": 1},
        "drops": 0,
        "bounds_ps": bounds_ps,
        "bound_ps": bound_ps,
        "headroom": makespan_ps / bound_ps - 1.0 if bound_ps else 0.0,
        "hbm_bytes": int(records["hbm_bytes"].sum()),
        "link_bytes": int(records["link_bytes"].sum()),
        "distinct_weight_bytes": int(distinct_weight_bytes(table).sum()),
    }
    return Trace(records=records, header=header, critical_path=critical_path(table, records))
