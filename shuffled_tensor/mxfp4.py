# SPDX-License-Identifier: MIT
"""The MXFP4 number format (OCP Microscaling Formats 1.0): e2m1 codes, two a byte, with one e8m0 scale for 32 of them
along the last dimension.

A code is a sign bit over three magnitude bits that index (0, 0.5, 1, 1.5, 2, 3, 4, 6); the low nibble of a byte is the
even column. A scale byte ``b`` is ``2**(b - 127)``; 255 is NaN, and makes its whole block NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from shuffled_tensor import owners

__all__ = ["BLOCK", "CODES", "PARTS", "SCALES", "SCALE_RULES", "Part", "ScaleRule", "dequantize", "quantize"]

BLOCK = 32
"""Elements that share one scale."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is to be known of the codes, and of the scales, of a weight."""

    name: str
    """Of the argument, attribute and tensor in a file that holds it."""
    per_byte: int
    """Columns that one byte is about."""
    pad: int
    """The byte that padding is filled with."""
    dtypes: tuple[torch.dtype, ...]
    """In which its bytes may come."""
    element: torch.dtype
    """Of the bytes that every layout keeps together: they move as one."""

    def __repr__(self) -> str:
        return self.name


CODES = Part(
    "qdata", 2, 0, (torch.uint8, torch.int8, torch.float4_e2m1fn_x2), element=torch.complex128
)  # runs of 16 bytes, which is what makes a shuffle run at memory speed
SCALES = Part("scale", BLOCK, 127, (torch.uint8, torch.float8_e8m0fnu), element=torch.uint8)
PARTS = (CODES, SCALES)
"""In the order in which a pair of them is passed around."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_BYTE_VALUES = [[_VALUES[byte & 15], _VALUES[byte >> 4]] for byte in range(256)]

# A value between two magnitudes goes to the nearer one, and from the midpoint to the even code. `bucketize` sends an
# exact boundary down, so where the even code is the upper one the boundary is the float32 just below the midpoint.
_BOUNDARIES = tuple(
    midpoint if code % 2 == 0 else torch.nextafter(*torch.tensor([midpoint, 0.0], dtype=torch.float32)).item()
    for code, midpoint in enumerate((low + high) / 2 for low, high in pairwise(_MAGNITUDES))
)

ScaleRule = Literal["floor", "even", "round_up", "amax4"]

# What each rule makes of the bits of a block's float32 amax: the exponent of a scale that puts amax near 4..6, the top
# of e2m1, which is two binades above 1.
_SCALE_RULES: dict[ScaleRule, Callable[[Tensor], Tensor]] = {
    # OCP MX 1.0, section 6.3: 2**(floor(log2(amax)) - 2)
    "floor": lambda amax: (_bits(amax) >> 23) - 2,
    # the same, where an amax from 1.75 * 2**n on counts as the next binade (Quark; AMD's kernels until July 2026)
    "even": lambda amax: ((_bits(amax) + 0x200000) >> 23) - 2,
    # the power of two at or above amax / 6, so that nothing saturates (AMD's kernels since July 2026)
    "round_up": lambda amax: (_bits(amax * (1 / 6)) + 0x7FFFFF) >> 23,
    # amax / 4 rounded to a power of two, upwards from a mantissa of 1.5 (AMD's one-stage fused kernels, for the
    # intermediate)
    "amax4": lambda amax: ((_bits(amax) + 0x400000) >> 23) - 2,
}

SCALE_RULES: tuple[ScaleRule, ...] = tuple(_SCALE_RULES)
"""Names of the rules by which a block's scale follows from its amax."""


def quantize(values: Tensor, *, scale_rule: ScaleRule = "even") -> tuple[Tensor, Tensor]:
    """Quantise to MXFP4, computing in float32; codes round to nearest, ties to even, and saturate at 6.

    Args:
        values: floating point ``[..., K]``, K a multiple of 32.
        scale_rule: one of :data:`SCALE_RULES`. ``"even"`` is what AMD's Quark writes its MXFP4 checkpoints with,
            ``"floor"`` the one of the OCP specification.

    Returns:
        ``(qdata, scale)``: uint8 ``[..., K/2]`` codes and uint8 ``[..., K/32]`` e8m0 scales. A block of zeros gets
        scale 0 (2**-127), and keeps its signs; a block whose amax is too small for its scale gets scale 0 and rounds as
        usual; a block that holds an infinity or NaN gets scale 255 (NaN).

    Raises:
        TypeError: ``values`` is not floating point.
        ValueError: K is not a multiple of 32, or the rule is unknown.
    """
    check_quantizable(values, scale_rule)
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    exponent = _SCALE_RULES[scale_rule](amax).clamp(0, 254)
    scale = torch.where(amax.isfinite(), exponent, 255).to(torch.uint8)
    scaled = blocks / e8m0_to_float(scale).unsqueeze(-1)
    boundaries = torch.tensor(_BOUNDARIES, dtype=torch.float32, device=values.device)
    codes = torch.bucketize(scaled.abs(), boundaries, out_int32=True).to(torch.uint8)
    codes |= torch.signbit(blocks).to(torch.uint8) << 3
    codes = codes.flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def check_quantizable(values: Tensor, scale_rule: str) -> None:
    """Raise what :func:`quantize` would."""
    if not values.is_floating_point():
        raise TypeError(f"quantize takes floating-point values, found {values.dtype}")
    if values.dim() == 0 or values.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK}, found shape {list(values.shape)}")
    if scale_rule not in _SCALE_RULES:
        raise ValueError(f"unknown scale_rule {scale_rule!r}; known rules: {', '.join(map(repr, SCALE_RULES))}")


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of row-major MXFP4 bytes: ``[..., K]`` from uint8 ``[..., K/2]`` codes and uint8 ``[..., K/32]``
    scales.

    Exact in float32, bfloat16 and float64 but for scales from 253 up, whose larger codes overflow the first two to
    infinity. -0 stays -0.
    """
    owners.check_row_major("qdata", qdata)
    owners.check_row_major("scale", scale)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    both_codes = torch.tensor(_BYTE_VALUES, dtype=compute, device=qdata.device)
    blocks: Tensor = torch.nn.functional.embedding(qdata.int(), both_codes).flatten(-2).unflatten(-1, (-1, BLOCK))
    return (blocks * e8m0_to_float(scale).to(compute).unsqueeze(-1)).flatten(-2).to(dtype)


def e8m0_to_float(scale: Tensor) -> Tensor:
    """float32 ``2**(byte - 127)`` of uint8 e8m0 bytes; 255 gives NaN."""
    bits = scale.int() << 23
    bits = torch.where(scale == 0, 0x00400000, bits)  # 2**-127 is a subnormal float32
    bits = torch.where(scale == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


def _bits(amax: Tensor) -> Tensor:
    return amax.view(torch.int32)
