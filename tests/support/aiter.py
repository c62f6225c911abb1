# SPDX-License-Identifier: MIT
"""What is expected of each version of aiter's API, by its name; said here anew, and not taken from what is tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shuffled_tensor.testing import FakeAiter


@dataclass(frozen=True)
class Expected:
    layout: str
    scale_rule: str
    gate_mode: str
    any_shape: bool
    """Whether it reads that layout where no kernel is tuned for the shape, too."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Attributes of w1 beside `is_shuffled`."""


EXPECTED = {
    "#3470, shuffle_kind": Expected("mxfp4_moe", "even", "separated", False, {"shuffle_kind": "mxfp4_moe"}),
    "#3470, is_guinterleave": Expected("mxfp4_moe", "even", "separated", False, {"is_guinterleave": True}),
    "#3470": Expected("mxfp4_moe", "even", "interleave", False),
    "#3788": Expected("mxfp4_moe", "even", "separated", True, {"shuffle_kind": "mxfp4_moe"}),
    "#3827": Expected("mxfp4_moe", "even", "interleave", False),
    "#3832": Expected("mxfp4_separated", "round_up", "separated", True),
    "#4542": Expected("mxfp4_separated", "round_up", "separated", True),
    "before #3832": Expected("mxfp4_separated", "round_up", "separated", True),
    "before #3832, without is_ep": Expected("mxfp4_separated", "amax4", "separated", True),
}
READS = {"mxfp4_moe": "gate-up interleaved tiles", "mxfp4_separated": "separated tiles"}
OTHER = {"mxfp4_moe": "mxfp4_separated", "mxfp4_separated": "mxfp4_moe"}


def answer_of(fake: FakeAiter, layer: dict[str, Any]) -> Tensor:
    """What the fake's kernels make of the logical weights."""
    w13, w2 = (layer[name].dequantize(torch.float32) for name in ("w13", "w2"))
    return fake.answer(layer["hidden_states"], w13, w2, layer["topk_weight"], layer["topk_ids"])
