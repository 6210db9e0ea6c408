"""Device libraries: hip_src compiled for one layer shape, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashmoe.hw.compilers import TARGETS, BuildError, Compiler, find_compiler
from flashmoe.model import MoEModel

__all__ = [
    "TARGETS",
    "BuildError",
    "build_library",
    "build_microbenchmarks",
    "cache_folder",
    "check_shape",
    "log_of",
    "source_folder",
]


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


def log_of(library: Path) -> Path:
    """What the compiler said when it made a library; nvcc says what each kernel takes."""
    return library.with_suffix(".log")


def build_library(model: MoEModel, target: str = "sm_90", *, progress: Callable[[str], None] | None = None) -> Path:
    """Compile the device code for a model's shape, unless the cache has it.

    progress: called with one line before a compile; not on a hit.
    Returns: the shared library in the cache; its name holds a digest of sources, flags and compiler version.
    Raises: ValueError for a shape or target that cannot be done; BuildError when there is no compiler, it fails, or
    the cache cannot be written.
    """
    check_shape(model)
    compiler = find_compiler(target)
    sources = source_folder()
    flags = [
        "-O3",
        "-std=c++17",
        *compiler.compile_flags,
        f"-DFLASHMOE_D_MODEL={model.d_model}",
        f"-DFLASHMOE_D_FF={model.d_ff}",
        f"-DFLASHMOE_NUM_EXPERTS={model.num_experts}",
        f"-DFLASHMOE_TOP_K={model.top_k}",
        f"-DFLASHMOE_NORM_TOPK={int(model.norm_topk_prob)}",
    ]
    name = f"{target}-{_digest(sources, ('include', 'kernel', 'device'), compiler, flags)}.so"
    shape = f"d_model {model.d_model}, d_ff {model.d_ff}, {model.num_experts} experts, top {model.top_k}"
    return _cached(name, compiler, flags, sources / "device", f"{shape} for {target}", progress)


def build_microbenchmarks(*, progress: Callable[[str], None] | None = None) -> Path:
    """Compile the program that measures an sm_90 GPU (hip_src/calibrate), unless the cache has it.

    Returns: the program; it needs a driver where it runs, no CUDA toolkit. progress, Raises: as `build_library`.
    """
    compiler = find_compiler("sm_90")
    sources = source_folder()
    flags = ["-O3", "-std=c++17", *compiler.compile_flags]
    name = f"calibrate-{_digest(sources, ('include', 'kernel', 'calibrate'), compiler, flags)}"
    return _cached(name, compiler, flags, sources / "calibrate", "microbenchmarks for sm_90", progress)


def _cached(
    name: str,
    compiler: Compiler,
    flags: list[str],
    folder: Path,
    what: str,
    progress: Callable[[str], None] | None,
) -> Path:
    """The file of this name in the cache, compiled if need be."""
    done = cache_folder() / name
    if _is_whole(done):
        return done
    if progress is not None:
        progress(f"compiling {what} with {compiler.name}")
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        # a folder of its own, then renames: builders at the same time do the work twice, and nobody sees half a file
        with tempfile.TemporaryDirectory(prefix="build-", dir=done.parent) as scratch:
            made = Path(scratch) / done.name
            log_of(made).write_text(_compile(compiler, flags, folder, made))
            log_of(made).replace(log_of(done))
            made.replace(done)
    except OSError as error:
        raise BuildError(
            f"cannot write {error.filename or done}: {error.strerror} (FLASHMOE_CACHE names another folder)"
        ) from error
    return done


def _compile(compiler: Compiler, flags: list[str], folder: Path, made: Path) -> str:
    """Make a library (.so) or a program of all files that this compiler takes, and give what it said."""
    files = sorted(file for file in folder.iterdir() if file.suffix in compiler.suffixes)
    if not files:
        raise BuildError(f"{folder} has no {' or '.join(compiler.suffixes)} file")
    # here, so that the cache's names do not depend on where the sources lie
    flags = [*flags, *("-I", str(folder.parent / "include"), "-I", str(folder.parent / "kernel"))]
    if compiler.device_libraries is not None:
        flags = [*flags, f"--hip-device-lib-path={_with_gfx942(compiler.device_libraries, made.parent / 'bitcode')}"]
    objects = [made.parent / f"{file.stem}.o" for file in files]
    jobs = [[compiler.path, *flags, "-c", str(file), "-o", str(o)] for file, o in zip(files, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # with more at once, each waits for the others
        said = list(pool.map(_call, jobs))
    # -z defs: a function that is missing is an error now, not when the library is loaded
    shared = ["-shared", "-Xlinker", "-z", "-Xlinker", "defs"] if made.suffix == ".so" else []
    said.append(_call([compiler.path, *shared, *map(str, objects), *compiler.link_flags, "-o", str(made)]))
    return "".join(said)


def _with_gfx942(bitcode: Path, folder: Path) -> Path:
    """A folder with AMD's device libraries, and the gfx942 part that Debian's lack: the one of 940 says the same."""
    folder.mkdir()
    for file in bitcode.glob("*.bc"):
        (folder / file.name).symlink_to(file)
    part = folder / "oclc_isa_version_942.bc"
    if not part.exists():
        part.symlink_to(bitcode / "oclc_isa_version_940.bc")
    return folder


def _is_whole(library: Path) -> bool:
    """False for a file that a full disk or a power failure cut: the section headers end an ELF file."""
    try:
        with library.open("rb") as file:
            header = file.read(64)
    except OSError:  # missing, as a rule; whatever else it is, writing will tell
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, entries = struct.unpack_from("<HH", header, 58)
    return library.stat().st_size >= int(offset + entry_bytes * entries)


def _digest(sources: Path, folders: tuple[str, ...], compiler: Compiler, flags: list[str]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((sources / folder).rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(sources)).encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update("\0".join([*flags, *compiler.link_flags, compiler.name]).encode())
    return digest.hexdigest()[:24]


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"{Path(command[0]).name} failed with status {done.returncode}:\n{last}")
    return done.stdout + done.stderr
