# SPDX-License-Identifier: MIT
"""Pictures of layouts, read back and judged by the index formula of the layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from expecttest import assert_expected_inline

from shuffled_tensor.drawing import png
from shuffled_tensor.picture import MAX_CELLS, picture
from shuffled_tensor.rank_picture import rank_picture

from .support.judges import order_by_formula
from .support.png import pixels

SVG = "{http://www.w3.org/2000/svg}"
DOCS = Path(__file__).parents[1] / "docs"
KINDS = ("mxfp4_moe", "mxfp4_separated")
BYTES = {"qdata": 16, "scale": 1}
"""Of a cell."""
PADDED = (64, 256), (40, 160)
"""Sizes of the committed pictures of padding: those laid out, and the logical ones."""


@dataclass(frozen=True)
class Cell:
    cell: tuple[str, int, int]
    """Half, row of it, place along K."""
    byte: int
    x: int
    y: int
    colour: str
    pad: bool


def cells(svg: str, grid: str) -> list[Cell]:
    """The cells of a grid as an eye meets them: line by line, from left to right."""
    root = ElementTree.fromstring(svg)
    (group,) = (group for group in root.iter(f"{SVG}g") if group.get("id") == grid)
    found = []
    for rect, text in zip(group.iter(f"{SVG}rect"), group.iter(f"{SVG}text"), strict=True):
        title = rect.findtext(f"{SVG}title")
        half, row, run, byte, pad = re.fullmatch(r"([gur])(\d+)·(\d+) at byte (\d+)(, a pad)?", title).groups()
        assert text.text == title.split(" ")[0]
        x, y, width, height = (int(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert float(text.get("x")) == x + width / 2  # its middle
        assert y < float(text.get("y")) < y + height
        assert 6 * len(text.text) < width
        found.append(Cell((half, int(row), int(run)), int(byte), x, y, rect.get("fill"), bool(pad)))
    return sorted(found, key=lambda cell: (cell.y, cell.x))


def in_order(kind: str, rows: int, k: int, gate_up: bool, part: str) -> list[tuple[str, int, int]]:
    """The cells in the order of memory, by the layouts' index formulas."""
    nbytes, half = BYTES[part], rows // 2 if gate_up else rows
    order = order_by_formula({"qdata": "weight"}.get(part, part), rows, k // 32 * nbytes, kind, gate_up)
    numbers = [divmod(byte // nbytes, k // 32) for byte in order[::nbytes].tolist()]
    return [("gu"[row // half] if gate_up else "r", row % half, run) for row, run in numbers]


@pytest.mark.parametrize("part", BYTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "k", "gate_up"),
    [(64, 256, True), (128, 512, True), (64, 256, False), (32, 768, False), (96, 512, False)],
)
def test_cells_lie_where_the_formula_says(kind: str, part: str, rows: int, k: int, gate_up: bool) -> None:
    svg = picture(kind, rows, k, gate_up=gate_up, part=part)
    before, after = cells(svg, "row-major"), cells(svg, "memory")
    in_memory = in_order(kind, rows, k, gate_up, part)
    assert [cell.cell for cell in after] == in_memory
    assert [cell.cell for cell in before] == sorted(in_memory)  # gate, then up, row by row
    for grid in (before, after):
        assert [cell.byte for cell in grid] == list(range(0, len(in_memory) * BYTES[part], BYTES[part]))
        assert len({cell.x for cell in grid}) == k // 32
        assert len({cell.y for cell in grid}) == rows
    assert {cell.cell: cell.colour for cell in before} == {cell.cell: cell.colour for cell in after}


@pytest.mark.parametrize(
    ("kind", "rows", "k", "gate_up"),
    [("mxfp4_moe", 32, 32, True), ("mxfp4_separated", 48, 64, True), ("mxfp4_moe", 16, 96, False)],
)
def test_codes_tile_in_smaller_sizes(kind: str, rows: int, k: int, gate_up: bool) -> None:
    """Of the second one, halves of 24 rows share a tile of 16."""
    found = [cell.cell for cell in cells(picture(kind, rows, k, gate_up=gate_up), "memory")]
    assert found == in_order(kind, rows, k, gate_up, "qdata")


@pytest.mark.parametrize("part", BYTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("gate_up", "logical"), [(True, (40, 160)), (True, (64, 32)), (True, (2, 256)), (False, (33, 224))]
)
def test_pads_are_hatched_wherever_they_land(kind: str, part: str, gate_up: bool, logical: tuple[int, int]) -> None:
    svg = picture(kind, 64, 256, gate_up=gate_up, part=part, logical=logical)
    rows, columns = logical[0] // 2 if gate_up else logical[0], logical[1] // 32
    for grid in ("row-major", "memory"):
        found = cells(svg, grid)
        for cell in found:
            _, row, run = cell.cell
            assert cell.pad == (row >= rows or run >= columns), cell
            assert cell.pad == (cell.colour == "url(#pad)")
        assert sum(not cell.pad for cell in found) == logical[0] * columns
    assert [cell.cell for cell in cells(svg, "memory")] == in_order(kind, 64, 256, gate_up, part)
    assert re.findall(r"padding: bytes of (\d+)", svg) == [{"qdata": "0", "scale": "127"}[part]]
    assert f"N = {logical[0]}, K = {logical[1]}, padded to 64 and 256<" in svg


def test_without_pads_nothing_is_hatched() -> None:
    svg = picture("mxfp4_moe", 64, 256)
    assert svg == picture("mxfp4_moe", 64, 256, logical=(64, 256))
    assert "pad" not in svg


@pytest.mark.parametrize(("part", "size"), [("qdata", 256), ("scale", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_first_in_memory_is_outlined_in_both_grids(kind: str, part: str, size: int) -> None:
    svg = picture(kind, 64, 256, part=part)
    assert f"the first {size} bytes of memory" in svg
    first = set(in_order(kind, 64, 256, True, part)[: size // BYTES[part]])
    for grid in ("row-major", "memory"):
        (group,) = (group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("id") == grid)
        upright = [
            (float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)V", group.find(f"{SVG}path").get("d"))
        ]
        inside = {
            cell.cell
            for cell in cells(svg, grid)
            if sum(y == cell.y - 0.5 and x < cell.x for x, y in upright) % 2  # crossed an edge, and not yet another
        }
        assert inside == first


def test_kind_none_is_row_major_twice() -> None:
    svg = picture("none", 6, 64)
    before, after = cells(svg, "row-major"), cells(svg, "memory")
    assert [(cell.cell, cell.byte) for cell in before] == [(cell.cell, cell.byte) for cell in after]


def test_blocks_are_named_in_the_order_of_memory() -> None:
    def names(kind: str, part: str) -> list[str]:
        return re.findall(r">((?:gate|up|rows) \d+-\d+)<", picture(kind, 64, 256, part=part))

    assert (
        names("mxfp4_moe", "qdata") == names("mxfp4_moe", "scale") == ["gate 0-15", "up 0-15", "gate 16-31", "up 16-31"]
    )
    assert (
        names("mxfp4_separated", "qdata")
        == names("mxfp4_separated", "scale")
        == ["gate 0-15", "gate 16-31", "up 0-15", "up 16-31"]
    )


@pytest.mark.parametrize("part", BYTES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_blocks_do_not_cover_each_other(kind: str, part: str) -> None:
    texts = ElementTree.fromstring(picture(kind, 128, 256, part=part)).iter(f"{SVG}text")
    heights = [int(text.get("y")) for text in texts if re.fullmatch(r"(gate|up) \d+-\d+", text.text)]
    assert len(heights) == 8
    assert all(after - before >= 14 for before, after in pairwise(heights))


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
        assert max(red, green, blue) == {"g": blue, "u": red, "r": green}[cell.cell[0]]
        assert contrast_with_black(cell.colour) > 4.5


def test_a_background_is_drawn_first() -> None:
    root = ElementTree.fromstring(picture("mxfp4_moe", 32, 32))
    shape = next(element for element in root if element.tag not in (f"{SVG}title", f"{SVG}defs"))
    assert (shape.tag, shape.get("width"), shape.get("height")) == (f"{SVG}rect", "100%", "100%")
    assert shape.get("fill") == "#ffffff"


def committed() -> dict[str, str]:
    """The pictures of docs/, by file. To write them anew: python -m tests.test_picture"""
    sizes, logical = PADDED
    found = {}
    for kind in KINDS:
        found[f"{kind}.svg"] = picture(kind, *sizes)
        found[f"{kind}_scale.svg"] = picture(kind, *sizes, part="scale")
    found["pads.svg"] = picture("mxfp4_moe", *sizes, logical=logical)
    found["pads_scale.svg"] = picture("mxfp4_moe", *sizes, logical=logical, part="scale")
    found["ranks.svg"] = rank_picture(4, 640, 256)
    return found


def test_committed_pictures_are_up_to_date() -> None:
    assert committed() == {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.svg")}


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
        "scales of a few columns": lambda: picture("mxfp4_moe", 64, 128, part="scale"),
        "scales of a few rows": lambda: picture("mxfp4_separated", 16, 256, part="scale"),
        "part": lambda: picture("mxfp4_moe", 64, 256, part="bias"),
        "logical rows": lambda: picture("mxfp4_moe", 64, 256, logical=(80, 256)),
        "half a block": lambda: picture("mxfp4_moe", 64, 256, gate_up=False, logical=(64, 48)),
        "halves that differ": lambda: picture("mxfp4_moe", 64, 256, logical=(41, 256)),
        "too many cells": lambda: picture("mxfp4_moe", 4096, 4096),
    }
    lines = []
    for name, call in cases.items():
        with pytest.raises(ValueError, match="N=|K=|kind|part") as error:
            call()
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
kind: unknown shuffle_kind 'mxfp4'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
rows: N=48 rows are not a multiple of 32, which qdata in 'mxfp4_moe' needs: pad gate and up from 24 to 32 rows each, with bytes of 0
rows of a down weight: N=24 rows are not a multiple of 16, which qdata in 'mxfp4_moe' needs: pad to 32 rows, with bytes of 0
columns: K=48 columns are not a multiple of 32, which qdata in 'mxfp4_separated' needs: pad to K=64, with bytes of 0
an odd column: a picture shows whole cells of 32 columns, found K=65
columns, not shuffled: a picture shows whole cells of 32 columns, found K=16
odd rows, not shuffled: gate and up have as many rows each, found N=3
no rows: a picture needs rows and columns, found N=0, K=256
negative sizes: a picture needs rows and columns, found N=-32, K=-256
scales of a few columns: K=128 columns are not a multiple of 256, which scale in 'mxfp4_moe' needs: pad to K=256, with bytes of 127
scales of a few rows: N=16 rows are not a multiple of 32, which scale in 'mxfp4_separated' needs: pad gate and up from 8 to 16 rows each, with bytes of 127
part: part must be 'qdata' or 'scale', found 'bias'
logical rows: logical sizes are at most N=64, K=256, in whole blocks of 32 columns and as many gate as up rows; found N=80, K=256
half a block: logical sizes are at most N=64, K=256, in whole blocks of 32 columns; found N=64, K=48
halves that differ: logical sizes are at most N=64, K=256, in whole blocks of 32 columns and as many gate as up rows; found N=41, K=256
too many cells: a picture shows at most 2048 cells of 32 columns; N=4096, K=4096 are 524288""",
    )


def test_a_png_shows_what_the_svg_says() -> None:
    """Cells in their colours and hatched pads, with labels on them, whatever fonts this machine has."""
    pytest.importorskip("vl_convert", reason="the extra png is not installed")
    svg = picture("mxfp4_moe", 32, 64, logical=(24, 64))
    lines, root = pixels(png(svg)), ElementTree.fromstring(svg)
    assert (len(lines), {len(line) for line in lines}) == (int(root.get("height")), {int(root.get("width"))})
    seen = set()
    for grid in ("row-major", "memory"):
        for cell in cells(svg, grid):
            inside = [pixel for line in lines[cell.y + 2 : cell.y + 11] for pixel in line[cell.x + 2 : cell.x + 30]]
            found = {"#" + bytes(pixel).hex() for pixel in inside}
            assert ("#f3f4f6" if cell.pad else cell.colour) in found
            assert min(map(sum, inside)) < (400 if cell.pad else 250)  # a label, grey or black
            seen |= found & {cell.colour}
    assert len(seen) == 24
    assert "#" + bytes(lines[20][4]).hex() == "#ffffff"


def test_the_largest_picture() -> None:
    assert len(cells(picture("mxfp4_moe", MAX_CELLS // 4, 128), "memory")) == MAX_CELLS


if __name__ == "__main__":
    for name, svg in committed().items():
        (DOCS / name).write_text(svg, encoding="utf-8")
