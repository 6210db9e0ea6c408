"""What nvcc's assembler says of each kernel that it made."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"Function properties for (?P=name)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.S,
)


@dataclass(frozen=True)
class CudaKernel:
    """What one kernel takes of an SM. spill_bytes: stores and loads of one thread. shared_bytes: static."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def read_log(text: str) -> list[CudaKernel]:
    """The kernels in what `nvcc -Xptxas=-v` printed, by name."""
    found = list(_KERNEL.finditer(text))
    names = _demangle([match["name"] for match in found])
    kernels = [
        CudaKernel(
            name=name,
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=int(match["shared"] or 0),
        )
        for name, match in zip(names, found, strict=True)
    ]
    return sorted(kernels, key=lambda kernel: kernel.name)


def _demangle(names: list[str]) -> list[str]:
    """As the source writes them, without arguments and the project's namespace; as they are without binutils."""
    path = shutil.which("c++filt")
    if path is None or not names:
        return names
    done = subprocess.run([path, "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |flashmoe::", "", line) for line in done.stdout.splitlines()]
