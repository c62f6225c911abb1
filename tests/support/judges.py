# SPDX-License-Identifier: MIT
"""What results must be, by judges that share no code with the library."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


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


def by_formula(part: str, data: Tensor, kind: str, gate_up: bool) -> Tensor:
    """Where each byte goes, one at a time in closed form."""
    out = torch.empty_like(data)
    _, rows, width = data.shape
    n, b = torch.arange(rows).unsqueeze(1), torch.arange(width).unsqueeze(0)
    if kind == "mxfp4_moe" and gate_up:
        gate, i = n // (rows // 2), n % (rows // 2)
        n = 32 * (i // 16) + 16 * gate + i % 16
    if kind == "made_up":
        offset = _made_up_offset(part, rows, width, n, b, gate_up)
    elif part == "weight":
        offset = (n // 16) * 16 * width + (b // 16) * 256 + (n % 16) * 16 + b % 16
    else:
        offset = (
            (n // 32) * 32 * width + (b // 8) * 256 + (b % 4) * 64 + (n % 16) * 4 + (b % 8 // 4) * 2 + (n % 32) // 16
        )
    for source, target in zip(data, out, strict=True):
        target.view(-1)[offset.flatten()] = source.flatten()
    return out


def _made_up_offset(part: str, rows: int, width: int, n: Tensor, b: Tensor, gate_up: bool) -> Tensor:
    """Of tests/support/made_up.py."""
    if part == "weight":
        if gate_up:
            return (n // 8) * 8 * width + (b // 16) * 128 + (n % 8) * 16 + b % 16
        return n * width + b
    column, t, q = b // 8, b % 8 // 2, b % 2
    if gate_up:
        half = rows // 2
        return ((((column * (half // 8) + n % half // 8) * 2 + q) * 2 + n // half) * 8 + n % 8) * 4 + t
    return ((((column * (rows // 32) + n // 32) * 4 + t) * 4 + n % 32 // 8) * 2 + q) * 8 + n % 8


@cache
def order_by_formula(part: str, rows: int, width: int, layout: str, gate_up: bool) -> Tensor:
    """Which byte of an expert lies at each place."""
    return by_formula(part, torch.arange(rows * width).view(1, rows, width), layout, gate_up).flatten()


def in_memory(
    parts: tuple[Tensor, Tensor], layout: str, *, gate_up: bool, align: tuple[int, int] = (256, 256)
) -> tuple[Tensor, Tensor]:
    """Codes and scales ``[E, rows, bytes]`` padded, with every byte where the index formulas put it."""
    placed = []
    for part, per_byte, fill in zip(parts, (2, 32), (0, 127), strict=True):
        halves = part.chunk(2, 1) if gate_up else (part,)
        columns = 256 if fill else align[1]  # scales always fill tiles of 8
        pads = (0, -(part.shape[2] * per_byte) % columns // per_byte, 0, -halves[0].shape[1] % align[0])
        padded = torch.cat([F.pad(half, pads, value=fill) for half in halves], 1)
        if layout != "none":
            order = order_by_formula("scale" if fill else "weight", *padded.shape[1:], layout, gate_up)
            padded = padded.flatten(1)[:, order].view(padded.shape)
        placed.append(padded)
    return placed[0], placed[1]


def assert_holds(
    weight: ShuffledMXFP4Tensor, parts: tuple[Tensor, Tensor], layout: str, *, align: tuple[int, int] = (256, 256)
) -> None:
    """The weight says that it lies as `layout`, its bytes do, and they and their pads are those of `parts`."""
    assert (weight.is_shuffled, weight.shuffle_kind) == (layout != "none", layout if layout != "none" else None)
    memory = in_memory(parts, layout, gate_up=weight.gate_up, align=align)
    for part, found, expected in zip(("qdata", "scale"), (weight.qdata, weight.scale), memory, strict=True):
        assert torch.equal(found, expected), part
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts))
