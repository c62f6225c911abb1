# SPDX-License-Identifier: MIT
"""Test data: bytes that tell their position, and weights made of them."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor

LAYOUTS = ("none", "mxfp4_moe", "mxfp4_separated", "made_up")
"""For tests that hold for every layout, the one of tests/support/made_up.py among them; conftest.py adds that row."""
# K=512, where a second shuffle would go unseen, without pads; and padded in every way
SHAPES = [(2, 512, 512), (3, 96, 160)]


def coded(*shape: int, salt: int = 0) -> Tensor:
    """Bytes that tell their position: the input of golden/shuffle_digests.json, in which runs of 16 bytes differ."""
    index = torch.arange(math.prod(shape), dtype=torch.int64) + salt
    return ((index * 2654435761 % 2**32) >> 24).to(torch.uint8).view(shape)


def moderate_scales(*shape: int, salt: int = 7) -> Tensor:
    """Position-coded e8m0 bytes around 1.0, so that products of them stay far from overflow."""
    return 120 + coded(*shape, salt=salt) % 8


def marked(*shape: int, salt: int = 0) -> Tensor:
    """Bytes hashed from their position: no two runs of 16 are alike, and no shift maps one onto another."""
    x = (torch.arange(torch.Size(shape).numel()) + salt * 1000003) * 0x9E3779B1 % 2**32
    x = (x ^ x >> 15) * 0x85EBCA77 % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE3D % 2**32
    return (x >> 16 & 255).to(torch.uint8).view(shape)


def marked_parts(experts: int, rows: int, columns: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Row-major codes, and scales between 2**-100 and 2**99."""
    scale = 27 + marked(experts, rows, columns // 32, salt=salt + 50) % 200
    return marked(experts, rows, columns // 2, salt=salt), scale


def weight_of(
    parts: tuple[Tensor, Tensor], layout: str = "none", *, gate_up: bool = True, dtype: torch.dtype = torch.float32
) -> ShuffledMXFP4Tensor:
    order = "contiguous" if gate_up else None
    own = (part.clone() for part in parts)
    return ShuffledMXFP4Tensor(*own, gate_up=gate_up, row_order=order, dtype=dtype).shuffle_(layout)


def addresses(*weights: ShuffledMXFP4Tensor) -> list[int]:
    return [part.data_ptr() for weight in weights for part in (weight.qdata, weight.scale)]


def poke(target: Tensor, values: Tensor) -> None:
    """Write bytes as RDMA does: to an address, past torch."""
    values = values.contiguous()
    assert target.is_contiguous()
    assert target.nbytes == values.nbytes
    ctypes.memmove(target.data_ptr(), values.data_ptr(), values.nbytes)
