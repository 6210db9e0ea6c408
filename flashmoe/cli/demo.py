"""flashmoe demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.cli.screen import (
    WorkFailed,
    as_time,
    check_writable,
    out,
    print_table,
    progress,
    say,
)

if TYPE_CHECKING:
    from flashmoe import demo as steps

EXAMPLES = "[bold]Examples[/bold]\n\nflashmoe demo\n\nflashmoe demo --out ~/flashmoe-demo"

_LIMIT = 1e-2  # of the relative error in bf16


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for traces and figures; made if need be.")] = Path(
        "flashmoe-demo"
    ),
) -> None:
    """Simulate a layer on eight GPUs, compute one on CPU threads, and compare: under a minute, no GPU needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror})") from error
    check_writable(folder / "policies.png")
    from flashmoe import demo as steps

    began = time.perf_counter()
    with progress("simulating") as tick:
        simulated = steps.simulate_policies(tick)
    _print_simulated(simulated)
    with progress("computing"):
        small = steps.compute_policies()
    _print_computed(small)
    with progress("asking transformers"):
        check = steps.check_transformers(small)
    _print_check(check)
    with progress("measuring this host"):
        hosted = steps.compare_with_host(small)
    _print_hosted(hosted)
    with progress("drawing") as tick:
        files = steps.write_files(folder, simulated, hosted, tick)
    _print_files(folder, files)
    seconds = time.perf_counter() - began
    say(f"\n{seconds:.0f} s in all. Next: flashmoe simulate --help, and notebooks/01-quickstart.ipynb.")
    errors = [run.relative_error for run in small.runs] + ([] if check is None else [check.relative_error])
    if not small.same_bits:
        raise WorkFailed("the same tiling gave different bits under different schedules")
    if not max(errors) <= _LIMIT:
        raise WorkFailed(f"relative error {max(errors):.3g} (at most {_LIMIT:g})")


def _title(number: int, text: str) -> None:
    out.print()
    out.rule(f"[bold]{number}  {text}", align="left", style="dim")


def _print_simulated(simulated: steps.Simulated) -> None:
    from flashmoe.explain import explain

    traces = simulated.traces
    first = next(iter(traces.values()))
    model = first.header["model"]
    _title(1, f"A {model['name']} layer on {first.num_pes} simulated {simulated.machine.name}")
    say(
        f"{model['num_experts']} experts, {model['num_experts'] // first.num_pes} on each of {first.num_pes} GPUs; "
        f"{first.header['num_tokens'][0]} tokens a GPU, {model['top_k']} experts a token; "
        f"{first.num_workers} workers (CUs) a GPU pull tasks. One routing ({simulated.routing.name}), "
        f"{len(traces)} scheduling policies."
    )
    say(simulated.routing.describe_skew(), "dim")
    out.print()
    rows = []
    for name, trace in traces.items():
        header = trace.header
        rows.append(
            [
                f"{name} *" if name == simulated.best else name,
                as_time(trace.makespan_us),
                as_time(header["bound_ps"] / 1e6),
                f"{header['headroom']:+.0%}",
                f"{trace.utilisation():.0%}",
                f"{len(trace.records):,}",
            ]
        )
    print_table(["policy", "makespan", "lower bound", "above it", "CUs busy", "tasks"], rows)
    best, worst = traces[simulated.best], traces[simulated.worst]
    out.print()
    say(
        f"Same layer, same machine: {simulated.best} (*) is {worst.makespan_us / best.makespan_us:.0f} times faster "
        f"than {simulated.worst}. Simulated, not measured: flashmoe presets {simulated.machine.name} says where "
        "each of the machine's numbers comes from."
    )
    for name in dict.fromkeys(("ancestor", simulated.best)):
        out.print()
        say(f"Why {name} takes {as_time(traces[name].makespan_us)}", "bold")
        for paragraph in explain(traces[name]).splitlines():
            say(paragraph)


