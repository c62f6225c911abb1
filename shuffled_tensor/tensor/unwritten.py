# SPDX-License-Identifier: MIT
"""How a refit that must write everything is known to have done so, by whatever means: by what was left in place of the
bytes."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES
from shuffled_tensor.tensor.geometry import Geometry

__all__ = ["Unwritten"]

_NAN = 255
_BLOCK = 16
"""Bytes of the codes of one block."""
_APART = 61
"""Blocks from a mark to the next one, at most."""


class Unwritten(NamedTuple):
    """What stands in row-major bytes that nobody has written yet.

    All scales are NaN. Of the codes, blocks at one distance are marked: at least one in each row, in each kilobyte of a
    row, and in each column of as many rows as blocks lie between two marks. So opening and closing a refit costs little
    beside the writing.
    """

    mark: Tensor
    """Two int64, for 16 bytes of codes: random, so that no codes are equal to it."""

    @classmethod
    def fill(cls, geometry: Geometry, qdata: Tensor, scale: Tensor) -> Unwritten:
        """Leave it in codes and scales ``[E, padded rows, bytes]``."""
        mark = torch.tensor([*os.urandom(_BLOCK)], dtype=torch.uint8, device=qdata.device).view(torch.int64)
        _marked(geometry, qdata).copy_(mark)
        scale.fill_(_NAN)
        return cls(mark)

    def check(self, geometry: Geometry, qdata: Tensor, scale: Tensor, *, interleaved: bool) -> None:
        """Raise RuntimeError where some of it is left in the logical part; the padding of ``interleaved`` rows is
        behind them all."""
        rows, columns = geometry.shape(SCALES)  # a scale for each block of codes
        halves = 1 if interleaved else geometry.halves
        padded, blocks = geometry.padded_shape(CODES)[0], qdata.shape[-1] // _BLOCK
        block = torch.arange(0, padded * blocks, _apart(columns, blocks), device=qdata.device)
        logical = (block // blocks % (padded // halves) < rows // halves) & (block % blocks < columns)
        codes_left = ((_marked(geometry, qdata) == self.mark).all(-1) & logical).any(-1)
        scales = scale.unflatten(1, (halves, -1))[:, :, : rows // halves, :columns]
        scales_left = scales.amax((1, 2, 3)) == _NAN
        for expert, left in enumerate(torch.stack([codes_left, scales_left], 1).tolist()):
            if any(left):
                part = PARTS[left.index(True)]
                nan = " (or it holds NaN scales, 255)" if part is SCALES else ""
                raise RuntimeError(
                    f"this refit had to write everything, and has not written all of it: {part} of expert {expert} "
                    f"are missing{nan}; write everything in one refit"
                )


def _marked(geometry: Geometry, qdata: Tensor) -> Tensor:
    """Of each expert, the blocks that are marked: a view, int64 ``[E, blocks, 2]``."""
    blocks: Tensor = qdata.view(torch.int64).flatten(1).unflatten(1, (-1, 2))
    return blocks[:, :: _apart(geometry.shape(SCALES)[1], qdata.shape[-1] // _BLOCK)]


def _apart(logical: int, blocks: int) -> int:
    """From mark to mark, in rows of so many blocks: no row is without one, and every column has one in turn."""
    return next(apart for apart in range(min(_APART, logical), 0, -1) if math.gcd(apart, blocks) == 1)
