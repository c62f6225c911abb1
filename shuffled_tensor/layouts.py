# SPDX-License-Identifier: MIT
"""The byte orders that kernels for gfx950 read, and how to get there and back.

A layout is one row of :data:`LAYOUTS`: einops patterns whose left-hand side is the row-major tensor and whose
right-hand side, read flat, is the order in memory. Everything else about it is derived from the patterns. The inverse
is not written anywhere: a pattern makes a *view*, and writing through that view undoes what reading through it does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from shuffled_tensor import owners
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, Part, check_tensor
from shuffled_tensor.owners import is_real

__all__ = [
    "LAYOUTS",
    "ROW_MAJOR",
    "ROW_ORDERS",
    "Layout",
    "Mover",
    "check_gate_up",
    "find_layout",
    "install",
    "layout_or_none",
    "name_or_none",
    "shuffle_scale",
    "shuffle_weight",
    "unshuffle_scale",
    "unshuffle_weight",
]

MAX_SCRATCH = 64 << 20
"""Bytes of scratch that an in-place operation takes at most, unless one expert is larger."""

# On a CPU, scratch that stays in its caches; a GPU wants few launches.
_IN_PLACE_SCRATCH = {"cpu": 8 << 20}

_VECTOR = 16
"""Bytes. A CPU that copies fewer of them at a stretch spends its time entering loops."""


class Mover:
    """What brings bytes into an order faster than torch's own copies do. This one moves none."""

    def scratch(self, order: Order, data: Tensor) -> int | None:
        """Bytes of scratch for moving uint8 ``[E, N, bytes]`` in place, either way; None where it cannot."""
        return None

    def move(self, order: Order, source: Tensor, target: Tensor, held: Tensor | None, *, inverse: bool) -> bool:
        """Write ``target`` from ``source``, in place where there is scratch for that, ``held``.

        Returns:
            False where it cannot; nothing has been written then.
        """
        return False


_mover = Mover()


def install(mover: Mover) -> None:
    """Have this one tried first from now on."""
    global _mover
    _mover = mover


_SIZES = {"g": 2, "r": 16, "h": 2, "t": 2, "q": 4}


