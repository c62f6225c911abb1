# SPDX-License-Identifier: MIT
"""Values of one rank are written into the weights of the others: packed and row-major on the way, in place, and in each
rank's own layout where they arrive."""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.distributed.agreement import gathered
from shuffled_tensor.mxfp4 import PARTS, Part, ScaleRule
from shuffled_tensor.tensor.checks import check_high_precision, check_row_order
from shuffled_tensor.tensor.geometry import RowOrder, Window, part_rows, slice_of
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["broadcast_", "scatter_"]

_CHUNK = 128 << 20
"""Bytes of a message, unless one expert has more. Of two, one is on the wire while the other is written; and fewer of
them take a GPU's host less time than the wire does."""

_PAGE = 4096
"""Bytes that say how many of them mean something, and what a rank holds and sends."""


def broadcast_(
    weight: ShuffledMXFP4Tensor | None,
    values: Tensor | None = None,
    *,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    place: Place | None = None,
    row_order: RowOrder | None = None,
    scale_rule: ScaleRule = "even",
) -> None:
    """Values of one rank into the weights of all: everything goes to every rank, which keeps what it holds a part of.

    The sender quantises some experts at a time while those before are on the wire; every rank writes them into its own
    part and layout, and the addresses stay. So the result is, to the bit, what quantising the whole and parting it
    would be. Scratch is two messages, each of 128 MiB or one expert. Collective: every rank calls it.

    Args:
        weight: this rank's weight ``[E, N, K]`` or ``[N, K]``, whole or a part that knows its place; None on a rank
            that only sends.
        values: on ``src`` what to send, by default its weight: a :class:`ShuffledMXFP4Tensor`, whose bytes are sent, or
            bfloat16, float16, float32 or float64 of a weight's shape, which are quantised.
        src: the rank in ``group`` that sends. What its arguments say, the others need not give.
        group: the ranks; None is the default group.
        place: on ``src`` which part of the whole ``values`` are; by default the one that a packed weight knows, or all
            of it.
        row_order: on ``src`` how floating-point ``values`` with gate and up rows have them, by default as its weight:
            ``"contiguous"``, in a part its gate rows, then its up rows, or ``"interleaved"``; None for rows of one
            kind.
        scale_rule: on ``src`` one of :data:`shuffled_tensor.mxfp4.SCALE_RULES`.

    Raises:
        ValueError: sizes that do not fit each other, or nothing to send; on every rank alike, before anything is
            written.
        TypeError: values that are neither; on every rank alike.
        RuntimeError: a packed weight is sent that is unusable; on every rank alike.

    An exception on the way, as of a rank that dies, leaves the weights of this rank unusable until they are written
    whole, by another push or otherwise.
    """
    _push(weight, values, src, group, place, row_order, scale_rule, scatter=False)


def scatter_(
    weight: ShuffledMXFP4Tensor | None,
    values: Tensor | None = None,
    *,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    place: Place | None = None,
    row_order: RowOrder | None = None,
    scale_rule: ScaleRule = "even",
) -> None:
    """As :func:`broadcast_`, but each rank is sent only what it holds.

    That is less to receive, and for parts that do not overlap as much to send. Where many ranks hold the same, a
    broadcast passes it on between them, and this sends it to each. Scratch of the sender is what it sends of two
    messages besides.
    """
    _push(weight, values, src, group, place, row_order, scale_rule, scatter=True)


class _Side(NamedTuple):
    """What a rank says of what it holds, or sends."""

    place: Place | None
    """Of what it holds, or sends; None where that is nothing."""
    gate_up: bool = False
    device: str = "cpu"
    """Its kind."""
    error: Exception | None = None


