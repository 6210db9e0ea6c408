"""gfx942 machine code on the CPU: a stand-in for the HIP runtime hands launches to an emulator of the instructions.

The emulator is tinygrad's; a folder with its `tinygrad/` and `test/` is given. Work-groups run one after another, and
there are no caches: it shows arithmetic, indices and control flow, not the order of memory accesses.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.hw.code_object import code_objects, metadata, symbols

STAND_IN = Path(__file__).with_name("hip_runtime.cpp")
_ON_LOAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ON_LAUNCH = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint)),
    *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
)

# user registers in the order of the bits that ask for them in kernel_code_properties, and how many each takes
_USER_SGPRS = {
    "private_segment_buffer": 4,
    "dispatch_ptr": 2,
    "queue_ptr": 2,
    "kernarg_segment_ptr": 2,
    "dispatch_id": 2,
    "flat_scratch_init": 2,
    "private_segment_size": 1,
}

_TICKS = np.zeros(1, np.uint32)  # of the emulated clock


class Emulator:
    """Device libraries loaded while this is alive launch their kernels here. One at a time in a process."""

    def __init__(self, folder: Path) -> None:
        """folder: of the emulator's tree. Raises: ImportError where it has none."""
        os.environ.setdefault("CC", "clang-19")  # it compiles each instruction that it meets
        sys.path.insert(0, str(folder))
        self._instructions: Any = importlib.import_module("test.mockgpu.amd.emu")
        _teach_cdna3(self._instructions)
        self._kernels: dict[tuple[int, str], _Kernel] = {}  # by module and name
        self._listeners = _ON_LOAD(self._on_load), _ON_LAUNCH(self._on_launch)
        self._runtime = _build_stand_in()
        self._runtime.emulator_listen(*self._listeners)

    def _on_load(self, module: int, bundle: int, num_bytes: int) -> None:
        for code_object in code_objects(ctypes.string_at(bundle, num_bytes)):
            image = _load(code_object)
            with tempfile.NamedTemporaryFile(suffix=".elf") as file:
                file.write(code_object)
                file.flush()
                places = symbols(Path(file.name))
                for said in metadata(Path(file.name)):
                    self._kernels[module, said[".name"]] = _Kernel(said, image, places[said[".symbol"]])

    def _on_launch(self, module: int, name: bytes, sizes: Any, arguments: Any, lds_bytes: int) -> int:
        kernel = self._kernels[module, name.decode()]
        try:
            kernel.run(self._instructions.run_asm, sizes[:3], sizes[3:6], arguments, lds_bytes)
        except Exception:  # C cannot pass it on
            traceback.print_exc()
            return 1
        return 0


