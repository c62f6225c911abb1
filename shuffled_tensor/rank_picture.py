# SPDX-License-Identifier: MIT
"""A picture of what each rank holds of a weight that ranks share."""

from __future__ import annotations

from shuffled_tensor.drawing import (
    AXIS,
    BETWEEN,
    CELL_HEIGHT,
    GREY,
    LABELS,
    MARGIN,
    MAX_CELLS,
    colour,
    page,
    text,
)
from shuffled_tensor.mxfp4 import BLOCK
from shuffled_tensor.tensor.geometry import ShardDim, shard_range

__all__ = ["rank_picture"]

_HALF_GAP, _RANK_GAP = 8, 26  # pixels; a rank's has room for its name
_COLUMN_HEIGHT = 84  # of a cell, where cells are columns


def rank_picture(
    ranks: int, rows: int, k: int, *, gate_up: bool = True, dim: ShardDim = "intermediate", experts: int = 8
) -> str:
    """An SVG of a weight, whole and as so many ranks hold it, by :func:`shard_range`.

    A cell is what is never cut: 32 rows of the gate or of the up half of a gate-up weight, 32 columns of a down weight,
    or an expert. Its colour says whose it is, and a tooltip where it lies there.

    Args:
        ranks: how many there are.
        rows, k: N, gate rows then up rows when ``gate_up``, and K, the columns; of an expert.
        gate_up: whether the rows are two stacked halves, gate and up (w13), or one (w2).
        dim: ``"intermediate"``, the rows of both halves, or the columns of a down weight; or ``"expert"``.
        experts: how many the weight has.

    Raises:
        ValueError: sizes that no weight has, that ranks cannot share, or more than :data:`MAX_CELLS` cells.
    """
    if rows < 1 or k < 1 or k % BLOCK or (gate_up and rows % 2):
        raise ValueError(
            f"a weight has rows, and K in whole blocks of {BLOCK} columns"
            f"{', and as many gate as up rows' if gate_up else ''}; found N={rows}, K={k}"
        )
    return _Drawing(ranks, rows, k, gate_up, dim, experts).svg()


