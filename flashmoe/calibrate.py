"""This host as a machine: fitted on the spot, by running the CPU backend's own loops for two seconds."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache

from flashmoe import _native
from flashmoe.machine import Machine, Origin, parameter_units

# What a worker does around a task's own arithmetic, in thousands of instructions: decode, poll, record, signal.
_TASK_OVERHEAD_PS = 500_000


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def host_machine(seconds: float = 2.0) -> Machine:
    """Measure this host and describe it; once a process.

    Workers are threads that share the cores, whatever their PE: the machine has shared_memory, and its one channel
    stands for core time. Nothing is fitted to a run of the layer itself.
    """
    cores = num_cores()
    measured = _native.benchmark_host(seconds, cores)
    one, all_cores = measured["stream_bytes_per_ns"], measured["stream_all_bytes_per_ns"]
    signal_ps = round(measured["signal_ns"] * 1000)
    ticket_ps = round(measured["ticket_ns"] * 1000)
    copy = measured["copy_bytes_per_ns"]
    values = {
        "num_cus": max(4, cores),
        "num_domains": 2,
        "num_pes_max": 64,
        "hbm_bytes_per_ns": max(one, all_cores),
        "cu_bytes_per_ns": one,
        "cu_flops_per_ns": measured["flops_per_ns"],
        "cache_bytes_per_ns": copy,
        "prefetch": False,
        "ticket_ps": ticket_ps,
        "ticket_far_ps": ticket_ps,
        "ticket_service_ps": 0,
        "ticket_far_service_ps": 0,
        "signal_ps": signal_ps,
        "put_ps": signal_ps,
        "link_bytes_per_ns": copy,
        "link_topology": "mesh",
        "store_bytes_per_ns": copy,
        "shared_memory": True,
    }
    values |= {key: _TASK_OVERHEAD_PS for key in parameter_units() if key.endswith("_overhead_ps")}
    today = datetime.now(UTC).date().isoformat()
    estimates = {key for key in values if key.endswith("_overhead_ps")}
    origins = {
        key: Origin(
            unit,
            "estimate" if key in estimates else "measured",
            "a worker's bookkeeping around a task" if key in estimates else f"microbenchmark on this host, {today}",
        )
        for key, unit in parameter_units().items()
        if key in values
    }
    return Machine(name="host", origins=origins, **values)  # type: ignore[arg-type]
