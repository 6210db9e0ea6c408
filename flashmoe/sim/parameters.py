"""A machine as the engines see it: tables and whole picoseconds, worked out once, so that both engines use the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flashmoe.machine import Machine
from flashmoe.sim import jitter


@dataclass(frozen=True, eq=False)
class Parameters:
    """What is the same for every task of a run.

    start_ps: (num_workers,) when a worker asks for its first pick, from the launch [ps].
    rates: (num_pes, n + 1) float64, rate of each of n streams of a PE [bytes/ps]; entry 0 is not used.
    far_ps, near_ps: (n + 1,) int64, a signal's way to another domain and within one, while n streams run [ps].
    release_ps: (n + 1,) int64, what a release takes while n streams run [ps].
    speeds: (num_pes,) persistent speed factors.
    quantiles: (4096,) factors on a task's time, equally likely; all 1 without jitter.
    stay_bytes: (4096,) after how many bytes of others weights leave the cache, equally likely [bytes].
    stall_threshold: see `jitter.stall_threshold`.
    """

    machine: Machine
    num_pes: int
    num_workers: int
    seed: int
    speeds: NDArray[np.float64]
    start_ps: NDArray[np.int64]
    rates: NDArray[np.float64]
    far_ps: NDArray[np.int64]
    near_ps: NDArray[np.int64]
    release_ps: NDArray[np.int64]
    quantiles: NDArray[np.float64]
    stay_bytes: NDArray[np.float64]
    stall_threshold: int

    @property
    def num_domains(self) -> int:
        """Domains in use: each has at least one worker."""
        return min(self.machine.num_domains, self.num_workers)

    def plan_ps(self, num_tokens: int, num_sorted: int | None) -> int:
        """What the lists of a layer of so many tokens, over all PEs, take [ps]. num_sorted: experts to sort, if any."""
        machine = self.machine
        sort_ps = 0 if num_sorted is None else machine.sort_ps + machine.sort_expert_ps * num_sorted
        return machine.plan_ps + machine.plan_token_ps * num_tokens + sort_ps

    @property
    def jitters(self) -> bool:
        """Whether tasks differ from what they cost on average."""
        return self.machine.jitter > 0 or self.stall_threshold > 0


def resolve(
    machine: Machine, num_pes: int, num_workers: int, *, seed: int = 0, pe_speed: Sequence[float] | None = None
) -> Parameters:
    """Work out the tables for a number of PEs and workers a PE.

    pe_speed: one factor a PE, times what pe_spread draws.
    Raises: ValueError naming pe_speed or the seed where they do not fit.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} (must be a whole number in 0..2^63 - 1)")
    speeds = np.ones(num_pes)
    if pe_speed is not None:
        try:
            speeds = np.array(list(pe_speed), np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"pe_speed={pe_speed!r} (must be {num_pes} factors, one a PE)") from None
        if speeds.shape != (num_pes,) or not np.all((speeds >= 1e-3) & (speeds <= 1e3)):
            raise ValueError(f"pe_speed={list(pe_speed)} (must be {num_pes} factors in 0.001..1000, one a PE)")
        if machine.num_cores > 0 and len(set(speeds.tolist())) > 1:
            raise ValueError(f"pe_speed={list(pe_speed)} (must be equal: the PEs of a host share its memory)")
    if machine.pe_spread > 0:
        speeds = speeds * np.array(jitter.pe_factors(seed, num_pes, machine.pe_spread))
    num_domains = min(machine.num_domains, num_workers)
    worker = np.arange(num_workers)
    start_ps = (
        machine.launch_ps
        + machine.prologue_ps
        + worker % num_domains * machine.launch_domain_ps
        + worker // num_domains * machine.launch_step_ps
    )
    # the streams of a host's PEs share one memory
    num_streams = num_workers * (num_pes if machine.num_cores > 0 else 1)
    nominal = _stream_rates(machine.hbm_bytes_per_ns, machine.cu_bytes_per_ns, machine.knee, num_streams)
    load = nominal * np.arange(num_streams + 1) / (machine.hbm_bytes_per_ns / 1000.0)

    def under_load(idle_ps: int, factor: float) -> NDArray[np.int64]:
        return np.rint(idle_ps * (1.0 + (factor - 1.0) * np.minimum(load, 1.0))).astype(np.int64)

    return Parameters(
        machine=machine,
        num_pes=num_pes,
        num_workers=num_workers,
        seed=int(seed),
        speeds=speeds,
        start_ps=start_ps.astype(np.int64),
        rates=nominal * speeds[:, None],
        far_ps=under_load(machine.signal_ps, machine.signal_load_factor),
        near_ps=under_load(machine.signal_near_ps, machine.signal_load_factor),
        release_ps=under_load(machine.release_ps, machine.release_load_factor),
        quantiles=_quantiles(machine.jitter),
        stay_bytes=machine.cache_bytes * _stays(),
        stall_threshold=jitter.stall_threshold(machine.stall_probability) if machine.stall_ps > 0 else 0,
    )


@lru_cache(maxsize=1)
def _stays() -> NDArray[np.float64]:
    return jitter.stays()


@lru_cache(maxsize=32)
def _quantiles(sigma: float) -> NDArray[np.float64]:
    return jitter.quantiles(sigma)


@lru_cache(maxsize=32)
def _stream_rates(
    hbm_bytes_per_ns: float, cu_bytes_per_ns: float, knee: float, num_streams: int
) -> NDArray[np.float64]:
    """Rate of each of n streams: the CU's cap and the fair share, whichever is less; rounded off near the knee."""
    total, cap = hbm_bytes_per_ns / 1000.0, cu_bytes_per_ns / 1000.0
    rates = [0.0]
    for n in range(1, num_streams + 1):
        share = total / n
        if knee > 0 and math.isfinite(share) and math.isfinite(cap):
            # factored so that a large exponent does not overflow
            less, more = min(cap, share), max(cap, share)
            rates.append(less * (1.0 + (less / more) ** knee) ** (-1.0 / knee))
        else:
            rates.append(min(cap, share))
    return np.array(rates)
