# SPDX-License-Identifier: MIT
"""The versions of aiter's API that the fake keeps the contract of: what can be seen of each from outside, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shuffled_tensor import mxfp4
from shuffled_tensor.testing.fake_kernels import GUGU, PLAIN

__all__ = ["CONFIG_REQUIRED", "ELSEWHERE", "VERSIONS", "FakeVersion", "same"]

# The operator's parameters as aiter registers them: mutates_args="unknown" makes every tensor an alias.
_OPERATOR = (
    "Tensor hidden_states", "Tensor w1", "Tensor w2", "Tensor topk_weight", "Tensor topk_ids", "Tensor? "
    "expert_mask=None",
    "SymInt activation=0", "SymInt quant_type=0", "bool doweight_stage1=False", "Tensor? w1_scale=None",
    "Tensor? w2_scale=None", "Tensor? a1_scale=None", "Tensor? a2_scale=None", "SymInt block_size_M=-1",
    "Tensor? num_local_tokens=None", "SymInt moe_sorting_dispatch_policy=0", "ScalarType? dtype=None",
    "SymInt hidden_pad=0", "SymInt intermediate_pad=0", "Tensor? bias1=None", "Tensor? bias2=None",
)  # fmt: skip
_GATE_MODE = 'str gate_mode="separated"'
_EARLY = (*_OPERATOR, "float swiglu_limit=0.0", _GATE_MODE)
_LATE = (*_OPERATOR, "float? swiglu_limit=None", "float? beta=None", "float? linear_beta=None", _GATE_MODE)
_SCATTER = (
    "SymInt ep_arena_handle=0", "SymInt ep_combine_input_offset=0", "SymInt ep_slot_stride_bytes=0",
    "SymInt ep_max_tokens_per_rank=0", "SymInt ep_world_size=0", "Tensor? ep_source_token_map=None",
)  # fmt: skip

# Parameters of the Python function: most are the operator's. `splitk` goes nowhere, and the rest to other operators.
_CALL = (*(parameter.split()[1].split("=")[0] for parameter in _OPERATOR), "splitk", "swiglu_limit")
_SHARED = ("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale", "shared_expert_id")
_CALL_EARLY = (*_CALL, "gate_mode")
_CALL_LATE = (*_CALL, "beta", "linear_beta", "gate_mode", *_SHARED)
ELSEWHERE = dict.fromkeys((*_SHARED, "stage2_scatter")) | {"shared_expert_id": -1}

_CONFIG = (
    "token", "model_dim", "inter_dim", "expert", "topk", "dtype", "q_dtype_a", "q_dtype_w", "q_type", "use_g1u1",
    "activation", "doweight_stage1", "hidden_pad", "intermediate_pad", "is_shuffled", "gate_mode",
)  # fmt: skip
CONFIG_REQUIRED = len(_CONFIG)
_CONFIG_LATE = (*_CONFIG, "is_ep", "has_stage2_bias", "opus_weights_shuffled")


@dataclass(frozen=True, kw_only=True)
class FakeVersion:
    """What can be seen of one version of aiter from outside."""

    name: str
    """As in `backends.aiter.versions`."""
    operator: tuple[str, ...]
    """Parameters of the operator, in the words of its schema."""
    call: tuple[str, ...]
    """Names of the parameters of the Python function fused_moe."""
    config: tuple[str, ...]
    """Names of the parameters of get_2stage_cfgs."""
    attributes: Mapping[str, str | int | None]
    """Names in aiter.fused_moe by which it is known, and the value of a constant; None is a function."""
    hip: bool = False
    """Whether it has the HIP operator of its first kernels."""
    own_kernels: bool = True
    """Whether it has kernels for SiLU of MXFP4 alone, and rows of tuned ones that name them."""
    scale_rule: mxfp4.ScaleRule = "round_up"
    """By which it quantises activations to MXFP4; its HIP kernels do so by "even"."""
    mxfp8: str | None = "round_up"
    """By which rule it quantises them to MXFP8; None where it cuts them to float8."""
    gate_mode: str = "separated"
    """Under which a shape may have a tuned kernel for SiLU."""
    reads: str = PLAIN
    """The byte order in which those read w13."""
    tag: str | None = None
    """The attribute of w1 that is read beside `is_shuffled`."""
    tuned_tag: str | bool | None = None
    """The value of it that leads to tuned kernels; None where nothing but the gate mode does."""
    untagged: str | bool | None = None
    """The value that a weight without it counts as."""
    mismatch: type[Exception] | None = None
    """What a tag without a tuned kernel raises, and such a kernel without a tag; None where other kernels are taken
    silently."""
    port_tag: str | None = None
    """The value of it that leads to kernels for any shape, made up where none is tuned, under either gate mode."""
    port_above: int = 0
    """The hidden size up to which those kernels are wrong; here, as if they read rows in their order."""
    expert_mask: type[Exception] | None = None
    """What tuned kernels raise for one; None where they drop it."""
    flydsl: tuple[str, ...] = ("Silu", "Gelu", "Swiglu")
    """For which activations FlyDSL's kernels take shapes that are not tuned; "Swiglu" alone is for MXFP4 alone."""
    silu_is_mxfp4: bool = False
    """Whether SiLU has MXFP4 activations under the gate mode "interleave", too."""
    swiglu_in_parts: bool = False
    """Whether SwiGLU goes to CK-Tile's kernel with K in parts, of interleaved rows, where no other kernel takes it."""
    parts_of_mxfp4: bool = False
    """Whether SiLU's activations are quantised to MXFP4 under the gate mode "interleave", before a kernel that takes
    bfloat16 alone."""
    global_ids: bool = False
    """Whether biases are looked up by global numbers of experts, where a mask says which are local."""
    tuned_bias2: bool = True
    """Whether the second stage that gpt-oss's tuned rows name is handed its bias."""


