# SPDX-License-Identifier: MIT
"""The one mutable state: packed bytes, and the layout they are in, shared by every alias of those bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from shuffled_tensor import mxfp4, owners
from shuffled_tensor.layouts import ROW_MAJOR, ROW_ORDERS, Layout, Order, expert_chunks, round_up
from shuffled_tensor.mxfp4 import PARTS, Part
from shuffled_tensor.owners import is_real
from shuffled_tensor.tensor.checksums import Checksums, checksum, checksums
from shuffled_tensor.tensor.geometry import Geometry, RowOrder, Window, slice_of
from shuffled_tensor.tensor.place import Agreement, Place
from shuffled_tensor.tensor.unwritten import Unwritten
from shuffled_tensor.tensor.validity import State, Validity

__all__ = ["PackedStorage", "locked", "reading"]

_Begun = TypeVar("_Begun")

_RANKS = object()
"""Holds the layout of weights on which ranks agreed."""

_BY_CODES: WeakValueDictionary[int, PackedStorage] = WeakValueDictionary()
"""By the id of the tensor that is its `qdata`, or was."""


class PackedStorage:
    """Padded codes and scales of E experts, and the layout their bytes are in.

    Attributes:
        qdata: uint8 ``[E, padded_rows, padded_columns / 2]``.
        scale: uint8 ``[E, padded_rows, padded_columns / 32]``, rounded up to whole tiles.
        geometry: logical and padded sizes.
        requested_layout: the one that the caller fixed, or None where a backend decides at first use.
        locked_layout: the one in which somebody outside holds the bytes, so that it must stay; or None. See
            :meth:`lock_layout`.
        sent: whether the memory was sent to another process.
        place: which part of a whole this is; None where it is one.
        agreed: with which ranks the layout was agreed on, in the sense of a collective; apart from the lock.
        validity: in which layout the bytes are, and whether they are a weight now.
        lock: held wherever bytes and layout must agree.
        running: of each call that reads the bytes now, a lock that it holds; nobody changes them before it is free.
    """

    __slots__ = (
        "__weakref__",
        "_holders",
        "_owned",
        "_unwritten",
        "_writers",
        "agreed",
        "geometry",
        "lock",
        "locked_layout",
        "place",
        "qdata",
        "requested_layout",
        "running",
        "scale",
        "sent",
        "validity",
    )

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        geometry: Geometry,
        layout: Layout = ROW_MAJOR,
        requested_layout: Layout | None = None,
        row_order: RowOrder = "contiguous",
    ) -> None:
        self.qdata = qdata
        self.scale = scale
        self.geometry = geometry
        self.requested_layout = requested_layout
        self.locked_layout: Layout | None = None
        self._holders: set[object] = set()
        self._writers: set[object] = set()
        self.sent = False
        self.validity = Validity(layout, row_order)
        self.lock = threading.RLock()
        self.running: set[threading.RLock] = set()
        self._owned: int | None = None
        self._unwritten: Unwritten | None = None
        self.place: Place | None = None
        self.agreed: Agreement | None = None

    @property
    def layout(self) -> Layout:
        """The one that the bytes are in now."""
        return self.validity.layout

    @property
    def row_order(self) -> RowOrder:
        """Of the rows of the tensors that this was made of."""
        return self.validity.row_order

    def row_major(self, row_order: RowOrder | None) -> Layout:
        """How plain bytes lie that somebody writes here: in the rows' order of construction, if no other is given."""
        return ROW_ORDERS[row_order or self.row_order] if self.geometry.gate_up else ROW_MAJOR

    def own(self) -> None:
        """Tell whoever meets the bytes without this object that they are its."""
        if self.is_real and self._owned != self.qdata.data_ptr():
            owners.register(self, self.validity, self.qdata, self.scale)
            self._owned = self.qdata.data_ptr()
            _BY_CODES[id(self.qdata)] = self

    def share_memory_(self) -> None:
        """Move the bytes to memory that other processes may see."""
        with self.lock:
            for part in PARTS:
                self.bytes_of(part).share_memory_()
            self.own()  # at new addresses

    @classmethod
    def owner_of(cls, qdata: Tensor, scale: Tensor, geometry: Geometry) -> tuple[PackedStorage, range] | None:
        """The storage whose bytes codes and scales ``[experts, ...]`` are, and which experts; None where nobody's.

        Raises:
            RuntimeError: they are a weight's, but not whole experts of it.
        """
        storage = _BY_CODES.get(id(qdata))
        if storage is not None and storage.qdata is qdata and storage.scale is scale:
            experts: range | None = storage.experts
        else:
            owner = owners.find(qdata)
            if owner is None:
                return None
            storage = owner.storage()
            if storage is None:  # every tensor over these bytes has died; what was known of them was kept
                storage = cls(qdata.data, scale.data, geometry)  # they may be parameters
                storage.validity = owner.record
                storage.own()
            experts = storage.experts_of(qdata, scale)
        if experts is None or not _padded_alike(storage.geometry, geometry):
            raise RuntimeError(
                f"these bytes are a part of a weight of {storage.geometry}, but no experts of it; clone() them"
            )
        return storage, experts

    def experts_of(self, qdata: Tensor, scale: Tensor) -> range | None:
        """Which experts codes and scales ``[experts, ...]`` show, where they are of these bytes."""
        found = set()
        for own, data in ((self.qdata, qdata), (self.scale, scale)):
            each = own.stride(0)
            step, between = divmod(data.stride(0), each) if len(data) > 1 else (1, 0)
            first, within = divmod(data.data_ptr() - own.data_ptr(), each)
            alike = data.dtype is own.dtype and (data.shape[1:], data.stride()[1:]) == (own.shape[1:], own.stride()[1:])
            if not alike or between or within or step < 1:
                return None
            found.add(range(first, first + step * (len(data) - 1) + 1, step))
        experts = found.pop()
        return experts if not found and experts[-1] < len(self.qdata) else None

    @classmethod
    def pack(
        cls,
        qdata: Tensor,
        scale: Tensor,
        *,
        gate_up: bool,
        align: tuple[int, int],
        row_order: RowOrder = "contiguous",
        requested_layout: Layout | None = None,
    ) -> PackedStorage:
        """From logical row-major uint8 ``[E, N, K/2]`` and ``[E, N, K/32]``. Takes either tensor over where it needs no
        padding or reordering."""
        geometry = Geometry(qdata.shape[1], qdata.shape[2] * mxfp4.CODES.per_byte, gate_up, align)
        interleaved = row_order == "interleaved"

        def own(part: Part, data: Tensor) -> Tensor:
            if interleaved or geometry.padded_shape(part) != geometry.shape(part):
                return geometry.pad(part, data, interleaved=interleaved)
            # kernels and 16-byte moves need aligned, contiguous bytes; a tensor out of a safetensors file is often
            # neither; and what is another weight's stays its own
            if data.storage_offset() % 16 == 0 and not owners.owned(data):
                return data.contiguous()
            return data.clone(memory_format=torch.contiguous_format)

        qdata, scale = map(own, PARTS, (qdata, scale))
        return cls(qdata, scale, geometry, requested_layout=requested_layout, row_order=row_order)

    @classmethod
    def empty(cls, experts: int, geometry: Geometry, device: torch.device, layout: Layout) -> PackedStorage:
        """Bytes that are to be written whole; none has a value yet but the pads of row-major ones."""
        qdata, scale = (
            torch.empty(experts, *geometry.padded_shape(part), dtype=torch.uint8, device=device) for part in PARTS
        )
        storage = cls(qdata, scale, geometry, layout)
        if layout is ROW_MAJOR:  # in any other layout they are written with the rest
            storage._rewrite_pads()
        return storage

    def with_bytes(self, qdata: Tensor, scale: Tensor) -> PackedStorage:
        """Other bytes in the same layout: a copy, another device, some of the experts."""
        return PackedStorage(qdata, scale, self.geometry, self.layout, self.requested_layout, self.row_order)

    def packed_alike(
        self, qdata: Tensor, scale: Tensor, *, gate_up: bool, align: tuple[int, int] | None = None
    ) -> PackedStorage:
        """Other logical row-major bytes, in this layout, padded as these or to multiples of `align`."""
        align = align or self.geometry.align
        packed = PackedStorage.pack(qdata, scale, gate_up=gate_up, align=align, requested_layout=self.requested_layout)
        packed.validity.row_order = self.row_order if gate_up else "contiguous"
        packed.convert_layout_(self.layout)
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedStorage:
        with self.held():
            copied = memo[id(self)] = self.with_bytes(self.qdata.clone(), self.scale.clone())
            copied.place = self.place
        return copied

    @property
    def experts(self) -> range:
        """All of them."""
        return range(self.qdata.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.qdata.device

    @property
    def is_real(self) -> bool:
        """Whether there are bytes: not where a compiler traces, nor on the meta device."""
        return is_real(self.qdata)

    def bytes_of(self, part: Part) -> Tensor:
        """All codes, or all scales, as they lie."""
        data: Tensor = getattr(self, part.name)
        return data

    def largest_scale(self) -> int:
        """The largest byte of all scales, read from a device once after each write; 255, the largest that there is,
        where nobody has and a CUDA graph is being captured, and where others hold the bytes, who may write them."""
        if self._writers:
            return 255
        if self.validity.largest_scale is None:
            if self._on_gpu and torch.cuda.is_current_stream_capturing():
                return 255
            with self._outside():
                self.validity.largest_scale = int(self.scale.max()) if self.scale.numel() else 0
        return self.validity.largest_scale

    def order(self, part: Part) -> Order:
        """How codes, or scales, lie now."""
        return self.layout.order(part, self.geometry.gate_up)

    def convert_layout_(self, layout: Layout) -> None:
        """Bring the bytes into a layout, in place, once, whatever number of threads ask.

        Raises:
            RuntimeError: the layout is locked, or a CUDA graph is being captured, which would replay the change.
        """
        with self.lock:
            self.check_readable()
            if layout is self.layout:
                return
            locked = self.locked_layout
            if locked is not None and not locked.same_bytes(layout, self.geometry.gate_up):
                raise RuntimeError(
                    f"the bytes were handed out by as_kernel_operands(), captured in a CUDA graph, or agreed on with "
                    f"other ranks by agree_(), laid out as {locked.name!r}, so they cannot be brought into "
                    f"{layout.name!r} under their holder; release() the operands, or clone() the tensor"
                )
            self._permutation(layout)()

    def _permutation(self, layout: Layout) -> Callable[[], None]:
        """What brings the bytes into a layout. All that may fail has been done when it is called."""
        if self.layout.same_bytes(layout, self.geometry.gate_up):
            return partial(setattr, self.validity, "layout", layout)
        move = f"{self.layout.name!r} to {layout.name!r}"
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a weight would be laid out anew ({move}) while a CUDA graph is being captured, and again at every "
                "replay; call shuffled_tensor.prepare(module) before the capture"
            )
        with self._outside():
            # what another process may be reading is left as it is, and replaced
            parts = [torch.empty_like(data) if self.is_shared() else data for data in (self.qdata, self.scale)]
            orders = [(by.order(part, self.geometry.gate_up), part) for by in (self.layout, layout) for part in PARTS]
            scratch = self.qdata.new_empty(max(order.scratch(self.bytes_of(part)) for order, part in orders))
        return partial(self._move, layout, parts, scratch, f"changing its layout from {move}")

    def _move(self, layout: Layout, parts: list[Tensor], scratch: Tensor, what: str) -> None:
        in_place = parts[0] is self.qdata
        self._fence()
        with self._outside(), self.validity.changing():
            if in_place:
                self.validity.touch(what)
            for part, data in zip(PARTS, parts, strict=True):
                self.order(part).unshuffle(self.bytes_of(part), out=data, scratch=scratch)
                layout.order(part, self.geometry.gate_up).shuffle(data, out=data, scratch=scratch)
            self._synchronize()  # others will read them as soon as this returns
            if not in_place:  # who still has the old bytes has them as they are
                owners.register(None, Validity(self.layout, self.row_order), self.qdata, self.scale)
                self.qdata, self.scale = parts
                self.sent = False
            self.validity.layout = layout
        self.own()

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Nobody traces what is done inside, except where a weight is made in a traced function: it is laid out in its
        graph."""
        modes = _disable_current_modes() if self.is_real else nullcontext()
        with modes, torch.no_grad(), self._made_in():
            yield

    def _made_in(self) -> AbstractContextManager[None]:
        """The inference mode in which the bytes were made, outside which they cannot be written.

        Entered only where it is another: torch's own, where an interrupt meets it as it is entered or left, brings back
        the state of its thread at some later moment, when nothing of that is true any more.
        """
        mode = self.qdata.is_inference()
        return nullcontext() if torch.is_inference_mode_enabled() == mode else torch.inference_mode(mode)

    @property
    def _on_gpu(self) -> bool:
        return self.qdata.device.type == "cuda" and self.is_real

    def _fence(self) -> None:
        """Wait until nobody reads the bytes any more: calls of other threads, and kernels on any stream."""
        for call in tuple(self.running):
            with call:
                self.running.discard(call)
        self._synchronize()

    def _synchronize(self) -> None:
        """Writes are rare: a fence around each costs less than to know which streams read."""
        if self._on_gpu and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.qdata.device)

    def is_shared(self) -> bool:
        """Whether another process may hold this memory, so that a change of layout must replace it."""
        return self.sent or any(data.device.type == "cpu" and data.is_shared() for data in (self.qdata, self.scale))

    def check_refit(self, row_order: RowOrder | None) -> None:
        """Raise RuntimeError where :meth:`open_refit` could not open one."""
        if self.validity.state is State.REFIT:
            raise RuntimeError("a refit of this weight is open already")
        if self.is_shared() and self.layout is not self.row_major(row_order):
            raise RuntimeError(
                "another process may hold these bytes as they lie, so they cannot be refitted in place; write "
                "them with copy_ or load_state_dict"
            )

    def open_refit(self, refit: object, row_order: RowOrder | None, whole: bool = False) -> None:
        """Make the bytes row-major, where they are, for others to write; until the refit ends they are no weight.

        A refit that is to write the ``whole`` finds no bytes of a weight. So does one of bytes that are none already,
        as after a refit that ended early.
        """
        with self.lock:
            self.check_refit(row_order)
            before, row_major = self.layout, self.row_major(row_order)
            if whole or self.validity.state is State.INVALID:
                self._fence()
                self.validity.open_refit(refit, before)
                self.validity.layout = row_major
                with self._outside():
                    self._unwritten = Unwritten.fill(self.geometry, self.qdata, self.scale)
            else:
                make_row_major = self._permutation(row_major)
                self.validity.open_refit(refit, before)
                make_row_major()
            self._fence()

    def close_refit(self) -> None:
        """Take the row-major bytes for the new values, with their pads, and lay them out as they were before.

        Raises:
            RuntimeError: it had to write everything, and has not.
        """
        with self.lock:
            self._synchronize()
            if self._unwritten is not None:
                interleaved = self.layout is not ROW_MAJOR
                with self._outside():
                    self._unwritten.check(self.geometry, self.qdata, self.scale, interleaved=interleaved)
            self._recover()

    def assume(self, layout: Layout) -> None:
        """Believe the caller that the bytes are a weight in this layout."""
        with self.lock:
            if self.validity.state is State.REFIT:
                raise RuntimeError("a refit is open, and says what the bytes are when it ends")
            self._fence()
            self.validity.layout = layout
            if layout not in ROW_ORDERS.values():
                self.validity.layout_after_refit = None
            self._recover()

    def give_up(self) -> None:
        """Hold no memory any more, until :meth:`take`."""
        with self.lock:
            self._fence()
            self.validity.give_up()
            self._owned = None
            self.qdata, self.scale = (data.new_empty(1).expand(data.shape) for data in (self.qdata, self.scale))

    def take(self, qdata: Tensor, scale: Tensor) -> None:
        """Other memory of the same sizes, in which nothing is a weight yet: it is to be written in the layout that the
        bytes had."""
        with self.lock:
            self.validity.give_up()
            self.qdata, self.scale = qdata, scale
            self.own()

    def touch(self) -> None:
        """To be called inside :meth:`writing` just before a byte is written, when nothing else can fail."""
        self.validity.touch("writing to it")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else lays the bytes out anew or writes them meanwhile."""
        with self.lock:
            self.check_readable()
            yield

    @contextmanager
    def writing(self, whole: bool = False) -> Iterator[None]:
        """Hold the bytes for a write; ``whole`` says that it leaves nothing as it was, so that what was wrong before is
        over. An exception after :meth:`touch` leaves them unusable."""
        if self.is_real and active_fake_mode() is not None:
            raise RuntimeError("a weight that has bytes is not written under FakeTensorMode, where values have none")
        # bytes made in inference mode are written in it, wherever the writer is
        with self.lock, torch.no_grad(), self._made_in():
            with self.validity.changing() as outermost:
                if outermost:
                    self._fence()
                yield
            if outermost:
                if whole and self.validity.state is State.INVALID:
                    self._recover()
                self._synchronize()

    def _recover(self) -> None:
        """The bytes are a weight in `layout` again; bring them into the one that they should have."""
        self._part_rows()
        layout = self.validity.layout_after_refit or self.locked_layout or self.layout
        if self.layout is ROW_MAJOR:
            self._rewrite_pads()
        if layout is not self.layout:
            self._permutation(layout)()
        self._unwritten = None
        self.validity.recover()
        self._synchronize()

    def _part_rows(self) -> None:
        """Row-major bytes in any order of rows become gate rows, then up rows."""
        if self.layout in ROW_ORDERS.values() and self.layout is not ROW_MAJOR:
            self._permutation(ROW_MAJOR)()

    def check_readable(self) -> None:
        """Raise RuntimeError where the bytes are not a weight: while a refit writes them, and after one failed."""
        if self.validity.state is not State.VALID:
            with self.lock:  # another thread may just be changing the layout
                self.validity.check()

    @property
    def fixed_layout(self) -> Layout | None:
        """The one that the bytes are in whenever somebody computes with them; None where who computes decides."""
        return self.locked_layout or self.requested_layout

    def check_usable_as(self, layout: Layout) -> None:
        """Raise ValueError where a reader of ``layout`` meets a weight that was made for another one."""
        fixed = self.requested_layout
        if fixed is not None and not fixed.same_bytes(layout, self.geometry.gate_up):
            raise ValueError(
                f"the weight was made for shuffle_kind={fixed.name!r}, but {layout.name!r} is asked for; make it "
                f"without a shuffle_kind, or call shuffle_({layout.name!r})"
            )

    def lock_layout(self, *, writes: bool = True) -> Callable[[], None]:
        """Keep the bytes as they lie, for somebody outside, who perhaps writes them; what ends that, once everybody who
        asked has called it."""
        holder = object()

        def release() -> None:
            with self.lock:
                self._holders.discard(holder)
                self._writers.discard(holder)
                self.validity.largest_scale = None
                if not self._holders:
                    self.locked_layout = None

        with self.lock:
            self._holders.add(holder)
            if writes:
                self._writers.add(holder)
            self.locked_layout = self.layout
        return release

    @property
    def handed_out(self) -> bool:
        """Whether somebody outside holds these very bytes; ranks that agreed on their layout do not."""
        return bool(self._holders - {_RANKS})

    def agree(self, ranks: frozenset[int]) -> None:
        """Keep the layout from now on: the same weights of these ranks lie alike. Others that agreed before stay."""
        with self.lock:
            before = self.agreed.ranks if self.agreed is not None and self.agrees(self.agreed.ranks) else frozenset()
            self._holders.add(_RANKS)
            self.locked_layout = self.layout
            self.agreed = Agreement(before | ranks, self.layout)

    def agrees(self, ranks: Iterable[int]) -> bool:
        """Whether the bytes lie as all of these ranks agreed that they do."""
        agreed = self.agreed
        return (
            agreed is not None
            and agreed.ranks.issuperset(ranks)
            and agreed.layout.same_bytes(self.layout, self.geometry.gate_up)
        )

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Around the start of what writes bytes of another rank, as they lie, on the current stream: who waits for it
        knows when they are there, as with a plain tensor. An exception leaves these bytes unusable."""
        with self.lock, torch.no_grad(), self._made_in(), self.validity.changing():
            self.validity.touch("receiving bytes of another rank")
            yield

    def received(self, layout: Layout) -> None:
        """All bytes are those of other ranks, laid out so; work that the current stream waits for has written them.

        Raises:
            RuntimeError: the layout is locked to another one.
        """
        with self.lock:
            locked = self.locked_layout
            if locked is not None and not locked.same_bytes(layout, self.geometry.gate_up):
                raise RuntimeError(
                    f"bytes laid out as {layout.name!r} have come into a weight that somebody holds as "
                    f"{locked.name!r}; release() its operands"
                )
            self.validity.layout = layout
            self.validity.recover()
            self.own()  # the memory may be other one

    def select(self, experts: range) -> tuple[Tensor, Tensor]:
        """Codes and scales of some experts, as they lie: views."""
        if len(experts) == self.qdata.shape[0]:
            return self.qdata, self.scale
        return self.qdata[slice_of(experts)], self.scale[slice_of(experts)]

    def canonical(self, experts: range) -> tuple[Tensor, Tensor]:
        """Row-major logical codes ``[len, N, K/2]`` and scales ``[len, N, K/32]`` of some experts, in memory of their
        own."""
        qdata, scale = self.halves(experts, range(self.geometry.rows // self.geometry.halves))
        return qdata.flatten(1, 2), scale.flatten(1, 2)

    def halves(self, experts: range, rows: range) -> tuple[Tensor, Tensor]:
        """The same rows of each half of some experts: row-major logical codes ``[len, halves, rows, K/2]`` and scales,
        in memory of their own. Only the tiles that hold them are unshuffled."""
        with self.held():
            halves, tile = self.geometry.halves, self.layout.row_tile(self.geometry.gate_up)
            tiles = range(rows.start // tile * tile, round_up(rows.stop, tile))
            own = slice(rows.start - tiles.start, rows.stop - tiles.start)

            def of(part: Part, data: Tensor) -> Tensor:
                order = self.order(part)
                found: Tensor = order.unshuffle(order.tiles(data, halves, tiles)).unflatten(1, (halves, -1))
                return found[:, :, own, : self.geometry.columns // part.per_byte]

            qdata, scale = map(of, PARTS, self.select(experts))
        return qdata, scale

    def whole_rows(self, window: Window) -> bool:
        """Whether a window takes experts alone apart, not their rows and columns."""
        return window.shape[1:] == (self.geometry.rows, self.geometry.columns)

    def whole(self) -> Window:
        """The window of everything."""
        return Window(self.experts, range(self.geometry.rows), range(self.geometry.columns))

    def read(self, window: Window, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """Row-major logical codes ``[len, rows, columns / 2]`` and scales ``[len, rows, columns / 32]`` of a window,
        whose rows are numbered in either order."""
        each = self.geometry.rows // self.geometry.halves
        half = min(window.rows.start // max(1, each), self.geometry.halves - 1)
        first, last = window.rows.start - half * each, window.rows.stop - half * each
        if interleaved:
            pairs = range(window.rows.start // 2, (window.rows.stop + 1) // 2)
            own = slice(window.rows.start - 2 * pairs.start, window.rows.stop - 2 * pairs.start)
            parts = [data.transpose(1, 2).flatten(1, 2)[:, own] for data in self.halves(window.experts, pairs)]
        elif last <= each:
            parts = [data[:, half] for data in self.halves(window.experts, range(first, last))]
        else:
            parts = [data[:, slice_of(window.rows)] for data in self.canonical(window.experts)]
        qdata, scale = (data[..., slice_of(window.columns, part)] for part, data in zip(PARTS, parts, strict=True))
        return qdata, scale

    def write(self, window: Window, qdata: Tensor | None, scale: Tensor | None, *, interleaved: bool = False) -> None:
        """Write logical row-major codes, scales or both over a window, whose rows are numbered in either order, in
        whatever layout it lies, with the pads of its experts."""
        given = zip(PARTS, (qdata, scale), strict=True)
        parts = [(part, values.to(self.qdata.device)) for part, values in given if values is not None]
        with self.writing():
            for part, values in parts:
                self._write_part(part, window, values, interleaved)

    def _write_part(self, part: Part, window: Window, values: Tensor, interleaved: bool) -> None:
        put = partial(self.geometry.put, interleaved=interleaved)
        geometry, order, own = self.geometry, self.order(part), self.bytes_of(part)
        if self._unpadded(window) and not interleaved and values.is_contiguous() and not values.storage_offset() % 16:
            self._lay_out(order, values, own[slice_of(window.experts)])
            return
        for place, experts in self.chunks(window.experts):
            target = own[slice_of(experts)]
            if self.layout is ROW_MAJOR:
                self.touch()
                put(part, target, values[place], window.rows, window.columns)
                geometry.rewrite_pads(part, target)  # whoever had the memory before may have changed them
            elif self.whole_rows(window):
                self._lay_out(order, geometry.pad(part, values[place], interleaved=interleaved), target)
            else:  # what is not written stays, but for pads
                around = order.unshuffle(target.contiguous())
                put(part, around, values[place], window.rows, window.columns)
                geometry.rewrite_pads(part, around)
                self._lay_out(order, around, target)

    def _lay_out(self, order: Order, row_major: Tensor, target: Tensor) -> None:
        """Write over whole experts."""
        if target.is_contiguous() and self.is_real:
            self.touch()
            order.shuffle(row_major, out=target)
        else:
            laid_out = order.shuffle(row_major)
            self.touch()
            target.copy_(laid_out)

    def _unpadded(self, window: Window) -> bool:
        """Whether a window shows whole experts, and these have no padding."""
        alike = all(self.geometry.shape(part) == self.geometry.padded_shape(part) for part in PARTS)
        return alike and self.whole_rows(window)

    def plain(self, window: Window) -> tuple[Tensor, Tensor] | None:
        """Codes and scales as :meth:`read` gives them, without a copy, where they lie so."""
        return self.select(window.experts) if self.layout is ROW_MAJOR and self._unpadded(window) else None

    def _rewrite_pads(self) -> None:
        """Of row-major bytes, which somebody else wrote."""
        with torch.no_grad(), self._made_in():
            for part in PARTS:
                self.geometry.rewrite_pads(part, self.bytes_of(part))

    def chunks(self, experts: range) -> Iterator[tuple[slice, range]]:
        """Parts of a window small enough that a float32 copy of one is bounded scratch: the part's place in the window,
        and its experts."""
        for place in expert_chunks(len(experts), 4 * self.geometry.rows * self.geometry.columns):
            yield place, experts[place]

    def dequantize(self, window: Window, dtype: torch.dtype) -> Tensor:
        """Logical values ``[len, rows, columns]``."""
        # whoever makes a fake one of a view of a weight enters no fake mode
        fake = self.qdata.fake_mode if isinstance(self.qdata, FakeTensor) else nullcontext()
        with self.held(), fake:  # all of it at one time
            out = torch.empty(window.shape, dtype=dtype, device=self.qdata.device)
            for place, experts in self.chunks(window.experts):
                out[place] = mxfp4.dequantize(*self.read(window._replace(experts=experts)), dtype)
        return out

    def checksum(self, window: Window) -> str:
        """Of the logical value."""
        with self.held():
            return checksum(window.shape, (data for expert in self._by_expert(window) for data in expert))

    def checksums(self, window: Window) -> Checksums:
        """Of the logical value, and of each expert's."""
        with self.held():
            return checksums(window.shape, self._by_expert(window))

    def _by_expert(self, window: Window) -> Iterator[tuple[Tensor, ...]]:
        for expert in window.experts:
            yield self.read(window._replace(experts=range(expert, expert + 1)))


