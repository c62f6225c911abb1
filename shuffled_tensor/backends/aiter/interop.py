# SPDX-License-Identifier: MIT
"""Operators of other libraries that may be called with our tensors in place of packed bytes and their scales.

Each is a function registered under the operator's name, that says what its arguments mean to :func:`fused_moe`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.moe.op import fused_moe
from shuffled_tensor.mxfp4 import BLOCK, CODES
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["bind"]


def bind(operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the operator's own schema has them.

    Dispatch passes them by position, and leaves out trailing ones that have their default.
    """
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return defaults | {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs


def _same_bytes(scale: Tensor, own: Tensor) -> bool:
    """Whether a scale, of whatever shape, is a weight's own."""
    if isinstance(scale, FunctionalTensor):
        return True  # the tracer parts it from its memory; dynamo, which comes before, has shown it here as a fake
    alike = scale.storage_offset() == own.storage_offset() and scale.nbytes == own.nbytes and scale.is_contiguous()
    return alike and bool(torch._C._is_alias_of(scale, own))  # type: ignore[attr-defined]  # of fake tensors, too


# what fused_moe calls an argument, and what aiter does
_SAME = {
    "topk_weight": "topk_weight",
    "topk_ids": "topk_ids",
    "w13_bias": "bias1",
    "w2_bias": "bias2",
    "expert_mask": "expert_mask",
    "num_local_tokens": "num_local_tokens",
    "doweight_stage1": "doweight_stage1",
    "hidden_scale": "a1_scale",
    "out_dtype": "dtype",
}


@ShuffledMXFP4Tensor.operations.implements("aiter::fused_moe_")
def aiter_fused_moe(*args: Any, **kwargs: Any) -> Tensor:
    """``aiter.fused_moe.fused_moe(x, w1, w2, ...)`` with our weights: scales, gate mode, tags and pads are theirs."""
    operator = torch.ops.aiter.fused_moe_.default
    defaults, given = bind(operator, (), {}), bind(operator, args, kwargs)
    hidden_states, w13, w2 = (given.pop(name) for name in ("hidden_states", "w1", "w2"))
    for name, weight in (("w1", w13), ("w2", w2)):
        if not isinstance(weight, ShuffledMXFP4Tensor):
            raise TypeError(f"{name} must be a ShuffledMXFP4Tensor as the other is, found {type(weight).__name__}")
        scale = given.pop(f"{name}_scale")
        if scale is not None and not _same_bytes(scale, weight.scale):
            raise ValueError(f"{name}_scale must be None or {name}.scale itself: {name} carries its own")

    installed = versions.detect()
    version, enums = installed.version, installed.probed.module
    quant_type = given.pop("quant_type")
    if quant_type != int(enums.QuantType.per_1x32.value):
        raise ValueError(f"quant_type must be per_1x32 for MXFP4 weights, found the value {quant_type}")
    pads = {"hidden_pad": (w13, w13.shape[2]), "intermediate_pad": (w2, w2.shape[2])}
    for name, (weight, columns) in pads.items():
        own = weight.qdata.shape[-1] * 2 - columns
        if given.pop(name) not in (0, own):
            raise ValueError(f"{name} must be 0 or {own}, by which the weights themselves are padded")
    gate_mode, layout = given.pop("gate_mode"), w13._storage.fixed_layout or version.layout
    own_modes = [way.gate_mode for way in version.ways if way.layout is layout]
    if gate_mode not in (defaults["gate_mode"], *own_modes):
        raise ValueError(
            f"gate_mode={gate_mode!r} contradicts the weights: w1 is laid out as {layout.name!r}, which aiter "
            f"{version.name} reads with gate_mode={' or '.join(map(repr, own_modes))}; leave it out, or make the "
            "weights with another shuffle_kind"
        )
    if given.pop("is_shuffled", None) is False:
        raise ValueError("is_shuffled=False contradicts the weights, which are shuffled by the time of the call")

    activation = given.pop("activation")
    names = {int(getattr(enums.ActivationType, name).value): name.lower() for name in ("Silu", "Gelu", "Swiglu")}
    options = {ours: given.pop(theirs) for ours, theirs in _SAME.items()}
    options["activation"] = names.get(activation, f"the aiter value {activation}")
    options["swiglu_limit"] = given.pop("swiglu_limit") or None
    given.pop("moe_sorting_dispatch_policy", None)  # how tokens are sorted, not what is computed
    for name, value in given.items():
        if value != defaults[name]:
            raise ValueError(f"{name} is ignored or miscomputed by the kernels behind this call; leave it out")

    # An engine that pads activations as it pads weights gets as many columns back.
    hidden, padded_hidden = w13.shape[2], w13.qdata.shape[-1] * 2
    scale = options["hidden_scale"]
    per_element = 1 if scale is None else CODES.per_byte
    columns = hidden_states.shape[-1] * per_element
    if columns == padded_hidden:
        hidden_states = hidden_states[..., : hidden // per_element]
        options["hidden_scale"] = None if scale is None else scale[..., : hidden // BLOCK]
    out = fused_moe(hidden_states, w13, w2, backend="aiter", **options)
    return F.pad(out, (0, columns - hidden))
