"""Simulated runs: how long a schedule takes on a machine that need not be at hand, and why."""

from flashmoe.sim.bounds import lower_bounds
from flashmoe.sim.deadlock import DeadlockError
from flashmoe.sim.effects import EFFECTS
from flashmoe.sim.engines import ENGINES
from flashmoe.sim.run import MODEL_VERSION, evaluate, simulate
from flashmoe.sim.totals import Totals
from flashmoe.trace import TIME_SHARES

__all__ = [
    "EFFECTS",
    "ENGINES",
    "MODEL_VERSION",
    "TIME_SHARES",
    "DeadlockError",
    "Totals",
    "evaluate",
    "lower_bounds",
    "simulate",
]
