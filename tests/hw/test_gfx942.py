"""gfx942's code object: what it takes of a CU, and the order of memory that its instructions give. No GPU is needed.

The rules are those of LLVM's "Memory Model GFX942" (AMDGPU user guide): L1 is not coherent between CUs, nor L2 between
XCDs; a wave waits for its own stores alone; a barrier orders LDS alone.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from flashmoe import MoEModel
from flashmoe.hw.build import build_library, source_folder
from flashmoe.hw.code_object import Instruction, Kernel, code_objects, read_kernels
from flashmoe.hw.compilers import BuildError, Compiler, find_compiler
from flashmoe.hw.kernel_page import gfx942_rows

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
GENERAL = ["flashmoe_general", "flashmoe_general_traced"]


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    try:
        return find_compiler("gfx942")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(compiler: Compiler) -> Path:
    return build_library(MoEModel.preset("qwen3-30b-a3b"), "gfx942")


@pytest.fixture(scope="module")
def kernels(library: Path) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in read_kernels(library)}


# ---- what kernels take of a CU


def test_all_kernels_fit_their_registers(kernels: dict[str, Kernel]) -> None:
    assert set(GENERAL) < set(kernels)
    for kernel in kernels.values():
        assert kernel.vgprs <= kernel.vgpr_limit, kernel.name
        assert (kernel.scratch_bytes, kernel.vgpr_spills) == (0, 0), kernel.name
        assert kernel.lds_bytes <= 64 * 1024, kernel.name
        assert kernel.count("s_swappc") == 0, kernel.name  # a call would have figures of its own


def test_two_work_groups_of_the_general_kernel_fit_a_cu(kernels: dict[str, Kernel]) -> None:
    for name in GENERAL:
        waves_per_simd = -(-2 * kernels[name].wg_threads // (4 * 64))
        assert kernels[name].vgprs <= 512 // waves_per_simd // 8 * 8 and 2 * kernels[name].lds_bytes <= 64 * 1024


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("phase", ["up", "down", "down_rows"])
def test_projections_use_the_matrix_instruction(
    library: Path, kernels: dict[str, Kernel], tmp_path: Path, name: str, phase: str
) -> None:
    mfma = [i.address for i in kernels[name].code if i.name == "v_mfma_f32_16x16x16_bf16"]
    assert mfma
    file = tmp_path / "code.elf"
    (code_object,) = (one for one in code_objects(library.read_bytes()) if name.encode() in one)
    file.write_bytes(code_object)
    command = ["llvm-symbolizer-19", f"--obj={file}", "--functions=short", "--inlines", *map(hex, mfma)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    inlined = [block.splitlines()[::2] for block in text.strip().split("\n\n")]  # function, then its line
    assert len(inlined) == len(mfma)
    assert any(function.split("<")[0] == phase for functions in inlined for function in functions)


# ---- one operation at a time


OPERATIONS = {
    "load_relaxed_device": ("*out = load_relaxed<Scope::device>(word)", ["global_load_dword sc1"]),
    "load_relaxed_system": ("*out = load_relaxed<Scope::system>(word)", ["global_load_dword sc0 sc1"]),
    "load_acquire_device": (
        "*out = load_acquire<Scope::device>(word)",
        ["global_load_dword sc1", "s_waitcnt vmcnt(0)", "buffer_inv sc1"],
    ),
    "load_acquire_system": (
        "*out = load_acquire<Scope::system>(word)",
        ["global_load_dword sc0 sc1", "s_waitcnt vmcnt(0)", "buffer_inv sc0 sc1"],
    ),
    "store_relaxed_system": ("store_relaxed<Scope::system>(word, 1u)", ["global_store_dword sc0 sc1"]),
    "store_release_after_all_stores": (
        "store_release<Scope::device>(word, 1u)",
        ["buffer_wbl2 sc1", "s_waitcnt vmcnt(0)", "global_store_dword sc1"],
    ),
    "store_release_device": (
        "*out = 2; store_release<Scope::device>(word, 1u)",
        ["global_store_dword", "buffer_wbl2 sc1", "s_waitcnt vmcnt(0)", "global_store_dword sc1"],
    ),
    "store_release_system": (
        "*out = 2; store_release<Scope::system>(word, 1u)",
        ["global_store_dword", "buffer_wbl2 sc0 sc1", "s_waitcnt vmcnt(0)", "global_store_dword sc0 sc1"],
    ),
    "add_relaxed_device": ("*out = fetch_add_relaxed<Scope::device>(word, 1u)", ["global_atomic_add sc0"]),
    "add_acq_rel_device": (
        "*out = 2; *out = fetch_add_acq_rel<Scope::device>(word, 1u)",
        [
            *("global_store_dword", "buffer_wbl2 sc1", "s_waitcnt vmcnt(0)"),
            *("global_atomic_add sc0", "s_waitcnt vmcnt(0)", "buffer_inv sc1"),
        ],
    ),
    "swap_acquire_device": (
        "*out = compare_swap_acquire<Scope::device>(word, 1u, 2u)",
        ["global_atomic_cmpswap sc0", "s_waitcnt vmcnt(0)", "buffer_inv sc1"],
    ),
}


@pytest.fixture(scope="module")
def operations(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("operations")
    source = folder / "operations.hip"
    head = "#include <hip/hip_runtime.h>\n#include <flashmoe/platform.hpp>\nusing namespace flashmoe;\n"
    kernel = 'extern "C" __global__ void {}(std::uint32_t* word, std::uint32_t* out) {{ {}; }}\n'
    source.write_text(head + "".join(kernel.format(name, body) for name, (body, _) in OPERATIONS.items()))
    command = [compiler.path, *compiler.compile_flags, "-O3", "-std=c++17", "-I", str(source_folder() / "include")]
    command += ["-nogpulib", "--offload-device-only", "-c", str(source), "-o", str(folder / "operations.o")]
    subprocess.run(command, check=True)
    return {kernel.name: kernel for kernel in read_kernels(folder / "operations.o")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_orders_memory_by_its_scope(operations: dict[str, Kernel], name: str) -> None:
    def shape(instruction: Instruction) -> str:
        bits = re.findall(r"\b(?:sc0|sc1|vmcnt\(0\))", instruction.operands)
        return " ".join([instruction.name, *bits])

    kinds = ("global_load", "global_store", "global_atomic", "buffer_")
    code = [i for i in operations[name].code if i.name.startswith(kinds) or "vmcnt(0)" in i.operands]
    found = list(map(shape, code))
    wanted = OPERATIONS[name][1]
    assert found[: len(wanted)] == wanted
    assert not [one for one in found[len(wanted) :] if one.startswith("buffer_")]


# ---- the whole kernel


def drains(instruction: Instruction) -> bool:
    return instruction.name == "s_waitcnt" and "vmcnt(0)" in instruction.operands


def touches_memory(instruction: Instruction) -> bool:
    return instruction.name.startswith(("global_", "flat_"))


@pytest.mark.parametrize("name", GENERAL)
def test_a_release_is_waited_for_before_anything_can_tell_of_it(kernels: dict[str, Kernel], name: str) -> None:
    code = kernels[name].code
    releases = [n for n, i in enumerate(code) if i.name == "buffer_wbl2"]
    assert releases
    for n in releases:
        after = next(i for i in code[n + 1 :] if drains(i) or touches_memory(i) or i.target or i.name == "s_barrier")
        assert drains(after), f"{name}: at {code[n].address:#x}"


@pytest.mark.parametrize("name", GENERAL)
def test_an_acquire_comes_after_the_loads_before_it(kernels: dict[str, Kernel], name: str) -> None:
    code = kernels[name].code
    acquires = [n for n, i in enumerate(code) if i.name == "buffer_inv"]
    assert acquires
    for n in acquires:
        before = next(i for i in reversed(code[:n]) if drains(i) or touches_memory(i))
        assert drains(before), f"{name}: at {code[n].address:#x}"


class Crew:
    """The loop around the matrix instructions: waves that take commands at a barrier and work them off.

    begins, ends: the acquires and releases for all PEs, with which a command begins and ends.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.code = kernel.code
        place = {instruction.address: n for n, instruction in enumerate(self.code)}
        self._next: list[list[int]] = [[] for _ in self.code]
        previous: list[list[int]] = [[] for _ in self.code]
        for n, instruction in enumerate(self.code):
            if instruction.target is not None:
                self._next[n].append(place[instruction.target])
            if instruction.name not in ("s_branch", "s_endpgm") and n + 1 < len(self.code):
                self._next[n].append(n + 1)
            for follower in self._next[n]:
                previous[follower].append(n)
        mfma = {n for n, instruction in enumerate(self.code) if instruction.name.startswith("v_mfma")}
        first = {min(mfma)}
        self._loop = _closure(first, self._next) & _closure(first, previous)
        assert mfma <= self._loop
        self.begins, self.ends = (
            {n for n in self.named(name) if self.code[n].scope == "system"} for name in ("buffer_inv", "buffer_wbl2")
        )
        assert self.begins and self.ends

    def named(self, *beginnings: str) -> set[int]:
        """Instructions of the loop whose names begin so."""
        return {n for n in self._loop if self.code[n].name.startswith(beginnings)}

    def reached(self, starts: Iterable[int], stop: Callable[[int], bool]) -> set[int]:
        """Where one gets from starts, in the loop or out of it; nobody goes on from where `stop` is true."""
        first = {m for n in starts for m in self._next[n]}
        return _closure(first, self._next, stop)


