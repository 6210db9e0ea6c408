"""flashmoe bench."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.bench.peers import PEERS
from flashmoe.cli import inputs
from flashmoe.cli.screen import (
    WorkFailed,
    check_folder,
    check_writable,
    print_json,
    print_table,
    print_written,
    progress,
    say,
)
from flashmoe.hw.library import MAX_TOKENS
from flashmoe.policy import policy_names

if TYPE_CHECKING:
    from flashmoe.bench.result import Result


EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe bench --out results/today                        # both files and a figure; under a minute\n\n"
    "flashmoe bench --model qwen3-235b-a22b --tokens 8,64,512\n\n"
    "flashmoe bench --routing zipf:1.2,hot:1 --peers none\n\n"
    "flashmoe bench --policies all --tokens 1,8,64 --peers none\n\n"
    "flashmoe bench --from results/today/bench.json --plot share.png  # needs no GPU"
)


def bench(
    model: Annotated[str, typer.Option(help="Preset, or a checkpoint folder (its config.json).")] = "qwen3-30b-a3b",
    tokens: Annotated[
        str, typer.Option(metavar="N,N,...", help=f"Numbers of tokens, 1 to {MAX_TOKENS}.")
    ] = "1,2,4,8,16,32,64,128,256,512",
    routing: Annotated[
        str,
        typer.Option(
            metavar="R,R,...",
            help="gate: the router decides, inside the layer. Else given from outside: uniform, zipf:S, dirichlet:A, "
            "one, FILE.npz, or hot:N (with N below top_k every token takes the same N experts, its others evenly).",
        ),
    ] = "gate",
    policies: Annotated[
        str, typer.Option(metavar="P,P,...", help=f"Besides tuned: all, or of {', '.join(policy_names())}.")
    ] = "tuned",
    peers: Annotated[str, typer.Option(metavar="P,P,...", help=f"all, none, or of {', '.join(PEERS)}.")] = "all",
    layers: Annotated[int, typer.Option(min=1, help="In one CUDA graph.")] = 8,
    weight_sets: Annotated[
        int | None,
        typer.Option(
            min=2,
            show_default="as few as hold 2 GB",
            help="Different weights that the layers take in turn. A model has one for each layer: with 48 layers and "
            "16 sets the L2 cache holds nothing that is read again.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed replays of each graph.")] = 30,
    seed: inputs.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write bench.json, bench.csv, bench.png and README.md into this folder."),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE.json", help="Show a saved result instead of measuring.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the share of the read ceiling into this file.")] = None,
    as_json: inputs.Json = False,
) -> None:
    """Time a layer on this GPU, beside the read ceiling for the same bytes and beside other implementations.

    All in one run, on the same weights, tokens and routing; every result is checked against float32.
    """
    from flashmoe.bench.result import Result

    check_writable(plot)
    check_folder(out)
    if from_file is not None:
        result = Result.load(from_file)
    else:
        given = _numbers(tokens), _names(routing), _policies(policies), _peers(peers)
        sizes = inputs.load_model(model, None)
        measure = _measurer()
        with progress("measuring") as tick:
            options = {"num_layers": layers, "num_sets": weight_sets, "repeats": repeats, "seed": seed}
            result = measure(sizes, *given, **options, progress=tick)
        result.header["command"] = shlex.join(["flashmoe", *sys.argv[1:]])
    if out is not None:
        _write(result, out)
    if plot is not None:
        _draw(result, plot)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)
        print_written(plot, "figure")
        print_written(out, "results")
    if wrong := result.wrong():
        raise WorkFailed(f"{len(wrong)} of {len(result.measurements)} measurements are of wrong results")


def _measurer() -> Callable[..., Result]:
    """The benchmark. Raises: ImportError without torch, ValueError without a CUDA device."""
    if find_spec("torch") is None:
        raise ImportError("bench needs torch, with CUDA: pip install torch")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench needs a CUDA device (torch finds none; sm_90: H100, H200)")
    from flashmoe.bench.run import bench as measure

    return measure


def _print(result: Result) -> None:
    from flashmoe.bench.tables import describe, layer_table, notes, peer_table, policy_table

    say(describe(result))
    for routing in result.routings():
        say("")
        say(f"Routing: {routing}", "bold")
        print_table(*layer_table(result, routing), num_names=0)
        if result.peers():
            say("")
            print_table(*peer_table(result, routing), num_names=0)
        columns, rows = policy_table(result, routing)
        if rows:
            say("")
            say("Microseconds a layer under each policy", "bold")
            print_table(columns, rows, num_names=2)
    say("")
    for line in notes(result):
        say(line, "red" if line.startswith("Wrong") else "dim")


def _write(result: Result, folder: Path) -> None:
    from flashmoe.bench.tables import readme

    folder.mkdir(exist_ok=True)
    result.save(folder / "bench.json")
    result.save_csv(folder / "bench.csv")
    _draw(result, folder / "bench.png")
    (folder / "README.md").write_text(readme(result), encoding="utf-8")


def _draw(result: Result, path: Path) -> None:
    from flashmoe.plots import figure_ceiling_share

    figure_ceiling_share(result).savefig(path)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    numbers = []
    for word in _names(text):
        if not word.isdecimal() or not 1 <= int(word) <= MAX_TOKENS:
            raise ValueError(
                f"--tokens {text!r}: {word!r} (accepted: integers in 1..{MAX_TOKENS}, with commas between)"
            )
        numbers.append(int(word))
    return numbers


def _policies(text: str) -> list[str]:
    names = policy_names() if text == "all" else _names(text)
    for name in names:
        if name not in ("tuned", *policy_names()):
            raise ValueError(f"--policies: {name!r} (accepted: all, tuned, {', '.join(policy_names())})")
    return names


def _peers(text: str) -> list[str]:
    if text in ("all", "none"):
        return list(PEERS) if text == "all" else []
    names = _names(text)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: {name!r} (accepted: all, none, {', '.join(PEERS)})")
    return names
