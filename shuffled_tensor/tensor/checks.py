# SPDX-License-Identifier: MIT
"""What the constructor of a tensor takes, and what it says to anything else."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shuffled_tensor import mxfp4
from shuffled_tensor.mxfp4 import CODES, SCALES
from shuffled_tensor.tensor.geometry import RowOrder

__all__ = ["check_logical_dtype", "check_parts", "check_plain", "check_row_order"]

_LOGICAL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROW_ORDERS = get_args(RowOrder)


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor of another library that wraps others, whose operations do not know ours."""
    if is_traceable_wrapper_subclass(tensor):
        found = type(tensor).__name__
        remedy = "its .to_local(), this rank's shard, or .full_tensor()" if found == "DTensor" else "a plain tensor"
        raise TypeError(f"{name} is a {found} of shape {list(tensor.shape)}, whose parts are not seen; pass {remedy}")


def check_parts(qdata: Tensor, scale: Tensor) -> None:
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
    expected = [*qdata.shape[:-1], columns // mxfp4.BLOCK]
    if list(scale.shape) != expected:
        raise ValueError(
            f"scale must be {expected}, one for {mxfp4.BLOCK} columns of qdata {list(qdata.shape)}, found shape "
            f"{list(scale.shape)}"
        )
    if qdata.device != scale.device:
        raise ValueError(f"qdata and scale must be on one device, found {qdata.device} and {scale.device}")


def check_row_order(gate_up: bool, row_order: RowOrder | None, rows: int) -> None:
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
    if dtype not in _LOGICAL_DTYPES:
        raise TypeError(
            f"the logical dtype must be {', '.join(str(dtype) for dtype in _LOGICAL_DTYPES)}, found {dtype}"
        )
