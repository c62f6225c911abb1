# SPDX-License-Identifier: MIT
"""Codes or scales alone, as checkpoint loaders write them: logical and row-major, whatever the layout in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shuffled_tensor import owners
from shuffled_tensor.mxfp4 import PARTS, Part
from shuffled_tensor.tensor.base import Operations, StorageTensor
from shuffled_tensor.tensor.checks import check_plain
from shuffled_tensor.tensor.geometry import Window
from shuffled_tensor.tensor.storage import PackedStorage

__all__ = ["PartView"]

aten = torch.ops.aten


class PartView(StorageTensor):
    """A view that writes: uint8 ``[E, N, K/2]`` codes or ``[E, N, K/32]`` scales of a ShuffledMXFP4Tensor, which
    ``view(dtype)`` shows as float4_e2m1fn_x2 or float8_e8m0fnu.

    ``view[expert].narrow(0, offset, rows).copy_(loaded)`` puts bytes where they belong in the layout that the weight
    lies in, in place. Reading it (``clone``, ``to``, ``torch.equal``) gives plain row-major bytes.
    """

    __slots__ = ("_interleaved", "_part")

    _part: Part
    _interleaved: bool
    """Whether the window's rows are numbered as gate and up rows in turn."""

    operations = Operations()
    _remedy = (
        "it has no memory in row-major order: select, narrow or slice it, copy_ into it, clone() it for plain bytes, "
        "or write inside `with refit(module):`"
    )

    @classmethod
    def make(
        cls,
        storage: PackedStorage,
        window: Window,
        rank: int,
        part: Part,
        *,
        interleaved: bool,
        dtype: torch.dtype = torch.uint8,
    ) -> PartView:
        """A view of one part of a window; rank 2 shows a single expert."""
        experts, rows, columns = window.shape
        self = cls._over(storage, window, (experts, rows, columns // part.per_byte)[-rank:], dtype)
        self._part, self._interleaved = part, interleaved
        return self

    def _view(self, rank: int | None = None, dtype: torch.dtype | None = None, **window: range) -> PartView:
        """A part of this view, or all of it as another dtype."""
        options: dict[str, Any] = {"interleaved": self._interleaved, "dtype": dtype or self.dtype}
        inner = self._window._replace(**window)
        return PartView.make(self._storage, inner, rank or self.dim(), self._part, **options)

    def plain(self) -> Tensor:
        """The bytes as a plain tensor of this dtype."""
        data = self._storage.read(self._window, interleaved=self._interleaved)[PARTS.index(self._part)]
        return (data[0] if self.dim() == 2 else data).contiguous().view(self.dtype)

    @property
    def data(self) -> PartView:
        """Another view of the same bytes; it is written into, and cannot be exchanged for a plain tensor."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError(
            f"a view of {self._part} shows bytes of a weight, so .data takes no others: write them with copy_"
        )

    # what torch would do in C with memory of its own
    data_ptr = share_memory_ = __reduce_ex__ = StorageTensor._no_memory

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PartView({self._part}, shape={tuple(self.shape)}, device='{self.device}')"


_implements = partial(PartView.operations.implements, group="Of a view of codes or scales")


@_implements(aten.detach.default, aten.alias.default)
def _alias(self: PartView) -> PartView:
    """Another view of the same bytes."""
    return self._view()


@_implements(aten.view.dtype)
def _as_dtype(self: PartView, dtype: torch.dtype) -> PartView:
    """The same bytes as another dtype in which they may be."""
    if dtype not in self._part.dtypes:
        raise TypeError(f"a view of {self._part} shows bytes as {self._part.dtypes}, found {dtype}")
    return self._view(dtype=dtype)


@_implements(aten.select.int)
def _select(self: PartView, dim: int, index: int) -> PartView:
    """A view of one expert; of one row or column it is refused."""
    if self.dim() != 3 or dim not in (0, -3):
        raise NotImplementedError("only experts are selected one by one; narrow rows and columns")
    if not -self.shape[0] <= index < self.shape[0]:
        raise IndexError(f"expert {index} is out of range for {self.shape[0]} experts")
    expert = self._window.experts[index]
    return self._view(rank=2, experts=range(expert, expert + 1))


@_implements(aten.slice.Tensor)
def _slice(self: PartView, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> PartView:
    """A view of experts, rows or bytes that can be read and written in any layout."""
    axis = Window._fields[-self.dim() :][dim]
    window = getattr(self._window, axis)
    if axis == "columns":  # counted in bytes
        per_byte = self._part.per_byte
        chosen = range(self.shape[-1])[start:end:step]
        window = range(window.start + chosen.start * per_byte, window.start + chosen.stop * per_byte)
    else:
        window = window[start:end:step]
    if axis != "experts" and step != 1:
        raise NotImplementedError(f"{axis} are sliced without steps")
    return self._view(**{axis: window})


@_implements(aten.copy_.default)
def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Writes packed bytes where they belong in the weight's layout, in place."""
    if isinstance(source, PartView):
        source = source.plain()
    check_plain("source", source)
    if not isinstance(self, PartView):
        return self.copy_(source, non_blocking)
    if source.dtype not in self._part.dtypes:
        raise TypeError(f"a view of {self._part} takes packed bytes of {self._part.dtypes}, found {source.dtype}")
    if source.shape != self.shape:
        raise ValueError(f"a view of {self._part} takes bytes of shape {list(self.shape)}, found {list(source.shape)}")
    owners.check_row_major("the source", source)
    data = source.view(torch.uint8).reshape(self._window.shape[0], *self.shape[-2:])
    qdata, scale = (data if part is self._part else None for part in PARTS)
    self._storage.write(self._window, qdata, scale, interleaved=self._interleaved)
    return self


@_implements(aten.fill_.Scalar)
def _fill_(self: PartView, value: float) -> PartView:
    """Writes one byte everywhere."""
    _copy_(self, torch.full(self.shape, value, dtype=torch.uint8, device=self.device))
    return self


@_implements(aten.zero_.default)
def _zero_(self: PartView) -> PartView:
    """Writes zeros: of scales, that is the smallest, and not 1."""
    return _fill_(self, 0)


def _read(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Plain row-major bytes."""
    return operator(*(arg.plain() if isinstance(arg, PartView) else arg for arg in args), **kwargs)


for _operator in (aten.clone.default, aten._to_copy.default, aten.equal.default):
    _implements(_operator)(partial(_read, _operator))
