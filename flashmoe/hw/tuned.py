"""The queue and the tiling that are best for a number of tokens, as measured on one H200."""

from __future__ import annotations

from typing import Literal, NamedTuple

from flashmoe.model import MoEModel
from flashmoe.policy import Policy, Queue, resolve
from flashmoe.tasks import Tiling


class _Best(NamedTuple):
    max_tokens: int  # of one PE; the row is for more than the row before has
    queue: Queue
    down: Literal["tile", "rows"]
    groups: int  # of a PE's experts, one a pick, with down="rows"
    gate_experts: int
    up_rows: int
    down_rows: int
    block_tokens: int


_TABLE = (
    _Best(8, "ticket", "rows", groups=1, gate_experts=1, up_rows=8, down_rows=16, block_tokens=8),
    _Best(1024, "static", "rows", groups=2, gate_experts=16, up_rows=32, down_rows=32, block_tokens=16),
)


def tuned(model: MoEModel, num_tokens: int, ep_size: int = 1) -> Policy:
    """The best known policy for a layer on a GPU. num_tokens: of the PE that has most.

    Raises: ValueError for more tokens than a launch on a GPU takes.
    """
    for best in _TABLE:
        if num_tokens <= best.max_tokens:
            return _policy(best, model, ep_size)
    raise ValueError(f"num_tokens={num_tokens} (policy 'tuned' is for 0..{_TABLE[-1].max_tokens})")


def tuned_ranges(model: MoEModel, max_tokens: int, ep_size: int = 1) -> list[tuple[int, Policy]]:
    """(most tokens that it is for, policy), ascending; the last is for max_tokens."""
    ranges = [(best.max_tokens, _policy(best, model, ep_size)) for best in _TABLE if best.max_tokens < max_tokens]
    return [*ranges, (max_tokens, tuned(model, max_tokens, ep_size))]


def choose(
    policy: str | Policy, model: MoEModel, num_tokens: int, ep_size: int = 1, tiling: Tiling | None = None
) -> Policy:
    """As `flashmoe.policy.resolve`, which does not know the layer; "tuned" besides."""
    return tuned(model, num_tokens, ep_size).with_tiling(tiling) if policy == "tuned" else resolve(policy, tiling)


def _policy(best: _Best, model: MoEModel, ep_size: int) -> Policy:
    tiling = Tiling(
        down=best.down,
        gate_tokens=8,
        gate_experts=best.gate_experts,
        up_rows=best.up_rows,
        down_rows=best.down_rows,
        block_tokens=best.block_tokens,
        experts_per_pick=-(-model.experts_per_pe(ep_size) // best.groups) if best.groups > 1 else 0,  # 0: all
    )
    return Policy(name="tuned", queue=best.queue, tiling=tiling)