@cache  # every call of a layer asks
def _padded_alike(one: Geometry, other: Geometry) -> bool:
    return one.sizes == other.sizes


@contextmanager
def locked(*storages: PackedStorage) -> Iterator[None]:
    """Take several locks, in one order, so that no two threads wait for each other."""
    if not storages:
        yield
        return
    first, *others = sorted(storages, key=id)
    # of nothing but `with` is it sure that no interrupt leaves a lock behind
    with first.lock, others[0].lock if len(others) == 1 else locked(*others):
        yield


@contextmanager
def reading(storages: Sequence[PackedStorage], begin: Callable[[], _Begun]) -> Iterator[_Begun]:
    """Around a call that reads the bytes, which nobody changes meanwhile, without their locks.

    ``begin``, whose result is given, is called under these: it looks how the bytes lie, and may lay them out. A CUDA
    graph that is being captured reads them so at every replay, so their layouts stay.
    """
    running = threading.RLock()
    with running:
        with locked(*storages):
            begun = begin()
            for storage in storages:
                storage.running.add(running)
                if storage._on_gpu and torch.cuda.is_current_stream_capturing():
                    storage.lock_layout(writes=False)
        try:
            yield begun
        finally:
            for storage in storages:
                storage.running.discard(running)


def _in_child() -> None:
    # The threads that held these locks when this process was forked are not in it.
    for storage in owners.owners():
        if not storage.lock._is_owned():
            storage.lock, storage.running = threading.RLock(), set()
            storage.validity.forked()


os.register_at_fork(after_in_child=_in_child)
