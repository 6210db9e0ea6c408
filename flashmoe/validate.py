"""A calibrated machine model held to a GPU: layers measured there, and the same layers simulated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.blame import Blame, blame
from flashmoe.machine import Machine
from flashmoe.measured import MeasuredLayer
from flashmoe.model import MoEModel
from flashmoe.policy import resolve
from flashmoe.routing import Routing
from flashmoe.sim import evaluate, simulate
from flashmoe.tasks import TaskTable
from flashmoe.trace import KINDS, Trace

__all__ = ["CELLS", "Cell", "KindError", "Validation", "load_cells", "measure_cells", "save_cells", "validate"]

SKEWS = ("uniform", "zipf:1.2", "hot:16")
POLICIES = ("ticket", "domain_steal", "static_phase", "expert_lpt")
CELLS = {"quick": (1, 8, 64), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256)}  # tokens

_SEEDS = 5  # of the simulated jitter

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class KindError:
    """Picks of one kind, simulated and measured: a chain counts as one. Errors in percent of the measured mean."""

    count: int
    simulated_us: float
    measured_us: float
    bias_pct: float
    mape_pct: float


@dataclass(frozen=True)
class Cell:
    """One layer: tokens, skew, policy. noise_us: standard deviation over the measured launches. blame: if asked for."""

    tokens: int
    skew: str
    policy: str
    measured_us: float
    noise_us: float
    simulated_us: float
    by_kind: dict[str, KindError]
    blame: Blame | None

    @property
    def error_pct(self) -> float:
        return 100 * (self.simulated_us / self.measured_us - 1)


@dataclass(frozen=True)
class Validation:
    """All cells, in their order."""

    cells: tuple[Cell, ...]

    @property
    def mean_error_pct(self) -> float:
        """Mean of the absolute errors of the makespans."""
        return float(np.mean([abs(cell.error_pct) for cell in self.cells]))

    @property
    def worst(self) -> Cell:
        return max(self.cells, key=lambda cell: abs(cell.error_pct))

    def by_kind(self) -> dict[str, KindError]:
        """Errors of each kind over all cells: means of the cells' means, weighted by their picks."""
        result = {}
        for kind in KINDS:
            rows = [cell.by_kind[kind] for cell in self.cells if kind in cell.by_kind]
            if not rows:
                continue
            weights = np.array([row.count for row in rows], np.float64)
            simulated, measured, mape = (
                float(np.average([getattr(row, name) for row in rows], weights=weights))
                for name in ("simulated_us", "measured_us", "mape_pct")
            )
            result[kind] = KindError(int(weights.sum()), simulated, measured, 100 * (simulated / measured - 1), mape)
        return result

    def rank_agreement(self) -> dict[tuple[int, str], float | None]:
        """Kendall's tau of the policies at each (tokens, skew), over the pairs that differ by more than the noise.

        None where no two policies do.
        """
        groups = itertools.groupby(sorted(self.cells, key=_place), key=_place)
        return {place: kendall_tau(list(cells)) for place, cells in groups}


def kendall_tau(cells: Sequence[Cell]) -> float | None:
    """Share of the pairs in the measured order less the share of the others. A pair whose measured difference is
    within twice its standard deviation has no order, and does not count; None without any other pair."""
    signs = []
    for one, other in itertools.combinations(cells, 2):
        measured_us = one.measured_us - other.measured_us
        if abs(measured_us) > 2 * np.hypot(one.noise_us, other.noise_us):
            signs.append(np.sign(measured_us * (one.simulated_us - other.simulated_us)))
    return float(np.mean(signs)) if signs else None


def validate(
    layers: Iterable[MeasuredLayer],
    machine: str | Path | Machine,
    *,
    blames: bool = True,
    progress: Progress | None = None,
) -> Validation:
    """Simulate each measured layer: same routing, tiling, policy, number of workers and of domains.

    blames: replay schedules with each other's durations, too, which takes most of the time.

    A device's clock starts at the first instruction of its first worker, so the simulated launch does, too.
    Raises: ValueError, as `simulate`, or for a layer whose trace is incomplete.
    """
    given, todo = Machine.load(machine), list(layers)
    cells = []
    for number, layer in enumerate(todo):
        cells.append(_cell(layer, given, blames))
        if progress is not None:
            progress(number + 1, len(todo))
    return Validation(tuple(cells))


