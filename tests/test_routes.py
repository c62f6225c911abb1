# SPDX-License-Identifier: MIT
"""Which of aiter's kernels a layer goes to, in every version, and the numbers that come out: every result that is given
agrees with the numerics that are stated, and whatever would be wrong is refused with the reason."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, explain, fused_moe, override_arch
from shuffled_tensor.testing import VERSIONS, FakeAiter, fake_aiter

from .support.bytes import coded, moderate_scales
from .support.judges import dense, relative_error, rounded_moe

EXPERTS, HIDDEN, INTERMEDIATE, TOPK = 4, 736, 480, 2  # padded: 768 and 512
TOKENS = (1, 4, 255, 256)
MOE, SEPARATED = "mxfp4_moe", "mxfp4_separated"
TOLERANCE = 1.3e-2

HIP = ("#3470 (shuffle_kind)", "#3470 (is_guinterleave)", "#3470", "#3788", "#3827")
LATE = ("v0.1.18 and later", "#4542", "v0.1.16, v0.1.17")
EARLY = ("v0.1.15", "v0.1.14")
RULES = {version: "amax4" if version in EARLY else "round_up" for version in VERSIONS}


def test_these_are_all_versions() -> None:
    assert sorted((*HIP, *LATE, *EARLY)) == sorted(VERSIONS)


@cache
def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes and scales of w13 and of w2."""
    return (
        (coded(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2), moderate_scales(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32)),
        (coded(EXPERTS, HIDDEN, INTERMEDIATE // 2, salt=3), moderate_scales(EXPERTS, HIDDEN, INTERMEDIATE // 32)),
    )


def make_layer(tokens: int, kind: str | None, **options: Any) -> dict[str, Any]:
    """Arguments of fused_moe, with routing over all ranks' experts where there is a mask."""
    generator = torch.Generator().manual_seed(tokens)
    w13, w2 = parts()
    known = len(options["expert_mask"]) if "expert_mask" in options else EXPERTS
    return {
        "hidden_states": (torch.randn(tokens, HIDDEN, generator=generator) / 12).bfloat16(),  # gates of around 3
        "w13": ShuffledMXFP4Tensor(
            *(part.clone() for part in w13), gate_up=True, row_order="contiguous", shuffle_kind=kind
        ),
        "w2": ShuffledMXFP4Tensor(*(part.clone() for part in w2), gate_up=False, shuffle_kind=kind),
        "topk_weight": torch.rand(tokens, TOPK, generator=generator),
        "topk_ids": torch.randint(known, (tokens, TOPK), generator=generator, dtype=torch.int32),
        **options,
    }


@cache
def values() -> dict[str, Tensor]:
    return dict(zip(("w13", "w2"), (dense(*part) for part in parts()), strict=True))


def judged(layer: dict[str, Any], numerics: str, version: str, *, fused: bool = False) -> Tensor:
    return rounded_moe(numerics, **layer | values(), mxfp8_rule=RULES[version], fused=fused)


@contextmanager
def installed(version: str, **options: Any) -> Iterator[FakeAiter]:
    with override_arch("gfx950"), fake_aiter(version, **{"tuned": False, **options}) as fake:
        yield fake


def biases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "w13_bias": torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator).bfloat16(),
        "w2_bias": (40 * torch.randn(EXPERTS, HIDDEN, generator=generator)).bfloat16(),  # half of what comes out
    }


MASK = torch.tensor([1, 0, 1, 1, 0, 1, 0], dtype=torch.int32)

MODELS: dict[str, dict[str, Any]] = {
    "gpt-oss": {"activation": "swiglu", **biases()},
    "MiniMax-M3": {"activation": "swiglu"},
    "one bias": {"activation": "swiglu", "w2_bias": biases()["w2_bias"]},
    "gpt-oss, expert parallel": {"activation": "swiglu", **biases(), "expert_mask": MASK},
    "DeepSeek V4": {"swiglu_limit": 10.0},
    "a limit that is met": {"swiglu_limit": 2.0, "w13_bias": biases()["w13_bias"]},
    "Kimi K2": {},
    "Kimi K2, expert parallel": {"expert_mask": MASK},
    "biases": biases(),
    "another limit": {"activation": "swiglu", "swiglu_limit": 3.0, **biases()},
}
SWIGLU = ("gpt-oss", "MiniMax-M3", "one bias")
SILU = ("DeepSeek V4", "a limit that is met", "Kimi K2", "Kimi K2, expert parallel", "biases")

