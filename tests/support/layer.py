# SPDX-License-Identifier: MIT
"""A small layer, as a gfx950 GPU would hold it, and a count of how often its weights are laid out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe
from shuffled_tensor.layouts import Order
from shuffled_tensor.mxfp4 import CODES

from .bytes import coded, moderate_scales

EXPERTS, HIDDEN, INTERMEDIATE = 4, 544, 160
PADDED_HIDDEN, PADDED_INTERMEDIATE = 768, 256


def weight_parts(name: str) -> tuple[Tensor, Tensor]:
    """Row-major codes and scales of "w13" or "w2"."""
    rows, columns, salt = (2 * INTERMEDIATE, HIDDEN, 0) if name == "w13" else (HIDDEN, INTERMEDIATE, 3)
    return coded(EXPERTS, rows, columns // 2, salt=salt), moderate_scales(EXPERTS, rows, columns // 32)


def make_weight(name: str, device: str = "cpu", kind: str | None = None) -> ShuffledMXFP4Tensor:
    parts = (part.to(device) for part in weight_parts(name))
    order = {"gate_up": True, "row_order": "contiguous"} if name == "w13" else {"gate_up": False}
    return ShuffledMXFP4Tensor(*parts, shuffle_kind=kind, **order)


def make_layer(device: str = "cpu", tokens: int = 5, kind: str | None = None) -> dict[str, Any]:
    """Arguments of fused_moe."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(device),
        "w13": make_weight("w13", device, kind),
        "w2": make_weight("w2", device, kind),
        "topk_weight": torch.rand(tokens, 2, generator=generator).to(device),
        "topk_ids": torch.randint(EXPERTS, (tokens, 2), generator=generator, dtype=torch.int32).to(device),
    }


def packed_arguments(layer: dict[str, Any]) -> dict[str, Any]:
    """Arguments of shuffled_tensor::fused_moe_packed, from those of fused_moe."""
    packed = {name: value for name, value in layer.items() if name not in ("w13", "w2")}
    for name in ("w13", "w2"):
        weight = layer[name]
        packed |= {f"{name}_qdata": weight.qdata, f"{name}_scale": weight.scale}
        packed |= {f"{name}_rows": weight.shape[1], f"{name}_columns": weight.shape[2]}
        packed[f"{name}_layout"] = weight.shuffle_kind if weight.is_shuffled else "none"
    return packed


class MoE(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(make_weight("w13", device))
        self.w2_weight = nn.Parameter(make_weight("w2", device))

    def forward(self, hidden_states: Tensor, topk_weight: Tensor, topk_ids: Tensor) -> Tensor:
        return fused_moe(hidden_states, self.w13_weight, self.w2_weight, topk_weight, topk_ids)


class ShuffleCount:
    """How often the bytes of a weight were brought into a layout."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        shuffle = Order.shuffle

        def counting(order: Order, data: Tensor, out: Tensor | None = None, **scratch: Any) -> Tensor:
            self.count += order.part is CODES and out is data
            return shuffle(order, data, out, **scratch)

        monkeypatch.setattr(Order, "shuffle", counting)
