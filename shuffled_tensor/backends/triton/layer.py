# SPDX-License-Identifier: MIT
"""A call of a layer as launches of kernels: nothing of it waits for the device, or looks at data."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from shuffled_tensor.backends.triton import numbers, tune
from shuffled_tensor.backends.triton.rows import begin, leave
from shuffled_tensor.backends.triton.schedule import place, starts
from shuffled_tensor.backends.triton.stage import INTERLEAVED, NO_HALVES, SEPARATED, stage
from shuffled_tensor.device import real_arch
from shuffled_tensor.layouts import round_up
from shuffled_tensor.moe.activations import ACTIVATIONS
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.mxfp4 import BLOCK, CODES

__all__ = ["run"]

_FEW = 1024
"""Slots that one program sorts."""
_CHUNK = 256
"""Slots that one of several programs sorts."""


@cache
def _target(device: torch.device) -> tuple[int, bool]:
    """How words become bfloat16 on a device, and whether a kernel's launch may overlap the one before."""
    if device.type == "cpu":
        return numbers.INTERPRETED.value, False
    if torch.version.hip:
        return (numbers.CDNA4 if real_arch(device) == "gfx950" else numbers.PLAIN).value, False
    return numbers.PTX.value, torch.cuda.get_device_capability(device) >= (9, 0)


def run(call: MoECall[PackedWeight]) -> Tensor:
    """``[tokens, K]`` of a call."""
    device = call.w13.qdata.device
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _run(call)
    return _run(call)


def _run(call: MoECall[PackedWeight]) -> Tensor:
    (tokens, topk), device = call.topk_ids.shape, call.w13.qdata.device
    hidden, experts, slots = call.hidden, len(call.w13.qdata), tokens * topk
    out = torch.empty(tokens, hidden, dtype=call.out_dtype, device=device)
    if out.numel() == 0:
        return out
    target, overlap = _target(device)
    launch: dict[str, Any] = {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}
    known = experts if call.expert_mask is None else len(call.expert_mask)
    # what a GEMM reads: its weight's columns, to whole tiles of scales
    widths = call.w13.scale.shape[-1] * BLOCK, call.w2.scale.shape[-1] * BLOCK
    shape = tune.Shape(experts, hidden, widths, 2 * call.w2.qdata.shape[2] == 256)
    plan = tune.plan(device, -(-slots * experts // known), shape, target == numbers.CDNA4.value)
    tiles = [2 * widths[1] // plan.first.rows, round_up(hidden, 128) // plan.second.rows]
    blocks = min(slots, experts + slots // plan.rows)
    few = slots <= _FEW
    chunks = 1 if few else -(-slots // _CHUNK)
    sort = {"EP": max(64, triton.next_power_of_2(experts)), "BM1": plan.rows, "BM2": plan.small}
    counters = [blocks * count if tile.parts > 1 else 0 for count, tile in zip(tiles, plan[2:], strict=True)]
    sizes = [slots, slots, 4 * blocks, 0 if few else chunks * sort["EP"], sum(counters)]
    kind, slot, block, counts, arrived = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)

    def rows(count: int, columns: int) -> Tensor:
        return torch.empty(count, columns, dtype=torch.bfloat16, device=device)

    x, between, parts = rows(tokens, widths[0]), rows(slots, widths[1]), rows(slots, round_up(hidden, 128))
    at_a_time = 1 if tokens < 512 else 4
    begin[(chunks + -(-tokens // at_a_time) * (widths[0] // 256),)](
        call.hidden_states.contiguous().view(torch.uint8) if call.hidden_scale is not None
        else call.hidden_states.contiguous(),
        None if call.hidden_scale is None else call.hidden_scale.contiguous().view(torch.uint8),
        x, call.topk_ids.contiguous(), None if call.expert_mask is None else call.expert_mask.contiguous(),
        call.num_local_tokens, kind, slot, block,
        None if few else counts, arrived if sum(counters) else None, tokens, slots, chunks, blocks, sum(counters),
        H=hidden, COLUMNS=widths[0], RULE=call.intermediate_scale_rule, PAIRED=target != numbers.CDNA4.value,
        RB=at_a_time, BH=256, E=experts, TOPK=topk, GLOBAL=known, GP=triton.next_power_of_2(known),
        BT=min(_CHUNK, max(64, triton.next_power_of_2(slots))), **sort, **launch,
    )  # fmt: skip
    if not few:
        starts[(1,)](counts, block, chunks, blocks, STEP=16, **sort, **launch)
        place[(chunks,)](kind, counts, slot, slots, EP=sort["EP"], BT=_CHUNK, **launch)
    weight = call.topk_weight.contiguous()
    parameters = ACTIVATIONS[call.activation].named(call.parameters).values()
    for source, packed, result, bias, tile, count, done, own in (
        (x, call.w13, between, call.w13_bias, plan.first, tiles[0], arrived[: counters[0]], True),
        (between, call.w2, parts, call.w2_bias, plan.second, tiles[1], arrived[counters[0] :], False),
    ):
        order = packed.layout.order(CODES, packed.geometry.gate_up)
        halves = NO_HALVES if not own else INTERLEAVED if order.interleaved else SEPARATED
        split = tile.parts > 1
        stage[(blocks * count * tile.parts // tile.run,)](
            source, packed.qdata, packed.scale, None if bias is None else bias.contiguous(),
            weight if own and call.doweight_stage1 else None, result, slot, block,
            torch.empty(blocks * count * tile.parts * tile.rows * plan.rows, dtype=torch.float32, device=device)
            if split else None,
            done if split else None, *(*parameters, 0.0, 0.0)[:2],
            STRIPS=packed.qdata.shape[1] // 16, K=2 * packed.qdata.shape[2], COLUMNS=source.shape[1],
            ROWS=packed.geometry.rows // packed.geometry.halves, OUT=result.shape[1], TILES=count, TOPK=topk,
            BM1=plan.rows, BM2=plan.small, BN=tile.rows, BK=tile.columns, PARTS=tile.parts, RUN=tile.run,
            STAGES=tile.stages, ACTIVATION=call.activation if own else None,
            RULE=call.intermediate_scale_rule if own else None,
            HALVES=halves.value, TARGET=target, WIDE=packed.largest_scale() > numbers.FULL_RANGE.value,
            num_warps=tile.warps, num_stages=tile.stages, **launch,
        )  # fmt: skip
    leave[(tokens, -(-hidden // 1024))](
        parts, None if call.doweight_stage1 else weight, kind, out, H=hidden, COLUMNS=parts.shape[1], TOPK=topk,
        BH=1024, **launch,
    )  # fmt: skip
    return out
