# SPDX-License-Identifier: MIT
"""A picture of a layout: where the codes, or the scales, of a small weight land."""

from __future__ import annotations

import torch

from shuffled_tensor.drawing import AXIS, BETWEEN, CELL_HEIGHT, GREY, INK, LABELS, MARGIN, MAX_CELLS, colour, page, text
from shuffled_tensor.layouts import check_gate_up, find_layout, shuffle_scale, shuffle_weight
from shuffled_tensor.mxfp4 import BLOCK, CODES, PARTS, SCALES, Part

__all__ = ["MAX_CELLS", "picture"]

_BLOCK = 16  # rows that are drawn as one

_SHUFFLE = {CODES: shuffle_weight, SCALES: shuffle_scale}
_CELL = {  # what one is, and how many of them at the beginning of memory are outlined
    CODES: ("run", "16 bytes, 32 fp4 codes", 16),
    SCALES: ("scale", "one byte, for 32 fp4 codes", 4),
}

_HALVES = {"g": "gate", "u": "up", "r": "rows"}
_HUES = {"g": (224, 196), "u": (38, 14), "r": (170, 130)}  # of a half's first and last block

_PAD = "url(#pad)"
_FADED = f' fill="{GREY}"'
_GAP = 8  # pixels between blocks

_HATCHING = (
    '<defs><pattern id="pad" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" fill="#f3f4f6"/><rect width="1.5" height="5" fill="#c4c9d0"/></pattern></defs>'
)


