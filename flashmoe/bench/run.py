"""The benchmark itself: for each number of tokens the read ceiling, flashmoe and its peers, one after the other."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashmoe.bench.inputs import Cell, WeightSets, make_cell, num_weight_sets
from flashmoe.bench.ours import PackedSets, ReadKernels, as_forward, policy_variants
from flashmoe.bench.peers import PEERS, Forward
from flashmoe.bench.result import OURS, READ, How, Measurement, Missing, Result, whole
from flashmoe.bench.timing import Graph, Layer, check_and_time, run_once, time_graphs
from flashmoe.hw import DeviceLayer, LaunchError
from flashmoe.model import MoEModel
from flashmoe.trace import stamp

Progress = Callable[[int, int], None]  # called with (done, all)


@torch.no_grad()
def bench(
    model: MoEModel,
    tokens: Sequence[int],
    routings: Sequence[str],
    policies: Sequence[str],
    peers: Sequence[str],
    *,
    num_layers: int,
    num_sets: int | None = None,
    repeats: int,
    seed: int,
    progress: Progress,
) -> Result:
    """Measure on the current CUDA device. policies: beside "tuned", which is always measured, and first.
    num_sets: weight sets that the layers take in turn; None: `num_weight_sets`.

    Raises: ValueError for a routing or policy that does not exist; what `DeviceLayer` raises.
    """
    variants = policy_variants([name for name in policies if name != "tuned"])
    sets = WeightSets(model, num_sets or num_weight_sets(model), "cuda", seed)
    cells = [make_cell(model, sets, n, routing, num_layers, seed) for routing in routings for n in tokens]
    run = _Run(model, sets, repeats, progress, len(cells) * (1 + len(peers) + len(variants)))
    header = _header(model, sets, num_layers, repeats, seed)

    packed, reads = PackedSets(model, sets), ReadKernels(model, sets.all)
    ours = packed.layers("tuned", max(tokens))
    theirs = {name: made for name in peers if (made := run.make_peer(name)) is not None}
    for cell in cells:
        run.measure_reads(cell, reads)
        run.measure_ours(cell, ours)
        for name, forwards in theirs.items():
            run.measure_peer(cell, name, forwards)
    header |= {"clocks_at_the_end": _clocks()}
    for variant in variants:
        for cell in cells:
            run.measure_policy(cell, variant, packed)
    return Result(header, run.measurements, run.missing)


class _Run:
    def __init__(self, model: MoEModel, sets: WeightSets, repeats: int, progress: Progress, num_steps: int) -> None:
        self.model, self.sets, self.repeats = model, sets, repeats
        self.measurements: list[Measurement] = []
        self.missing: list[Missing] = []
        self._progress, self._steps, self._num_steps = progress, 0, num_steps

    def make_peer(self, name: str) -> list[Forward] | None:
        """One for each weight set; None, with the reason among the missing, when the peer cannot be had."""
        try:
            return [PEERS[name](self.model, weights) for weights in self.sets.layers]
        except Exception as error:  # a peer may fail in any way; that must not cost the other numbers
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            self._miss(name, None, "not installed" if absent else _line(error))
            return None

    def measure_reads(self, cell: Cell, reads: ReadKernels) -> None:
        num_bytes = [self.model.expert_bytes * distinct for distinct in cell.distinct]
        for variant, name in enumerate(reads.names):
            graph = Graph(reads.layers(variant, num_bytes))
            self._add(cell, READ, "read", name, **asdict(time_graphs([graph], self.repeats)))

    def measure_ours(self, cell: Cell, layers: Sequence[DeviceLayer]) -> None:
        """ "tuned": the whole layer, also with a graph for each layer, and with the routing given.

        Raises: LaunchError when a launch cannot go on.
        """
        for how in _ways(cell.routing):
            self._measure_layers(cell, "tuned", how, layers, alone=how == whole(cell.routing))
        self._step()

    def measure_policy(self, cell: Cell, variant: str, packed: PackedSets) -> None:
        try:
            self._measure_layers(cell, variant, whole(cell.routing), packed.layers(variant, cell.tokens))
        except (ValueError, LaunchError) as error:  # no kernel can do it, or not in time
            self._miss(f"{OURS} {variant}", cell.tokens, _line(error))
        self._step()

    def _measure_layers(
        self, cell: Cell, variant: str, how: How, layers: Sequence[DeviceLayer], *, alone: bool = False
    ) -> None:
        launches = _launches(cell, [as_forward(layer) for layer in layers], how)
        run_once(launches)
        for layer in layers:
            layer.check()  # else a layer that hangs would hang in every replay, until its deadline
        kernel = layers[0].kernel_name(cell.tokens)
        graphs = {how: [Graph(launches)]}
        if alone:
            graphs["alone"] = [Graph([launch]) for launch in launches]
        for told, replayed in graphs.items():
            checked = check_and_time(replayed, cell.layers, self.repeats)
            self._add(cell, OURS, told, variant, **asdict(checked), kernel=kernel)

    def measure_peer(self, cell: Cell, name: str, forwards: Sequence[Forward]) -> None:
        try:
            for how in _ways(cell.routing):
                launches = _launches(cell, forwards, how)
                run_once(launches)
                checked = check_and_time([Graph(launches)], cell.layers, self.repeats)
                self._add(cell, name, how, "", **asdict(checked))
        except Exception as error:  # as in make_peer
            self._miss(name, cell.tokens, _line(error))
        self._step()

    def _add(self, cell: Cell, who: str, how: How, variant: str, **measured: Any) -> None:
        distinct = sum(cell.distinct) / len(cell.distinct)
        self.measurements.append(
            Measurement(
                tokens=cell.tokens,
                routing=cell.routing,
                who=who,
                how=how,
                variant=variant,
                distinct_experts=distinct,
                weight_bytes=distinct * self.model.expert_bytes,
                **measured,
            )
        )

    def _miss(self, who: str, tokens: int | None, reason: str) -> None:
        self.missing.append(Missing(who=who, tokens=tokens, reason=reason))

    def _step(self) -> None:
        self._steps += 1
        self._progress(self._steps, self._num_steps)


def _ways(routing: str) -> list[How]:
    return list(dict.fromkeys((whole(routing), "given")))


def _launches(cell: Cell, forwards: Sequence[Forward], how: How) -> list[Layer]:
    """The layers of the graph; the weight sets take turns."""
    launches: list[Layer] = []
    for number, layer in enumerate(cell.layers):
        given = (layer.topk_idx, layer.topk_weights) if how == "given" else ()
        launches.append(partial(forwards[number % len(forwards)], layer.x, *given))
    return launches


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _header(model: MoEModel, sets: WeightSets, num_layers: int, repeats: int, seed: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(sets.all.device)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": _commit()}
    return {
        **stamp(),
        "device": properties.name,
        "num_cus": properties.multi_processor_count,
        "clocks": _clocks(),
        **versions,
        "model": model.to_dict(),
        "num_layers": num_layers,
        "repeats": repeats,
        "seed": seed,
        "weight_sets": len(sets.layers),
        "weight_sets_bytes": sets.all.nbytes,
        "empty_graph_us": _empty_graph_us(repeats),
    }


def _empty_graph_us(repeats: int) -> float:
    """A graph with the smallest of kernels: what a time "alone" has in it besides the layer."""
    one = torch.zeros(1, device="cuda")
    return time_graphs([Graph([one.zero_])], repeats).median_us


_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def _clocks() -> dict[str, str]:
    """In nvidia-smi's words: MHz, W, °C; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties('cuda').uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def _commit() -> str | None:
    """Of the source tree, with "+" when it has changes; None when this file is in no repository."""
    if shutil.which("git") is None:
        return None
    # an installed copy may lie in a folder of somebody else's repository
    for command in (["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--abbrev=40", "--dirty=+"]):
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None
    return done.stdout.strip()
