"""flashmoe presets."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from flashmoe.cli.screen import as_bytes, out, print_table, progress, say
from flashmoe.machine import Machine, parameter_meanings, parameter_units, preset_names
from flashmoe.model import MODEL_PRESETS, MoEModel

EXAMPLES = "[bold]Examples[/bold]\n\nflashmoe presets\n\nflashmoe presets mi300x\n\nflashmoe presets qwen3-30b-a3b"


def presets(
    name: Annotated[
        str | None, typer.Argument(help="A model, a machine, FILE.toml, or host: this one, measured for 2 s.")
    ] = None,
) -> None:
    """List the models and machines that come along, or everything about one of them."""
    if name is None:
        _list()
    elif name in MODEL_PRESETS:
        _print_model(MoEModel.preset(name))
    elif name == "host":
        with progress("measuring this host"):
            machine = Machine.load(name)
        _print_machine(machine)
    elif name in preset_names() or name.endswith(".toml"):
        _print_machine(Machine.load(name))
    else:
        raise ValueError(
            f"preset {name!r} is unknown (models: {', '.join(MODEL_PRESETS)}; "
            f"machines: {', '.join(preset_names())}, host, or a .toml file)"
        )


def _list() -> None:
    rows = []
    for name in MODEL_PRESETS:
        model = MoEModel.preset(name)
        sizes = (model.d_model, model.d_ff, model.num_experts, model.top_k)
        layer_bytes = model.num_experts * model.expert_bytes + model.gate_bytes
        rows.append([name, *map(str, sizes), as_bytes(model.expert_bytes), as_bytes(layer_bytes)])
    print_table(["model", "d_model", "d_ff", "experts", "top_k", "an expert", "a layer"], rows)
    say("")
    rows = []
    for name in preset_names():
        machine = Machine.preset(name)
        origins = [origin.origin for origin in machine.origins.values()]
        all_links = machine.port_bytes_per_ns or (machine.num_pes_max - 1) * machine.link_bytes_per_ns
        rows.append(
            [
                name,
                str(machine.num_cus),
                str(machine.num_domains),
                f"{machine.hbm_bytes_per_ns:g} GB/s",
                f"{machine.link_bytes_per_ns:g} GB/s",
                f"{all_links:g} GB/s",
                f"{origins.count('measured')} of {len(origins)}",
            ]
        )
    print_table(["machine", "CUs", "XCDs", "HBM", "to one PE", "to all PEs", "measured values"], rows)
    say("")
    say("Also: host, this machine, fitted by a microbenchmark of two seconds; FILE.toml, one of your own.", "dim")
    say("flashmoe presets NAME shows every parameter with its unit, origin and source.", "dim")


def _print_model(model: MoEModel) -> None:
    say(f"{model.name}: one layer, {model.dtype}", "bold")
    layer_bytes = model.num_experts * model.expert_bytes + model.gate_bytes
    divisors = [n for n in range(1, model.num_experts + 1) if model.num_experts % n == 0]
    rows = [
        ["d_model", f"{model.d_model}", "size of a token"],
        ["d_ff", f"{model.d_ff}", "inner size of one expert"],
        ["num_experts", f"{model.num_experts}", "over all PEs"],
        ["top_k", f"{model.top_k}", "experts per token"],
        ["norm_topk_prob", f"{model.norm_topk_prob}".lower(), "weights of the chosen experts sum to 1"],
        ["an expert", as_bytes(model.expert_bytes), "gate and up, and down projection"],
        ["router", as_bytes(model.gate_bytes), "on every PE"],
        ["a layer", as_bytes(layer_bytes), "all experts and the router"],
        ["read for one token", as_bytes(model.top_k * model.expert_bytes), "weights of its experts"],
        ["work for one token", f"{6e-6 * model.top_k * model.d_model * model.d_ff:.1f} MFLOP", "in its experts"],
        ["a token travels as", as_bytes(model.d_model * model.element_bytes), "to each PE that has one of them"],
        ["possible EP sizes", ", ".join(map(str, divisors)), "divisors of num_experts"],
    ]
    print_table(["", "", ""], rows, num_names=3)


def _print_machine(machine: Machine) -> None:
    about = f" ({machine.description})" if machine.description else ""
    say(f"{machine.name}{about}: every parameter, with its origin", "bold")
    meanings, units = parameter_meanings(), parameter_units()
    colours = {"measured": "green", "datasheet": "cyan", "estimate": "yellow", "fitted": "green"}
    for key, unit in units.items():
        origin, value = machine.origins.get(key), getattr(machine, key)
        line = Text.assemble((f"{key:24}", "bold"), _as_value(value, unit).ljust(22))
        line.append(origin.origin if origin else "default", colours[origin.origin] if origin else "dim")
        out.print(line)
        out.print(Padding(Text(meanings[key]), (0, 0, 0, 4)))
        if isinstance(value, tuple):
            times = ", ".join(f"{size}: {_as_value(time, unit)}" for size, time in value)
            out.print(Padding(Text(times), (0, 0, 0, 4)))
        if origin:
            out.print(Padding(Text(origin.source, style="dim"), (0, 0, 0, 4)))


def _as_value(value: Any, unit: str) -> str:
    """A parameter with its unit; a ratio, a number of things and a flag have none."""
    if isinstance(value, tuple):
        return "by size"
    if unit == "flag":
        return str(value).lower()
    if unit in ("count", "ratio"):
        return f"{value:g}"
    return f"{value:,} ps" if unit == "ps" else f"{value:g} {unit}"
