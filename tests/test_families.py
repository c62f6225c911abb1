# SPDX-License-Identifier: MIT
"""The table of kernel families knows whatever AMD's own code chose in 18 revisions, or refuses it on purpose."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from expecttest import assert_expected_inline

from shuffled_tensor.backends.aiter import routes
from shuffled_tensor.backends.aiter.versions import MOE, SEPARATED, VERSIONS, Installed, Way

from .support.aiter import VERSION_OF

RECORD = json.loads((Path(__file__).parent / "data" / "aiter_routes.json").read_text())
LAYOUT_OF = {"separated": SEPARATED, "interleave": MOE}
GPT_OSS = ("gpt-oss-20b", "gpt-oss-120b")
ATTRIBUTE_OF_4398 = "2bb3bca2df", "is_guinterleave"  # the open pull request's, which we never give weights


def stage(recorded: dict[str, Any] | None) -> Any:
    """As a configuration has it: a partial of a function of that name."""
    if recorded is None:
        return None

    def function() -> None: ...

    options = dict(recorded)
    function.__name__ = options.pop("function")
    if function.__name__ == "_mxfp4_a4w4_stage1_fw" and "mxmoe" in options["kernelName1"]:
        options.setdefault("interleave", False)  # the record leaves out what is false
    return partial(function, **options)


def installed(version: str, outcome: dict[str, Any]) -> Installed:
    """An aiter of a version that chooses this for every call."""
    absent = {"ksplit": 0, "run_1stage": False, "has_bias": False, "stage2_has_bias": False}
    found = absent | outcome | {name: stage(outcome.get(name)) for name in ("stage1", "stage2", "pipeline")}

    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> SimpleNamespace:
        asked.append(str(args[6]).removeprefix("torch."))
        return SimpleNamespace(**found)

    asked: list[str] = []
    module = SimpleNamespace(QuantType=SimpleNamespace(per_1x32=0), ActivationType=SimpleNamespace(Silu=0, Swiglu=1))
    fused_moe = SimpleNamespace(
        get_2stage_cfgs=get_2stage_cfgs, get_padded_M=int, _SWIGLU_MXFP4_BF16_BOUND=256, asked=asked
    )
    probed = SimpleNamespace(module=module, fused_moe=fused_moe, modules=(module, fused_moe), config=frozenset())
    row = next(row for row in VERSIONS if row.name == version)
    return Installed(row, "", probed)  # type: ignore[arg-type]


def family_of(version: str, outcome: dict[str, Any], gate_mode: str, question: routes.Question, tokens: int) -> Any:
    """The family, or why there is none; asked for with the activations' type that AMD's own code asks with."""
    aiter = installed(version, outcome)
    try:
        return routes._family(aiter, Way(LAYOUT_OF[gate_mode], gate_mode), question, tokens)
    except routes.Refused as refused:
        return str(refused)
    finally:
        assert aiter.probed.fused_moe.asked == [outcome["q_dtype_a"]]


def families(revision: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any], Any]]:
    """For each recorded call of weights as we pass them: shape, activation, gate mode and case; what was chosen; and its
    family, or why it has none."""
    record = RECORD["revisions"][revision]
    for shape, activation, gate_mode, case, _, indices in record["calls"]:
        if case == "no is_shuffled" or (revision, case) == ATTRIBUTE_OF_4398:
            continue
        bound = "0" if case == "AITER_BF16_FP8_MOE_BOUND=0" else "256"
        question = routes.Question(*RECORD["shapes"][shape], activation.lower(), math.inf, False, False, False, False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AITER_BF16_FP8_MOE_BOUND", bound)
            for tokens, index in zip(RECORD["tokens"], indices, strict=True):
                outcome = record["outcomes"][index]
                if "raised" not in outcome:
                    family = family_of(VERSION_OF[revision], outcome, gate_mode, question, tokens)
                    yield (shape, activation, gate_mode, case), outcome, family


def kind_of(outcome: dict[str, Any]) -> str:
    """In words, what the kernels that were chosen read and take follows from."""
    if "pipeline" in outcome or "mxfp4_hip" in outcome:
        return "HIP kernels"
    first, name = outcome["stage1"], outcome["stage1"].get("kernelName", "")
    parts = first.get("split_k", 1) > 1
    words = [
        first["function"],
        *(part for part in ("afp4", "afp8", "gui", "kb") if f"_{part}" in name),
        *(["K in parts", first.get("post_activation_layout", "by default")] if parts else []),
        # what CK-Tile's kernels with K in parts are given is bfloat16, whatever is asked for
        *([] if "kernelName" in first or "kernelName1" in first or parts else [outcome["q_dtype_a"]]),
    ]
    return " ".join(words)


def test_every_outcome_has_a_family_or_is_refused_on_purpose() -> None:
    """Refused are CK's first stages, which have no kernels for such activations, and the row of gpt-oss-120b's table
    that is meant for SwiGLU, and is found for SiLU, too."""
    found = set()
    for revision in RECORD["revisions"]:
        for _, outcome, family in families(revision):
            if isinstance(family, str):
                assert "which nothing is known of here" in family
                found.add(f"{kind_of(outcome)}: refused")
            else:
                found.add(f"{kind_of(outcome)}: {family.name} | {family.layout.name} | {family.numerics}")
    assert_expected_inline(
        "\n".join(sorted(found)),
        """\
