"""This host as a machine: fitted on the spot, by running the CPU backend's own loops for two seconds."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache

import numpy as np

from flashmoe import _native
from flashmoe.machine import Machine, Origin, parameter_units
from flashmoe.model import MoEModel
from flashmoe.tasks import Tiling
from flashmoe.weights import Weights


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def host_machine(seconds: float = 2.0) -> Machine:
    """Measure this host and describe it; once a process.

    Nothing is fitted to a run of a layer that anybody wants to predict: the loops run alone, and a worker's
    bookkeeping is that of a launch whose tasks have next to nothing to compute.
    """
    cores = num_cores()
    measured = _native.benchmark_host(seconds, cores)
    one, all_cores = measured["stream_bytes_per_ns"], measured["stream_all_bytes_per_ns"]
    copy = measured["copy_bytes_per_ns"]
    signal_ps = round(measured["signal_ns"] * 1000)
    thread_start_ps, num_domains = round(measured["thread_start_ns"] * 1000), 2
    values = {
        "num_cus": max(4, cores),
        "num_domains": num_domains,
        "num_pes_max": 64,
        "hbm_bytes_per_ns": max(one, all_cores),
        "cu_bytes_per_ns": one,
        "cu_flops_per_ns": measured["flops_per_ns"],
        "cache_bytes_per_ns": copy,
        "prefetch": False,  # only a running thread loads anything
        "ticket_ps": round(measured["ticket_ns"] * 1000),
        "ticket_far_ps": round(measured["ticket_ns"] * 1000),
        "ticket_service_ps": 0,
        "ticket_far_service_ps": 0,
        "signal_ps": signal_ps,
        "signal_near_ps": signal_ps,
        "put_ps": signal_ps,
        "link_bytes_per_ns": copy,
        "store_bytes_per_ns": copy,
        "gap_ps": round(_bookkeeping_ns() * 1000),
        # threads start one after the other, and their workers are dealt to the domains in turn
        "launch_domain_ps": thread_start_ps,
        "launch_step_ps": num_domains * thread_start_ps,
        "num_cores": cores,
        "slice_ps": round(measured["slice_ns"] * 1000),
    }
    units = parameter_units()
    # the fixed part of a task is in the gap between tasks; a route's arithmetic is nothing that flops count
    values |= {key: 0 for key in units if key.endswith("_overhead_ps")}
    values["route_overhead_ps"] = round(measured["route_ns"] * 1000)
    benchmark = f"microbenchmark on this host, {datetime.now(UTC).date().isoformat()}"
    counts = ("num_cus", "num_domains", "num_pes_max", "prefetch")
    by_design = {*counts, *(key for key, value in values.items() if value == 0)}
    origins = {
        key: Origin(units[key], "estimate", "how the CPU backend works; not measured")
        if key in by_design
        else Origin(units[key], "measured", benchmark)
        for key in values
    }
    return Machine(name="host", origins=origins, **values)  # type: ignore[arg-type]


def _bookkeeping_ns() -> float:
    """From the end of a task to the start of the next one on a lone worker [ns]: signals, record, ticket, poll."""
    from flashmoe.hw import Layer  # a backend, to measure with; nothing else here knows one

    model = MoEModel(d_model=64, d_ff=64, num_experts=4, top_k=2, dtype="f32")
    layer = Layer(
        model, Weights.random(model), ep_size=1, max_tokens=8, workers=1, tiling=Tiling(up_rows=1, down_rows=1)
    )
    x = np.ones((8, model.d_model), np.float32)
    gaps = []
    for _ in range(5):
        records = np.sort(layer([x]).trace.records, order="start_ps")
        gaps.append(float(np.median(records["start_ps"][1:] - records["end_ps"][:-1])) / 1000)
    return float(np.median(gaps))
