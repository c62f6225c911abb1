# SPDX-License-Identifier: MIT
"""The byte orders that gfx950 MoE kernels read, and how to get there and back.

A layout is one row of :data:`LAYOUTS`: an einops pattern whose left-hand side is the row-major tensor and whose
right-hand side, read flat, is the order in memory. The inverse is not written anywhere: the pattern makes a *view*, and
writing through that view undoes what reading through it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["ShuffleKind", "shuffle_scale", "shuffle_weight", "unshuffle_scale", "unshuffle_weight"]


class ShuffleKind(str, Enum):
    """How the bytes of an MXFP4 expert weight lie in memory."""

    NONE = "none"
    """Row-major; gate rows, then up rows."""
    MXFP4_MOE = "mxfp4_moe"
    """Gate and up interleaved in groups of 16 rows, then tiled (aiter: ``is_guinterleave=True``, "GUGU")."""
    MXFP4_SEPARATED = "mxfp4_separated"
    """Gate rows, then up rows, then tiled (aiter: ``shuffle_weight(layout=(16, 16))``, "GGUU")."""

    __str__ = str.__str__

    @classmethod
    def _missing_(cls, value: object) -> ShuffleKind:
        raise ValueError(f"unknown shuffle kind {value!r}; known kinds: {', '.join(repr(kind.value) for kind in cls)}")


@dataclass(frozen=True)
class Order:
    """A permutation of one expert's bytes, and what the sizes must be for it to tile."""

    pattern: str
    rows: int
    """N, the rows of one expert, must be a multiple of this."""
    columns: int
    """K, the logical columns, must be a multiple of this."""


@dataclass(frozen=True)
class Layout:
    weight: Order
    scale: Order


# `c` of a weight counts runs of 16 bytes, which never split: moving them as one element is what makes the shuffle run
# at memory speed.
_TILE = {"g": 2, "r": 16, "h": 2, "t": 2, "q": 4}

_PLAIN = Layout(
    weight=Order("e (n r) c -> e n c r", rows=16, columns=32),
    scale=Order("e (n h r) (c t q) -> e n c q r t h", rows=32, columns=256),
)
_INTERLEAVED = Layout(
    weight=Order("e (g n r) c -> e n g c r", rows=32, columns=32),
    scale=Order("e (g n r) (c t q) -> e n c q r t g", rows=64, columns=256),
)

LAYOUTS: dict[tuple[ShuffleKind, bool], Layout] = {
    # (kind, gate_up): a down weight is the same bytes in both kinds
    (ShuffleKind.MXFP4_MOE, True): _INTERLEAVED,
    (ShuffleKind.MXFP4_MOE, False): _PLAIN,
    (ShuffleKind.MXFP4_SEPARATED, True): _PLAIN,
    (ShuffleKind.MXFP4_SEPARATED, False): _PLAIN,
}

MAX_SCRATCH = 64 << 20
"""Bytes of scratch that an in-place operation takes at most, unless one expert is larger."""

# On a CPU, scratch that stays in its caches; a GPU wants few launches.
_IN_PLACE_SCRATCH = {"cpu": 8 << 20}

_RUN = torch.complex128  # 16 bytes


