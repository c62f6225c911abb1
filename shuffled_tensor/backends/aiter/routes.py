# SPDX-License-Identifier: MIT
"""Which of its kernels aiter runs for a call, what these read, take and round, and which calls must not reach them.

No version number tells, and no shape: aiter chooses by a tuned table, by what else is installed and by variables of the
environment. So its own function is asked for the configuration of a call, with the arguments that `fused_moe` will ask
it with, and what it answers is looked up in :data:`FAMILIES`; what is in no row is not run. As it chooses by the number
of tokens, too, all numbers are asked for at once: an aiter takes a layer whatever the number of tokens, or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from shuffled_tensor.backends.aiter.versions import MOE, SEPARATED, Installed, Probed, Way
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.op import MANY, Kernels

__all__ = ["FAMILIES", "Family", "Question", "Refused", "environment", "routes"]


class Question(NamedTuple):
    """What a route depends on, beside the number of tokens. Sizes are padded."""

    experts: int
    hidden: int
    intermediate: int
    topk: int
    activation: str
    limit: float
    """To which gate and up are clamped."""
    bias: bool
    """Whether both GEMMs are given biases, if only zeros."""
    expert_mask: bool
    packed: bool
    """Whether the hidden states are MXFP4 already."""
    num_local_tokens: bool


class Stages(NamedTuple):
    """A configuration that aiter has found, as the rows below look at it."""

    first: str
    """The name of the function that runs the first GEMM."""
    options: Mapping[str, Any]
    """What is bound to it."""
    second: str
    dtype: torch.dtype
    """In which the first GEMM is given activations."""
    hip: bool
    """Whether the first HIP kernels run both GEMMs instead."""
    biases: bool
    """Whether both GEMMs are given theirs."""
    parts: bool
    """Whether the configuration says that K goes in parts, and so leaves activations in bfloat16 where it can."""

    @property
    def kernel(self) -> str:
        return str(self.options.get("kernelName", ""))

    def flydsl(self, kernel: str) -> bool:
        """Whether it is this kernel of FlyDSL's. Where its name has `_kb`, K goes in parts, and another kernel computes
        the activation."""
        return self.first == "_flydsl_stage1_wrapper" and kernel in self.kernel

    def cktile(self, split_k: bool, rows: str | None = None) -> bool:
        """Whether it is CK-Tile's kernel: for all of K; or for parts of it, with another one that computes the
        activation from such rows."""
        return (
            self.first == "cktile_moe_stage1"
            and (self.options.get("split_k", 1) > 1) is split_k
            and self.options.get("post_activation_layout") == rows
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row: kernels that read, take and round alike. What they do not take, they ignore without a word."""

    name: str
    matches: Callable[[Stages], bool]
    layout: Layout
    """Of w13; w2 lies alike in all."""
    numerics: str
    """What they make of activations; `rule` is the version's by which it quantises them."""
    activations: tuple[str, ...] = ("silu",)
    limits: tuple[float, ...] | None = (math.inf,)
    """Those that they clamp to; None where they take any."""
    bias: bool = False
    expert_mask: bool = False
    packed: bool = False
    """Whether they take hidden states that are MXFP4 already."""
    num_local_tokens: bool = False
    """Of those that have it False, most would take it in an emulation; no engine is known to call them so."""


_FP4, _FP8, _BF16 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.bfloat16

# A configuration is of the first family that knows it.
FAMILIES = (
    Family(
        name="HIP a4w4", matches=lambda s: s.hip,
        layout=MOE, numerics="mxfp4, even",
    ),
    Family(  # bound to interleave=True, they read the other layout; no call of ours leads there
        name="mxmoe a4w4",
        matches=lambda s: s.first == "_mxfp4_a4w4_stage1_fw" and not s.options.get("interleave", True),
        layout=SEPARATED, numerics="mxfp4, {rule}",
    ),
    Family(
        name="FlyDSL a4w4, K in parts", matches=lambda s: s.flydsl("_afp4_wfp4_") and "_kb" in s.kernel,
        layout=SEPARATED, numerics="mxfp4, {rule}",
    ),
    Family(
        name="FlyDSL a4w4", matches=lambda s: s.flydsl("_afp4_wfp4_") and "_gui" not in s.kernel and s.dtype is _FP4,
        layout=SEPARATED, numerics="mxfp4, {rule}", activations=("silu", "swiglu"), limits=None,
        bias=True, expert_mask=True, packed=True, num_local_tokens=True,
    ),
    Family(
        name="FlyDSL a8w4", matches=lambda s: s.flydsl("_afp8_wfp4_") and "_gui" in s.kernel and s.dtype is _FP8,
        layout=MOE, numerics="mxfp8", activations=("silu", "swiglu"), limits=None, bias=True, expert_mask=True,
    ),
    Family(
        name="CK-Tile a16w4", matches=lambda s: s.cktile(split_k=False) and s.dtype is _BF16,
        layout=MOE, numerics="bfloat16", activations=("swiglu",), limits=(7.0,), bias=True, expert_mask=True,
    ),
    Family(
        name="CK-Tile a8w4, then a16w4", matches=lambda s: s.cktile(split_k=False) and s.dtype is _FP8 and s.parts,
        layout=MOE, numerics="mxfp8, then bfloat16", activations=("swiglu",), limits=(7.0,),
        bias=True, expert_mask=True,
    ),
    Family(
        name="CK-Tile a8w4", matches=lambda s: s.cktile(split_k=False) and s.dtype is _FP8,
        layout=MOE, numerics="mxfp8", activations=("swiglu",), limits=(7.0,), bias=True, expert_mask=True,
    ),
    Family(
        name="CK-Tile a16w4, K in parts", matches=lambda s: s.cktile(True, "standard") and s.dtype is _BF16,
        layout=SEPARATED, numerics="bfloat16", activations=("swiglu",), limits=(7.0,), bias=True, expert_mask=True,
    ),
    Family(  # without an activation: some versions put MXFP4 activations in, and all drop biases and limits
        name="CK-Tile a16w4, K in parts, of interleaved rows", matches=lambda s: s.first == "cktile_moe_stage1",
        layout=MOE, numerics="bfloat16", activations=(),
    ),
    Family(
        name="CK a4w4", matches=lambda s: s.first == "ck_moe_stage1" and s.dtype is _FP4,
        layout=SEPARATED, numerics="mxfp4, {rule}",
    ),
    Family(  # AMD's machine code, which was run on a simulator
        name="one-stage a4w4", matches=lambda s: s.first == "fused_moe_1stage" and s.dtype is _FP4,
        layout=SEPARATED, numerics="mxfp4, {rule}",
    ),
)  # fmt: skip

