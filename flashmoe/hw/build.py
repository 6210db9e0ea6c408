"""Device libraries: hip_src compiled for one layer shape, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashmoe.model import MoEModel

TARGETS = ("sm_90", "gfx942")

_BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")


class BuildError(RuntimeError):
    """No library: a compiler is missing, or did not get through."""


def check_shape(model: MoEModel) -> None:
    """Raises: ValueError naming the size that no device kernel can do, and what is accepted."""
    if model.dtype != "bf16":
        raise ValueError(f"dtype={model.dtype!r} (accepted on a GPU: 'bf16')")
    for name in ("d_model", "d_ff"):
        value = getattr(model, name)
        if value % 64 or not 64 <= value <= 8192:
            raise ValueError(f"{name}={value} (accepted on a GPU: multiples of 64 in 64..8192)")
    for name, most in (("num_experts", 512), ("top_k", 16)):
        if getattr(model, name) > most:
            raise ValueError(f"{name}={getattr(model, name)} (accepted on a GPU: 1..{most})")


def source_folder() -> Path:
    """hip_src of the installed package, or of the source checkout. Raises: BuildError where there is neither."""
    package = Path(__file__).parents[1]
    for folder in (package / "hip_src", package.parent / "hip_src"):
        if (folder / "device" / "api.h").is_file():
            return folder
    raise BuildError(f"no sources of the device library (looked in {package / 'hip_src'} and beside the package)")


def cache_folder() -> Path:
    """$FLASHMOE_CACHE, or ~/.cache/flashmoe."""
    return Path(os.environ.get("FLASHMOE_CACHE") or Path.home() / ".cache" / "flashmoe").expanduser()


def build_library(model: MoEModel, target: str = "sm_90", *, progress: Callable[[str], None] | None = None) -> Path:
    """Compile the device code for a model's shape, unless the cache has it.

    target: sm_90 gives a shared library; gfx942 a code object.
    progress: called with one line before a compile; not on a hit.
    Returns: the file in the cache; its name holds a digest of sources, flags and compiler version.
    Raises: ValueError for a shape or target that cannot be done; BuildError when there is no compiler or it fails.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} (accepted: {', '.join(TARGETS)})")
    check_shape(model)
    sources = source_folder()
    compiler, flags = _cuda(sources) if target == "sm_90" else _hip(sources)
    flags += [
        f"-DFLASHMOE_D_MODEL={model.d_model}",
        f"-DFLASHMOE_D_FF={model.d_ff}",
        f"-DFLASHMOE_NUM_EXPERTS={model.num_experts}",
        f"-DFLASHMOE_TOP_K={model.top_k}",
        f"-DFLASHMOE_NORM_TOPK={int(model.norm_topk_prob)}",
    ]
    suffix = "so" if target == "sm_90" else "hsaco"
    done = cache_folder() / f"{target}-{_digest(sources, compiler, flags)}.{suffix}"
    if done.is_file():
        return done
    if progress is not None:
        shape = f"d_model {model.d_model}, d_ff {model.d_ff}, {model.num_experts} experts, top {model.top_k}"
        progress(f"compiling {shape} for {target} with {Path(compiler).name}")
    done.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own, then one rename: builders at the same time do the work twice, and nobody sees half a file
    with tempfile.TemporaryDirectory(dir=done.parent) as scratch:
        made = Path(scratch) / done.name
        if target == "sm_90":
            _compile_cuda(compiler, flags, sorted((sources / "device").glob("*.cu")), made)
        else:
            _call([compiler, *flags, str(sources / "device" / "general.hip"), "-o", str(made)])
        made.replace(done)
    return done


def _cuda(sources: Path) -> tuple[str, list[str]]:
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise BuildError("nvcc is not in PATH (install the CUDA toolkit, 12.4 or later)")
    flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "--threads", "0"]
    return compiler, [*flags, "-I", str(sources / "include"), "-I", str(sources / "kernel")]


def _compile_cuda(compiler: str, flags: list[str], files: list[Path], made: Path) -> None:
    if not files:
        raise BuildError("hip_src/device has no .cu file")
    objects = [made.parent / f"{file.stem}.o" for file in files]
    jobs = [[compiler, *flags, "-c", str(file), "-o", str(o)] for file, o in zip(files, objects, strict=True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_call, jobs))
    _call([compiler, "-shared", "-cudart", "static", *map(str, objects), "-o", str(made)])


def _hip(sources: Path) -> tuple[str, list[str]]:
    flags = ["--offload-arch=gfx942", "--no-gpu-bundle-output", "-O3", "-std=c++17"]
    flags += ["-I", str(sources / "include"), "-I", str(sources / "kernel")]
    hipcc = shutil.which("hipcc")
    if hipcc is not None:
        return hipcc, ["--genco", *flags]
    clang = shutil.which("clang++-19")
    if clang is None:
        raise BuildError("neither hipcc nor clang++-19 is in PATH (install ROCm, or clang-19 and rocm-device-libs)")
    paths = ["--rocm-path=/usr", f"--hip-device-lib-path={_bitcode()}"]
    return clang, ["-x", "hip", "--offload-device-only", *flags, *paths]


def _bitcode() -> Path:
    """A folder with the distribution's device library, and the gfx942 part that old versions of it lack."""
    made = cache_folder() / "bitcode"
    if made.is_dir():
        return made
    if not (_BITCODE / "ocml.bc").is_file():
        raise BuildError(f"{_BITCODE} has no AMD device library (install rocm-device-libs)")
    made.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=made.parent))
    for file in _BITCODE.glob("*.bc"):
        shutil.copy(file, scratch)
    version = scratch / "oclc_isa_version_942.bc"
    if not version.is_file():
        shutil.copy(scratch / "oclc_isa_version_940.bc", version)
    try:
        scratch.rename(made)
    except OSError:  # somebody else was first
        shutil.rmtree(scratch)
    return made


def _digest(sources: Path, compiler: str, flags: list[str]) -> str:
    digest = hashlib.sha256()
    for folder in ("include", "kernel", "device"):
        for file in sorted((sources / folder).rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(sources)).encode() + b"\0" + file.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update("\0".join(flags).encode() + version)
    return digest.hexdigest()[:24]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"{Path(command[0]).name} failed with status {done.returncode}:\n{last}")