def _closure(starts: set[int], neighbours: list[list[int]], stop: Callable[[int], bool] = lambda n: False) -> set[int]:
    seen, todo = set(starts), list(starts)
    while todo:
        n = todo.pop()
        new = [] if stop(n) else [m for m in neighbours[n] if m not in seen]
        seen.update(new)
        todo += new
    return seen


@pytest.fixture(scope="module", params=GENERAL)
def crew(request: pytest.FixtureRequest, kernels: dict[str, Kernel]) -> Crew:
    return Crew(kernels[request.param])


def test_every_wave_releases_its_stores_before_the_barrier_that_ends_a_command(crew: Crew) -> None:
    """No way leads from a store to the next command, or out, that does not pass a release and then a barrier."""
    stores = [n for n in crew.named("global_store", "flat_store") if crew.code[n].scope == "wave"]
    assert stores
    unreleased = crew.reached(stores, stop=crew.ends.__contains__)
    assert unreleased.isdisjoint(crew.begins)
    assert not any(crew.code[n].name == "s_endpgm" for n in unreleased)
    unmet = crew.reached(crew.ends, stop=crew.named("s_barrier").__contains__)
    assert unmet.isdisjoint(crew.begins)


def test_every_wave_acquires_before_it_reads_for_a_command(crew: Crew) -> None:
    """Between the release that ends a command and the acquire that begins the next, a wave reads LDS alone."""
    between = crew.reached(crew.ends, stop=crew.begins.__contains__)
    assert between.isdisjoint(crew.named("global_load", "flat_load"))


# ---- the page


def test_the_page_has_the_figures_of_these_sources(library: Path, compiler: Compiler) -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    (title,) = (line for line in page if line.startswith("## gfx942"))
    if title != f"## gfx942, by {compiler.name}":
        pytest.skip(f"{PAGE.name} is of another compiler ({title}; here {compiler.name})")
    made = next(line for line in page if line.startswith("Made by"))
    assert [line for line in page if line in gfx942_rows(library)] == gfx942_rows(library), f"out of date: {made}"
