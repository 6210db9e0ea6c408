"""Graphs of tasks with lengths, as tables, and what schedulers of a few lines make of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sim.oracles.stations import unit_machine
from sim.tables import HandTable, run_engine


@dataclass(frozen=True)
class Graph:
    """lengths_ps: of each task. before: the tasks that each one waits for, all of them earlier in the list."""

    lengths_ps: list[int]
    before: list[list[int]]

    @classmethod
    def independent(cls, lengths_ps: Sequence[int]) -> Graph:
        return cls(list(lengths_ps), [[] for _ in lengths_ps])

    @classmethod
    def random(cls, rng: np.random.Generator, num_tasks: int, most_before: int = 3) -> Graph:
        lengths_ps = rng.integers(1, 1_000_000, num_tasks).tolist()
        before = [
            sorted(
                {int(rng.integers(max(0, task - 12), task)) for _ in range(rng.integers(0, most_before + 1)) if task}
            )
            for task in range(num_tasks)
        ]
        return cls(lengths_ps, before)

    @property
    def work_ps(self) -> int:
        return sum(self.lengths_ps)

    @property
    def critical_path_ps(self) -> int:
        ends: list[int] = []
        for length_ps, before in zip(self.lengths_ps, self.before, strict=True):
            ends.append(length_ps + max((ends[task] for task in before), default=0))
        return max(ends)

    def bound_ps(self, num_workers: int) -> float:
        """No schedule is shorter."""
        return max(self.work_ps / num_workers, self.critical_path_ps)

    def run(self, engine: str, num_workers: int, lists: Any = None, num_domains: int = 1, **policy: Any) -> list[int]:
        """When each task ends [ps] on an engine, on a machine where nothing but the tasks takes time."""
        table = HandTable()
        ended = [table.event("gated") for _ in self.lengths_ps]
        for task, (length_ps, before) in enumerate(zip(self.lengths_ps, self.before, strict=True)):
            table.task("gate", flops=length_ps, waits=[ended[other] for other in before], signals=[ended[task]])
        machine = unit_machine(num_cus=num_workers, num_domains=num_domains)
        records = run_engine(engine, table, machine, num_workers, None if lists is None else [lists], **policy)
        return records["end_ps"].tolist()  # type: ignore[no-any-return]


def in_ticket_order(graph: Graph, num_workers: int) -> list[int]:
    """Ends: whoever is free first takes the next task of the list, and waits for what it needs."""
    free, ends = [0] * num_workers, []
    for length_ps, before in zip(graph.lengths_ps, graph.before, strict=True):
        ends.append(max([heapq.heappop(free), *(ends[task] for task in before)]) + length_ps)
        heapq.heappush(free, ends[-1])
    return ends


def in_ready_order(graph: Graph, num_workers: int) -> list[int]:
    """Ends: whoever is free first takes the task that has been ready for longest."""
    after: list[list[int]] = [[] for _ in graph.before]
    for task, before in enumerate(graph.before):
        for other in before:
            after[other].append(task)
    missing = [len(before) for before in graph.before]
    ready = [(0, task) for task, count in enumerate(missing) if count == 0]
    free, ends = [0] * num_workers, [0] * len(missing)
    while ready:
        ready_ps, task = heapq.heappop(ready)
        ends[task] = max(ready_ps, heapq.heappop(free)) + graph.lengths_ps[task]
        heapq.heappush(free, ends[task])
        for other in after[task]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, (max(ends[one] for one in graph.before[other]), other))
    return ends


def in_fixed_order(graph: Graph, num_workers: int) -> list[int]:
    """Ends: worker w runs tasks w, w + W, ..."""
    ends: list[int] = []
    for task, (length_ps, before) in enumerate(zip(graph.lengths_ps, graph.before, strict=True)):
        previous = [task - num_workers] if task >= num_workers else []
        ends.append(max([0, *(ends[other] for other in before + previous)]) + length_ps)
    return ends


def with_stealing(graph: Graph, num_workers: int, num_domains: int) -> list[int]:
    """Ends of independent tasks: domain d has tasks d, d + D, ...; a worker takes from its own, then the next one's."""
    queues = [list(range(domain, len(graph.lengths_ps), num_domains))[::-1] for domain in range(num_domains)]
    free, ends = [(0, worker) for worker in range(num_workers)], [0] * len(graph.lengths_ps)
    while any(queues):
        now, worker = heapq.heappop(free)
        own = worker % num_domains
        task = next(queue for queue in queues[own:] + queues[:own] if queue).pop()
        ends[task] = now + graph.lengths_ps[task]
        heapq.heappush(free, (ends[task], worker))
    return ends


def shortest_makespan_ps(lengths_ps: Sequence[int], num_workers: int) -> int:
    """Of independent tasks, by trying everything."""
    loads = {(0,) * num_workers}
    for length_ps in lengths_ps:
        loads = {
            tuple(sorted([*load[:worker], load[worker] + length_ps, *load[worker + 1 :]]))
            for load in loads
            for worker in range(num_workers)
        }
    return min(load[-1] for load in loads)
