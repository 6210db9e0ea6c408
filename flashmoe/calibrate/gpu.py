"""A GPU as a machine: microbenchmarks and launches of single tasks on the card, turned into a machine file."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashmoe.calibrate.device import Parameter, device_parameters
from flashmoe.calibrate.launches import Launch, measure_layers
from flashmoe.calibrate.measurements import Measurements
from flashmoe.calibrate.single_tasks import bare_machine, single_task_parameters
from flashmoe.hw.build import build_microbenchmarks
from flashmoe.hw.driver import DeviceError
from flashmoe.hw.tuned import tuned
from flashmoe.machine import Machine, Origin, parameter_units
from flashmoe.measured import MeasuredLayer
from flashmoe.model import MoEModel
from flashmoe.policy import resolve
from flashmoe.routing import Routing

# By tokens: as few as there are, as many as go as words, as lists, so many that lists take time; and full blocks.
ROUTINGS = {1: "uniform", 4: "uniform", 8: "uniform", 16: "uniform", 64: "uniform", 128: "hot:16", 256: "uniform"}

# Again, with a policy for which experts have to be sorted.
SORTED_TOKENS = (1, 8, 64)

# With all workers, for what a layer opens with: every tiling that is tuned for so many tokens, and all of few.
OPENING_TOKENS, OPENING_ROUTINGS = (1, 2, 4, 8, 16, 32, 64, 128, 256), ("uniform", "hot:16")

_LIMIT_S = 100.0

Tell = Callable[[str], None]


def measure_device(folder: str | Path, *, tell: Tell | None = None) -> Measurements:
    """Run the microbenchmarks. folder: for calibrate.json and tables, made unless there. tell: gets a line a step.

    Raises: BuildError without a compiler; DeviceError when the card is missing, of another kind, or too slow.
    """
    program = build_microbenchmarks(progress=tell)
    if tell is not None:
        tell("microbenchmarks")
    Path(folder).mkdir(exist_ok=True)
    command = [str(program), "--out", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"microbenchmarks took over {_LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise DeviceError(f"microbenchmarks: {lines[-1]}")
    return Measurements.load(Path(folder) / "calibrate.json")


def measure_single_tasks(model: MoEModel, *, repeats: int = 3, seed: int = 0) -> list[MeasuredLayer]:
    """Launch layers with one worker, and openings with all. Raises: as `DeviceLayer`."""
    launches = []
    for tokens, routing in ROUTINGS.items():
        policy = resolve("static_phase", tuned(tokens).tiling)
        launches.append(Launch(policy, Routing.parse(routing, model, tokens, 1, seed), workers=1))
    for tokens in SORTED_TOKENS:
        policy = resolve("expert_lpt", tuned(tokens).tiling)
        launches.append(Launch(policy, Routing.parse(ROUTINGS[tokens], model, tokens, 1, seed), workers=1))
    for tokens, routing in itertools.product(OPENING_TOKENS, OPENING_ROUTINGS):
        policy = resolve("static_phase", tuned(tokens).tiling)
        launches.append(Launch(policy, Routing.parse(routing, model, tokens, 1, seed + 1)))
    return measure_layers(model, launches, repeats=repeats, seed=seed)


def gpu_machine(
    name: str, base: str | Machine, measured: Measurements, single_tasks: Sequence[MeasuredLayer]
) -> tuple[Machine, dict[str, Parameter]]:
    """The machine that was measured; what was not keeps the base's value and origin.

    Returns: the machine, and of each parameter that was measured value, spread and source.
    """
    there = Machine.load(base)
    found = device_parameters(measured)
    found["num_cus"] = Parameter(int(measured.about["sms"]), 0.0, "measured", "SMs that the driver tells")
    machine = _with(there, found)
    if single_tasks:
        tasks = single_task_parameters(single_tasks, bare_machine(machine, measured))
        machine = _with(machine, tasks)
        found |= tasks
    return _described(machine, name, measured.about, found), found


def _with(machine: Machine, found: Mapping[str, Parameter]) -> Machine:
    values: dict[str, Any] = {key: parameter.value for key, parameter in found.items()}
    return replace(machine, **values)


def _described(machine: Machine, name: str, about: Mapping[str, str], found: Mapping[str, Parameter]) -> Machine:
    units, day = parameter_units(), datetime.now(UTC).date().isoformat()
    origins = dict(machine.origins) | {
        key: Origin(units[key], parameter.origin, f"{day}: {parameter.source}") for key, parameter in found.items()
    }
    description = f"{about['device']}, {about['sms']} CUs, calibrated {day}, CUDA driver {about['cuda_driver']}"
    return replace(machine, name=name, description=description, origins=origins)


def calibrate_gpu(
    name: str, base: str | Machine, model: MoEModel, *, folder: str | Path | None = None, tell: Tell | None = None
) -> tuple[Machine, dict[str, Parameter]]:
    """Measure the card of this machine. folder: keeps what was measured: calibrate.json, tables, launches.

    Raises: as `measure_device` and `measure_single_tasks`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(folder or scratch)
        measured = measure_device(kept, tell=tell)
        if tell is not None:
            tell("launches of single tasks")
        layers = measure_single_tasks(model)
        for layer in layers if folder is not None else ():
            layer.save(kept / _file_name(layer))
        return gpu_machine(name, base, measured, layers)


def _file_name(layer: MeasuredLayer) -> str:
    tokens = f"{layer.trace.header['num_tokens'][0]:03d}"
    if layer.trace.num_workers > 1:
        return f"opening-{tokens}-{layer.routing.name.replace(':', '-')}.npz"
    return f"single-tasks-{tokens}{'-sorted' if layer.policy.sorts_experts(1) else ''}.npz"


def load_measured(folder: str | Path) -> tuple[Measurements, list[MeasuredLayer]]:
    """What `calibrate_gpu` has kept. Raises: ValueError naming the file that is not there or is something else."""
    layers = [MeasuredLayer.load(path) for path in sorted(Path(folder).glob("*.npz"))]
    return Measurements.load(Path(folder) / "calibrate.json"), layers