_SECOND = {
    "",  # none: the first runs both
    "_mxfp4_a4w4_stage2_fw",
    "_flydsl_stage2_wrapper",
    "_flydsl_v2_stage2_wrapper",
    "cktile_moe_stage2",
    "ck_moe_stage2_fwd",
}
"""Functions that run the second GEMM, and read w2 as it lies in every layout. Whether they take its bias, the
configuration says."""


class Refused(Exception):
    """Why a layer must not reach aiter."""


# What aiter reads of the environment when it chooses.
_KNOBS = (
    "AITER_BF16_FP8_MOE_BOUND",
    "AITER_FLYDSL_FORCE",
    "AITER_KSPLIT",
    "AITER_BYPASS_TUNE_CONFIG",
    "AITER_ONLINE_TUNE",
    "AITER_CONFIG_FMOE",
)

_LOSSY = ("AITER_MXFP4_INTERMEDIATE", "AITER_FLYDSL_STAGE2_FP8")
"""What makes it round more than the families say."""


def environment() -> tuple[str | None, ...]:
    """What routes depend on beside the installed aiter and the question."""
    return tuple(map(os.environ.get, (*_KNOBS, *_LOSSY)))


def routes(installed: Installed, way: Way, question: Question) -> tuple[Kernels, ...]:
    """What aiter runs, for every number of tokens.

    Raises:
        Refused: for some number of them there is no kernel, or one that reads another layout, or that would ignore or
            miscompute something.
    """
    key = way, question, *environment()
    found: tuple[Kernels, ...] | str | None = installed.routes.get(key)
    if found is None:
        try:
            found = _routes(installed, way, question)
        except Refused as refused:
            if refused.__cause__ is not None:  # aiter failed, and may not do so again
                raise
            found = str(refused)
        installed.routes[key] = found
    if isinstance(found, str):
        raise Refused(found)
    return found


def _routes(installed: Installed, way: Way, question: Question) -> tuple[Kernels, ...]:
    if os.environ.get("AITER_ONLINE_TUNE", "0") == "1":
        raise Refused(
            "AITER_ONLINE_TUNE=1 would tune kernels for every number of tokens at once; tune without this call"
        )
    starts, merged = _starts(installed), list[tuple[int, Family]]()
    for start in starts:
        family = FAMILIES[0] if way.always_hip else _family(installed, way, question, start)
        _check(installed, way, question, family, start)
        if not merged or merged[-1][1].name != family.name:
            merged.append((start, family))
    stops = [start for start, _ in merged[1:]] + [MANY + 1]
    rule = installed.version.scale_rule
    lossy = "".join(f", {name}=1" for name in _LOSSY if os.environ.get(name, "0") not in ("0", ""))
    return tuple(
        Kernels(range(start, stop), family.name, family.numerics.format(rule=rule) + lossy)
        for (start, family), stop in zip(merged, stops, strict=True)
    )


def _starts(installed: Installed) -> list[int]:
    """The numbers of tokens at which aiter may choose anew: it rounds them up to powers of two, and two bounds tell
    which dtype activations are given in."""
    powers = [1 << power for power in range(18)]
    found = {0, 1, *powers, *(power + 1 for power in powers), *_bounds(installed)}
    return sorted(start for start in found if 0 < start <= MANY)


def _bounds(installed: Installed) -> tuple[int, int]:
    """The number of tokens from which a SwiGLU layer in the gate mode "separated", and any in "interleave", are given
    activations that are quantised."""
    separated: int = installed.probed.fused_moe._SWIGLU_MXFP4_BF16_BOUND
    interleave = os.environ.get("AITER_BF16_FP8_MOE_BOUND", "256")
    if not interleave.isdecimal():
        raise Refused(f"AITER_BF16_FP8_MOE_BOUND must be a number of tokens, found {interleave!r}")
    return separated, int(interleave)


