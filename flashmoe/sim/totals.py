"""What a simulated run comes to when no task is kept: makespan, bounds, where the workers' time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all tasks, workers and PEs of a run.

    makespan_ps: launch to the end of the last task. layer_end_ps: end of each layer's last task.
    bounds_ps: lower bounds by name; bound_ps: the largest; headroom: makespan / bound - 1.
    time_ps: by TIME_SHARES, adding up to ep_size x num_workers x makespan_ps.
    utilisation: cu (share of the workers' time spent on tasks), hbm (bytes streamed over what all PEs' memory
    could), link (the least time of the busiest link or port, over the makespan); 0 to 1.
    """

    makespan_ps: int
    bounds_ps: dict[str, int]
    bound_ps: int
    headroom: float
    num_tasks: int
    ep_size: int
    num_workers: int
    layers: int
    layer_end_ps: list[int]
    hbm_bytes: int
    link_bytes: int
    distinct_weight_bytes: int
    time_ps: dict[str, int]
    utilisation: dict[str, float]

    @property
    def makespan_us(self) -> float:
        return self.makespan_ps / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Flat and ready for JSON; bounds, times and utilisation as bound_hbm_ps, time_ticket_ps, hbm_utilisation."""
        plain = ("makespan_ps", "bound_ps", "headroom", "num_tasks", "ep_size", "num_workers", "layers")
        sizes = ("hbm_bytes", "link_bytes", "distinct_weight_bytes")
        return {
            **{name: getattr(self, name) for name in (*plain, *sizes)},
            "makespan_us": self.makespan_us,
            **{f"bound_{name}_ps": value for name, value in self.bounds_ps.items()},
            **{f"time_{name}_ps": value for name, value in self.time_ps.items()},
            **{f"{name}_utilisation": value for name, value in self.utilisation.items()},
        }
