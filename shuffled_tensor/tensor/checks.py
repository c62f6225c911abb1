# SPDX-License-Identifier: MIT
"""What the constructor of a tensor takes, and what it says to anything else."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shuffled_tensor import mxfp4, owners
from shuffled_tensor.layouts import check_gate_up
from shuffled_tensor.mxfp4 import CODES, SCALES, check_tensor
from shuffled_tensor.tensor.geometry import RowOrder

__all__ = [
    "check_high_precision",
    "check_logical_dtype",
    "check_parts",
    "check_plain",
    "check_row_order",
    "whole_numbers",
]

_ROW_ORDERS = get_args(RowOrder)


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor of another library that wraps others, whose operations do not know ours."""
    if is_traceable_wrapper_subclass(tensor):
        found = type(tensor).__name__
        remedy = "its .to_local(), this rank's shard, or .full_tensor()" if found == "DTensor" else "what it wraps"
        rows = (getattr(placement, "dim", None) == 1 for placement in getattr(tensor, "placements", ()))
        if tensor.dim() == 3 and any(rows):
            remedy = (
                "its .full_tensor(), and take this rank's part with shard(): of gate and up rows, .to_local() is gate "
                "rows alone on one rank and up rows alone on another"
            )
        raise TypeError(f"{name} is a {found} of shape {list(tensor.shape)}, whose parts are not seen; pass {remedy}")


def check_parts(qdata: Tensor, scale: Tensor) -> None:
    for part, data in ((CODES, qdata), (SCALES, scale)):
        check_tensor(part.name, data)
    for part, data, remedy in (
        (CODES, qdata, "; quantise float weights with ShuffledMXFP4Tensor.from_hp" * qdata.is_floating_point()),
        (SCALES, scale, "; e8m0 scales are exponent bytes, not factors"),
    ):
        check_plain(part.name, data)
        if data.dtype not in part.dtypes:
            raise TypeError(f"{part} must be {' or '.join(map(str, part.dtypes))}, found {data.dtype}{remedy}")
    if qdata.dim() not in (2, 3):
        raise ValueError(
            f"qdata must be [experts, N, K/2] or [N, K/2], found shape {list(qdata.shape)}; blocks [..., K/32, "
            "16] become it with .flatten(-2)"
        )
    columns = qdata.shape[-1] * CODES.per_byte
    if columns == 0 or columns % mxfp4.BLOCK:
        raise ValueError(
            f"K must be a multiple of {mxfp4.BLOCK}, found K={columns} (qdata of shape {list(qdata.shape)} holds "
            "two columns a byte)"
        )
    if qdata.shape[-2] == 0:
        raise ValueError(f"an expert needs rows, found N=0 (qdata of shape {list(qdata.shape)}); E=0 is allowed")
    expected = [*qdata.shape[:-1], columns // mxfp4.BLOCK]
    if list(scale.shape) != expected:
        raise ValueError(
            f"scale must be {expected}, one for {mxfp4.BLOCK} columns of qdata {list(qdata.shape)}, found shape "
            f"{list(scale.shape)}"
        )
    if qdata.device != scale.device:
        raise ValueError(f"qdata and scale must be on one device, found {qdata.device} and {scale.device}")
    for part, data in ((CODES, qdata), (SCALES, scale)):
        owners.check_row_major(part.name, data)


def check_high_precision(weight: Tensor) -> None:
    """Raise for what :meth:`ShuffledMXFP4Tensor.from_hp` cannot take."""
    check_tensor("weight", weight)
    check_plain("weight", weight)
    check_logical_dtype(weight.dtype)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight must be [experts, N, K] or [N, K], found shape {list(weight.shape)}")
    if 0 in weight.shape[-2:]:
        raise ValueError(f"an expert needs rows and columns, found shape {list(weight.shape)}; E=0 is allowed")


def check_row_order(gate_up: bool, row_order: RowOrder | None, rows: int) -> None:
    check_gate_up(gate_up)
    if gate_up:
        if row_order not in _ROW_ORDERS:
            raise ValueError(
                "gate_up=True needs row_order='contiguous' (all gate rows, then all up rows: Quark, "
                "compressed-tensors, DeepSeek) "
                f"or 'interleaved' (g0, u0, g1, u1, ...: gpt-oss), found {row_order!r}"
            )
        if rows % 2:
            raise ValueError(f"gate_up=True needs an even number of rows, half gate and half up, found N={rows}")
    elif row_order not in (None, "contiguous"):
        raise ValueError(
            f"row_order={row_order!r} needs gate_up=True; a weight without gate and up rows takes None or 'contiguous'"
        )


def check_logical_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that a packed weight cannot claim to have."""
    if dtype not in mxfp4.LOGICAL_DTYPES:
        raise TypeError(
            f"the logical dtype must be {', '.join(str(dtype) for dtype in mxfp4.LOGICAL_DTYPES)}, found {dtype}"
        )


def whole_numbers(name: str, values: Iterable[Any] | Tensor) -> list[int]:
    """The values as int.

    Raises:
        TypeError: one is no whole number; True and 0.5 would be taken for 1 and 0.
    """
    found = values.tolist() if isinstance(values, Tensor) else list(values)
    for value in found:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be whole numbers, found {value!r}")
    return [operator.index(value) for value in found]
