# SPDX-License-Identifier: MIT
"""SGLang's own rebalancing, from its wheel, moves weights between two ranks as it moves plain tensors."""

from __future__ import annotations

from tests.support.ranks import Rank, on_ranks

from . import sglang_layer as s
from .slots import MAPS, SLOTS, agreed, check

s.make_importable()


@on_ranks(2)
def test_sglang_moves_weights_themselves(at: Rank) -> None:
    """After the ranks have agreed on how they lie."""
    with s.sglang():
        from sglang.srt.eplb.expert_location_updater import create_temp_buffers, update_expert_weights_single_layer

        weights = agreed(at)
        check(at, weights, MAPS[0])
        for old, new in zip(MAPS, MAPS[1:] + MAPS[:1], strict=True):
            update_expert_weights_single_layer(
                routed_experts_weights=list(weights.values()),
                temp_buffers=create_temp_buffers(list(weights.values())),
                old_physical_to_logical_map=old,
                new_physical_to_logical_map=new,
                num_local_physical_experts=SLOTS,
                num_gpu_per_node=2,
                rank=at.rank,
                world_size=2,
            )
            check(at, weights, new)
