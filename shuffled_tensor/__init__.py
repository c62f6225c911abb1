# SPDX-License-Identifier: MIT
"""MXFP4 expert weights whose byte order is part of the tensor."""

from shuffled_tensor import aten as _aten  # noqa: F401  (registers the operations)
from shuffled_tensor.layouts import ShuffleKind, shuffle_scale, shuffle_weight, unshuffle_scale, unshuffle_weight
from shuffled_tensor.mxfp4 import SCALE_RULES, dequantize, quantize
from shuffled_tensor.ops import fused_moe
from shuffled_tensor.tensor import ShuffledMXFP4Tensor

__all__ = [
    "SCALE_RULES",
    "ShuffleKind",
    "ShuffledMXFP4Tensor",
    "dequantize",
    "fused_moe",
    "quantize",
    "shuffle_scale",
    "shuffle_weight",
    "unshuffle_scale",
    "unshuffle_weight",
]
