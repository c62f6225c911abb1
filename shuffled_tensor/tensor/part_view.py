# SPDX-License-Identifier: MIT
"""Codes or scales alone, as checkpoint loaders write them: logical and row-major, whatever the layout in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from shuffled_tensor.tensor.checks import CODE_DTYPES, SCALE_DTYPES
from shuffled_tensor.tensor.geometry import PER_BYTE, Window
from shuffled_tensor.tensor.storage import PackedStorage

__all__ = ["PackedView"]

aten = torch.ops.aten

_DTYPES = {"qdata": CODE_DTYPES, "scale": SCALE_DTYPES}


class PackedView(Tensor):
    """A view that writes: uint8 ``[E, N, K/2]`` codes or ``[E, N, K/32]`` scales of a ShuffledMXFP4Tensor.

    ``view[expert].narrow(0, offset, rows).copy_(loaded)`` puts bytes where they belong in the layout that the weight
    lies in, in place. Reading it (``clone``, ``to``, ``torch.equal``) gives plain row-major bytes.
    """

    _storage: PackedStorage
    _window: Window
    _part: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def make(cls, storage: PackedStorage, window: Window, rank: int, part: str) -> PackedView:
        """A view of one part, ``"qdata"`` or ``"scale"``, of a window; rank 2 shows a single expert."""
        experts, rows, columns = window.shape
        shape = (experts, rows, columns // PER_BYTE[part])[-rank:]
        with torch.inference_mode(False), torch.no_grad():
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8, device=storage.qdata.device)
        self._storage, self._window, self._part = storage, window, part
        return self

    def plain(self) -> Tensor:
        """The bytes as a plain uint8 tensor."""
        data = dict(zip(("qdata", "scale"), self._storage.read(self._window), strict=True))[self._part]
        return (data[0] if self.dim() == 2 else data).contiguous()

    @property
    def data(self) -> PackedView:
        """Another view of the same bytes; it is written into, and cannot be exchanged for a plain tensor."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError(
            f"a view of {self._part} shows bytes of a weight, so .data takes no others: write them with copy_"
        )

    def _no_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"a view of {self._part} has no memory in row-major order; clone() it for plain bytes, or write inside "
            "`with refit(module):`"
        )

    # what torch does in C, on memory that a wrapper does not have
    data_ptr = share_memory_ = apply_ = __dlpack__ = __reduce_ex__ = _no_memory

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedView({self._part}, shape={tuple(self.shape)}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _OPERATIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if func in _READS:
            plain = [arg.plain() if isinstance(arg, PackedView) else arg for arg in args]
            return func(*plain, **(kwargs or {}))
        out = func.decompose(*args, **(kwargs or {}))  # in inference mode torch does not do it itself
        if out is not NotImplemented:
            return out
        raise NotImplementedError(
            f"{func} is not defined on a view of {args[0]._part if isinstance(args[0], PackedView) else 'codes'}; "
            "select, narrow or slice it, copy_ into it, or clone() it for plain bytes"
        )


def _detach(self: PackedView) -> PackedView:
    return PackedView.make(self._storage, self._window, self.dim(), self._part)


def _select(self: PackedView, dim: int, index: int) -> PackedView:
    if self.dim() != 3 or dim not in (0, -3):
        raise NotImplementedError("only experts are selected one by one; narrow rows and columns")
    if not -self.shape[0] <= index < self.shape[0]:
        raise IndexError(f"expert {index} is out of range for {self.shape[0]} experts")
    expert = self._window.experts[index]
    return PackedView.make(self._storage, self._window._replace(experts=range(expert, expert + 1)), 2, self._part)


def _slice(
    self: PackedView, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PackedView:
    axis = ("experts", "rows", "columns")[-self.dim() :][dim]
    part = getattr(self._window, axis)
    if axis == "columns":  # counted in bytes
        per_byte = PER_BYTE[self._part]
        chosen = range(self.shape[-1])[start:end:step]
        part = range(part.start + chosen.start * per_byte, part.start + chosen.stop * per_byte)
    else:
        part = part[start:end:step]
    if axis != "experts" and step != 1:
        raise NotImplementedError(f"{axis} are sliced without steps")
    return PackedView.make(self._storage, self._window._replace(**{axis: part}), self.dim(), self._part)


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, PackedView):
        source = source.plain()
    if not isinstance(self, PackedView):
        return self.copy_(source, non_blocking)
    if source.dtype not in _DTYPES[self._part]:
        raise TypeError(f"a view of {self._part} takes packed bytes of {_DTYPES[self._part]}, found {source.dtype}")
    if source.shape != self.shape:
        raise ValueError(f"a view of {self._part} takes bytes of shape {list(self.shape)}, found {list(source.shape)}")
    data = source.view(torch.uint8).reshape(self._window.shape[0], *self.shape[-2:])
    self._storage.write(self._window, **{"qdata": None, "scale": None, self._part: data})
    return self


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.copy_.default: _copy_,
}
_READS = (aten.clone.default, aten._to_copy.default, aten.equal.default)