def _cell(layer: MeasuredLayer, machine: Machine, blames: bool) -> Cell:
    header, table = layer.trace.header, layer.table
    simulated = simulate_as(layer, machine)
    others = [evaluate(seed=seed, **inputs_of(layer, machine)) for seed in range(1, _SEEDS)]
    makespans = [simulated.makespan_us, *(other.makespan_us for other in others)]
    return Cell(
        tokens=int(header["num_tokens"][0]),
        skew=layer.routing.name,
        policy=str(header["policy"]),
        measured_us=float(np.median(layer.makespan_us)),
        noise_us=float(np.std(layer.makespan_us, ddof=1)) if len(layer.makespan_us) > 1 else 0.0,
        simulated_us=float(np.mean(makespans)),
        by_kind=kind_errors(table, simulated, layer.trace),
        blame=blame(table, simulated, layer.trace) if blames else None,
    )


def simulate_as(layer: MeasuredLayer, machine: Machine, seed: int = 0) -> Trace:
    """The simulation of a measured launch, on the device's clock."""
    return simulate(seed=seed, **inputs_of(layer, machine))


def inputs_of(layer: MeasuredLayer, machine: Machine) -> dict[str, Any]:
    """What `simulate` and `evaluate` take for a measured launch, but for the seed."""
    header = layer.trace.header
    return {
        "model": MoEModel(**header["model"]),
        "machine": replace(machine, launch_ps=0, pe_spread=0.0, num_domains=header["num_domains"]),
        "routing": layer.routing,
        "policy": layer.policy,
        "workers": header["num_workers"],
        "gate": header["gate_inside"],
    }


def kind_errors(table: TaskTable, simulated: Trace, measured: Trace) -> dict[str, KindError]:
    """How far durations are off, by kind: of a pick, from when it has begun and has its inputs, to its end."""
    here_us, there_us = (_pick_us(table, trace) for trace in (simulated, measured))
    kinds = table.tasks["kind"][table.tasks["chain"] > 0]
    errors = {}
    for kind in np.unique(kinds).tolist():
        here, there = here_us[kinds == kind], there_us[kinds == kind]
        timed = there > 0
        mape = float(np.mean(np.abs(here - there)[timed] / there[timed])) if timed.any() else 0.0
        bias = float(here.mean() / there.mean() - 1) if timed.any() else 0.0
        errors[KINDS[kind]] = KindError(len(here), float(here.mean()), float(there.mean()), 100 * bias, 100 * mape)
    return errors


def _pick_us(table: TaskTable, trace: Trace) -> NDArray[np.float64]:
    records = trace.records[np.argsort(table.rows(trace.records))]
    heads = np.flatnonzero(table.tasks["chain"] > 0)
    last = heads + table.tasks["chain"][heads].astype(np.int64) - 1
    begin_ps = np.maximum(records["start_ps"], records["ready_ps"])[heads]
    duration_us: NDArray[np.float64] = (records["end_ps"][last] - begin_ps) / 1e6
    return duration_us


# ---- measured layers


def measure_cells(
    model: MoEModel,
    *,
    tokens: Sequence[int],
    skews: Sequence[str] = SKEWS,
    policies: Sequence[str] = POLICIES,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[MeasuredLayer]:
    """Launch every cell on the GPU, with the tiling that is tuned for its tokens. Raises: as `DeviceLayer`."""
    from flashmoe.calibrate.launches import Launch, measure_layers
    from flashmoe.hw.tuned import tuned

    launches = [
        Launch(resolve(policy, tuned(count).tiling), Routing.parse(skew, model, count, 1, seed))
        for count, skew, policy in itertools.product(tokens, skews, policies)
    ]
    return measure_layers(model, launches, repeats=repeats, seed=seed, progress=progress)


def save_cells(layers: Iterable[MeasuredLayer], folder: str | Path) -> list[Path]:
    """One file a layer, named by tokens, skew and policy."""
    paths = []
    for layer in layers:
        header = layer.trace.header
        name = f"{header['num_tokens'][0]:03d}-{layer.routing.name}-{header['policy']}.npz"
        paths.append(Path(folder) / name.replace(":", "-"))
        layer.save(paths[-1])
    return paths


def load_cells(folder: str | Path) -> list[MeasuredLayer]:
    """All measured layers of a folder, by name. Raises: ValueError naming the folder or the file."""
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder}: no measured layers (.npz files of flashmoe validate --out were expected)")
    return [MeasuredLayer.load(path) for path in paths]


def _place(cell: Cell) -> tuple[int, str]:
    return cell.tokens, cell.skew
