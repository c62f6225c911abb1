# SPDX-License-Identifier: MIT
"""Checkpoints of one layer, what engines should make of them, and how far off they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.bytes import coded, moderate_scales
from tests.support.judges import dense, dense_moe, relative_error, rounded_moe

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 512, 256, 16
ORDER = [2, 0, 3, 1]
"""The expert that comes to each place when experts are rebalanced."""


QUARK = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    "exclude": [],
    "global_quant_config": {
        "bias": None,
        "output_tensors": None,
        **{
            name: {"dtype": "fp4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "is_dynamic": dynamic,
                   "scale_format": "e8m0", "scale_type": "float", "observer_cls": "PerBlockMXObserver",
                   "round_method": "half_even", "symmetric": None}
            for name, dynamic in (("input_tensors", True), ("weight", False))
        },
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "packed_modules_mapping": {},
}  # fmt: skip
"""Of amd/*-MXFP4's config.json."""


class Checkpoint(NamedTuple):
    """Of one layer's experts."""

    tensors: dict[str, Tensor]
    w13: Tensor
    """float64 values ``[E, 2I, H]``: all gate rows, then all up rows."""
    w2: Tensor
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    def permuted(self, order: list[int]) -> Checkpoint:
        """What is right when experts have changed places."""
        biases = (None if bias is None else bias[order] for bias in self[3:])
        return Checkpoint({}, self.w13[order], self.w2[order], *biases)


def _parts(rows: int, columns: int, salt: int) -> tuple[Tensor, Tensor]:
    return coded(EXPERTS, rows, columns // 2, salt=salt), moderate_scales(EXPERTS, rows, columns // 32, salt=salt + 7)


def quark(salt: int, intermediate: int = INTERMEDIATE) -> Checkpoint:
    """As amd/*-MXFP4 hold them: a tensor for each expert and projection."""
    tensors, values = {}, {}
    for name, rows, columns in (
        ("gate_proj", intermediate, HIDDEN), ("up_proj", intermediate, HIDDEN), ("down_proj", HIDDEN, intermediate)
    ):  # fmt: skip
        qdata, scale = _parts(rows, columns, salt + 1009 * len(values))
        values[name] = dense(qdata, scale)
        for expert in range(EXPERTS):
            tensors[f"{expert}.{name}.weight"] = qdata[expert]
            tensors[f"{expert}.{name}.weight_scale"] = scale[expert]
    return Checkpoint(tensors, torch.cat([values["gate_proj"], values["up_proj"]], 1), values["down_proj"])


def gpt_oss(salt: int) -> Checkpoint:
    """All experts in one tensor, gate and up rows in turn, with biases."""
    w13, w2 = _parts(2 * INTERMEDIATE, HIDDEN, salt), _parts(HIDDEN, INTERMEDIATE, salt + 1009)
    generator = torch.Generator().manual_seed(salt)
    w13_bias, w2_bias = (torch.randn(EXPERTS, size, generator=generator).bfloat16() for size in (512, HIDDEN))
    tensors = {
        "w13_weight": w13[0], "w13_weight_scale": w13[1], "w2_weight": w2[0], "w2_weight_scale": w2[1],
        "w13_bias": w13_bias, "w2_bias": w2_bias,
    }  # fmt: skip
    rows = torch.arange(2 * INTERMEDIATE).view(-1, 2).T.flatten()  # gate rows, then up rows
    return Checkpoint(tensors, dense(*w13)[:, rows], dense(*w2), w13_bias[:, rows], w2_bias)


class Inputs(NamedTuple):
    hidden_states: Tensor
    topk_weight: Tensor
    topk_ids: Tensor


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    weight, ids = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1).topk(2)
    return Inputs(torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16() / 64, weight, ids.int())


def error(out: Tensor, right: Checkpoint, *, fused: bool = True) -> float:
    """Of a layer's output, as a part of the right one: float64, by the numerics of the kernels that read the layer."""
    given = inputs()
    if right.w13_bias is not None:
        biases = {"w13_bias": right.w13_bias, "w2_bias": right.w2_bias}
        expected = dense_moe(given[0], right.w13, right.w2, *given[1:], activation="swiglu", **biases)
    else:
        expected = rounded_moe("mxfp4, round_up", given[0], right.w13, right.w2, *given[1:], fused=fused)
    return relative_error(out, expected)


def reorder(weights: list[Tensor]) -> None:
    """As engines move experts within a rank: through a buffer, row by row."""
    buffers = [torch.empty_like(weight) for weight in weights]
    for weight, buffer in zip(weights, buffers, strict=True):
        for place, expert in enumerate(ORDER):
            buffer[place].copy_(weight[expert])
        for place in range(EXPERTS):
            weight[place].copy_(buffer[place])
