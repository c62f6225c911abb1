# SPDX-License-Identifier: MIT
"""Weights behind each other, along experts, rows or columns: which fit, and what bytes they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shuffled_tensor.tensor.geometry import Window
from shuffled_tensor.tensor.storage import PackedStorage, locked
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["along_experts", "axis_of", "bytes_of", "first_of", "join", "lie_alike", "materialized"]


def first_of(tensors: list[Tensor], dim: int | None = None) -> ShuffledMXFP4Tensor:
    """The first of tensors that may be joined: along a dimension that they have, or one that is new."""
    first = tensors[0]
    for tensor in tensors:
        if not isinstance(tensor, ShuffledMXFP4Tensor) or not isinstance(first, ShuffledMXFP4Tensor):
            plain = next(tensor for tensor in tensors if not isinstance(tensor, ShuffledMXFP4Tensor))
            raise TypeError(
                f"experts are joined with experts in MXFP4, found a plain tensor of {plain.dtype}; "
                "quantise it with ShuffledMXFP4Tensor.from_hp"
            )
        joined = None if dim is None else axis_of(first, dim)
        formats = [
            (
                t.dim(),
                {axis: len(getattr(t._window, axis)) for axis in Window._fields[-t.dim() :] if axis != joined},
                t.gate_up,
                t.dtype,
            )
            for t in (first, tensor)
        ]
        if formats[0] != formats[1]:
            raise ValueError(
                "weights that are joined must agree in dimensions, sizes beside the one along which they are, gate_up "
                f"and dtype, found {formats[0]} and {formats[1]}"
            )
    assert isinstance(first, ShuffledMXFP4Tensor)
    return first


def join(first: ShuffledMXFP4Tensor, tensors: list[Any], dim: int) -> ShuffledMXFP4Tensor:
    """Tensors of which :func:`first_of` gave the first, behind each other in its layout."""
    return along_experts(first, tensors) if axis_of(first, dim) == "experts" else _inside(first, tensors, dim)


def along_experts(first: ShuffledMXFP4Tensor, tensors: list[Any]) -> ShuffledMXFP4Tensor:
    """Experts behind each other; also of single ones, which have no such dimension."""
    parts = []
    with locked(*(tensor._storage for tensor in tensors)):
        for tensor in tensors:
            tensor._storage.check_readable()
            if lie_alike(first, tensor):
                parts.append(bytes_of(tensor))
            else:
                alike = materialized(tensor, first._storage.geometry.align)
                alike.convert_layout_(first._storage.layout)
                parts.append((alike.qdata, alike.scale))
        qdata, scale = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    storage = materialized(first) if first.is_part_of_experts else first._storage
    return first._like(storage.with_bytes(qdata, scale))


def _inside(first: ShuffledMXFP4Tensor, tensors: list[Any], dim: int) -> ShuffledMXFP4Tensor:
    """Rows, or columns, behind each other."""
    gate_up = first.gate_up
    if axis_of(first, dim) == "rows":
        if gate_up:
            raise ValueError(
                "rows of whole gate-up weights behind each other would be gate, up, gate, up; join the gate halves "
                "w[:, : N // 2], then the up halves w[:, N // 2 :]"
            )
        gate_up = _are_both_halves(tensors)
    with locked(*(tensor._storage for tensor in tensors)):
        parts = zip(*(tensor._storage.read(tensor._window) for tensor in tensors), strict=True)
        qdata, scale = (torch.cat(part, Window._fields.index(axis_of(first, dim))) for part in parts)
    return first._like(first._storage.packed_alike(qdata, scale, gate_up=gate_up))


def _are_both_halves(tensors: list[ShuffledMXFP4Tensor]) -> bool:
    """Whether rows of gate-up weights are gate rows, then the up rows that belong to them, in the same order."""
    found: dict[str, list[tuple[Any, int, int]]] = {"gate": [], "up": []}
    for tensor in tensors:
        storage, (experts, rows, columns) = tensor._storage, tensor._window
        each = storage.geometry.rows // 2
        for half, first in (("gate", 0), ("up", each)):
            start, stop = max(rows.start, first) - first, min(rows.stop, first + each) - first
            if start >= stop:
                continue
            if not storage.geometry.gate_up or (half == "gate" and found["up"]):
                return False
            of = storage, experts, columns
            before = found[half].pop() if found[half] and found[half][-1][::2] == (of, start) else (of, start, start)
            found[half].append((of, before[1], stop))
    return found["gate"] == found["up"] != []


def axis_of(self: ShuffledMXFP4Tensor, dim: int) -> str:
    if not -self.dim() <= dim < self.dim():
        raise IndexError(f"dim must be in {-self.dim()}..{self.dim() - 1}, found {dim}")
    return Window._fields[-self.dim() :][dim]


def bytes_of(self: ShuffledMXFP4Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales ``[E, ...]`` as they lie: views, or for a view of rows or columns a copy in the same layout."""
    if self.is_part_of_experts:
        own = materialized(self)
        return own.qdata, own.scale
    return self._storage.select(self._window.experts)


def materialized(self: ShuffledMXFP4Tensor, align: tuple[int, int] | None = None) -> PackedStorage:
    """A view of rows or columns as a storage of its own, in the same layout, and padded as it is or to multiples of
    `align`. Only whole experts keep gate and up apart."""
    storage = self._storage
    parts = (data.contiguous() for data in storage.read(self._window))
    return storage.packed_alike(*parts, gate_up=self.gate_up, align=align)


def lie_alike(self: ShuffledMXFP4Tensor, other: ShuffledMXFP4Tensor) -> bool:
    """Whether equal values are equal bytes."""
    own, others = self._storage, other._storage
    whole = not (self.is_part_of_experts or other.is_part_of_experts)
    return whole and (own.layout, own.geometry.sizes) == (others.layout, others.geometry.sizes)
