"""`simulate` keeps every task, `evaluate` keeps none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import _native
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, resolve
from flashmoe.routing import Routing
from flashmoe.schedule import Schedule, to_schedule
from flashmoe.sim import effects, parameters
from flashmoe.sim.bounds import SAFETY, busiest_link_ps, distinct_weight_bytes, lower_bounds
from flashmoe.sim.engines import ENGINES
from flashmoe.sim.native_engine import run_layers
from flashmoe.sim.simpy_engine import Progress
from flashmoe.sim.totals import Totals
from flashmoe.tasks import TaskTable, Tiling, critical_path, native_shape
from flashmoe.trace import TIME_SHARES, Trace, memory_bytes, stamp

MODEL_VERSION = 4  # raised whenever the same inputs give other times


def simulate(
    model: MoEModel,
    *,
    routing: Routing | Sequence[Routing],
    machine: str | Path | Machine = "mi300x",
    policy: str | Policy = "static_phase",
    engine: str = "native",
    seed: int = 0,
    workers: int | None = None,
    gate: bool = True,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
    gap_us: float | None = None,
    without: Iterable[str] = (),
    pe_speed: Sequence[float] | None = None,
) -> Trace:
    """Simulate one layer, or several in a row, on every PE of a routing.

    routing: of one layer, or one a layer. machine: a preset, "host", a TOML file or a Machine. policy: a name or a
    Policy; tiling overrides its own. engine: native, or simpy, which does the same in readable Python.
    seed: of what the machine leaves to chance (its jitter, stalls and PE speeds).
    workers: per PE; all CUs of the machine by default. gate: whether the router runs inside the kernel.
    progress: called with (tasks done, all).
    gap_us: None: one persistent kernel runs all layers, and PEs drift apart; else dense compute of that time lies
    between two layers, each of which is a launch of its own. without: effects to switch off, names of sim.EFFECTS.
    pe_speed: one factor a PE, 0.9 for one that is 10 % slower.
    Returns: a Trace whose header holds the lower bounds and the headroom above the largest of them.
    Raises: ValueError naming the bad argument and the accepted ones; DeadlockError naming who waits for what.
    """
    run = _Run.of(model, routing, machine, policy, engine, seed, workers, gate, tiling, gap_us, without, pe_speed)
    tables = run.tables()
    records = ENGINES[engine](
        tables,
        run.machine,
        run.policy,
        run.num_workers,
        run.schedules(tables),
        progress,
        seed=seed,
        gap_ps=run.gap_ps,
        pe_speed=run.pe_speed,
    )
    totals = run.totals(records, tables)
    header = {
        **tables[0].header(),
        "routing": [table.routing.digest for table in tables] if len(tables) > 1 else tables[0].routing.digest,
        **stamp(),
        "executor": engine,
        "machine": run.machine.name,
        "machine_parameters": run.machine.to_dict(),
        "num_workers": run.num_workers,
        "num_domains": run.parameters.num_domains,
        "policy": run.policy.name,
        "seed": seed,
        "clock": {"unit": "ps", "resolution_ps": 1},
        "drops": 0,
        "model_version": MODEL_VERSION,
        "gap_us": gap_us,
        "without": run.without,
        "pe_speed": run.parameters.speeds.tolist(),
        **{name: getattr(totals, name) for name in ("layers", "layer_end_ps", "time_ps", "bounds_ps", "bound_ps")},
        **{name: getattr(totals, name) for name in ("headroom", "hbm_bytes", "link_bytes", "distinct_weight_bytes")},
    }
    return Trace(records=records, header=header, critical_path=critical_path(tables, records))


def evaluate(
    model: MoEModel,
    *,
    routing: Routing | Sequence[Routing],
    machine: str | Path | Machine = "mi300x",
    policy: str | Policy = "static_phase",
    engine: str = "native",
    seed: int = 0,
    workers: int | None = None,
    gate: bool = True,
    tiling: Tiling | None = None,
    gap_us: float | None = None,
    without: Iterable[str] = (),
    pe_speed: Sequence[float] | None = None,
) -> Totals:
    """Simulate as `simulate` does, with the same arguments, and keep sums instead of tasks.

    With the native engine memory stays flat, however many layers there are. Raises: as `simulate`.
    """
    run = _Run.of(model, routing, machine, policy, engine, seed, workers, gate, tiling, gap_us, without, pe_speed)
    if engine == "native" and run.policy.queue != "replay":
        return run.native_totals()
    tables = run.tables()
    options: dict[str, Any] = {"seed": seed, "gap_ps": run.gap_ps, "pe_speed": run.pe_speed}
    schedules = run.schedules(tables)
    records = ENGINES[engine](tables, run.machine, run.policy, run.num_workers, schedules, **options)
    return run.totals(records, tables)


@dataclass(frozen=True)
class _Run:
    """The arguments of a run, checked and resolved."""

    model: MoEModel
    routings: tuple[Routing, ...]
    machine: Machine
    policy: Policy
    num_workers: int
    gate: bool
    gap_ps: int | None
    without: list[str]
    pe_speed: Sequence[float] | None
    parameters: parameters.Parameters

    @classmethod
    def of(
        cls,
        model: MoEModel,
        routing: Routing | Sequence[Routing],
        machine: str | Path | Machine,
        policy: str | Policy,
        engine: str,
        seed: int,
        workers: int | None,
        gate: bool,
        tiling: Tiling | None,
        gap_us: float | None,
        without: Iterable[str],
        pe_speed: Sequence[float] | None,
    ) -> _Run:
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r} (engines: {', '.join(ENGINES)})")
        routings = (routing,) if isinstance(routing, Routing) else tuple(routing)
        if not routings:
            raise ValueError("routing=[] (must be a Routing, or one a layer)")
        ep_sizes = {one.ep_size for one in routings}
        if len(ep_sizes) > 1:
            raise ValueError(f"routings for {sorted(ep_sizes)} PEs (must be the same for all layers)")
        for one in routings:
            one.check(model)
        if gap_us is not None and not (isinstance(gap_us, int | float) and 0 <= gap_us < 1e6):
            raise ValueError(f"gap_us={gap_us!r} (must be None, or a time in 0..1e6)")
        if isinstance(without, str):
            raise ValueError(f"without={without!r} (must be a list of effects: {', '.join(effects.EFFECTS)})")
        switched_off = list(without)
        resolved_machine = effects.without(Machine.load(machine), switched_off)
        ep_size = routings[0].ep_size
        if ep_size > resolved_machine.num_pes_max:
            raise ValueError(
                f"ep_size={ep_size} (machine {resolved_machine.name!r} joins at most "
                f"{resolved_machine.num_pes_max} PEs)"
            )
        num_workers = resolved_machine.num_cus if workers is None else workers
        if not isinstance(num_workers, int | np.integer) or not 1 <= num_workers < 1 << 16:
            raise ValueError(f"workers={num_workers!r} (must be a whole number in 1..65535)")
        resolved = parameters.resolve(resolved_machine, ep_size, num_workers, seed=seed, pe_speed=pe_speed)
        return cls(
            model=model,
            routings=routings,
            machine=resolved_machine,
            policy=resolve(policy, tiling),
            num_workers=num_workers,
            gate=gate,
            gap_ps=None if gap_us is None else round(gap_us * 1e6),
            without=switched_off,
            pe_speed=pe_speed,
            parameters=resolved,
        )

    def tables(self) -> list[TaskTable]:
        return [TaskTable(self.model, routing, self.policy.tiling, gate=self.gate) for routing in self.routings]

    def schedules(self, tables: Sequence[TaskTable]) -> list[Schedule | None]:
        if self.policy.queue != "replay":
            return [None] * len(tables)
        return [to_schedule(self.policy, table, self.num_workers) for table in tables]

    def native_totals(self) -> Totals:
        shape, tiling = native_shape(self.model, self.parameters.num_pes), self.policy.tiling.native()
        layers = [_native.RoutedLayer(shape, tiling, list(routing.topk_idx), self.gate) for routing in self.routings]
        is_ranked = self.policy.rank is None
        if not is_ranked:
            for layer, table in zip(layers, self.tables(), strict=True):
                layer.ids_by_rank = [ids.tolist() for ids in self.policy.picks(table)]
        result = run_layers(
            layers, self.parameters, self.policy, gap_ps=self.gap_ps, with_bounds=True, ranked=is_ranked
        )
        if result["tasks_done"] < result["num_tasks"]:
            # say who waits for what: the same run, with its tasks
            ENGINES["native"](
                self.tables(),
                self.machine,
                self.policy,
                self.num_workers,
                seed=self.parameters.seed,
                gap_ps=self.gap_ps,
                pe_speed=self.pe_speed,
            )
        return self._totals(
            bounds_ps={name: int(bound * SAFETY) for name, bound in result["bounds_ps"].items()},
            busiest_link_ps=result["busiest_link_ps"],
            distinct_bytes=int(result["distinct_weight_bytes"]),
            **{name: result[name] for name in ("makespan_ps", "num_tasks", "layer_end_ps", "time_ps")},
            **{name: result[name] for name in ("hbm_bytes", "link_bytes")},
        )

    def totals(self, records: Any, tables: Sequence[TaskTable]) -> Totals:
        ends = [records["end_ps"][records["layer"] == layer].max(initial=0) for layer in range(len(tables))]
        return self._totals(
            makespan_ps=int(max(ends)),
            bounds_ps=lower_bounds(tables, self.parameters, self.gap_ps),
            busiest_link_ps=busiest_link_ps(tables, self.parameters),
            num_tasks=len(records),
            layer_end_ps=[int(end) for end in ends],
            hbm_bytes=int(memory_bytes(records).sum()),
            link_bytes=int(records["link_bytes"].sum()),
            distinct_bytes=int(sum(distinct_weight_bytes(table).sum() for table in tables)),
            time_ps=_time_shares(records, self.machine),
        )

    def _totals(
        self,
        *,
        makespan_ps: int,
        bounds_ps: dict[str, int],
        busiest_link_ps: float,
        num_tasks: int,
        layer_end_ps: list[int],
        hbm_bytes: int,
        link_bytes: int,
        distinct_bytes: int,
        time_ps: dict[str, int],
    ) -> Totals:
        num_pes, machine = self.parameters.num_pes, self.machine
        all_ps = num_pes * self.num_workers * makespan_ps
        shares = {**time_ps, "other": all_ps - sum(time_ps.values())}
        bound_ps = max(bounds_ps.values())
        # a slow PE's memory is slow, too; the PEs of a host share one
        speeds = self.parameters.speeds[:1] if machine.num_cores > 0 else self.parameters.speeds
        could_stream = machine.hbm_bytes_per_ns * float(speeds.sum()) * makespan_ps / 1000.0
        busy_ps = sum(shares[name] for name in ("stream", "compute", "overhead", "send"))
        return Totals(
            makespan_ps=makespan_ps,
            bounds_ps=bounds_ps,
            bound_ps=bound_ps,
            headroom=makespan_ps / bound_ps - 1.0 if bound_ps else 0.0,
            num_tasks=num_tasks,
            ep_size=num_pes,
            num_workers=self.num_workers,
            layers=len(self.routings),
            layer_end_ps=list(accumulate(layer_end_ps, max)),  # a layer without tasks ends with the one before
            hbm_bytes=hbm_bytes,
            link_bytes=link_bytes,
            distinct_weight_bytes=distinct_bytes,
            time_ps=shares,
            utilisation={
                "cu": busy_ps / all_ps if all_ps else 0.0,
                "hbm": hbm_bytes / could_stream if could_stream else 0.0,
                "link": busiest_link_ps / makespan_ps if makespan_ps else 0.0,
            },
        )


def _time_shares(records: Any, machine: Machine) -> dict[str, int]:
    """The workers' time by TIME_SHARES, without "other" [ps]."""
    rows = records[np.lexsort((records["end_ps"], records["start_ps"], records["worker"], records["pe"]))]
    follows = (np.diff(rows["pe"], prepend=-1) == 0) & (np.diff(rows["worker"], prepend=-1) == 0)
    # what ends beside the next task counts as that one's time from its end on
    turn = np.cumsum(~follows) * (rows["end_ps"].max(initial=0) + 1)
    latest_ps = np.maximum.accumulate(rows["end_ps"] + turn) - turn
    before_ps = np.where(follows, np.concatenate([[0], latest_ps[:-1]]), 0)
    start_ps = np.maximum(rows["start_ps"], before_ps)
    loaded_ps, done_ps, end_ps = (np.maximum(rows[name], start_ps) for name in ("loaded_ps", "done_ps", "end_ps"))
    after_ps = end_ps - done_ps
    send_ps = np.ceil(rows["link_bytes"] / machine.store_bytes_per_ns * 1000.0 - 1e-3).astype(np.int64)
    send_ps = np.minimum(after_ps, send_ps)
    by_share = (
        np.maximum(0, rows["ticket_ps"] - np.maximum(rows["asked_ps"], before_ps)),
        start_ps - np.minimum(start_ps, np.maximum(rows["ticket_ps"], before_ps)),
        loaded_ps - start_ps,
        done_ps - loaded_ps,
        after_ps - send_ps,
        send_ps,
    )
    return {name: int(amount.sum()) for name, amount in zip(TIME_SHARES, by_share, strict=False)}
