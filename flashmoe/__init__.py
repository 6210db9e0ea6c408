"""Research on fused mixture-of-experts kernels: one task graph, simulated on machines at hand or not, and run."""

from importlib import metadata

try:
    from flashmoe import _native as _native
except ImportError as error:
    raise ImportError(
        "flashmoe's native module is not built in this source tree: pip install -e . builds it here; "
        "after a plain pip install ., start Python in another folder"
    ) from error

from flashmoe.compare import compare
from flashmoe.hw import Layer, run
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.placement import Placement
from flashmoe.policy import Policy, policy, schedule
from flashmoe.routing import Routing
from flashmoe.sim import evaluate, simulate
from flashmoe.sweep import sweep
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import Trace
from flashmoe.tune import tune
from flashmoe.weights import Weights

__version__ = metadata.version("flashmoe")

__all__ = [
    "Layer",
    "Machine",
    "MoEModel",
    "Placement",
    "Policy",
    "Routing",
    "TaskTable",
    "Tiling",
    "Trace",
    "Weights",
    "compare",
    "evaluate",
    "policy",
    "run",
    "schedule",
    "simulate",
    "sweep",
    "tune",
]
