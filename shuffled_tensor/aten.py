# SPDX-License-Identifier: MIT
"""What each aten operation does to a :class:`ShuffledMXFP4Tensor`: the rows of
:data:`shuffled_tensor.tensor.OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from shuffled_tensor import mxfp4
from shuffled_tensor.tensor import OPERATIONS, ShuffledMXFP4Tensor, check_logical_dtype, implements

aten = torch.ops.aten


# --- the same bytes, seen again


@implements(aten.detach.default, aten.alias.default)
def alias(self: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    out = self._like(self._storage, experts=self._experts)
    out.__dict__.update(self.__dict__.get("_carried", {}))
    return out


@implements(aten.select.int)
def select(self: ShuffledMXFP4Tensor, dim: int, index: int) -> ShuffledMXFP4Tensor:
    _check_expert_dim(self, dim, "select")
    if not -len(self) <= index < len(self):
        raise IndexError(f"expert {index} is out of range for a tensor of {len(self)} experts")
    expert = self._experts[index]
    return self._like(self._storage, experts=range(expert, expert + 1), rank=2)


@implements(aten.slice.Tensor)
def slice_(
    self: ShuffledMXFP4Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> ShuffledMXFP4Tensor:
    _check_expert_dim(self, dim, "slice")
    return self._like(self._storage, experts=self._experts[start:end:step])


# --- the same values, in bytes of their own; the layout is kept


@implements(aten.clone.default)
def clone(self: ShuffledMXFP4Tensor, *, memory_format: torch.memory_format | None = None) -> ShuffledMXFP4Tensor:
    return _map_bytes(self, partial(Tensor.clone, memory_format=torch.contiguous_format))


@implements(aten._to_copy.default)
def to_copy(
    self: ShuffledMXFP4Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **ignored: Any,
) -> ShuffledMXFP4Tensor:
    # `ignored`: layout, pin_memory and memory_format, which the `to` of a strided tensor fills with their defaults
    check_logical_dtype(dtype or self.dtype)
    out = _map_bytes(self, lambda data: data.to(device or data.device, non_blocking=non_blocking, copy=True), dtype)
    # Module.to swaps in nn.Parameter(copy). A plain Parameter would have kept its weight_loader, so the detach inside
    # nn.Parameter hands it on.
    out._carried = {name: value for name, value in self.user_attributes().items() if name != "_is_param"}
    return out


@implements(aten.index.Tensor)
def index(self: ShuffledMXFP4Tensor, indices: list[Tensor | None]) -> ShuffledMXFP4Tensor:
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        raise NotImplementedError(
            "a ShuffledMXFP4Tensor is indexed by one vector, along its experts; call .dequantize() to index "
            "rows and columns"
        )
    _check_expert_dim(self, 0, "index")
    return _map_bytes(self, lambda data: data[indices[0]])


@implements(aten.index_select.default)
def index_select(self: ShuffledMXFP4Tensor, dim: int, index: Tensor) -> ShuffledMXFP4Tensor:
    _check_expert_dim(self, dim, "index_select")
    return _map_bytes(self, lambda data: data.index_select(0, index))


@implements(aten.empty_like.default, aten.zeros_like.default)
def zeros_like(
    self: ShuffledMXFP4Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **ignored: Any
) -> ShuffledMXFP4Tensor:
    """Zeros in the same layout: what is not written yet (after ``Module.to_empty``) is defined all the same."""
    check_logical_dtype(dtype or self.dtype)
    qdata, scale = self._storage.select(self._experts)
    zeros = torch.zeros(qdata.shape, dtype=torch.uint8, device=device or qdata.device)
    ones = torch.full(scale.shape, 127, dtype=torch.uint8, device=device or scale.device)
    return self._like(self._storage.with_bytes(zeros, ones), dtype=dtype)


# --- new values


@implements(aten.copy_.default)
def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copies values: the destination keeps its layout, its address and its pads. Floating-point values are quantised
    with the default rule of `quantize`."""
    if not isinstance(self, ShuffledMXFP4Tensor):
        assert isinstance(source, ShuffledMXFP4Tensor)  # else nobody would have called
        return self.copy_(source.dequantize())
    if source.shape != self.shape:
        raise ValueError(f"copy_ takes values of shape {list(self.shape)}, found shape {list(source.shape)}")
    if isinstance(source, ShuffledMXFP4Tensor):
        if (self._storage.kind, self._storage.geometry) == (source._storage.kind, source._storage.geometry):
            self.qdata.copy_(source.qdata, non_blocking)
            self.scale.copy_(source.scale, non_blocking)
        else:
            for place, experts in self._storage.chunks(self._experts):
                self._storage.write(experts, *source._storage.canonical(source._experts[place]))
    elif source.is_floating_point() and source.element_size() > 1:
        for place, experts in self._storage.chunks(self._experts):
            self._storage.write(experts, *mxfp4.quantize(source.reshape(len(self._experts), *self.shape[-2:])[place]))
    else:
        raise TypeError(
            f"copy_ takes a ShuffledMXFP4Tensor or floating-point values, found {source.dtype}; "
            f"packed bytes become one with ShuffledMXFP4Tensor(qdata, scale, gate_up={self.gate_up}, ...)"
        )
    return self


# --- read as plain values


def _on_values(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    # Outside inference mode, because what a view operator returns must be able to have the version counter of its base.
    # Autograd is above, not here.
    with torch.inference_mode(False), torch.no_grad():
        return operator(*tree_map_only(ShuffledMXFP4Tensor, ShuffledMXFP4Tensor.dequantize, args), **kwargs)


for _operator in (
    aten.equal.default,
    aten.allclose.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
    # what linear and matmul ask of a weight on their way to mm and bmm
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.expand.default,
):
    OPERATIONS[_operator] = partial(_on_values, _operator)


def _map_bytes(
    self: ShuffledMXFP4Tensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
) -> ShuffledMXFP4Tensor:
    """The tensor with `function` applied to the codes and scales ``[E, ...]`` of its experts, which it must not mix or
    share."""
    qdata, scale = (function(data) for data in self._storage.select(self._experts))
    return self._like(self._storage.with_bytes(qdata, scale), dtype=dtype)


def _check_expert_dim(self: ShuffledMXFP4Tensor, dim: int, name: str) -> None:
    if self.dim() == 2 or dim not in (0, -3):
        raise NotImplementedError(
            f"{name} along dim {dim} of a ShuffledMXFP4Tensor of shape {list(self.shape)}: only experts, dim 0 "
            "of three, can be taken apart; "
            f"call .dequantize() for rows and columns"
        )
