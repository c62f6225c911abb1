# SPDX-License-Identifier: MIT
"""Which bytes the kernels of :mod:`~shuffled_tensor.backends.triton.shuffle` move, and how they are launched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from shuffled_tensor.backends.triton import unusable
from shuffled_tensor.layouts import MAX_SCRATCH, Mover, Order
from shuffled_tensor.mxfp4 import CODES
from shuffled_tensor.owners import is_real

__all__ = ["Strips", "TritonMover", "move", "on", "scratch", "strips_of"]

_log = logging.getLogger("shuffled_tensor")

_COLUMNS = 256
"""Units of 16 bytes of each row that a program moves where it need not hold whole rows."""

_HELD = 512
"""Units of each of 16 rows that fit into the registers of a program; half of them, where it holds two strips."""

_PROGRAMS = 1056
"""Pieces of rounds that keep a GPU busy."""

_PIECE = 8
"""Strips of a round that is not worth being cut."""


class Strips(NamedTuple):
    """What the kernels know of an order."""

    tile: int
    """Rows of a strip of codes, or of half a strip of scales."""
    interleaved: bool


_CODES = {False: "e (n r) c -> e n c r", True: "e (g n r) c -> e n g c r"}
_SCALES = {False: "e (n h r) (c t q) -> e n c q r t h", True: "e (g n r) (c t q) -> e n c q r t g"}


def strips_of(order: Order) -> Strips | None:
    """How the kernels see an order; None where they cannot move its bytes."""
    sizes = dict(order.sizes)
    if order.part is CODES:
        known = order.pattern == _CODES[order.interleaved]
    else:
        known = order.pattern == _SCALES[order.interleaved] and [sizes[axis] for axis in "ghtq"] == [2, 2, 2, 4]
    return Strips(sizes["r"], order.interleaved) if known and sizes["r"] == 16 else None


class TritonMover(Mover):
    """On GPUs that Triton compiles for."""

    def __init__(self) -> None:
        self._failed: set[tuple[Order, int, bool]] = set()

    def scratch(self, order: Order, data: Tensor) -> int | None:
        return scratch(order, data) if self._takes(order, data, in_place=True) else None

    def move(self, order: Order, source: Tensor, target: Tensor, held: Tensor | None, *, inverse: bool) -> bool:
        in_place = held is not None
        if not (self._takes(order, source, in_place) and self._takes(order, target, in_place)):
            return False
        if held is not None:
            needed = scratch(order, target)
            if needed is None or needed > len(held):
                return False
        try:
            move(order, source, target, held, inverse=inverse)
        except Exception as error:  # no C compiler, or a GPU with less memory on it: found before a byte moves
            self._failed.add((order, source.shape[-1], in_place))
            _log.warning("%s are shuffled without Triton, which failed: %s", order.part, error)
            return False
        return True

    def _takes(self, order: Order, data: Tensor, in_place: bool) -> bool:
        return (
            not torch.compiler.is_compiling()
            and is_real(data)
            and not _len_torch_dispatch_stack()  # a mode would not see it
            and strips_of(order) is not None
            and unusable(data.device) is None
            and data.data_ptr() % 16 == 0
            and (order, data.shape[-1], in_place) not in self._failed
            # a graph that is captured may not bring rounds to the device
            and not (in_place and data.is_cuda and torch.cuda.is_current_stream_capturing())
        )


class _Pieces(NamedTuple):
    """Rounds of strips that follow each other, cut where they are long: the place of each one's first, and how many
    strips it has; the longest first."""

    starts: Tensor
    lengths: Tensor
    cut: bool


def _rounds(strips: int, inverse: bool) -> Iterator[list[int]]:
    half, seen = strips // 2, [False] * strips
    for start in range(strips):
        places, place = [], start
        while not seen[place]:
            seen[place] = True
            places.append(place)
            place = place % 2 * half + place // 2 if inverse else place % half * 2 + place // half
        if places:
            yield places


@cache
def _pieces(strips: int, experts: int, most: int, inverse: bool, device: torch.device) -> _Pieces:
    """Of each expert, so that there are enough of them for a GPU, but at most ``most`` in all where each puts a strip
    aside."""
    rounds = list(_rounds(strips, inverse))
    length = max(_PIECE, -(-strips * experts // _PROGRAMS))
    while True:
        pieces = [
            (min(length, len(places) - first), places[first])
            for places in rounds
            for first in range(0, len(places), length)
        ]
        cut = len(pieces) > len(rounds)
        if not cut or len(pieces) * experts <= most:
            break
        length *= 2
    pieces.sort(reverse=True)
    lengths, starts = (torch.tensor(each, dtype=torch.int32, device=device) for each in zip(*pieces, strict=True))
    return _Pieces(starts, lengths, cut)


def _pieces_of(data: Tensor, tile: int, inverse: bool) -> _Pieces:
    experts, rows, width = data.shape
    return _pieces(rows // tile, experts, MAX_SCRATCH // (tile * width), inverse, data.device)


def scratch(order: Order, data: Tensor) -> int | None:
    """Bytes that :func:`move` takes in place, in either direction; None where it cannot."""
    strips = strips_of(order)
    if strips is None or (order.interleaved and order.part is not CODES):
        return None
    if data.numel() == 0 or order.part is not CODES:
        return 0
    if _power_of_2(data.shape[-1] // 16) * (2 if order.interleaved else 1) > _HELD:
        return None
    if not order.interleaved:
        return 0
    pieces = _pieces_of(data, strips.tile, inverse=False)  # backwards, rounds are as long
    return len(data) * len(pieces.starts) * strips.tile * data.shape[-1] if pieces.cut else 0


def move(order: Order, source: Tensor, target: Tensor, held: Tensor | None = None, *, inverse: bool) -> None:
    """Lay contiguous uint8 ``[E, N, bytes]`` out in an order that :func:`strips_of` knows, or bring them back.

    Args:
        held: where ``target`` is the memory of ``source``: uint8, as much as :func:`scratch` says.
    """
    strips = strips_of(order)
    assert strips is not None
    if source.numel() == 0:
        return
    with on(source.device):
        if order.part is not CODES:
            _move_scales(strips, source, target, inverse)
        elif held is not None and order.interleaved:
            _move_in_rounds(strips, target, held, inverse)
        else:
            _move_codes(strips, source, target, inverse, whole=held is not None)


def _move_codes(strips: Strips, source: Tensor, target: Tensor, inverse: bool, whole: bool) -> None:
    from shuffled_tensor.backends.triton import shuffle

    experts, rows, width = source.shape
    units = _power_of_2(width // 16)
    if not whole and units > _COLUMNS:
        units = _COLUMNS // 2
    number, chunks = rows // strips.tile, -(-width // 16 // units)
    shuffle.move_codes[(experts * number * chunks,)](
        _words(source),
        _words(target),
        number,
        chunks,
        **_shape(strips, width, units, source.device),
        INTERLEAVED=strips.interleaved,
        INVERSE=inverse,
    )


def _move_in_rounds(strips: Strips, data: Tensor, held: Tensor, inverse: bool) -> None:
    from shuffled_tensor.backends.triton import shuffle

    experts, rows, width = data.shape
    starts, lengths, cut = _pieces_of(data, strips.tile, inverse)
    number, pieces = rows // strips.tile, len(starts)
    shape = _shape(strips, width, _power_of_2(width // 16), data.device)
    words, aside = _words(data), _words(held) if cut else None
    if cut:
        shuffle.put_aside[(experts * pieces,)](words, aside, starts, number, pieces, **shape)
    shuffle.move_pieces[(experts * pieces,)](
        words, aside, starts, lengths, number, pieces, **shape, INVERSE=inverse
    )  # fmt: skip


def _move_scales(strips: Strips, source: Tensor, target: Tensor, inverse: bool) -> None:
    from shuffled_tensor.backends.triton import shuffle

    experts, rows, width = source.shape
    units, number = _power_of_2(width // 8), rows // (2 * strips.tile)
    together = _power_of_2(min(number, max(1, 32 // units)))
    shuffle.move_scales[(experts * -(-number // together),)](
        _words(source),
        _words(target),
        rows,
        WIDTH=width // 4,
        TILE=strips.tile,
        UNITS=units,
        STRIPS=together,
        INTERLEAVED=strips.interleaved,
        INVERSE=inverse,
        num_warps=_warps(together * units * strips.tile * 4, source.device),
    )


def _shape(strips: Strips, width: int, units: int, device: torch.device) -> dict[str, int]:
    words = strips.tile * units * 4
    return {"WIDTH": width // 4, "TILE": strips.tile, "UNITS": units, "num_warps": _warps(words, device)}


def _warps(words: int, device: torch.device) -> int:
    """For 32 words a thread, where that makes 128 to 512 threads."""
    size: int = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return min(512, max(128, words // 32)) // size


def _words(data: Tensor) -> Tensor:
    return data.view(torch.int32)


def _power_of_2(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; on a CPU, its interpreter does."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
