"""What the compiler made for gfx942: the figures of each kernel, and its instructions."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.hw.compilers import BuildError, source_names

_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. target: address that a branch may go on at."""

    address: int
    name: str
    operands: str
    target: int | None

    @property
    def scope(self) -> str:
        """Who a memory instruction is for, by its sc bits: wave, group, agent (one GPU) or system."""
        bits = set(self.operands.split())
        return {(False, False): "wave", (True, False): "group", (False, True): "agent", (True, True): "system"}[
            ("sc0" in bits, "sc1" in bits)
        ]


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes of a CU, and its code.

    vgprs: 32-bit vector registers of a lane in all, accumulation registers (agprs) among them. lds_bytes: static.
    vgpr_spills: vector registers kept in scratch memory. sgpr_spills: scalar ones, kept in lanes of vector registers.
    wg_threads: the most that a work-group may have.
    """

    name: str
    wg_threads: int
    vgprs: int
    agprs: int
    sgprs: int
    lds_bytes: int
    scratch_bytes: int
    vgpr_spills: int
    sgpr_spills: int
    code: tuple[Instruction, ...]

    def count(self, name: str, scope: str | None = None) -> int:
        """How many instructions' names start so, of one scope or all."""
        return sum(i.name.startswith(name) and scope in (None, i.scope) for i in self.code)

    @property
    def vgpr_limit(self) -> int:
        """Registers that a lane may have while one work-group of wg_threads fits a CU: its 4 SIMDs have 512 each."""
        waves_per_simd = -(-self.wg_threads // (4 * 64))
        return 512 // waves_per_simd


def code_objects(data: bytes) -> list[bytes]:
    """The gfx942 ELF files inside a shared library: one for each source file."""
    found = []
    for bundle in re.finditer(_BUNDLE, data):
        place = bundle.end() + 8
        for _ in range(struct.unpack_from("<Q", data, bundle.end())[0]):
            offset, size, length = struct.unpack_from("<QQQ", data, place)
            triple = data[place + 24 : place + 24 + length]
            place += 24 + length
            if b"gfx942" in triple:
                found.append(data[bundle.start() + offset : bundle.start() + offset + size])
    return found


def read_kernels(library: Path) -> list[Kernel]:
    """All gfx942 kernels of a library, by name.

    Raises: BuildError where LLVM's tools are missing or the library has no gfx942 code.
    """
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for i, code_object in enumerate(code_objects(library.read_bytes())):
            file = Path(folder) / f"{i}.elf"
            file.write_bytes(code_object)
            code = _disassemble(file)
            said = metadata(file)
            names = source_names([one[".name"] for one in said])
            kernels += [_kernel(name, one, code[one[".name"]]) for name, one in zip(names, said, strict=True)]
    if not kernels:
        raise BuildError(f"{library} has no gfx942 kernel")
    return sorted(kernels, key=lambda kernel: kernel.name)


def metadata(code_object: Path) -> list[dict[str, Any]]:
    """What the ELF file says of each kernel, in the words of LLVM's code object format: .name, .args, ..."""
    import yaml

    notes = _tool("llvm-readelf", "--notes", str(code_object))
    document = re.search(r"^\s*---\n(.*?)^\.\.\.", notes, re.S | re.M)
    if document is None:
        raise BuildError(f"{code_object} has no AMDGPU metadata")
    kernels: list[dict[str, Any]] = yaml.safe_load(document[1])["amdhsa.kernels"]
    return kernels


def symbols(code_object: Path) -> dict[str, int]:
    """Addresses of an ELF file's symbols; a kernel's descriptor is one, under its .symbol."""
    table = _tool("llvm-readelf", "--symbols", "--wide", str(code_object))
    rows = re.findall(r"^ *\d+: ([0-9a-f]{16}) .* (\S+)$", table, re.M)
    return {name: int(address, 16) for address, name in rows}


def _kernel(name: str, said: dict[str, Any], code: tuple[Instruction, ...]) -> Kernel:
    return Kernel(
        name=name,
        wg_threads=said[".max_flat_workgroup_size"],
        vgprs=said[".vgpr_count"],
        agprs=said[".agpr_count"],
        sgprs=said[".sgpr_count"],
        lds_bytes=said[".group_segment_fixed_size"],
        scratch_bytes=said[".private_segment_fixed_size"],
        vgpr_spills=said[".vgpr_spill_count"],
        sgpr_spills=said[".sgpr_spill_count"],
        code=code,
    )


def _disassemble(code_object: Path) -> dict[str, tuple[Instruction, ...]]:
    """Instructions of each function."""
    functions: dict[str, tuple[Instruction, ...]] = {}
    text = _tool("llvm-objdump", "--disassemble", str(code_object))
    for part in re.split(r"^(?=[0-9a-f]+ <)", text, flags=re.M)[1:]:
        start, name = re.match(r"([0-9a-f]+) <(.*)>:", part).groups()  # type: ignore[union-attr]
        functions[name] = tuple(_instructions(part, int(start, 16)))
    return functions


def _instructions(text: str, start: int) -> Iterator[Instruction]:
    line = re.compile(r"^\t(\w+) ?(.*?) *// ([0-9A-F]+):[0-9A-F ]*(?:<[^>]*?(?:\+0x([0-9a-f]+))?>)?$", re.M)
    for name, operands, address, offset in line.findall(text):
        target = start + int(offset or "0", 16) if "branch" in name else None
        yield Instruction(int(address, 16), name, operands, target)


def _tool(name: str, *arguments: str) -> str:
    """Raises: BuildError where neither LLVM 19 nor ROCm has the tool, or it fails."""
    rocm = Path(os.environ.get("ROCM_PATH") or "/opt/rocm", "llvm", "bin")
    path = shutil.which(f"{name}-19") or shutil.which(name, path=rocm)
    if path is None:
        raise BuildError(f"{name}-19 is not in PATH (install llvm-19)")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{Path(path).name} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
