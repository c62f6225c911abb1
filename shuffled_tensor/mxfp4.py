# SPDX-License-Identifier: MIT
"""The MXFP4 number format (OCP Microscaling Formats 1.0): e2m1 codes, two a byte, with one e8m0 scale for 32 of them
along the last dimension.

A code is a sign bit over three magnitude bits that index (0, 0.5, 1, 1.5, 2, 3, 4, 6); the low nibble of a byte is the
even column. A scale byte ``b`` is ``2**(b - 127)``; 255 is NaN, and makes its whole block NaN.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shuffled_tensor import owners

__all__ = [
    "BLOCK",
    "BOUNDARIES",
    "CODES",
    "PARTS",
    "SCALES",
    "SCALE_RULES",
    "Part",
    "Quantizer",
    "ScaleRule",
    "dequantize",
    "dequantize_pieces",
    "install",
    "quantize",
    "quantize_into",
]

BLOCK = 32
"""Elements that share one scale."""

LOGICAL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Those in which values can be given out."""


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
_NORMAL, _INFINITY = 1 << 23, 255 << 23  # bits of float32: of the smallest normal number, and of infinity
_BYTE_VALUES = [[_VALUES[byte & 15], _VALUES[byte >> 4]] for byte in range(256)]


def _float32_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


# A value between two magnitudes goes to the nearer one, and from the midpoint to the even code. A code is the number of
# boundaries that a value is above, so where the even code is the upper one the boundary is the float32 just below the
# midpoint. Positive floats are ordered as their bits are. (No tensor is made here: an import may run under any mode of
# torch.)
BOUNDARIES = tuple(_float32_bits((low + high) / 2) - code % 2 for code, (low, high) in enumerate(pairwise(_MAGNITUDES)))

_BLOCKS_A_CORE = 1 << 11  # 256 KiB a tensor of their float32 bits

_WEIGHTS_A_CORE = 3 << 18
"""Of a piece. Fewer are nearer to a core, in its caches, but each piece waits a dozen times for all cores."""

_PIECE_SCALES = range(2, 241)
"""Those under which every value is a normal float32 number, and 2**14 times the scale as well."""

ScaleRule = Literal["floor", "even", "round_up", "amax4"]

# What each rule makes of the bits of a block's float32 amax: the exponent of a scale that puts amax near 4..6, the top
# of e2m1, which is two binades above 1.
_SCALE_RULES: dict[ScaleRule, Callable[[Tensor], Tensor]] = {
    # OCP MX 1.0, section 6.3: 2**(floor(log2(amax)) - 2)
    "floor": lambda amax: (amax >> 23) - 2,
    # the same, where an amax from 1.75 * 2**n on counts as the next binade (Quark; AMD's kernels until July 2026)
    "even": lambda amax: ((amax + 0x200000) >> 23) - 2,
    # the power of two at or above amax / 6, so that nothing saturates (AMD's kernels since July 2026), where a float32
    # amax / 6 that is not zero counts as at least 2**-126
    "round_up": lambda amax: torch.maximum(((amax + 0x3FFFFF) >> 23) - 2, (amax > 2).int()),
    # amax / 4 rounded to a power of two, upwards from a mantissa of 1.5 (AMD's one-stage fused kernels, for the
    # intermediate)
    "amax4": lambda amax: ((amax + 0x400000) >> 23) - 2,
}

SCALE_RULES: tuple[ScaleRule, ...] = tuple(_SCALE_RULES)
"""Names of the rules by which a block's scale follows from its amax."""


class Quantizer:
    """What quantises faster than torch's own operations do. This one takes nothing."""

    def takes(self, values: Tensor) -> bool:
        """Whether :meth:`quantize` is to be tried, on values that :func:`quantize` takes."""
        return False

    def quantize(self, values: Tensor, qdata: Tensor, scale: Tensor, scale_rule: ScaleRule) -> bool:
        """Write contiguous uint8 codes and scales.

        Returns:
            False where it cannot; nothing has been written then.
        """
        return False


_quantizer = Quantizer()


