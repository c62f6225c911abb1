# SPDX-License-Identifier: MIT
"""Sizes and places: what is logical, what is padding, and which part of a storage a view shows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import round_up

__all__ = ["PAD", "PADDING", "PER_BYTE", "Geometry", "Window", "slice_of"]

PADDING = 256
"""Rows (of each gate and up half) and columns are padded to multiples of this, as ATOM does, so that the w13 and w2 of
one layer agree on both."""

PER_BYTE = {"qdata": 2, "scale": mxfp4.BLOCK}
"""Columns that one byte of codes, and of scales, is about."""

PAD = {"qdata": 0, "scale": 127}
"""What padding is filled with: zero codes, and scales of 1."""


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

    def halves_of(self, packed: Tensor) -> Tensor:
        """The logical part of row-major padded codes or scales ``[E, padded_rows, bytes]``: a view ``[E, halves, rows /
        halves, logical bytes]``."""
        logical_bytes = self.columns * packed.shape[-1] // self.padded_columns
        halves: Tensor = packed.unflatten(1, (self.halves, -1))
        return halves[:, :, : self.rows // self.halves, :logical_bytes]

    def pad(self, logical: Tensor, fill: int, *, interleaved: bool = False) -> Tensor:
        """Codes or scales ``[E, rows, bytes]`` in a new, row-major ``[E, padded_rows, padded bytes]``; ``interleaved``
        rows (g0, u0, g1, ...) are parted."""
        padded_bytes = logical.shape[-1] * self.padded_columns // self.columns
        padded = logical.new_full((len(logical), self.padded_rows, padded_bytes), fill)
        halves = (
            logical.unflatten(1, (-1, 2)).transpose(1, 2) if interleaved else logical.unflatten(1, (self.halves, -1))
        )
        self.halves_of(padded).copy_(halves)
        return padded

    def put(self, padded: Tensor, values: Tensor, rows: range, columns: slice) -> None:
        """Write `values` over some logical rows and bytes of row-major padded codes or scales."""
        each = self.rows // self.halves
        for half in range(self.halves):
            first, last = max(rows.start, half * each), min(rows.stop, (half + 1) * each)
            if first < last:
                offset = half * (self.padded_rows // self.halves - each)
                padded[:, first + offset : last + offset, columns] = values[:, first - rows.start : last - rows.start]


class Window(NamedTuple):
    """A part of a storage, in logical experts, rows and columns; rows and columns without steps."""

    experts: range
    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.experts), len(self.rows), len(self.columns)


def slice_of(window: range, per_byte: int = 1) -> slice:
    return slice(window.start // per_byte, -(-window.stop // per_byte), window.step)
