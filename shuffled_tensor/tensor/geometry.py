# SPDX-License-Identifier: MIT
"""Sizes and places: what is logical, what is padding, and which part of a storage a view shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

from torch import Tensor

from shuffled_tensor.layouts import LAYOUTS, round_up
from shuffled_tensor.mxfp4 import BLOCK, CODES, PARTS, Part

__all__ = [
    "ALIGN",
    "Align",
    "Geometry",
    "RowOrder",
    "ShardDim",
    "Window",
    "align_of",
    "aligns_of_layer",
    "check_rank",
    "interleave_rows",
    "part_rows",
    "shard_range",
    "slice_of",
]

RowOrder = Literal["contiguous", "interleaved"]
"""How the rows of a gate-up weight come: all gate rows, then all up rows; or g0, u0, g1, u1, ..."""

ShardDim = Literal["expert", "intermediate"]
"""What a weight is parted along: experts, or the dimension between the two GEMMs."""

Align = int | tuple[int, int]
"""What rows (of each gate and up half) and columns are padded to multiples of: one number, or one for each. Of a layer:
the hidden and the intermediate size."""

ALIGN = (256, 256)
"""The default: what every kernel takes that these layouts are for."""

_ALIGNS = (256, 128, 64, 32)

_TILES = {
    (part, gate_up): tuple(
        math.lcm(*(getattr(layout.order(part, gate_up), of) for layout in LAYOUTS.values()))
        for of in ("row_tile", "columns")
    )
    for part, gate_up in product(PARTS, (True, False))
}
"""Rows of each half, and columns, that every layout tiles."""


def interleave_rows(rows: Tensor) -> Tensor:
    """Gate, then up, along dimension 1, become g0, u0, g1, u1, ..."""
    out: Tensor = rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()
    return out


def part_rows(rows: Tensor) -> Tensor:
    """The inverse of :func:`interleave_rows`."""
    out: Tensor = rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous()
    return out


def align_of(align: Align, sizes: str = "rows of each half, columns") -> tuple[int, int]:
    """An argument ``align`` as a pair.

    Raises:
        ValueError: it is none.
    """
    pair = align if isinstance(align, tuple) else (align, align)
    if len(pair) != 2 or not all(type(size) is int and size in _ALIGNS for size in pair):
        raise ValueError(f"align must be 32, 64, 128 or 256, or two of them ({sizes}), found {align!r}")
    return pair


def aligns_of_layer(align: Align) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of w13 and of w2, for an ``align`` of a layer: one number, or one for the hidden and one for the intermediate
    size.

    Raises:
        ValueError: it is none.
    """
    hidden, intermediate = align_of(align, "hidden, intermediate")
    return (intermediate, hidden), (hidden, intermediate)


