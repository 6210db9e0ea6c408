"""Queues and exchange under ThreadSanitizer: random delays, skewed routing, every queue, PEs epochs apart."""

import shutil
import subprocess
from pathlib import Path

import pytest

HIP_SRC = Path(__file__).parent.parent / "hip_src"


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    """The stress test, built with ThreadSanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("stress") / "stress"
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-pthread"]
    command += [f"-I{HIP_SRC / 'include'}", f"-I{HIP_SRC / 'kernel'}", "-o", str(program)]
    build = subprocess.run(
        [*command, str(HIP_SRC / "tests/stress.cpp"), str(HIP_SRC / "kernel/cpu_layer.cpp")],
        capture_output=True,
        text=True,
    )
    if "tsan" in build.stderr and "cannot find" in build.stderr:
        pytest.skip("needs the ThreadSanitizer runtime of g++ (libtsan)")
    assert build.returncode == 0, build.stderr
    return program


@pytest.mark.parametrize("rounds, max_delay_us, seed", [(60, 100, 1), (200, 0, 2)])
def test_threads_race_nowhere_and_results_are_bit_equal(stress, rounds, max_delay_us, seed):
    result = subprocess.run(
        [stress, str(rounds), str(max_delay_us), str(seed)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == f"{rounds} rounds right\n"
    assert "WARNING: ThreadSanitizer" not in result.stderr
