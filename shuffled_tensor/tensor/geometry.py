# SPDX-License-Identifier: MIT
"""Sizes and places: what is logical, what is padding, and which part of a storage a view shows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from shuffled_tensor.layouts import round_up
from shuffled_tensor.mxfp4 import BLOCK, Part

__all__ = ["PADDING", "Geometry", "RowOrder", "ShardDim", "Window", "check_rank", "shard_range", "slice_of"]

RowOrder = Literal["contiguous", "interleaved"]
"""How the rows of a gate-up weight come: all gate rows, then all up rows; or g0, u0, g1, u1, ..."""

ShardDim = Literal["expert", "intermediate"]
"""What a weight is parted along: experts, or the dimension between the two GEMMs."""

PADDING = 256
"""Rows (of each gate and up half) and columns are padded to multiples of this, so that the w13 and w2 of one layer
agree on both and every layout tiles them."""


class Geometry(NamedTuple):
    """Logical and padded sizes of one expert: ``rows`` is N and ``columns`` K, both logical."""

    rows: int
    columns: int
    gate_up: bool

    @property
    def halves(self) -> int:
        return 2 if self.gate_up else 1

    @property
    def padded_rows(self) -> int:
        return self.halves * round_up(self.rows // self.halves, PADDING)

    @property
    def padded_columns(self) -> int:
        return round_up(self.columns, PADDING)

    @property
    def padded(self) -> bool:
        return (self.padded_rows, self.padded_columns) != (self.rows, self.columns)

    def padded_shape(self, part: Part) -> tuple[int, int]:
        """Of one expert's codes or scales, in rows and bytes."""
        return self.padded_rows, self.padded_columns // part.per_byte

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