# By version and layout, what takes a model where no kernel is tuned for its shape: below 256 tokens, and from there on.
PARTS, WHOLE, A8, A4 = "CK-Tile a16w4, K in parts", "CK-Tile a16w4", "CK-Tile a8w4", "FlyDSL a4w4"
EXPECTED: dict[tuple[str, str, str], tuple[str, str]] = {}
for _version in VERSIONS:
    for _model in (*SWIGLU, "gpt-oss, expert parallel"):
        if not (_version == "v0.1.14" and _model == "gpt-oss, expert parallel"):
            EXPECTED[_version, SEPARATED, _model] = PARTS, A4
            if _version != "v0.1.14":
                EXPECTED[_version, MOE, _model] = WHOLE, A8
    if _version not in EARLY:
        for _model in SILU:
            EXPECTED[_version, SEPARATED, _model] = A4, A4
EXPECTED["#3788", MOE, "Kimi K2"] = "HIP a4w4", "HIP a4w4"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [SEPARATED, MOE])
@pytest.mark.parametrize("model", MODELS)
def test_every_model(version: str, kind: str, model: str) -> None:
    with installed(version) as fake:
        expected = EXPECTED.get((version, kind, model))
        for tokens in TOKENS:
            layer = make_layer(tokens, kind, **MODELS[model])
            report = explain(**layer)
            if expected is None:
                assert report.backend == "reference"
                assert report.passed_over["aiter"].startswith("for ")
                with pytest.raises(ValueError, match="aiter cannot take this call: for "):
                    fused_moe(**layer, backend="aiter")
                continue
            assert (report.backend, report.layout) == ("aiter", kind)
            assert report.kernels == expected[tokens >= 256]
            assert [route.name for route in report.routes] == list(dict.fromkeys(expected))
            out = fused_moe(**layer, backend="aiter")
            assert layer["w13"].shuffle_kind == kind
            fused = report.kernels == "HIP a4w4"
            assert relative_error(out, judged(layer, report.activations, version, fused=fused)) < TOLERANCE
        assert len(fake.reads) == (0 if expected is None else len(TOKENS))


def test_stated_numerics_are_told_apart() -> None:
    """Or agreement with them would say nothing."""
    layer = make_layer(300, None, **MODELS["gpt-oss"])
    exact = judged(layer, "bfloat16", "#4542")
    others = [judged(layer, numerics, "#4542") for numerics in ("mxfp8", "mxfp4, round_up", "mxfp4, even")]
    for other in others:
        assert relative_error(other, exact) > TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unfixed_weight_takes_the_default(version: str) -> None:
    default = MOE if version in HIP else SEPARATED
    with installed(version):
        for model in MODELS:
            layer, fixed = (make_layer(4, kind, **MODELS[model]) for kind in (None, default))
            report, other = explain(**layer), explain(**fixed)
            assert (report.backend, report.routes, report.passed_over) == (
                other.backend,
                other.routes,
                other.passed_over,
            )
            fused_moe(**layer)
            assert layer["w13"].shuffle_kind == default


# --- what changes the route