class _Kernel:
    def __init__(self, said: dict[str, Any], image: np.ndarray[Any, Any], descriptor: int) -> None:
        self._said, self._image = said, image
        self._lds_bytes, self._scratch_bytes = struct.unpack_from("<II", image, descriptor)
        (entry,) = struct.unpack_from("<q", image, descriptor + 16)
        (self._rsrc2,) = struct.unpack_from("<I", image, descriptor + 52)
        (self._properties,) = struct.unpack_from("<H", image, descriptor + 56)
        self._entry = image.ctypes.data + descriptor + entry

    def run(
        self, run_asm: Callable[..., int], grid: list[int], block: list[int], arguments: Any, lds_bytes: int
    ) -> None:
        lds_bytes += self._lds_bytes
        if lds_bytes > 65536:
            raise ValueError(f"{lds_bytes} bytes of LDS (a CU has 65536)")
        segment = self._arguments(grid, block, arguments, lds_bytes - self._lds_bytes)
        known = {"kernarg_segment_ptr": _halves(segment.ctypes.data), "private_segment_size": [self._scratch_bytes]}
        registers: list[int] = []
        for bit, (name, count) in enumerate(_USER_SGPRS.items()):
            if self._properties >> bit & 1:
                registers += known.get(name, [0] * count)
        granules = -(-lds_bytes // 512)
        rsrc2 = self._rsrc2 & ~(0x1FF << 15) | granules << 15
        size = len(self._image)
        run_asm(
            *(self._entry, size, *grid, *block, segment.ctypes.data, rsrc2, self._scratch_bytes),
            arch="cdna",
            user_data=registers,
        )

    def _arguments(self, grid: list[int], block: list[int], arguments: Any, lds_bytes: int) -> np.ndarray[Any, Any]:
        """The segment that a kernel reads its arguments from, those that the compiler adds included."""
        segment = np.zeros(self._said[".kernarg_segment_size"], np.uint8)
        hidden = {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": lds_bytes}
        for axis, groups, threads in zip("xyz", grid, block, strict=True):
            hidden |= {f"hidden_block_count_{axis}": groups, f"hidden_group_size_{axis}": threads}
        taken = 0
        for argument in self._said.get(".args", []):
            start, size = argument[".offset"], argument[".size"]
            if not argument[".value_kind"].startswith("hidden_"):
                value = ctypes.string_at(arguments[taken], size)
                taken += 1
            else:
                value = hidden.get(argument[".value_kind"], 0).to_bytes(size, "little")
            segment[start : start + size] = np.frombuffer(value, np.uint8)
        return segment


def _teach_cdna3(emulator: Any) -> None:
    """What the kernels use and the emulator lacks: returning atomics, flat addresses, orders to caches, the clock."""
    attribute, handlers, cdna = emulator._iattr, emulator._INST_HANDLERS, emulator.irc
    field, register = emulator._Ctx.optional_field, emulator._Ctx.rvgpr_dyn
    others = {kind: handlers[kind] for kind in (cdna.DS, cdna.MUBUF, cdna.SMEM)}

    def sc0_is_glc(instruction: Any, name: str, default: int = 0) -> int:
        """An atomic gives back what was there if a bit says so that RDNA calls glc and CDNA3 sc0."""
        return attribute(instruction, "sc0" if name == "glc" and hasattr(instruction, "sc0") else name, default)

    def buffer(instruction: Any, context: Any) -> Any:
        if instruction.op.name in ("BUFFER_WBL2", "BUFFER_INV"):  # there are no caches
            return emulator.UOp.sink(*context.inc_pc())
        return others[cdna.MUBUF](instruction, context)

    def scalar_memory(instruction: Any, context: Any) -> Any:
        if instruction.op.name not in ("S_MEMREALTIME", "S_MEMTIME"):
            return others[cdna.SMEM](instruction, context)
        now = context.vmem.index(emulator.UOp.const(_TICKS.ctypes.data // 4, emulator.dtypes.int64))
        ticks = now.load() + emulator._c(1)  # one a look
        register = context.inst_field(cdna.SMEM.sdata)
        halves = (context.wsgpr_dyn(register + emulator._c(i), half) for i, half in enumerate((ticks, emulator._c(0))))
        return emulator.UOp.sink(now.store(ticks), *halves, *context.inc_pc())

    def field_or_none(context: Any, instruction: Any, name: str) -> Any:
        """A flat address has no scalar part; only global and scratch addresses do."""
        return None if name == "saddr" and type(instruction) is cdna.FLAT else field(context, instruction, name)

    def local(instruction: Any, context: Any) -> Any:
        """Lanes that are off read LDS too, at whatever address they hold: let it be 0."""
        address = context.inst_field(cdna.DS.addr)

        def register_or_0(of: Any, number: Any, lane: Any, valid: Any = None) -> Any:
            value = register(of, number, lane, valid)
            on = emulator._lane_active(of.rexec(), lane)
            return on.where(value, emulator._c(0)) if number is address else value

        emulator._Ctx.rvgpr_dyn = register_or_0
        try:
            return others[cdna.DS](instruction, context)
        finally:
            emulator._Ctx.rvgpr_dyn = register

    emulator._iattr = sc0_is_glc
    emulator._Ctx.optional_field = field_or_none
    handlers |= {cdna.DS: local, cdna.MUBUF: buffer, cdna.SMEM: scalar_memory}


def _load(code_object: bytes) -> np.ndarray[Any, Any]:
    """The segments at their places; the code works wherever it lies."""
    (table,) = struct.unpack_from("<Q", code_object, 32)
    entry_bytes, entries = struct.unpack_from("<HH", code_object, 54)
    loads = []
    for place in range(table, table + entry_bytes * entries, entry_bytes):
        kind, _, offset, address, _, file_bytes, memory_bytes = struct.unpack_from("<IIQQQQQ", code_object, place)
        if kind == 1:
            loads.append((address, code_object[offset : offset + file_bytes], memory_bytes))
    image = np.zeros(max(address + size for address, _, size in loads), np.uint8)
    for address, data, _ in loads:
        image[address : address + len(data)] = np.frombuffer(data, np.uint8)
    return image


def _halves(address: int) -> list[int]:
    return [address & 0xFFFFFFFF, address >> 32]


def _build_stand_in() -> ctypes.CDLL:
    """Loaded under the runtime's own name before any device library, which so binds to it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "stand_in.so"
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-D__HIP_PLATFORM_AMD__", "-D__HIP_PLATFORM_HCC__"]
        command += ["-w", str(STAND_IN), "-Wl,-soname,libamdhip64.so.5", "-o", str(made)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
