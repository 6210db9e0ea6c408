"""From what microbenchmarks measured to parameters of the machine model. docs/model.md has the formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.calibrate.measurements import Measured, Measurements

# As the kernel streams: copies of 24 KiB in flight for each CU.
SLOTS = 3

_ALL, _TASK_BYTES = "all SMs stream", 65536
_READ = {"bytes": _TASK_BYTES, "by": "loads of 256 threads", "region": "shared by all"}
_EXPONENTS = np.geomspace(1.0, 40.0, 2000)  # of the knee; beyond 40 it is a corner


class Parameter(NamedTuple):
    """A parameter's value in the unit of Machine, how far single measurements lie from it, where it comes from."""

    value: Any  # a number; of a fixed part, times by size
    spread: float
    origin: str  # measured | fitted
    source: str


def device_parameters(measured: Measurements) -> dict[str, Parameter]:
    """Parameters that do not depend on the kernel's code, by name.

    Raises: ValueError naming a measurement that is missing.
    """
    parameters = _memory(measured)
    load = _full_load(parameters, int(measured.about["sms"]))
    parameters |= _signals(measured, load)
    ticket = _time(
        measured.one("ticket", "latency", what="one in 2 us each", streams=_ALL),
        "ticket: fetch-and-add, one in 2 us an SM, beside the streams of all SMs; its service, below 3 ns, is in it",
    )
    parameters |= {"ticket_ps": ticket, "ticket_far_ps": ticket}
    gap = measured.one("launch", "gap_last_end_to_first_start", programmatic=False)
    ramp = measured.one("launch", "last_block_after_first", programmatic=False)
    last_cu = int(measured.about["sms"]) - 1
    parameters["launch_ps"] = _time(gap, "launch: last end of a kernel to the first block of the next in a CUDA graph")
    parameters["launch_step_ps"] = Parameter(
        round(ramp.median * 1000 / last_cu),
        ramp.spread * 1000 / last_cu,
        "measured",
        f"launch: the last block starts {ramp} after the first",
    )
    for key, streams, beside in (
        ("cache_bytes_per_ns", _ALL, "beside the streams"),
        ("cache_idle_bytes_per_ns", "idle", "with no streams"),
    ):
        one = measured.one("l2_read", "rate_of_an_sm", **_READ, sms=last_cu + 1, streams=streams)
        parameters[key] = _rate(one, f"l2_read: 64 KiB that lie in L2, read by 256 threads of each SM {beside}")
    parameters["cache_bytes"] = _cache_bytes(measured)
    product = measured.one(
        "mma_m16n8k16_bf16",
        "rate_of_an_sm",
        unit="flop/ns",
        tokens=16,
        accumulators=2,
        weights="shared memory",
        sms=last_cu + 1,
    )
    parameters["cu_flops_per_ns"] = _rate(
        product, "mma_m16n8k16_bf16: 8 warps, 16 tokens, weights from shared memory, all SMs"
    )
    # What counts is how far workers come apart by luck, over many tasks: a little less than if each had its own. What
    # one SM always has more or less than another, 0.6 % on one card and 3 % on another, is no luck.
    jitter = measured.one("task_jitter", "log_std_of_32_tasks_within_an_sm", mode="pipelined", task_bytes=_TASK_BYTES)
    parameters["jitter"] = Parameter(
        round(jitter.median * 32**0.5, 4),
        jitter.spread * 32**0.5,
        "measured",
        f"task_jitter: log of the time of 32 tasks of 64 KiB in a row, {jitter}; times sqrt(32)",
    )
    return parameters


