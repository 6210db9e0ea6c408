"""Random numbers of the model: a counter-based stream, so that a task's luck does not depend on who runs it when.

The bits of a task are a hash of (seed, layer, PE, task id), the same in `hip_src/engine/jitter.hpp`.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_QUANTILE_BITS = 12
_STALL_BITS = 32
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd
_WORD = (1 << 64) - 1


def mixed(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words, one to one.

    Source: the finaliser of SplitMix64, Steele, Lea and Flood 2014, OOPSLA.
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def task_bits(seed: int, layer: int, pe: NDArray[np.integer], task_id: NDArray[np.integer]) -> NDArray[np.uint64]:
    """(n,) uint64, the random bits of n tasks of a layer."""
    key = mixed(np.array([(seed + 1) * _GOLDEN & _WORD], np.uint64))  # + 1: zero scrambled is zero
    counter = np.uint64(layer) << np.uint64(48) | pe.astype(np.uint64) << np.uint64(32) | task_id.astype(np.uint64)
    return mixed(mixed(counter * np.uint64(_GOLDEN) + key) + key)


def quantiles(sigma: float) -> NDArray[np.float64]:
    """(4096,) float64, ascending: equally likely factors that follow a lognormal distribution of mean 1.

    sigma: standard deviation of the logarithm. A table, as exp and log may round differently from library to library.
    """
    count = 1 << _QUANTILE_BITS
    factors = np.array([math.exp(sigma * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)])
    scaled: NDArray[np.float64] = factors / factors.mean()
    return scaled


def factors(bits: NDArray[np.uint64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) float64, how much longer than usual each task takes."""
    drawn: NDArray[np.float64] = table[bits >> np.uint64(64 - _QUANTILE_BITS)]
    return drawn


def stays() -> NDArray[np.float64]:
    """(4096,) float64, ascending: equally likely values that follow an exponential distribution of mean 1."""
    count = 1 << _QUANTILE_BITS
    values = np.array([-math.log1p(-(i + 0.5) / count) for i in range(count)])
    scaled: NDArray[np.float64] = values / values.mean()
    return scaled


def stay(bits: NDArray[np.uint64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) float64, how long each task's weights have stayed in the cache; of bits that decide on nothing else."""
    drawn: NDArray[np.float64] = table[bits >> np.uint64(_STALL_BITS + 8) & np.uint64((1 << _QUANTILE_BITS) - 1)]
    return drawn


def stall_threshold(probability: float) -> int:
    """A task stalls if the lower half of its bits is below this."""
    return round(probability * (1 << _STALL_BITS))


def stalls(bits: NDArray[np.uint64], threshold: int) -> NDArray[np.bool_]:
    """(n,) bool, whether each task stalls."""
    return (bits & np.uint64((1 << _STALL_BITS) - 1)) < np.uint64(threshold)


def pe_factors(seed: int, num_pes: int, spread: float) -> list[float]:
    """Persistent speed factor of each PE, lognormal, median 1."""
    bits = task_bits(seed, 0xFFFF, np.arange(num_pes), np.full(num_pes, 0xFFFFFFFF))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
    return [math.exp(spread * NormalDist().inv_cdf(u)) for u in uniform.tolist()]