@dataclass(frozen=True)
class Order:
    """A permutation of one expert's codes or scales.

    ``pattern`` splits the rows into axes with ``n`` among them, and the columns (runs of 16 bytes of codes, single
    bytes of scales) into axes with ``c``; those two have the sizes that are left. ``g`` is gate and up; where it is
    absent, a gate-up weight is laid out half by half.
    """

    part: Part
    pattern: str
    sizes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        self._axes  # noqa: B018  (a pattern that is none is found here, not when a weight is first laid out)

    @cached_property
    def _axes(self) -> tuple[list[str], list[str], list[str]]:
        """Those of the rows, of the columns, and of memory."""
        match = re.fullmatch(r"e (\w|\([\w ]+\)) (\w|\([\w ]+\)) -> e ([\w ]+)", self.pattern)
        rows, columns, memory = ([*re.sub(r"[() ]", "", group)] for group in match.groups()) if match else ([], [], [])
        if "n" not in rows or "c" not in columns or sorted(rows + columns) != sorted(memory) or "g" in rows[1:]:
            raise ValueError(
                f"a layout's pattern is 'e (rows) (columns) -> e ...', n among the rows, perhaps behind g, and c among "
                f"the columns, found {self.pattern!r}"
            )
        return rows, columns, memory

    @cached_property
    def row_tile(self) -> int:
        """Rows, of each half where gate and up are interleaved, in whose tiles no other row has a byte."""
        return math.prod(dict(self.sizes)[axis] for axis in self._axes[0] if axis not in "ng")

    @property
    def interleaved(self) -> bool:
        """Whether the tiles hold rows of both halves, gate and up."""
        return "g" in self._axes[0]

    @property
    def rows(self) -> int:
        """N, the rows of one expert, must be a multiple of this."""
        return self.row_tile * (2 if self.interleaved else 1)

    @property
    def columns(self) -> int:
        """K, the logical columns, must be a multiple of this."""
        tile = math.prod(dict(self.sizes)[axis] for axis in self._axes[1] if axis != "c")
        return tile * self.part.element.itemsize * self.part.per_byte

    @property
    def _is_row_major(self) -> bool:
        rows, columns, memory = self._axes
        return memory == rows + columns  # nothing changes its place

    def shuffle(self, data: Tensor, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """From row-major uint8 ``[E, N, bytes]`` into this order; in place where ``out`` is the memory of ``data``, by
        way of flat uint8 ``scratch``, at least what :meth:`scratch` says, or of some that is made."""
        return self._move(data, out, scratch, inverse=False)

    def unshuffle(self, data: Tensor, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`shuffle`."""
        return self._move(data, out, scratch, inverse=True)

    def scratch(self, data: Tensor) -> int:
        """Bytes that moving uint8 ``[E, N, bytes]`` in place needs: as many experts as go at a time, where that is done
        by way of scratch."""
        if self._is_row_major:
            return 0
        needed = _mover.scratch(self, data)
        return self._at_a_time(data) * data[:1].numel() if needed is None else needed

    def _at_a_time(self, data: Tensor) -> int:
        limit = _IN_PLACE_SCRATCH.get(data.device.type, MAX_SCRATCH)
        return next(expert_chunks(len(data), data[:1].nbytes, limit), slice(0)).stop

    def tiles(self, data: Tensor, halves: int, rows: range) -> Tensor:
        """Some rows (from a multiple of :attr:`row_tile` to another) of each half of experts that lie in this order, in
        this order: whole tiles. All of them are the tensor itself."""
        shape = self._memory_shape(data)
        place = 1 + self._axes[2].index("n")
        apart = 1 if self.interleaved else halves
        inner = math.prod(shape[place + 1 :]) * self.part.element.itemsize
        tiled = data.view(*shape[:place], apart, shape[place] // apart, inner)
        chosen = slice(rows.start // self.row_tile, rows.stop // self.row_tile)
        picked: Tensor = tiled[(slice(None),) * (place + 1) + (chosen,)].contiguous()
        return picked.view(len(data), halves * len(rows), data.shape[-1])

    def _memory_shape(self, data: Tensor) -> list[int]:
        """The size of each axis in the order of memory, the experts' first."""
        rows, columns, memory = self._axes
        width = data.shape[-1] // self.part.element.itemsize
        sizes = dict(self.sizes)
        sizes["n"] = data.shape[-2] // math.prod(sizes[axis] for axis in rows if axis != "n")
        sizes["c"] = width // math.prod(sizes[axis] for axis in columns if axis != "c")
        return [len(data), *(sizes[axis] for axis in memory)]

    def _move(self, data: Tensor, out: Tensor | None, scratch: Tensor | None, *, inverse: bool) -> Tensor:
        in_place = out is not None and same_memory(data, out)
        if self._is_row_major:
            return data if in_place else data.clone() if out is None else out.copy_(data)
        if out is None:
            out = torch.empty_like(data, memory_format=torch.contiguous_format)
        if data.numel() == 0:
            return out
        if not in_place:
            self._permute(data, out, inverse)
            return out
        scratch = data.new_empty(self.scratch(data)) if scratch is None else scratch
        if _mover.move(self, out, out, scratch, inverse=inverse):
            return out
        each = data[0].numel()
        if len(scratch) < each:  # it was asked for before the mover was found unable
            scratch = data.new_empty(each)
        some = min(self._at_a_time(data), len(scratch) // each)  # it may have been taken for larger experts, or fewer
        free = scratch[: some * each].view(some, *data.shape[1:])
        for start in range(0, len(out), some):
            chunk = out[start : start + some]
            self._permute(free[: len(chunk)].copy_(chunk), chunk, inverse)
        return out

    def _permute(self, source: Tensor, target: Tensor, inverse: bool) -> None:
        if _mover.move(self, source, target, None, inverse=inverse):
            return
        source, target = (tensor.view(self.part.element) for tensor in (source, target))
        rows, columns, memory = self._axes
        sizes = {axis: size for axis, size in self.sizes if axis in rows + columns}
        tiled = rearrange(target if inverse else source, self.pattern, **sizes)  # a view: axes are split and permuted
        flat = (source if inverse else target).view(tiled.shape)
        read, written = (flat, tiled) if inverse else (tiled, flat)
        short: list[range] = []  # the innermost axes, where they are few bytes together
        if source.device.type == "cpu" and is_real(source):  # a compiler makes loops of its own
            nbytes = source.element_size()
            for size in reversed(tiled.shape[-len(memory) :]):
                nbytes *= size
                if nbytes >= _VECTOR:
                    break
                short.insert(0, range(size))
        for place in product(*short):
            at: tuple[Any, ...] = (..., *place)
            written[at].copy_(read[at])


@dataclass(frozen=True, eq=False)
class Layout:
    """A row of :data:`LAYOUTS`.

    Attributes:
        name: as in ``shuffle_kind="mxfp4_moe"``.
        down: the patterns of codes and of scales of a weight without gate and up (w2).
        gate_up: and those of one that has gate rows, then up rows (w13).
        sizes: of the patterns' axes but ``e``, ``n`` and ``c``.
    """

    name: str
    down: tuple[str, str]
    gate_up: tuple[str, str]
    sizes: tuple[tuple[str, int], ...] = tuple(_SIZES.items())

    def __post_init__(self) -> None:
        self._orders  # noqa: B018  (its patterns are looked at now)

    @cached_property
    def _orders(self) -> dict[tuple[Part, bool], Order]:
        return {
            (part, gate_up): Order(part, pattern, self.sizes)
            for gate_up, patterns in ((False, self.down), (True, self.gate_up))
            for part, pattern in zip(PARTS, patterns, strict=True)
        }

    def order(self, part: Part, gate_up: bool) -> Order:
        """How codes, or scales, of a weight with or without gate and up lie."""
        return self._orders[part, gate_up]

    def same_bytes(self, other: Layout, gate_up: bool) -> bool:
        """Whether a weight lies in both layouts alike."""
        return all(self.order(part, gate_up) == other.order(part, gate_up) for part in PARTS)

    def row_tile(self, gate_up: bool) -> int:
        """Rows of each half in whose tiles, of codes and of scales, no other row has a byte."""
        return math.lcm(*(self.order(part, gate_up).row_tile for part in PARTS))

    def __repr__(self) -> str:
        return f"Layout({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return find_layout, (self.name,)  # a copy is the row itself: layouts are compared by identity


ROW_MAJOR = Layout("none", down=("e n c -> e n c",) * 2, gate_up=("e n c -> e n c",) * 2)
"""Gate rows, then up rows, as a checkpoint's tensors have them."""

ROW_ORDERS = {
    "contiguous": ROW_MAJOR,
    "interleaved": Layout("interleaved rows", ROW_MAJOR.down, gate_up=("e (g n) c -> e n g c",) * 2),
}
"""How bytes lie that come from outside: gate rows, then up rows; or a gate row, its up row, and so on."""

_TILED = ("e (n r) c -> e n c r", "e (n h r) (c t q) -> e n c q r t h")

LAYOUTS = {
    layout.name: layout
    for layout in (
        ROW_MAJOR,
        # 16 gate rows, 16 up rows, and so on, then tiled ("GUGU")
        Layout("mxfp4_moe", down=_TILED, gate_up=("e (g n r) c -> e n g c r", "e (g n r) (c t q) -> e n c q r t g")),
        # gate rows, then up rows, then tiled ("GGUU"); a down weight is the same bytes as in the row above
        Layout("mxfp4_separated", down=_TILED, gate_up=_TILED),
    )
}


def find_layout(name: str) -> Layout:
    """The row of :data:`LAYOUTS` of that name.

    Raises:
        ValueError: there is none.
    """
    found = LAYOUTS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown shuffle_kind {name!r}; known: {', '.join(map(repr, LAYOUTS))}")
    return found


def layout_or_none(shuffle_kind: str | None) -> Layout | None:
    """The layout that a caller, a file or another process has fixed by its name, or None.

    Raises:
        ValueError: as :func:`find_layout`.
    """
    return None if shuffle_kind is None else find_layout(shuffle_kind)


def name_or_none(layout: Layout | None) -> str | None:
    """The other way round."""
    return None if layout is None else layout.name


def check_gate_up(gate_up: bool) -> None:
    """Raise TypeError for anything but True and False: None, a string and 1 would each mean something else to
    somebody."""
    if not isinstance(gate_up, bool):
        raise TypeError(
            f"gate_up must be True (gate rows, then up rows: w13) or False (rows of one kind: w2), found {gate_up!r}"
        )


def shuffle_weight(qdata: Tensor, shuffle_kind: str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """Lay packed fp4 codes out.

    Args:
        qdata: uint8 ``[E, N, K/2]`` (or ``[N, K/2]``, one expert), row-major, two codes a byte; gate rows then up rows
            when ``gate_up``.
        shuffle_kind: the name of a layout. ``"none"`` copies.
        gate_up: whether the rows are two stacked halves, gate and up (w13), or one (w2).
        out: where to write; ``qdata`` itself, or another tensor over just its memory, permutes in place, expert by
            expert, in scratch of at most 64 MiB or one expert, whichever is larger.

    Returns:
        ``out``, or a new tensor: uint8, contiguous, of the shape of ``qdata``.

    Raises:
        TypeError: not a uint8 tensor, or a ``gate_up`` that is neither True nor False.
        ValueError: an unknown layout, another rank than 2 or 3, sizes that do not tile, or an ``out`` that cannot take
            the result, such as one that shares a part of the memory of ``qdata``.
    """
    return _apply(CODES, qdata, shuffle_kind, gate_up, out, inverse=False)


def unshuffle_weight(qdata: Tensor, shuffle_kind: str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """The exact inverse of :func:`shuffle_weight`: back to row-major. Same arguments, same errors."""
    return _apply(CODES, qdata, shuffle_kind, gate_up, out, inverse=True)


def shuffle_scale(scale: Tensor, shuffle_kind: str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """Lay e8m0 scales out: uint8 ``[E, N, K/32]`` (or ``[N, K/32]``). Otherwise as :func:`shuffle_weight`."""
    return _apply(SCALES, scale, shuffle_kind, gate_up, out, inverse=False)


def unshuffle_scale(scale: Tensor, shuffle_kind: str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """The exact inverse of :func:`shuffle_scale`. Same arguments, same errors."""
    return _apply(SCALES, scale, shuffle_kind, gate_up, out, inverse=True)


def _apply(part: Part, data: Tensor, name: str, gate_up: bool, out: Tensor | None, *, inverse: bool) -> Tensor:
    layout = find_layout(name)
    check_gate_up(gate_up)
    _check_input(part, data, out)
    if not inverse:
        owners.check_row_major(part.name, data)
    if layout is ROW_MAJOR:  # of whatever size
        return data.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(data)
    order = layout.order(part, gate_up)
    _check_sizes(part, data, layout, gate_up)
    experts = data if data.dim() == 3 else data.unsqueeze(0)
    into = out if out is None or out.dim() == 3 else out.unsqueeze(0)
    done = order.unshuffle(experts, into) if inverse else order.shuffle(experts, into)
    return done.view(data.shape) if out is None else out


def expert_chunks(experts: int, bytes_per_expert: int, limit: int = MAX_SCRATCH) -> Iterator[slice]:
    """Slices over the expert dimension that each hold one expert, or as many as fit the limit."""
    step = max(1, limit // max(1, bytes_per_expert))
    return (slice(start, min(start + step, experts)) for start in range(0, experts, step))


def _check_input(part: Part, data: Tensor, out: Tensor | None) -> None:
    for name, tensor in ((part.name, data), ("out", data if out is None else out)):
        check_tensor(name, tensor)
        if tensor.dtype is not torch.uint8:
            raise TypeError(
                f"{name} must be a uint8 tensor, found {tensor.dtype}; packed fp4 codes and e8m0 scales "
                "are viewed with .view(torch.uint8)"
            )
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"{name} must be [experts, rows, bytes] or [rows, bytes], found shape {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, found strides {tensor.stride()}; call .contiguous()")
        if tensor.storage_offset() % part.element.itemsize:
            raise ValueError(
                f"{name} must start on a multiple of {part.element.itemsize} bytes, found storage offset "
                f"{tensor.storage_offset()}; call .clone()"
            )
    if out is not None and (out.shape != data.shape or out.device != data.device):
        raise ValueError(f"out must be {list(data.shape)} on {data.device}, found {list(out.shape)} on {out.device}")
    if out is not None and _overlap(data, out) and not same_memory(data, out):
        raise ValueError(
            f"out shares a part of the memory of {part.name}, whose bytes would be overwritten before they are read; "
            f"give memory apart from it, or {part.name} itself to shuffle in place"
        )


def same_memory(data: Tensor, out: Tensor) -> bool:
    """Whether two contiguous tensors of one shape are the same bytes, whatever objects they are."""
    if out is data or out.is_set_to(data):  # traced tensors know no memory to compare
        return True
    return is_real(data) and is_real(out) and data.data_ptr() == out.data_ptr()


def _overlap(data: Tensor, out: Tensor) -> bool:
    return is_real(data) and is_real(out) and abs(data.data_ptr() - out.data_ptr()) < data.nbytes


def _check_sizes(part: Part, data: Tensor, layout: Layout, gate_up: bool) -> None:
    order = layout.order(part, gate_up)
    rows, columns = data.shape[-2], data.shape[-1] * part.per_byte
    fill = f"bytes of {part.pad}"
    if rows % order.rows:
        padded = round_up(rows, order.rows)
        how = f"pad gate and up from {rows / 2:g} to {padded // 2} rows each" if gate_up else f"pad to {padded} rows"
        raise ValueError(
            f"N={rows} rows are not a multiple of {order.rows}, which {part} in {layout.name!r} needs: {how}, "
            f"with {fill}"
        )
    if columns % order.columns:
        padded = round_up(columns, order.columns)
        raise ValueError(
            f"K={columns} columns are not a multiple of {order.columns}, which {part} in {layout.name!r} needs: pad to "
            f"K={padded}, with {fill}"
        )


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
