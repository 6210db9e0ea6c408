"""flashmoe tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import as_time, check_writable, print_json, print_table, print_written, progress, say
from flashmoe.sim import TIME_SHARES

if TYPE_CHECKING:
    from flashmoe.tune import Candidate

_BEST = 5  # that are shown

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe tune --tokens 8 --routing zipf:1\n\n"
    "flashmoe tune --model qwen3-235b-a22b --machine h200 --ep 8 --tokens 64 --out best.json"
)


def tune(
    model: Annotated[str, typer.Option(help="Preset, or a checkpoint folder (its config.json).")] = "qwen3-30b-a3b",
    machine: Annotated[str, typer.Option(help="Preset, FILE.toml, or host: this one, measured for 2 s.")] = "mi300x",
    ep: Annotated[int | None, typer.Option(help="PEs (GPUs) that share the experts. [dim]default: 8[/dim]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per PE. [dim]default: 8[/dim]")] = None,
    routing: inputs.RoutingText = "uniform",
    layers: Annotated[int | None, typer.Option(help="Layers in a row, a routing each. [dim]default: 1[/dim]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers per PE. [dim]default: one for each CU of the machine[/dim]")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Whether the router runs inside the kernel.")] = True,
    trials: Annotated[int, typer.Option(help="Combinations of policy and tiling to try.")] = 200,
    seeds: Annotated[int, typer.Option(help="Simulations of each of the last ones left.")] = 9,
    seed: inputs.Seed = 0,
    processes: Annotated[
        int | None, typer.Option(help="Processes that simulate. [dim]default: one for each core[/dim]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the best ones to this .json.")] = None,
    as_json: inputs.Json = False,
) -> None:
    """Find the policy and tiling with the shortest simulated makespan, and say what separates the best five."""
    check_writable(out, (".json",))
    from flashmoe.machine import Machine
    from flashmoe.points import load_model
    from flashmoe.tune import tune as find

    layer = load_model(model)
    with progress("measuring this host" if machine == "host" else "reading the machine"):
        gpu = Machine.load(machine)
    given: dict[str, Any] = {"ep": ep, "tokens": tokens, "routing": routing, "layers": layers, "workers": workers}
    given |= {"gate": gate, "trials": trials, "seeds": seeds, "seed": seed}
    with progress("simulating") as tick:
        best = find(layer, machine=gpu, **given, best=_BEST, processes=processes, progress=tick)
    result = {
        "candidates": [candidate.to_dict() for candidate in best],
        "inputs": {"model": layer.to_dict(), "machine": gpu.name, **given},
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
        return
    _print(best)
    print_written(out, "candidates")


def _print(best: list[Candidate]) -> None:
    first = best[0]
    labels = [
        f"{rank if rank <= _BEST else ''}{'*' if candidate.is_usual else ''}"
        for rank, candidate in enumerate(best, start=1)
    ]
    tilings = [candidate.tiling.to_dict() for candidate in best]
    sizes = [name for name in tilings[0] if len({tiling[name] for tiling in tilings}) > 1]
    rows = []
    for label, candidate, tiling in zip(labels, best, tilings, strict=True):
        behind = candidate.behind(first)
        sure = "" if behind.high is None or behind.low is None else f"{behind.low:+.2f} to {behind.high:+.2f}"
        rows.append(
            [
                label,
                _names(candidate),
                as_time(candidate.makespan_us),
                *(["", ""] if candidate is first else [f"{behind.value:+.2f} µs", sure]),
                f"{candidate.headroom:+.0%}",
                *(str(tiling[name]) for name in sizes),
            ]
        )
    print_table(["", "policy", "makespan", "against 1", "95 % sure", "above bound", *sizes], rows, num_names=2)
    same = ", ".join(f"{name}={value}" for name, value in tilings[0].items() if name not in sizes)
    say(f"Means over {len(first.makespans_us)} seeds. All have {same}. * a policy with its own tiling", "dim")
    say("")
    say("A worker's time [µs]: of 1, and how much more or less of it the others spend", "bold")
    shares = [name for name in TIME_SHARES if any(candidate.time_us[name] for candidate in best)]
    rows = [[labels[0], _names(first), *(f"{first.time_us[name]:.2f}" for name in shares)]]
    for label, candidate in zip(labels[1:], best[1:], strict=True):
        against = candidate.against(first)
        rows.append([label, _names(candidate), *(f"{against[name]:+.2f}" for name in shares)])
    print_table(["", "policy", *shares], rows, num_names=2)


def _names(candidate: Candidate) -> str:
    return ",\n".join((candidate.policy, *candidate.same))  # a line each: the column stays narrow