class _Drawing:
    """The weight and its shards side by side, a cell a line; a down weight by columns above them, a cell a column.

    `along` is down the page for lines and to the right for columns, and `across` the other direction.
    """

    def __init__(self, ranks: int, rows: int, k: int, gate_up: bool, dim: ShardDim, experts: int) -> None:
        self.rows, self.k, self.gate_up, self.dim, self.experts = rows, k, gate_up, dim, experts
        by_expert = dim == "expert"
        self.words: tuple[str, ...]
        if by_expert:
            self.size, self.unit, self.words, unit_is = experts, 1, ("experts",), "experts"
        elif gate_up:
            self.size, self.unit, self.words, unit_is = rows // 2, BLOCK, ("gate", "up"), f"blocks of {BLOCK} rows"
        else:
            self.size, self.unit, self.words, unit_is = k, BLOCK, ("columns",), f"blocks of {BLOCK} columns"
        count = len(self.words) * self.size // self.unit
        if count > MAX_CELLS:
            raise ValueError(f"a picture shows at most {MAX_CELLS} {unit_is}; these are {count}")
        self.lines = by_expert or gate_up
        self.shards = [shard_range(self.size, rank, ranks, dim) for rank in range(ranks)]
        self.cells = [
            (half, first) for half in range(len(self.words)) for first in range(self.size)[:: self.unit]
        ]  # by the first row, column or expert of each
        labels = [self.label(*cell) for cell in self.cells]
        longest = 8 + 6 * max(map(len, labels))
        self.step, self.thickness = (CELL_HEIGHT, longest) if self.lines else (max(26, longest), _COLUMN_HEIGHT)
        self.start, self.across = (142, MARGIN + AXIS) if self.lines else (MARGIN + AXIS, 142)
        self.beyond = self.across + self.thickness + BETWEEN  # where shards begin
        self.whole = {
            cell: self.start + place * self.step + cell[0] * _HALF_GAP for place, cell in enumerate(self.cells)
        }
        self.held: dict[tuple[int, int], int] = {}
        end = self.start
        for shard in self.shards:
            for half in range(len(self.words)):
                for first in shard[:: self.unit]:
                    self.held[half, first] = end
                    end += self.step
            end += _RANK_GAP
        self.end = end - _RANK_GAP

    def svg(self) -> str:
        weight = "gate-up weight (w13)" if self.gate_up else "down weight (w2)"
        of = f"{self.experts} experts of a {weight}" if self.dim == "expert" else f"an expert of a {weight}"
        title = f"{len(self.shards)} {'ranks' if len(self.shards) > 1 else 'rank'} by {self.dim}"
        bottom = self.end if self.lines else self.beyond + self.thickness + 14
        right = self.beyond + self.thickness + AXIS if self.lines else self.end
        lines = [
            text(MARGIN, 46, title, size=24, bold=True),
            text(MARGIN, 68, f"{of}, N = {self.rows}, K = {self.k}", fill=GREY),
            *self.ribbons(),
            *self.grid("weight", self.across, self.whole),
            *self.grid("ranks", self.beyond, self.held),
            *self.axes(),
            *self.legend(bottom + 24),
        ]
        height = bottom + 24 + 20 * len(self.shards) + 36
        return page(f"{title}: {of}", max(680, right + MARGIN), height, lines)

    def at(self, along: float, across: float) -> tuple[float, float]:
        """A point of the page."""
        return (across, along) if self.lines else (along, across)

    def rank(self, first: int) -> int:
        return next(rank for rank, shard in enumerate(self.shards) if first in shard)

    def colour(self, half: int, rank: int) -> str:
        """Neighbours are far apart in hue; the up half is darker."""
        return colour(210 + 137.5 * rank, (0.86, 0.74)[half] if len(self.words) == 2 else 0.8, 0.7)

    def label(self, half: int, first: int) -> str:
        if self.dim == "expert":
            return f"expert {first}"
        return f"{self.words[half]} {first}-{first + self.unit - 1}" if self.lines else f"{first // self.unit}"

    def grid(self, name: str, across: int, places: dict[tuple[int, int], int]) -> list[str]:
        lines = [f'<g id="{name}" {LABELS}>']
        for (half, first), along in places.items():
            rank = self.rank(first)
            start = first - self.shards[rank].start
            (x, y), (width, height) = self.at(along, across), self.at(self.step - 1, self.thickness - 1)
            lines.append(
                f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{self.colour(half, rank)}">'
                f"<title>{self.span(half, range(first, first + self.unit))}, on rank {rank} "
                f"{self.span(half, range(start, start + self.unit))}</title></rect>"
                f'<text x="{x + width / 2:g}" y="{y + height / 2 + 3.5:g}">{self.label(half, first)}</text>'
            )
        return [*lines, "</g>"]

    def span(self, half: int, part: range) -> str:
        """Rows of a half, columns or experts in words."""
        if len(part) == 1:
            return f"{self.words[half].removesuffix('s')} {part.start}"
        return f"{self.words[half]} {part.start}-{part.stop - 1}"

    def ribbons(self) -> list[str]:
        """From what each rank holds of each half to where it lies there."""
        paths, names = [], []
        start, end = self.across + self.thickness + 2, self.beyond - (4 if self.lines else 46)
        middle = (start + end) / 2
        for rank, shard in enumerate(self.shards):
            for half in range(len(self.words)):
                first, last = shard[0], shard[-1] // self.unit * self.unit
                (near, far), (to, beyond) = (
                    (places[half, first], places[half, last] + self.step - 1) for places in (self.whole, self.held)
                )
                there = [(near, start), (near, middle), (to, middle), (to, end)]
                back = [(beyond, end), (beyond, middle), (far, middle), (far, start)]
                a, b, c, d, e, f, g, h = (f"{x:g} {y:g}" for x, y in (self.at(*point) for point in there + back))
                paths.append(
                    f'<path d="M{a}C{b} {c} {d}L{e}C{f} {g} {h}z" fill="{self.colour(half, rank)}" fill-opacity="0.5"/>'
                )
                if self.lines:
                    names.append(text(end - 8, (to + beyond) / 2 + 4, self.span(half, shard), anchor="end", bold=True))
        return paths + names

    def axes(self) -> list[str]:
        """Titles, the ranks' names, and the number of each cell's first row, column or expert: in the weight, and on
        its rank."""
        what = self.words[0] if not self.lines or self.dim == "expert" else "rows"
        x, y = self.at(self.start, self.beyond)
        cell = "an expert a cell" if self.dim == "expert" else f"{self.unit} {what} a cell"
        lines = [
            text(MARGIN + AXIS, 105, "The weight", size=15, bold=True),
            text(MARGIN + AXIS, 121, cell, size=10, fill=GREY),
            text(x, y - (37 if self.lines else 28), "On each rank", size=15, bold=True),
        ]
        for (half, first), along in self.whole.items():
            rank = self.rank(first)
            held = half * len(self.shards[rank]) + first - self.shards[rank].start
            number, there = f"{half * self.size + first}", self.held[half, first]
            if self.lines:
                lines.append(text(self.across - 7, along + 10, number, size=9, fill=GREY, anchor="end"))
                lines.append(text(self.beyond + self.thickness + 6, there + 10, f"{held}", size=9, fill=GREY))
            else:
                middle = self.step // 2
                lines.append(text(along + middle, self.across - 7, number, size=9, fill=GREY, anchor="middle"))
                y = self.beyond + self.thickness + 10
                lines.append(text(there + middle, y, f"{held}", size=9, fill=GREY, anchor="middle"))
        for rank, shard in enumerate(self.shards):
            x, y = self.at(self.held[0, shard[0]], self.beyond)
            lines.append(text(x, y - 6, f"rank {rank}", size=11, bold=True))
        return lines

    def legend(self, y: int) -> list[str]:
        lines, x = [], MARGIN + AXIS
        for rank, shard in enumerate(self.shards):
            for half in range(len(self.words)):
                fill = self.colour(half, rank)
                width = 44 // len(self.words)
                lines.append(f'<rect x="{x + half * width}" y="{y}" width="{width}" height="12" fill="{fill}"/>')
            lines.append(text(x + 56, y + 10, f"rank {rank}: {self.size_of(shard)}", fill=GREY))
            y += 20
        whole = "" if self.dim == "expert" else f"Blocks of {BLOCK} stay whole. "
        return [*lines, text(x, y + 12, f"{whole}Bytes are those of codes and scales, without padding.", fill=GREY)]

    def size_of(self, shard: range) -> str:
        """What a rank holds, in words, and its bytes."""
        rows, k, count = self.rows, self.k, 1
        if self.dim == "expert":
            what, count = f"{self.span(0, shard)}, each", len(shard)
        elif self.gate_up:
            what, rows = f"gate and up rows {shard.start}-{shard.stop - 1},", 2 * len(shard)
        else:
            what, k = f"{self.span(0, shard)},", len(shard)
        nbytes = count * rows * (k // 2 + k // BLOCK)
        return f"{what} N = {rows}, K = {k}: {nbytes:,} bytes{'' if self.dim == 'expert' else ' an expert'}"