class _Source(NamedTuple):
    """What is sent."""

    values: Tensor
    """``[E, N, K]``."""
    side: _Side
    interleaved: bool
    scale_rule: ScaleRule

    @classmethod
    def of(
        cls,
        weight: ShuffledMXFP4Tensor | None,
        values: Tensor | None,
        place: Place | None,
        row_order: RowOrder | None,
        scale_rule: ScaleRule,
    ) -> _Source:
        values = weight if values is None else values
        if values is None:
            raise ValueError("the rank that sends has neither values nor a weight; pass it values=")
        device = (values if weight is None else weight).device.type
        if isinstance(values, ShuffledMXFP4Tensor):
            values._storage.check_readable()
            return cls(values, _Side(place or _place_of(values), values.gate_up, device), False, scale_rule)
        row_order = row_order or (None if weight is None else weight.row_order)
        check_high_precision(values)
        mxfp4.check_quantizable(values, scale_rule)
        check_row_order(row_order is not None, row_order, values.shape[-2])
        values = values.detach() if values.dim() == 3 else values.detach().unsqueeze(0)
        halves = 1 if row_order is None else 2
        place = place or Place.whole((*values.shape,), halves)
        sizes = [len(place.experts), halves * len(place.rows), len(place.columns)]
        if sizes != list(values.shape):
            raise ValueError(f"place says that {sizes} experts, rows and columns are sent, found {list(values.shape)}")
        return cls(values, _Side(place, row_order is not None, device), row_order == "interleaved", scale_rule)

    def read(self, first: int, message: tuple[Tensor, Tensor]) -> None:
        """Some experts, row-major, into what is sent."""
        qdata, scale = (data.flatten(1, 2) for data in message)
        if isinstance(self.values, ShuffledMXFP4Tensor):
            window = self.values._window
            experts = window.experts[first : first + len(qdata)]
            for out, data in zip(
                (qdata, scale), self.values._storage.read(window._replace(experts=experts)), strict=True
            ):
                out.copy_(data)
            return
        some = self.values[first : first + len(qdata)].to(qdata.device)
        mxfp4.quantize_into(some, qdata, scale, scale_rule=self.scale_rule)
        if self.interleaved:
            for out in (qdata, scale):
                out.copy_(part_rows(out))


