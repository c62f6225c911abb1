# SPDX-License-Identifier: MIT
"""How aiter chooses kernels for a layer: its `get_2stage_cfgs`, alike in all versions but for what their rows say."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shuffled_tensor.testing import fake_kernels as kernels
from shuffled_tensor.testing.fake_versions import FakeVersion, same

__all__ = ["configuration", "q_dtype_a"]

_FP4, _FP8, _BF16 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.bfloat16
_COMPUTE_UNITS = 256


def q_dtype_a(version: FakeVersion, tokens: int, swiglu: bool, gate_mode: str, bound: int) -> torch.dtype:
    """In which the first GEMM is to have activations."""
    if swiglu and gate_mode == "separated":
        return _BF16 if tokens < bound else _FP4
    if gate_mode == "interleave" and (swiglu or not version.silu_is_mxfp4):
        return _BF16 if tokens < int(os.environ.get("AITER_BF16_FP8_MOE_BOUND", "256")) else _FP8
    return _FP4


def configuration(version: FakeVersion, tuned: bool, flydsl: bool, given: dict[str, Any]) -> SimpleNamespace:
    """For the arguments of `get_2stage_cfgs`; with a table of tuned kernels that has every shape, or none."""
    dtype, swiglu, shuffled = given["q_dtype_a"], given["activation"].name == "Swiglu", given["is_shuffled"]
    interleave = given["gate_mode"] == "interleave"
    fp4 = given["q_dtype_w"] is _FP4
    row = tuned and fp4 and not given["doweight_stage1"]
    rows = {"n_pad_zeros": given["intermediate_pad"] // 64 * 128}
    hidden = {"n_pad_zeros": given["hidden_pad"] // 64 * 64}
    parts = _parts(given)
    first: partial[Tensor]
    second: partial[Tensor]
    tagged = version.tuned_tag is None or same(given.get(version.tag or ""), version.tuned_tag)

    if row and tagged and dtype is _FP4 and given["gate_mode"] == version.gate_mode:  # whatever the activation
        if not version.own_kernels:
            first = partial(kernels._flydsl_stage1_wrapper, kernelName="flydsl_moe1_afp4_wfp4_bf16_t64x128x256_w3_fp4")
            second = partial(kernels._flydsl_stage2_wrapper, kernelName="flydsl_moe2_afp4_wfp4_bf16_t64x256x256_atomic")
            return _found(first, second, biases=(True, True))
        if version.mismatch:
            return _found(None, None, pipeline=configuration)
        if "_mxfp4_a4w4_stage1_fw" not in version.attributes:
            return _found(None, None, mxfp4_hip=True)
        told = {} if version.hip else {"interleave": interleave}
        first = partial(kernels._mxfp4_a4w4_stage1_fw, kernelName1="flydsl_mxmoe_g1_a4w4_32x256x256", **told)
        second = partial(kernels._mxfp4_a4w4_stage2_fw, kernelName2="flydsl_mxmoe_g2_a4w4_32x256x256_atomic")
        return _found(first, second, mxfp4_hip=version.hip, output_aux=not version.hip)

    if row and swiglu and dtype is _FP8:  # as for gpt-oss-120b at 256 tokens
        first = partial(kernels._flydsl_stage1_wrapper, kernelName="flydsl_moe1_afp8_wfp4_bf16_t32x128x256_w4_gui_fp8")
        return _found(first, partial(kernels.cktile_moe_stage2, **hidden), biases=(True, version.tuned_bias2))

    if interleave and swiglu:
        first = partial(kernels.cktile_moe_stage1, split_k=1, **rows)
        return _found(first, partial(kernels.cktile_moe_stage2, **hidden), parts, biases=(True, True))

    early = version.flydsl == ("Swiglu",)
    wanted = swiglu or os.environ.get("AITER_FLYDSL_FORCE", "1") == "1"
    takes = given["activation"].name in version.flydsl and dtype in ((_FP4,) if early else (_FP4, _FP8))
    if flydsl and wanted and takes and fp4 and shuffled and not given["doweight_stage1"]:
        kind, rest = ("afp4", "") if dtype is _FP4 else ("afp8", "_gui")
        first = partial(kernels._flydsl_stage1_wrapper, kernelName=f"flydsl_moe1_{kind}_wfp4_bf16_t32x128x256_w2{rest}")
        second = partial(kernels._flydsl_stage2_wrapper, kernelName=f"flydsl_moe2_{kind}_wfp4_bf16_t32x128x256_atomic")
        return _found(first, second, parts if early else -1, biases=(True, True))

    bf16 = swiglu and dtype is _BF16
    if fp4 and shuffled and not (swiglu and dtype is _FP4) and (parts > 1 or bf16):
        parts = max(parts, 2 if bf16 else 1)
        post = "standard" if bf16 else "auto"
        first = partial(kernels.cktile_moe_stage1, split_k=parts, post_activation_layout=post, **rows)
        return _found(first, partial(kernels.cktile_moe_stage2, **hidden), parts, biases=(swiglu, swiglu))

    if version.swiglu_in_parts and swiglu and fp4:
        parts = max(parts, 2)
        first = partial(kernels.cktile_moe_stage1, split_k=parts, **rows)
        return _found(first, partial(kernels.cktile_moe_stage2, **hidden), parts, biases=(True, True))

    return _found(partial(kernels.ck_moe_stage1), partial(kernels.ck_moe_stage2_fwd), parts)


def _found(
    stage1: Any,
    stage2: Any,
    ksplit: int = 0,
    *,
    biases: tuple[bool, bool] = (False, False),
    pipeline: Any = None,
    mxfp4_hip: bool = False,
    output_aux: bool = False,
) -> SimpleNamespace:
    """What is seen of a configuration."""
    return SimpleNamespace(
        stage1=stage1,
        stage2=stage2,
        ksplit=ksplit,
        has_bias=biases[0],
        stage2_has_bias=biases[1],
        run_1stage=False,
        pipeline=pipeline,
        mxfp4_hip=mxfp4_hip,
        output_aux=output_aux,
    )


def _parts(given: dict[str, Any]) -> int:
    """`get_ksplit`: into how many parts K goes where few tokens leave compute units idle; 0 is one."""
    topk = given["topk"] - bool(given.get("is_ep"))
    tiles = given["token"] * topk * -(-given["inter_dim"] // 128)
    if given["token"] * topk > given["expert"] or tiles >= _COMPUTE_UNITS:
        return 0
    most = (_COMPUTE_UNITS + tiles - 1) // tiles
    hidden = given["model_dim"]
    return next((n for n in range(most, 1, -1) if hidden % n == 0 and hidden // n % 256 == 0), 0)
