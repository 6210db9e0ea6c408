"""What compilers say of kernels, read: gfx942 code objects, and the log of nvcc's assembler."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from flashmoe.hw.code_object import Instruction, Kernel, code_objects, read_kernels
from flashmoe.hw.compilers import BuildError, find_compiler
from flashmoe.hw.ptxas import CudaKernel, read_log

SOURCE = """
#include <hip/hip_runtime.h>
typedef short Quad __attribute__((ext_vector_type(4)));
typedef float Sums __attribute__((ext_vector_type(4)));
__device__ unsigned lane() { return __builtin_amdgcn_workitem_id_x(); }
namespace flashmoe {
__global__ void __launch_bounds__(128) sum(float* out, const float* in, unsigned count) {
  __shared__ float shared[250];
  for (unsigned i = 0; i < count; ++i) {
    shared[lane()] = in[i * 128 + lane()];
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    out[lane()] += shared[127 - lane()];
  }
}
__global__ void __launch_bounds__(1024) multiply(Sums* out, const Quad* in) {
  Sums sums = {0, 0, 0, 0};
  sums = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(in[lane()], in[64], sums, 0, 0, 0);
  out[lane()] = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(in[65], in[lane()], sums, 0, 0, 0);
}
}  // namespace flashmoe
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler = find_compiler("gfx942")
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("code_object")
    (folder / "two.hip").write_text(SOURCE)
    command = [compiler.path, *compiler.compile_flags, "-O3", "-nogpulib", "--offload-device-only"]
    subprocess.run([*command, "-c", str(folder / "two.hip"), "-o", str(folder / "two.o")], check=True)
    return folder / "two.o"


@pytest.fixture(scope="module")
def kernels(library: Path) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in read_kernels(library)}


def test_figures(kernels: dict[str, Kernel]) -> None:
    assert sorted(kernels) == ["multiply", "sum"]
    assert (kernels["sum"].wg_threads, kernels["sum"].lds_bytes) == (128, 1000)
    assert (kernels["multiply"].wg_threads, kernels["multiply"].lds_bytes) == (1024, 0)
    assert [kernels[name].count("v_mfma") for name in ("sum", "multiply")] == [0, 2]
    for kernel in kernels.values():
        assert (kernel.scratch_bytes, kernel.vgpr_spills, kernel.sgpr_spills) == (0, 0, 0)
        assert 0 < kernel.vgprs <= kernel.vgpr_limit and 0 <= kernel.agprs < kernel.vgprs


@pytest.mark.parametrize("threads, limit", [(64, 512), (256, 512), (257, 256), (320, 256), (512, 256), (1024, 128)])
def test_registers_that_a_work_group_leaves_to_a_lane(threads: int, limit: int) -> None:
    """A CU has 4 SIMDs of 512 registers a lane; the fullest SIMD decides."""
    assert Kernel("k", threads, 0, 0, 0, 0, 0, 0, 0, ()).vgpr_limit == limit


def test_instructions_are_those_of_the_kernel(kernels: dict[str, Kernel]) -> None:
    for kernel in kernels.values():
        addresses = [instruction.address for instruction in kernel.code]
        assert addresses == sorted(set(addresses))
        assert any(instruction.name == "s_endpgm" for instruction in kernel.code)
        branches = [i for i in kernel.code if i.name.startswith(("s_branch", "s_cbranch"))]
        assert all(branch.target in addresses for branch in branches)
    loop = [i for i in kernels["sum"].code if i.target is not None and i.target < i.address]
    assert loop and kernels["sum"].count("s_barrier") > 0


@pytest.mark.parametrize(
    "operands, scope",
    [("v1, v0, s[0:1]", "wave"), ("v1, v0 sc0", "group"), ("v1, v0 offset:8 sc1", "agent"), ("sc0 sc1", "system")],
)
def test_scope_of_a_memory_instruction(operands: str, scope: str) -> None:
    assert Instruction(0, "global_load_dword", operands, None).scope == scope


def test_code_objects_of_other_targets_are_left_out() -> None:
    def bundle(*entries: tuple[bytes, bytes]) -> bytes:
        head, place = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(entries)), 200
        for triple, data in entries:
            head += struct.pack("<QQQ", place, len(data), len(triple)) + triple
            place += len(data)
        return head.ljust(200, b"\0") + b"".join(data for _, data in entries)

    one = bundle((b"host-x86_64-unknown-linux--", b""), (b"hipv4-amdgcn-amd-amdhsa--gfx942", b"first"))
    two = bundle((b"hipv4-amdgcn-amd-amdhsa--gfx90a", b"no"), (b"hipv4-amdgcn-amd-amdhsa--gfx942", b"second"))
    assert code_objects(b"ELF, say" + one + b"between" + two) == [b"first", b"second"]


def test_a_library_without_gfx942_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "host.so").write_bytes(b"nothing")
    with pytest.raises(BuildError, match=r"host\.so has no gfx942 kernel"):
        read_kernels(tmp_path / "host.so")


def test_missing_tools_say_what_to_install(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("ROCM_PATH", str(library.parent))
    with pytest.raises(BuildError, match=r"llvm-objdump-19 is not in PATH \(install llvm-19\)"):
        read_kernels(library)


def test_the_log_of_the_assembler() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8flashmoe9moe_layerILj2EEEvPKt' for 'sm_90a'
ptxas info    : Function properties for _ZN8flashmoe6reportEv
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for _ZN8flashmoe9moe_layerILj2EEEvPKt
    152 bytes stack frame, 160 bytes spill stores, 168 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 152 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'flashmoe_general' for 'sm_90a'
ptxas info    : Function properties for flashmoe_general
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers
"""
    assert read_log(log) == [
        CudaKernel("flashmoe_general", 96, 0, 0, 0),
        CudaKernel("moe_layer<2u>", 168, 152, 328, 1024),
    ]
