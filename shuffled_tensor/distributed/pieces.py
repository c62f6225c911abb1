# SPDX-License-Identifier: MIT
"""Pieces of a whole weight in messages: where they overlap, and how their bytes lie there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor

from shuffled_tensor.mxfp4 import PARTS, Part
from shuffled_tensor.tensor.geometry import Window, slice_of
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["cut", "overlap", "size", "views", "write"]


def common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def overlap(sent: Place, held: Place) -> Place | None:
    """What of it comes to somebody, with experts in the order in which they are sent; None where nothing does."""
    wanted = set(held.experts)
    experts = tuple(expert for expert in sent.experts if expert in wanted)
    rows, columns = common(sent.rows, held.rows), common(sent.columns, held.columns)
    return sent._replace(experts=experts, rows=rows, columns=columns) if experts and rows and columns else None


def shapes(place: Place, halves: int) -> list[tuple[int, int, int, int]]:
    """Of codes and scales in a message: experts, halves, rows of each, and bytes."""
    return [(len(place.experts), halves, len(place.rows), len(place.columns) // part.per_byte) for part in PARTS]


def size(place: Place, halves: int) -> int:
    return sum(map(math.prod, shapes(place, halves)))


def views(buffer: Tensor, place: Place, halves: int) -> tuple[Tensor, Tensor]:
    """The codes and the scales in a message."""
    codes, scales = shapes(place, halves)
    middle = math.prod(codes)
    return buffer[:middle].view(codes), buffer[middle : middle + math.prod(scales)].view(scales)


def runs(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[range, range]]:
    """Pairs of numbers, where both follow each other taken together."""
    run: list[tuple[int, int]] = []
    for pair in pairs:
        if run and pair != (run[-1][0] + 1, run[-1][1] + 1):
            yield range(run[0][0], run[-1][0] + 1), range(run[0][1], run[-1][1] + 1)
            run = []
        run.append(pair)
    if run:
        yield range(run[0][0], run[-1][0] + 1), range(run[0][1], run[-1][1] + 1)


def inside(whole: Place, piece: Place, data: Tensor, part: Part) -> Tensor:
    """The rows and columns of a piece, of codes or scales ``[experts, halves, rows, bytes]`` that hold more of them."""
    rows, columns = (
        range(inner.start - outer.start, inner.stop - outer.start)
        for inner, outer in ((piece.rows, whole.rows), (piece.columns, whole.columns))
    )
    return data[:, :, slice_of(rows), slice_of(columns, part)]


def cut(buffer: Tensor, chunk: Place, piece: Place, halves: int) -> Tensor:
    """A message of its own for a piece of a chunk; the chunk's, where that is all of it."""
    if size(piece, halves) == size(chunk, halves):
        return buffer[: size(chunk, halves)]
    message, wanted = buffer.new_empty(size(piece, halves)), set(piece.experts)
    picked = [(place, index) for place, index in enumerate(i for i, e in enumerate(chunk.experts) if e in wanted)]
    for part, out, data in zip(PARTS, views(message, piece, halves), views(buffer, chunk, halves), strict=True):
        for to, of in runs(picked):
            out[slice_of(to)].copy_(inside(chunk, piece, data[slice_of(of)], part))
    return message


def write(weight: ShuffledMXFP4Tensor, sent: Place, message: tuple[Tensor, Tensor]) -> None:
    """What a weight holds of some experts that came."""
    held, storage = weight.place, weight._storage
    piece = overlap(sent, held)
    if piece is None:
        return
    index = {expert: number for number, expert in enumerate(sent.experts)}
    slots = ((slot, index[expert]) for slot, expert in enumerate(held.experts) if expert in index)
    columns = range(piece.columns.start - held.columns.start, piece.columns.stop - held.columns.start)
    parts = [inside(sent, piece, data, part) for data, part in zip(message, PARTS, strict=True)]
    for to, of in runs(slots):
        window = Window(weight._window.experts[to.start : to.stop], range(storage.geometry.rows), columns)
        if piece.rows == held.rows:  # of both halves at once
            codes, scales = (data[slice_of(of)].flatten(1, 2) for data in parts)
            storage.write(window, codes, scales)
            continue
        for half in range(storage.geometry.halves):
            first = half * len(held.rows) + piece.rows.start - held.rows.start
            codes, scales = (data[slice_of(of), half] for data in parts)
            storage.write(window._replace(rows=range(first, first + len(piece.rows))), codes, scales)
