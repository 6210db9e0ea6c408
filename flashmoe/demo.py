"""What `flashmoe demo` does: a layer simulated on eight GPUs, one computed on CPU threads, and the two compared.

Each step is a function that returns its results; printing is the command line's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe import reference
from flashmoe.calibrate import host_machine, num_cores
from flashmoe.chrome import write_chrome
from flashmoe.compare import Comparison, compare
from flashmoe.hw import Layer, RunResult
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import resolve
from flashmoe.routing import Routing
from flashmoe.sim import simulate
from flashmoe.trace import KINDS, Trace
from flashmoe.weights import Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POLICIES = ("ancestor", "push", "ticket", "domain_steal", "static_phase", "expert_lpt", "local_first")
MACHINE = "mi300x"
NUM_TOKENS = 8  # per PE, in both halves of the demo
NUM_RUNS = 5  # of the measured layer: their spread is the noise floor
HELD_UP = 10  # a task that takes this many times the median of its kind had its core taken away

# Qwen3-30B-A3B's layer at a quarter of its width, and half its experts: 38 MB of weights.
SMALL = MoEModel(d_model=512, d_ff=192, num_experts=64, top_k=8, name="qwen3-quarter")

Array = NDArray[Any]
Progress = Callable[[int, int], None]


# ---- 1: a Qwen3-30B-A3B layer on eight simulated MI300X


@dataclass(frozen=True, eq=False)
class Simulated:
    """One layer under several policies, on one machine and one routing. traces: by policy."""

    routing: Routing
    machine: Machine
    traces: dict[str, Trace]

    @property
    def best(self) -> str:
        return min(self.traces, key=lambda name: self.traces[name].makespan_ps)

    @property
    def worst(self) -> str:
        return max(self.traces, key=lambda name: self.traces[name].makespan_ps)


def simulate_policies(progress: Progress | None = None) -> Simulated:
    """Simulate all POLICIES. progress: called with (policies done, all)."""
    model, machine = MoEModel.preset("qwen3-30b-a3b"), Machine.preset(MACHINE)
    routing = Routing.zipf(model, NUM_TOKENS, machine.num_pes_max, seed=0, exponent=1.0)
    traces = {}
    for name in POLICIES:
        traces[name] = simulate(model, machine=machine, routing=routing, policy=name)
        if progress:
            progress(len(traces), len(POLICIES))
    return Simulated(routing, machine, traces)


# ---- 2: the same kind of layer, for real


@dataclass(frozen=True, eq=False)
class Computed:
    """One run: outputs_hash are hex digits that tell its output bits from others'."""

    policy: str
    workers: int
    result: RunResult
    relative_error: float
    outputs_hash: str

    @property
    def own_tiling(self) -> bool:
        """Whether the policy cuts the layer in another way than most, so that sums may round differently."""
        return resolve(self.policy).tiling != resolve("ticket").tiling


@dataclass(frozen=True, eq=False)
class Small:
    """The small layer's weights and tokens (for two PEs), and the runs of it."""

    weights: Weights
    x: list[Array]
    runs: list[Computed]

    @property
    def same_bits(self) -> bool:
        """Whether all runs with the common tiling gave the same output, bit by bit."""
        return len({run.outputs_hash for run in self.runs if not run.own_tiling}) == 1

    @property
    def all_same_bits(self) -> bool:
        """Whether the runs with a tiling of their own gave that output, too."""
        return len({run.outputs_hash for run in self.runs}) == 1


def compute_policies() -> Small:
    """Run the small layer under all POLICIES with two workers a PE, then with one and with four."""
    weights = Weights.random(SMALL)
    streams = np.random.SeedSequence(0).spawn(2)
    x: list[Array] = [
        np.random.default_rng(stream).standard_normal((NUM_TOKENS, SMALL.d_model)).astype(SMALL.numpy_dtype)
        for stream in streams
    ]
    cases = [(name, 2) for name in POLICIES] + [("ticket", 1), ("ticket", 4)]
    return Small(weights, x, [_compute(weights, x, name, workers) for name, workers in cases])


