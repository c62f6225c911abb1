# SPDX-License-Identifier: MIT
"""MXFP4 inside kernels: codes to bfloat16 under their scales, and activations rounded to MXFP4 and back.

Every code under every scale is a bfloat16 number, as in :func:`shuffled_tensor.dequantize`: nothing is rounded. All
functions take and give blocks of registers.
"""

import triton
import triton.language as tl

__all__ = [
    "CDNA4",
    "FULL_RANGE",
    "INTERPRETED",
    "PLAIN",
    "PTX",
    "bf16_of_words",
    "exponent_of",
    "fp4_values",
    "powers_of_two",
    "to_mxfp4_and_back",
]

# How words of eight codes become bfloat16.
PLAIN = tl.constexpr(0)
"""By arithmetic that every target has."""
INTERPRETED = tl.constexpr(3)
"""The same, for Triton's interpreter, which cannot multiply matrices of bfloat16."""
PTX = tl.constexpr(1)
"""By PTX, from sm_80 on."""
CDNA4 = tl.constexpr(2)
"""By gfx950's own instruction."""

FULL_RANGE = tl.constexpr(128)
"""The largest scale under which one multiplication upcasts a code; from the next one on, it takes two."""

# A code's bits are placed where bfloat16 has its sign, the last bits of its exponent and the first of its mantissa:
# that is its value times 2**-126, a subnormal number for 0.5, and a multiplication brings it to size, scale included.
# Nibbles q and q + 4 of a word are 16 bits apart, so that a pair of them is one register.
_NIBBLES = """
    and.b32 t, {source}, {mask}; mul.lo.u32 t, t, {copies}; and.b32 t, t, 0x81C081C0;
    {normalise}fma.rn.bf16x2 t, t, $9, z; mov.b32 {{${low}, ${high}}}, t;"""


def _ptx(normalise: str) -> str:
    nibbles = ("0x000F000F", "0x1040"), ("0x00F000F0", "0x0104")
    pairs = [(source, *each) for source in ("$8", "w") for each in nibbles]
    body = "".join(
        _NIBBLES.format(source=source, mask=mask, copies=copies, normalise=normalise, low=2 * q, high=2 * q + 1)
        for q, (source, mask, copies) in enumerate(pairs)
    )
    return f"{{ .reg .b32 t, w, z, n; mov.b32 z, 0x80008000; mov.b32 n, 0x7E807E80; shr.b32 w, $8, 8; {body} }}"


_PLACES = tl.constexpr(0x81C081C0 - (1 << 32))  # as an int32
_TWO_126 = tl.constexpr(2.0**126)
_ONE_MULTIPLICATION = tl.constexpr(_ptx(""))
_TWO_MULTIPLICATIONS = tl.constexpr(_ptx("fma.rn.bf16x2 t, t, n, z; "))  # n is 2**126

_SCALE = tl.constexpr("mad.lo.u32 $0, $1, 0x00800080, 0x3F003F00; min.u32 $0, $0, 0x7F807F80;")
_CVT = tl.constexpr(
    """v_cvt_scalef32_pk_bf16_fp4 $0, $4, $5
v_cvt_scalef32_pk_bf16_fp4 $1, $4, $5 op_sel:[1,0,0]
v_cvt_scalef32_pk_bf16_fp4 $2, $4, $5 op_sel:[0,1,0]
v_cvt_scalef32_pk_bf16_fp4 $3, $4, $5 op_sel:[1,1,0]"""
)


