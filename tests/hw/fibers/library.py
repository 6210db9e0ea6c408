"""The device library with the pipelined kernel for this machine's CPU: the threads of a launch are fibers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flashmoe.hw import build
from flashmoe.hw.compilers import Compiler
from flashmoe.hw.library import load_library, u32
from flashmoe.model import MoEModel

_OURS = Path(__file__).parent / "hip_src"  # each file replaces the package's, or is new
_COMPILER = Compiler(
    "g++",
    "of this machine",
    (".cu", ".hip"),
    # -O1 as the last one counts; no unique symbols: each library has a scheduler of its own; longjmp between stacks
    ("-x", "c++", "-O1", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-include", "cuda_runtime.h"),
    (),
)


@contextmanager
def fibers(folder: Path) -> Iterator[None]:
    """Libraries for "cuda" are built to run on fibers. folder: for their sources."""
    sources = _sources(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmoe.hw.library.check_driver", lambda backend: None)
        patch.setattr(build, "find_compiler", lambda target: _COMPILER)
        patch.setattr(build, "source_folder", lambda: sources)
        load_library.cache_clear()
        yield
    load_library.cache_clear()


def set_seed(model: MoEModel, seed: int) -> None:
    """Decides the order of the threads in the launches from here on."""
    load_library(model, "cuda").get("seed", u32(seed))


def _sources(folder: Path) -> Path:
    sources = folder / "hip_src"
    shutil.copytree(build.source_folder(), sources, ignore=shutil.ignore_patterns("read_ceiling.cu"))
    shutil.copytree(_OURS, sources, dirs_exist_ok=True)
    for file, pattern, by in (
        (
            "kernel/pipeline/kernel.cuh",
            r"extern __shared__ .*;",
            "char* shared = fibers::shared_memory();",
        ),
        ("device/pack.hip", r"(\w+)<<<(.+)>>>\(", r"launch_apart(\1, \2, "),
    ):
        text, count = re.subn(pattern, by, (sources / file).read_text())
        assert count == 1, f"{file} has changed"
        (sources / file).write_text(text)
    return sources
