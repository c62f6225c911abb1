# SPDX-License-Identifier: MIT
"""The tensor: a logical value, and the packed storage that holds it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import ROW_MAJOR, ROW_ORDERS, expert_chunks, find_layout, layout_or_none, name_or_none
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, Part, ScaleRule
from shuffled_tensor.owners import is_real
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.base import Operations
from shuffled_tensor.tensor.checks import (
    check_high_precision,
    check_logical_dtype,
    check_parts,
    check_plain,
    check_row_order,
    whole_numbers,
)
from shuffled_tensor.tensor.geometry import ALIGN, Align, RowOrder, ShardDim, align_of, shard_range, slice_of
from shuffled_tensor.tensor.part_view import PartView
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.policy import KernelOperands
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.wrapper import Wrapper

__all__ = ["ShuffledMXFP4Tensor"]


_Constructor = TypeVar("_Constructor", bound=Callable[..., Any])


def _or_made_again(constructor: _Constructor) -> _Constructor:
    """Also take a weight alone, as loaders remake a parameter: ``type(parameter)(data, requires_grad=...,
    **vars(parameter))``. What comes out is a Parameter over the same bytes, with these attributes."""

    @functools.wraps(constructor)
    def new(cls: type[ShuffledMXFP4Tensor], *args: Any, **named: Any) -> Any:
        if len(args) != 1 or "scale" in named:
            return constructor(cls, *args, **named)
        if not isinstance(args[0], cls):
            raise TypeError(
                f"a ShuffledMXFP4Tensor is made of qdata and scale, found a {type(args[0]).__name__} alone; quantise "
                "float weights with ShuffledMXFP4Tensor.from_hp"
            )
        fixed = sorted(named.keys() & {"gate_up", "row_order", "shuffle_kind", "dtype", "align"})
        if fixed:
            raise TypeError(
                f"a ShuffledMXFP4Tensor is taken as it is, so {', '.join(fixed)} cannot be given with it; .to(dtype) "
                "and shuffle_(shuffle_kind) change it"
            )
        made = torch.nn.Parameter(args[0], requires_grad=False)
        vars(made).update({name: value for name, value in named.items() if name != "requires_grad"})
        return made

    return new  # type: ignore[return-value]


class ShuffledMXFP4Tensor(Wrapper):
    """E experts of N x K numbers in MXFP4, whose bytes may lie in the order that a kernel wants.

    The tensor *is* its logical value: shape ``[E, N, K]`` (or ``[N, K]``, one expert) and a floating-point dtype. In
    which order the bytes lie is recorded beside the bytes, in a state that every alias of them shares, so that no
    ``nn.Parameter``, ``detach`` or ``state_dict`` can part the two.

    A packed weight never requires grad: ``requires_grad_`` leaves it as it is.

    Args:
        qdata: two fp4 codes a byte, the even column in the low nibble, row-major: uint8, int8 or float4_e2m1fn_x2 ``[E,
            N, K/2]`` (or ``[N, K/2]``).
        scale: e8m0 scales: uint8 or float8_e8m0fnu ``[E, N, K/32]`` (or ``[N, K/32]``).
        gate_up: whether the rows are the gate and the up projection of one layer (w13), or a single one (w2).
        row_order: how ``gate_up`` rows come: ``"contiguous"`` (all gate rows, then all up rows) or ``"interleaved"``
            (g0, u0, g1, u1, ..., as in gpt-oss checkpoints). Required with ``gate_up``, because a wrong guess is
            silent. Held as contiguous: the logical value has gate rows first.
        shuffle_kind: fixes the layout to be shuffled into; None leaves that to the backend that first uses the tensor.
        dtype: the logical dtype: bfloat16, float16, float32 or float64.
        align: what rows (of gate and of up each) and columns are padded to multiples of: 32, 64, 128 or 256, or two of
            them, (rows, columns). Less may keep kernels from a weight. Scales are padded further, to
            what a layout needs: columns to a multiple of 256.

    The constructor takes ownership of its tensors: a later shuffle rewrites their bytes. Where another weight owns them
    it copies, and where sizes are not multiples of ``align``: into rows (each of gate and up) and columns padded with
    zero codes and scale 127; shape, value and checksum never show the padding. What is cut out of the weight, copied or
    joined to it is padded as it is.

    Raises:
        TypeError: a dtype that is none of the above; float weights go through :meth:`from_hp`. A ``gate_up`` that is
            neither True nor False.
        ValueError: a wrong rank, shapes that do not fit each other, experts without rows, K not a multiple of 32,
            tensors on different devices, a missing or unknown ``row_order``, an unknown layout, another ``align``;
            memory of another weight whose bytes are not row-major.
    """

    @_or_made_again
    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        *,
        gate_up: bool,
        row_order: RowOrder | None = None,
        shuffle_kind: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        align: Align = ALIGN,
    ) -> ShuffledMXFP4Tensor:
        check_parts(qdata, scale)
        check_row_order(gate_up, row_order, qdata.shape[-2])
        check_logical_dtype(dtype)
        layout, pair = layout_or_none(shuffle_kind), align_of(align)
        with torch.no_grad():
            qdata, scale = (data.detach().view(torch.uint8) for data in (qdata, scale))
            rank = qdata.dim()
            if rank == 2:
                qdata, scale = qdata.unsqueeze(0), scale.unsqueeze(0)
            storage = PackedStorage.pack(
                qdata,
                scale,
                gate_up=gate_up,
                align=pair,
                row_order=row_order or "contiguous",
                requested_layout=layout,
            )
        return cls._wrap(storage, storage.whole(), rank, dtype)

    __slots__ = ()

    operations = Operations()

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        *,
        gate_up: bool,
        row_order: RowOrder | None = None,
        shuffle_kind: str | None = None,
        scale_rule: ScaleRule = "even",
        align: Align = ALIGN,
    ) -> ShuffledMXFP4Tensor:
        """Quantise a high-precision weight ``[E, N, K]`` (or ``[N, K]``), whose dtype becomes the logical dtype.

        ``scale_rule`` is one of :data:`shuffled_tensor.mxfp4.SCALE_RULES`; the other arguments are the constructor's.

        Raises:
            TypeError: ``weight`` is not bfloat16, float16, float32 or float64, or ``gate_up`` neither True nor False.
            ValueError: as for the constructor, or an unknown rule.
        """
        check_high_precision(weight)
        check_row_order(gate_up, row_order, weight.shape[-2])
        layout_or_none(shuffle_kind), align_of(align)  # before anything is computed
        mxfp4.check_quantizable(weight, scale_rule)
        with torch.no_grad():
            qdata, scale = (
                torch.empty(
                    *weight.shape[:-1], weight.shape[-1] // part.per_byte, dtype=torch.uint8, device=weight.device
                )
                for part in PARTS
            )
            # quantising works on several float32 copies of its input
            for some in expert_chunks(len(weight), 4 * weight.shape[1:].numel()):
                qdata[some], scale[some] = mxfp4.quantize(weight[some], scale_rule=scale_rule)
        return cls(
            qdata,
            scale,
            gate_up=gate_up,
            row_order=row_order,
            shuffle_kind=shuffle_kind,
            dtype=weight.dtype,
            align=align,
        )

    @property
    def shuffle_kind(self) -> str | None:
        """The layout that the bytes are in, or will be shuffled into: None as long as nobody has decided."""
        storage = self._storage
        return name_or_none(storage.layout if self.is_shuffled else storage.requested_layout)

    @property
    def is_shuffled(self) -> bool:
        """Whether the bytes lie in :attr:`shuffle_kind` now; else they are row-major."""
        return self._storage.layout not in ROW_ORDERS.values()

    @property
    def layout_locked(self) -> bool:
        """Whether somebody holds the bytes as they lie, so that their layout stays: see :meth:`as_kernel_operands`."""
        return self._storage.locked_layout is not None

    def shuffle_(self, shuffle_kind: str | None = None) -> ShuffledMXFP4Tensor:
        """Bring the bytes into a layout (default: :attr:`shuffle_kind`), in place and at most once, for every alias of
        them.

        A tensor that was made for a fixed layout is from now on fixed to this one.

        Raises:
            ValueError: no layout was ever given, or it is unknown.
            RuntimeError: :attr:`layout_locked`, or the bytes are unusable.
        """
        name = self.shuffle_kind if shuffle_kind is None else shuffle_kind
        if name is None:
            raise ValueError(
                "this tensor was made without a shuffle_kind, so shuffle_() must be told: shuffle_('mxfp4_moe') "
                "or shuffle_('mxfp4_separated')"
            )
        layout = find_layout(name)
        self._storage.convert_layout_(layout)
        if self._storage.requested_layout is not None:
            self._storage.requested_layout = layout
        return self

    def unshuffle_(self) -> ShuffledMXFP4Tensor:
        """Bring the bytes back into row-major order, in place, for every alias of them.

        A fixed layout stays fixed: the next use shuffles again.
        """
        self._storage.convert_layout_(ROW_MAJOR)
        return self

    def as_kernel_operands(
        self, *, layout: str | None = None, align: int | tuple[int, int] | None = None
    ) -> KernelOperands:
        """Plain tensors for code that must not see a subclass, laid out and marked as kernels want them.

        They share the storage, so values written through this tensor are theirs too. Its layout is locked until they
        are released.

        Args:
            layout: the one that the caller's kernel reads; None is the one that this weight was made for, or the
                default of the kernel library that is installed.
            align: what the caller's kernel wants rows (of gate and up each) and columns to be padded to multiples of:
                one number, or two.

        Raises:
            RuntimeError: no ``layout``, and there are no kernels for this device; or the bytes are held in another one.
            ValueError: the tensor was made for another layout, is padded otherwise, or is a view of experts that are
                not contiguous.
        """
        reading, storage = policy.current.reading(self, layout_or_none(layout)), self._storage
        if not self.qdata.is_contiguous():
            raise ValueError("these experts are not contiguous in memory; clone() them first")
        storage.check_usable_as(reading.layout)
        if align is not None:
            storage.geometry.check_aligned(align)
        with storage.lock:
            storage.convert_layout_(reading.layout)
            release = storage.lock_layout()
        weight = policy.as_operand(self.qdata, reading.attributes)
        return KernelOperands(weight, self.scale, reading.layout.name, reading.gate_mode, release)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logical value as a plain tensor, in the logical dtype unless another is given."""
        values = self._storage.dequantize(self._window, dtype or self.dtype)
        return values[0] if self.dim() == 2 else values

    def logical_checksum(self) -> str:
        """SHA-256, in hex, of the logical codes and scales: equal in every layout, on every device and whatever the
        padding."""
        return self._storage.checksum(self._window)

    @property
    def qdata_view(self) -> PartView:
        """The codes as loaders know them, to be written in any layout: uint8 ``[E, N, K/2]``, row-major and without
        pads, gate and up rows in :attr:`row_order`."""
        return self._part_view(CODES)

    @property
    def scale_view(self) -> PartView:
        """The scales as loaders know them, to be written in any layout: uint8 ``[E, N, K/32]``, row-major and without
        pads, gate and up rows in :attr:`row_order`."""
        return self._part_view(SCALES)

    def views(self, row_order: RowOrder | None = None) -> tuple[PartView, PartView]:
        """:attr:`qdata_view` and :attr:`scale_view`, with gate and up rows in another order than :attr:`row_order`.

        Raises:
            ValueError: an unknown order, or one of rows that are not gate and up.
        """
        return self._part_view(CODES, row_order), self._part_view(SCALES, row_order)

    def _part_view(self, part: Part, row_order: RowOrder | None = None) -> PartView:
        interleaved = self._interleaved(row_order)
        return PartView.make(self._storage, self._window, self.dim(), part, interleaved=interleaved)

    @property
    def row_order(self) -> RowOrder | None:
        """How the gate and up rows came of which this weight was made, ``"contiguous"`` or ``"interleaved"``, and in
        which packed bytes are written and refitted; None where rows are not gate and up.

        Values have all gate rows, then all up rows, whatever it is.
        """
        return self._storage.row_order if self.gate_up else None

    def _interleaved(self, row_order: RowOrder | None) -> bool:
        """Whether rows that come in from outside are; None is the order of construction."""
        if row_order is not None:
            check_row_order(self.gate_up, row_order, self.shape[-2])
        return (row_order or self.row_order) == "interleaved"

    def refit_from_hp_(
        self, weight: Tensor, *, row_order: RowOrder | None = None, scale_rule: ScaleRule = "even"
    ) -> ShuffledMXFP4Tensor:
        """Quantise high-precision values of this shape over the present ones, in place and in the present layout.

        Gate and up rows come in ``row_order``, if that is None in :attr:`row_order`, as :meth:`from_hp` took them;
        :meth:`copy_` takes values as :meth:`dequantize` gives them.

        Raises:
            TypeError: ``weight`` is not floating point, or packed already.
            ValueError: another shape, no values (on the meta device), an unknown order or rule.
        """
        self._write_hp(weight, self._interleaved(row_order), scale_rule)
        return self

    def _write_hp(self, weight: Tensor, interleaved: bool = False, scale_rule: ScaleRule = "even") -> None:
        if isinstance(weight, ShuffledMXFP4Tensor):
            raise TypeError("refit_from_hp_ quantises, and this weight is quantised already; copy_ takes it as it is")
        mxfp4.check_tensor("weight", weight)
        check_plain("weight", weight)
        if weight.shape != self.shape:
            raise ValueError(f"refit_from_hp_ takes values of shape {list(self.shape)}, found {list(weight.shape)}")
        mxfp4.check_quantizable(weight, scale_rule)
        self.check_has_values(weight)
        values, window = weight.detach().reshape(self._window.shape), self._window
        with self.writing():
            for place, experts in self._storage.chunks(window.experts):
                parts = mxfp4.quantize(values[place], scale_rule=scale_rule)
                self._storage.write(window._replace(experts=experts), *parts, interleaved=interleaved)

    def check_has_values(self, source: Tensor) -> None:
        """Raise ValueError for a source on the meta device: found out while writing, it would leave the bytes
        unusable."""
        if source.is_meta and not self.is_meta:
            raise ValueError("there are no values to take from a tensor on the meta device")

    def writing(self) -> AbstractContextManager[None]:
        """Around everything that writes: an exception inside leaves the bytes unusable."""
        storage = self._storage
        return storage.writing(whole=self._window == storage.whole())

    def mark_canonical_(self, *, row_order: RowOrder | None = None) -> ShuffledMXFP4Tensor:
        """Say that the bytes of the whole storage are row-major now: for a writer that went past this tensor.

        Pads are rewritten; a layout that is locked is restored at once, any other at the next use.

        Raises:
            ValueError: the weight was made of interleaved rows, and ``row_order`` does not say what came now.
        """
        if row_order is None and self._storage.row_order != "contiguous":
            raise ValueError(
                "this weight was made of interleaved rows, and row-major bytes of it have all gate rows first; say "
                "which of them was written, with row_order='interleaved' or row_order='contiguous'"
            )
        if row_order is not None:
            check_row_order(self._storage.geometry.gate_up, row_order, self._storage.geometry.rows)
        self._storage.assume(self._storage.row_major(row_order))
        return self

    def mark_shuffled_(self, shuffle_kind: str) -> ShuffledMXFP4Tensor:
        """Say that the bytes of the whole storage lie so now, pads included: nothing is moved or checked."""
        self._storage.assume(find_layout(shuffle_kind))
        return self

    def shard(self, rank: int, world_size: int, *, dim: ShardDim = "intermediate") -> ShuffledMXFP4Tensor:
        """A copy of one rank's part, in the same layout, that knows its :attr:`place` in the whole.

        Args:
            rank: which part, from 0 to ``world_size - 1``.
            world_size: how many parts.
            dim: ``"expert"``, in equal parts; or ``"intermediate"`` for tensor parallelism: the matching gate and up
                rows of a w13, and columns of a w2, in whole blocks of 32. Where blocks do not come out even, the first
                ranks get as many as a rank needs to get at least, and the last one the rest, as in the engines: of
                gpt-oss's 2880, at 4 ranks, 736, 736, 736 and 672. The ranks' outputs add up to the layer's.

        Raises:
            ValueError: an unknown ``dim``, a rank out of range, numbers of experts that are not equal, or, on every
                rank, blocks that do not suffice for the last one.
        """
        if dim not in ("expert", "intermediate"):
            raise ValueError(f"dim must be 'expert' or 'intermediate', found {dim!r}")
        if dim == "expert" and self.dim() == 2:
            raise ValueError(f"dim='expert' needs a tensor [experts, N, K], found shape {list(self.shape)}")
        rank, world_size = whole_numbers("rank and world_size", (rank, world_size))
        size = self.shape[0] if dim == "expert" else self.shape[-2] // 2 if self.gate_up else self.shape[-1]
        part = shard_range(size, rank, world_size, dim)
        if dim == "expert":
            made, place = self[slice_of(part)].clone(), self.place.part(experts=part)
        elif not self.gate_up:
            made, place = self[..., slice_of(part)].clone(), self.place.part(columns=part)
        else:
            halves = self._storage.halves(self._window.experts, part)
            parts = (
                data.flatten(1, 2)[..., slice_of(self._window.columns, of)].contiguous()
                for of, data in zip(PARTS, halves, strict=True)
            )
            made, place = self._like(self._storage.packed_alike(*parts, gate_up=True)), self.place.part(rows=part)
        assert isinstance(made, ShuffledMXFP4Tensor)  # for the type checker
        made.place = place
        return made

    @property
    def place(self) -> Place:
        """Which part of a whole weight this is: set by :meth:`shard` and ``load_experts``, and kept by copies. A weight
        that nobody parted is a whole of its own, and so is a view of rows or columns.

        It may be set, of a tensor that is no view, where others have moved bytes. Raises ValueError for one of another
        shape.
        """
        return self.parted or Place.whole(self._window.shape, 2 if self.gate_up else 1)

    @place.setter
    def place(self, place: Place) -> None:
        storage = self._storage
        if self._window != storage.whole():
            raise ValueError("a view lies where the tensor of which it is one does, whose place can be set")
        if not isinstance(place.experts, range) or place.experts.step != 1:
            place = place._replace(experts=tuple(whole_numbers("the experts of a place", place.experts)))
        place.check(self._window.shape, storage.geometry.halves)
        storage.place = place

    def permute_experts_(self, order: Sequence[int] | Tensor) -> ShuffledMXFP4Tensor:
        """Expert ``order[i]`` becomes expert ``i``, weight and scale together, in place, with one expert of scratch.

        Raises:
            TypeError: ``order`` holds anything but whole numbers.
            ValueError: ``order`` is no permutation of the experts.
            NotImplementedError: ``order`` is a tensor without values, as all are in a compiled function.
        """
        if isinstance(order, Tensor) and not is_real(order):
            raise NotImplementedError("permute_experts_ takes a list while a function is compiled: it checks the order")
        order = whole_numbers("order", order)
        if sorted(order) != list(range(self.shape[0])) or self.dim() != 3:
            raise ValueError(f"order must hold each of the {self.shape[0]} experts once, found {order}")
        parts = self.qdata, self.scale
        with self._storage.held(), self._storage.writing():
            spare = [data.new_empty(data.shape[1:]) for data in parts]
            self._storage.touch()
            for data, kept in zip(parts, spare, strict=True):
                done: set[int] = set()
                for first in range(len(order)):
                    if first in done or order[first] == first:
                        continue
                    kept.copy_(data[first])
                    place = first
                    while order[place] != first:
                        data[place].copy_(data[order[place]])
                        done.add(place)
                        place = order[place]
                    data[place].copy_(kept)
                    done.add(place)
            if self._storage.place is not None:
                held = list(self._storage.place.experts)
                for own, source in zip(self._window.experts, order, strict=True):
                    held[own] = self._storage.place.experts[self._window.experts[source]]
                self._storage.place = self._storage.place._replace(experts=tuple(held))
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"ShuffledMXFP4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, gate_up={self.gate_up}, "
            f"shuffle_kind={self.shuffle_kind!r}, is_shuffled={self.is_shuffled}, "
            f"device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShuffledMXFP4Tensor:
        # Through the storage, so that aliases copied together stay aliases; and with attributes such as weight_loader,
        # as a plain tensor has them.
        if id(self) not in memo:
            memo[id(self)] = self._wrap(copy.deepcopy(self._storage, memo), self._window, self.dim(), self.dtype)
            memo[id(self)].__dict__.update(copy.deepcopy(self.__dict__, memo))
        return memo[id(self)]  # type: ignore[no-any-return]
