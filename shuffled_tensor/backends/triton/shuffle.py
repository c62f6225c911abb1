# SPDX-License-Identifier: MIT
"""Shuffles at the speed of a copy: every byte is read once and written once, 16 at a time.

A strip is the rows whose bytes lie together in memory: 16 rows of codes, 32 of scales. Within one, the codes of a
layout are the transposed matrix of its 16-byte units, and scales are 4 x 4 byte matrices, transposed in registers.
Where gate and up are interleaved, strips of codes change their places, too: the one of rows ``p`` comes to
``2 * (p % half) + p // half``, ``half`` being how many each of gate and up has.

In place, a program holds a whole strip in registers before it writes. Where strips change their places, it follows one
round of them, with two in registers; and where rounds are few and long, they are cut into pieces, whose first strips
are put aside before any is overwritten.
"""

import triton
import triton.language as tl

__all__ = ["move_codes", "move_pieces", "move_scales", "put_aside"]


@triton.jit
def _load_rows(Rows, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr):
    """Words ``[TILE, UNITS * 4]`` of row-major codes, from column ``first`` on; ``WIDTH`` is that of a row."""
    row = tl.arange(0, TILE)[:, None]
    column = first + tl.arange(0, UNITS * 4)[None, :]
    if WIDTH % (UNITS * 4) == 0:
        return tl.load(Rows + row * WIDTH + column)
    return tl.load(Rows + row * WIDTH + column, mask=column < WIDTH, other=0)


@triton.jit
def _store_rows(Rows, words, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr):
    row = tl.arange(0, TILE)[:, None]
    column = first + tl.arange(0, UNITS * 4)[None, :]
    if WIDTH % (UNITS * 4) == 0:
        tl.store(Rows + row * WIDTH + column, words)
    else:
        tl.store(Rows + row * WIDTH + column, words, mask=column < WIDTH)


@triton.jit
def _load_tiled(Tiled, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr):
    """The same words ``[UNITS * TILE * 4]`` as a layout has them."""
    place = first * TILE + tl.arange(0, UNITS * TILE * 4)
    if WIDTH % (UNITS * 4) == 0:
        return tl.load(Tiled + place)
    return tl.load(Tiled + place, mask=place < WIDTH * TILE, other=0)


@triton.jit
def _store_tiled(Tiled, words, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr):
    place = first * TILE + tl.arange(0, UNITS * TILE * 4)
    if WIDTH % (UNITS * 4) == 0:
        tl.store(Tiled + place, words)
    else:
        tl.store(Tiled + place, words, mask=place < WIDTH * TILE)


@triton.jit
def _load(Strip, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr, INVERSE: tl.constexpr):
    """A strip from the side that is read."""
    if INVERSE:
        return _load_tiled(Strip, first, WIDTH, TILE, UNITS)
    else:
        return _load_rows(Strip, first, WIDTH, TILE, UNITS)


@triton.jit
def _store(Strip, words, first, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr, INVERSE: tl.constexpr):
    """The same strip, transposed, to the side that is written."""
    if INVERSE:
        words = words.reshape(UNITS, TILE, 4).permute(1, 0, 2).reshape(TILE, UNITS * 4)
        _store_rows(Strip, words, first, WIDTH, TILE, UNITS)
    else:
        words = words.reshape(TILE, UNITS, 4).permute(1, 0, 2).reshape(UNITS * TILE * 4)
        _store_tiled(Strip, words, first, WIDTH, TILE, UNITS)


@triton.jit
def _next(place, half, INVERSE: tl.constexpr):
    """Where the strip at a place goes."""
    if INVERSE:
        return (place % 2) * half + place // 2
    else:
        return (place % half) * 2 + place // half


