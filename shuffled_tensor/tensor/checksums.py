# SPDX-License-Identifier: MIT
"""Checksums of logical values: the same in every layout, on every device and whatever the padding."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["DIGITS", "Checksums", "checksum", "checksums"]

DIGITS = 16
"""Of an expert's checksum that are kept: there are hundreds of thousands of experts."""


class Checksums(NamedTuple):
    """Of a weight of several experts."""

    whole: str
    """What :func:`checksum` returns for it."""
    experts: tuple[str, ...] | None
    """The first 16 digits of each expert's own, which is that of a weight of one; None where nobody has noted them."""


def checksum(shape: tuple[int, ...], parts: Iterable[Tensor]) -> str:
    """SHA-256, in hex, of logical sizes and, expert by expert, row-major logical codes and scales."""
    digest = _begun(shape)
    for data in parts:
        digest.update(_bytes(data))
    return digest.hexdigest()


def checksums(shape: tuple[int, ...], experts: Iterable[Iterable[Tensor]]) -> Checksums:
    """All of a weight ``[E, N, K]`` at once, from the parts of each expert in turn."""
    whole, each = _begun(shape), []
    for parts in experts:
        one = _begun((1, *shape[1:]))
        for data in map(_bytes, parts):
            whole.update(data)
            one.update(data)
        each.append(one.hexdigest()[:DIGITS])
    return Checksums(whole.hexdigest(), tuple(each))


def _begun(shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(f"mxfp4 {'x'.join(map(str, shape))}".encode())


def _bytes(data: Tensor) -> bytes:
    data = data.contiguous().cpu()
    return ctypes.string_at(data.data_ptr(), data.nbytes)