@pytest.mark.parametrize("version", [*HIP, *LATE, "v0.1.15"])
def test_float8_from_the_first_token(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How ATOM serves DeepSeek V4: then SiLU has kernels in the interleaved layout for every number of tokens, which
    honour limits and biases, where the version gives SiLU anything but MXFP4."""
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", "0")
    takes = version in (*LATE, "#3470 (shuffle_kind)", "#3470 (is_guinterleave)")
    with installed(version):
        for model in ("DeepSeek V4", "a limit that is met", "biases"):
            for tokens in TOKENS:
                layer = make_layer(tokens, MOE, **MODELS[model])
                report = explain(**layer)
                assert report.backend == ("aiter" if takes else "reference")
                if takes:
                    assert [route.name for route in report.routes] == ["FlyDSL a8w4"]
                    out = fused_moe(**layer)
                    assert relative_error(out, judged(layer, "mxfp8", version)) < TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_for_every_number_of_tokens(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both bounds raised, in the first version, too, which cuts activations to float8 without scales otherwise."""
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", str(1 << 30))
    monkeypatch.setenv("GPTOSS_SWIGLU_MXFP4_BF16_BOUND", str(1 << 30))
    with installed(version):
        for kind, kernels in ((SEPARATED, PARTS), (MOE, WHOLE)):
            layer = make_layer(300, kind, **MODELS["gpt-oss"])
            report = explain(**layer)
            assert [(route.name, route.activations) for route in report.routes] == [(kernels, "bfloat16")]
            assert relative_error(fused_moe(**layer), judged(layer, "bfloat16", version)) < TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["switched off", "not installed"])
