"""Compilers of device libraries: which one makes code for a target here, and what to install where none does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("sm_90", "gfx942")

_OLDEST_NVCC = (12, 4)
_OLDEST_HIPCC = (6, 0)  # the first ROCm whose compiler knows gfx942
_DEBIAN_PACKAGES = ("clang-19", "lld-19", "clang-tools-19", "libamdhip64-dev", "rocm-device-libs")
_DEVICE_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")  # Debian's rocm-device-libs
_HIP_HEADER = Path("/usr/include/hip/hip_runtime.h")


class BuildError(RuntimeError):
    """No library: a compiler is missing, or did not get through, or there is no place to keep what it makes."""


@dataclass(frozen=True)
class Compiler:
    """A compiler that makes code for a target. Files of these suffixes are compiled, then linked to one library."""

    path: str
    version: str
    suffixes: tuple[str, ...]  # .hip is for every target
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    device_libraries: Path | None = None  # AMD's bitcode that the compiler does not find by itself

    @property
    def name(self) -> str:
        return f"{Path(self.path).name} {self.version}"


def find_compiler(target: str) -> Compiler:
    """The compiler for a target: nvcc; hipcc, or else clang++-19 with Debian's HIP packages.

    Looks in PATH, then where CUDA_HOME and ROCM_PATH point (/usr/local/cuda, /opt/rocm).
    Raises: ValueError for an unknown target; BuildError saying what to install.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} (accepted: {', '.join(TARGETS)})")
    return _cuda() if target == "sm_90" else _hip()


def source_names(symbols: list[str]) -> list[str]:
    """Names as the source writes them, without arguments and this project's namespaces; unchanged without binutils."""
    path = shutil.which("c++filt")
    if path is None or not symbols:
        return symbols
    done = subprocess.run([path, "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |flashmoe::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]


def _cuda() -> Compiler:
    path = _find("nvcc", "CUDA_HOME", "/usr/local/cuda")
    if path is None:
        raise BuildError("nvcc is not in PATH nor in $CUDA_HOME/bin (install the CUDA toolkit, 12.4 or later)")
    version = _version(path, r"release (\d+\.\d+)")
    if _numbers(version) < _OLDEST_NVCC:
        raise BuildError(f"{path} is version {version} (install the CUDA toolkit, 12.4 or later)")
    if shutil.which("g++") is None:
        raise BuildError("nvcc needs a host compiler, and g++ is not in PATH (install g++)")
    compile_flags = ("-x", "cu", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "-Xptxas=-v")
    return Compiler(path, version, (".cu", ".hip"), compile_flags, ("-cudart", "static"))


def _hip() -> Compiler:
    path = _find("hipcc", "ROCM_PATH", "/opt/rocm")
    found = "neither hipcc nor clang++-19 is in PATH"
    if path is not None:
        version = _version(path, r"HIP version: (\d+\.\d+)")
        if _numbers(version) >= _OLDEST_HIPCC:
            flags = ("--offload-arch=gfx942", "-gline-tables-only")
            return Compiler(path, version, (".hip",), (*flags, "-fPIC"), flags)
        found = f"{path} is version {version}, and there is no clang++-19 in PATH"
    clang = shutil.which("clang++-19")
    if clang is None:
        raise BuildError(f"{found} (install ROCm, 6.0 or later, or Debian's {' '.join(_DEBIAN_PACKAGES)})")
    if lacking := [package for package in _DEBIAN_PACKAGES if not _has(clang, package)]:
        raise BuildError(f"{clang} lacks what it needs for gfx942 (install {' '.join(lacking)})")
    return Compiler(
        clang,
        _version(clang, r"clang version (\d+\.\d+\.\d+)"),
        (".hip",),
        ("-x", "hip", "--offload-arch=gfx942", "--rocm-path=/usr", "-gline-tables-only", "-fPIC"),
        ("--hip-link", "--offload-arch=gfx942", "--rocm-path=/usr", "-lamdhip64"),
        _DEVICE_LIBRARIES,
    )


def _has(clang: str, package: str) -> bool:
    if package == "libamdhip64-dev":
        return _HIP_HEADER.is_file()
    if package == "rocm-device-libs":
        return (_DEVICE_LIBRARIES / "ocml.bc").is_file()
    program = {"lld-19": "lld", "clang-tools-19": "clang-offload-bundler"}.get(package)
    # clang answers with a path where it has the program, else with the bare name
    return program is None or os.sep in _output(clang, f"-print-prog-name={program}").strip()


def _find(name: str, variable: str, usual: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=Path(os.environ.get(variable) or usual, "bin"))


def _version(path: str, pattern: str) -> str:
    said = _output(path, "--version")
    match = re.search(pattern, said)
    if match is None:
        last = (said.strip().splitlines() or ["nothing"])[-1]
        raise BuildError(f"{path} --version does not tell its version: {last}")
    return match[1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot start {command[0]}: {error.strerror}") from error
    return done.stdout + done.stderr
