# SPDX-License-Identifier: MIT
"""aiter's kernels for a dense layer, ``aiter.gemm_a4w4``: what they read, and how they are called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor.backends.aiter.versions import MOE, SEPARATED, detect, unusable
from shuffled_tensor.moe.call import PackedWeight
from shuffled_tensor.mxfp4 import CODES, ScaleRule

__all__ = ["refuse", "run"]

_MULTIPLE = 256
"""Of what N (of gate and of up each) and K are, padded."""


def refuse(x: Tensor, w: PackedWeight, scale_rule: ScaleRule | None) -> str | None:
    """Why ``x @ w.T`` does not go to these kernels, or None."""
    reason = unusable(x.device)
    if reason is not None:
        return reason
    if x.dtype is not torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    rule = detect().version.scale_rule
    if scale_rule not in (None, rule):
        return f"it quantises by {rule!r}, not scale_rule={scale_rule!r}"
    of = w.geometry
    if not any(w.layout.same_bytes(layout, of.gate_up) for layout in (SEPARATED, MOE)):
        return f"its kernels read {SEPARATED.name!r} and {MOE.name!r}, and w lies as {w.layout.name!r}"
    rows, columns = of.padded_rows // of.halves, of.padded_columns
    if rows % _MULTIPLE or columns % _MULTIPLE:
        return (
            f"w is padded to {rows} rows{' of each half' * of.gate_up} and {columns} columns, not to multiples of "
            f"{_MULTIPLE}; make it with align={_MULTIPLE}"
        )
    return None


def run(x: Tensor, w: PackedWeight) -> Tensor:
    """``x @ w.T``, bfloat16 ``[M, N]``, of what :func:`refuse` does not refuse: x bfloat16 ``[M, K]``, w one expert."""
    of = w.geometry
    if not len(x):  # no version says that it takes an empty launch
        return x.new_empty(0, of.rows)
    aiter = detect().probed.module
    quantize = aiter.get_hip_quant(aiter.QuantType.per_1x32)
    padded = F.pad(x, (0, of.padded_columns - of.columns)).contiguous()
    # the scales of activations are shuffled as those of weights are, in memory for a multiple of 256 tokens
    codes, scale = quantize(padded, quant_dtype=torch.float4_e2m1fn_x2, shuffle=True)
    # No bias: some of the kernels behind this call ignore it, others take one of another shape.
    out: Tensor = aiter.gemm_a4w4(
        codes,
        w.qdata[0].view(codes.dtype),
        scale,
        w.scale[0].view(scale.dtype),
        dtype=torch.bfloat16,
        bpreshuffle=True,
    )
    if w.layout.same_bytes(SEPARATED, of.gate_up):
        halves = out.view(len(out), of.halves, -1)
    else:  # the same tiles, of some gate rows and as many up rows in turn: so come the columns of the result
        tile = w.layout.order(CODES, of.gate_up).row_tile
        halves = out.view(len(out), -1, of.halves, tile).transpose(1, 2).flatten(2)
    return halves[:, :, : of.rows // of.halves].flatten(1)
