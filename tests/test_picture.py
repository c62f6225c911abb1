# SPDX-License-Identifier: MIT
"""Pictures of layouts, read back and judged by the index formula of the layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from expecttest import assert_expected_inline

from shuffled_tensor.picture import MAX_RUNS, picture

SVG = "{http://www.w3.org/2000/svg}"
DOCS = Path(__file__).parents[1] / "docs"
KINDS = ("mxfp4_moe", "mxfp4_separated")


@dataclass(frozen=True)
class Cell:
    run: tuple[str, int, int]
    """Half, row of it, run of K."""
    byte: int
    x: int
    y: int
    colour: str


def cells(svg: str, grid: str) -> list[Cell]:
    """The cells of a grid as an eye meets them: line by line, from left to right."""
    root = ElementTree.fromstring(svg)
    (group,) = (group for group in root.iter(f"{SVG}g") if group.get("id") == grid)
    found = []
    for rect, text in zip(group.iter(f"{SVG}rect"), group.iter(f"{SVG}text"), strict=True):
        title = rect.findtext(f"{SVG}title")
        half, row, run, byte = re.fullmatch(r"([gur])(\d+)·(\d+) at byte (\d+)", title).groups()
        assert text.text == title.split(" ")[0]
        x, y, width, height = (int(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert float(text.get("x")) == x + width / 2  # its middle
        assert y < float(text.get("y")) < y + height
        assert 6 * len(text.text) < width
        found.append(Cell((half, int(row), int(run)), int(byte), x, y, rect.get("fill")))
    return sorted(found, key=lambda cell: (cell.y, cell.x))


def offset(kind: str, rows: int, k: int, gate_up: bool, row: int, run: int) -> int:
    """Where the first byte of a run lies, in closed form."""
    n, width, b = row, k // 2, run * 16
    if kind == "mxfp4_moe" and gate_up:
        gate, i = divmod(row, rows // 2)
        n = 32 * (i // 16) + 16 * gate + i % 16
    return n // 16 * 16 * width + b // 16 * 256 + n % 16 * 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "k", "gate_up"),
    [(64, 256, True), (32, 32, True), (96, 512, True), (64, 256, False), (16, 96, False), (48, 512, False)],
)
def test_cells_lie_where_the_formula_says(kind: str, rows: int, k: int, gate_up: bool) -> None:
    svg = picture(kind, rows, k, gate_up=gate_up)
    runs, half = k // 32, rows // 2 if gate_up else rows
    keys = [("gu"[row // half] if gate_up else "r", row % half, run) for row in range(rows) for run in range(runs)]
    offsets = [offset(kind, rows, k, gate_up, row, run) for row in range(rows) for run in range(runs)]

    before, after = cells(svg, "row-major"), cells(svg, "memory")
    assert [cell.run for cell in before] == keys
    assert {cell.run: cell.byte for cell in after} == dict(zip(keys, offsets, strict=True))
    for grid in (before, after):
        assert [cell.byte for cell in grid] == list(range(0, rows * k // 2, 16))
        assert len({cell.x for cell in grid}) == runs
        assert len({cell.y for cell in grid}) == rows
    assert {cell.run: cell.colour for cell in before} == {cell.run: cell.colour for cell in after}


def test_separated_halves_that_share_a_tile() -> None:
    after = cells(picture("mxfp4_separated", 48, 64), "memory")
    assert {cell.byte for cell in after} == set(range(0, 48 * 32, 16))
    for cell in after:
        half, row, run = cell.run
        assert cell.byte == offset("mxfp4_separated", 48, 64, True, row + 24 * (half == "u"), run)


def test_kind_none_is_row_major_twice() -> None:
    svg = picture("none", 6, 64)
    before, after = cells(svg, "row-major"), cells(svg, "memory")
    assert [(cell.run, cell.byte) for cell in before] == [(cell.run, cell.byte) for cell in after]


def test_blocks_are_named_in_the_order_of_memory() -> None:
    names = {kind: re.findall(r">((?:gate|up|rows) \d+-\d+)<", picture(kind, 64, 256)) for kind in KINDS}
    assert names["mxfp4_moe"] == ["gate 0-15", "up 0-15", "gate 16-31", "up 16-31"]
    assert names["mxfp4_separated"] == ["gate 0-15", "gate 16-31", "up 0-15", "up 16-31"]


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def contrast_with_black(colour: str) -> float:
    """As WCAG defines it."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb(colour))
    return (sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05) / 0.05


