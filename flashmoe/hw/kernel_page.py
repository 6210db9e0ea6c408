"""A page of what each kernel takes of its GPU, as the compilers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flashmoe.hw.build import log_of
from flashmoe.hw.code_object import read_kernels
from flashmoe.hw.compilers import find_compiler
from flashmoe.hw.ptxas import read_log
from flashmoe.model import MoEModel

_GFX942 = (
    "VGPR: 32-bit vector registers of a lane, AGPR among them; the limit is what lets one work-group of that many "
    "threads run on a CU. Spilled: vector registers in scratch memory, scalar ones in lanes of vector registers. "
    "Release: `buffer_wbl2`, acquire: `buffer_inv`, each for one GPU (agent) or all (system)."
)
_SM_90 = "Stack and spills: bytes of one thread. Shared: static; the rings of weights come on top, at the launch."


def kernel_page(model: MoEModel, libraries: Mapping[str, Path], command: str) -> str:
    """Markdown: one table for each target of libraries (target: file, as `build_library` made it).

    command: what made the page.
    Raises: BuildError where a tool that reads the code is missing.
    """
    shape = f"d_model {model.d_model}, d_ff {model.d_ff}, {model.num_experts} experts, top {model.top_k}"
    lines = [
        "# Kernels",
        "",
        f"Made by `{command}`, for {shape}. A test holds the rows of gfx942 to the sources.",
    ]
    for target, library in libraries.items():
        note, rows = (_SM_90, _sm_90(library)) if target == "sm_90" else (_GFX942, gfx942_rows(library))
        lines += ["", f"## {target}, by {find_compiler(target).name}", "", note, "", *rows]
    return "\n".join(lines) + "\n"


def gfx942_rows(library: Path) -> list[str]:
    """The table of a gfx942 library, line by line."""
    heads = ["kernel", "threads", "VGPR", "AGPR", "limit", "SGPR", "LDS [B]", "scratch [B]", "spilled VGPR"]
    heads += ["spilled SGPR", "MFMA", "release agent", "release system", "acquire agent", "acquire system"]
    rows = [
        [
            f"`{kernel.name}`",
            *(kernel.wg_threads, kernel.vgprs, kernel.agprs, kernel.vgpr_limit, kernel.sgprs),
            *(kernel.lds_bytes, kernel.scratch_bytes, kernel.vgpr_spills, kernel.sgpr_spills, kernel.count("v_mfma")),
            *(kernel.count(name, scope) for name in ("buffer_wbl2", "buffer_inv") for scope in ("agent", "system")),
        ]
        for kernel in read_kernels(library)
    ]
    return _table(heads, rows)


def _sm_90(library: Path) -> list[str]:
    heads = ["kernel", "registers", "stack [B]", "spills [B]", "shared [B]"]
    kernels = read_log(log_of(library).read_text())
    rows = [[f"`{k.name}`", k.registers, k.stack_bytes, k.spill_bytes, k.shared_bytes] for k in kernels]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines: list[Sequence[object]] = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
