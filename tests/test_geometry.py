# SPDX-License-Identifier: MIT
"""Sizes, pads and windows of row-major padded bytes, judged by `in_memory` of tests/support/judges.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, Part
from shuffled_tensor.tensor.geometry import Geometry, Window, slice_of

from .support.bytes import marked, marked_parts
from .support.judges import in_memory

# rows, columns: neither padded, columns alone, rows alone, both
SIZES = [(512, 512), (512, 288), (96, 256), (514, 160)]
BOTH = pytest.mark.parametrize("gate_up", [True, False])
ALL = pytest.mark.parametrize(("rows", "columns"), SIZES)


def padded(part: Part, logical: Tensor, gate_up: bool) -> Tensor:
    """Codes or scales as they lie in memory."""
    other = torch.zeros(*logical.shape[:2], logical.shape[2] * part.per_byte // (32 if part is CODES else 2)).byte()
    pair = (logical, other) if part is CODES else (other, logical)
    return in_memory(pair, "none", gate_up=gate_up)[PARTS.index(part)]


@ALL
@BOTH
def test_pads_are_put_and_put_again(rows: int, columns: int, gate_up: bool) -> None:
    geometry = Geometry(rows, columns, gate_up)
    for part, logical in zip(PARTS, marked_parts(2, rows, columns), strict=True):
        expected = padded(part, logical, gate_up)
        found = geometry.pad(part, logical)
        assert torch.equal(found, expected)
        assert found.data_ptr() != logical.data_ptr()
        assert geometry.padded_shape(part) == tuple(expected.shape[1:])
        assert geometry.shape(part) == tuple(logical.shape[1:])
        halves = geometry.halves_of(part, found)
        assert torch.equal(halves.flatten(1, 2), logical)
        assert halves.shape[1] == (2 if gate_up else 1)

        spoilt = torch.full_like(expected, 0xAA)
        geometry.halves_of(part, spoilt).copy_(halves)
        geometry.rewrite_pads(part, spoilt)
        assert torch.equal(spoilt, expected)


@ALL
def test_interleaved_rows_are_parted(rows: int, columns: int) -> None:
    for part, logical in zip(PARTS, marked_parts(2, rows, columns), strict=True):
        interleaved = torch.empty_like(logical)
        interleaved[:, 0::2], interleaved[:, 1::2] = logical[:, : rows // 2], logical[:, rows // 2 :]
        found = Geometry(rows, columns, gate_up=True).pad(part, interleaved, interleaved=True)
        assert torch.equal(found, padded(part, logical, gate_up=True))


@ALL
@BOTH
def test_windows_are_put_where_they_belong(rows: int, columns: int, gate_up: bool) -> None:
    """Up to the last gate row, from the first up row, across both, within one: and nothing beside them changes."""
    geometry, half = Geometry(rows, columns, gate_up), rows // 2
    spans = [(0, rows), (0, half), (half, rows), (half - 1, half + 1), (3, 7), (half + 2, half + 3), (half + 1, rows)]
    for part, logical in zip(PARTS, marked_parts(2, rows, columns), strict=True):
        data = padded(part, logical, gate_up)
        for salt, (start, stop) in enumerate(spans):
            for first, last in ((0, columns), (32, 96), (columns - 32, columns)):
                across = slice(first // part.per_byte, last // part.per_byte)
                new = marked(2, stop - start, across.stop - across.start, salt=salt + 9)
                geometry.put(part, data, new, range(start, stop), range(first, last))
                logical[:, start:stop, across] = new
                assert torch.equal(data, padded(part, logical, gate_up)), (part, start, stop, first, last)


def test_windows_have_a_shape_and_slices() -> None:
    assert Window(range(1, 9, 3), range(5, 96), range(32, 160)).shape == (3, 91, 128)
    assert slice_of(range(1, 9, 3)) == slice(1, 9, 3)
    assert slice_of(range(64, 160), CODES) == slice(32, 80, 1)
    assert slice_of(range(64, 97), SCALES) == slice(2, 4, 1)  # a part of a block is a byte