def _compute(weights: Weights, x: list[Array], policy: str, workers: int) -> Computed:
    layer = Layer(SMALL, weights, ep_size=len(x), max_tokens=NUM_TOKENS, workers=workers, policy=policy)
    layer(x)  # the first launch pays for page faults
    result = layer(x)
    pairs = zip(x, result.routing.topk_idx, result.routing.topk_weights, strict=True)
    wanted = [reference.moe_layer(SMALL, weights, rows, (idx, scales)) for rows, idx, scales in pairs]
    digest = hashlib.sha256(b"".join(rows.tobytes() for rows in result.outputs)).hexdigest()
    return Computed(policy, workers, result, reference.relative_error(result.outputs, wanted), digest[:8])


@dataclass(frozen=True)
class TransformersCheck:
    """relative_error: of our outputs against Qwen3MoeSparseMoeBlock. num_other_tokens: tokens for which its router
    chose other experts; if there are any, its experts were given our routing."""

    version: str
    relative_error: float
    num_other_tokens: int


def check_transformers(small: Small) -> TransformersCheck | None:
    """Compute the small layer with transformers' own block; None when it or torch is not installed."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None
    import torch
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=SMALL.d_model,
        moe_intermediate_size=SMALL.d_ff,
        num_experts=SMALL.num_experts,
        num_experts_per_tok=SMALL.top_k,
        norm_topk_prob=SMALL.norm_topk_prob,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"  # the plain loop over experts

    def tensor(array: Array) -> Any:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)

    block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
    weights = small.weights
    with torch.no_grad():
        block.gate.weight.copy_(tensor(weights.gate))
        block.experts.gate_up_proj.copy_(tensor(weights.gate_up))
        block.experts.down_proj.copy_(tensor(weights.down))
        used = small.runs[0].result.routing
        x = torch.cat([tensor(rows) for rows in small.x])
        ours = torch.from_numpy(np.concatenate(used.topk_idx)).long()
        theirs = block.gate(x)[2]
        # Two logits that round to the same bf16 at the edge of the top k may be taken in either order.
        others = (ours.sort(dim=1).values != theirs.sort(dim=1).values).any(dim=1)
        if others.any():
            scales = torch.from_numpy(np.concatenate(used.topk_weights)).to(x.dtype)
            wanted = block.experts(x, ours, scales)
        else:
            wanted = block(x[None])[0]
    outputs = np.concatenate(small.runs[0].result.outputs).astype(np.float32)
    return TransformersCheck(
        version=transformers.__version__,
        relative_error=reference.relative_error(outputs, wanted.float().numpy()),
        num_other_tokens=int(others.sum()),
    )


# ---- 3: the host as a machine, and the small layer simulated on it


@dataclass(frozen=True, eq=False)
class Hosted:
    """makespans_us: of the measured runs, in order. measured: the median one; simulated: its prediction.

    kind_means_us: {kind: mean time of its tasks in each measured run}.
    held_up_us: times of the tasks of `measured` that took HELD_UP times the median of their kind, and over 100 us.
    """

    machine: Machine
    simulated: Trace
    measured: Trace
    makespans_us: list[float]
    kind_means_us: dict[str, list[float]]
    held_up_us: list[float]
    comparison: Comparison


def compare_with_host(small: Small) -> Hosted:
    """Fit this host, measure the small layer NUM_RUNS times, simulate it with the gate's routing, and compare.

    One thread a core where there are two or more: with more, the operating system takes turns with them, and a
    task's time says more about it than about the task.
    """
    machine = host_machine()
    workers = max(1, num_cores() // len(small.x))
    layer = Layer(SMALL, small.weights, ep_size=len(small.x), max_tokens=NUM_TOKENS, workers=workers)
    layer(small.x)  # the first launch pays for page faults
    results = [layer(small.x) for _ in range(NUM_RUNS)]
    by_makespan = sorted(results, key=lambda result: result.trace.makespan_ps)
    median = by_makespan[NUM_RUNS // 2]
    simulated = simulate(SMALL, machine=machine, routing=median.routing, policy=layer.policy, workers=workers)
    return Hosted(
        machine=machine,
        simulated=simulated,
        measured=median.trace,
        makespans_us=[result.trace.makespan_us for result in results],
        kind_means_us=_kind_means_us([result.trace for result in results]),
        held_up_us=_held_up_us(median.trace),
        comparison=compare(simulated, median.trace),
    )


def _kind_means_us(traces: list[Trace]) -> dict[str, list[float]]:
    present = [kind for kind in KINDS if (traces[0].kind_names == kind).any()]
    return {
        kind: [float(trace.duration_ps[trace.kind_names == kind].mean()) / 1e6 for trace in traces] for kind in present
    }


def _held_up_us(trace: Trace) -> list[float]:
    times: list[float] = []
    for kind in KINDS:
        us = trace.duration_ps[trace.kind_names == kind] / 1e6
        if len(us):
            times += us[(us > HELD_UP * np.median(us)) & (us > 100)].tolist()
    return times


# ---- 4: files


def write_files(folder: Path, simulated: Simulated, hosted: Hosted, progress: Progress | None = None) -> dict[str, str]:
    """Write traces, Chrome JSON and figures into a folder that exists. Returns {file name: what it shows}."""
    from flashmoe import plots

    best, ancestor = simulated.best, "ancestor"
    written: dict[str, str] = {}

    def note(name: str, what: str) -> Path:
        if progress:
            progress(len(written), 10)
        written[name] = what
        return folder / name

    def draw(name: str, what: str, figure: Any) -> None:
        figure.savefig(note(name, what), dpi=130)

    draw("policies.png", "makespan of each policy beside what no schedule beats", figure_policies(simulated))
    for policy in dict.fromkeys((best, ancestor)):
        trace = simulated.traces[policy]
        draw(
            f"mi300x-{policy}.png",
            f"all {trace.num_pes * trace.num_workers} workers over time under {policy}",
            plots.figure_overview(trace, ceiling_bytes_per_ns=simulated.machine.hbm_bytes_per_ns),
        )
    draw(
        "host-mirrored.png",
        "the small layer: simulated above, measured below, on one time axis",
        plots.figure_mirrored(hosted.simulated, hosted.measured),
    )
    draw("host-tasks.png", "each task's time, simulated against measured", figure_tasks(hosted.comparison))
    for policy in dict.fromkeys((best, ancestor)):
        simulated.traces[policy].save(note(f"mi300x-{policy}.npz", f"trace, {policy} on {MACHINE}"))
    hosted.simulated.save(note("host-simulated.npz", "trace, the small layer simulated"))
    hosted.measured.save(note("host-measured.npz", "trace, the small layer measured (the median run)"))
    write_chrome(simulated.traces[best], note(f"mi300x-{best}.json.gz", f"{best} on {MACHINE}, for Perfetto"))
    write_chrome(
        [hosted.simulated, hosted.measured],
        note("host-both.json.gz", "both timelines of the small layer, for Perfetto"),
    )
    return written


def figure_policies(simulated: Simulated) -> Any:
    """plot_policies as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    plot_policies(simulated, figure.subplots())
    return figure