def _print_computed(small: steps.Small) -> None:
    from flashmoe.demo import NUM_TOKENS, SMALL

    _title(2, "The same kind of layer, computed on CPU threads")
    say(
        f"d_model {SMALL.d_model}, d_ff {SMALL.d_ff}, {SMALL.num_experts} experts, top {SMALL.top_k}, {SMALL.dtype}, "
        f"over {len(small.x)} PEs (groups of threads), {NUM_TOKENS} tokens each. The same task graph, queues and "
        "exchange as on a GPU, with real numbers."
    )
    out.print()
    rows = [
        [
            run.policy,
            str(run.workers),
            as_time(run.result.trace.makespan_us),
            f"{len(run.result.trace.records):,}",
            f"{run.relative_error:.1e}",
            run.outputs_hash,
        ]
        for run in small.runs
    ]
    print_table(["policy", "workers a PE", "makespan", "tasks", "relative error", "hash of output"], rows)
    out.print()
    common = [run for run in small.runs if not run.own_tiling]
    others = sorted({run.policy for run in small.runs if run.own_tiling})
    if small.same_bits:
        too = "gave them too" if small.all_same_bits else "gave others: its sums round differently"
        say(
            f"All {len(common)} runs that cut the layer into the same tasks gave the same bits, whatever the policy "
            f"and the number of workers; {', '.join(others)}, which cuts it differently, {too}."
        )
    else:
        say("The runs that cut the layer into the same tasks did not give the same bits: that is a bug.", "bold red")
    say(f"Relative error is against plain numpy with float32 sums; up to {_LIMIT:g} is accepted in bf16.", "dim")


def _print_check(check: steps.TransformersCheck | None) -> None:
    if check is None:
        say("Not checked against transformers: it or torch is not installed (pip install torch transformers).", "dim")
        return
    say(
        f"Against Qwen3MoeSparseMoeBlock of transformers {check.version}, the same weights and tokens: "
        f"relative error {check.relative_error:.1e}."
    )
    if check.num_other_tokens:
        say(
            f"(For {check.num_other_tokens} tokens two router logits are equal in bf16 at the edge of the top k, and "
            "transformers takes the other expert; so its experts were given our routing.)",
            "dim",
        )


def _print_hosted(hosted: steps.Hosted) -> None:
    from flashmoe.demo import HELD_UP

    machine, comparison = hosted.machine, hosted.comparison
    makespans = sorted(hosted.makespans_us)
    simulated_us, measured_us = hosted.simulated.makespan_us, hosted.measured.makespan_us
    _title(3, "How good is the simulator? The same layer, simulated and measured here")
    say(
        f"Microbenchmarks of two seconds made a machine of this host: {machine.cu_bytes_per_ns:.1f} GB/s of weights "
        f"through one core, {machine.hbm_bytes_per_ns:.1f} GB/s through all. Nothing is fitted to the layer itself. "
        f"Workers a PE: {hosted.measured.num_workers}, so that each has a core where there are two or more. Of "
        f"{len(makespans)} measured runs the median one is compared."
    )
    out.print()
    rows = []
    for kind, row in comparison.by_kind.items():
        means = hosted.kind_means_us[kind]
        rows.append(
            [
                kind,
                f"{row['count']:,}",
                f"{row['left_mean_us']:.1f}",
                f"{row['right_mean_us']:.1f}",
                _signed_percent(row["left_mean_us"], row["right_mean_us"]),
                f"{min(means):.1f} to {max(means):.1f}",
            ]
        )
    rows.append(
        [
            "makespan",
            f"{comparison.matched:,}",
            f"{simulated_us:,.0f}",
            f"{measured_us:,.0f}",
            _signed_percent(simulated_us, measured_us),
            f"{makespans[0]:,.0f} to {makespans[-1]:,.0f}",
        ]
    )
    print_table(["kind", "tasks", "simulated µs", "measured µs", "model is off", f"{len(makespans)} runs, µs"], rows)
    out.print()
    spread = (makespans[-1] - makespans[0]) / measured_us
    verdict = "outside their range" if _outside(simulated_us, makespans) else "inside their range"
    say(
        f"The model is off by {_signed_percent(simulated_us, measured_us)} on the makespan ({as_time(simulated_us)} "
        f"simulated, {as_time(measured_us)} measured). The measured runs themselves spread by {spread:.0%} from the "
        f"fastest to the slowest: the prediction is {verdict}."
    )
    if hosted.held_up_us:
        say(
            f"Tasks of the compared run that took over {HELD_UP} times the median of their kind: "
            f"{len(hosted.held_up_us)}, {as_time(sum(hosted.held_up_us))} together. Probably something else had "
            "the core meanwhile, of which the model knows nothing."
        )
    for warning in comparison.warnings:
        say(f"warning: {warning}", "yellow")


def _print_files(folder: Path, files: dict[str, str]) -> None:
    _title(4, "What was written")
    say(f"in {folder}/", "bold")
    print_table(["", ""], [[name, what] for name, what in files.items()], num_names=2)
    say("Open the .json.gz files at https://ui.perfetto.dev.", "dim")


def _signed_percent(value: float, truth: float) -> str:
    return f"{value / truth - 1:+.0%}" if truth else "-"


def _outside(value: float, values: list[float]) -> bool:
    return not min(values) <= value <= max(values)
