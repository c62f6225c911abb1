# SPDX-License-Identifier: MIT
"""Quantising at the speed of memory: every value is read once, and no float32 copy of any is made.

The same integer arithmetic as :mod:`shuffled_tensor.mxfp4`, so the same bytes; on bits throughout, because a GPU may
flush subnormal numbers.
"""

import triton
import triton.language as tl

from shuffled_tensor.backends.triton.numbers import exponent_of

__all__ = ["quantize"]

_NORMAL: tl.constexpr = tl.constexpr(1 << 23)  # bits of float32: of the smallest normal number
_SUBNORMAL: tl.constexpr = tl.constexpr(3)  # exponent of scales that subnormal numbers are less than a quarter of
_INFINITY: tl.constexpr = tl.constexpr(255 << 23)  # of infinity


@triton.jit
def _scaled(magnitude, exponent):
    """Bits of float32 magnitudes, divided by their scale, with smaller exponents than float32 has for subnormals."""
    below = tl.minimum(tl.maximum(magnitude, 1), _NORMAL).to(tl.float32).to(tl.int32, bitcast=True)
    return below - (149 << 23) + (tl.maximum(magnitude, _NORMAL) - _NORMAL) - ((exponent - 127) << 23)


@triton.jit
def _code(bits, scaled, BOUNDARIES: tl.constexpr):
    """From the bits of a float32 and those of its magnitude, divided by its scale. From 1 on, codes are float32's bits
    cut behind the first of the mantissa, rounded to even; below, there are two."""
    rounded = ((scaled + 0x1FFFFF + ((scaled >> 22) & 1)) >> 22) - 252
    below = (scaled > BOUNDARIES[0]).to(tl.int32) + (scaled > BOUNDARIES[1]).to(tl.int32)
    return ((bits >> 28) & 8) | tl.minimum(tl.maximum(rounded, below), 7)


@triton.jit(do_not_specialize=["blocks"])
def quantize(Values, Codes, Scales, blocks, RULE: tl.constexpr, BOUNDARIES: tl.constexpr, BLOCKS: tl.constexpr):
    """A program has ``BLOCKS`` blocks of 32: int32 words of two bfloat16 each, or the bits of float32 numbers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    pair = block * 16 + tl.arange(0, 16)[None, :]
    inside = block < blocks
    if Values.dtype.element_ty == tl.int64:  # two float32
        words = tl.load(Values + pair, mask=inside, other=0)
        even, odd = words.to(tl.int32), (words >> 32).to(tl.int32)
    else:
        words = tl.load(Values + pair, mask=inside, other=0)
        even, odd = words << 16, words & -65536
    amax = tl.max(tl.maximum(even & 0x7FFFFFFF, odd & 0x7FFFFFFF), 1, keep_dims=True)
    exponent = exponent_of(amax, RULE)
    tl.store(Scales + block, tl.where(amax < _INFINITY, exponent, 255).to(tl.uint8), mask=inside)
    if tl.min(exponent) < _SUBNORMAL:
        of_even, of_odd = _scaled(even & 0x7FFFFFFF, exponent), _scaled(odd & 0x7FFFFFFF, exponent)
    else:
        shift = (exponent - 127) << 23
        of_even, of_odd = (even & 0x7FFFFFFF) - shift, (odd & 0x7FFFFFFF) - shift
    byte = _code(even, of_even, BOUNDARIES) | (_code(odd, of_odd, BOUNDARIES) << 4)
    tl.store(Codes + pair, byte.to(tl.uint8), mask=inside)