def _push(
    weight: ShuffledMXFP4Tensor | None,
    values: Tensor | None,
    src: int,
    group: dist.ProcessGroup | None,
    place: Place | None,
    row_order: RowOrder | None,
    scale_rule: ScaleRule,
    *,
    scatter: bool,
) -> None:
    source = held = None
    try:
        held = None if weight is None else _place_of(weight)
        side = _Side(held, weight is not None and weight.gate_up)
        if dist.get_rank(group) == src:
            source = _Source.of(weight, values, place, row_order, scale_rule)
    except (TypeError, ValueError, RuntimeError) as error:  # every rank is told
        side = _Side(None, error=error)
    every: list[tuple[_Side, _Side | None]] = _told((side, source and source.side), group)
    sides = [side for side, _ in every]
    sent, halves, kind = _check_fit(sides, every[src][1], src)
    device = _device(group, kind) if weight is None else weight.device
    step = max(1, _CHUNK // max(1, _size(sent._replace(experts=(0,)), halves)))
    chunks = [sent._replace(experts=sent.experts[first : first + step]) for first in range(0, len(sent.experts), step)]
    buffers = [torch.empty(_size(chunk, halves), dtype=torch.uint8, device=device) for chunk in chunks[:2]]
    into = None if held is None or (source is not None and source.values is weight) else _overlap(sent, held)

    def begin(number: int) -> _Message:
        chunk, buffer = chunks[number], buffers[number % 2]
        if source is not None:
            source.read(number * step, _views(buffer, chunk, halves))
        if not scatter:
            buffer = buffer[: _size(chunk, halves)]
            return _Message([dist.broadcast(buffer, group=group, group_src=src, async_op=True)], chunk, buffer, {})
        if source is None:
            piece = None if into is None else _overlap(chunk, into)
            received = {} if piece is None else {src: buffer[: _size(piece, halves)]}
            return _Message(_exchange(dist.irecv, received, group), piece, buffer, received)
        pieces = [None if side.place is None else _overlap(chunk, side.place) for side in sides]
        cut = {
            rank: _cut(buffer, chunk, piece, halves)
            for rank, piece in enumerate(pieces)
            if rank != src and piece is not None
        }
        return _Message(_exchange(dist.isend, cut, group), chunk, buffer, cut)

    def end(message: _Message) -> None:
        for work in message.works:
            work.wait()
        if weight is not None and into is not None and message.place is not None:
            _write(weight, message.place, _views(message.buffer, message.place, halves))

    with ExitStack() as stack:
        if weight is not None and into is not None and held is not None:
            all_of_it = into.rows == held.rows and into.columns == held.columns and {*into.experts} == {*held.experts}
            whole = all_of_it and weight._window == weight._storage.whole()
            stack.enter_context(weight._storage.writing(whole=whole))
            weight._storage.touch()  # at once: when it ends early, other ranks may have been written already
        before = None
        for number in range(len(chunks)):
            message = begin(number)
            if before is not None:
                end(before)
            before = message
        if before is not None:
            end(before)


def _told(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank says, by rank: in one exchange where it fits into a page, for which all_gather_object has two."""
    said, world_size = pickle.dumps(own), dist.get_world_size(group)
    page = bytearray((len(said).to_bytes(8, "little") + said).ljust(_PAGE, b"\0")[:_PAGE])
    pages = torch.empty(world_size, _PAGE, dtype=torch.uint8, device=_device(group, "cpu"))
    dist.all_gather([*pages], torch.frombuffer(page, dtype=torch.uint8).to(pages.device), group=group)
    found = [ctypes.string_at(each.data_ptr(), _PAGE) for each in pages.cpu()]
    sizes = [int.from_bytes(page[:8], "little") for page in found]
    if max(sizes) > _PAGE - 8:
        return gathered(own, group)
    return [pickle.loads(page[8 : 8 + size]) for page, size in zip(found, sizes, strict=True)]


class _Message(NamedTuple):
    """On its way."""

    works: list[Any]
    place: Place | None
    """Of what is in the buffer here; None where nothing comes."""
    buffer: Tensor
    kept: dict[int, Tensor]
    """What is on the wire besides."""


def _place_of(weight: ShuffledMXFP4Tensor) -> Place:
    if weight.is_part_of_experts:
        raise ValueError("values are pushed from and into whole experts, found a view of rows or columns; clone() it")
    return weight.place


def _check_fit(sides: Sequence[_Side], sent: _Side | None, src: int) -> tuple[Place, int, str]:
    """What is sent, of how many halves its rows are, and from what kind of device. Raises what a rank has found wrong,
    and where sizes differ."""
    for rank, side in enumerate(sides):
        if side.error is not None:
            raise type(side.error)(f"rank {rank}: {side.error}")
    assert sent is not None
    assert sent.place is not None
    for rank, held in enumerate(sides):
        if held.place is not None and (held.place.shape, held.gate_up) != (sent.place.shape, sent.gate_up):
            raise ValueError(
                f"rank {src} sends of a whole of {list(sent.place.shape)}, gate_up={sent.gate_up}, and the weight of "
                f"rank {rank} is of one of {list(held.place.shape)}, gate_up={held.gate_up}; place= says which part "
                "values are, and row_order= that their rows are gate and up"
            )
    return sent.place, 2 if sent.gate_up else 1, sent.device


def _device(group: dist.ProcessGroup | None, kind: str) -> torch.device:
    """Where messages lie: on the device of this kind that is current, unless the group has a backend for GPUs alone."""
    kind = "cuda" if dist.get_backend(group) == "nccl" else kind
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _exchange(operation: Any, messages: dict[int, Tensor], group: dist.ProcessGroup | None) -> list[Any]:
    operations = [dist.P2POp(operation, data, group=group, group_peer=peer) for peer, data in messages.items()]
    return list(dist.batch_isend_irecv(operations)) if operations else []


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _overlap(sent: Place, held: Place) -> Place | None:
    """What of it comes to somebody, with experts in the order in which they are sent; None where nothing does."""
    wanted = set(held.experts)
    experts = tuple(expert for expert in sent.experts if expert in wanted)
    rows, columns = _common(sent.rows, held.rows), _common(sent.columns, held.columns)
    return sent._replace(experts=experts, rows=rows, columns=columns) if experts and rows and columns else None


def _shapes(place: Place, halves: int) -> list[tuple[int, int, int, int]]:
    """Of codes and scales in a message: experts, halves, rows of each, and bytes."""
    return [(len(place.experts), halves, len(place.rows), len(place.columns) // part.per_byte) for part in PARTS]


def _size(place: Place, halves: int) -> int:
    return sum(map(math.prod, _shapes(place, halves)))


def _views(buffer: Tensor, place: Place, halves: int) -> tuple[Tensor, Tensor]:
    """The codes and the scales in a message."""
    codes, scales = _shapes(place, halves)
    middle = math.prod(codes)
    return buffer[:middle].view(codes), buffer[middle : middle + math.prod(scales)].view(scales)


def _runs(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[range, range]]:
    """Pairs of numbers, where both follow each other taken together."""
    run: list[tuple[int, int]] = []
    for pair in pairs:
        if run and pair != (run[-1][0] + 1, run[-1][1] + 1):
            yield range(run[0][0], run[-1][0] + 1), range(run[0][1], run[-1][1] + 1)
            run = []
        run.append(pair)
    if run:
        yield range(run[0][0], run[-1][0] + 1), range(run[0][1], run[-1][1] + 1)


def _inside(whole: Place, piece: Place, data: Tensor, part: Part) -> Tensor:
    """The rows and columns of a piece, of codes or scales ``[experts, halves, rows, bytes]`` that hold more of them."""
    rows, columns = (
        range(inner.start - outer.start, inner.stop - outer.start)
        for inner, outer in ((piece.rows, whole.rows), (piece.columns, whole.columns))
    )
    return data[:, :, slice_of(rows), slice_of(columns, part)]


def _cut(buffer: Tensor, chunk: Place, piece: Place, halves: int) -> Tensor:
    """A message of its own for a piece of a chunk; the chunk's, where that is all of it."""
    if _size(piece, halves) == _size(chunk, halves):
        return buffer[: _size(chunk, halves)]
    message, wanted = buffer.new_empty(_size(piece, halves)), set(piece.experts)
    picked = [(place, index) for place, index in enumerate(i for i, e in enumerate(chunk.experts) if e in wanted)]
    for part, out, data in zip(PARTS, _views(message, piece, halves), _views(buffer, chunk, halves), strict=True):
        for to, of in _runs(picked):
            out[slice_of(to)].copy_(_inside(chunk, piece, data[slice_of(of)], part))
    return message


def _write(weight: ShuffledMXFP4Tensor, sent: Place, message: tuple[Tensor, Tensor]) -> None:
    """What a weight holds of some experts that came."""
    held, storage = weight.place, weight._storage
    piece = _overlap(sent, held)
    if piece is None:
        return
    index = {expert: number for number, expert in enumerate(sent.experts)}
    slots = ((slot, index[expert]) for slot, expert in enumerate(held.experts) if expert in index)
    columns = range(piece.columns.start - held.columns.start, piece.columns.stop - held.columns.start)
    parts = [_inside(sent, piece, data, part) for data, part in zip(message, PARTS, strict=True)]
    for to, of in _runs(slots):
        window = Window(weight._window.experts[to.start : to.stop], range(storage.geometry.rows), columns)
        if piece.rows == held.rows:  # of both halves at once
            codes, scales = (data[slice_of(of)].flatten(1, 2) for data in parts)
            storage.write(window, codes, scales)
            continue
        for half in range(storage.geometry.halves):
            first = half * len(held.rows) + piece.rows.start - held.rows.start
            codes, scales = (data[slice_of(of), half] for data in parts)
            storage.write(window._replace(rows=range(first, first + len(piece.rows))), codes, scales)