def install(quantizer: Quantizer) -> None:
    """Have this one tried first from now on."""
    global _quantizer
    _quantizer = quantizer


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
    if not _quantizer.takes(values):
        return _by_torch(values, scale_rule)
    sizes = [(*values.shape[:-1], values.shape[-1] // part.per_byte) for part in PARTS]
    qdata, scale = (torch.empty(size, dtype=torch.uint8, device=values.device) for size in sizes)
    return (qdata, scale) if _quantizer.quantize(values, qdata, scale, scale_rule) else _by_torch(values, scale_rule)


def quantize_into(values: Tensor, qdata: Tensor, scale: Tensor, *, scale_rule: ScaleRule = "even") -> None:
    """What :func:`quantize` returns for ``[E, N, K]``, written into contiguous uint8 tensors, without copies of the
    values, or with float32 ones of an expert; ``values`` are not checked."""
    if not _quantizer.quantize(values, qdata, scale, scale_rule):
        for codes, exponents, expert in zip(qdata, scale, values, strict=True):
            for out, data in zip((codes, exponents), _by_torch(expert, scale_rule), strict=True):
                out.copy_(data)


def _by_torch(values: Tensor, scale_rule: ScaleRule) -> tuple[Tensor, Tensor]:
    *rows, columns = values.shape
    blocks = values.reshape(-1, BLOCK)
    # on a CPU, as many at a time as stay in the caches of its cores; a GPU wants few launches, a compiler no loop
    chunked = values.device.type == "cpu" and owners.is_real(values) and not torch.compiler.is_compiling()
    chunks = blocks.split(_BLOCKS_A_CORE * torch.get_num_threads()) if chunked else (blocks,)
    qdata, scale = map(torch.cat, zip(*(_quantize(chunk, scale_rule) for chunk in chunks), strict=True))
    return qdata.view(*rows, columns // CODES.per_byte), scale.view(*rows, columns // BLOCK)


def _quantize(blocks: Tensor, scale_rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Codes ``[blocks, 16]`` and scales ``[blocks]`` of values ``[blocks, 32]``."""
    # On bits throughout: subnormal numbers are zero to arithmetic under torch.set_flush_denormal.
    bits = _bits(blocks).contiguous()
    magnitude = bits & 0x7FFFFFFF
    amax = magnitude.amax(-1)
    exponent = _SCALE_RULES[scale_rule](amax).clamp(0, 254)
    scale = torch.where(amax < _INFINITY, exponent, 255).to(torch.uint8)
    # A subnormal gets the exponent that it would have if float32 had smaller ones; and zero, that of the smallest. What
    # is normal is added to the smallest normal number.
    below, above = magnitude.clamp(1, _NORMAL), magnitude.clamp(min=_NORMAL)
    normal = _bits(below.float()) - (149 << 23) + (above - _NORMAL)
    scaled = normal - ((exponent - 127) << 23).unsqueeze(-1)
    codes = (bits >> 28 & 8).to(torch.uint8)  # the sign
    for boundary in BOUNDARIES:
        codes += scaled > boundary
    pairs = codes.view(torch.int16)  # the even column is the low byte
    return (pairs | pairs >> 4).to(torch.uint8), scale


def check_quantizable(values: Tensor, scale_rule: str) -> None:
    """Raise what :func:`quantize` would."""
    check_tensor("values", values)
    if not values.is_floating_point() or values.dtype in (*CODES.dtypes, *SCALES.dtypes):
        raise TypeError(f"quantize takes floating-point values, found {values.dtype}")
    if values.dim() == 0 or values.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK}, found shape {list(values.shape)}")
    if not isinstance(scale_rule, str) or scale_rule not in _SCALE_RULES:
        raise ValueError(f"unknown scale_rule {scale_rule!r}; known rules: {', '.join(map(repr, SCALE_RULES))}")


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of row-major MXFP4 bytes.

    Args:
        qdata: ``[..., K/2]`` codes, two a byte: uint8, int8 or float4_e2m1fn_x2.
        scale: ``[..., K/32]`` e8m0 scales: uint8, int8 or float8_e8m0fnu.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        ``[..., K]``. Exact in float32, bfloat16 and float64 but for scales from 253 up, whose larger codes overflow the
        first two to infinity. -0 stays -0.

    Raises:
        TypeError: a dtype that is none of the above.
        ValueError: shapes that do not fit each other, or tensors on different devices.
    """
    codes, exponents = _as_bytes(qdata, scale)
    owners.check_row_major("qdata", qdata)
    owners.check_row_major("scale", scale)
    if dtype not in LOGICAL_DTYPES:
        raise TypeError(f"dequantize gives {', '.join(map(str, LOGICAL_DTYPES))}, found dtype={dtype!r}")
    place = codes.int().unflatten(-1, (exponents.shape[-1], BLOCK // CODES.per_byte))
    place = place.add_((exponents.int() << 8).unsqueeze(-1)).flatten(-2).long()
    real = owners.is_real(codes) and not torch.compiler.is_compiling()
    pairs = _kept_pairs(dtype, codes.device) if real else _pairs_of_bytes(dtype, codes.device)
    return pairs.expand(*place.shape[:-1], -1).gather(-1, place).view(dtype)


def dequantize_pieces(qdata: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """What :func:`dequantize` gives in float32, some rows at a time: for a reader that is done with each piece before
    it takes the next, which may lie in the same memory.

    Args:
        qdata: uint8 ``[N, K/2]``.
        scale: uint8 ``[N, K/32]``.

    Yields:
        float32 ``[some, K]``: on a CPU as many rows as stay in its caches, which is several times faster; else all, as
        a GPU wants few launches.
    """
    if qdata.device.type != "cpu" or not qdata.numel():
        yield dequantize(qdata, scale)
        return
    columns = qdata.shape[1] * CODES.per_byte
    rows = min(len(qdata), max(1, _WEIGHTS_A_CORE * torch.get_num_threads() // columns))
    pairs, magnitudes = qdata.new_empty(2, rows, qdata.shape[1], dtype=torch.int32)
    values = qdata.new_empty(rows, columns, dtype=torch.float32)
    for codes, exponents in zip(qdata.split(rows), scale.split(rows), strict=True):
        if any(int(extreme) not in _PIECE_SCALES for extreme in exponents.aminmax()):
            yield dequantize(codes, exponents)
            continue
        if len(codes) < rows:  # the last piece
            pairs, magnitudes, values = (room[: len(codes)] for room in (pairs, magnitudes, values))
        # The two codes of a byte go to the tops of the halves of a word. There, with the sign left where it is and the
        # magnitude three bits lower, each is a float16 number, 2**-14 times the code's value; the smallest, 0.5, is
        # subnormal, as in e2m1, and comes to float32 exactly even where subnormal numbers are flushed.
        pairs.copy_(codes).mul_(1 << 12 | 1 << 24)
        torch.bitwise_right_shift(pairs, 3, out=magnitudes).bitwise_and_(0x0E000E00)
        pairs.bitwise_and_(-0x7FFF8000).bitwise_or_(magnitudes)  # 0x80008000, as an int32
        values.copy_(pairs.view(torch.float16))
        powers = exponents.int().add_(14).bitwise_left_shift_(23).view(torch.float32)
        values.unflatten(1, (-1, BLOCK)).mul_(powers.unsqueeze(-1))
        yield values


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(value).__name__}")


def _as_bytes(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both as uint8, or what :func:`dequantize` raises."""
    for part, data in ((CODES, qdata), (SCALES, scale)):
        check_tensor(part.name, data)
        accepted = dict.fromkeys((*part.dtypes, torch.int8))
        if data.dtype not in accepted:
            raise TypeError(f"{part} must be {' or '.join(map(str, accepted))}, found {data.dtype}")
    expected = [*qdata.shape[:-1], *(size * CODES.per_byte // BLOCK for size in qdata.shape[-1:])]
    if qdata.dim() == 0 or qdata.shape[-1] * CODES.per_byte % BLOCK or list(scale.shape) != expected:
        raise ValueError(
            f"for K columns, a multiple of {BLOCK}, qdata must be [..., K/{CODES.per_byte}] and scale [..., K/{BLOCK}],"
            f" found shapes {list(qdata.shape)} and {list(scale.shape)}"
        )
    if qdata.device != scale.device:
        raise ValueError(f"qdata and scale must be on one device, found {qdata.device} and {scale.device}")
    return qdata.view(torch.uint8), scale.view(torch.uint8)


_PAIRS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _kept_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`_pairs_of_bytes`, made once, whatever mode of torch the first caller is in."""
    pairs = _PAIRS.get((dtype, device))
    if pairs is None:
        with _disable_current_modes(), torch.inference_mode(False):
            # copied from a CPU, which is waited for: whoever reads it, on whatever stream, finds it written
            pairs = _PAIRS[dtype, device] = _pairs_of_bytes(dtype, torch.device("cpu")).to(device)
    return pairs


def _pairs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[256 scales * 256 bytes]``: what each byte of two codes is under each scale, both values in one word."""
    word = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return _values_of_bytes(dtype, device).view(word).flatten()


def _values_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[256 scales * 256 bytes, 2]``."""
    codes = torch.tensor(_BYTE_VALUES, dtype=torch.float32, device=device).flatten()
    exponent = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
    if dtype is torch.float64:
        powers = ((exponent.long() + 896) << 52).view(torch.float64)
        return torch.where(exponent == 255, math.nan, codes.double() * powers).view(-1, 2)
    # 2**-127 and what is below 2**-126 are subnormal, and zero to arithmetic under torch.set_flush_denormal: the first
    # is avoided, the others are put together from bits
    powers = (exponent.clamp(1, 254) << 23).view(torch.float32)
    values = torch.where(exponent == 255, math.nan, torch.where(exponent == 0, codes / 2, codes) * powers)
    smallest = (codes.abs() * 2**22).int() << exponent.clamp(max=1)  # in units of 2**-149, under scales 0 and 1
    subnormal = (exponent < 2) & (smallest < _NORMAL)
    bits = values.view(torch.int32) | torch.where(subnormal, smallest, 0)
    return bits.view(torch.float32).view(-1, 2).to(dtype)


def _bits(values: Tensor) -> Tensor:
    """The int32 bits of values as float32."""
    bits = values.float().view(torch.int32)
    if values.dtype is not torch.float64:
        return bits
    tiny = values.abs() < torch.finfo(torch.float32).tiny  # which torch.set_flush_denormal makes zero on the way
    return torch.where(tiny, (values.abs() * 2.0**149).round().int() | bits & -(2**31), bits)