def _dtype(installed: Installed, way: Way, question: Question, tokens: int) -> torch.dtype:
    """In which the first GEMM is given activations, as `fused_moe` concludes it before it looks for kernels."""
    separated, interleave = _bounds(installed)
    swiglu, interleaved = question.activation == "swiglu", way.gate_mode == "interleave"
    if swiglu and not interleaved:
        return _BF16 if tokens < separated else _FP4
    if interleaved and (swiglu or not installed.version.silu_is_mxfp4):
        return _BF16 if tokens < interleave else _FP8
    return _FP4


def _family(installed: Installed, way: Way, question: Question, tokens: int) -> Family:
    """Of the configuration that `fused_moe` will find for a call."""
    version, probed = installed.version, installed.probed
    enums, fused_moe = probed.module, probed.fused_moe
    dtype = _dtype(installed, way, question, tokens)
    newer = {"is_ep": question.expert_mask, "has_stage2_bias": question.bias, "opus_weights_shuffled": True}
    try:
        found = fused_moe.get_2stage_cfgs(
            fused_moe.get_padded_M(tokens),
            question.hidden,
            question.intermediate,
            question.experts,
            question.topk + question.expert_mask,  # with a mask, tokens have a slot more
            _BF16,
            dtype,
            _FP4,
            enums.QuantType.per_1x32,
            True,
            getattr(enums.ActivationType, question.activation.capitalize()),
            False,
            0,
            0,
            True,
            gate_mode=way.gate_mode,
            **{name: value for name, value in newer.items() if name in probed.config},
            **way.config,
        )
    except Exception as error:  # as where flydsl is missing; the call itself would raise it too
        raise Refused(
            f"aiter {version.name} has no kernel for {_tokens(tokens)} ({type(error).__name__}: {error})"
        ) from error
    stages = Stages(
        first=_name(probed, found.stage1),
        options=getattr(found.stage1, "keywords", {}),
        second=_name(probed, found.stage2),
        # with K in parts, aiter leaves out the rounding before the first of two GEMMs
        dtype=_BF16 if dtype is _FP4 and found.ksplit > 1 and not found.run_1stage else dtype,
        hip=getattr(found, "pipeline", None) is not None or bool(getattr(found, "mxfp4_hip", False)),
        biases=bool(found.has_bias and found.stage2_has_bias),
        parts=found.ksplit > 1,
    )
    family = next((family for family in FAMILIES if family.matches(stages)), None)
    if family is None or stages.second not in _SECOND:
        names = " and ".join(filter(None, (stages.first, stages.second)))
        raise Refused(
            f"for {_tokens(tokens)}, aiter {version.name} would take {names} (kernel {stages.kernel or 'unnamed'}, "
            f"activations {stages.dtype}), which nothing is known of here"
        )
    return replace(family, bias=family.bias and stages.biases)


def _name(probed: Probed, stage: Any) -> str:
    """Of the function that a stage calls, whoever has wrapped it; "" of none."""
    function = getattr(stage, "func", stage)
    here = (name for name in _SECOND for module in probed.modules if getattr(module, name, _SECOND) is function)
    return "" if function is None else next(here, str(getattr(function, "__name__", function)))


def _check(installed: Installed, way: Way, question: Question, family: Family, tokens: int) -> None:
    """Raise Refused where kernels would misread the weights, or ignore or miscompute something."""
    version, activation = installed.version, question.activation
    float8 = not version.mxfp8 or getattr(installed.probed.fused_moe, "_MOE_A8W4_BYPASS_QUANT", False)
    if family.layout is not way.layout:
        why = f"reads {family.layout.name!r}, not {way.layout.name!r}"
    elif activation not in family.activations:
        why = f"would miscompute activation={activation!r}"
    elif family.limits is not None and question.limit not in family.limits:
        instead = "" if family.limits == (math.inf,) else f", and clamp to {family.limits[0]:g}"
        why = f"would ignore swiglu_limit={question.limit:g}{instead}"
    elif question.bias and not family.bias:
        why = "would ignore a bias"
    elif question.expert_mask and not (family.expert_mask and version.expert_mask):
        why = (
            "would drop expert_mask, or raise; without it, give local topk_ids, and topk_weight 0 where an expert is "
            "another rank's"
        )
    elif question.packed and not family.packed:
        why = "would ignore hidden_scale"
    elif question.num_local_tokens and not family.num_local_tokens:
        why = "would ignore num_local_tokens"
    elif family.numerics.startswith("mxfp8") and float8:
        why = "is given activations cut to float8 without scales"
    elif question.hidden <= way.hidden_above:
        why = f"miscomputes hidden sizes of {way.hidden_above} or less, padded, as this one of {question.hidden}"
    else:
        return
    raise Refused(f"for {_tokens(tokens)}, {family.name} in aiter {version.name} {why}")


def _tokens(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"
