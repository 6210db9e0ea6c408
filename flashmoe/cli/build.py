"""flashmoe build."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli import inputs
from flashmoe.cli.screen import as_bytes, check_writable, err, print_json, print_table, print_written
from flashmoe.hw.build import TARGETS, build_library
from flashmoe.hw.compilers import find_compiler

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "flashmoe build --target sm_90\n\n"
    "flashmoe build --target gfx942 --model qwen3-235b-a22b --json\n\n"
    "flashmoe build --d-model 1024 --d-ff 512 --experts 64 --top-k 4\n\n"
    "flashmoe build --target sm_90 --target gfx942 --report docs/kernels.md"
)


def build(
    target: Annotated[list[str], typer.Option(help=f"One of: {', '.join(TARGETS)}; may be given again.")] = ["sm_90"],  # noqa: B006
    model: Annotated[str, typer.Option(help="Preset, or a checkpoint folder (its config.json).")] = "qwen3-30b-a3b",
    d_model: Annotated[int | None, typer.Option(help="Instead of the model's own.")] = None,
    d_ff: Annotated[int | None, typer.Option(help="Instead of the model's own.")] = None,
    experts: Annotated[int | None, typer.Option(help="Instead of the model's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Instead of the model's own.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write what each kernel takes of its GPU to this page.")
    ] = None,
    as_json: inputs.Json = False,
) -> None:
    """Compile the device library for a model's shape, or find it in the cache ($FLASHMOE_CACHE, ~/.cache/flashmoe).

    Running a layer on a GPU does the same at its first use. No GPU is needed. Exit status 1 without a fit compiler.
    """
    check_writable(report, (".md",))
    given = {"d_model": d_model, "d_ff": d_ff, "num_experts": experts, "top_k": top_k}
    sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
    shape = inputs.load_model(model, "bf16")
    if sizes:
        shape = replace(shape, **sizes, name="custom")
    built: list[dict[str, Any]] = []
    for name in dict.fromkeys(target):
        started, compiled = time.monotonic(), False

        def tell(line: str) -> None:
            nonlocal compiled
            compiled = True
            err.print(line, style="dim", markup=False, soft_wrap=True)

        library = build_library(shape, name, progress=tell)
        compiler = find_compiler(name)
        built.append(
            {
                "target": name,
                "library": str(library),
                "bytes": library.stat().st_size,
                "compiler": compiler.name,
                "compiler_path": compiler.path,
                "compiled": compiled,
                "seconds": time.monotonic() - started,
            }
        )
    if report is not None:
        from flashmoe.hw.kernel_page import kernel_page

        options = "".join(f" --target {one['target']}" for one in built)
        command = f"flashmoe build{options} --model {model} --report {report}"
        page = kernel_page(shape, {one["target"]: Path(one["library"]) for one in built}, command)
        report.write_text(page, encoding="utf-8")
    if as_json:
        print_json({"libraries": built, "model": shape.to_dict(), "report": None if report is None else str(report)})
        return
    rows = [
        [
            one["target"],
            as_bytes(one["bytes"]),
            one["compiler"],
            f"compiled in {one['seconds']:.0f} s" if one["compiled"] else "in the cache",
        ]
        for one in built
    ]
    print_table(["target", "size", "built with", ""], rows, num_names=4)
    for one in built:
        print_written(Path(one["library"]), one["target"])
    print_written(report, "report")
