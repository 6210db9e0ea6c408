"""gfx942's machine code computes the layer: one work-group in an emulator, held to the reference and the CPU backend."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe import MoEModel, Policy, Routing, RunResult, Tiling, Weights, reference, run, simulate
from flashmoe.hw.build import build_library
from flashmoe.policy import resolve
from layers import tokens

FOLDER = os.environ.get("FLASHMOE_GFX942_EMULATOR")
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="set FLASHMOE_GFX942_EMULATOR to a folder with tinygrad's tinygrad/ and test/ (needs clang++-19, no GPU)",
)

SMALL = MoEModel(d_model=128, d_ff=64, num_experts=4, top_k=2)
OTHER = MoEModel(d_model=64, d_ff=192, num_experts=5, top_k=3, norm_topk_prob=False)
TILINGS = {
    "tile": Tiling(up_rows=16, down_rows=16),
    "rows": Tiling(down="rows", up_rows=16, down_rows=16, block_tokens=8),
    "token": Tiling(granularity="token", block_tokens=1),
}


@pytest.fixture(scope="module")
def emulator() -> Iterator[object]:
    from emulator.gfx942 import Emulator

    assert FOLDER is not None
    emulator = Emulator(Path(FOLDER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmoe.hw.library.check_driver", lambda backend: None)  # it is there: the stand-in
        for model in (SMALL, OTHER):
            emulator.add(build_library(model, "gfx942"))
        yield emulator
