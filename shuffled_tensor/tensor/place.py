# SPDX-License-Identifier: MIT
"""Which part of a weight a rank holds, and with which ranks its layout was agreed on."""

from __future__ import annotations

from typing import NamedTuple

from shuffled_tensor.layouts import Layout
from shuffled_tensor.mxfp4 import BLOCK

__all__ = ["Agreement", "Place"]


class Place(NamedTuple):
    """Which part of a whole weight is here: a grid of experts, rows and columns.

    Attributes:
        shape: of the whole, ``[E, N, K]``; of one that has no experts dimension, ``[1, N, K]``.
        experts: which of its experts, in the order in which they lie here: a range, which a checkpoint holds as one
            piece; or a tuple, where they were listed, as by a rebalance. Then others may hold some of the same, and
            each is a piece of its own; one may come twice. Where any expert is held twice, every rank lists its own.
        rows: which rows of each half, gate and up, or of the one there is.
        columns: which columns, in whole blocks of 32.
    """

    shape: tuple[int, int, int]
    experts: range | tuple[int, ...]
    rows: range
    columns: range

    @classmethod
    def whole(cls, shape: tuple[int, int, int], halves: int) -> Place:
        """Of all of a weight, whose rows are two halves or one."""
        experts, rows, columns = shape
        return cls(shape, range(experts), range(rows // halves), range(columns))

    def check(self, shape: tuple[int, int, int], halves: int) -> None:
        """Raise ValueError where a part of this shape, whose rows are two halves or one, cannot lie so."""
        found = len(self.experts), halves * len(self.rows), len(self.columns)
        if found != shape:
            raise ValueError(f"this place is one of a part of shape {list(found)}, and the part has {list(shape)}")
        whole = Place.whole(self.shape, halves)
        inside = all(
            every == range(every.start, every.stop) and all_of.start <= every.start and every.stop <= all_of.stop
            for every, all_of in ((self.rows, whole.rows), (self.columns, whole.columns))
        )
        blocks = self.columns.start % BLOCK == self.columns.stop % BLOCK == 0
        if not (inside and blocks and all(expert in whole.experts for expert in self.experts)):
            raise ValueError(
                f"a part lies within experts, rows of each half, and columns in whole blocks of {BLOCK}, of its whole, "
                f"found {self}"
            )

    def part(self, *, experts: range | None = None, rows: range | None = None, columns: range | None = None) -> Place:
        """The place of a part of this part, whose experts, rows of each half and columns are numbered as they lie
        here."""
        return Place(
            self.shape,
            self.experts if experts is None else _picked(self.experts, experts),
            self.rows if rows is None else self.rows[rows.start : rows.stop],
            self.columns if columns is None else self.columns[columns.start : columns.stop],
        )


def _picked(held: range | tuple[int, ...], experts: range) -> range | tuple[int, ...]:
    if isinstance(held, range) and experts.step == 1:
        return held[experts.start : experts.stop]
    return tuple(held[expert] for expert in experts)


class Agreement(NamedTuple):
    """That the same weights of several ranks have the same sizes, padding and layout.

    Attributes:
        ranks: of the default group, all that have agreed.
        layout: the one; in any other, the bytes are not what was agreed on.
    """

    ranks: frozenset[int]
    layout: Layout