def picture(
    shuffle_kind: str,
    rows: int,
    k: int,
    *,
    gate_up: bool = True,
    part: str = "qdata",
    logical: tuple[int, int] | None = None,
) -> str:
    """An SVG of a small weight, row-major and as it lies in memory as ``shuffle_kind``.

    A cell is 32 columns of a row: a run of 16 bytes of codes, which no layout splits, or one byte of scales. It has one
    colour and one label in both grids, and a tooltip with its offset. Where it lands is read off what
    :func:`shuffle_weight` or :func:`shuffle_scale` does to cells that hold their own number.

    Args:
        shuffle_kind: the name of a layout.
        rows: N; gate rows then up rows when ``gate_up``.
        k: K, the columns, a multiple of 32.
        gate_up: whether the rows are two stacked halves, gate and up (w13), or one (w2).
        part: ``"qdata"`` for the codes, or ``"scale"``.
        logical: the N and K of the weight, where ``rows`` and ``k`` are those with its padding: pads are hatched.

    Raises:
        TypeError: a ``gate_up`` that is neither True nor False.
        ValueError: an unknown layout or part, sizes that do not tile, or more than :data:`MAX_CELLS` cells.
    """
    find_layout(shuffle_kind)
    check_gate_up(gate_up)
    found = next((known for known in PARTS if known.name == part), None)
    if found is None:
        raise ValueError(f"part must be 'qdata' or 'scale', found {part!r}")
    memory = _cells_in_memory(shuffle_kind, rows, k, gate_up, found)
    n, columns = logical or (rows, k)
    if not (0 < n <= rows and 0 < columns <= k) or columns % BLOCK or (gate_up and n % 2):
        raise ValueError(
            f"logical sizes are at most N={rows}, K={k}, in whole blocks of {BLOCK} columns"
            f"{' and as many gate as up rows' if gate_up else ''}; found N={n}, K={columns}"
        )
    return _Drawing(shuffle_kind, found, rows, k // BLOCK, gate_up, (n, columns // BLOCK), memory).svg()


def _cells_in_memory(shuffle_kind: str, rows: int, k: int, gate_up: bool, part: Part) -> list[int]:
    """The cells' row-major numbers, in the order of memory."""
    if rows < 1 or k < 1:
        raise ValueError(f"a picture needs rows and columns, found N={rows}, K={k}")
    if rows * k > MAX_CELLS * BLOCK:
        raise ValueError(
            f"a picture shows at most {MAX_CELLS} cells of {BLOCK} columns; N={rows}, K={k} are {rows * k / BLOCK:g}"
        )
    numbers = torch.arange(MAX_CELLS, device="cpu").repeat_interleave(part.element.itemsize)[
        : rows * (k // part.per_byte)
    ]
    low, high = (  # bytes of the numbers: they go the same way
        _SHUFFLE[part](digit.to(torch.uint8).view(rows, -1), shuffle_kind, gate_up=gate_up).flatten().long()
        for digit in (numbers % 256, numbers // 256)
    )
    if k % BLOCK:
        raise ValueError(f"a picture shows whole cells of {BLOCK} columns, found K={k}")
    if gate_up and rows % 2:
        raise ValueError(f"gate and up have as many rows each, found N={rows}")
    cells: list[int] = (low + 256 * high)[:: part.element.itemsize].tolist()
    return cells


class _Drawing:
    def __init__(
        self,
        shuffle_kind: str,
        part: Part,
        rows: int,
        columns: int,
        gate_up: bool,
        logical: tuple[int, int],
        memory: list[int],
    ) -> None:
        self.shuffle_kind, self.part, self.rows, self.columns, self.gate_up = shuffle_kind, part, rows, columns, gate_up
        self.logical, self.memory = logical, memory
        self.padded = logical != (rows, columns)
        self.unit, self.unit_is, self.outlined = _CELL[part]
        self.nbytes = part.element.itemsize  # of a cell
        self.half = rows // 2 if gate_up else rows
        self.cell_width = 8 + 6 * len(self.label(len(memory) - 1))
        self.grid_width = columns * self.cell_width
        self.left = MARGIN + AXIS
        self.right = self.left + self.grid_width + BETWEEN
        self.width = max(520, self.right + self.grid_width + AXIS + MARGIN)
        self.top = 142
        self.bottom = self.y(rows - 1) + CELL_HEIGHT
        self.height = self.bottom + (120 if self.padded else 98)

    def svg(self) -> str:
        weight = "gate-up weight (w13)" if self.gate_up else "down weight (w2)"
        which = f"{'codes' if self.part is CODES else 'scales'} of a {weight}"
        n, k = self.logical[0], self.logical[1] * BLOCK
        padding = f", padded to {self.rows} and {self.columns * BLOCK}" if self.padded else ""
        lines = [
            text(MARGIN, 46, self.shuffle_kind, size=24, bold=True),
            text(MARGIN, 68, f"{which}, N = {n}, K = {k}{padding}", fill=GREY),
            *self.ribbons(),
            *self.grid("row-major", self.left, list(range(len(self.memory)))),
            *self.grid("memory", self.right, self.memory),
            *self.axes(),
            *self.legend(),
        ]
        title = f"{self.shuffle_kind}: where the {which} land"
        return page(title, self.width, self.height, lines, _HATCHING if self.padded else "")

    def y(self, line: int) -> int:
        return self.top + line * CELL_HEIGHT + line // _BLOCK * _GAP

    def place(self, row: int) -> tuple[str, int]:
        """The half that a row is in, and its number there."""
        return ("gu"[row // self.half] if self.gate_up else "r"), row % self.half

    def label(self, cell: int) -> str:
        half, i = self.place(cell // self.columns)
        return f"{half}{i}·{cell % self.columns}"

    def is_pad(self, cell: int) -> bool:
        each = self.logical[0] // 2 if self.gate_up else self.logical[0]
        return self.place(cell // self.columns)[1] >= each or cell % self.columns >= self.logical[1]

    def colour(self, row: int) -> str:
        """Hue by half and block, from light to dark by the row in the block."""
        half, i = self.place(row)
        first, last = _HUES[half]
        hue = first + (last - first) * (i // _BLOCK) / max(1, (self.half - 1) // _BLOCK)
        return colour(hue, 0.92 - 0.28 * (i % _BLOCK) / (_BLOCK - 1))

    def grid(self, name: str, x: int, cells: list[int]) -> list[str]:
        lines = [f'<g id="{name}" {LABELS}>']
        for position, cell in enumerate(cells):
            line, column = divmod(position, self.columns)
            left, top, label, pad = x + column * self.cell_width, self.y(line), self.label(cell), self.is_pad(cell)
            lines.append(
                f'<rect x="{left}" y="{top}" width="{self.cell_width - 1}" height="{CELL_HEIGHT - 1}" '
                f'fill="{_PAD if pad else self.colour(cell // self.columns)}">'
                f"<title>{label} at byte {position * self.nbytes}{', a pad' if pad else ''}</title></rect>"
                f'<text x="{left + self.cell_width / 2 - 0.5:g}" y="{top + 10}"'
                f"{_FADED if pad else ''}>{label}</text>"
            )
        first = set(self.memory[: self.outlined])
        outlined = {divmod(position, self.columns) for position, cell in enumerate(cells) if cell in first}
        return [*lines, self.outline(x, outlined), "</g>"]

    def outline(self, x: int, cells: set[tuple[int, int]]) -> str:
        """A line around cells, each a line and a column of a grid."""
        edges = ""
        for line, column in sorted(cells):
            left, top = x + column * self.cell_width - 0.5, self.y(line) - 0.5
            right, bottom = left + self.cell_width, top + CELL_HEIGHT
            for neighbour, edge in (
                ((line - 1, column), f"M{left} {top}H{right}"),
                ((line + 1, column), f"M{left} {bottom}H{right}"),
                ((line, column - 1), f"M{left} {top}V{bottom}"),
                ((line, column + 1), f"M{right} {top}V{bottom}"),
            ):
                edges += "" if neighbour in cells else edge
        return f'<path d="{edges}" fill="none" stroke="{INK}" stroke-width="2" stroke-linecap="square"/>'

    def ribbons(self) -> list[str]:
        """From each block of rows to its lines in memory, in their order."""
        lines: dict[int, set[int]] = {}
        for position, cell in enumerate(self.memory):
            lines.setdefault(cell // self.columns // _BLOCK, set()).add(position // self.columns)
        paths, names = [], []
        x, end = self.left + self.grid_width + 3, self.right - 4
        middle = (x + end) // 2
        named = 0  # lines whose blocks have names
        for block, own in sorted(lines.items(), key=lambda item: (min(item[1]), item[0])):
            row, size = block * _BLOCK, min(_BLOCK, self.rows - block * _BLOCK)
            y, bottom = self.y(row), self.y(row + size - 1) + CELL_HEIGHT - 1
            to, end_y = self.y(min(own)), self.y(max(own)) + CELL_HEIGHT - 1
            paths.append(
                f'<path d="M{x} {y}C{middle} {y} {middle} {to} {end} {to}V{end_y}'
                f'C{middle} {end_y} {middle} {bottom} {x} {bottom}z" '
                f'fill="{self.colour(row + size // 2)}" fill-opacity="0.4"/>'
            )
            (half, first), (other, last) = self.place(row), self.place(row + size - 1)
            name = f"{_HALVES[half]} {first}-{last}" if half == other else f"{half}{first}-{other}{last}"
            # blocks that share lines have their names side by side, half way down lines of their own
            named = max(named, min(own))
            names.append(text(end - 8, self.y(named) + size * CELL_HEIGHT // 2 + 4, name, anchor="end", bold=True))
            named += size
        return paths + names

    def axes(self) -> list[str]:
        row_x, byte_x = self.left - 7, self.right + self.grid_width + 6
        lines = [
            text(self.left, self.top - 37, "Row-major", size=15, bold=True),
            text(
                self.left,
                self.top - 21,
                f"{'16-byte runs' if self.part is CODES else 'scales'} along K",
                size=10,
                fill=GREY,
            ),
            text(row_x, self.top - 7, "row", size=10, fill=GREY, anchor="end"),
            text(self.right, self.top - 37, "In memory", size=15, bold=True),
            text(self.right, self.top - 21, "line by line", size=10, fill=GREY),
            text(byte_x, self.top - 7, "byte", size=10, fill=GREY),
        ]
        for column in range(self.columns):
            middle = column * self.cell_width + self.cell_width // 2
            lines.append(text(self.left + middle, self.top - 7, f"{column}", size=9, fill=GREY, anchor="middle"))
            lines.append(
                text(self.right + middle, self.top - 7, f"+{column * self.nbytes}", size=9, fill=GREY, anchor="middle")
            )
        for line in range(self.rows):
            y = self.y(line) + 10
            lines.append(text(row_x, y, f"{line}", size=9, fill=GREY, anchor="end"))
            lines.append(text(byte_x, y, f"{line * self.columns * self.nbytes}", size=9, fill=GREY))
        return lines

    def legend(self) -> list[str]:
        lines, x, y = [], self.left, self.bottom + 24
        for start in range(0, self.rows, self.half):
            for i in sorted({*range(self.half)[:_BLOCK], *range(self.half)[-_BLOCK:]}):
                lines.append(f'<rect x="{x}" y="{y}" width="4" height="12" fill="{self.colour(start + i)}"/>')
                x += 4
            lines.append(text(x + 6, y + 10, _HALVES[self.place(start)[0]], fill=GREY))
            x += 54
        each = self.half - (self.rows - self.logical[0]) // (2 if self.gate_up else 1)
        (half, i), column = self.place(self.rows - self.half + each - 1), self.logical[1] - 1
        row = f"{_HALVES[half]} row {i}" if self.gate_up else f"row {i}"
        first = self.nbytes * min(self.outlined, len(self.memory))
        x = self.left
        return [
            *lines,
            f'<rect x="{x + 1}" y="{y + 23}" width="42" height="12" fill="none" stroke="{INK}" stroke-width="2"/>',
            text(x + 56, y + 33, f"the first {first} bytes of memory", fill=GREY),
            text(x, y + 56, f"{half}{i}·{column}", fill=INK, bold=True),
            text(x + 56, y + 56, f"{row}, {self.unit} {column} of K: {self.unit_is}", fill=GREY),
            *(self.pad_legend(x, y + 68) if self.padded else []),
        ]

    def pad_legend(self, x: int, y: int) -> list[str]:
        return [
            f'<rect x="{x}" y="{y}" width="44" height="13" fill="{_PAD}"/>',
            text(x + 56, y + 10, f"padding: bytes of {self.part.pad}", fill=GREY),
        ]
