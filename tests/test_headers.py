"""Each header stands alone: plain C++17 on a host compiler; a shared one does nothing that a device cannot do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "hip_src"
INCLUDE, ENGINE = SOURCE / "include", SOURCE / "engine"
HEADERS = sorted((INCLUDE / "flashmoe").glob("*.hpp"))
ENGINE_HEADERS = sorted(ENGINE.glob("*.hpp"))
ARCH_HEADERS = sorted((SOURCE / "kernel" / "arch").glob("*.hpp"))


def test_there_are_headers():
    assert {"task_graph.hpp", "queue.hpp", "exchange.hpp", "platform.hpp"} <= {path.name for path in HEADERS}
    assert {"engine.hpp", "clock.hpp"} <= {path.name for path in ENGINE_HEADERS}
    assert {"sm90.hpp", "gfx942.hpp"} <= {path.name for path in ARCH_HEADERS}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here; any machine with a host compiler runs this")
@pytest.mark.parametrize(
    "header", HEADERS + ENGINE_HEADERS + ARCH_HEADERS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_header_compiles_alone(header):
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    include = [f"-I{INCLUDE}", f"-I{ENGINE}"] if header in ENGINE_HEADERS else [f"-I{INCLUDE}"]
    command = ["g++", "-std=c++17", *warnings, "-fsyntax-only", "-x", "c++", *include, "-"]
    # included by a file of its own: as the main file it would be warned for its #pragma once; twice, to see the guard
    text = f'#include "{header}"\n' * 2
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_shared_code_does_nothing_that_a_device_cannot(header):
    code = re.sub(r"//[^\n]*", "", header.read_text())
    assert (
        re.findall(r"\b(throw|try|virtual|new|delete|malloc|free|printf|std::(?:vector|string|function))\b", code) == []
    )
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', code)
    assert {name for name in includes if not name.startswith("flashmoe/")} <= {
        "cstdint",
        "type_traits",
        # the host's side of what differs between platforms
        *(["sched.h", "time.h"] if header.name == "platform.hpp" else []),
    }
