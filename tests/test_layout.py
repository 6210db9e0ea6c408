"""The layout is the dataflow: a file's place says what it may import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flashmoe"
SPECS = [
    "model", "machine", "routing", "families", "recorded", "counts", "placement", "weights", "trace", "tasks", "policy",
    "schedule", "liveness",
]  # fmt: skip
READERS = ["answers", "chrome", "compare", "explain", "plots"]


def imported(path):
    """Every flashmoe module that a file imports, wherever in the file, with the package's name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively: write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "flashmoe"}


def files_of(name):
    """A module's file, or a package's files."""
    single = PACKAGE / f"{name}.py"
    return [single] if single.is_file() else sorted((PACKAGE / name).rglob("*.py"))


def imports_from(path, *packages):
    return sorted(n for n in imported(path) if any(f"{n}.".startswith(f"flashmoe.{p}.") for p in packages))


@pytest.mark.parametrize(("package", "other"), [("sim", "hw"), ("hw", "sim")])
def test_sim_and_hw_stay_apart(package, other):
    paths = sorted((PACKAGE / package).rglob("*.py"))
    assert paths
    assert {path.name: imports_from(path, other) for path in paths if imports_from(path, other)} == {}


@pytest.mark.parametrize("name", SPECS)
def test_specs_know_no_executor_and_no_reader(name):
    assert imports_from(PACKAGE / f"{name}.py", "sim", "hw", "cli", "demo", *READERS) == []


@pytest.mark.parametrize("name", READERS)
def test_readers_take_traces_from_whoever_made_them(name):
    assert files_of(name)
    for path in files_of(name):
        assert imports_from(path, "sim", "hw", "cli", "demo") == [], path.name


@pytest.mark.parametrize("package", ["sim", "hw"])
def test_executors_know_no_reader(package):
    for path in (PACKAGE / package).rglob("*.py"):
        assert imports_from(path, "cli", "demo", *READERS) == [], path.name


def test_there_is_no_drawer_for_odds_and_ends():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_shared_headers_include_only_each_other():
    for path in (ROOT / "hip_src" / "include" / "flashmoe").glob("*.hpp"):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert (ROOT / "hip_src" / "include" / name).is_file(), f"{path.name} includes {name}"
