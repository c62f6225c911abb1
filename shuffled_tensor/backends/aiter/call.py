# SPDX-License-Identifier: MIT
"""What aiter's kernels would ignore or miscompute, and how they are called."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor.backends.aiter.versions import Installed, detect
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.tensor.policy import KernelOperands
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

_MULTIPLE = 256
"""Of what the hidden and the intermediate size are, padded, in w13 and in w2."""


def refuse(call: MoECall[PackedWeight]) -> str | None:
    """Why the kernels behind aiter would ignore or miscompute something in this call, or None."""
    installed = detect()
    rule = installed.version.scale_rule
    if call.activation != "silu":
        return f"activation={call.activation!r} would be computed as SiLU"
    if call.w13_bias is not None or call.w2_bias is not None:
        return "a bias would be ignored"
    if call.swiglu_limit is not None:
        return "swiglu_limit would be ignored"
    if call.expert_mask is not None:
        return (
            "expert_mask raises in these kernels, or is dropped; without it, give local topk_ids, and topk_weight 0 "
            "where an expert is another rank's"
        )
    if call.doweight_stage1:
        return "doweight_stage1 has no kernel that reads this layout"
    if call.hidden_scale is not None:
        return "hidden_scale would be ignored"
    if call.hidden_states.dtype is not torch.bfloat16:
        return f"hidden_states are {call.hidden_states.dtype}, not bfloat16"
    if call.out_dtype is not torch.bfloat16:
        return f"out_dtype is {call.out_dtype}, not bfloat16"
    if call.scale_rule not in (None, rule):
        return f"its kernels quantise by {rule!r}, not scale_rule={call.scale_rule!r}"
    for name, qdata in (("w13", call.w13.qdata), ("w2", call.w2.qdata)):
        if not qdata.is_contiguous():
            return f"the experts of {name} are not contiguous in memory; .clone() them"
    for name, of in (("w13", call.w13.geometry), ("w2", call.w2.geometry)):
        rows, columns = of.padded_rows // of.halves, of.padded_columns
        if rows % _MULTIPLE or columns % _MULTIPLE:  # else w13 and w2 agree: no align goes beyond the next multiple
            return (
                f"{name} is padded to {rows} rows{' of each half' * of.gate_up} and {columns} columns, not to "
                f"multiples of {_MULTIPLE}; make the weights with align={_MULTIPLE}"
            )
    hidden = call.w2.geometry.padded_rows
    if hidden <= installed.version.hidden_above:
        return (
            f"a hidden size of {hidden} (padded) would be miscomputed: aiter {installed.version.name} has kernels "
            f"for more than {installed.version.hidden_above}"
        )
    return _misread(call, installed)


def _misread(call: MoECall[PackedWeight], installed: Installed) -> str | None:
    """Where aiter would take other kernels than those that read the version's layout, which would be wrong without a
    word: what it would take is said by its own configuration for the call."""
    version, tokens = installed.version, call.hidden_states.shape[0]
    if version.other_kernel is None or isinstance(tokens, torch.SymInt) or not tokens:
        return None  # a symbolic size is looked up when the call runs
    module, fused_moe = installed.probed.module, installed.probed.fused_moe
    w13, w2 = call.w13.geometry, call.w2.geometry
    experts, topk, padded = len(call.w13.qdata), call.topk_ids.shape[1], fused_moe.get_padded_M(tokens)
    try:
        found = fused_moe.get_2stage_cfgs(
            padded,
            w2.padded_rows,
            w2.padded_columns,
            experts,
            topk,
            torch.bfloat16,
            torch.float4_e2m1fn_x2,
            torch.float4_e2m1fn_x2,
            module.QuantType.per_1x32,
            True,
            module.ActivationType.Silu,
            False,
            w13.padded_columns - w13.columns,
            w2.padded_columns - w2.columns,
            True,
            gate_mode=version.gate_mode,
            **version.config,
        )
    except Exception as error:  # as where flydsl is missing; the call itself would raise it too
        return f"aiter {version.name} has no kernel for this call ({type(error).__name__}: {error})"
    other = version.other_kernel(found)
    if other is None:
        return None
    return (
        f"{other} reads {version.layout.name!r} for {padded} tokens (padded), {experts} experts, hidden size "
        f"{w2.padded_rows}, intermediate size {w2.padded_columns} and topk {topk} in aiter {version.name}"
    )


def tagged_weight(qdata: Tensor, *, gate_up: bool, intermediate: int) -> Tensor:
    """The bytes as the float4_e2m1fn_x2 tensor that aiter takes, sharing them, with the version's tags on it."""
    version = detect().version
    weight = qdata.view(torch.float4_e2m1fn_x2)
    tags: dict[str, Any] = {"is_shuffled": True}
    if gate_up:
        tags.update(version.w13_tags)
    elif version.inter_real and intermediate % 128 == 0 and intermediate != 2 * qdata.shape[-1]:
        tags["inter_real"] = intermediate
    for name, value in tags.items():
        setattr(weight, name, value)
    return weight


def run(call: MoECall[PackedWeight]) -> Tensor:
    """Call ``aiter.fused_moe.fused_moe`` with what :func:`refuse` does not refuse.

    Raises:
        ValueError: weights that are not in the layout that this aiter reads.
    """
    installed = detect()
    version, probed = installed.version, installed.probed
    for name, found in (("w13", call.w13.layout), ("w2", call.w2.layout)):
        if found is not version.layout:
            raise ValueError(
                f"aiter {version.name} reads {version.layout.name!r}, but {name} is laid out as {found.name!r}"
            )
    w13, w2 = call.w13.geometry, call.w2.geometry
    if not len(call.hidden_states):  # as for a rank without requests; no version says that it takes an empty launch
        return call.hidden_states.new_empty(0, w2.rows)
    hidden_pad, intermediate_pad = w2.padded_rows - w2.rows, w2.padded_columns - w2.columns
    arguments: dict[str, Any] = {"gate_mode": version.gate_mode} if "gate_mode" in probed.call else {}
    if "is_shuffled" in probed.call:
        arguments["is_shuffled"] = True
    out: Tensor = probed.fused_moe.fused_moe(
        hidden_states=F.pad(call.hidden_states, (0, w13.padded_columns - w13.columns)).contiguous(),
        w1=tagged_weight(call.w13.qdata, gate_up=True, intermediate=w2.columns),
        w2=tagged_weight(call.w2.qdata, gate_up=False, intermediate=w2.columns),
        topk_weight=call.topk_weight.float().contiguous(),
        topk_ids=call.topk_ids.int().contiguous(),
        activation=probed.module.ActivationType.Silu,
        quant_type=probed.module.QuantType.per_1x32,
        w1_scale=call.w13.scale,
        w2_scale=call.w2.scale,
        hidden_pad=hidden_pad,
        intermediate_pad=intermediate_pad,
        **arguments,
    )
    return out[:, : w2.rows].contiguous()


def kernel_operands(weight: ShuffledMXFP4Tensor) -> KernelOperands:
    """A weight as aiter takes it."""
    if not weight.qdata.is_contiguous():
        raise ValueError("these experts are not contiguous in memory; clone() them first")
    version, storage = detect().version, weight._storage
    storage.check_usable_as(version.layout)
    storage.convert_layout_(version.layout)
    storage.locked_layout = version.layout
    tagged = tagged_weight(weight.qdata, gate_up=weight.gate_up, intermediate=weight.shape[-1])
    return KernelOperands(tagged, weight.scale, version.gate_mode)