def soft_knee(
    num_cus: NDArray[np.float64], cap: float, total: float, exponent: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """What n CUs read together when each gets (cap^-p + (total / n)^-p)^(-1/p) [bytes/ns]."""
    rates: NDArray[np.float64] = num_cus * (cap**-exponent + (total / num_cus) ** -exponent) ** (-1 / exponent)
    return rates


def fit_knee(total_by_cus: dict[int, float]) -> tuple[float, float, float]:
    """Exponent and total of the soft knee, and the root mean square of the error's log.

    The cap is what one CU got, the total such that all CUs get what they got: as a layer keeps all of them busy, the
    model has to be right there. The exponent has least squares of log rate over the numbers of CUs between.
    total_by_cus: what so many CUs read together [bytes/ns], for 1 and at least two more. Raises: ValueError.
    """
    if 1 not in total_by_cus or len(total_by_cus) < 3:
        raise ValueError(f"bandwidth of {sorted(total_by_cus)} CUs (must be 1 and at least two more)")
    num_cus = np.array(sorted(total_by_cus), np.float64)
    rates = np.array([total_by_cus[int(n)] for n in num_cus])
    cap, every, share = float(rates[0]), float(num_cus[-1]), float(rates[-1] / num_cus[-1])
    if share >= cap:
        return 0.0, float(rates[-1]), 0.0  # the memory is never short: no knee
    errors = []
    for p in _EXPONENTS:
        total = every * (share**-p - cap**-p) ** (-1 / p)
        errors.append(float(np.sqrt(np.mean(np.log(soft_knee(num_cus, cap, total, p) / rates) ** 2))))
    best = int(np.argmin(errors))
    exponent = float(_EXPONENTS[best])
    return exponent, every * (share**-exponent - cap**-exponent) ** (-1 / exponent), errors[best]


def _memory(measured: Measurements) -> dict[str, Parameter]:
    by_cus = measured.over("sms", "read_bandwidth", "total", slots=SLOTS)
    exponent, total, error = fit_knee({n: one.median for n, one in by_cus.items()})
    one, every = by_cus[1], by_cus[max(by_cus)]
    what = f"read_bandwidth, {SLOTS} copies of 24 KiB in flight a CU"
    fitted = f"{what}, over 1 to {max(by_cus)} CUs: {error:.1%} rms of log rate, exact at {max(by_cus)}: {every}"
    return {
        "hbm_bytes_per_ns": Parameter(round(total, 1), every.spread, "fitted", fitted),
        "cu_bytes_per_ns": _rate(one, f"{what}: one CU alone"),
        "knee": Parameter(round(exponent, 3), 0.0, "fitted", fitted),
    }


def _cache_bytes(measured: Measurements) -> Parameter:
    by_lag = {lag: one.median for lag, one in measured.over("lag_mb", "reuse", "total", slots=SLOTS).items()}
    by_cus = measured.over("sms", "read_bandwidth", "total", slots=SLOTS)
    first, last = min(by_lag), max(by_lag)
    return Parameter(
        round(mean_lag(by_lag, by_cus[max(by_cus)].median) * 1e6),
        max(np.diff(sorted(by_lag))) * 1e6 / 2,
        "fitted",
        f"reuse: two SMs read each chunk, one of them {first} to {last} MB behind the other: "
        f"{by_lag[first]:.0f} to {by_lag[last]:.0f} GB/s of all",
    )


def mean_lag(total_by_lag: dict[int, float], memory: float) -> float:
    """After how many bytes of others what was read leaves the cache, on average over what was read, as lags are given.

    Two CUs read the same, the second some lag behind the first. What both read together says which share of it the
    second one still found in the cache: all with no lag, and none where both get no more than the memory gives. The
    integral of that share over the lag is the mean lag at which it leaves.
    total_by_lag: 0 among the lags. memory: what it gives to all CUs, in the same unit.
    """
    lags = np.array(sorted(total_by_lag), np.float64)
    totals = np.array([total_by_lag[int(lag)] for lag in lags])
    found = np.clip((totals - memory) / (totals[0] - memory), 0.0, 1.0)
    return float(((found[1:] + found[:-1]) / 2) @ np.diff(lags))


def _full_load(memory: dict[str, Parameter], num_cus: int) -> float:
    """Share of the fitted total that the streams of all CUs have: what the model takes for the load then."""
    cap, total, knee = (float(memory[name].value) for name in ("cu_bytes_per_ns", "hbm_bytes_per_ns", "knee"))
    if knee == 0:
        return min(1.0, cap * num_cus / total)
    return float(soft_knee(np.array([num_cus], np.float64), cap, total, knee)[0] / total)


def _signals(measured: Measurements, load: float) -> dict[str, Parameter]:
    """A word's way, and what a release adds to it, idle and beside the streams of all CUs.

    Means, as under load times have two humps: some pairs of SMs lie well to a slice of L2, others do not.
    """

    def one_way(streams: str, signal: str) -> Measured:
        slots = 0 if streams == "idle" else SLOTS
        payload = 0 if signal == "st.relaxed" else 512
        return measured.one("signal", "one_way", streams=streams, slots=slots, signal=signal, payload_bytes=payload)

    word, word_loaded = one_way("idle", "st.relaxed"), one_way(_ALL, "st.relaxed")
    add, add_loaded = one_way("idle", "red.release"), one_way(_ALL, "red.release")
    release_ns = add.mean - word.mean

    def factor(loaded_ns: float, idle_ns: float) -> float:
        # the model interpolates over the load, which is a little below 1 with all CUs streaming
        return round(1 + max(0.0, loaded_ns / idle_ns - 1) / load, 3)

    signal = Parameter(
        round(word.mean * 1000),
        word.spread * 1000,
        "measured",
        f"signal: a relaxed store, to the poll that sees it, half a round trip, idle: mean {word.mean:.0f} ns, {word}",
    )
    return {
        "signal_ps": signal,
        "signal_near_ps": signal,
        "signal_load_factor": Parameter(
            factor(word_loaded.mean, word.mean),
            word_loaded.spread / word.mean,
            "measured",
            f"signal: the same beside the streams of all SMs: mean {word_loaded.mean:.0f} ns, {word_loaded}",
        ),
        "release_ps": Parameter(
            round(release_ns * 1000),
            (add.spread + word.spread) * 1000,
            "measured",
            f"signal: red.release after 512 bytes stored: mean {add.mean:.0f} ns, {add}; less a relaxed store",
        ),
        "release_load_factor": Parameter(
            factor(add_loaded.mean - word_loaded.mean, release_ns),
            (add_loaded.spread + word_loaded.spread) / release_ns,
            "measured",
            f"signal: the same beside the streams of all SMs: mean {add_loaded.mean:.0f} ns, {add_loaded}",
        ),
    }


def _time(ns: Measured, what: str) -> Parameter:
    return Parameter(round(ns.median * 1000), ns.spread * 1000, "measured", f"{what}: {ns}")


def _rate(rate: Measured, what: str) -> Parameter:
    return Parameter(round(rate.median, 1), rate.spread, "measured", f"{what}: {rate}")
