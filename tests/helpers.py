# SPDX-License-Identifier: MIT
"""Test data, and judges that share no code with the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def coded(*shape: int, salt: int = 0) -> Tensor:
    """Bytes that tell their position: the input of golden/shuffle_digests.json, in which runs of 16 bytes differ."""
    index = torch.arange(math.prod(shape), dtype=torch.int64) + salt
    return ((index * 2654435761 % 2**32) >> 24).to(torch.uint8).view(shape)


def moderate_scales(*shape: int, salt: int = 7) -> Tensor:
    """Position-coded e8m0 bytes around 1.0, so that products of them stay far from overflow."""
    return 120 + coded(*shape, salt=salt) % 8


def dense(qdata: Tensor, scale: Tensor) -> Tensor:
    """float64 values of row-major MXFP4 bytes, by the definition of the format."""
    signed = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], dtype=torch.float64)
    values = torch.stack([signed[(qdata & 15).long()], signed[(qdata >> 4).long()]], dim=-1).flatten(-2)
    factors = torch.where(scale == 255, math.nan, torch.pow(2.0, scale.double() - 127))
    return values * factors.repeat_interleave(32, dim=-1)


def dense_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_mask: Tensor | None = None,
    doweight_stage1: bool = False,
    swiglu_limit: float | None = None,
) -> Tensor:
    """The layer in float64, one token and one slot after the other, on dense weights ``[E, 2I, K]`` and ``[E, K, I]``."""
    out = torch.zeros(hidden_states.shape[0], w2.shape[1], dtype=torch.float64)
    for token, slot in ((t, s) for t in range(topk_ids.shape[0]) for s in range(topk_ids.shape[1])):
        expert, weight = int(topk_ids[token, slot]), float(topk_weight[token, slot])
        if expert_mask is not None:
            if not expert_mask[expert]:
                continue
            expert = int(expert_mask[:expert].sum())
        first = w13[expert] @ hidden_states[token].double()
        if doweight_stage1:
            first = first * weight
        if w13_bias is not None:
            first = first + w13_bias[expert].double()
        half = first.shape[0] // 2
        gate, up = first[:half], first[half:]
        limit = 7.0 if activation == "swiglu" and swiglu_limit is None else swiglu_limit
        if limit is not None:
            gate, up = gate.clip(max=limit), up.clip(min=-limit, max=limit)
        if activation == "silu":
            middle = gate / (1 + torch.exp(-gate)) * up
        elif activation == "gelu":
            middle = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
        else:
            middle = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        second = w2[expert] @ middle
        if w2_bias is not None:
            second = second + w2_bias[expert].double()
        out[token] += second if doweight_stage1 else weight * second
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
