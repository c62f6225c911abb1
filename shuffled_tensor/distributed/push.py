# SPDX-License-Identifier: MIT
"""Values of one rank are written into the weights of the others: packed and row-major on the way, in place, and in each
rank's own layout where they arrive."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.distributed.agreement import gathered
from shuffled_tensor.distributed.pieces import cut, overlap, size, views, write
from shuffled_tensor.mxfp4 import ScaleRule
from shuffled_tensor.tensor.checks import check_high_precision, check_row_order
from shuffled_tensor.tensor.geometry import RowOrder, part_rows
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["broadcast_", "scatter_"]

_CHUNK = 128 << 20
"""Bytes of a message, unless one expert has more. Of two, one is on the wire while the other is written; and fewer of
them take a GPU's host less time than the wire does."""

_PAGE = 4096
"""Bytes that say how many of them mean something, and what a rank holds and sends."""


def broadcast_(
    weight: ShuffledMXFP4Tensor | Sequence[ShuffledMXFP4Tensor | None] | None,
    values: Tensor | Sequence[Tensor | None] | None = None,
    *,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    place: Place | Sequence[Place | None] | None = None,
    row_order: RowOrder | Sequence[RowOrder | None] | None = None,
    scale_rule: ScaleRule = "even",
) -> None:
    """Values of one rank into the weights of all: everything goes to every rank, which keeps what it holds a part of.

    The sender quantises some experts at a time while those before are on the wire; every rank writes them into its own
    part and layout, and the addresses stay. So the result is, to the bit, what quantising the whole and parting it
    would be. Scratch is two messages, each of 128 MiB or one expert. Collective: every rank calls it.

    Several weights go in one call, as lists: ranks tell each other what they hold once, and no wire waits between two
    of them. ``place`` and ``row_order`` are one for all then, or a list.

    Args:
        weight: this rank's weight ``[E, N, K]`` or ``[N, K]``, whole or a part that knows its place; None on a rank
            that only sends. Or a list of such, as many on every rank.
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
    weight: ShuffledMXFP4Tensor | Sequence[ShuffledMXFP4Tensor | None] | None,
    values: Tensor | Sequence[Tensor | None] | None = None,
    *,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    place: Place | Sequence[Place | None] | None = None,
    row_order: RowOrder | Sequence[RowOrder | None] | None = None,
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
            place = _checked(place, values._window.shape, 2 if values.gate_up else 1) or _place_of(values)
            return cls(values, _Side(place, values.gate_up, device), False, scale_rule)
        row_order = row_order or (None if weight is None else weight.row_order)
        check_high_precision(values)
        mxfp4.check_quantizable(values, scale_rule)
        check_row_order(row_order is not None, row_order, values.shape[-2])
        values = values.detach() if values.dim() == 3 else values.detach().unsqueeze(0)
        halves = 1 if row_order is None else 2
        place = _checked(place, (*values.shape,), halves) or Place.whole((*values.shape,), halves)
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
    weight: Any,
    values: Any,
    src: int,
    group: dist.ProcessGroup | None,
    place: Any,
    row_order: Any,
    scale_rule: ScaleRule,
    *,
    scatter: bool,
) -> None:
    weights: list[ShuffledMXFP4Tensor | None] = list(weight) if isinstance(weight, (list, tuple)) else [weight]
    if not weights or not 0 <= src < dist.get_world_size(group):
        raise ValueError(f"rank {src} of {dist.get_world_size(group)} was to send {len(weights)} weights")
    own: list[tuple[_Side, _Side | None]] = []
    sources: list[_Source | None] = []
    try:
        options = {"values": values, "place": place, "row_order": row_order}
        given = [_each(name, some, len(weights)) for name, some in options.items()]
        for one, data, where, order in zip(weights, *given, strict=True):
            side = _Side(None if one is None else _place_of(one), one is not None and one.gate_up)
            sends = dist.get_rank(group) == src
            source = _Source.of(one, data, where, order, scale_rule) if sends else None
            if source is not None:
                _check_apart(source, one, weights)
            sources.append(source)
            own.append((side, source and source.side))
    except (TypeError, ValueError, RuntimeError) as error:  # every rank is told
        own = [(_Side(None, error=error), None)] * len(weights)
    ranks: list[list[tuple[_Side, _Side | None]]] = _told(own, group)
    if len({len(rank) for rank in ranks}) > 1:
        raise ValueError(f"every rank must pass as many weights, found {', '.join(str(len(rank)) for rank in ranks)}")
    pushes = []
    for one, source, every in zip(weights, sources or [None] * len(weights), zip(*ranks, strict=True), strict=True):
        sides = [side for side, _ in every]
        pushes.append(_Push.of(one, source, sides, _check_fit(sides, every[src][1], src)))
    steps = [(push, number) for push in pushes for number in range(len(push.chunks))]
    sizes = [size(push.chunks[number], push.halves) for push, number in steps]
    device = _device(group, pushes[0].kind) if weights[0] is None else weights[0].device
    buffers = [torch.empty(max(sizes[index::2]), dtype=torch.uint8, device=device) for index in range(len(sizes[:2]))]
    with ExitStack() as stack:
        for push in pushes:
            push.enter(stack)
        before: tuple[_Push, _Message] | None = None
        for index, (push, number) in enumerate(steps):
            message = push.begin(number, buffers[index % 2][: sizes[index]], src, group, scatter)
            if before is not None:
                before[0].end(before[1])
            before = push, message
        if before is not None:
            before[0].end(before[1])


def _each(name: str, given: Any, count: int) -> Sequence[Any]:
    """One for each weight."""
    if isinstance(given, Place) or not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} must be one, or as many as there are weights, found {len(given)} for {count}")
    return given


def _same(values: Tensor, weight: ShuffledMXFP4Tensor | None) -> bool:
    """Whether they are the same experts of the same bytes."""
    if weight is None or not isinstance(values, ShuffledMXFP4Tensor):
        return False
    return values._storage is weight._storage and values._window == weight._window


def _check_apart(
    source: _Source, weight: ShuffledMXFP4Tensor | None, weights: Sequence[ShuffledMXFP4Tensor | None]
) -> None:
    """Raise ValueError where values lie in a weight that is written before they are read."""
    values = source.values
    if isinstance(values, ShuffledMXFP4Tensor) and not _same(values, weight):
        for one in weights:
            if one is not None and one._storage is values._storage:
                raise ValueError("values lie in a weight that is written; clone() them")


class _Push(NamedTuple):
    """One weight's values, on their way in chunks."""

    weight: ShuffledMXFP4Tensor | None
    source: _Source | None
    sides: list[_Side]
    halves: int
    kind: str
    """Of the sender's device."""
    step: int
    """Experts of a chunk."""
    chunks: list[Place]
    into: Place | None
    """What comes to this rank's weight."""

    @classmethod
    def of(
        cls,
        weight: ShuffledMXFP4Tensor | None,
        source: _Source | None,
        sides: list[_Side],
        sent: tuple[Place, int, str],
    ) -> _Push:
        place, halves, kind = sent
        step = max(1, _CHUNK // max(1, size(place._replace(experts=(0,)), halves)))
        experts = place.experts
        chunks = [place._replace(experts=experts[first : first + step]) for first in range(0, len(experts), step)]
        its_own = source is not None and _same(source.values, weight)
        into = None if weight is None or its_own else overlap(place, _place_of(weight))
        return cls(weight, source, sides, halves, kind, step, chunks, into)

    def enter(self, stack: ExitStack) -> None:
        """Until the stack ends, the weight is being written."""
        if self.weight is not None and self.into is not None:
            held, into = _place_of(self.weight), self.into
            all_of_it = into.rows == held.rows and into.columns == held.columns and {*into.experts} == {*held.experts}
            whole = all_of_it and self.weight._window == self.weight._storage.whole()
            stack.enter_context(self.weight._storage.writing(whole=whole))
            self.weight._storage.touch()  # at once: when it ends early, other ranks may have been written already

    def begin(self, number: int, buffer: Tensor, src: int, group: dist.ProcessGroup | None, scatter: bool) -> _Message:
        chunk = self.chunks[number]
        if self.source is not None:
            self.source.read(number * self.step, views(buffer, chunk, self.halves))
        if not scatter:
            return _Message([dist.broadcast(buffer, group=group, group_src=src, async_op=True)], chunk, buffer, {})
        if self.source is None:
            piece = None if self.into is None else overlap(chunk, self.into)
            received = {} if piece is None else {src: buffer[: size(piece, self.halves)]}
            return _Message(_exchange(dist.irecv, received, group), piece, buffer, received)
        pieces = [None if side.place is None else overlap(chunk, side.place) for side in self.sides]
        parts = {
            rank: cut(buffer, chunk, piece, self.halves)
            for rank, piece in enumerate(pieces)
            if rank != src and piece is not None
        }
        return _Message(_exchange(dist.isend, parts, group), chunk, buffer, parts)

    def end(self, message: _Message) -> None:
        """Wait for a chunk, and write it."""
        for work in message.works:
            work.wait()
        if self.weight is not None and self.into is not None and message.place is not None:
            write(self.weight, message.place, views(message.buffer, message.place, self.halves))


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


def _checked(place: Place | None, shape: tuple[int, int, int], halves: int) -> Place | None:
    """A place that is given, if one is; raises ValueError where values of this shape have another."""
    if place is not None:
        place.check(shape, halves)
    return place


def _place_of(weight: ShuffledMXFP4Tensor) -> Place:
    if not isinstance(weight, ShuffledMXFP4Tensor):
        raise TypeError(
            f"a ShuffledMXFP4Tensor is written, found {type(weight).__name__}; of a DTensor, pass .to_local()"
        )
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