HIP kernels: HIP a4w4 | mxfp4_moe | mxfp4, even
_flydsl_stage1_wrapper afp4 kb: FlyDSL a4w4, K in parts | mxfp4_separated | mxfp4, {rule}
_flydsl_stage1_wrapper afp4: FlyDSL a4w4 | mxfp4_separated | mxfp4, {rule}
_flydsl_stage1_wrapper afp8 gui: FlyDSL a8w4 | mxfp4_moe | mxfp8
_mxfp4_a4w4_stage1_fw: mxmoe a4w4 | mxfp4_separated | mxfp4, {rule}
asm_stage1: refused
ck_moe_stage1 bfloat16: refused
ck_moe_stage1 float4_e2m1fn_x2: CK a4w4 | mxfp4_separated | mxfp4, {rule}
ck_moe_stage1 float8_e4m3fn: refused
cktile_moe_stage1 K in parts auto: CK-Tile a16w4, K in parts, of interleaved rows | mxfp4_moe | bfloat16
cktile_moe_stage1 K in parts by default: CK-Tile a16w4, K in parts, of interleaved rows | mxfp4_moe | bfloat16
cktile_moe_stage1 K in parts standard: CK-Tile a16w4, K in parts | mxfp4_separated | bfloat16
cktile_moe_stage1 bfloat16: CK-Tile a16w4 | mxfp4_moe | bfloat16
cktile_moe_stage1 float8_e4m3fn: CK-Tile a8w4 | mxfp4_moe | mxfp8
cktile_moe_stage1 float8_e4m3fn: CK-Tile a8w4, then a16w4 | mxfp4_moe | mxfp8, then bfloat16""",
    )


def test_what_no_call_of_ours_may_reach() -> None:
    """The same function bound to the other layout, and a name that nobody has seen."""
    chosen = {"q_dtype_a": "float4_e2m1fn_x2", "stage2": {"function": "_mxfp4_a4w4_stage2_fw"}}
    mxmoe = {"function": "_mxfp4_a4w4_stage1_fw", "kernelName1": "flydsl_mxmoe_g1_a4w4_32x256x256"}
    other = {"function": "_flydsl_stage1_wrapper", "kernelName": "flydsl_moe1_afp6_wfp4_bf16_t32x128x256"}
    question = routes.Question(8, 768, 512, 2, "silu", math.inf, False, False, False, False)
    untold = mxmoe | {"kernelName1": "mxfp4_moe_g1_a4w4_NE385_H7168_E512_BM128"}  # in which layout
    for first in (mxmoe | {"interleave": True}, untold, other, {"function": "opus_moe_stage1"}):
        found = family_of("v0.1.18 and later", chosen | {"stage1": first}, "separated", question, 4)
        assert "which nothing is known of here" in found


@pytest.mark.parametrize("revision", RECORD["revisions"])
def test_one_layout_is_right_for_swiglu_whatever_the_number_of_tokens(revision: str) -> None:
    """Separated tiles with the gate mode "separated", interleaved ones with "interleave", for gpt-oss in every era: only
    numerics depend on the number of tokens."""
    judged = 0
    for (shape, activation, gate_mode, case), outcome, family in families(revision):
        tagged = case.startswith(("shuffle_kind", "is_guinterleave"))
        if activation == "Silu" or shape not in ("untuned", *GPT_OSS) or tagged or case == "no flydsl":
            continue
        judged += 1
        assert family.layout is LAYOUT_OF[gate_mode]
        assert family.activations[-1] == "swiglu"
        assert (family.numerics == "bfloat16") == (outcome["q_dtype_a"] == "bfloat16")
    assert judged >= 96


def test_releases_whose_table_drops_a_bias() -> None:
    """gpt-oss-120b for 256 tokens under "interleave": a second stage of CK-Tile's that is not given its bias."""
    found = {}
    question = routes.Question(*RECORD["shapes"]["gpt-oss-120b"], "swiglu", 7.0, True, False, False, False)
    for revision, record in RECORD["revisions"].items():
        for *call, bias, indices in record["calls"]:
            if call == ["gpt-oss-120b", "Swiglu", "interleave", ""] and bias != "no":
                outcome = record["outcomes"][indices[RECORD["tokens"].index(256)]]
                found[revision] = family_of(VERSION_OF[revision], outcome, "interleave", question, 256)
    assert len(found) == len(RECORD["revisions"])
    assert [revision for revision, family in found.items() if not family.bias] == [
        "v0.1.17-longctx",
        "v0.1.18",
        "v0.1.19",
    ]
