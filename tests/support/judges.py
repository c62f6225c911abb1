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
    num_local_tokens: Tensor | None = None,
    doweight_stage1: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
) -> Tensor:
    """The layer in float64, one token and one slot after the other, on dense weights ``[E, 2I, K]`` and ``[E, K, I]``;
    zeros for what is no token."""
    out = torch.zeros(hidden_states.shape[0], w2.shape[1], dtype=torch.float64)
    tokens = topk_ids.shape[0] if num_local_tokens is None else int(num_local_tokens)
    for token, slot in ((t, s) for t in range(tokens) for s in range(topk_ids.shape[1])):
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
        elif activation == "gelu_tanh":
            middle = gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        elif activation == "situ":
            assert situ_beta is not None
            assert situ_linear_beta is not None
            bounded = [bound * torch.tanh(x / bound) for x, bound in ((gate, situ_beta), (up, situ_linear_beta))]
            middle = bounded[0] / (1 + torch.exp(-gate)) * bounded[1]
        else:
            middle = gate / (1 + torch.exp(-(1.702 if swiglu_alpha is None else swiglu_alpha) * gate)) * (up + 1)
        second = w2[expert] @ middle
        if w2_bias is not None:
            second = second + w2_bias[expert].double()
        out[token] += second if doweight_stage1 else weight * second
    return out


def to_mxfp4(values: Tensor, rule: str) -> Tensor:
    """float64, rounded to MXFP4 and back: by the nearest of its magnitudes, of two the one with the even code."""
    blocks = values.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    binade = {
        "floor": torch.floor(torch.log2(amax)) - 2,
        "even": torch.floor(torch.log2(amax / 1.75)) - 1,
        "amax4": torch.floor(torch.log2(amax / 1.5)) - 1,
        "round_up": torch.ceil(torch.log2(amax / 6)),
    }[rule]
    scaled, codes = blocks / torch.exp2(binade), torch.arange(8)
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float64)
    code = ((scaled.abs().unsqueeze(-1) - magnitudes).abs() + 1e-12 * (codes % 2)).argmin(-1)
    return (magnitudes[code] * scaled.sign() * torch.exp2(binade)).flatten(-2)


def to_mxfp8(values: Tensor, rule: str) -> Tensor:
    """float64, rounded to MXFP8 (e4m3) and back."""
    blocks = values.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    round_up, amax4 = torch.ceil(torch.log2(amax / 448)), torch.floor(torch.log2(amax / 1.5)) - 7
    scale = torch.exp2(round_up if rule == "round_up" else amax4)
    return ((blocks / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2)


def rounded_moe(
    numerics: str,
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    *,
    mxfp8_rule: str = "round_up",
    fused: bool = False,
    activation: str = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_mask: Tensor | None = None,
    swiglu_limit: float | None = None,
) -> Tensor:
    """The layer in float64, one expert after the other, where what enters each GEMM is rounded as `explain` says: to
    "bfloat16", "mxfp8", or "mxfp4, even"; the intermediate to bfloat16 first, but where kernels are fused."""

    def rounded(values: Tensor) -> Tensor:
        if numerics.startswith("mxfp4"):
            return to_mxfp4(values, numerics.removeprefix("mxfp4, "))
        return to_mxfp8(values, mxfp8_rule) if numerics == "mxfp8" else values.bfloat16().double()

    x, limit = rounded(hidden_states), 7.0 if activation == "swiglu" and swiglu_limit is None else swiglu_limit
    out = torch.zeros(len(x), w2.shape[1], dtype=torch.float64)
    ids = range(len(w13)) if expert_mask is None else expert_mask.nonzero()[:, 0].tolist()
    for expert, topk_id in enumerate(ids):
        token, slot = (topk_ids == topk_id).nonzero(as_tuple=True)
        first = x[token] @ w13[expert].T + (0 if w13_bias is None else w13_bias[expert].double())
        gate, up = first.chunk(2, 1)
        if limit is not None:
            gate, up = gate.clip(max=limit), up.clip(min=-limit, max=limit)
        middle = gate / (1 + torch.exp(-gate)) * up
        if activation == "gelu":
            middle = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
        if activation == "swiglu":
            middle = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        second = rounded(middle if fused else middle.bfloat16()) @ w2[expert].T + (
            0 if w2_bias is None else w2_bias[expert].double()
        )
        out.index_add_(0, token, second * topk_weight[token, slot].double().unsqueeze(1))
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
