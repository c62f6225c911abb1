# SPDX-License-Identifier: MIT
"""One GEMM of a layer, over blocks of rows of the same expert: both stages, every layout, every activation.

Weights are read as they lie, in 32-bit words of eight codes of one row, and become bfloat16 in registers; products are
accumulated in float32. A program has ``BN`` rows of one expert's weight and the ``BM`` rows of activations of a block.
A tile's rows are taken in the order in which its scales lie: all its gate rows, then all its up rows; of a weight
without them, its even strips of 16 rows, then the odd ones.
"""

import triton
import triton.language as tl

from shuffled_tensor.backends.triton.finish import finish
from shuffled_tensor.backends.triton.numbers import CDNA4, INTERPRETED, bf16_of_tiles, bf16_of_words
from shuffled_tensor.backends.triton.schedule import SMALL, after_the_kernel_before

__all__ = ["INTERLEAVED", "NO_HALVES", "SEPARATED", "stage"]

# How the rows of gate and up lie in a weight.
NO_HALVES = tl.constexpr(0)
INTERLEAVED = tl.constexpr(1)
SEPARATED = tl.constexpr(2)


@triton.jit
def _strips(n, STRIPS: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, IN_ORDER: tl.constexpr):
    """A tile's strips of 16 rows, and its tiles of scales, 32 rows each, by their numbers in the weight.

    Beyond the weight's last one it is the last: what comes of it is not looked at.
    """
    strip = tl.arange(0, BN // 16)
    tile = tl.arange(0, BN // 32)
    if HALVES == SEPARATED:
        strip = tl.minimum(n * (BN // 32) + strip % (BN // 32), STRIPS // 2 - 1) + strip // (BN // 32) * (STRIPS // 2)
        tile = tl.minimum(n * (BN // 64) + tile % (BN // 64), STRIPS // 4 - 1) + tile // (BN // 64) * (STRIPS // 4)
    else:
        tile = tl.minimum(n * (BN // 32) + tile, STRIPS // 2 - 1)
        if IN_ORDER:
            strip = tl.minimum(n * (BN // 16) + strip, STRIPS - 1)
        else:
            strip = tl.minimum(n * (BN // 32) + strip % (BN // 32), STRIPS // 2 - 1) * 2 + strip // (BN // 32)
    return strip, tile


@triton.jit
def _dot(a, b, acc, TARGET: tl.constexpr):
    if TARGET == INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _add_product(
    words,
    scales,
    x,
    acc,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A step's words ``[BN / 16, 2 * BK]`` and scales ``[BN / 32, BK]``, as they lie, times rows ``[BK, BM]``."""
    words = words.reshape(BN // 16, BK // 32, 16, 4).permute(0, 2, 1, 3).reshape(BN, BK // 8)
    if HALVES == SEPARATED:
        scales = scales.reshape(2, BN // 64, BK // 64, 16, 2, 2).permute(0, 1, 5, 3, 4, 2).reshape(BN, BK // 32)
    else:
        scales = scales.reshape(BN // 32, BK // 64, 16, 2, 2).permute(4, 0, 2, 3, 1).reshape(BN, BK // 32)
    values = bf16_of_words(words, scales, TARGET, WIDE)
    return _dot(values, x, acc, TARGET)


@triton.jit
def _multiply(
    X,
    W,
    S,
    source,
    ok,
    n,
    first,
    STRIPS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``[BN, BM]``: a tile's weight times rows of activations, over ``STEPS`` of ``BK`` columns from the ``first`` on.

    ``BK`` is 256, the columns of a tile of scales, or 128: then a step has the first 64 of both its halves, and the
    next step the others, because their scales are neighbours.
    """
    strip, tile = _strips(n, STRIPS, BN, HALVES, False)
    word = tl.arange(0, 2 * BK)
    column = tl.arange(0, BK)
    if BK == 128:
        word = (word // 128) * 256 + word % 128
        column = (column // 64) * 128 + column % 64
    Words = W.to(tl.pointer_type(tl.int32)) + strip[:, None] * (2 * K) + word[None, :]
    Scales = S + tile[:, None] * COLUMNS + tl.arange(0, BK)[None, :]
    Rows = X + source[:, None].to(tl.int64) * COLUMNS + column[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, STEPS):
        k = step + first
        if BK == 128:
            at = (k // 2) * 256 + (k % 2) * 64
        else:
            at = k * BK
        if K == COLUMNS:
            words = tl.load(Words + at * 2)
        else:  # codes end before their scales do
            words = tl.load(Words + at * 2, mask=(at * 2 + word < 2 * K)[None, :], other=0)
        scales = tl.load(Scales + k * BK)
        x = tl.load(Rows + at, mask=ok[:, None], other=0.0)
        acc = _add_product(words, scales, x.trans(1, 0), acc, BN, BK, HALVES, TARGET, WIDE)
    return acc


@triton.jit
def _one_after_the_other(
    X,
    W,
    S,
    source,
    ok,
    n,
    Bias,
    Y,
    slot,
    row,
    expert,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``RUN`` tiles of a weight of 256 columns without halves: rows of activations are loaded once for all of them."""
    column = tl.arange(0, 128)
    Rows = X + source[:, None].to(tl.int64) * 256 + ((column // 64) * 128 + column % 64)[None, :]
    x0 = tl.load(Rows, mask=ok[:, None], other=0.0).trans(1, 0)
    x1 = tl.load(Rows + 64, mask=ok[:, None], other=0.0).trans(1, 0)
    word = tl.arange(0, 256)
    word = (word // 128) * 256 + word % 128
    for each in tl.range(n * RUN, n * RUN + RUN, num_stages=STAGES):
        strip, tile = _strips(each, STRIPS, BN, NO_HALVES, False)
        Words = W.to(tl.pointer_type(tl.int32)) + strip[:, None] * 512 + word[None, :]
        Scales = S + tile[:, None] * 256 + column[None, :]
        words0, words1 = tl.load(Words), tl.load(Words + 128)
        scales0, scales1 = tl.load(Scales), tl.load(Scales + 128)
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        acc = _add_product(words0, scales0, x0, acc, BN, 128, NO_HALVES, TARGET, WIDE)
        acc = _add_product(words1, scales1, x1, acc, BN, 128, NO_HALVES, TARGET, WIDE)
        finish(acc, Bias, None, Y, slot, row, ok, expert, each, ROWS, OUT, BM, BN, None, 0.0, 0.0, None, False)


@triton.jit
def _multiply_cdna4(
    X,
    W,
    S,
    source,
    n,
    first,
    STRIPS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALVES: tl.constexpr,
):
    """The same for gfx950, 256 columns a step. A lane's 16 bytes, 32 codes of one row, are its own operand of an MFMA
    for an order of columns in which activations are read in runs of 8."""
    strip, tile = _strips(n, STRIPS, BN, HALVES, True)
    word = tl.arange(0, 2)[:, None, None] * 256 + tl.arange(0, 256)[None, None, :]
    Words = W.to(tl.pointer_type(tl.uint32)) + strip[None, :, None] * (2 * K) + word
    Scales = S + tile[:, None] * COLUMNS + tl.arange(0, 256)[None, :]
    column = tl.arange(0, 256)
    column = (column // 128) * 128 + (column % 32 // 8) * 32 + (column % 128 // 32) * 8 + column % 8
    Rows = X + source[:, None].to(tl.int64) * COLUMNS + tl.max_contiguous(tl.multiple_of(column, 8), 8)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in tl.range(0, STEPS):
        at = (step + first) * 256
        if K == COLUMNS:
            words = tl.load(Words + at * 2)
        else:
            words = tl.load(Words + at * 2, mask=at * 2 + word < 2 * K, other=0)
        scales = tl.load(Scales + at)
        x = tl.load(Rows + at)
        if HALVES == SEPARATED:
            scales = scales.reshape(2, BN // 64, 4, 16, 2, 2).permute(4, 0, 1, 5, 2, 3)
        else:
            scales = scales.reshape(BN // 32, 4, 16, 2, 2).permute(3, 0, 4, 1, 2)
        scales = scales.reshape(2, BN // 16, 4, 16, 1).broadcast_to(2, BN // 16, 4, 16, 4)
        values = bf16_of_tiles(words.reshape(2, BN // 16, 4, 16, 4), scales)
        values = values.permute(1, 3, 0, 4, 2, 7, 6, 5).reshape(BN, 256)
        acc = _dot(x, values.trans(1, 0), acc, CDNA4)
    if HALVES == SEPARATED:
        return acc.trans(1, 0)
    return acc.reshape(BM, BN // 32, 2, 16).permute(2, 1, 3, 0).reshape(BN, BM)


@triton.jit
def _tile(
    X,
    W,
    S,
    Bias,
    Weight,
    Y,
    Slot,
    Partial,
    Arrived,
    expert,
    begin,
    row0,
    rows,
    block,
    n,
    part,
    STRIPS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    TILES: tl.constexpr,
    TOPK: tl.constexpr,
    BM: tl.constexpr,
    BM1: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    p0,
    p1,
    RULE: tl.constexpr,
    HALVES: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
):
    place = begin + tl.arange(0, BM)
    ok = place < rows
    slot = tl.load(Slot + row0 + place, mask=ok, other=0)
    if ACTIVATION is not None:  # from a token's row to a row of this expert
        source = slot // TOPK
        row = row0 + place
    else:  # and back to its slot
        source = row0 + place
        row = slot
    STEPS: tl.constexpr = COLUMNS // BK // PARTS
    W += expert * (STRIPS * 8 * K)
    S += expert * (STRIPS * 16 * (COLUMNS // 32))
    if RUN > 1:
        tl.static_assert(ACTIVATION is None and K == 256 and COLUMNS == 256)
        _one_after_the_other(
            X, W, S, source, ok, n, Bias, Y, slot, row, expert, STRIPS, ROWS, OUT, BM, BN, RUN, STAGES, TARGET, WIDE
        )
    else:
        if TARGET == CDNA4:
            tl.static_assert(BK == 256)
            source = tl.where(ok, source, 0)
            acc = _multiply_cdna4(X, W, S, source, n, part * STEPS, STRIPS, K, COLUMNS, STEPS, BM, BN, HALVES)
        else:
            acc = _multiply(
                X, W, S, source, ok, n, part * STEPS, STRIPS, K, COLUMNS, STEPS, BM, BN, BK, HALVES, TARGET, WIDE
            )
        last = True
        if PARTS > 1:
            tile = block.to(tl.int64) * TILES + n
            place = Partial + tile * (PARTS * BN * BM1) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
            tl.store(place + part * (BN * BM), acc)
            tl.debug_barrier()
            last = tl.atomic_add(Arrived + tile, 1, sem="acq_rel", scope="gpu") == PARTS - 1
            if last:  # whoever it is, it adds them in one order
                acc = tl.zeros((BN, BM), dtype=tl.float32)
                for each in tl.static_range(PARTS):
                    acc += tl.load(place + each * (BN * BM), cache_modifier=".cg")
        if last:
            finish(
                acc, Bias, Weight, Y, slot, row, ok, expert, n, ROWS, OUT, BM, BN, ACTIVATION, p0, p1, RULE,
                TARGET != CDNA4,
            )  # fmt: skip


@triton.jit
def stage(
    X,
    W,
    S,
    Bias,
    Weight,
    Y,
    Slot,
    Blocks,
    Partial,
    Arrived,
    p0,
    p1,
    STRIPS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    TILES: tl.constexpr,
    TOPK: tl.constexpr,
    BM1: tl.constexpr,
    BM2: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RULE: tl.constexpr,
    HALVES: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``Y`` of one stage.

    Args:
        X: bfloat16 ``[rows, COLUMNS]``: of tokens in the first stage, of the schedule's rows in the second.
        W, S: uint8 codes ``[E, 16 * STRIPS, K / 2]`` and scales ``[E, 16 * STRIPS, COLUMNS / 32]``, as they lie.
        Bias: ``[E, ROWS]``, of both halves where there are two, or None.
        Weight: ``[slots]``, applied before the bias, or None.
        Y: bfloat16 ``[rows, OUT]``: of the schedule's rows after the first stage, of slots after the second.
        Slot, Blocks: the schedule's.
        RUN: tiles of a program, where COLUMNS are 256; or 1.
        Partial, Arrived: float32 sums and int32 zeros, for ``PARTS`` of the columns, each another program's.
        p0, p1: the activation's parameters.
    """
    block = tl.program_id(0) // (TILES // RUN * PARTS)
    n = tl.program_id(0) % (TILES // RUN * PARTS) // PARTS
    part = tl.program_id(0) % PARTS
    after_the_kernel_before(OVERLAP)
    kind = tl.load(Blocks + 4 * block)
    if kind >= 0:
        begin = tl.load(Blocks + 4 * block + 1)
        row0 = tl.load(Blocks + 4 * block + 2)
        rows = tl.load(Blocks + 4 * block + 3)
        expert = (kind % SMALL).to(tl.int64)
        if BM2 > 0:
            if kind >= SMALL:
                _tile(
                    X, W, S, Bias, Weight, Y, Slot, Partial, Arrived, expert, begin, row0, rows, block, n, part, STRIPS,
                    K, COLUMNS, ROWS, OUT, TILES, TOPK, BM2, BM1, BN, BK, PARTS, RUN, STAGES,
                    ACTIVATION, p0, p1, RULE, HALVES, TARGET, WIDE,
                )  # fmt: skip
            else:
                _tile(
                    X, W, S, Bias, Weight, Y, Slot, Partial, Arrived, expert, begin, row0, rows, block, n, part, STRIPS,
                    K, COLUMNS, ROWS, OUT, TILES, TOPK, BM1, BM1, BN, BK, PARTS, RUN, STAGES,
                    ACTIVATION, p0, p1, RULE, HALVES, TARGET, WIDE,
                )  # fmt: skip
        else:
            _tile(
                X, W, S, Bias, Weight, Y, Slot, Partial, Arrived, expert, begin, row0, rows, block, n, part, STRIPS, K,
                COLUMNS, ROWS, OUT, TILES, TOPK, BM1, BM1, BN, BK, PARTS, RUN, STAGES, ACTIVATION, p0, p1, RULE, HALVES,
                TARGET, WIDE,
            )  # fmt: skip