def figure_tasks(comparison: Comparison) -> Any:
    """plots.plot_comparison as a figure."""
    from matplotlib.figure import Figure

    from flashmoe.plots import plot_comparison

    figure = Figure(figsize=(10, 6), layout="constrained")
    plot_comparison(comparison, figure.subplots())
    return figure


def plot_policies(simulated: Simulated, ax: Axes) -> Axes:
    """Draw the makespan of each policy as a bar, and across it the bound that no schedule of its tiling beats."""
    names = list(simulated.traces)
    traces = list(simulated.traces.values())
    times_us = [trace.makespan_us for trace in traces]
    bounds_us = [trace.header["bound_ps"] / 1e6 for trace in traces]
    bars = ax.barh(names, times_us, color="#0072B2", height=0.6)
    ax.bar_label(bars, [f"{time:.0f} µs" for time in times_us], padding=4)
    rows = np.arange(len(names))
    ax.vlines(
        bounds_us,
        rows - 0.4,
        rows + 0.4,
        color="#D55E00",
        linewidth=2.5,
        label="lower bound: no schedule of these tasks is faster",
    )
    ax.invert_yaxis()  # the first policy on top
    ax.set_xlim(0, 1.12 * max(times_us))
    ax.set_xlabel("makespan [µs]")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    first = traces[0]
    layer = f"{first.header['model']['name']}, {first.header['num_tokens'][0]} tokens per PE"
    ax.set_title(
        f"simulated, {layer}, EP {first.num_pes} on {simulated.machine.name},\n"
        f"routing {simulated.routing.name}, seed {first.header['seed']}",
        loc="left",
        fontsize=10,
    )
    return ax
