# SPDX-License-Identifier: MIT
"""A layer as aiter takes it, and a weight as its kernels do."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.backends.aiter.routes import Question, Refused, environment, routes
from shuffled_tensor.backends.aiter.versions import Installed, Way, detect
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.activations import ACTIVATIONS
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import Description, Kernels
from shuffled_tensor.tensor.geometry import Geometry
from shuffled_tensor.tensor.policy import Reading, as_operand
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

_LIMITS = {"silu": math.inf, "swiglu": 7.0}
"""Where a call names none, of the activations that kernels of any version have."""

_MULTIPLE = 256
"""What the padded hidden and intermediate sizes of both weights must be multiples of."""


class Prepared(NamedTuple):
    """What is found out about a call before it is made."""

    question: Question
    way: Way
    routes: tuple[Kernels, ...]
    """What runs for every number of tokens."""


def refuse(call: MoECall[PackedWeight]) -> str | None:
    """Why aiter would ignore or miscompute something in this call, whatever the number of its tokens, or None."""
    try:
        prepare(call)
    except Refused as refused:
        return str(refused)
    return None


def prepare(call: MoECall[PackedWeight]) -> Prepared:
    """How to make a call: found out once for calls that are alike in what it depends on.

    Raises:
        Refused: nothing that reads its weights in the layout that they have, or will have, takes it.
    """
    installed = detect()
    key = (
        *(
            (weight.geometry, weight.fixed, len(weight.qdata), weight.qdata.is_contiguous())
            for weight in (call.w13, call.w2)
        ),
        int(call.topk_ids.shape[1]),  # a compiler may know it by a symbol
        call.hidden_states.dtype,
        *(
            tensor is None
            for tensor in (call.w13_bias, call.w2_bias, call.expert_mask, call.num_local_tokens, call.hidden_scale)
        ),
        *(call.activation, call.doweight_stage1, call.swiglu_limit, call.swiglu_alpha),
        *(call.activation_dtype, call.scale_rule, call.out_dtype),
        *environment(),
    )
    found: Prepared | str | None = installed.prepared.get(key)
    if found is None:
        reasons: list[Refused] = []
        try:
            _check(call)
            question = _question(call)
            found = Prepared(question, *_choose(call, installed, question, reasons))
        except Refused as refused:
            found = str(refused)  # itself, it would keep the call's tensors
        if all(reason.__cause__ is None for reason in reasons):  # else aiter failed, and may not do so again
            installed.prepared[key] = found
    if isinstance(found, str):
        raise Refused(found)
    return found


def _choose(
    call: MoECall[PackedWeight], installed: Installed, question: Question, reasons: list[Refused]
) -> tuple[Way, tuple[Kernels, ...]]:
    """The first way that takes a call, and what then runs; ``reasons`` gets why others do not.

    Raises:
        Refused: there is none.
    """
    layout = call.w13.fixed or installed.version.layout
    for way in sorted(installed.version.ways, key=lambda way: way.layout is not layout):  # the others for the message
        try:
            found = _suited(call, routes(installed, way, question))
        except Refused as reason:
            reasons.append(reason)
            continue
        if way.layout is layout:
            return way, found
        raise Refused(f"{reasons[0]}; it would take weights made with shuffle_kind={way.layout.name!r}")
    raise reasons[0]


def _suited(call: MoECall[PackedWeight], found: tuple[Kernels, ...]) -> tuple[Kernels, ...]:
    """Routes that round as a call asks for.

    Raises:
        Refused: they don't.
    """
    if call.activation_dtype is not None:
        rules = {f"mxfp4, {rule}" for rule in ([call.scale_rule] if call.scale_rule else mxfp4.SCALE_RULES)}
        for kernels in found:
            if kernels.activations not in rules:
                rule = f" and scale_rule={call.scale_rule!r}" if call.scale_rule else ""
                raise Refused(
                    f"{kernels.name} has activations {kernels.activations}, and the call asks for "
                    f"activation_dtype='mxfp4'{rule}"
                )
    return found


def _check(call: MoECall[PackedWeight]) -> None:
    """Raise Refused for what no kernel of any version takes."""
    if call.doweight_stage1:
        raise Refused("doweight_stage1 has no kernel that reads these layouts")
    if call.activation not in _LIMITS:
        raise Refused(f"no kernel known here computes activation={call.activation!r}; they compute 'silu' and 'swiglu'")
    if call.swiglu_alpha not in (None, ACTIVATIONS["swiglu"].parameters["swiglu_alpha"]):
        raise Refused(f"swiglu_alpha={call.swiglu_alpha:g} would be ignored: 1.702 is compiled in")
    if call.hidden_scale is None and call.hidden_states.dtype is not torch.bfloat16:
        raise Refused(f"hidden_states are {call.hidden_states.dtype}, not bfloat16")
    if call.out_dtype is not torch.bfloat16:
        raise Refused(f"out_dtype is {call.out_dtype}, not bfloat16")
    for name, weight in (("w13", call.w13), ("w2", call.w2)):
        if not weight.qdata.is_contiguous():
            raise Refused(f"the experts of {name} are not contiguous in memory; .clone() them")
        of = weight.geometry
        rows, columns = of.padded_rows // of.halves, of.padded_columns
        if rows % _MULTIPLE or columns % _MULTIPLE:  # else w13 and w2 agree: no align goes beyond the next multiple
            raise Refused(
                f"{name} is padded to {rows} rows{' of each half' * of.gate_up} and {columns} columns, not to "
                f"multiples of {_MULTIPLE}; make the weights with align={_MULTIPLE}"
            )


def _question(call: MoECall[PackedWeight]) -> Question:
    w2 = call.w2.geometry
    return Question(
        experts=len(call.w13.qdata),
        hidden=w2.padded_rows,
        intermediate=w2.padded_columns,
        topk=int(call.topk_ids.shape[1]),  # a compiler may know it by a symbol
        activation=call.activation,
        limit=call.swiglu_limit or _LIMITS[call.activation],
        # CK-Tile has no kernels for SwiGLU without them, and computes nothing then
        bias=call.activation == "swiglu" or call.w13_bias is not None or call.w2_bias is not None,
        expert_mask=call.expert_mask is not None,
        packed=call.hidden_scale is not None,
        num_local_tokens=call.num_local_tokens is not None,
    )


def describe(call: MoECall[PackedWeight]) -> Description:
    """How a call that :func:`refuse` does not refuse would be made."""
    _, way, found = prepare(call)
    return Description(found, {"is_shuffled": True, **dict(way.tags), "gate_mode": way.gate_mode})


def run(call: MoECall[PackedWeight]) -> Tensor:
    """Call ``aiter.fused_moe.fused_moe`` with what :func:`refuse` does not refuse.

    Raises:
        ValueError: weights that are not in the layout that the kernels read.
    """
    installed, (question, way, _) = detect(), prepare(call)
    for name, weight in (("w13", call.w13), ("w2", call.w2)):
        if not weight.layout.same_bytes(way.layout, weight.geometry.gate_up):
            raise ValueError(f"aiter would read {name} as {way.layout.name!r}, but it lies as {weight.layout.name!r}")
    if not len(call.hidden_states):  # as for a rank without requests; no version says that it takes an empty launch
        return call.hidden_states.new_empty(0, call.w2.geometry.rows, dtype=call.out_dtype)
    out: Tensor = installed.probed.fused_moe.fused_moe(**_arguments(call, question, installed, way))
    return out[:, : call.w2.geometry.rows].contiguous()


def _arguments(call: MoECall[PackedWeight], question: Question, installed: Installed, way: Way) -> dict[str, Any]:
    """Of `aiter.fused_moe.fused_moe`. Pads are zeros, and never told: where they are told, CK-Tile's kernels leave the
    last rows of w13 out, which in the separated layout are rows of up (aiter #3862)."""
    probed = installed.probed
    w13, w2, enums = call.w13.geometry, call.w2.geometry, probed.module
    intermediate, columns = w2.padded_columns, w13.padded_columns
    hidden_states, ids, weight, mask = call.hidden_states, call.topk_ids.int(), call.topk_weight.float(), None
    arguments: dict[str, Any] = {}
    if call.hidden_scale is not None:
        hidden_states = _padded(hidden_states.view(torch.uint8), columns // 2).view(torch.float4_e2m1fn_x2)
        scale = call.hidden_scale.view(torch.uint8)
        arguments["a1_scale"] = _padded(scale, columns // mxfp4.BLOCK, value=mxfp4.SCALES.pad)
        arguments["dtype"] = call.out_dtype
    else:
        hidden_states = _padded(hidden_states, columns)
    if question.bias:
        biases = ("bias1", call.w13_bias, w13, intermediate), ("bias2", call.w2_bias, w2, columns)
        for name, bias, of, size in biases:
            if bias is None:
                arguments[name] = hidden_states.new_zeros(question.experts, of.halves * size, dtype=torch.float32)
            else:
                arguments[name] = _padded(bias.float().unflatten(1, (of.halves, -1)), size).flatten(1)
    if call.expert_mask is not None:  # by aiter's convention, tokens have one slot more, whose expert is nobody's
        mask = F.pad(call.expert_mask, (0, 1))
        ids, weight = F.pad(ids, (0, 1), value=len(call.expert_mask)), F.pad(weight, (0, 1))
    if call.swiglu_limit is not None or call.activation == "swiglu":  # where no limit may mean another one
        arguments["swiglu_limit"] = question.limit
    if call.num_local_tokens is not None:
        arguments["num_local_tokens"] = call.num_local_tokens.reshape(1)
    if "is_shuffled" in probed.call:
        arguments["is_shuffled"] = True
    if "gate_mode" in probed.call:
        arguments["gate_mode"] = way.gate_mode
    return arguments | {
        "hidden_states": hidden_states,
        "w1": _weight(call.w13, way, installed),
        "w2": _weight(call.w2, way, installed),
        "topk_weight": weight.contiguous(),
        "topk_ids": ids.contiguous(),
        "expert_mask": mask,
        "activation": getattr(enums.ActivationType, call.activation.capitalize()),
        "quant_type": enums.QuantType.per_1x32,
        "w1_scale": call.w13.scale,
        "w2_scale": call.w2.scale,
    }


def _padded(data: Tensor, columns: int, value: int = 0) -> Tensor:
    pad = columns - data.shape[-1]
    padded = F.pad(data, (0, pad), value=value) if pad else data  # without pads, torch would make a copy
    return padded.contiguous()


def attributes(geometry: Geometry, way: Way, installed: Installed) -> dict[str, Any]:
    """What is to stand on the tensor of a weight."""
    columns, tags = geometry.columns, {}
    if geometry.gate_up:
        tags = dict(way.tags)
    elif installed.version.inter_real and columns % 128 == 0 and columns != geometry.padded_columns:
        tags = {"inter_real": columns}
    return {"is_shuffled": True, **tags}


def _weight(packed: PackedWeight, way: Way, installed: Installed) -> Tensor:
    return as_operand(packed.qdata, attributes(packed.geometry, way, installed))


def reading(weight: ShuffledMXFP4Tensor, layout: Layout | None) -> Reading | None:
    """How kernels of this aiter read a weight in a layout, or in the one that it is to have; None where none do."""
    installed, storage = detect(), weight._storage
    wanted = layout or storage.fixed_layout or installed.version.layout
    for way in installed.version.ways:
        if way.layout.same_bytes(wanted, storage.geometry.gate_up):
            return Reading(wanted, way.gate_mode, attributes(storage.geometry, way, installed))
    return None
