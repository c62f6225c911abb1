# SPDX-License-Identifier: MIT
"""What becomes of a GEMM's sums: routing weight, bias, activation, rounding, and their place in memory."""

import triton
import triton.language as tl

from shuffled_tensor.backends.triton.numbers import to_mxfp4_and_back

__all__ = ["finish"]


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, p0, p1):
    """A row of :data:`shuffled_tensor.moe.activations.ACTIVATIONS`, whose parameters are given in its order."""
    if ACTIVATION == "situ":
        out = p0 * _tanh(gate / p0) * _sigmoid(gate) * (p1 * _tanh(up / p1))
    else:  # NaN passes a limit, as in torch
        gate = tl.where(gate > p0, p0, gate)
        up = tl.where(up > p0, p0, tl.where(up < -p0, -p0, up))
        if ACTIVATION == "silu":
            out = gate * _sigmoid(gate) * up
        elif ACTIVATION == "swiglu":
            out = gate * _sigmoid(p1 * gate) * (up + 1)
        elif ACTIVATION == "gelu":
            out = gate * (0.5 * (1 + tl.erf(gate * 0.7071067811865476))) * up
        else:
            tl.static_assert(ACTIVATION == "gelu_tanh")
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            out = gate * (0.5 * (1 + _tanh(inner))) * up
    return out


@triton.jit
def finish(
    acc,
    Bias,
    Weight,
    Y,
    slot,
    row,
    ok,
    expert,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    p0,
    p1,
    RULE: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """From sums ``[BN, BM]``, in the order of a tile's rows, to a tile of ``Y``, ``[rows, COLUMNS]``.

    ``ROWS`` is how many the weight has, logical ones, of each half where there are two; what is beyond is written as 0.
    """
    if Weight is not None:
        acc *= tl.load(Weight + slot, mask=ok, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        column = n * (BN // 2) + tl.arange(0, BN // 2)
        inside = column < ROWS
        gate, up = acc.reshape(2, BN // 2, BM).permute(1, 2, 0).split()
        if Bias is not None:
            gate += tl.load(Bias + expert * (2 * ROWS) + column, mask=inside, other=0.0).to(tl.float32)[:, None]
            up += tl.load(Bias + expert * (2 * ROWS) + ROWS + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        out = tl.where(inside[:, None], _activate(gate, up, ACTIVATION, p0, p1), 0.0)
        if RULE is not None:
            out = out.trans(1, 0).reshape(BM, BN // 64, 32)
            out = to_mxfp4_and_back(out, RULE).reshape(BM, BN // 2).trans(1, 0)
        out = out.to(tl.bfloat16)
        if PAIRED:  # in the order in which the next GEMM reads
            out = out.reshape(BN // 64, 8, 4, BM).permute(3, 0, 2, 1).reshape(BM, BN // 2)
        else:
            out = out.trans(1, 0)
        tl.store(Y + row[:, None].to(tl.int64) * COLUMNS + column[None, :], out, mask=ok[:, None])
    else:
        column = n * BN + tl.arange(0, BN)
        if Bias is not None:
            bias = tl.load(Bias + expert * ROWS + column, mask=column < ROWS, other=0.0).to(tl.float32)
            acc += bias.reshape(BN // 32, 2, 16).permute(1, 0, 2).reshape(BN)[:, None]
        out = acc.to(tl.bfloat16).reshape(2, BN // 32, 16, BM).permute(3, 1, 0, 2).reshape(BM, BN)
        tl.store(Y + row[:, None].to(tl.int64) * COLUMNS + column[None, :], out, mask=ok[:, None])
