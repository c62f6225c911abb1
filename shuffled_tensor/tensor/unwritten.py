# SPDX-License-Identifier: MIT
"""How a refit that must write everything is known to have done so, by whatever means: by what was left in place of the
bytes."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.mxfp4 import CODES, SCALES
from shuffled_tensor.tensor.geometry import Geometry

__all__ = ["Unwritten"]

_NAN = 255


class Unwritten(NamedTuple):
    """What stands in row-major bytes that nobody has written yet."""

    codes: Tensor
    """Of every 16 bytes of codes, one block: random, so that no codes are equal to it. A scale is NaN."""

    @classmethod
    def fill(cls, qdata: Tensor, scale: Tensor) -> Unwritten:
        """Leave it in codes and scales ``[E, padded rows, bytes]``."""
        codes = torch.tensor([*os.urandom(16)], dtype=torch.uint8, device=qdata.device)
        qdata.unflatten(-1, (-1, 16)).copy_(codes)
        scale.fill_(_NAN)
        return cls(codes)

    def check(self, geometry: Geometry, qdata: Tensor, scale: Tensor) -> None:
        """Raise RuntimeError where some of it is left in the logical part."""
        for expert in range(len(qdata)):
            one = slice(expert, expert + 1)
            codes = geometry.halves_of(CODES, qdata[one]).unflatten(-1, (-1, 16))
            scales = geometry.halves_of(SCALES, scale[one])
            for part, left in ((CODES, (codes == self.codes).all(-1).any()), (SCALES, (scales == _NAN).any())):
                if left:
                    nan = " (or it holds NaN scales, 255)" if part is SCALES else ""
                    raise RuntimeError(
                        f"the weight was unusable before this refit, which has not written all of it: {part} of expert "
                        f"{expert} are missing{nan}; write everything in one refit"
                    )
