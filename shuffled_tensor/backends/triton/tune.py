# SPDX-License-Identifier: MIT
"""How large the tiles of a call are: a table by what decides it, made by measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Plan", "Tile", "plan"]


class Tile(NamedTuple):
    """Of one stage's programs."""

    rows: int
    """Of the weight."""
    columns: int
    """A step: 128 or 256."""
    warps: int
    stages: int
    parts: int = 1
    """Programs that share the columns, where there are too few tiles for the GPU."""
    run: int = 1
    """Tiles of a program, of a weight of 256 columns."""


class Plan(NamedTuple):
    """Of a call."""

    rows: int
    """Of a block."""
    small: int
    """At most, of a small block; 0 where there are none."""
    first: Tile
    second: Tile


_ROWS = ((10, 16, 0, 4), (20, 32, 16, 4), (48, 64, 32, 4), (96, 128, 64, 3), (1 << 30, 128, 32, 3))
"""Up to so many slots an expert: a block's rows, a small one's, and stages."""

_TILES = 264
"""That fill a GPU: two for each of 132 processors."""


def plan(slots: int, experts: int, tiles: Sequence[int], columns: Sequence[int], cdna4: bool, narrow: bool) -> Plan:
    """For so many slots of experts at hand, and so many tiles of 128 rows and padded columns of either weight;
    ``narrow`` says that the second has 256 columns of codes."""
    _, rows, small, stages = next(row for row in _ROWS if slots <= row[0] * experts)
    active = min(slots, experts)

    def tile(count: int, width: int, runs: bool) -> Tile:
        if active * count < _TILES:  # too few, even where each has several programs: twice as many, of half the rows
            steps = width // 256
            parts = [each for each in range(1, 9) if steps % each == 0]
            enough = (each for each in parts if 2 * active * count * each >= 1.5 * _TILES)
            return Tile(64, 256, 4, 1 if cdna4 else 3, next(enough, parts[-1]))
        if cdna4:
            return Tile(128, 256, 4, 1)
        if runs:
            enough = (each for each in (14, 7, 8, 4, 2) if count % each == 0)
            run = next((each for each in enough if active * count >= 2 * _TILES * each), 1)
            return Tile(128, 128, 4, 3 if run > 1 else stages, 1, run)
        return Tile(128, 128, 4, stages)

    return Plan(rows, small, tile(tiles[0], columns[0], False), tile(tiles[1], columns[1], narrow))
