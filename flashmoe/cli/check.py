"""flashmoe check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import print_json, print_table, progress, say
from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.policy import Policy, policy_names, resolve
from flashmoe.schedule import CYCLE_TITLE, ScheduleError, check_policy
from flashmoe.tasks import TaskTable
from flashmoe.trace import Trace

_HOW = {
    "push": "with any number of workers",
    "ticket": "whoever gets which pick, with a look-ahead of {look_ahead}",
    "domain": "whoever gets which pick or steals it, with a look-ahead of {look_ahead}",
    "static": "each worker in the order of its picks, with a look-ahead of {look_ahead}",
    "replay": "each worker in the order of its list, with a look-ahead of {look_ahead}",
}

_SHOWN = 10  # steps at each end of a cycle

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe check --policy expert_lpt --routing zipf:1 --layers 4\n\n"
    "flashmoe check --policy static_phase --down rows --workers 2 --json\n\n"
    "[dim]# a schedule, before it is repeated for real[/dim]\n\n"
    "flashmoe simulate --machine host --ep 2 --tokens 4 --workers 2 --out plan.npz\n\n"
    "flashmoe check --replay plan.npz"
)


def check(
    policy: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(policy_names())}. [dim]default: static_phase[/dim]")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Check the schedule of this .npz instead, simulated or measured; what is not given "
            "(model, PEs, workers, tokens, routing, seed) is as in it.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Preset, or a checkpoint folder (its config.json). [dim]default: qwen3-30b-a3b[/dim]"),
    ] = None,
    machine: Annotated[str, typer.Option(help="Preset or FILE.toml: its CUs and XCDs.")] = "mi300x",
    ep: Annotated[int | None, typer.Option(help="PEs (GPUs) that share the experts. [dim]default: 8[/dim]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per PE. [dim]default: 8[/dim]")] = None,
    routing: Annotated[str | None, typer.Option(help=f"{inputs.ROUTING_HELP} [dim]default: uniform[/dim]")] = None,
    placement: inputs.Placement = None,
    granularity: inputs.Granularity = None,
    down: inputs.Down = None,
    dtype: inputs.Dtype = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers per PE. [dim]default: one for each CU of the machine[/dim]")
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option("--gate/--no-gate", help="Whether the router runs inside the kernel. [dim]default: it does[/dim]"),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers in a row, a routing each. [dim]default: 1, or all that a recording has[/dim]"),
    ] = None,
    correlation: inputs.Correlation = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Of everything that is drawn at random. [dim]default: 0[/dim]")
    ] = None,
    as_json: inputs.Json = False,
) -> None:
    """Prove that a policy, or the schedule of a trace, runs every task once and can't deadlock; or show how it does.

    Under any timing: whatever tasks, tickets and signals take. Exit status 1 if it is refused.
    """
    if replay is not None and (policy or granularity or down or layers):
        raise ValueError(
            "--policy, --granularity, --down and --layers cannot change a schedule (accepted without --replay)"
        )
    trace = None if replay is None else _load_schedule(replay)
    known = {} if trace is None else trace.header
    seed = int(known.get("seed", 0)) if seed is None else seed
    gate = known.get("gate_inside", True) if gate is None else gate
    text = routing or known.get("routing_name", "uniform")
    if text == "gate":
        raise ValueError(
            f"{replay}: routed by its gate (name what it chose: --routing FILE.npz, from run --save-routing)"
        )
    sizes = inputs.load_model(model or "qwen3-30b-a3b", dtype)
    if model is None and known:
        sizes = MoEModel(**known["model"])
    drawn = inputs.make_layers(
        text,
        sizes,
        known.get("num_tokens") if tokens is None else tokens,
        known.get("ep_size") if ep is None else ep,
        seed,
        num_layers=layers,
        correlation=correlation,
        placement=placement,
        default=(8, 8),
    )
    gpu = Machine.load(machine)
    num_workers = known.get("num_workers", gpu.num_cus) if workers is None else workers
    if not 1 <= num_workers < 1 << 16:
        raise ValueError(f"workers={num_workers} (must be in 1..65535)")
    if trace is None:
        name = policy or "static_phase"
        chosen = resolve(name, inputs.choose_tiling(name, granularity, down))
    else:
        chosen = inputs.policy_of(trace, gate=gate)
    tables = [TaskTable(sizes, one, chosen.tiling, gate=gate) for one in drawn]
    refused, layer = None, 0
    with progress("trying every timing") as tick:
        for layer, table in enumerate(tables):
            try:
                domains = min(gpu.num_domains, num_workers)
                check_policy(chosen, table, num_workers, num_domains=domains, in_order=gpu.in_order)
            except ScheduleError as error:
                refused = error
                break
            tick(layer + 1, len(tables))
    if as_json:
        print_json(
            {
                "ok": refused is None,
                "problem": None if refused is None else str(refused),
                "layer": None if refused is None else layer,
                "cycle": [] if refused is None else [asdict(wait) for wait in refused.cycle],
                "tasks": sum(map(len, tables)),
                "inputs": {
                    "model": sizes.to_dict(),
                    "machine": gpu.name,
                    "ep": drawn[0].ep_size,
                    "tokens": inputs.common_number(drawn[0].num_tokens),
                    **inputs.routing_inputs(drawn[0]),
                    "policy": chosen.name,
                    "queue": chosen.queue,
                    "look_ahead": chosen.look_ahead,
                    "replay": None if replay is None else str(replay),
                    "tiling": chosen.tiling.to_dict(),
                    "workers": num_workers,
                    "gate": gate,
                    "layers": len(drawn),
                    "correlation": correlation,
                    "seed": seed,
                },
            }
        )
    else:
        _print(chosen, tables, num_workers, refused, layer)
    if refused is not None:
        raise typer.Exit(1)


def _print(
    policy: Policy, tables: list[TaskTable], num_workers: int, refused: ScheduleError | None, layer: int
) -> None:
    sizes, ep_size = tables[0].model, tables[0].num_pes
    say(f"{policy.name}: {sizes.name or 'a model'} on {ep_size} PEs of {num_workers} workers", "bold")
    of_layers = "" if len(tables) == 1 else f" of {len(tables)} layers"
    picks = sum(int((table.tasks["chain"] > 0).sum()) for table in tables)
    say(f"{sum(map(len, tables)):,} tasks in {picks:,} picks{of_layers}, routing {tables[0].routing.name}", "dim")
    say("")
    if refused is None:
        print_table(
            ["checked", ""],
            [
                ["complete", "every pick is run once, by its own PE"],
                ["no cycle", "no task waits for itself, through other tasks and workers' queues"],
                ["no deadlock", f"under any timing, {_HOW[policy.queue].format(look_ahead=policy.look_ahead)}"],
            ],
            num_names=2,
        )
        say("")
        say("No deadlock under any timing.", "green")
        return
    where = "" if len(tables) == 1 else f"In layer {layer}: "
    first, *others = str(refused).splitlines()
    say(f"{where}{first}", "bold red")
    if refused.cycle:
        say("")
        rows = [[f"{wait.kind} {wait.task_id} of PE {wait.pe}", wait.why] for wait in refused.cycle]
        first_task = rows[0][0]
        if len(rows) > 2 * _SHOWN:
            rows = [*rows[:_SHOWN], ["...", f"{len(rows) - 2 * _SHOWN} more"], *rows[-_SHOWN:]]
        print_table(["a cycle of waits, each for the next", ""], [*rows, [first_task, ""]], num_names=2)
        say("")
        others = others[: others.index(CYCLE_TITLE)]
    print_table(["", "who waits" if refused.cycle else ""], [["", line] for line in others], num_names=2)


def _load_schedule(path: Path) -> Trace:
    trace = Trace.load(path)
    needed = ("model", "ep_size", "num_tokens", "routing_name", "num_workers", "policy", "tiling", "plan_digests")
    if missing := [key for key in needed if key not in trace.header]:
        raise ValueError(f"{path}: no schedule to check, its header lacks {', '.join(missing)}")
    return trace