@triton.jit
def powers_of_two(scale):
    """float32 ``2**(scale - 127)`` of e8m0 bytes; NaN of 255."""
    bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)
    return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _multipliers(scale, WIDE: tl.constexpr):
    """Pairs of bfloat16, as int32, that PTX multiplies codes by."""
    scale = scale.to(tl.int32)
    if WIDE:  # 2**(scale - 127), after a multiplication by 2**126
        pair = tl.maximum(scale * 0x00800080, 0x00400040)
        return tl.where(scale == 255, 0x7FFF7FFF, pair)
    # 2**(scale - 1), and infinity for scales that this form is not for: never a number that looks right
    return tl.inline_asm_elementwise(_SCALE, "=r,r", [scale], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _low_and_high(pair, factor):
    """Two codes, 16 bits apart, placed as above, as bfloat16."""
    low = (pair << 16).to(tl.float32, bitcast=True) * _TWO_126
    high = (pair & -65536).to(tl.float32, bitcast=True) * _TWO_126
    return (low * factor).to(tl.bfloat16), (high * factor).to(tl.bfloat16)


@triton.jit
def bf16_of_words(words, scale, TARGET: tl.constexpr, WIDE: tl.constexpr):
    """Values of int32 ``words`` ``[R, C]`` of eight codes each, under uint8 ``scale`` ``[R, C / 4]``: bfloat16 ``[R, 8
    * C]``, where column ``4 * a + q`` of every 32 is the one at ``8 * q + a``.

    ``WIDE`` takes any scale, and otherwise all must be at most :data:`FULL_RANGE`.
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    if TARGET == PTX:
        factor = _multipliers(scale, WIDE)
    else:
        factor = powers_of_two(scale)
    factor = factor.reshape(R, C // 4, 1).broadcast_to(R, C // 4, 4).reshape(R, C)
    if TARGET == PTX:
        # One word in, eight numbers out: nothing here depends on how Triton orders several words in registers.
        ASM: tl.constexpr = _TWO_MULTIPLICATIONS if WIDE else _ONE_MULTIPLICATION
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, factor], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    else:
        a0, b0 = _low_and_high(((words & 0x000F000F) * 0x1040) & _PLACES, factor)
        a1, b1 = _low_and_high(((words & 0x00F000F0) * 0x0104) & _PLACES, factor)
        a2, b2 = _low_and_high((((words >> 8) & 0x000F000F) * 0x1040) & _PLACES, factor)
        a3, b3 = _low_and_high((((words >> 8) & 0x00F000F0) * 0x0104) & _PLACES, factor)
    values = tl.join(tl.join(tl.join(a0, b0), tl.join(a1, b1)), tl.join(tl.join(a2, b2), tl.join(a3, b3)))
    return values.reshape(R, C // 4, 4, 2, 2, 2).permute(0, 1, 5, 4, 2, 3).reshape(R, 8 * C)


@triton.jit
def _bf16_pair(word):
    low = (word & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def bf16_of_tiles(words, scale):
    """gfx950: values of uint32 ``words`` ``[..., 4]``, under e8m0 ``scale`` of the same shape: ``[..., 4, 2, 2, 2]``,
    the bits of a code's place in its word from the last to the first."""
    factor = (scale.to(tl.uint32) << 23).to(tl.float32, bitcast=True)  # of which the instruction reads the exponent
    o0, o1, o2, o3 = tl.inline_asm_elementwise(
        _CVT, "=&v,=&v,=&v,=&v,v,v", [words, factor], dtype=(tl.uint32,) * 4, is_pure=True, pack=1
    )
    return tl.join(tl.join(_bf16_pair(o0), _bf16_pair(o1)), tl.join(_bf16_pair(o2), _bf16_pair(o3)))


@triton.jit
def fp4_values(codes):
    """float32 values of codes, one in the low four bits of each int32."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * _TWO_126  # as above


@triton.jit
def exponent_of(amax, RULE: tl.constexpr):
    """A block's e8m0 scale, from the bits of its largest float32 magnitude, by a row of
    :data:`shuffled_tensor.mxfp4.SCALE_RULES`; 254 at most, whatever is not finite."""
    if RULE == "floor":
        exponent = (amax >> 23) - 2
    elif RULE == "even":
        exponent = ((amax + 0x200000) >> 23) - 2
    elif RULE == "round_up":
        exponent = tl.maximum(((amax + 0x3FFFFF) >> 23) - 2, (amax > 2).to(tl.int32))
    else:
        tl.static_assert(RULE == "amax4")
        exponent = ((amax + 0x400000) >> 23) - 2
    return tl.minimum(tl.maximum(exponent, 0), 254)


@triton.jit
def to_mxfp4_and_back(values, RULE: tl.constexpr):
    """float32 ``[..., 32]``, rounded to MXFP4 and back, as :func:`shuffled_tensor.quantize` does it."""
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitude, -1, keep_dims=True)
    exponent = exponent_of(amax, RULE)
    scaled = tl.abs(values) * powers_of_two(254 - exponent)
    step = tl.where(scaled < 2, 0.5, tl.where(scaled < 4, 1.0, 2.0))
    # 1.5 * 2**23: a sum with it has no bits for fractions, so the addition rounds, ties to even
    rounded = tl.minimum((scaled / step + 12582912.0 - 12582912.0) * step, 6.0) * powers_of_two(exponent)
    rounded = tl.where(amax >= 0x7F800000, float("nan"), rounded)
    return tl.where(values < 0, -rounded, rounded)