class Geometry(NamedTuple):
    """Logical and padded sizes of one expert: ``rows`` is N and ``columns`` K, both logical.

    ``align`` is kept, and not what it makes of these sizes, because other sizes are cut out of a weight.
    """

    rows: int
    columns: int
    gate_up: bool
    align: tuple[int, int] = ALIGN

    @classmethod
    def of_codes(cls, rows: int, columns: int, gate_up: bool, shape: Sequence[int]) -> Geometry | None:
        """The one that pads an expert's codes to `shape`, in rows and bytes: by the largest of several ``align``; None
        where no ``align`` does."""
        every = (cls(rows, columns, gate_up, align) for align in product(_ALIGNS, _ALIGNS))
        return next((one for one in every if one.padded_shape(CODES) == tuple(shape)), None)

    @property
    def halves(self) -> int:
        return 2 if self.gate_up else 1

    @property
    def padded_rows(self) -> int:
        """Of the codes."""
        return self._padded(CODES)[0]

    @property
    def padded_columns(self) -> int:
        """Of the codes."""
        return self._padded(CODES)[1]

    @property
    def sizes(self) -> tuple[int, int, bool, int, int]:
        """Logical and padded ones: where they are equal, equal values in one layout are equal bytes."""
        return *self[:3], *self._padded(CODES)

    def check_aligned(self, align: Align) -> None:
        """Raise ValueError where codes are padded otherwise than to multiples of ``align``."""
        wanted = self._replace(align=align_of(align))
        if wanted.padded_shape(CODES) != self.padded_shape(CODES):
            raise ValueError(
                f"this weight is padded to {self.padded_rows} rows and {self.padded_columns} columns, but "
                f"align={align} is {wanted.padded_rows} and {wanted.padded_columns}; make it with align={align}"
            )

    def shape(self, part: Part) -> tuple[int, int]:
        """Of one expert's logical codes or scales, in rows and bytes."""
        return self.rows, self.columns // part.per_byte

    def padded_shape(self, part: Part) -> tuple[int, int]:
        """Of one expert's codes or scales, in rows and bytes."""
        rows, columns = self._padded(part)
        return rows, columns // part.per_byte

    def _padded(self, part: Part) -> tuple[int, int]:
        """Rows and columns: what is asked for, and what the tiles need beyond that, which for scales is more."""
        each, columns = self.rows // self.halves, self.columns
        for row_multiple, column_multiple in (self.align, _TILES[part, self.gate_up]):
            each, columns = round_up(each, row_multiple), round_up(columns, column_multiple)
        return self.halves * each, columns

    def halves_of(self, part: Part, packed: Tensor) -> Tensor:
        """The logical part of row-major padded codes or scales ``[E, padded_rows, bytes]``: a view ``[E, halves, rows /
        halves, logical bytes]``."""
        halves: Tensor = packed.unflatten(1, (self.halves, -1))
        return halves[:, :, : self.rows // self.halves, : self.columns // part.per_byte]

    def pad(self, part: Part, logical: Tensor, *, interleaved: bool = False) -> Tensor:
        """Codes or scales ``[E, rows, bytes]`` in a new, row-major ``[E, padded_rows, padded bytes]``; ``interleaved``
        rows (g0, u0, g1, ...) are parted."""
        padded = logical.new_full((len(logical), *self.padded_shape(part)), part.pad)
        halves = (
            logical.unflatten(1, (-1, 2)).transpose(1, 2) if interleaved else logical.unflatten(1, (self.halves, -1))
        )
        self.halves_of(part, padded).copy_(halves)
        return padded

    def rewrite_pads(self, part: Part, packed: Tensor) -> None:
        """Give the pads of row-major padded codes or scales the value that they are defined to have."""
        rows, logical_bytes = self.rows // self.halves, self.columns // part.per_byte
        halves = packed.unflatten(1, (self.halves, -1))
        halves[:, :, rows:] = part.pad
        halves[..., logical_bytes:] = part.pad

    def put(
        self, part: Part, padded: Tensor, values: Tensor, rows: range, columns: range, *, interleaved: bool = False
    ) -> None:
        """Write `values` over some logical rows, by their numbers in either order, and columns of row-major padded
        codes or scales."""
        each = self.rows // self.halves
        for half, target in enumerate(padded.unflatten(1, (self.halves, -1)).unbind(1)):
            if interleaved:
                place = slice((half - rows.start) % 2, None, 2)
                own = range((rows.start + 1 - half) // 2, (rows.stop + 1 - half) // 2)
            else:
                first, last = max(rows.start, half * each), min(rows.stop, (half + 1) * each)
                place = slice(first - rows.start, max(first, last) - rows.start)
                own = range(first - half * each, max(first, last) - half * each)
            target[:, slice_of(own), slice_of(columns, part)].copy_(values[:, place])


class Window(NamedTuple):
    """A part of a storage, in logical experts, rows and columns; rows and columns without steps."""

    experts: range
    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.experts), len(self.rows), len(self.columns)


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError for a rank that there is not."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, found rank {rank} of {world_size}")


def shard_range(size: int, rank: int, world_size: int, dim: ShardDim) -> range:
    """A rank's part of `size` experts, all of them equal, or of an intermediate dimension, in whole blocks of 32.

    Where blocks do not come out even, the first ranks get as many as a rank needs to get at least, and the last one the
    rest, as in the engines: of 2880, at 4 ranks, 736, 736, 736 and 672.

    Raises:
        ValueError: the rank is out of range, or on one of the ranks nothing would be left; on every rank alike.
    """
    check_rank(rank, world_size)
    if dim == "expert":
        if size % world_size:
            raise ValueError(f"{size} (expert) cannot be parted into {world_size} equal parts")
        each = size // world_size
    else:
        each = round_up(-(-size // world_size), BLOCK)
        if size % BLOCK or (world_size - 1) * each >= size:
            raise ValueError(
                f"{size} (intermediate) cannot be parted into {world_size} parts of whole blocks of {BLOCK}"
            )
    return range(rank * each, min((rank + 1) * each, size))


def slice_of(window: range, part: Part | None = None) -> slice:
    """A range as a slice; of columns, in the bytes of a part."""
    per_byte = 1 if part is None else part.per_byte
    return slice(window.start // per_byte, -(-window.stop // per_byte), window.step)
