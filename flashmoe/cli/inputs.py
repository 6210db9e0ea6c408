"""Options that several commands take, and what they are resolved to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.model import MoEModel
from flashmoe.placement import PLACEMENT_FORMS
from flashmoe.policy import Policy, policy_names, resolve
from flashmoe.routing import FORMS, Routing, split_placement
from flashmoe.tasks import Tiling
from flashmoe.trace import KINDS, Trace

PolicyName = Annotated[str, typer.Option("--policy", help=f"One of: {', '.join(policy_names())}.")]
ROUTING_HELP = f"One of: {FORMS}. A file holds recorded tokens, or how many chose each expert."
RoutingText = Annotated[str, typer.Option("--routing", help=ROUTING_HELP)]
Placement = Annotated[
    str | None,
    typer.Option(help=f"Experts on PEs: {PLACEMENT_FORMS}. [dim]default: linear[/dim]"),
]
Correlation = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="How likely a token's first choice is carried over to the next layer (experts renamed); not for files.",
    ),
]
Granularity = Annotated[
    str | None,
    typer.Option(help="tile, or token: a whole expert for one token is one task. [dim]default: the policy's own[/dim]"),
]
Down = Annotated[
    str | None,
    typer.Option(
        help="Down projection: tile, or rows (a worker adds up all experts). [dim]default: the policy's own[/dim]"
    ),
]
Dtype = Annotated[str | None, typer.Option(help="bf16 or f32. [dim]default: the model's own[/dim]")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
TraceOut = Annotated[Path | None, typer.Option("--out", help="Write the trace to this .npz.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def load_model(name: str, dtype: str | None) -> MoEModel:
    """A preset, or the sizes in config.json of a checkpoint folder."""
    model = MoEModel.load(name)
    return model if dtype is None else replace(model, dtype=dtype)


def policy_of(trace: Trace, *, gate: bool) -> Policy:
    """A trace's schedule. gate=False: without its gate tasks, as the routing comes from outside."""
    if not gate:
        trace = Trace(trace.records[trace.records["kind"] != KINDS.index("gate")], trace.header, np.zeros(0, np.int64))
    return Policy.from_trace(trace)


def choose_tiling(policy: str | Policy, granularity: str | None, down: str | None) -> Tiling | None:
    """The tiling that the options ask for; None when the policy's own shall be taken."""
    if granularity is None and down is None:
        return None
    own = resolve(policy).tiling
    chosen: dict[str, Any] = {"granularity": granularity or own.granularity, "down": down or own.down}
    return Tiling(**chosen)


def make_routing(
    text: str,
    model: MoEModel,
    tokens: int | list[int] | None,
    ep_size: int | None,
    seed: int,
    *,
    placement: str | None = None,
    default: tuple[int, int],
) -> Routing:
    """The routing that options name. default: tokens and PEs where nobody says them; a file may say them."""
    return Routing.parse(_with_placement(text, placement), model, tokens, ep_size, seed, default=default)


def make_layers(
    text: str,
    model: MoEModel,
    tokens: int | list[int] | None,
    ep_size: int | None,
    seed: int,
    *,
    num_layers: int | None,
    correlation: float = 0.0,
    placement: str | None = None,
    default: tuple[int, int],
) -> list[Routing]:
    """One routing a layer, as `make_routing`. num_layers None: one of a family, all that a file has."""
    return Routing.layers(
        _with_placement(text, placement),
        model,
        tokens,
        ep_size,
        seed,
        num_layers=num_layers,
        correlation=correlation,
        default=default,
    )


def routing_inputs(routing: Routing) -> dict[str, Any]:
    """A routing as the inputs of a JSON result show it."""
    return {
        "routing": routing.name,
        "routing_digest": routing.digest,
        "skew": routing.skew(),
        "pe_skew": routing.skew("pes"),
    }


def _with_placement(text: str, placement: str | None) -> str:
    if placement is None:
        return text
    if (given := split_placement(text)[2]) != "":
        raise ValueError(f"placement={placement!r}, but routing {text!r} has {given!r} (accepted: one of both)")
    return f"{text}@{placement}"


def common_number(counts: tuple[int, ...]) -> int | list[int]:
    """Tokens per PE: one number where all PEs have as many, else a list."""
    return counts[0] if len(set(counts)) == 1 else list(counts)
