"""Queueing theory in closed form. Any unit of time; a rate is one over it.

Source: Kleinrock 1975, Queueing Systems, volume 1, unless a function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom


def erlang_c(num_servers: int, offered: float) -> float:
    """Probability that a customer of M/M/c has to wait. offered: arrival rate over one server's rate."""
    terms = [offered**n / math.factorial(n) for n in range(num_servers)]
    waiting = offered**num_servers / math.factorial(num_servers) * num_servers / (num_servers - offered)
    return waiting / (sum(terms) + waiting)


def mean_wait(arrival_rate: float, mean: float, second_moment: float) -> float:
    """Mean wait in M/G/1, first come first served, from the moments of the service time: Pollaczek, Khinchine."""
    return arrival_rate * second_moment / (2 * (1 - arrival_rate * mean))


def birth_death(
    birth: Callable[[int], float], death: Callable[[int], float], num_states: int = 400
) -> NDArray[np.float64]:
    """Stationary probability of each state. birth: rate from n to n + 1; death: from n to n - 1."""
    odds = np.cumprod([1.0] + [birth(n) / death(n + 1) for n in range(num_states - 1)])
    return odds / odds.sum()


def closed_deterministic_throughput(population: int, think: float, service: float) -> float:
    """Throughput of M/D/1//N: N customers think (exponential), then queue for a constant service.

    The number left behind at the end of a service is a Markov chain: during a service each of the thinkers comes
    back with probability 1 - exp(-service / think). Source:
    Takács 1962, Introduction to the Theory of Queues, chapter 5.
    """
    comes_back = -math.expm1(-service / think)
    states = np.arange(population)  # left behind: 0 to N - 1
    chain = np.zeros((population, population))
    for left in states:
        served = max(left, 1)  # nobody left: wait for the first one to come back
        arriving = np.arange(population - served + 1)
        chain[left, served - 1 + arriving] = binom.pmf(arriving, population - served, comes_back)
    equations = np.vstack([chain.T - np.eye(population), np.ones(population)])
    stationary = np.linalg.lstsq(equations, np.r_[np.zeros(population), 1.0], rcond=None)[0]
    idle = stationary[0] * think / population
    return float(1 / (service + idle))
