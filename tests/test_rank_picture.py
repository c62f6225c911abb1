# SPDX-License-Identifier: MIT
"""Pictures of what ranks hold, read back and judged by torch.split and by the shards of a weight."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.drawing import MAX_CELLS
from shuffled_tensor.rank_picture import rank_picture

from .support.bytes import marked, marked_parts

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Cell:
    rank: int
    word: str
    """gate, up, columns or experts."""
    weight: range
    """Where it is in the half, or in the weight."""
    held: range
    """Where it is in what its rank holds of that."""
    x: int
    y: int
    width: int
    height: int
    colour: str
    label: str


def numbers(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def cells(svg: str, grid: str) -> list[Cell]:
    """The cells of a grid as an eye meets them: line by line, from left to right."""
    (group,) = (group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("id") == grid)
    found = []
    for rect, text in zip(group.iter(f"{SVG}rect"), group.iter(f"{SVG}text"), strict=True):
        title = rect.findtext(f"{SVG}title")
        match = re.fullmatch(r"(\w+) ([\d-]+), on rank (\d+) (\w+) ([\d-]+)", title)
        word, weight, rank, again, held = match.groups()
        assert word == again
        x, y, width, height = (int(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert float(text.get("x")) == x + width / 2
        assert y < float(text.get("y")) < y + height
        assert 6 * len(text.text) < width
        shape = (x, y, width, height, rect.get("fill"), text.text)
        found.append(Cell(int(rank), word, numbers(weight), numbers(held), *shape))
    return sorted(found, key=lambda cell: (cell.y, cell.x))


def held_by(rank: int, svg: str) -> dict[str, list[int]]:
    """What the picture shows on a rank, from its beginning to its end: rows of a half, columns or experts."""
    found: dict[str, list[int]] = {}
    for cell in cells(svg, "ranks"):
        if cell.rank == rank:
            own = found.setdefault(cell.word, [])
            assert cell.held == range(len(own), len(own) + len(cell.weight))
            own += cell.weight
    return found


CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {"rows": 512, "k": 64}),
    (4, {"rows": 640, "k": 96}),  # 96, 96, 96 and 32 of 320
    (4, {"rows": 64, "k": 320, "gate_up": False}),
    (3, {"rows": 96, "k": 96, "gate_up": False}),
    (1, {"rows": 64, "k": 32}),
    (4, {"rows": 64, "k": 96, "dim": "expert", "experts": 8}),
    (3, {"rows": 64, "k": 64, "dim": "expert", "experts": 3, "gate_up": False}),
]


@pytest.mark.parametrize(("ranks", "sizes"), CASES)
def test_ranks_hold_what_shards_of_a_weight_hold(ranks: int, sizes: dict[str, Any]) -> None:
    rows, k, dim = sizes["rows"], sizes["k"], sizes.get("dim", "intermediate")
    gate_up, experts = sizes.get("gate_up", True), sizes.get("experts", 2)
    order = {"row_order": "contiguous"} if gate_up else {}
    weight = ShuffledMXFP4Tensor(*marked_parts(experts, rows, k), gate_up=gate_up, **order)
    whole, svg = weight.dequantize(), rank_picture(ranks, **sizes)
    for rank in range(ranks):
        shown: Tensor = whole
        held = held_by(rank, svg)
        if dim == "expert":
            assert list(held) == ["expert"]
            shown = whole[held["expert"]]
        elif gate_up:
            assert list(held) == ["gate", "up"]  # in this order in memory, too
            shown = whole[:, held["gate"] + [rows // 2 + row for row in held["up"]]]
        else:
            assert list(held) == ["columns"]
            shown = whole[:, :, held["columns"]]
        expected = weight.shard(rank, ranks, dim=dim).dequantize()
        torch.testing.assert_close(shown, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("ranks", "size", "parts"),
    [(4, 2880, [736, 736, 736, 672]), (8, 2880, [384] * 7 + [192]), (2, 96, [64, 32]), (3, 320, [128, 128, 64])],
)
def test_uneven_parts(ranks: int, size: int, parts: list[int]) -> None:
    """As engines cut them: by hand, and by torch.split."""
    split = [part.tolist() for part in torch.arange(size).split(parts)]
    for gate_up, sizes in ((True, (2 * size, 32)), (False, (32, size))):
        svg = rank_picture(ranks, *sizes, gate_up=gate_up)
        for word in ("gate", "up") if gate_up else ("columns",):
            held = [held_by(rank, svg)[word] for rank in range(ranks)]
            assert held == split


@pytest.mark.parametrize(("ranks", "sizes"), CASES)
def test_a_cell_is_the_same_in_both_grids(ranks: int, sizes: dict[str, Any]) -> None:
    svg = rank_picture(ranks, **sizes)
    before, after = cells(svg, "weight"), cells(svg, "ranks")

    def key(cell: Cell) -> tuple[str, int]:
        return cell.word, cell.weight.start

    assert [key(cell) for cell in before] == sorted(key(cell) for cell in before)
    for one, other in zip(sorted(before, key=key), sorted(after, key=key), strict=True):
        assert (one.colour, one.label, one.rank) == (other.colour, other.label, other.rank)
    root = ElementTree.fromstring(svg)
    for one, other in combinations(before + after, 2):
        apart = one.x + one.width <= other.x or other.x + other.width <= one.x
        assert apart or one.y + one.height <= other.y or other.y + other.height <= one.y
    for cell in before + after:
        assert 0 < cell.x
        assert cell.x + cell.width < int(root.get("width"))
        assert cell.y + cell.height < int(root.get("height"))


@pytest.mark.parametrize(("ranks", "sizes"), CASES)
def test_axes_number_rows_and_columns(ranks: int, sizes: dict[str, Any]) -> None:
    """Of the whole weight beside it, of a shard beside that: up rows go on behind the gate rows."""
    svg = rank_picture(ranks, **sizes)
    axis = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.get("font-size") == "9"]
    lines = "dim" in sizes or sizes.get("gate_up", True)
    for grid in ("weight", "ranks"):
        found = cells(svg, grid)
        for cell in found:
            rank = [other for other in found if other.rank == cell.rank or grid == "weight"]
            gates = sum(len(other.weight) for other in rank if other.word == "gate")
            expected = (cell.weight if grid == "weight" else cell.held).start + (gates if cell.word == "up" else 0)
            inside = (cell.y, cell.height, "y") if lines else (cell.x, cell.width, "x")
            beside = [text for text in axis if 0 < float(text.get(inside[2])) - inside[0] < inside[1]]
            before = [text for text in beside if float(text.get("x")) < cell.x or float(text.get("y")) < cell.y]
            (own,) = before if grid == "weight" else [text for text in beside if text not in before]
            assert own.text == str(expected)


@pytest.mark.parametrize(("ranks", "sizes"), CASES)
def test_ribbons_lead_from_a_weight_to_its_ranks(ranks: int, sizes: dict[str, Any]) -> None:
    svg = rank_picture(ranks, **sizes)
    lines = "dim" in sizes or sizes.get("gate_up", True)

    def ends(grid: str, colour: str) -> tuple[int, int]:
        own = [cell for cell in cells(svg, grid) if cell.colour == colour]
        if lines:
            return own[0].y, own[-1].y + own[-1].height
        return own[0].x, own[-1].x + own[-1].width

    paths = list(ElementTree.fromstring(svg).iter(f"{SVG}path"))
    assert {path.get("fill") for path in paths} == {cell.colour for cell in cells(svg, "ranks")}
    for path in paths:
        points = re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))
        start, _, _, to, beyond, _, _, end = (float(point[lines]) for point in points)
        assert (start, end) == ends("weight", path.get("fill"))
        assert (to, beyond) == ends("ranks", path.get("fill"))


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_colours_tell_ranks_apart() -> None:
    every = cells(rank_picture(16, 32 * 16 * 2, 32), "weight")
    colours = {cell.colour: (cell.rank, cell.word) for cell in every}
    assert sorted(colours.values()) == sorted((rank, word) for rank in range(16) for word in ("gate", "up"))
    for cell in every:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb(cell.colour)]
        luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        assert (luminance + 0.05) / 0.05 > 4.5  # of black on it, as WCAG defines contrast
    for word in ("gate", "up"):
        own = [
            rgb(colour) for colour, (rank, half) in sorted(colours.items(), key=lambda item: item[1]) if half == word
        ]
        for one, other in pairwise(own):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


def legend(svg: str) -> list[str]:
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    return [text for text in texts if re.match(r"rank \d+: ", text)]


def test_the_legend_says_sizes() -> None:
    """The bytes of the first line are those of real codes and scales."""
    assert legend(rank_picture(4, 640, 96)) == [
        "rank 0: gate and up rows 0-95, N = 192, K = 96: 9,792 bytes an expert",
        "rank 1: gate and up rows 96-191, N = 192, K = 96: 9,792 bytes an expert",
        "rank 2: gate and up rows 192-287, N = 192, K = 96: 9,792 bytes an expert",
        "rank 3: gate and up rows 288-319, N = 64, K = 96: 3,264 bytes an expert",
    ]
    assert sum(part.nbytes for part in marked_parts(1, 192, 96)) == 9792
    assert legend(rank_picture(2, 64, 96, gate_up=False)) == [
        "rank 0: columns 0-63, N = 64, K = 64: 2,176 bytes an expert",
        "rank 1: columns 64-95, N = 64, K = 32: 1,088 bytes an expert",
    ]
    assert legend(rank_picture(2, 64, 64, dim="expert", experts=6)) == [
        "rank 0: experts 0-2, each N = 64, K = 64: 6,528 bytes",
        "rank 1: experts 3-5, each N = 64, K = 64: 6,528 bytes",
    ]
    assert marked(3, 64, 32).nbytes + marked(3, 64, 2).nbytes == 6528


def test_errors() -> None:
    cases: dict[str, Callable[[], object]] = {
        "too many ranks": lambda: rank_picture(5, 256, 64),
        "an empty rank": lambda: rank_picture(4, 32, 192, gate_up=False),
        "half a block": lambda: rank_picture(2, 144, 64),
        "experts": lambda: rank_picture(3, 64, 64, dim="expert", experts=8),
        "odd rows": lambda: rank_picture(1, 65, 64),
        "columns": lambda: rank_picture(2, 128, 48),
        "no rows": lambda: rank_picture(2, 0, 64),
        "too many cells": lambda: rank_picture(2, MAX_CELLS * 32 + 64, 64),
    }
    lines = []
    for name, call in cases.items():
        with pytest.raises(ValueError, match=" ") as error:
            call()
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
too many ranks: 128 (intermediate) cannot be parted into 5 parts of whole blocks of 32
an empty rank: 192 (intermediate) cannot be parted into 4 parts of whole blocks of 32
half a block: 72 (intermediate) cannot be parted into 2 parts of whole blocks of 32
experts: 8 (expert) cannot be parted into 3 equal parts
odd rows: a weight has rows, and K in whole blocks of 32 columns, and as many gate as up rows; found N=65, K=64
columns: a weight has rows, and K in whole blocks of 32 columns, and as many gate as up rows; found N=128, K=48
no rows: a weight has rows, and K in whole blocks of 32 columns, and as many gate as up rows; found N=0, K=64
too many cells: a picture shows at most 2048 blocks of 32 rows; these are 2050""",
    )
