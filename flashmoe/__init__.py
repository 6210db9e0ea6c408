"""Research on fused mixture-of-experts kernels: one task graph, simulated on machines at hand or not, and run."""

from importlib import metadata

from flashmoe.compare import compare
from flashmoe.hw import Layer, run
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, policy
from flashmoe.routing import Routing
from flashmoe.sim import simulate
from flashmoe.tasks import TaskTable, Tiling
from flashmoe.trace import Trace
from flashmoe.weights import Weights

__version__ = metadata.version("flashmoe")

__all__ = [
    "Layer",
    "Machine",
    "MoEModel",
    "Policy",
    "Routing",
    "TaskTable",
    "Tiling",
    "Trace",
    "Weights",
    "compare",
    "policy",
    "run",
    "simulate",
]
