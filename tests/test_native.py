"""What is written in both languages is the same in both."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from flashmoe import _native
from flashmoe.hw import fault
from flashmoe.model import NUMPY_DTYPES, MoEModel
from flashmoe.policy import QUEUES
from flashmoe.tasks import EVENT_KINDS, ORDERS, TASK_DTYPE, Tiling, native_shape
from flashmoe.trace import KINDS

ROOT = Path(__file__).parents[1]
INCLUDE = ROOT / "hip_src" / "include" / "flashmoe"
STUB = ast.parse((ROOT / "flashmoe" / "_native.pyi").read_text())


def enum_of(header, name):
    """Enumerators of `enum class name` as {name: value}."""
    code = re.sub(r"//[^\n]*", "", (INCLUDE / header).read_text())
    body = re.search(rf"enum class {name} : u32 \{{(.*?)\}}", code, re.DOTALL)
    assert body, f"no enum class {name} in {header}"
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body[1])}


def test_a_task_row_has_the_same_fields_offsets_and_size():
    assert _native.task_dtype() == TASK_DTYPE
    assert _native.task_dtype().itemsize == TASK_DTYPE.itemsize


@pytest.mark.parametrize(
    ("header", "name", "words"),
    [
        ("task.hpp", "TaskKind", KINDS),
        ("task.hpp", "EventKind", EVENT_KINDS),
        ("policy.hpp", "Order", ORDERS),
        ("policy.hpp", "QueueKind", [{"static": "stride"}.get(queue, queue) for queue in QUEUES]),
        ("shape.hpp", "DType", tuple(NUMPY_DTYPES)),
        ("shape.hpp", "Granularity", ("tile", "token")),
        ("shape.hpp", "Down", ("tile", "rows")),
    ],
)
def test_enumerations_have_the_same_order(header, name, words):
    assert enum_of(header, name) == {word: value for value, word in enumerate(words)}


def test_fault_kinds_have_the_same_numbers():
    kinds = enum_of("fault.hpp", "FaultKind")
    assert kinds == {
        "nothing": 0,
        "deadline": fault._DEADLINE,
        "landed_mismatch": fault._LANDED_MISMATCH,
        "replay_mismatch": fault._REPLAY_MISMATCH,
        "no_resources": fault._NO_RESOURCES,
    }


def public(names):
    return {name for name in names if not name.startswith("_")}


def test_the_stub_names_what_the_module_has():
    declared = {
        node.target.id if isinstance(node, ast.AnnAssign) else node.name
        for node in STUB.body
        if isinstance(node, ast.AnnAssign | ast.FunctionDef | ast.ClassDef)
    }
    assert public(declared) == public(dir(_native))
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            methods |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            assert public(methods) == public(vars(getattr(_native, node.name))), node.name


def test_the_stub_names_the_arguments():
    for owner in [STUB, *(node for node in STUB.body if isinstance(node, ast.ClassDef))]:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            names = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]} - {"self"}
            target = getattr(getattr(_native, owner.name) if isinstance(owner, ast.ClassDef) else _native, node.name)
            signature = (target.__doc__ or "").split("\n")[0]
            found = set(re.findall(r"(\w+): ", signature.split(" -> ")[0])) - {"self"}
            if any(re.fullmatch(r"arg\d+", name) for name in found):  # the binding names none of them
                continue
            assert found == names, f"{node.name}: {signature}"


def test_sizes_cross_the_border():
    """Every field arrives where it belongs: each alone decides the number of tasks of one kind."""
    model = MoEModel(d_model=60, d_ff=30, num_experts=12, top_k=1)
    tiling = Tiling(gate_tokens=6, gate_experts=5, dispatch_tokens=3, up_rows=7, down_rows=11, block_tokens=4)
    idx = [np.zeros((13, 1), np.int32), np.zeros((0, 1), np.int32)]
    table = _native.TaskTable(native_shape(model, 2), tiling.native(), idx, True)
    count = dict(zip(KINDS, np.bincount(table.tasks()["kind"], minlength=len(KINDS)).tolist(), strict=True))
    assert count == {
        "gate": 3 * 3,  # 13 tokens by 6, 12 experts by 5
        "route": 3,
        "dispatch": 5 + 1,  # 13 tokens by 3; none from the other PE
        "up": 4 * 5,  # 13 tokens by 4, 30 rows by 7
        "down": 4 * 6,  # 60 rows by 11
        "combine": 13,
        "expert": 0,
    }


def test_limits():
    assert _native.MAX_TOKENS_PER_PE == 65535  # sixteen bits of a landed word
    assert _native.MAX_LOOK_AHEAD == 15
