# SPDX-License-Identifier: MIT
"""AMD's aiter: which of its eras is installed, what that one reads, and how it is called. The only file that imports
aiter.

The layout that its a4w4 kernels read, and the tags by which they are told, changed meaning several times, and version
numbers do not tell: what is installed is found by its signatures. Letters of eras are those of the project's notes;
commits are aiter's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import ShuffleKind
from shuffled_tensor.moe import MoECall

ARCH = "gfx950"


@dataclass(frozen=True)
class Era:
    """One row: how to know an aiter, what its MXFP4 MoE kernels read, and how they are told."""

    name: str
    since: str
    probe: Callable[[Probed], bool]
    kind: ShuffleKind
    gate_mode: str
    scale_rule: str
    """By which its kernels quantise activations."""
    w13_tags: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of w1 beside `is_shuffled`, which every era wants on both weights."""
    inter_real: bool = False
    """Whether w2 may tell its intermediate size without padding."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What `get_2stage_cfgs` gets beyond the arguments common to all eras."""
    tuned: Callable[[Any], bool] | None = None
    """Whether the configuration found is one of this kind's kernels; None where every configuration reads this
    layout."""


class Probed:
    """The installed aiter, and the parameters of its two entry points."""

    def __init__(self, module: ModuleType, fused_moe: ModuleType) -> None:
        self.module = module
        self.fused_moe = fused_moe
        self.call = _parameters(fused_moe, "fused_moe")
        self.config = _parameters(fused_moe, "get_2stage_cfgs")

    def has(self, name: str) -> bool:
        return hasattr(self.fused_moe, name)

    @property
    def hip(self) -> bool:
        return hasattr(self.module, "mxfp4_moe_gemm1_a4w4") or hasattr(torch.ops.aiter, "mxfp4_moe_gemm1_a4w4")


def _parameters(module: ModuleType, name: str) -> frozenset[str]:
    function = getattr(module, name, None)
    return frozenset(inspect.signature(function).parameters) if callable(function) else frozenset()