@pytest.mark.parametrize("gate_up", [True, False])
def test_colours(gate_up: bool) -> None:
    grid = cells(picture("mxfp4_moe", 128, 32, gate_up=gate_up), "row-major")
    assert len({cell.colour for cell in grid}) == 128  # no two rows look alike
    for cell in grid:
        red, green, blue = rgb(cell.colour)
        assert max(red, green, blue) == {"g": blue, "u": red, "r": green}[cell.run[0]]
        assert contrast_with_black(cell.colour) > 4.5


def test_a_background_is_drawn_first() -> None:
    root = ElementTree.fromstring(picture("mxfp4_moe", 32, 32))
    shape = next(element for element in root if element.tag != f"{SVG}title")
    assert (shape.tag, shape.get("width"), shape.get("height")) == (f"{SVG}rect", "100%", "100%")
    assert shape.get("fill") == "#ffffff"


@pytest.mark.parametrize("kind", KINDS)
def test_committed_pictures_are_up_to_date(kind: str) -> None:
    """To write them anew: (DOCS / f"{kind}.svg").write_text(picture(kind, 64, 256), encoding="utf-8")"""
    svg = picture(kind, 64, 256)
    assert svg == picture(kind, 64, 256)
    assert (DOCS / f"{kind}.svg").read_text(encoding="utf-8") == svg


def test_errors() -> None:
    cases: dict[str, Callable[[], object]] = {
        "kind": lambda: picture("mxfp4", 64, 256),
        "rows": lambda: picture("mxfp4_moe", 48, 256),
        "rows of a down weight": lambda: picture("mxfp4_moe", 24, 256, gate_up=False),
        "columns": lambda: picture("mxfp4_separated", 64, 48),
        "an odd column": lambda: picture("mxfp4_separated", 64, 65),
        "columns, not shuffled": lambda: picture("none", 3, 16, gate_up=False),
        "odd rows, not shuffled": lambda: picture("none", 3, 32),
        "no rows": lambda: picture("mxfp4_moe", 0, 256),
        "negative sizes": lambda: picture("mxfp4_moe", -32, -256),
        "too many runs": lambda: picture("mxfp4_moe", 4096, 4096),
    }
    lines = []
    for name, call in cases.items():
        with pytest.raises(ValueError, match="N=|K=|kind") as error:
            call()
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
kind: unknown shuffle_kind 'mxfp4'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
rows: N=48 rows are not a multiple of 32, which qdata in 'mxfp4_moe' needs: pad gate and up from 24 to 32 rows each, with bytes of 0
rows of a down weight: N=24 rows are not a multiple of 16, which qdata in 'mxfp4_moe' needs: pad to 32 rows, with bytes of 0
columns: K=48 columns are not a multiple of 32, which qdata in 'mxfp4_separated' needs: pad to K=64, with bytes of 0
an odd column: a picture shows whole runs of 32 codes, found K=65
columns, not shuffled: a picture shows whole runs of 32 codes, found K=16
odd rows, not shuffled: gate and up have as many rows each, found N=3
no rows: a picture needs rows and columns, found N=0, K=256
negative sizes: a picture needs rows and columns, found N=-32, K=-256
too many runs: a picture shows at most 2048 runs of 32 codes; N=4096, K=4096 are 524288""",
    )


def test_the_largest_picture() -> None:
    assert len(cells(picture("mxfp4_moe", MAX_RUNS // 4, 128), "memory")) == MAX_RUNS
