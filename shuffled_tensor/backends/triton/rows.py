# SPDX-License-Identifier: MIT
"""What happens to rows of activations before the first GEMM and after the second."""

import triton
import triton.language as tl

from shuffled_tensor.backends.triton.numbers import fp4_values, powers_of_two, to_mxfp4_and_back
from shuffled_tensor.backends.triton.schedule import BAD, after_the_kernel_before, count, schedule

__all__ = ["begin", "leave"]


@triton.jit
def _enter(
    X,
    Scale,
    Out,
    M,
    program,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
    PAIRED: tl.constexpr,
    RB: tl.constexpr,
    BH: tl.constexpr,
):
    """Hidden states ``[M, H]``, or packed MXFP4 ones, as bfloat16 ``[M, COLUMNS]``, zeros from H on.

    ``RULE`` rounds them to MXFP4 first; ``PAIRED`` puts column ``4 * a + q`` of every 32 at ``8 * q + a``, as the
    weights are upcast.
    """
    row = (program // (COLUMNS // BH)) * RB + tl.arange(0, RB)[:, None].to(tl.int64)
    column = (program % (COLUMNS // BH)) * BH + tl.arange(0, BH)[None, :]
    inside = (row < M) & (column < H)
    if Scale is not None:
        codes = tl.load(X + row * (H // 2) + column // 2, mask=inside, other=0).to(tl.int32) >> (column % 2 * 4)
        scale = tl.load(Scale + row * (H // 32) + column // 32, mask=inside, other=127)
        x = fp4_values(codes) * powers_of_two(scale)
    else:
        x = tl.load(X + row * H + column, mask=inside, other=0.0).to(tl.float32)
    if RULE is not None:
        x = to_mxfp4_and_back(x.reshape(RB, BH // 32, 32), RULE).reshape(RB, BH)
    if PAIRED:
        x = x.reshape(RB, BH // 32, 8, 4).permute(0, 1, 3, 2).reshape(RB, BH)
    tl.store(Out + row * COLUMNS + column, x.to(tl.bfloat16), mask=row < M)


@triton.jit(do_not_specialize=["M", "T", "SCHEDULERS", "BLOCKS", "COUNTERS"])
def begin(
    X,
    Scale,
    Out,
    Ids,
    Mask,
    Tokens,
    Kind,
    Slot,
    Blocks,
    Counts,
    Arrived,
    M,
    T,
    SCHEDULERS,
    BLOCKS,
    COUNTERS,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
    PAIRED: tl.constexpr,
    RB: tl.constexpr,
    BH: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOPK: tl.constexpr,
    GLOBAL: tl.constexpr,
    GP: tl.constexpr,
    BM1: tl.constexpr,
    BM2: tl.constexpr,
    BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What needs nothing but a call's arguments: the first programs make the schedule, or its first step where it has
    ``Counts``; the others bring rows in."""
    after_the_kernel_before(OVERLAP)
    program = tl.program_id(0)
    if program < SCHEDULERS:
        if Counts is None:
            schedule(Ids, Mask, Tokens, Kind, Slot, Blocks, T, BLOCKS, E, EP, TOPK, GLOBAL, GP, BM1, BM2, BT)
        else:
            count(Ids, Mask, Tokens, Kind, Counts, program, T, E, EP, TOPK, GLOBAL, GP, BT)
        if Arrived is not None:
            for start in range(0, COUNTERS, BT):
                counter = start + tl.arange(0, BT)
                tl.store(Arrived + counter, tl.zeros((BT,), tl.int32), mask=counter < COUNTERS)
    else:
        _enter(X, Scale, Out, M, program - SCHEDULERS, H, COLUMNS, RULE, PAIRED, RB, BH)


@triton.jit
def leave(
    Y,
    Weight,
    Kind,
    Out,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOPK: tl.constexpr,
    BH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each token's slots, ``[T, COLUMNS]``, summed in float32 in the order of the slots, by their weights."""
    after_the_kernel_before(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(TOPK):
        slot = token * TOPK + k
        kind = tl.load(Kind + slot)
        y = tl.load(Y + slot * COLUMNS + column, mask=(column < H) & (kind >= 0), other=0.0).to(tl.float32)
        if Weight is not None:
            y = tl.where(kind >= 0, y * tl.load(Weight + slot).to(tl.float32), 0.0)
        total += tl.where(kind == BAD, float("nan"), y)
    tl.store(Out + token * H + column, total.to(Out.dtype.element_ty), mask=column < H)
