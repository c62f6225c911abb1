# SPDX-License-Identifier: MIT
"""What is expected of each version of aiter's API, by its name; said here anew, and not taken from what is tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import shuffle_scale, shuffle_weight
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
    "#3470 (shuffle_kind)": Expected("mxfp4_moe", "even", "separated", False, {"shuffle_kind": "mxfp4_moe"}),
    "#3470 (is_guinterleave)": Expected("mxfp4_moe", "even", "separated", False, {"is_guinterleave": True}),
    "#3470": Expected("mxfp4_moe", "even", "interleave", False),
    "#3788": Expected("mxfp4_moe", "even", "separated", True, {"shuffle_kind": "mxfp4_moe"}),
    "#3827": Expected("mxfp4_moe", "even", "interleave", False),
    "v0.1.18 and later": Expected("mxfp4_separated", "round_up", "separated", True),
    "#4542": Expected("mxfp4_separated", "round_up", "separated", True),
    "v0.1.16, v0.1.17": Expected("mxfp4_separated", "round_up", "separated", True),
    "v0.1.15": Expected("mxfp4_separated", "amax4", "separated", False),
    "v0.1.14": Expected("mxfp4_separated", "amax4", "separated", False),
}
# By commit or release: the version that it must be known as.
VERSION_OF = {
    "57e74501a5": "#3470 (shuffle_kind)",
    "39e2ed7e8a": "#3470 (is_guinterleave)",
    "d6ede4548e": "#3470",
    "46ecc4489d": "#3788",
    "05567f6668": "#3827",
    "b2dd7703df": "v0.1.18 and later",
    "de07f3885e": "v0.1.18 and later",
    "e4048607a5": "v0.1.18 and later",  # main, 2026-08-22
    "55f4bfeb5e": "#4542",
    # The open pull request #4398 has the signatures of #3832, and that is what it must be known as: it reads w1 as
    # gate-up interleaved only if that has a true attribute `is_guinterleave`, which weights passed as #3832 never get.
    "2bb3bca2df": "v0.1.18 and later",
    "v0.1.14": "v0.1.14",
    "v0.1.15": "v0.1.15",
    "v0.1.16": "v0.1.16, v0.1.17",
    "v0.1.17": "v0.1.16, v0.1.17",
    "v0.1.16.post4": "v0.1.18 and later",
    "v0.1.16.post6": "v0.1.18 and later",
    "v0.1.17-longctx": "v0.1.18 and later",
    "v0.1.18": "v0.1.18 and later",
    "v0.1.19": "v0.1.18 and later",
    "v0.1.20.post1": "v0.1.18 and later",
}
READS = {"mxfp4_moe": "gate-up interleaved tiles", "mxfp4_separated": "separated tiles"}
OTHER = {"mxfp4_moe": "mxfp4_separated", "mxfp4_separated": "mxfp4_moe"}


def answer_of(fake: FakeAiter, layer: dict[str, Any]) -> Tensor:
    """What the fake's kernels make of the logical weights."""
    w13, w2 = (layer[name].dequantize(torch.float32) for name in ("w13", "w2"))
    return fake.answer(layer["hidden_states"], w13, w2, layer["topk_weight"], layer["topk_ids"])


def plain_call(
    layer: dict[str, Any],
    kind: str | None,
    gate_mode: str,
    *,
    tags: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float4_e2m1fn_x2,
    **options: Any,
) -> Tensor:
    """What aiter's own function makes of a layer, given plain tensors of one dtype with their bytes in a layout (None:
    row-major), and attributes of w1, of which w2 has `is_shuffled` alone."""
    import aiter

    tags = {"is_shuffled": True} if tags is None else tags
    given = dict(layer)
    of = {"w1": given.pop("w13"), "w2": given.pop("w2")}
    hidden, intermediate = of["w2"].qdata.shape[1], of["w2"].qdata.shape[2] * 2
    for name, weight in of.items():
        codes, scale, gate_up = weight.qdata.clone(), weight.scale.clone(), name == "w1"
        if kind:
            codes, scale = (
                shuffle(part, kind, gate_up=gate_up)
                for shuffle, part in ((shuffle_weight, codes), (shuffle_scale, scale))
            )
        given |= {name: codes.view(dtype), f"{name}_scale": scale}
        vars(given[name]).update(tags if gate_up else {tag: tags[tag] for tag in tags if tag == "is_shuffled"})
    for name, ours, size in (("bias1", "w13_bias", intermediate), ("bias2", "w2_bias", hidden)):
        if ours in given:
            bias = given.pop(ours)
            halves = bias.unflatten(1, (2 if name == "bias1" else 1, -1))
            given[name] = F.pad(halves, (0, size - halves.shape[2])).flatten(1)
    columns = given["hidden_states"].shape[1]
    given["hidden_states"] = F.pad(given["hidden_states"], (0, hidden - columns))
    given["activation"] = aiter.ActivationType[given.pop("activation", "silu").capitalize()]
    out: Tensor = aiter.fused_moe.fused_moe(quant_type=aiter.QuantType.per_1x32, gate_mode=gate_mode, **given | options)
    return out[:, :columns]
