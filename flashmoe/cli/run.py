"""flashmoe run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import (
    WorkFailed,
    as_bytes,
    as_time,
    check_writable,
    finite,
    print_json,
    print_table,
    print_written,
    progress,
    say,
)
from flashmoe.model import MoEModel
from flashmoe.policy import policy_names
from flashmoe.trace import Trace
from flashmoe.weights import Weights

# Relative error (Frobenius norm) that a layer with float32 sums stays below.
TOLERANCE = {"bf16": 1e-2, "f32": 1e-5}


EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe run --tokens 4 --workers 2\n\n"
    "flashmoe run --checkpoint ~/Qwen3-30B-A3B --layer 7 --pes 4 --policy expert_lpt --out run.npz\n\n"
    "flashmoe run --backend cuda --tokens 8 --out gpu.npz\n\n"
    "[dim]# a simulated schedule, repeated by threads[/dim]\n\n"
    "flashmoe simulate --machine host --ep 2 --tokens 4 --workers 2 --out plan.npz\n\n"
    "flashmoe run --replay plan.npz --out run.npz\n\n"
    "flashmoe compare plan.npz run.npz"
)


def run(
    backend: Annotated[
        str,
        typer.Option(
            help="cpu: every PE is a group of threads. cuda (H100, H200) or hip (MI300X): the PEs share one card."
        ),
    ] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(help="Preset, with random weights. [dim]default: qwen3-30b-a3b, 1.2 GB[/dim]"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Qwen3-MoE folder of Hugging Face: config.json and safetensors.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer of the checkpoint.")] = 0,
    pes: Annotated[
        int | None, typer.Option(help="PEs that share the experts. [dim]default: 2, on a GPU 1[/dim]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers per PE: threads, or CUs. [dim]default: 4; on a GPU all of its CUs[/dim]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per PE, random. [dim]default: 4[/dim]")] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="gate: the router decides. Or uniform, zipf:S, dirichlet:A, hot:N, one, FILE.npz. "
            "[dim]default: gate[/dim]"
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"One of: tuned (the best known on a GPU), {', '.join(policy_names())}. "
            "[dim]default: ticket; on a GPU tuned[/dim]"
        ),
    ] = None,
    granularity: inputs.Granularity = None,
    down: inputs.Down = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Repeat the schedule of this .npz, simulated or measured; what is not given "
            "(model, PEs, workers, tokens, routing, seed) is as in it.",
        ),
    ] = None,
    dtype: inputs.Dtype = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything that is drawn at random. [dim]default: 0[/dim]")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Longest single wait inside the launch [s].")] = 60.0,
    out: inputs.TraceOut = None,
    save_routing: Annotated[
        Path | None, typer.Option(help="Write the routing that was used to this .npz, for simulate --routing.")
    ] = None,
    as_json: inputs.Json = False,
) -> None:
    """Compute one layer for real with the task system, and check it against a plain numpy reference."""
    check_writable(out)
    check_writable(save_routing, (".npz",))
    from flashmoe.hw import BACKENDS, choose, prepare
    from flashmoe.hw import run as launch

    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} (accepted: {', '.join(BACKENDS)})")
    if model is not None and checkpoint is not None:
        raise ValueError("--model and --checkpoint are both given (accepted: one of them)")
    if replay is not None and (policy or granularity or down):
        raise ValueError("--policy, --granularity and --down cannot change a schedule (accepted without --replay)")
    trace = None if replay is None else _load_schedule(replay)
    known = {} if trace is None else trace.header
    seed = int(known.get("seed", 0)) if seed is None else seed
    sizes = _model(model, checkpoint, dtype, known)
    pes = known.get("ep_size") if pes is None else pes
    workers = known.get("num_workers") if workers is None else workers
    default_pes, default_policy = (2, "ticket") if backend == "cpu" else (1, "tuned")
    counts = tokens if tokens is not None else known.get("num_tokens")
    text = routing or known.get("routing_name", "gate")
    given = None
    if text == "gate":
        pes, counts = default_pes if pes is None else pes, 4 if counts is None else counts
    else:
        given = inputs.make_routing(text, sizes, counts, pes, seed, default=(4, default_pes))
        pes, counts = given.ep_size, list(given.num_tokens)
    sizes.experts_per_pe(pes)
    per_pe = [counts] * pes if isinstance(counts, int) else counts
    if trace is None:
        chosen = choose(policy or default_policy, max(per_pe))
        chosen = chosen.with_tiling(inputs.choose_tiling(chosen, granularity, down))
    else:
        chosen = inputs.policy_of(trace, gate=given is None)
    x = random_tokens(sizes, per_pe, seed)
    prepare(sizes, backend)
    weights = _weights(sizes, checkpoint, layer, seed)
    with progress(f"computing on {pes} PEs ({backend})"):
        result = launch(
            sizes,
            weights,
            x,
            backend=backend,
            workers=workers,
            policy=chosen,
            routing=given,
            seed=seed,
            deadline_s=deadline,
        )
    if out is not None:
        result.trace.save(out)
    if save_routing is not None:
        result.routing.save(save_routing)
    error = _error(sizes, weights, x, result)
    tolerance = TOLERANCE[sizes.dtype]
    header = result.trace.header
    resolved: dict[str, Any] = {
        "backend": backend,
        "model": sizes.to_dict(),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "layer": None if checkpoint is None else layer,
        "pes": pes,
        "workers": header["num_workers"],
        "tokens": inputs.common_number(result.routing.num_tokens),
        **inputs.routing_inputs(result.routing),
        "policy": header["policy"],
        "replay": None if replay is None else str(replay),
        "granularity": header["tiling"]["granularity"],
        "down": header["tiling"]["down"],
        "tiling": header["tiling"],
        "seed": seed,
        "deadline_s": deadline,
        "out": None if out is None else str(out),
    }
    if as_json:
        print_json(
            {
                "makespan_us": result.trace.makespan_us,
                "relative_error": finite(error),
                "tasks": len(result.trace.records),
                "inputs": resolved,
            }
        )
    else:
        _print(result, sizes, error, tolerance)
        print_written(out, "trace")
        print_written(save_routing, "routing")
    if not error <= tolerance:
        raise WorkFailed(f"relative error {error:.3g} against the reference (at most {tolerance:g} in {sizes.dtype})")


def random_tokens(model: MoEModel, num_tokens: list[int], seed: int) -> list[Any]:
    """Standard normal activations, one (num_tokens, d_model) array per PE; a stream for each PE."""
    if min(num_tokens) < 0:
        raise ValueError(f"tokens={min(num_tokens)} (must be at least 0)")
    if seed < 0:
        raise ValueError(f"seed={seed} (must be at least 0)")
    streams = np.random.SeedSequence(seed).spawn(len(num_tokens))
    return [
        np.random.default_rng(stream).standard_normal((count, model.d_model)).astype(model.numpy_dtype)
        for count, stream in zip(num_tokens, streams, strict=True)
    ]


def _model(name: str | None, checkpoint: Path | None, dtype: str | None, known: dict[str, Any]) -> MoEModel:
    if checkpoint is not None:
        model = MoEModel.from_checkpoint(checkpoint)
        return model if dtype is None else replace(model, dtype=dtype)
    if name is None and "model" in known:
        model = MoEModel(**known["model"])
        return model if dtype is None else replace(model, dtype=dtype)
    return inputs.load_model(name or "qwen3-30b-a3b", dtype)


def _load_schedule(path: Path) -> Trace:
    trace = Trace.load(path)
    needed = ("model", "num_tokens", "routing_name", "policy", "tiling", "plan_digests")
    if missing := [key for key in needed if key not in trace.header]:
        raise ValueError(f"{path}: no schedule to repeat, its header lacks {', '.join(missing)}")
    return trace


def _weights(model: MoEModel, checkpoint: Path | None, layer: int, seed: int) -> Weights:
    if checkpoint is not None:
        with progress("reading weights") as tick:
            weights = Weights.from_checkpoint(checkpoint, layer, tick)
    else:
        with progress("drawing random weights") as tick:
            weights = Weights.random(model, seed, tick)
    weights.check(model)
    return weights


def _error(model: MoEModel, weights: Weights, x: list[Any], result: Any) -> float:
    """Relative error against the reference, on the routing that the layer used."""
    from flashmoe import reference

    wanted = []
    with progress("checking against the reference") as tick:
        pairs = zip(x, result.routing.topk_idx, result.routing.topk_weights, strict=True)
        for pe, (rows, topk_idx, topk_weights) in enumerate(pairs):
            wanted.append(reference.moe_layer(model, weights, rows, (topk_idx, topk_weights)))
            tick(pe + 1, len(x))
    return reference.relative_error(result.outputs, wanted)


def _print(result: Any, model: MoEModel, error: float, tolerance: float) -> None:
    trace = result.trace
    say(trace.describe(), "bold")
    say(f"{result.routing.describe_skew()} (routing {result.routing.name})", "dim")
    say("")
    print_table(
        ["makespan", "utilisation", "tasks", "weights read", "between PEs", "relative error"],
        [
            [
                as_time(trace.makespan_us),
                f"{trace.utilisation():.0%}",
                f"{len(trace.records):,}",
                as_bytes(trace.header["hbm_bytes"]),
                as_bytes(trace.header["link_bytes"]),
                f"{error:.2e}",
            ]
        ],
        num_names=0,
    )
    say("")
    if error <= tolerance:
        margin = (
            "equal to it" if error == 0 else f"{math.floor(tolerance / error)} times under the limit of {tolerance:g}"
        )
        say(f"The output agrees with the numpy reference: {margin} for {model.dtype}.", "green")
    else:
        say(f"The output does not agree with the numpy reference: the limit is {tolerance:g}.", "bold red")
