"""Launches of both kernels on a tiny layer, for compute-sanitizer to watch: see test_sanitizer.py."""

import sys

from layers import assert_right, skewed_routing, tokens, weights_of

from flashmoe.hw.device import DeviceLayer
from flashmoe.hw.packed import PackedWeights
from flashmoe.model import MoEModel
from flashmoe.policy import Policy
from flashmoe.tasks import Tiling

MODEL = MoEModel(d_model=128, d_ff=64, num_experts=8, top_k=2)
ROWS = Tiling(down="rows", down_rows=16, block_tokens=8)
GROUPS = Tiling(down="rows", gate_experts=8, up_rows=32, down_rows=32, block_tokens=16, experts_per_pick=4)
TILES = Tiling(gate_experts=8, up_rows=32, down_rows=32, block_tokens=16)
BY_RANK = Policy(name="big_first", queue="static", rank=lambda task: -task.num_tokens)
CASES = {  # kernel: (policy, tiling, tokens of each PE)
    "pipeline": [
        ("ticket", ROWS, [5]),
        ("domain_steal", ROWS, [20]),
        ("static_phase", GROUPS, [20]),
        (BY_RANK, GROUPS, [8]),
        ("push", ROWS, [5]),
        ("push", TILES, [20]),
    ],
    "general": [
        ("push", Tiling(), [20]),
        ("ticket", Tiling(), [5, 12]),
        ("push", ROWS, [9]),
        ("domain_steal", GROUPS, [3, 0, 6, 1]),
        ("static_phase", Tiling(granularity="token"), [4, 3]),
        (BY_RANK, Tiling(), [1, 0, 2, 0, 1, 0, 1, 1]),
    ],
}


def main(backend: str, kernel: str) -> None:
    packed = PackedWeights(MODEL, weights_of(MODEL), backend=backend)
    for policy, tiling, counts in CASES[kernel]:
        layer = DeviceLayer(
            MODEL,
            packed,
            backend=backend,
            kernel=kernel,
            ep_size=len(counts),
            max_tokens=20,
            policy=policy,
            tiling=tiling,
            workers=4,
            deadline_s=300,  # a watched kernel is a hundred times slower
        )
        x = tokens(MODEL, counts)
        given = skewed_routing(MODEL, counts, seed=1, skew=1.0, dropped=0.2)
        for routing in (given,) if policy is BY_RANK else (None, given):
            result = layer(x, routing=routing)
            assert_right(MODEL, x, result)
            print(kernel, policy if isinstance(policy, str) else policy.name, counts, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
