# SPDX-License-Identifier: MIT
"""``aiter.gemm_a4w4`` and its quantiser, as the fake aiter has them: computed from shuffled bytes, by index formulas.

They are wrong where the real ones are. A wrong layout of the weight, or scales of activations that are not shuffled, is
a wrong number; a bias is dropped; rows of scales that no token has are never written.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from shuffled_tensor import mxfp4

__all__ = ["gemm_a4w4", "get_hip_quant"]

_GARBAGE = 255  # what lies in memory that is never written; as a scale, NaN


def get_hip_quant(scale_rule: mxfp4.ScaleRule) -> Callable[[Enum], Callable[..., tuple[Tensor, Tensor]]]:
    """``aiter.get_hip_quant`` of a version that quantises by ``scale_rule``."""

    def per_1x32(
        x: Tensor,
        scale: Tensor | None = None,
        quant_dtype: torch.dtype = torch.float4_e2m1fn_x2,
        shuffle: bool = False,
        num_rows: Tensor | None = None,
        num_rows_factor: int = 1,
    ) -> tuple[Tensor, Tensor]:
        tokens, columns = x.shape
        assert columns % 32 == 0, f"n={columns} must be divisible by 32"
        assert x.stride(1) == 1, "the kernel reads rows as if they were contiguous"
        if scale is not None or num_rows is not None or quant_dtype is not torch.float4_e2m1fn_x2:
            raise NotImplementedError("the fake quantises to MXFP4, by scales of its own")
        codes, scales = mxfp4.quantize(x, scale_rule=scale_rule)
        if shuffle:
            padded = scales.new_full((-(-tokens // 256) * 256, -(-columns // 256) * 8), _GARBAGE)
            padded.view(-1)[_scale_offsets(tokens, columns // 32, padded.shape[1], x.device)] = scales
            scales = padded
        return codes.view(quant_dtype), scales.view(torch.float8_e8m0fnu)

    def of(quant_type: Enum) -> Callable[..., tuple[Tensor, Tensor]]:
        if quant_type.name != "per_1x32":
            raise NotImplementedError(f"unsupported quant type qType={quant_type!r}")
        return per_1x32

    return of


def gemm_a4w4(
    A: Tensor,
    B: Tensor,
    A_scale: Tensor,
    B_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    alpha: float | None = 1.0,
    beta: float | None = 0.0,
    bpreshuffle: bool | None = True,
) -> Tensor:
    """``[M, N]`` of packed codes ``[M, K/2]`` in rows and ``[N, K/2]`` in tiles, and the scales of both, in tiles."""
    if {A.dtype, B.dtype} != {torch.float4_e2m1fn_x2} or dtype is not torch.bfloat16:
        raise RuntimeError(f"gemm_a4w4_asm: unsupported types {A.dtype}, {B.dtype} to {dtype}")
    (tokens, width), rows = A.shape, B.shape[0]
    if B.shape[1] != width or rows % 256 or width % 128 or B_scale.numel() < rows * width // 16:
        raise RuntimeError("the kernel would read past the end of the weight")
    n, b = torch.arange(rows, device=B.device).unsqueeze(1), torch.arange(width, device=B.device)
    tiled = (n // 16) * 16 * width + (b // 16) * 256 + (n % 16) * 16 + b % 16
    weight = _bytes(B)[tiled if bpreshuffle else n * width + b]
    x = mxfp4.dequantize(_bytes(A).view(tokens, width), _read_scales(A_scale, tokens, width // 16))
    out = A.new_empty(-(-tokens // 32) * 32, rows, dtype=dtype)
    out[:tokens] = x @ mxfp4.dequantize(weight, _read_scales(B_scale, rows, width // 16)).T
    return out[:tokens]


def _read_scales(scale: Tensor, rows: int, blocks: int) -> Tensor:
    data = _bytes(scale)
    return data[_scale_offsets(rows, blocks, blocks, scale.device) % len(data)]  # beyond its end lies something, too


def _scale_offsets(rows: int, blocks: int, width: int, device: torch.device) -> Tensor:
    """Where the scale of each row and block lies in tiles, in memory ``width`` bytes wide."""
    n, k = torch.arange(rows, device=device).unsqueeze(1), torch.arange(blocks, device=device)
    return (n // 32) * 32 * width + (k // 8) * 256 + (k % 4) * 64 + (n % 16) * 4 + (k % 8 // 4) * 2 + (n % 32) // 16


def _bytes(data: Tensor) -> Tensor:
    """From a tensor's data pointer on, whatever its strides say: what a kernel sees."""
    return data.view(torch.uint8).as_strided((data.numel(),), (1,), data.storage_offset())
