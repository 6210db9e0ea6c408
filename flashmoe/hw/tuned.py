"""The queue and the tiling that are best for a number of tokens, as measured on one H200."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe.policy import Policy, resolve
from flashmoe.tasks import Tiling


class _Best(NamedTuple):
    max_tokens: int  # of one PE; the row is for more than the row before has
    tiling: Tiling


_TABLE = (
    _Best(8, Tiling(down="rows", gate_tokens=8, gate_experts=1, up_rows=8, down_rows=16, block_tokens=8)),
    _Best(16, Tiling(gate_tokens=4, gate_experts=8, up_rows=32, down_rows=128, block_tokens=16)),
    _Best(128, Tiling(gate_tokens=8, gate_experts=16, up_rows=32, down_rows=128, block_tokens=16)),
    _Best(512, Tiling(gate_tokens=16, gate_experts=16, up_rows=64, down_rows=128, block_tokens=64, combine_tokens=2)),
    _Best(1024, Tiling(gate_tokens=32, gate_experts=16, up_rows=64, down_rows=128, block_tokens=64, combine_tokens=4)),
)


def tuned(num_tokens: int) -> Policy:
    """The best known policy for a layer on a GPU. num_tokens: of the PE that has most.

    Raises: ValueError for more tokens than a launch on a GPU takes.
    """
    for best in _TABLE:
        if num_tokens <= best.max_tokens:
            return _policy(best)
    raise ValueError(f"num_tokens={num_tokens} (policy 'tuned' is for 0..{_TABLE[-1].max_tokens})")


def tuned_ranges(max_tokens: int) -> list[tuple[int, Policy]]:
    """(most tokens that it is for, policy), ascending; the last is for max_tokens."""
    ranges = [(best.max_tokens, _policy(best)) for best in _TABLE if best.max_tokens < max_tokens]
    return [*ranges, (max_tokens, tuned(max_tokens))]


def choose(policy: str | Policy, num_tokens: int, tiling: Tiling | None = None) -> Policy:
    """As `flashmoe.policy.resolve`, which does not know the layer; "tuned" besides."""
    return tuned(num_tokens).with_tiling(tiling) if policy == "tuned" else resolve(policy, tiling)


def _policy(best: _Best) -> Policy:
    return Policy(name="tuned", queue="ticket", tiling=best.tiling)
