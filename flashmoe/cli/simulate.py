"""flashmoe simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import (
    as_bytes,
    as_time,
    check_writable,
    print_json,
    print_table,
    print_written,
    progress,
    say,
    skew_in_words,
)

FIGURES = (".png", ".svg", ".pdf")

_BOUNDS = {
    "hbm": "distinct weights of the busiest PE over its bandwidth",
    "workers": "work of the busiest PE over its workers",
    "longest_task": "the longest pick alone",
    "critical_path": "the longest chain of tasks, with endless workers",
    "links": "bytes over the busiest link",
}


EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe simulate --routing zipf:1 --policy domain_steal\n\n"
    "flashmoe simulate --ep 1 --tokens 1 --policy ancestor --plot ancestor.png\n\n"
    "flashmoe simulate --machine h200 --ep 2 --tokens 64 --down rows --out t.npz --json"
)


def simulate(
    model: Annotated[str, typer.Option(help="Preset, or a checkpoint folder (its config.json).")] = "qwen3-30b-a3b",
    machine: Annotated[str, typer.Option(help="Preset, FILE.toml, or host: this one, measured for 2 s.")] = "mi300x",
    ep: Annotated[int | None, typer.Option(help="PEs (GPUs) that share the experts. [dim]default: 8[/dim]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per PE. [dim]default: 8[/dim]")] = None,
    routing: Annotated[
        str, typer.Option(help="uniform, zipf:S, dirichlet:A, hot:N, one, or FILE.npz with its own tokens.")
    ] = "uniform",
    policy: inputs.PolicyName = "static_phase",
    engine: Annotated[str, typer.Option(help="simpy.")] = "simpy",
    granularity: inputs.Granularity = None,
    down: inputs.Down = None,
    dtype: inputs.Dtype = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers per PE. [dim]default: one for each CU of the machine[/dim]")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Whether the router runs inside the kernel.")] = True,
    seed: inputs.Seed = 0,
    out: inputs.TraceOut = None,
    plot: Annotated[Path | None, typer.Option(help="Write timeline, utilisation and HBM traffic as a figure.")] = None,
    as_json: inputs.Json = False,
) -> None:
    """Simulate one layer on a machine that need not be at hand, and say why it takes as long as it does."""
    check_writable(out)
    check_writable(plot, FIGURES)
    from flashmoe.machine import Machine
    from flashmoe.sim import ENGINES, simulate

    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} (accepted: {', '.join(ENGINES)})")
    layer = inputs.load_model(model, dtype)
    drawn = inputs.make_routing(routing, layer, tokens, ep, seed, default=(8, 8))
    tiling = inputs.choose_tiling(policy, granularity, down)
    if machine == "host":
        with progress("measuring this host"):
            gpu = Machine.load(machine)
    else:
        gpu = Machine.load(machine)
    with progress("simulating") as tick:
        trace = simulate(
            layer,
            routing=drawn,
            machine=gpu,
            policy=policy,
            engine=engine,
            seed=seed,
            workers=workers,
            gate=gate,
            tiling=tiling,
            progress=tick,
        )
    header = trace.header
    if out is not None:
        trace.save(out)
    if plot is not None:
        from flashmoe.plots import figure_overview

        with progress("drawing"):
            figure_overview(trace, ceiling_bytes_per_ns=gpu.hbm_bytes_per_ns).savefig(plot)
    resolved: dict[str, Any] = {
        "model": layer.to_dict(),
        "machine": gpu.name,
        "ep": drawn.ep_size,
        "tokens": inputs.common_number(drawn.num_tokens),
        **inputs.routing_inputs(drawn),
        "policy": policy,
        "engine": engine,
        "granularity": header["tiling"]["granularity"],
        "down": header["tiling"]["down"],
        "tiling": header["tiling"],
        "workers": trace.num_workers,
        "gate": gate,
        "seed": seed,
        "out": None if out is None else str(out),
        "plot": None if plot is None else str(plot),
    }
    if as_json:
        print_json(
            {
                "makespan_us": trace.makespan_us,
                "bound_us": header["bound_ps"] / 1e6,
                "headroom": header["headroom"],
                "utilisation": trace.utilisation(),
                "tasks": len(trace.records),
                "hbm_bytes": header["hbm_bytes"],
                "link_bytes": header["link_bytes"],
                "inputs": resolved,
            }
        )
        return
    _print(trace, skew_in_words(drawn.skew(), layer.num_experts))
    print_written(out, "trace")
    print_written(plot, "figure")


def _print(trace: Any, skew: str) -> None:
    from flashmoe.sim import explain

    header = trace.header
    say(trace.describe(), "bold")
    say(f"{skew} (routing {header['routing_name']})", "dim")
    say("")
    print_table(
        ["makespan", "bound", "headroom", "utilisation", "tasks", "from HBM", "over links"],
        [
            [
                as_time(trace.makespan_us),
                as_time(header["bound_ps"] / 1e6),
                f"{header['headroom']:+.0%}",
                f"{trace.utilisation():.0%}",
                f"{len(trace.records):,}",
                as_bytes(header["hbm_bytes"]),
                as_bytes(header["link_bytes"]),
            ]
        ],
        num_names=0,
    )
    say("")
    bounds = sorted(header["bounds_ps"].items(), key=lambda item: -item[1])
    print_table(
        ["no schedule beats", "because of", ""],
        [[as_time(bound_ps / 1e6), name, _BOUNDS.get(name, "")] for name, bound_ps in bounds],
        num_names=3,
    )
    say("")
    say(explain(trace))
