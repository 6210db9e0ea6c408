"""flashmoe explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import as_time, out, print_json, print_table, say
from flashmoe.trace import Trace

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe simulate --routing zipf:1 --out t.npz\n\n"
    "flashmoe explain t.npz\n\n"
    "flashmoe explain t.npz --json"
)

_SHOWN = 10  # tasks at each end of the critical path


def explain(
    trace: Annotated[Path, typer.Argument(metavar="T.npz", help="Trace, simulated or measured.")],
    as_json: inputs.Json = False,
) -> None:
    """Say where the time over the bound went: on the memory, on the critical path, and for the workers."""
    from flashmoe.explain import summarise

    loaded = Trace.load(trace)
    summary = summarise(loaded)
    if as_json:
        print_json(summary)
        return
    say(loaded.describe(), "bold")
    say("")
    for paragraph in summary["text"].splitlines():
        say(paragraph)
        say("")
    if len(loaded.records):
        _print_workers(summary)
        _print_path(loaded, summary)
        _print_resources(loaded, summary)


def _print_workers(summary: dict[str, Any]) -> None:
    times = summary["worker_time_us"]
    rows = [
        [f"PE {pe}", *(f"{time_us:.1f}" for time_us in of_pe)]
        for pe, of_pe in enumerate(zip(*times.values(), strict=True))
    ]
    say("The time of an average worker, µs", "bold")
    print_table(["", *times], rows)
    out.print()


def _print_path(trace: Trace, summary: dict[str, Any]) -> None:
    path = summary["critical_path"]
    if not path["tasks"]:
        return
    layers = trace.header.get("layers", 1) > 1
    names = [
        f"{task['kind']} {task['task_id']} on PE {task['pe']}" + (f" in layer {task['layer']}" if layers else "")
        for task in path["tasks"]
    ]
    shown = names if len(names) <= 2 * _SHOWN else [*names[:_SHOWN], "…", *names[-_SHOWN:]]
    say("The critical path", "bold")
    say(" → ".join(shown))
    out.print()


def _print_resources(trace: Trace, summary: dict[str, Any]) -> None:
    use, queue = summary["utilisation"], summary["queue_length"]
    domains = trace.domain_word
    workers = "CUs" if domains == "XCD" else "workers"
    columns: dict[str, list[str]] = {f"{workers} busy": [f"{share:.0%}" for share in use["cu"]]}
    if trace.num_domains > 1:
        columns[f"{domains}s busy"] = [f"{min(of_pe):.0%} to {max(of_pe):.0%}" for of_pe in use["domain"]]
    for name, title in (("hbm", "HBM used"), ("egress", "links out used")):
        if use[name] is not None:
            columns[title] = [f"{share:.0%}" for share in use[name]]
    columns["tasks waiting, mean"] = [f"{length:.1f}" for length in queue["mean"]]
    columns["largest"] = [f"{length:.0f}" for length in queue["max"]]
    rows = [[f"PE {pe}", *cells] for pe, cells in enumerate(zip(*columns.values(), strict=True))]
    say(
        f"Resources, as shares of {as_time(summary['makespan_us'])}, and tasks with inputs that wait for a worker",
        "bold",
    )
    print_table(["", *columns], rows)
