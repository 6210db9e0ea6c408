"""compute-sanitizer has nothing to say of either kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# racecheck does not see that the lanes of a warp meet before one of them arrives for all, nor that asynchronous
# copies arrive: it reports every slot that the warps of the pipelined kernel hand on. Fibers check these.
CASES = [
    (tool, kernel)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    for kernel in ("general", "pipeline")
    if (tool, kernel) != ("racecheck", "pipeline")
]


@pytest.mark.cuda
@pytest.mark.parametrize(("tool", "kernel"), CASES)
def test_compute_sanitizer_reports_nothing(tool, kernel):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer in PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, str(HERE / "small_launches.py"), "cuda", kernel]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout, done.stdout
