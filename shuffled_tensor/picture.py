# SPDX-License-Identifier: MIT
"""A picture of a layout: where each run of 16 bytes of a small weight lands."""

from __future__ import annotations

from colorsys import hls_to_rgb

import torch

from shuffled_tensor.layouts import find_layout, shuffle_weight

__all__ = ["MAX_RUNS", "picture"]

MAX_RUNS = 2048
"""The runs that a picture shows at most."""

_CODES = 32  # of a run: 16 bytes of two
_BLOCK = 16  # rows that are tiled together; in memory they are as many lines

_HALVES = {"g": "gate", "u": "up", "r": "rows"}
_HUES = {"g": (224, 196), "u": (38, 14), "r": (170, 130)}  # of a half's first and last block

_INK, _GREY, _PAPER = "#1f2328", "#59636e", "#ffffff"
_MARGIN, _AXIS, _BETWEEN, _GAP, _CELL_HEIGHT = 28, 38, 128, 8, 14  # pixels


def picture(shuffle_kind: str, rows: int, k: int, *, gate_up: bool = True) -> str:
    """An SVG of a small weight, row-major and as it lies in memory as ``shuffle_kind``.

    A cell is a run of 16 bytes, which no layout splits: it has one colour and one label in both grids, and a tooltip
    with its offset. Where it lands is read off what :func:`shuffle_weight` does to runs that hold their own number.

    Args:
        shuffle_kind: the name of a layout.
        rows: N; gate rows then up rows when ``gate_up``.
        k: K, the logical columns, a multiple of 32.
        gate_up: whether the rows are two stacked halves, gate and up (w13), or one (w2).

    Raises:
        ValueError: an unknown layout, sizes that do not tile, or more than :data:`MAX_RUNS` runs.
    """
    find_layout(shuffle_kind)
    return _Drawing(shuffle_kind, rows, k // _CODES, gate_up, _runs_in_memory(shuffle_kind, rows, k, gate_up)).svg()


def _runs_in_memory(shuffle_kind: str, rows: int, k: int, gate_up: bool) -> list[int]:
    """The runs' row-major numbers, in the order of memory."""
    if rows < 1 or k < 1:
        raise ValueError(f"a picture needs rows and columns, found N={rows}, K={k}")
    if rows * k > MAX_RUNS * _CODES:
        raise ValueError(
            f"a picture shows at most {MAX_RUNS} runs of {_CODES} codes; N={rows}, K={k} are {rows * k / _CODES:g}"
        )
    numbers = torch.arange(MAX_RUNS).repeat_interleave(2).view(torch.uint8)  # each fills 16 bytes
    shuffled = shuffle_weight(numbers[: rows * (k // 2)].view(rows, k // 2), shuffle_kind, gate_up=gate_up)
    if k % _CODES:
        raise ValueError(f"a picture shows whole runs of {_CODES} codes, found K={k}")
    if gate_up and rows % 2:
        raise ValueError(f"gate and up have as many rows each, found N={rows}")
    runs: list[int] = shuffled.view(torch.int64).flatten()[::2].tolist()
    return runs


class _Drawing:
    def __init__(self, shuffle_kind: str, rows: int, columns: int, gate_up: bool, memory: list[int]) -> None:
        self.shuffle_kind, self.rows, self.columns, self.gate_up, self.memory = (
            shuffle_kind,
            rows,
            columns,
            gate_up,
            memory,
        )
        self.half = rows // 2 if gate_up else rows
        self.cell_width = 8 + 6 * len(self.label(len(memory) - 1))
        self.grid_width = columns * self.cell_width
        self.left = _MARGIN + _AXIS
        self.right = self.left + self.grid_width + _BETWEEN
        self.width = max(520, self.right + self.grid_width + _AXIS + _MARGIN)
        self.top = 142
        self.bottom = self.y(rows - 1) + _CELL_HEIGHT
        self.height = self.bottom + 98

    def svg(self) -> str:
        weight = "gate-up weight (w13)" if self.gate_up else "down weight (w2)"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="system-ui, sans-serif">',
            f"<title>{self.shuffle_kind}: where each 16-byte run of a {weight} lands</title>",
            f'<rect width="100%" height="100%" rx="8" fill="{_PAPER}"/>',
            _text(_MARGIN, 46, self.shuffle_kind, size=24, bold=True),
            _text(_MARGIN, 68, f"{weight}, N = {self.rows}, K = {self.columns * _CODES}", fill=_GREY),
            *self.ribbons(),
            *self.grid("row-major", self.left, list(range(len(self.memory)))),
            *self.grid("memory", self.right, self.memory),
            *self.axes(),
            *self.legend(),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def y(self, line: int) -> int:
        return self.top + line * _CELL_HEIGHT + line // _BLOCK * _GAP

    def place(self, row: int) -> tuple[str, int]:
        """The half that a row is in, and its number there."""
        return ("gu"[row // self.half] if self.gate_up else "r"), row % self.half

    def label(self, run: int) -> str:
        half, i = self.place(run // self.columns)
        return f"{half}{i}·{run % self.columns}"

    def colour(self, row: int) -> str:
        """Hue by half and block, from light to dark by the row in the block."""
        half, i = self.place(row)
        first, last = _HUES[half]
        hue = first + (last - first) * (i // _BLOCK) / max(1, (self.half - 1) // _BLOCK)
        rgb = hls_to_rgb(hue / 360, 0.92 - 0.28 * (i % _BLOCK) / (_BLOCK - 1), 0.88)
        return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)

    def grid(self, name: str, x: int, runs: list[int]) -> list[str]:
        lines = [f'<g id="{name}" font-family="ui-monospace, monospace" font-size="10" text-anchor="middle">']
        for position, run in enumerate(runs):
            line, column = divmod(position, self.columns)
            left, top, label = x + column * self.cell_width, self.y(line), self.label(run)
            lines.append(
                f'<rect x="{left}" y="{top}" width="{self.cell_width - 1}" height="{_CELL_HEIGHT - 1}" '
                f'fill="{self.colour(run // self.columns)}"><title>{label} at byte {position * 16}</title></rect>'
                f'<text x="{left + self.cell_width / 2 - 0.5:g}" y="{top + 10}">{label}</text>'
            )
        first = set(self.memory[:_BLOCK])
        cells = {divmod(position, self.columns) for position, run in enumerate(runs) if run in first}
        return [*lines, self.outline(x, cells), "</g>"]

    def outline(self, x: int, cells: set[tuple[int, int]]) -> str:
        """A line around cells, each a line and a column of a grid."""
        edges = ""
        for line, column in sorted(cells):
            left, top = x + column * self.cell_width - 0.5, self.y(line) - 0.5
            right, bottom = left + self.cell_width, top + _CELL_HEIGHT
            for neighbour, edge in (
                ((line - 1, column), f"M{left} {top}H{right}"),
                ((line + 1, column), f"M{left} {bottom}H{right}"),
                ((line, column - 1), f"M{left} {top}V{bottom}"),
                ((line, column + 1), f"M{right} {top}V{bottom}"),
            ):
                edges += "" if neighbour in cells else edge
        return f'<path d="{edges}" fill="none" stroke="{_INK}" stroke-width="2" stroke-linecap="square"/>'

    def ribbons(self) -> list[str]:
        """From each block of rows to its lines in memory."""
        paths, names = [], []
        x, end = self.left + self.grid_width + 3, self.right - 4
        middle = (x + end) // 2
        for line in range(0, self.rows, _BLOCK):
            size = min(_BLOCK, self.rows - line)
            row = self.memory[line * self.columns] // self.columns
            y, to, depth = self.y(row), self.y(line), size * _CELL_HEIGHT - 1
            paths.append(
                f'<path d="M{x} {y}C{middle} {y} {middle} {to} {end} {to}v{depth}'
                f'C{middle} {to + depth} {middle} {y + depth} {x} {y + depth}z" '
                f'fill="{self.colour(row + size // 2)}" fill-opacity="0.4"/>'
            )
            (half, first), (other, last) = self.place(row), self.place(row + size - 1)
            name = f"{_HALVES[half]} {first}-{last}" if half == other else f"{half}{first}-{other}{last}"
            names.append(_text(end - 8, to + depth // 2 + 4, name, anchor="end", bold=True))
        return paths + names

    def axes(self) -> list[str]:
        row_x, byte_x = self.left - 7, self.right + self.grid_width + 6
        lines = [
            _text(self.left, self.top - 37, "Row-major", size=15, bold=True),
            _text(self.left, self.top - 21, "16-byte runs of K", size=10, fill=_GREY),
            _text(row_x, self.top - 7, "row", size=10, fill=_GREY, anchor="end"),
            _text(self.right, self.top - 37, "In memory", size=15, bold=True),
            _text(self.right, self.top - 21, "line by line", size=10, fill=_GREY),
            _text(byte_x, self.top - 7, "byte", size=10, fill=_GREY),
        ]
        for column in range(self.columns):
            middle = column * self.cell_width + self.cell_width // 2
            lines.append(_text(self.left + middle, self.top - 7, f"{column}", size=9, fill=_GREY, anchor="middle"))
            lines.append(
                _text(self.right + middle, self.top - 7, f"+{column * 16}", size=9, fill=_GREY, anchor="middle")
            )
        for line in range(self.rows):
            y = self.y(line) + 10
            lines.append(_text(row_x, y, f"{line}", size=9, fill=_GREY, anchor="end"))
            lines.append(_text(byte_x, y, f"{line * self.columns * 16}", size=9, fill=_GREY))
        return lines

    def legend(self) -> list[str]:
        lines, x, y = [], self.left, self.bottom + 24
        for start in range(0, self.rows, self.half):
            for i in sorted({*range(self.half)[:_BLOCK], *range(self.half)[-_BLOCK:]}):
                lines.append(f'<rect x="{x}" y="{y}" width="4" height="12" fill="{self.colour(start + i)}"/>')
                x += 4
            lines.append(_text(x + 6, y + 10, _HALVES[self.place(start)[0]], fill=_GREY))
            x += 54
        (half, i), column = self.place(self.rows - 1), self.columns - 1
        row = f"{_HALVES[half]} row {i}" if self.gate_up else f"row {i}"
        first = 16 * min(_BLOCK, len(self.memory))
        x = self.left
        return [
            *lines,
            f'<rect x="{x + 1}" y="{y + 23}" width="42" height="12" fill="none" stroke="{_INK}" stroke-width="2"/>',
            _text(x + 56, y + 33, f"the first {first} bytes of memory", fill=_GREY),
            _text(x, y + 56, f"{half}{i}·{column}", fill=_INK, bold=True),
            _text(x + 56, y + 56, f"{row}, run {column} of K: 16 bytes, 32 fp4 codes", fill=_GREY),
        ]


def _text(
    x: int, y: int, text: str, *, size: int = 12, fill: str = _INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{text}</text>'
