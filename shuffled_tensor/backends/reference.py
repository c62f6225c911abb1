# SPDX-License-Identifier: MIT
"""The layer in plain torch, on any device and from any layout: what the other backends are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.backends.base import Backend
from shuffled_tensor.moe.activations import ACTIVATIONS
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import MANY, Description, Kernels
from shuffled_tensor.mxfp4 import ScaleRule
from shuffled_tensor.tensor.storage import PackedStorage

__all__ = ["Reference"]


class Reference(Backend):
    """float32 throughout; one expert is dequantised at a time, piece by piece, and only those that received tokens.

    With ``activation_dtype="mxfp4"``, what enters each of the two GEMMs is first rounded to MXFP4, and back, by the
    scale rule. Rows beyond ``num_local_tokens`` are not computed; their results are zeros.
    """

    name = "reference"

    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        return None

    def describe(self, call: MoECall[PackedWeight]) -> Description:
        rule = call.intermediate_scale_rule
        activations = "as they come" if rule is None else f"mxfp4, {rule}"
        return Description((Kernels(range(1, MANY + 1), "plain torch", activations),), {})

    def run(self, call: MoECall[PackedWeight]) -> Tensor:
        """As :meth:`Backend.run`.

        Raises:
            ValueError: expert ids out of range, an ``expert_mask`` that does not mark as many experts as there are
                weights, or more ``num_local_tokens`` than rows.
        """
        rule = call.intermediate_scale_rule
        tokens = _tokens(call)
        hidden_states = (
            mxfp4.dequantize(call.hidden_states[tokens], call.hidden_scale[tokens])
            if call.hidden_scale is not None
            else _round_trip(call.hidden_states[tokens].float(), rule)
        )
        w13, w2, activate = call.w13.storage(), call.w2.storage(), ACTIVATIONS[call.activation]
        ids = _local_ids(call, call.topk_ids[tokens].long())
        weight = call.topk_weight[tokens].float()
        out = hidden_states.new_zeros(len(call.hidden_states), call.hidden)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue  # another rank's
            token, slot = (ids == expert).nonzero(as_tuple=True)
            factor = weight[token, slot].unsqueeze(1)
            gate_up = _product(hidden_states[token], w13, expert)
            if call.doweight_stage1:
                gate_up *= factor
            if call.w13_bias is not None:
                gate_up += call.w13_bias[expert]
            gate, up = gate_up.chunk(2, dim=1)
            intermediate = _round_trip(activate(gate, up, **call.parameters), rule)
            down = _product(intermediate, w2, expert)
            if call.w2_bias is not None:
                down += call.w2_bias[expert]
            out.index_add_(0, token, down if call.doweight_stage1 else down * factor)
        return out.to(call.out_dtype)


def _product(x: Tensor, weight: PackedStorage, expert: int) -> Tensor:
    """``x @ W.T`` in float32, of one expert's weight W."""
    qdata, scale = (data[0] for data in weight.canonical(range(expert, expert + 1)))
    return torch.cat([F.linear(x, piece) for piece in mxfp4.dequantize_pieces(qdata, scale)], 1)


def _round_trip(values: Tensor, rule: ScaleRule | None) -> Tensor:
    return values if rule is None else mxfp4.dequantize(*mxfp4.quantize(values, scale_rule=rule))


def _tokens(call: MoECall[PackedWeight]) -> slice:
    """The rows that are tokens, and no padding."""
    rows = len(call.hidden_states)
    count = rows if call.num_local_tokens is None else int(call.num_local_tokens)
    if not 0 <= count <= rows:
        raise ValueError(f"num_local_tokens must be in 0..{rows}, the rows of hidden_states, found {count}")
    return slice(count)


def _local_ids(call: MoECall[PackedWeight], ids: Tensor) -> Tensor:
    """Indices into the weights at hand, -1 for experts of other ranks."""
    mask, experts = call.expert_mask, len(call.w13.qdata)
    known = experts if mask is None else len(mask)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < known:
        accepted = f"in 0..{known - 1}" if known else "of no tokens, as there are no experts"
        raise ValueError(f"topk_ids must be {accepted}, found {ids.min().item()}..{ids.max().item()}")
    if mask is None:
        return ids
    local = mask != 0
    if local.sum() != experts:
        raise ValueError(f"expert_mask marks {int(local.sum())} local experts, but the weights hold {experts}")
    return torch.where(local, local.cumsum(0) - 1, -1)[ids]
