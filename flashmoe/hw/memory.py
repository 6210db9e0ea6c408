"""What a layer takes on a card, by the kernel's own layout: no card is needed to know."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe import _native
from flashmoe.hw.build import check_shape
from flashmoe.hw.tuned import tuned_ranges
from flashmoe.model import MoEModel
from flashmoe.tasks import native_shape


class LayerMemory(NamedTuple):
    """All in bytes. packing: besides, while the weights are packed."""

    weights: int
    packing: int
    workspace: int


def layer_memory(model: MoEModel, max_tokens: int, *, workers: int = 132, domains: int = 2) -> LayerMemory:
    """Of a `DeviceLayer` with one PE, policy "tuned" and no trace. workers: CUs of the card, 132 on an H100 or H200.

    Raises: ValueError for what no device kernel can do.
    """
    check_shape(model)
    shape = native_shape(model, 1)
    workspace = sum(
        _native.device_workspace_bytes(
            shape=shape, tiling=policy.tiling.native(), max_tokens=most, num_workers=workers, num_domains=domains
        )
        for most, policy in tuned_ranges(max_tokens)
    )
    return LayerMemory(
        weights=model.gate_bytes + model.num_experts * model.expert_bytes,
        packing=2 * model.d_ff * model.d_model * model.element_bytes,
        workspace=workspace,
    )