_HIP: dict[str, Any] = {"operator": _EARLY, "call": _CALL_EARLY, "hip": True, "reads": GUGU}
_TAGGED: dict[str, Any] = _HIP | {"mismatch": TypeError, "expert_mask": NotImplementedError, "parts_of_mxfp4": True}
_PORT_OF: dict[str, Any] = {"expert_mask": NotImplementedError, "swiglu_in_parts": True}
_MXFP8, _PORT = {"fused_dynamic_mxfp8_quant_moe_sort": None}, {"_mxfp4_a4w4_stage1_fw": None}

_ROWS = (
    FakeVersion(
        name="#3470 (shuffle_kind)", **_TAGGED,
        config=(*_CONFIG, "shuffle_kind", "is_ep"), attributes={"_mxfp4_moe_run": None, **_MXFP8},
        tag="shuffle_kind", tuned_tag="mxfp4_moe",
    ),
    FakeVersion(
        name="#3470 (is_guinterleave)", **_TAGGED,
        config=(*_CONFIG, "is_guinterleave", "is_ep"), attributes={"_mxfp4_moe_run": None, **_MXFP8},
        tag="is_guinterleave", tuned_tag=True, untagged=False,
    ),
    FakeVersion(
        name="#3470", **_HIP,
        config=(*_CONFIG, "is_ep"), attributes={"mxfp4_moe_run": None, **_MXFP8},
        gate_mode="interleave", silu_is_mxfp4=True,
    ),
    FakeVersion(
        name="#3788", **_HIP,
        config=(*_CONFIG, "is_ep", "shuffle_kind"),
        attributes={"_mxfp4_moe_run": None, "mxfp4_moe_run": None, "_MXFP4_PORT_KIND": "mxfp4_moe", **_MXFP8},
        tag="shuffle_kind", tuned_tag="mxfp4_guinterleave", port_tag="mxfp4_moe", port_above=512, silu_is_mxfp4=True,
    ),
    FakeVersion(
        name="#3827", **_HIP,
        config=(*_CONFIG, "is_ep"), attributes={**_PORT, **_MXFP8},
        gate_mode="interleave", silu_is_mxfp4=True,
    ),
    FakeVersion(
        name="v0.1.18 and later", **_PORT_OF,
        operator=(*_LATE, *_SCATTER), call=(*_CALL_LATE, "stage2_scatter"),
        config=(*_CONFIG_LATE, "config_file"), attributes={**_PORT, **_MXFP8},
    ),
    FakeVersion(
        name="#4542", **_PORT_OF,
        operator=(*_LATE, "bool? is_shuffled=None"), call=(*_CALL_LATE, "is_shuffled"),
        config=_CONFIG_LATE, attributes={**_PORT, **_MXFP8},
    ),
    FakeVersion(
        name="v0.1.16, v0.1.17", operator=_EARLY, call=_CALL_EARLY,
        config=(*_CONFIG, "is_ep", "has_stage2_bias"), attributes=_MXFP8, own_kernels=False, swiglu_in_parts=True,
    ),
    FakeVersion(
        name="v0.1.15", operator=_EARLY, call=_CALL_EARLY,
        config=_CONFIG, attributes=_MXFP8, own_kernels=False,
        scale_rule="amax4", mxfp8="amax4", flydsl=("Swiglu",), parts_of_mxfp4=True,
    ),
    FakeVersion(
        name="v0.1.14", operator=_EARLY, call=_CALL_EARLY,
        config=_CONFIG, attributes={}, own_kernels=False,
        scale_rule="amax4", mxfp8=None, flydsl=("Swiglu",), parts_of_mxfp4=True, global_ids=True,
    ),
)  # fmt: skip

VERSIONS: Mapping[str, FakeVersion] = {row.name: row for row in _ROWS}
"""By name. The row of v0.1.18 is as its version had become by August 2026, and that of v0.1.16 as v0.1.17 was."""


def same(tag: Any, value: str | bool | None) -> bool:
    """Whether a tag has a value; 1 is not True."""
    return type(tag) is type(value) and bool(tag == value)
