"""Every notebook runs from top to bottom in less than a minute, and is stored without outputs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def code_of(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in code_cells(path))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == [
        "01-quickstart",
        "02-write-your-own-policy",
        "03-skew-and-placement",
        "04-how-fine-should-a-task-be",
        "05-what-the-links-cost",
        "06-measured-and-simulated",
    ]


@PATHS
def test_notebook_runs(path: Path) -> None:
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", code_of(path)],
        cwd=path.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@PATHS
def test_notebook_is_plain(path: Path) -> None:
    """No outputs, which would differ on every machine; no classes, which belong into the package."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_cells(path))
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(code_of(path))))
