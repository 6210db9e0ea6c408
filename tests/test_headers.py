"""Each shared header stands alone: plain C++17 on a host compiler, and nothing that a device cannot do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).parents[1] / "hip_src" / "include"
HEADERS = sorted((INCLUDE / "flashmoe").glob("*.hpp"))


def test_there_are_headers():
    assert {"task_graph.hpp", "queue.hpp", "exchange.hpp", "platform.hpp"} <= {path.name for path in HEADERS}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here; any machine with a host compiler runs this")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_a_header_compiles_alone(header):
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["g++", "-std=c++17", *warnings, "-fsyntax-only", "-x", "c++", f"-I{INCLUDE}", "-"]
    # included by a file of its own: as the main file it would be warned for its #pragma once; twice, to see the guard
    text = f'#include "flashmoe/{header.name}"\n' * 2
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
