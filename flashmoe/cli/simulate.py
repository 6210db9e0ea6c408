"""flashmoe simulate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from flashmoe.routing import Routing
from flashmoe.sim.effects import EFFECTS

if TYPE_CHECKING:
    from flashmoe.replicate import Replication

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
    "flashmoe simulate --machine h200 --ep 2 --tokens 64 --down rows --out t.npz --json\n\n"
    "flashmoe simulate --layers 4 --gap-us 20 --without jitter --without signal_load\n\n"
    "flashmoe simulate --routing zipf:1 --seeds 50"
)


def simulate(
    model: Annotated[str, typer.Option(help="Preset, or a checkpoint folder (its config.json).")] = "qwen3-30b-a3b",
    machine: Annotated[str, typer.Option(help="Preset, FILE.toml, or host: this one, measured for 2 s.")] = "mi300x",
    ep: Annotated[int | None, typer.Option(help="PEs (GPUs) that share the experts. [dim]default: 8[/dim]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per PE. [dim]default: 8[/dim]")] = None,
    routing: inputs.RoutingText = "uniform",
    placement: inputs.Placement = None,
    policy: inputs.PolicyName = "static_phase",
    engine: Annotated[str, typer.Option(help="native, or simpy: the same in Python, slower.")] = "native",
    granularity: inputs.Granularity = None,
    down: inputs.Down = None,
    dtype: inputs.Dtype = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers per PE. [dim]default: one for each CU of the machine[/dim]")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Whether the router runs inside the kernel.")] = True,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers in a row, a routing each. [dim]default: 1, or all that a recording has[/dim]"),
    ] = None,
    correlation: inputs.Correlation = 0.0,
    gap_us: Annotated[
        float | None,
        typer.Option(
            help="Dense compute between layers [µs], each a launch of its own. [dim]default: one launch for all[/dim]"
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="EFFECT", help=f"Switch an effect off; may be repeated. One of: {', '.join(EFFECTS)}."),
    ] = None,
    seed: inputs.Seed = 0,
    seeds: Annotated[
        int | None, typer.Option(help="Also run this many seeds, from --seed on, and show how the makespan spreads.")
    ] = None,
    out: inputs.TraceOut = None,
    plot: Annotated[Path | None, typer.Option(help="Write timeline, utilisation and HBM traffic as a figure.")] = None,
    as_json: inputs.Json = False,
) -> None:
    """Simulate layers on a machine that need not be at hand, and say why they take as long as they do."""
    check_writable(out)
    check_writable(plot, FIGURES)
    from flashmoe.machine import Machine
    from flashmoe.sim import ENGINES, simulate

    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} (accepted: {', '.join(ENGINES)})")
    layer = inputs.load_model(model, dtype)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds} (must be at least 1)")

    def draw(of_seed: int) -> list[Routing]:
        how: dict[str, Any] = {"num_layers": layers, "correlation": correlation, "placement": placement}
        return inputs.make_layers(routing, layer, tokens, ep, of_seed, **how, default=(8, 8))

    drawn = draw(seed)
    tiling = inputs.choose_tiling(policy, granularity, down)
    if machine == "host":
        with progress("measuring this host"):
            gpu = Machine.load(machine)
    else:
        gpu = Machine.load(machine)
    arguments: dict[str, Any] = {
        "machine": gpu,
        "policy": policy,
        "engine": engine,
        "workers": workers,
        "gate": gate,
        "tiling": tiling,
        "gap_us": gap_us,
        "without": without or [],
    }
    with progress("simulating") as tick:
        trace = simulate(layer, routing=drawn, seed=seed, progress=tick, **arguments)
    replication = None
    if seeds is not None:
        from flashmoe.replicate import replicate

        with progress("simulating other seeds") as tick:
            replication = replicate(layer, routing=draw, seeds=range(seed, seed + seeds), progress=tick, **arguments)
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
        "ep": drawn[0].ep_size,
        "tokens": inputs.common_number(drawn[0].num_tokens),
        **inputs.routing_inputs(drawn[0]),
        "policy": policy,
        "engine": engine,
        "granularity": header["tiling"]["granularity"],
        "down": header["tiling"]["down"],
        "tiling": header["tiling"],
        "workers": trace.num_workers,
        "gate": gate,
        "layers": len(drawn),
        "correlation": correlation,
        "gap_us": gap_us,
        "without": without or [],
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
                **({} if len(drawn) == 1 else {"layer_end_us": [end_ps / 1e6 for end_ps in header["layer_end_ps"]]}),
                **({} if replication is None else {"seeds": _as_dict(replication)}),
                "inputs": resolved,
            }
        )
        return
    if gap_us is not None and len(drawn) == 1:
        say(f"gap_us={gap_us:g} changes nothing: a gap lies between layers, and there is one (--layers)", "dim")
    _print(trace, drawn[0].describe_skew())
    if replication is not None:
        _print_replication(replication)
    print_written(out, "trace")
    print_written(plot, "figure")


def _as_dict(replication: Replication) -> dict[str, Any]:
    return {
        "seeds": list(replication.seeds),
        "makespan_us": replication.makespan_us.tolist(),
        "level": replication.level,
        **{name: asdict(estimate) for name, estimate in replication.summary().items()},
    }


def _print_replication(replication: Replication) -> None:
    say("")
    say(
        f"The makespan over {len(replication.seeds)} seeds of all that is drawn at random, with "
        f"{replication.level:.0%} confidence intervals (-: more seeds, or for the mean scipy, would be needed):"
    )
    rows = [
        [name, *("-" if us is None else as_time(us) for us in (estimate.value, estimate.low, estimate.high))]
        for name, estimate in replication.summary().items()
    ]
    print_table(["", "makespan", "at least", "at most"], rows)


def _print(trace: Any, skew: str) -> None:
    from flashmoe.explain import explain

    header = trace.header
    say(trace.describe(), "bold")
    say(f"{skew} (routing {header['routing_name']})", "dim")
    if header["layers"] > 1:
        ends = ", ".join(as_time(end_ps / 1e6) for end_ps in header["layer_end_ps"])
        say(f"{header['layers']} layers, that skew of the first; their last tasks end at {ends}", "dim")
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
    for paragraph in explain(trace).splitlines():
        say(paragraph)