@triton.jit(do_not_specialize=["strips", "chunks"])
def move_codes(
    Source,
    Target,
    strips,
    chunks,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """A program has some columns of one strip, and all of them where ``Source`` is ``Target``."""
    program = tl.program_id(0)
    first = (program % chunks) * (UNITS * 4)
    expert = (program // chunks // strips).to(tl.int64) * strips
    place = program // chunks % strips
    goes = place
    if INTERLEAVED:
        goes = _next(place, strips // 2, INVERSE)
    words = _load(Source + (expert + place) * (TILE * WIDTH), first, WIDTH, TILE, UNITS, INVERSE)
    tl.debug_barrier()  # in place, all is read before any is written
    _store(Target + (expert + goes) * (TILE * WIDTH), words, first, WIDTH, TILE, UNITS, INVERSE)


@triton.jit(do_not_specialize=["strips", "pieces"])
def put_aside(
    Data, Scratch, Starts, strips, pieces, WIDTH: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """The first strip of each piece, as it lies."""
    program = tl.program_id(0).to(tl.int64)
    strip = program // pieces * strips + tl.load(Starts + program % pieces)
    words = _load_tiled(Data + strip * (TILE * WIDTH), 0, WIDTH, TILE, UNITS)
    _store_tiled(Scratch + program * (TILE * WIDTH), words, 0, WIDTH, TILE, UNITS)


@triton.jit(do_not_specialize=["strips", "pieces"])
def move_pieces(
    Data,
    Scratch,
    Starts,
    Lengths,
    strips,
    pieces,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """A program moves the strips of one piece of a round, each to the place of the one that it has just read."""
    program = tl.program_id(0).to(tl.int64)
    Data += program // pieces * strips * (TILE * WIDTH)
    place = tl.load(Starts + program % pieces)
    length = tl.load(Lengths + program % pieces)
    if Scratch is None:
        words = _load(Data + place.to(tl.int64) * (TILE * WIDTH), 0, WIDTH, TILE, UNITS, INVERSE)
    else:
        words = _load(Scratch + program * (TILE * WIDTH), 0, WIDTH, TILE, UNITS, INVERSE)
    while length > 1:  # a range of a tensor is none to the interpreter
        length -= 1
        place = _next(place, strips // 2, INVERSE)
        Strip = Data + place.to(tl.int64) * (TILE * WIDTH)
        following = _load(Strip, 0, WIDTH, TILE, UNITS, INVERSE)
        tl.debug_barrier()
        _store(Strip, words, 0, WIDTH, TILE, UNITS, INVERSE)
        words = following
    place = _next(place, strips // 2, INVERSE)
    tl.debug_barrier()  # of a round of one strip, which is read and written
    _store(Data + place.to(tl.int64) * (TILE * WIDTH), words, 0, WIDTH, TILE, UNITS, INVERSE)


@triton.jit
def _transpose(a, b, c, d):
    """The 4 x 4 matrix of the bytes of four words; its own inverse."""
    low_ab = (a & 0x00FF00FF) | ((b & 0x00FF00FF) << 8)
    high_ab = ((a >> 8) & 0x00FF00FF) | (b & 0xFF00FF00)
    low_cd = (c & 0x00FF00FF) | ((d & 0x00FF00FF) << 8)
    high_cd = ((c >> 8) & 0x00FF00FF) | (d & 0xFF00FF00)
    return (
        (low_ab & 0xFFFF) | (low_cd << 16),
        (high_ab & 0xFFFF) | (high_cd << 16),
        (low_ab >> 16) | (low_cd & 0xFFFF0000),
        (high_ab >> 16) | (high_cd & 0xFFFF0000),
    )


@triton.jit(do_not_specialize=["rows"])
def move_scales(
    Source,
    Target,
    rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
    STRIPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """A program has ``STRIPS`` strips of an expert of so many rows of ``WIDTH`` words, which are at most ``UNITS``
    columns of 8 bytes. A strip is two half strips of ``TILE`` rows."""
    strips = rows // (2 * TILE)
    program = tl.program_id(0)
    each = tl.cdiv(strips, STRIPS)
    expert = (program // each).to(tl.int64) * rows * WIDTH
    strip = program % each * STRIPS + tl.arange(0, STRIPS)
    if INTERLEAVED:
        first, apart = strip * TILE, strips * TILE
    else:
        first, apart = strip * (2 * TILE), TILE
    row = first[:, None, None] + tl.arange(0, TILE)[None, :, None]
    column = tl.arange(0, UNITS * 2)[None, None, :]
    upper = expert + row * WIDTH + column
    lower = upper + apart * WIDTH
    is_row = (column < WIDTH) & (strip < strips)[:, None, None]
    inside = tl.arange(0, UNITS * TILE * 4)[None, :]
    place = expert + strip[:, None] * (2 * TILE * WIDTH) + inside
    is_place = (inside < 2 * TILE * WIDTH) & (strip < strips)[:, None]
    if INVERSE:
        words = tl.load(Source + place, mask=is_place, other=0).to(tl.uint32, bitcast=True)
        words = words.reshape(STRIPS, UNITS, 4, TILE).permute(0, 3, 1, 2).reshape(STRIPS, TILE, UNITS, 2, 2)
        even, odd = words.split()
        q0, q2 = even.split()
        q1, q3 = odd.split()
        a, b, c, d = _transpose(q0, q1, q2, q3)
        above = tl.join(a, c).reshape(STRIPS, TILE, UNITS * 2).to(tl.int32, bitcast=True)
        below = tl.join(b, d).reshape(STRIPS, TILE, UNITS * 2).to(tl.int32, bitcast=True)
        tl.debug_barrier()
        tl.store(Target + upper, above, mask=is_row)
        tl.store(Target + lower, below, mask=is_row)
    else:
        above = tl.load(Source + upper, mask=is_row, other=0).to(tl.uint32, bitcast=True)
        below = tl.load(Source + lower, mask=is_row, other=0).to(tl.uint32, bitcast=True)
        a, c = above.reshape(STRIPS, TILE, UNITS, 2).split()
        b, d = below.reshape(STRIPS, TILE, UNITS, 2).split()
        q0, q1, q2, q3 = _transpose(a, b, c, d)
        words = tl.join(tl.join(q0, q2), tl.join(q1, q3)).reshape(STRIPS, TILE, UNITS, 4)
        words = words.permute(0, 2, 3, 1).reshape(STRIPS, UNITS * TILE * 4).to(tl.int32, bitcast=True)
        tl.debug_barrier()  # in place, all is read before any is written
        tl.store(Target + place, words, mask=is_place)
