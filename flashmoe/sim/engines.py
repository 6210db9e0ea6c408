"""The two engines under one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.machine import Machine
from flashmoe.policy import Policy
from flashmoe.sim.native_engine import run_native
from flashmoe.sim.parameters import resolve
from flashmoe.sim.simpy_engine import Progress, Schedule, run_simpy
from flashmoe.tasks import TaskTable

Engine = Callable[..., NDArray[np.void]]


def _engine(run: Any) -> Engine:
    def run_tables(
        tables: TaskTable | Sequence[TaskTable],
        machine: Machine,
        policy: Policy,
        num_workers: int,
        schedules: Any = None,
        progress: Progress | None = None,
        *,
        seed: int = 0,
        gap_ps: int | None = None,
        pe_speed: Sequence[float] | None = None,
    ) -> NDArray[np.void]:
        """Run layers, one after the other, or a single one.

        tables: one, or one a layer. schedules: likewise, for queue="replay": per PE and worker the ids of the picks.
        num_workers: per PE. seed: of the jitter. gap_ps: dense compute between layers, each of which is then a launch
        of its own; None: one launch runs them all. pe_speed: one factor a PE.
        Returns: the records, TRACE_DTYPE, by layer and then in its table's order.
        Raises: DeadlockError; ValueError for an unknown queue or a schedule for another number of workers.
        """
        layers: list[Any] = list(tables) if isinstance(tables, list | tuple) else [tables]
        per_layer: list[Schedule | None] = [schedules]
        if isinstance(tables, list | tuple):
            per_layer = [None] * len(layers) if schedules is None else list(schedules)
        parameters = resolve(machine, layers[0].num_pes, num_workers, seed=seed, pe_speed=pe_speed)
        return run(layers, parameters, policy, per_layer, gap_ps=gap_ps, progress=progress)  # type: ignore[no-any-return]

    return run_tables


ENGINES: dict[str, Engine] = {"native": _engine(run_native), "simpy": _engine(run_simpy)}
