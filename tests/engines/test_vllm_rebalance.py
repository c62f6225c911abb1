# SPDX-License-Identifier: MIT
"""vLLM's own rebalancing, from its wheel, moves the rows of ``expert_bytes`` between two ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.support.ranks import Rank, on_ranks

from . import vllm_layer as v
from .slots import MAPS, agreed, check

v.make_importable()


@on_ranks(2)
def test_vllm_moves_experts_as_they_lie(at: Rank) -> None:
    """Codes and scales of both weights, after the ranks have agreed on how they lie."""
    with v.vllm():
        from vllm.distributed.eplb.eplb_communicator import TorchDistNcclEplbCommunicator
        from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

        weights, group = agreed(at), dist.group.WORLD
        check(at, weights, MAPS[0])
        operands = [weight.as_kernel_operands(layout=weight.shuffle_kind) for weight in weights.values()]
        rows = [row for each in operands for row in each.expert_bytes]
        for old, new in zip(MAPS, MAPS[1:] + MAPS[:1], strict=True):
            rearrange_expert_weights_inplace(
                torch.tensor([old]),
                torch.tensor([new]),
                [rows],
                [torch.empty_like(row) for row in rows],
                group,
                TorchDistNcclEplbCommunicator(group),  # which is torch.distributed, over gloo here
            )
            check(at, weights, new)
        for each in operands:
            each.release()