def test_without_flydsl(version: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SiLU would go to kernels that read interleaved rows, or to others as tokens come: it is refused for all."""
    monkeypatch.setenv("AITER_FLYDSL_FORCE", "0" if how == "switched off" else "1")
    with installed(version, flydsl=how == "switched off") as fake:
        for tokens in (1, 4, 300):
            layer = make_layer(tokens, SEPARATED)
            report = explain(**layer)
            assert report.backend == "reference"
            assert report.passed_over["aiter"].startswith(
                f"for 1 token, CK-Tile a16w4, K in parts, of interleaved rows in aiter {version} reads 'mxfp4_moe', not "
                "'mxfp4_separated'"
            )
            assert torch.equal(fused_moe(**layer), fused_moe(**layer, backend="reference"))
        assert fake.reads == []
        # gpt-oss is not switched off with it
        layer = make_layer(300, SEPARATED, **MODELS["gpt-oss"])
        assert explain(**layer).backend == ("aiter" if how == "switched off" else "reference")
        # and what it would be is wrong, in this layout, in silence
        report, wrong = (
            explain(**make_layer(1, SEPARATED)),
            plain_call(make_layer(1, SEPARATED), SEPARATED, "separated"),
        )
        assert relative_error(wrong, judged(make_layer(1, None), "bfloat16", version)) > 0.5


def test_a_knob_that_is_turned_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("v0.1.18 and later"):
        layer = make_layer(4, SEPARATED)
        assert explain(**layer).backend == "aiter"
        monkeypatch.setenv("AITER_FLYDSL_FORCE", "0")
        assert explain(**layer).backend == "reference"


@pytest.mark.parametrize(
    ("version", "kind", "rule", "flydsl"),
    [("v0.1.18 and later", SEPARATED, "round_up", True), ("#3788", MOE, "even", False)],
)
def test_a_call_that_was_prepared_sees_what_changes(
    version: str, kind: str, rule: str, flydsl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One change, and no kernel of this aiter may get the call; of some, none but FlyDSL's."""
    layer = make_layer(4, kind)
    refused: dict[str, Any] = {
        "activation": "gelu",
        "out_dtype": torch.float32,
        "scale_rule": "floor",
        "hidden_states": layer["hidden_states"].float(),
        "doweight_stage1": True,
        "w2": ShuffledMXFP4Tensor(*(part.clone() for part in parts()[1]), gate_up=False, align=32, shuffle_kind=kind),
    }
    taken_by_flydsl: dict[str, Any] = {
        "swiglu_limit": 3.0,
        "num_local_tokens": torch.tensor([4], dtype=torch.int32),
        "w2_bias": torch.zeros(EXPERTS, HIDDEN),
        "w13_bias": torch.zeros(EXPERTS, 2 * INTERMEDIATE),
        "expert_mask": torch.ones(EXPERTS, dtype=torch.int32),
    }
    layer |= {"activation_dtype": "mxfp4", "scale_rule": rule, "out_dtype": torch.bfloat16}
    with installed(version, flydsl=flydsl) as fake:

        def ran(**change: Any) -> int:
            before = len(fake.reads)
            fused_moe(**layer | change)
            return len(fake.reads) - before

        assert [ran(), ran()] == [1, 1]
        for name, value in (refused | taken_by_flydsl).items():
            assert (name, ran(**{name: value}), ran()) == (name, int(flydsl and name in taken_by_flydsl), 1)
        with monkeypatch.context() as patch:
            patch.setenv("AITER_ONLINE_TUNE", "1")
            assert ran() == 0
        with override_arch("gfx942"):
            assert ran() == 0
        assert ran() == 1
    with installed("v0.1.14") as fake:  # whose kernels are wrong for few tokens
        assert [ran(), ran()] == [0, 0]


def test_a_call_that_is_refused_keeps_no_tensors() -> None:
    with installed("v0.1.18 and later"):
        layer = make_layer(4, SEPARATED, out_dtype=torch.float32)
        fused_moe(**layer)
        fused_moe(**layer)
        kept = weakref.ref(layer["hidden_states"])
        del layer
        gc.collect()
        assert kept() is None


def test_a_bound_between_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", "300")
    with installed("v0.1.18 and later"):
        layer = make_layer(299, MOE, **MODELS["gpt-oss"])
        assert [(route.tokens[0], route.name) for route in explain(**layer).routes] == [(1, WHOLE), (300, A8)]
        assert [explain(**layer, tokens=tokens).kernels for tokens in (299, 300)] == [WHOLE, A8]
        assert relative_error(fused_moe(**layer), judged(layer, "bfloat16", "#4542")) < TOLERANCE


def test_knobs_that_no_answer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("v0.1.18 and later") as fake:
        layer = make_layer(4, MOE, **MODELS["gpt-oss"])
        assert explain(**layer).backend == "aiter"
        for name, value, reason in (
            ("AITER_BF16_FP8_MOE_BOUND", "many", "AITER_BF16_FP8_MOE_BOUND must be a number of tokens, found 'many'"),
            ("AITER_ONLINE_TUNE", "1", "AITER_ONLINE_TUNE=1 would tune kernels for every number of tokens at once"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                patch.setattr(fake, "configuration", None)  # not asked
                assert reason in explain(**layer).passed_over["aiter"]
        monkeypatch.setenv("AITER_MXFP4_INTERMEDIATE", "1")
        assert explain(**layer).activations == "bfloat16, AITER_MXFP4_INTERMEDIATE=1"
    with installed("v0.1.18 and later"):
        import aiter

        aiter.fused_moe._MOE_A8W4_BYPASS_QUANT = True  # as it is imported with
        assert "cut to float8 without scales" in explain(**make_layer(4, MOE, activation="swiglu")).passed_over["aiter"]


def test_k_in_parts_leaves_the_second_gemm_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", "0")
    with installed("v0.1.18 and later"):
        report = explain(**make_layer(1, MOE, **MODELS["gpt-oss"]))
        assert [(route.tokens[0], route.activations) for route in report.routes] == [
            (1, "mxfp8, then bfloat16"), (3, "mxfp8"),
        ]  # fmt: skip


def test_any_number_of_tokens_in_one_graph() -> None:
    """Compiled with the number of tokens, and of slots, as symbols."""
    compiled = torch.compile(fused_moe, dynamic=True, fullgraph=True, backend="aot_eager")
    for kind, model in ((SEPARATED, "DeepSeek V4"), (MOE, "gpt-oss, expert parallel")):
        with installed("v0.1.18 and later") as fake:
            for tokens in (4, 300, 7):
                layer = make_layer(tokens, kind, **MODELS[model])
                assert torch.equal(compiled(**layer), fused_moe(**layer))
            assert len(fake.reads) == 6


def test_explained_for_another_number_of_tokens() -> None:
    with installed("v0.1.18 and later"):
        layer = make_layer(4, MOE, **MODELS["gpt-oss"])
        assert (explain(**layer).kernels, explain(**layer, tokens=4096).kernels) == (WHOLE, A8)
        assert str(explain(**layer)).endswith(
            "routes        1 to 255 tokens: CK-Tile a16w4, activations bfloat16\n"
            "routes        256 tokens or more: CK-Tile a8w4, activations mxfp8"
        )
        for tokens in (-1, 2.5, True):
            with pytest.raises(ValueError, match="tokens must be a number of them"):
                explain(**layer, tokens=tokens)


# --- what is silently wrong, made by hand on plain tensors; and refused


def plain_call(layer: dict[str, Any], kind: str, gate_mode: str, **options: Any) -> Tensor:
    """aiter's own function, as somebody calls it who has bytes in a layout and an attribute that says so."""
    import aiter

    layer = dict(layer)
    operands = {}
    for name, ours in (("w1", "w13"), ("w2", "w2")):
        weight = layer.pop(ours).shuffle_(kind)
        operands[name] = weight.qdata.clone().view(torch.float4_e2m1fn_x2)
        operands[name].is_shuffled = True
        operands[f"{name}_scale"] = weight.scale.clone()
    activation = getattr(aiter.ActivationType, layer.pop("activation", "silu").capitalize())
    biases = {"bias1": (layer.pop("w13_bias", None), 512, 2), "bias2": (layer.pop("w2_bias", None), 768, 1)}
    for name, (bias, size, halves) in biases.items():
        if bias is not None:
            padded = torch.zeros(EXPERTS, halves, size)
            padded[:, :, : bias.shape[1] // halves] = bias.float().unflatten(1, (halves, -1))
            operands[name] = padded.flatten(1)
    hidden = torch.nn.functional.pad(layer.pop("hidden_states"), (0, 768 - HIDDEN))
    if gate_mode == "interleave" and activation is aiter.ActivationType.Swiglu:
        operands.setdefault("bias1", torch.zeros(EXPERTS, 1024))
    out: Tensor = aiter.fused_moe.fused_moe(
        hidden_states=hidden,
        activation=activation,
        quant_type=aiter.QuantType.per_1x32,
        gate_mode=gate_mode,
        **layer | operands | options,
    )
    return out[:, :HIDDEN]


def wrong(version: str, layer: dict[str, Any], kind: str, gate_mode: str, **options: Any) -> float:
    """How wrong it is against the best that its kernels could mean."""
    found = plain_call(layer, kind, gate_mode, **options)
    possible = ("bfloat16", "mxfp8", f"mxfp4, {RULES[version]}")
    return min(relative_error(found, judged(layer, numerics, version)) for numerics in possible)


@pytest.mark.parametrize("version", [*LATE, *EARLY])
def test_what_a_caller_of_aiter_gets_wrong(version: str) -> None:
    """Rows that are crossed out in the table of what was run; where a row has a twin that is right, so is it here."""
    swiglu = MODELS["gpt-oss"]
    with installed(version):
        assert wrong(version, make_layer(4, None, **swiglu), SEPARATED, "separated") < TOLERANCE
        assert wrong(version, make_layer(4, None, **swiglu), MOE, "interleave") < TOLERANCE
        # the layout of the other gate mode
        assert wrong(version, make_layer(4, None, **swiglu), MOE, "separated") > 0.3
        assert wrong(version, make_layer(4, None, **swiglu), SEPARATED, "interleave") > 0.3
        # a limit that is not the one compiled in, but where tokens are many and FlyDSL takes them
        another = make_layer(4, None, **swiglu, swiglu_limit=3.0)
        assert wrong(version, another, SEPARATED, "separated") > TOLERANCE
        assert wrong(version, another, MOE, "interleave") > TOLERANCE
        another = make_layer(300, None, **swiglu, swiglu_limit=3.0)
        assert wrong(version, another, SEPARATED, "separated") < TOLERANCE
        if version != "v0.1.14":
            assert wrong(version, another, MOE, "interleave") > TOLERANCE
        # pads that are told
        told = {"intermediate_pad": 512 - INTERMEDIATE, "hidden_pad": 768 - HIDDEN}
        few = make_layer(4, None, **swiglu)
        assert wrong(version, few, MOE, "interleave", **told) < TOLERANCE
        assert wrong(version, few, SEPARATED, "separated", intermediate_pad=64) > TOLERANCE
        # SiLU of few tokens under "interleave", with a limit that is met
        few = make_layer(1, None, swiglu_limit=0.5)
        if version in ("v0.1.16, v0.1.17", "v0.1.18 and later", "#4542"):
            assert wrong(version, few, MOE, "interleave") > TOLERANCE
        else:
            with pytest.raises(RuntimeError, match="no kernel"):
                wrong(version, few, MOE, "interleave")
        # and of more, for which there is no kernel
        with pytest.raises(RuntimeError, match="no kernel"):
            wrong(version, make_layer(32, None), MOE, "interleave")


def test_pads_are_never_told() -> None:
    with installed("v0.1.18 and later") as fake:
        given: list[dict[str, Any]] = []
        operator = fake.fused_moe_
        fake.fused_moe_ = lambda call: given.append(call) or operator(call)  # type: ignore[method-assign]
        for kind in (SEPARATED, MOE):
            fused_moe(**make_layer(4, kind, **MODELS["gpt-oss"]))
        assert [(call["hidden_pad"], call["intermediate_pad"]) for call in given] == [(0, 0), (0, 0)]
        assert [call["gate_mode"] for call in given] == ["separated", "interleave"]
        assert all(call[name].dtype is torch.float32 for call in given for name in ("bias1", "bias2"))


@pytest.mark.parametrize("topk", [1, 2])
def test_a_mask_comes_with_a_slot_more(topk: int) -> None:
    """By aiter's convention, whose tables are of the slots without it: one expert a token would be none."""
    with installed("v0.1.18 and later") as fake:
        given: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        operator, configuration = fake.fused_moe_, fake.configuration
        fake.fused_moe_ = lambda call: given.append(call) or operator(call)  # type: ignore[method-assign]
        fake.configuration = lambda **call: asked.append(call) or configuration(**call)  # type: ignore[method-assign]
        layer = make_layer(4, SEPARATED, expert_mask=MASK)
        layer |= {name: layer[name][:, :topk] for name in ("topk_weight", "topk_ids")}
        out = fused_moe(**layer, backend="aiter")
        assert relative_error(out, judged(layer, "mxfp4, round_up", "#4542")) < TOLERANCE
        assert given[0]["expert_mask"].tolist() == [*MASK.tolist(), 0]
        assert given[0]["topk_ids"][:, topk:].tolist() == [[len(MASK)]] * 4
        assert given[0]["topk_weight"][:, topk:].tolist() == [[0.0]] * 4
        assert {(call["topk"], call["is_ep"]) for call in asked} == {(topk + 1, True)}


@pytest.mark.parametrize("version", ["v0.1.18 and later", "v0.1.15", "#3470"])
def test_a_tuned_second_stage_that_drops_its_bias(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """v0.1.17-longctx, v0.1.18 and v0.1.19, gpt-oss-120b at 256 tokens."""
    monkeypatch.setitem(VERSIONS, version, replace(VERSIONS[version], tuned_bias2=False))  # type: ignore[index]
    with installed(version, tuned=True):
        layer = make_layer(4, MOE, **MODELS["gpt-oss"])
        report = explain(**layer)
        assert report.backend == "reference"
        assert report.passed_over["aiter"].startswith(
            f"for 256 tokens, FlyDSL a8w4 in aiter {version} would ignore a bias"
        )
        assert wrong(version, make_layer(256, None, **MODELS["gpt-oss"]), MOE, "interleave") > TOLERANCE
        # nor is it given zeros, without which it computes nothing
        assert explain(**make_layer(4, MOE, activation="swiglu")).backend == "reference"


@pytest.mark.parametrize("version", ["v0.1.18 and later", "#4542"])
def test_a_table_that_was_tuned_for_silu(version: str) -> None:
    """Its rows are found for any activation, and compute SiLU."""
    with installed(version, tuned=True):
        assert wrong(version, make_layer(300, None, **MODELS["gpt-oss"]), SEPARATED, "separated") > 0.3
        report = explain(**make_layer(4, SEPARATED, **MODELS["MiniMax-M3"]))
        assert "for 256 tokens, mxmoe a4w4" in report.passed_over["aiter"]
        assert "would miscompute activation='swiglu'" in report.passed_over["aiter"]
        for model in ("DeepSeek V4", "biases", "Kimi K2, expert parallel"):
            assert explain(**make_layer(4, SEPARATED, **MODELS[model])).backend == "reference"


# --- packed activations, and buffers with padding


@pytest.mark.parametrize("version", LATE)
def test_activations_that_are_packed_already(version: str) -> None:
    with installed(version) as fake:
        layer = make_layer(5, SEPARATED)
        codes, scale = coded(5, HIDDEN // 2, salt=11), moderate_scales(5, HIDDEN // 32)
        layer |= {"hidden_states": codes, "hidden_scale": scale}
        assert explain(**layer).backend == "aiter"
        out = fused_moe(**layer)
        assert len(fake.reads) == 1
        expected = judged(
            {name: value for name, value in layer.items() if name != "hidden_scale"}
            | {"hidden_states": dense(codes, scale)},
            f"mxfp4, {RULES[version]}",
            version,
        )
        assert relative_error(out, expected) < TOLERANCE
        for other in (
            layer | {"activation": "swiglu"},
            make_layer(5, MOE) | {"hidden_states": codes, "hidden_scale": scale},
        ):
            assert explain(**other).backend == "reference"


@pytest.mark.parametrize("version", LATE)
def test_a_buffer_with_padding(version: str) -> None:
    with installed(version) as fake:
        layer = make_layer(9, SEPARATED, num_local_tokens=torch.tensor([6], dtype=torch.int32))
        layer["topk_ids"][6:] = 2**30  # not looked at
        out = fused_moe(**layer, backend="aiter")
        assert len(fake.reads) == 1
        few = {
            name: value[:6] if name in ("hidden_states", "topk_weight", "topk_ids") else value
            for name, value in layer.items()
        }
        del few["num_local_tokens"]
        assert relative_error(out[:6], judged(few, f"mxfp4, {RULES[version]}", version)) < TOLERANCE
        assert (
            explain(**make_layer(9, MOE, activation="swiglu", num_local_tokens=layer["num_local_tokens"])).backend
            == "reference"
        )


# --- sizes that models have


GPT_OSS = {"gpt-oss-20b": 32, "gpt-oss-120b": 128}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("model", GPT_OSS)
@pytest.mark.parametrize("kind", [SEPARATED, MOE])
def test_routes_of_gpt_oss(version: str, model: str, kind: str) -> None:
    """At its real sizes, without its bytes."""
    with override_arch("gfx950", "meta"), fake_aiter(version, tuned=False):
        experts = GPT_OSS[model]
        w13, w2 = (
            ShuffledMXFP4Tensor(
                torch.empty(experts, rows, 1440, dtype=torch.uint8, device="meta"),
                torch.empty(experts, rows, 90, dtype=torch.uint8, device="meta"),
                gate_up=gate_up,
                row_order="interleaved" if gate_up else None,
                shuffle_kind=kind,
            )
            for rows, gate_up in ((5760, True), (2880, False))
        )
        layer = {
            "hidden_states": torch.empty(1, 2880, dtype=torch.bfloat16, device="meta"),
            "w13": w13,
            "w2": w2,
            "topk_weight": torch.empty(1, 4, device="meta"),
            "topk_ids": torch.empty(1, 4, dtype=torch.int32, device="meta"),
            "activation": "swiglu",
            "w13_bias": torch.empty(experts, 5760, dtype=torch.bfloat16, device="meta"),
            "w2_bias": torch.empty(experts, 2880, dtype=torch.bfloat16, device="meta"),
        }
        for tokens in (1, 4, 32, 255, 256, 300, 4096):
            report = explain(**layer, tokens=tokens)
            if version == "v0.1.14" and kind == MOE:
                assert "cut to float8 without scales" in report.passed_over["aiter"]
            else:
                few, many = (PARTS, A4) if kind == SEPARATED else (WHOLE, A8)
                assert (report.backend, report.kernels) == ("aiter", few if tokens < 256 else many)
                assert report.activations == "bfloat16" if tokens < 256 else report.activations.startswith("mxfp")


def test_no_limit_is_infinity() -> None:
    with installed("v0.1.18 and later"):
        layer = make_layer(300, SEPARATED)
        assert torch.equal(fused_moe(**layer, swiglu_limit=math.inf), fused_moe(**layer))
        assert explain(**layer, activation="swiglu", swiglu_limit=math.inf).backend == "reference"