# None of these eras' MXFP4 kernels takes bias, swiglu_limit, another activation than SiLU, doweight_stage1, activations
# quantised already, or float16; nor expert_mask, which raises (A, B, F, G) or is dropped (C, D, E).
# The last row must not take an aiter to come for an old one, which would be silent: it is closed by a parameter that
# came later than its last release.
ERAS = (
    Era(
        "D", "#3788 (46ecc4489d)", lambda p: "shuffle_kind" in p.config and p.has("_MXFP4_PORT_KIND"),
        ShuffleKind.MXFP4_MOE, "separated", "even",
        # its other tag, mxfp4_guinterleave, falls silently to plain kernels for an untuned shape; this one never does
        w13_tags={"shuffle_kind": "mxfp4_moe"}, inter_real=True,
    ),
    Era(
        "A", "#3470, early (57e74501a5)", lambda p: "shuffle_kind" in p.config,
        ShuffleKind.MXFP4_MOE, "separated", "even",
        w13_tags={"shuffle_kind": "mxfp4_moe"},
        config={"shuffle_kind": "mxfp4_moe"}, tuned=lambda found: found.pipeline is not None,
    ),
    Era(
        "B", "39e2ed7e8a", lambda p: "is_guinterleave" in p.config,
        ShuffleKind.MXFP4_MOE, "separated", "even",
        w13_tags={"is_guinterleave": True},
        config={"is_guinterleave": True}, tuned=lambda found: found.pipeline is not None,
    ),
    Era(
        "C", "#3470 as merged (d6ede4548e)", lambda p: p.hip and p.has("mxfp4_moe_run"),
        ShuffleKind.MXFP4_MOE, "interleave", "even",
        tuned=lambda found: bool(found.mxfp4_hip),
    ),
    Era(
        "E", "#3827 (05567f6668)", lambda p: p.hip and p.has("_mxfp4_a4w4_stage1_fw"),
        ShuffleKind.MXFP4_MOE, "interleave", "even",
        tuned=lambda found: bool(found.mxfp4_hip),
    ),
    Era(
        "G", "#4542 (55f4bfeb5e)", lambda p: p.has("_mxfp4_a4w4_stage1_fw") and "is_shuffled" in p.call,
        ShuffleKind.MXFP4_SEPARATED, "separated", "round_up",
        inter_real=True,
    ),
    Era(
        "F", "#3832 (b2dd7703df), v0.1.16.post4, v0.1.18 and later", lambda p: p.has("_mxfp4_a4w4_stage1_fw"),
        ShuffleKind.MXFP4_SEPARATED, "separated", "round_up",
        inter_real=True,
    ),
    Era(
        "before #3832", "v0.1.14 to v0.1.17",
        lambda p: {"is_shuffled", "gate_mode"} <= p.config and "opus_weights_shuffled" not in p.config,
        ShuffleKind.MXFP4_SEPARATED, "separated", "even",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    era: Era
    version: str
    probed: Probed


class Unusable(Exception):
    """Why there is no aiter to call."""


_FOUND: dict[ModuleType | None, Installed] = {}
_IMPORT_FAILURE: list[str] = []


def detect() -> Installed:
    """The installed aiter and its era, imported on first use.

    Raises:
        Unusable: there is none, it does not import, or no era fits it.
    """
    found = _FOUND.get(sys.modules.get("aiter.fused_moe"))
    if found is None:
        probed = Probed(*_import())
        era = next((era for era in ERAS if era.probe(probed)), None)
        if era is None:
            raise Unusable(
                f"aiter {version()} is of no era known here: looked for fused_moe.get_2stage_cfgs with a parameter "
                "shuffle_kind, is_guinterleave or is_shuffled, and for mxfp4_moe_gemm1_a4w4, mxfp4_moe_run and "
                f"_mxfp4_a4w4_stage1_fw; get_2stage_cfgs has {sorted(probed.config) or 'no parameters or is missing'}"
            )
        found = _FOUND[probed.fused_moe] = Installed(era, version(), probed)
    return found


def forget(module: ModuleType) -> None:
    """Drop what was found about an aiter that is no longer loaded."""
    _FOUND.pop(module, None)


def version() -> str:
    """Of the distribution; a source tree may have none."""
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _import() -> tuple[ModuleType, ModuleType]:
    if not _IMPORT_FAILURE or "aiter.fused_moe" in sys.modules:
        try:
            # Imported although it may be there: another thread may be half through, and half an aiter looks like an
            # older one. The package first, because its module can be complete before it is.
            return importlib.import_module("aiter"), importlib.import_module("aiter.fused_moe")
        except Exception as error:  # without ROCm it fails in many ways, not with ImportError alone
            installed = importlib.util.find_spec("aiter") is not None
            _IMPORT_FAILURE.append(
                f"aiter does not import ({type(error).__name__}: {error})"
                if installed
                else "aiter is not installed (its distribution is amd-aiter; PyPI's aiter is another package), or was "
                "not when this process first looked for it"
            )
    raise Unusable(_IMPORT_FAILURE[0])


def unusable(device: torch.device) -> str | None:
    """Why aiter cannot run anything on this device, or None."""
    if arch(device) != ARCH:
        return f"{device} is {arch(device)}, and aiter's MXFP4 kernels are for {ARCH}"
    try:
        detect()
    except Unusable as error:
        return str(error)
    return None


def kind(device: torch.device) -> ShuffleKind | None:
    """The layout that weights on this device must have for aiter; None where aiter is not what runs them."""
    return None if unusable(device) else detect().era.kind


def refuse(call: MoECall) -> str | None:
    """Why the kernels behind aiter would ignore or miscompute something in this call, or None."""
    reason = unusable(call.w13_qdata.device)
    if reason is not None:
        return reason
    installed = detect()
    rule = installed.era.scale_rule
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
    if call.dtype is not torch.bfloat16:
        return f"out_dtype is {call.dtype}, not bfloat16"
    if call.scale_rule not in (None, rule):
        return f"its kernels quantise by {rule!r}, not scale_rule={call.scale_rule!r}"
    for name, qdata in (("w13", call.w13_qdata), ("w2", call.w2_qdata)):
        if not qdata.is_contiguous():
            return f"the experts of {name} are not contiguous in memory; .clone() them"
    return _untuned(call, installed)


def _untuned(call: MoECall, installed: Installed) -> str | None:
    """Where only tuned shapes have kernels that read the era's layout, the others are wrong without a word (AITER C,
    E)."""
    era, tokens = installed.era, call.hidden_states.shape[0]
    if era.tuned is None or isinstance(tokens, torch.SymInt):  # a symbolic size is looked up when the call runs
        return None
    module, fused_moe = installed.probed.module, installed.probed.fused_moe
    w13, w2 = call.w13.geometry, call.w2.geometry
    experts, topk, padded = len(call.w13_qdata), call.topk_ids.shape[1], fused_moe.get_padded_M(tokens)
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
        gate_mode=era.gate_mode,
        **era.config,
    )
    if era.tuned(found):
        return None
    return (
        f"aiter (era {era.name}) has no tuned kernel that reads {era.kind.value!r} for {padded} tokens (padded), "
        f"{experts} experts, hidden size {w2.padded_rows}, intermediate size {w2.padded_columns} and topk {topk}"
    )


def tagged_weight(qdata: Tensor, *, gate_up: bool, intermediate: int) -> Tensor:
    """The bytes as the float4_e2m1fn_x2 tensor that aiter takes, sharing them, with the era's tags on it."""
    era = detect().era
    weight = qdata.view(torch.float4_e2m1fn_x2)
    tags: dict[str, Any] = {"is_shuffled": True}
    if gate_up:
        tags.update(era.w13_tags)
    elif era.inter_real and intermediate % 128 == 0 and intermediate != 2 * qdata.shape[-1]:
        tags["inter_real"] = intermediate
    for name, value in tags.items():
        setattr(weight, name, value)
    return weight


def run(call: MoECall) -> Tensor:
    """Call ``aiter.fused_moe.fused_moe`` with what :func:`refuse` does not refuse.

    Raises:
        ValueError: weights that are not in the era's layout.
    """
    installed = detect()
    era, probed = installed.era, installed.probed
    for name, found in (("w13", call.w13_kind), ("w2", call.w2_kind)):
        if found != era.kind.value:
            raise ValueError(f"aiter (era {era.name}) reads {era.kind.value!r}, but {name} is laid out as {found!r}")
    w13, w2 = call.w13.geometry, call.w2.geometry
    if not len(call.hidden_states):  # as for a rank without requests; no era says that it takes an empty launch
        return call.hidden_states.new_empty(0, w2.rows)
    hidden_pad, intermediate_pad = w2.padded_rows - w2.rows, w2.padded_columns - w2.columns
    arguments: dict[str, Any] = {"gate_mode": era.gate_mode} if "gate_mode" in probed.call else {}
    if "is_shuffled" in probed.call:
        arguments["is_shuffled"] = True
    out: Tensor = probed.fused_moe.fused_moe(
        hidden_states=F.pad(call.hidden_states, (0, w13.padded_columns - w13.columns)).contiguous(),
        w1=tagged_weight(call.w13_qdata, gate_up=True, intermediate=call.intermediate),
        w2=tagged_weight(call.w2_qdata, gate_up=False, intermediate=call.intermediate),
        topk_weight=call.topk_weight.float().contiguous(),
        topk_ids=call.topk_ids.int().contiguous(),
        activation=probed.module.ActivationType.Silu,
        quant_type=probed.module.QuantType.per_1x32,
        w1_scale=call.w13_scale,
        w2_scale=call.w2_scale,
        hidden_pad=hidden_pad,
        intermediate_pad=intermediate_pad,
        **arguments,
    )
    return out[:, : w2.rows].contiguous()