def shuffle_weight(qdata: Tensor, kind: ShuffleKind | str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """Lay packed fp4 codes out as ``kind``.

    Args:
        qdata: uint8 ``[E, N, K/2]`` (or ``[N, K/2]``, one expert), row-major, two codes a byte; gate rows then up rows
            when ``gate_up``.
        kind: a :class:`ShuffleKind` or its value. ``"none"`` copies.
        gate_up: whether the rows are two stacked halves, gate and up (w13), or one (w2).
        out: where to write; ``qdata`` itself permutes in place, expert by expert, in scratch of at most 64 MiB or one
            expert, whichever is larger.

    Returns:
        ``out``, or a new tensor: uint8, contiguous, of the shape of ``qdata``.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: an unknown kind, another rank than 2 or 3, sizes that do not tile, or an ``out`` that cannot take
            the result.
    """
    return _apply("weight", qdata, kind, gate_up, out, inverse=False)


def unshuffle_weight(qdata: Tensor, kind: ShuffleKind | str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """The exact inverse of :func:`shuffle_weight`: from ``kind`` back to row-major. Same arguments, same errors."""
    return _apply("weight", qdata, kind, gate_up, out, inverse=True)


def shuffle_scale(scale: Tensor, kind: ShuffleKind | str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """Lay e8m0 scales out as ``kind``: uint8 ``[E, N, K/32]`` (or ``[N, K/32]``). Otherwise as
    :func:`shuffle_weight`."""
    return _apply("scale", scale, kind, gate_up, out, inverse=False)


def unshuffle_scale(scale: Tensor, kind: ShuffleKind | str, *, gate_up: bool, out: Tensor | None = None) -> Tensor:
    """The exact inverse of :func:`shuffle_scale`. Same arguments, same errors."""
    return _apply("scale", scale, kind, gate_up, out, inverse=True)


def _apply(
    part: str, data: Tensor, kind: ShuffleKind | str, gate_up: bool, out: Tensor | None, *, inverse: bool
) -> Tensor:
    kind = ShuffleKind(kind)
    _check_input(part, data, out)
    in_place = out is data or (out is not None and out.is_set_to(data))  # traced tensors know no memory to compare
    if out is None:
        out = torch.empty_like(data, memory_format=torch.contiguous_format)
    if kind is ShuffleKind.NONE:
        return out if in_place else out.copy_(data)
    order: Order = getattr(LAYOUTS[kind, gate_up], part)
    _check_sizes(part, data, kind, gate_up, order)
    if data.numel() == 0:
        return out
    source, target = (_elements(part, tensor.unsqueeze(0) if tensor.dim() == 2 else tensor) for tensor in (data, out))
    if not in_place:
        _permute(source, target, order, inverse)
        return out
    chunks = list(
        expert_chunks(len(source), data.nbytes // len(source), _IN_PLACE_SCRATCH.get(data.device.type, MAX_SCRATCH))
    )
    scratch = torch.empty_like(target[chunks[0]])
    for experts in chunks:
        chunk = target[experts]
        _permute(scratch[: len(chunk)].copy_(chunk), chunk, order, inverse)
    return out


def rows_as_they_lie(data: Tensor, kind: ShuffleKind, *, gate_up: bool, rows: range) -> Tensor:
    """Codes or scales of some rows (from a multiple of 32 to another) of each half, laid out as ``data`` is: whole
    tiles, which no other row has a byte in."""
    interleaved = LAYOUTS.get((kind, gate_up)) is _INTERLEAVED  # its tiles hold rows of both halves
    blocks, each = (2, 1) if gate_up and not interleaved else (1, 2 if interleaved else 1)
    parted: Tensor = data.unflatten(1, (blocks, -1))
    return parted[:, :, rows.start * each : rows.stop * each].flatten(1, 2)


def expert_chunks(experts: int, bytes_per_expert: int, limit: int = MAX_SCRATCH) -> Iterator[slice]:
    """Slices over the expert dimension that each hold one expert, or as many as fit the limit."""
    step = max(1, limit // max(1, bytes_per_expert))
    return (slice(start, min(start + step, experts)) for start in range(0, experts, step))


def _permute(source: Tensor, target: Tensor, order: Order, inverse: bool) -> None:
    sizes = {axis: size for axis, size in _TILE.items() if axis in order.pattern.split("->")[0]}
    tiled = rearrange(target if inverse else source, order.pattern, **sizes)  # a view: only splits and permutes axes
    flat = (source if inverse else target).view(tiled.shape)
    read, written = (flat, tiled) if inverse else (tiled, flat)
    if source.dtype is torch.uint8 and source.device.type == "cpu":
        # The innermost axes of a scale are two by two: as one copy, a CPU spends its time entering loops; as four, it
        # is five times faster.
        for t, h in product(range(2), repeat=2):
            written[..., t, h].copy_(read[..., t, h])
    else:
        written.copy_(read)


def _elements(part: str, data: Tensor) -> Tensor:
    """The tensor as the elements that a permutation moves: runs of 16 bytes of a weight, single bytes of a scale."""
    return data.view(_RUN) if part == "weight" else data


def _check_input(part: str, data: Tensor, out: Tensor | None) -> None:
    for name, tensor in (("input", data), ("out", data if out is None else out)):
        if tensor.dtype is not torch.uint8:
            raise TypeError(
                f"{part} {name} must be a uint8 tensor, found {tensor.dtype}; packed fp4 codes and e8m0 scales "
                "are viewed with .view(torch.uint8)"
            )
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"{part} {name} must be [experts, rows, bytes] or [rows, bytes], found shape {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{part} {name} must be contiguous, found strides {tensor.stride()}; call .contiguous()")
        if part == "weight" and tensor.storage_offset() % 16:
            raise ValueError(
                f"{part} {name} must start on a multiple of 16 bytes, found storage offset "
                f"{tensor.storage_offset()}; call .clone()"
            )
    if out is not None and (out.shape != data.shape or out.device != data.device):
        raise ValueError(f"out must be {list(data.shape)} on {data.device}, found {list(out.shape)} on {out.device}")


def _check_sizes(part: str, data: Tensor, kind: ShuffleKind, gate_up: bool, order: Order) -> None:
    rows, columns = data.shape[-2], data.shape[-1] * (2 if part == "weight" else 32)
    fill = "zero bytes" if part == "weight" else "scale byte 127"
    if rows % order.rows:
        padded = round_up(rows, order.rows)
        how = f"pad gate and up from {rows / 2:g} to {padded // 2} rows each" if gate_up else f"pad to {padded} rows"
        raise ValueError(
            f"{part} rows N={rows} are not a multiple of {order.rows}, which {kind.value!r} needs: {how}, with {fill}"
        )
    if columns % order.columns:
        padded = round_up(columns, order.columns)
        raise ValueError(
            f"{part} columns K={columns} are not a multiple of {order.columns}, which {kind.value!r} needs: pad "
            f"to K={padded}, with {fill}"
        )


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
