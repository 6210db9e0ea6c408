"""flashmoe doctor."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from flashmoe.cli.run import TOLERANCE, random_tokens
from flashmoe.cli.screen import WorkFailed, as_bytes, as_time, print_table, say
from flashmoe.hw.build import cache_folder
from flashmoe.hw.compilers import TARGETS, BuildError, find_compiler
from flashmoe.model import MoEModel

_OPTIONAL = {
    "torch": "check against transformers (demo, tests)",
    "transformers": "check against transformers (demo, tests)",
    "pandas": "Trace.to_pandas()",
    "ipykernel": "notebooks",
}


EXAMPLES = "[bold]Example[/bold]\n\nflashmoe doctor"


def doctor() -> None:
    """Say what is installed and what this machine has, and compute a tiny layer to see that it works."""
    from flashmoe import _native
    from flashmoe.calibrate import num_cores

    rows = [
        ["flashmoe", metadata.version("flashmoe"), "native module " + os.path.basename(_native.__file__ or "?")],
        ["python", platform.python_version(), sys.executable],
        ["numpy", np.__version__, ""],
        ["compiler", _compiler(), "only to build from source"],
        ["cores", str(num_cores()), f"{platform.machine()}, {platform.system()}"],
        ["memory", _memory(), ""],
        *([f"for {target}", *_device_compiler(target)] for target in TARGETS),
        ["libraries", *_libraries()],
        ["GPUs", ", ".join(_gpus()) or "none", "as the driver lists them"],
    ]
    for package, purpose in _OPTIONAL.items():
        try:
            rows.append([package, metadata.version(package), purpose])
        except metadata.PackageNotFoundError:
            rows.append([package, "not installed", f"optional: {purpose}"])
    print_table(["", "", ""], rows, num_names=3)
    say("")
    model = MoEModel(d_model=64, d_ff=32, num_experts=8, top_k=2, name="tiny")
    error, makespan_us = _self_test(model)
    if not error <= TOLERANCE[model.dtype]:
        raise WorkFailed(f"self-test: relative error {error:.3g} (at most {TOLERANCE[model.dtype]:g} in {model.dtype})")
    say(
        f"Self-test passed: a tiny layer on 2 PEs x 2 threads took {as_time(makespan_us)}, "
        f"relative error {error:.1e} against the reference.",
        "green",
    )


def _self_test(model: MoEModel) -> tuple[float, float]:
    """Relative error against the reference and makespan [us] of a small layer."""
    from flashmoe import reference
    from flashmoe.hw import run
    from flashmoe.weights import Weights

    weights, x = Weights.random(model), random_tokens(model, [4, 4], seed=0)
    result = run(model, weights, x, workers=2, deadline_s=10)
    pairs = zip(x, result.routing.topk_idx, result.routing.topk_weights, strict=True)
    wanted = [reference.moe_layer(model, weights, rows, (idx, scales)) for rows, idx, scales in pairs]
    return reference.relative_error(result.outputs, wanted), result.trace.makespan_us


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return "none found"
    done = subprocess.run([path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return f"{os.path.basename(path)} {done.stdout.strip()}"


def _device_compiler(target: str) -> tuple[str, str]:
    try:
        compiler = find_compiler(target)
    except BuildError as error:
        return "no compiler", str(error)
    return compiler.name, compiler.path


def _libraries() -> tuple[str, str]:
    """How many device libraries the cache has, and where it is."""
    sizes = [file.stat().st_size for file in cache_folder().glob("*.so")]
    return f"{len(sizes)}, {as_bytes(sum(sizes))}", f"built for a layer's shape at its first use, in {cache_folder()}"


def _gpus() -> list[str]:
    """NVIDIA's by model, AMD's by architecture; from the drivers' files, so that no runtime is needed."""
    found = []
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        model = re.search(r"^Model:\s*(.+)", file.read_text(), re.M)
        found.append(model[1] if model else "unknown NVIDIA GPU")
    for file in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        version = re.search(r"^gfx_target_version (\d+)", file.read_text(), re.M)
        if version and (number := int(version[1])):  # 0: a CPU
            found.append(f"gfx{number // 10000}{number // 100 % 100}{number % 100:x}")
    return sorted(found)


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return "unknown"
    return as_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
