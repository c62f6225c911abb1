# SPDX-License-Identifier: MIT
"""Who computes a mixture-of-experts layer, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shuffled_tensor.backends import reference
from shuffled_tensor.moe import MoECall

BACKENDS: dict[str, Callable[[MoECall], Tensor]] = {
    "reference": reference.fused_moe,
}


def select(wanted: str | None) -> str:
    """The name of the backend that takes a call.

    Raises:
        ValueError: the caller asked for one that does not exist.
    """
    if wanted is None:
        return "reference"
    if wanted not in BACKENDS:
        raise ValueError(f"unknown backend {wanted!r}; known backends: {', '.join(map(repr, BACKENDS))}")
    return wanted
