# SPDX-License-Identifier: MIT
"""Routing to aiter, in each version of its API, judged by a fake that computes from the shuffled bytes by index formulas."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from shuffled_tensor import (
    ShuffledMXFP4Tensor,
    explain,
    fused_moe,
    implements,
    override_arch,
)
from shuffled_tensor.backends.aiter import versions as backend
from shuffled_tensor.backends.reference import Reference
from shuffled_tensor.testing import VERSIONS, fake_aiter

from .support.aiter import EXPECTED, OTHER, READS, answer_of
from .support.bytes import coded, moderate_scales
from .support.judges import dense, in_memory, relative_error, rounded_moe
from .support.layer import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    PADDED_HIDDEN,
    PADDED_INTERMEDIATE,
    make_layer,
    make_weight,
    packed_arguments,
    weight_parts,
)
from .support.reports import unversioned


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gets_its_layout(version: str, device: str) -> None:
    with override_arch("gfx950"), fake_aiter(version) as fake:
        layer = make_layer(device)
        answer = answer_of(fake, layer)
        for _ in range(2):
            out = fused_moe(**layer)
            assert torch.equal(out, answer)
        assert out.dtype is torch.bfloat16
        assert fake.reads == [READS[EXPECTED[version].layout]] * 2
        for name in ("w13", "w2"):
            assert (layer[name].shuffle_kind, layer[name].is_shuffled) == (EXPECTED[version].layout, True)
            assert torch.equal(layer[name].dequantize(), make_weight(name, device).dequantize())
        reference = fused_moe(
            **layer, backend="reference", activation_dtype="mxfp4", scale_rule=EXPECTED[version].scale_rule
        )
        assert relative_error(out, reference) < 0.01
        # ids and weights of other dtypes are converted, not refused
        wide = {"topk_ids": layer["topk_ids"].long(), "topk_weight": layer["topk_weight"].double()}
        assert torch.equal(fused_moe(**(layer | wide)), answer)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("no_triton")
def test_untuned_shapes(version: str, device: str) -> None:
    """Where a version's kernels that read its layout exist for tuned shapes alone, others must not reach it."""
    with override_arch("gfx950"), fake_aiter(version, tuned=False) as fake:
        layer = make_layer(device)
        report, out = explain(**layer), fused_moe(**layer)
        if EXPECTED[version].any_shape:
            assert report.backend == "aiter"
            values = {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")}
            arguments = {name: value.cpu() for name, value in (layer | values).items()}
            expected = rounded_moe(report.activations, **arguments, fused=version == "#3788")
            assert relative_error(out.cpu(), expected) < 0.013
        else:
            assert report.backend == "reference"
            assert report.passed_over["aiter"].startswith("for 1 token, ")
            assert f" in aiter {version} reads 'mxfp4_" in report.passed_over["aiter"]
            assert torch.equal(out, fused_moe(**layer, backend="reference"))
            assert fake.reads == []
            with pytest.raises(ValueError, match="aiter cannot take this call: for 1 token"):
                fused_moe(**layer, backend="aiter")


@pytest.mark.usefixtures("no_triton")
def test_small_hidden_sizes(device: str) -> None:
    """#3788's kernels are wrong for them, whatever the layout."""
    for hidden, backend_taken in ((512, "reference"), (256, "reference"), (544, "aiter")):
        with override_arch("gfx950"), fake_aiter("#3788") as fake:
            w13 = coded(2, 64, hidden // 2), moderate_scales(2, 64, hidden // 32)
            w2 = coded(2, hidden, 16, salt=3), moderate_scales(2, hidden, 1)
            layer = {
                "hidden_states": torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
                .bfloat16()
                .to(device),
                "w13": ShuffledMXFP4Tensor(*(p.to(device) for p in w13), gate_up=True, row_order="contiguous"),
                "w2": ShuffledMXFP4Tensor(*(p.to(device) for p in w2), gate_up=False),
                "topk_weight": torch.ones(3, 1, device=device),
                "topk_ids": torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device),
            }
            report, out = explain(**layer), fused_moe(**layer)
            assert report.backend == backend_taken
            if backend_taken == "aiter":
                assert torch.equal(out, answer_of(fake, layer))
            else:
                assert report.passed_over["aiter"].startswith(
                    "for 1 token, HIP a4w4 in aiter #3788 miscomputes hidden sizes of 512 or less, padded, as this one "
                    f"of {max(hidden, 256)}"
                )
                assert fake.reads == []
                operands = [layer[name].as_kernel_operands() for name in ("w13", "w2")]
                import aiter

                wrong = aiter.fused_moe.fused_moe(
                    layer["hidden_states"],
                    *(operand.weight for operand in operands),
                    layer["topk_weight"],
                    layer["topk_ids"],
                    quant_type=aiter.QuantType.per_1x32,
                    w1_scale=operands[0].scale,
                    w2_scale=operands[1].scale,
                )
                assert relative_error(wrong, answer_of(fake, layer)) > 0.5


@pytest.mark.usefixtures("no_triton")
def test_a_call_that_aiter_cannot_configure(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As where flydsl is missing."""

    def fail(**given: Any) -> Any:
        raise ImportError("No module named 'flydsl'")

    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        monkeypatch.setattr(fake, "configuration", fail)
        layer = make_layer(device)
        reason = "aiter v0.1.18 and later has no kernel for 1 token (ImportError: No module named 'flydsl')"
        assert explain(**layer).passed_over["aiter"] == reason
        assert torch.equal(fused_moe(**layer), fused_moe(**layer, backend="reference"))
        monkeypatch.undo()  # as one that fails when its tables are read first, and not again
        assert explain(**layer).backend == "aiter"


# --- what its kernels would ignore or compute wrongly


def refusals(device: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Changes to a layer's arguments that no version takes, and a part of the reason given."""
    x, none = make_layer()["hidden_states"], "no kernel known here computes activation="
    situ = {"activation": "situ", "situ_beta": 4.0, "situ_linear_beta": 25.0}
    return _on(device, {
        "gelu": ({"activation": "gelu"}, f"{none}'gelu'"),
        "gelu_tanh": ({"activation": "gelu_tanh"}, f"{none}'gelu_tanh'"),
        "situ": (situ, f"{none}'situ'"),
        "swiglu_alpha": ({"activation": "swiglu", "swiglu_alpha": 1.0}, "swiglu_alpha=1 would be ignored: 1.702 is"),
        "doweight_stage1": ({"doweight_stage1": True}, "doweight_stage1"),
        "float16": ({"hidden_states": x.half()}, "hidden_states are torch.float16, not bfloat16"),
        "float32": ({"hidden_states": x.float()}, "hidden_states are torch.float32, not bfloat16"),
        "out_dtype": ({"out_dtype": torch.float16}, "out_dtype is torch.float16, not bfloat16"),
        "scale_rule": ({"activation_dtype": "mxfp4", "scale_rule": "floor"}, "'mxfp4' and scale_rule='floor'"),
    })  # fmt: skip


def ignored(device: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Changes that kernels for SiLU alone ignore."""
    qdata, scale = coded(5, HIDDEN // 2), moderate_scales(5, HIDDEN // 32)
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.int32)
    return _on(device, {
        "w13_bias": ({"w13_bias": torch.zeros(EXPERTS, 2 * INTERMEDIATE)}, "would ignore a bias"),
        "w2_bias": ({"w2_bias": torch.zeros(EXPERTS, HIDDEN)}, "would ignore a bias"),
        "swiglu_limit": ({"swiglu_limit": 7.0}, "would ignore swiglu_limit=7"),
        "expert_mask": ({"expert_mask": mask}, "would drop expert_mask, or raise"),
        "num_local_tokens": ({"num_local_tokens": torch.tensor([2]).int()}, "would ignore num_local_tokens"),
        "hidden_scale": ({"hidden_states": qdata, "hidden_scale": scale}, "would ignore hidden_scale"),
    })  # fmt: skip


def _on(device: str, changes: dict[str, tuple[dict[str, Any], str]]) -> dict[str, tuple[dict[str, Any], str]]:
    def moved(change: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in change.items()}

    return {name: (moved(change), reason) for name, (change, reason) in changes.items()}


OWN_KERNELS = [name for name in VERSIONS if not name.startswith("v0.1.1") or name == "v0.1.18 and later"]


@pytest.mark.parametrize(
    ("name", "version"),
    [*itertools.product(refusals("cpu"), VERSIONS), *itertools.product(ignored("cpu"), OWN_KERNELS)],
)
@pytest.mark.usefixtures("no_triton")
def test_refused_calls_are_rerouted_or_raise(version: str, name: str, device: str) -> None:
    change, reason = (refusals(device) | ignored(device))[name]
    with override_arch("gfx950"), fake_aiter(version) as fake:
        layer = make_layer(device) | change
        report = explain(**layer)
        assert report.backend == "reference"
        assert reason in report.passed_over["aiter"]
        with pytest.raises(ValueError, match="aiter cannot take this call: "):
            fused_moe(**layer, backend="aiter")
        assert not layer["w13"].is_shuffled  # nothing was used, so nothing was shuffled
        out = fused_moe(**layer)
        assert layer["w13"].is_shuffled  # or a later call would change the layout under one that is running
        assert fake.reads == []
    assert report.shuffles == {name: layer[name].shuffle_kind for name in ("w13", "w2")}
    assert torch.equal(out, fused_moe(**make_layer(device) | change))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_reaches_the_operator(version: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The whole of it, from arguments that are neither contiguous nor of the kernels' dtypes."""
    with override_arch("gfx950"), fake_aiter(version) as fake:
        calls: list[dict[str, Any]] = []
        operator = fake.fused_moe_
        monkeypatch.setattr(fake, "fused_moe_", lambda given: calls.append(given) or operator(given))
        layer = make_layer(device)
        answer = answer_of(fake, layer)
        apart = {name: layer[name].repeat_interleave(2, 1)[:, ::2] for name in ("hidden_states", "topk_weight")}
        apart["topk_ids"] = layer["topk_ids"].long().t().contiguous().t()
        assert not any(tensor.is_contiguous() for tensor in apart.values())
        out = fused_moe(**(layer | apart))
        assert torch.equal(out, answer)
        assert out.is_contiguous()
        (given,) = calls
        w13, w2 = layer["w13"], layer["w2"]
        described = {
            name: (value.dtype, tuple(value.shape)) for name, value in given.items() if isinstance(value, Tensor)
        }
        assert described == {
            "hidden_states": (torch.bfloat16, (5, PADDED_HIDDEN)),
            "w1": (torch.float4_e2m1fn_x2, (EXPERTS, 512, 384)),
            "w2": (torch.float4_e2m1fn_x2, (EXPERTS, PADDED_HIDDEN, 128)),
            "topk_weight": (torch.float32, (5, 2)),
            "topk_ids": (torch.int32, (5, 2)),
            "w1_scale": (torch.uint8, (EXPERTS, 512, 24)),
            "w2_scale": (torch.uint8, (EXPERTS, PADDED_HIDDEN, 8)),
        }
        assert all(given[name].is_contiguous() for name in described)
        own = {"w1": w13.qdata, "w2": w2.qdata, "w1_scale": w13.scale, "w2_scale": w2.scale}
        assert {name: given[name].data_ptr() for name in own} == {name: data.data_ptr() for name, data in own.items()}
        plain = {name: value for name, value in given.items() if name not in described and value is not None}
        ep = {name: 0 for name in plain if name.startswith("ep_")}
        early = {} if version in ("v0.1.18 and later", "#4542") else {"swiglu_limit": 0.0}
        late = {"is_shuffled": True} if version == "#4542" else {}
        assert plain == ep | early | late | {
            "activation": 0,
            "quant_type": 3,
            "doweight_stage1": False,
            "block_size_M": -1,
            "moe_sorting_dispatch_policy": 0,
            "hidden_pad": 0,
            "intermediate_pad": 0,
            "gate_mode": EXPECTED[version].gate_mode,
        }
        assert vars(given["w1"]) == {"is_shuffled": True} | EXPECTED[version].tags
        assert vars(given["w2"]) == {"is_shuffled": True}


@pytest.mark.parametrize("version", VERSIONS)
def test_no_tokens(version: str, device: str) -> None:
    """As on a rank without requests: nothing is launched, and weights are shuffled all the same."""
    with override_arch("gfx950"), fake_aiter(version) as fake:
        layer = make_layer(device, tokens=0)
        out = fused_moe(**layer, backend="aiter" if EXPECTED[version].any_shape else None)
        assert (out.shape, out.dtype) == ((0, HIDDEN), torch.bfloat16)
        assert layer["w13"].shuffle_kind == EXPECTED[version].layout
        assert fake.reads == []


def test_expert_parallelism_without_a_mask(device: str) -> None:
    """What the refusal of `expert_mask` advises."""
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        layer = make_layer(device)
        mask = torch.tensor([0, 1, 1, 0, 1, 1, 0], dtype=torch.int32, device=device)
        ids = torch.tensor([[1, 0], [2, 3], [6, 4], [5, 1], [0, 6]], dtype=torch.int32, device=device)
        options = {"activation_dtype": "mxfp4", "scale_rule": "round_up"}
        reference = fused_moe(**(layer | {"topk_ids": ids}), expert_mask=mask, **options)
        assert fake.reads == []
        local = mask[ids.long()] == 1
        local_ids = torch.where(local, mask.cumsum(0)[ids.long()] - 1, 0)
        rest = {"topk_ids": local_ids, "topk_weight": layer["topk_weight"] * local}
        assert relative_error(fused_moe(**(layer | rest), backend="aiter"), reference) < 0.01
        assert len(fake.reads) == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.usefixtures("no_triton")
def test_what_is_explained_is_what_happens(
    version: str, tuned: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Backend, layouts and errors, for every kind that a caller may have fixed and every way of asking."""
    monkeypatch.setattr(Reference, "run", lambda self, call: call.hidden_states)  # numbers are looked at elsewhere
    fixed = ((None, None), ("mxfp4_moe", None), (None, "mxfp4_separated"), ("mxfp4_separated",) * 2, ("none",) * 2)
    asked: list[dict[str, Any]] = [{}, {"backend": "reference"}, {"backend": "aiter"}]
    calls = [{}, *(change for change, _ in (refusals(device) | ignored(device)).values())]
    with override_arch("gfx950"), fake_aiter(version, tuned=tuned) as fake:
        monkeypatch.setattr(fake, "answer", lambda x, *rest: x)

        def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
            try:
                return function(**arguments)
            except ValueError as error:
                return str(error)

        for (w13_kind, w2_kind), backend_asked, change in (
            *itertools.product(fixed, asked, calls[:1]),
            *itertools.product(fixed[:1], asked, calls[1:]),
        ):
            weights = {"w13": make_weight("w13", device, w13_kind), "w2": make_weight("w2", device, w2_kind)}
            arguments = make_layer(device) | weights | change | backend_asked
            fake.reads.clear()
            report = outcome(explain, arguments)
            assert not any(weight.is_shuffled for weight in weights.values())
            out = outcome(fused_moe, arguments)
            shuffled = {name: weight.shuffle_kind for name, weight in weights.items() if weight.is_shuffled}
            if isinstance(out, str):
                assert (report, shuffled, fake.reads) == (out, {}, [])
            else:
                assert report.shuffles == shuffled
                assert report.backend == ("aiter" if fake.reads else "reference")
                assert report.layout is None or report.layout == shuffled["w13"]  # w2 is the same bytes in both


def test_the_kernels_own_rule_may_be_named(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        layer = make_layer(device)
        assert explain(**layer, activation_dtype="mxfp4", scale_rule="round_up").backend == "aiter"
        assert explain(**layer, activation_dtype="mxfp4").backend == "aiter"


def test_experts_apart_in_memory_are_not_passed_as_if_they_were_together(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        layer = make_layer(device) | {"w13": make_weight("w13", device)[::2], "w2": make_weight("w2", device)[::2]}
        layer["topk_ids"] %= 2
        for name in ("w13", "w2"):
            one = layer | {other: layer[other].clone() for other in ("w13", "w2") if other != name}
            assert f"experts of {name} are not contiguous in memory" in explain(**one).passed_over["aiter"]
        together = layer | {"w13": layer["w13"].clone(), "w2": layer["w2"].clone()}
        assert torch.equal(fused_moe(**together), answer_of(fake, layer))
        middle = layer | {"w13": make_weight("w13", device)[1:3], "w2": make_weight("w2", device)[1:3]}
        assert torch.equal(fused_moe(**middle), answer_of(fake, middle))


def test_packed_operator_refuses_layouts_that_the_kernel_does_not_read(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        layer = make_layer(device)
        layer["w13"].shuffle_("mxfp4_separated")
        layer["w2"].shuffle_("mxfp4_separated")
        packed = packed_arguments(layer) | {"out_dtype": "bfloat16", "backend": "aiter"}
        for name in ("w13_qdata", "w13_scale", "w2_qdata", "w2_scale"):
            packed[name] = packed[name].clone()  # bytes that no weight owns are what the caller says
        operator = torch.ops.shuffled_tensor.fused_moe_packed
        separated, moe = "mxfp4_separated", "mxfp4_moe"
        assert torch.equal(operator(**packed), answer_of(fake, layer))
        assert torch.equal(operator(**(packed | {"w2_layout": moe})), answer_of(fake, layer))  # the same bytes
        none = r"w\d+ is fixed to 'none', and it reads 'mxfp4_separated' or 'mxfp4_moe'"
        moved = "interleaved rows in aiter v0.1.18 and later would miscompute"
        for layouts, match in (((moe, moe), moved), (("none", separated), none), ((separated, "none"), none)):
            with pytest.raises(ValueError, match=match):
                operator(**packed | dict(zip(("w13_layout", "w2_layout"), layouts, strict=True)))
        assert len(fake.reads) == 2


# --- engine code that calls aiter itself


def positional(aiter: ModuleType, layer: dict[str, Any], **changes: Any) -> Tensor:
    scales = layer["w13"].scale, layer["w2"].scale
    kinds = aiter.ActivationType.Silu, aiter.QuantType.per_1x32
    out: Tensor = aiter.fused_moe.fused_moe(*layer.values(), None, *kinds, False, *scales, **changes)
    return out


def by_keyword(aiter: ModuleType, layer: dict[str, Any], **changes: Any) -> Tensor:
    named = {"w1": layer["w13"], "w2": layer["w2"]} | {k: v for k, v in layer.items() if k[0] != "w"}
    out: Tensor = aiter.fused_moe.fused_moe(**named, **({"quant_type": aiter.QuantType.per_1x32} | changes))
    return out


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("call", [positional, by_keyword])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_drop_in(version: str, call: Callable[..., Tensor], mode: Callable[[], Any], device: str) -> None:
    with override_arch("gfx950"), fake_aiter(version) as fake, mode():
        import aiter

        layer = make_layer(device)
        answer = answer_of(fake, layer)
        parameters = layer | {name: torch.nn.Parameter(layer[name]) for name in ("w13", "w2")}
        for _ in range(2):
            assert torch.equal(call(aiter, parameters), answer)
        assert len(fake.reads) == 2
        assert layer["w13"].shuffle_kind == EXPECTED[version].layout
        assert torch.equal(call(aiter, parameters, gate_mode=EXPECTED[version].gate_mode), answer)
        # the operator cannot tell its default from the same value given
        assert torch.equal(call(aiter, parameters, gate_mode="separated"), answer)
        # padded as an engine pads its activations: as many columns come back
        # with the scales that an engine registered beside the weights, as it likes them
        w13_scale, w2_scale = layer["w13"].scale, layer["w2"].scale
        for scales in (
            {"w1_scale": w13_scale.view(torch.float8_e8m0fnu), "w2_scale": w2_scale.view(torch.float8_e8m0fnu)},
            {"w1_scale": w13_scale.flatten(0, 1), "w2_scale": w2_scale.flatten(0, 1)},
            {"w1_scale": torch.nn.Parameter(w13_scale, requires_grad=False)},
        ):
            assert torch.equal(by_keyword(aiter, parameters, **scales), answer)
        padded = parameters | {
            "hidden_states": torch.nn.functional.pad(layer["hidden_states"], (0, PADDED_HIDDEN - HIDDEN))
        }
        out = call(
            aiter, padded, hidden_pad=PADDED_HIDDEN - HIDDEN, intermediate_pad=PADDED_INTERMEDIATE - INTERMEDIATE
        )
        assert out.shape == (5, PADDED_HIDDEN)
        assert torch.equal(out[:, :HIDDEN], answer)
        assert not out[:, HIDDEN:].any()


def test_drop_in_refuses_what_contradicts_the_weights(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("#4542") as fake:
        import aiter

        layer = make_layer(device)
        w13 = layer["w13"]
        changes: dict[str, dict[str, Any]] = {
            "gate mode": {"gate_mode": "interleave"},
            "is_shuffled": {"is_shuffled": False},
            "scale": {"w1_scale": w13.scale.clone()},
            "scale of others": {"w1_scale": w13.scale[1:]},
            "scale of the other": {"w1_scale": layer["w2"].scale},
            "scale in another order": {"w1_scale": w13.scale.transpose(1, 2)},
            "scale to write": {"w1_scale": w13.scale_view},
            "quant type": {"quant_type": aiter.QuantType.No},
            "block size": {"block_size_M": 32},
            "local tokens": {"num_local_tokens": torch.tensor([3], dtype=torch.int32, device=device)},
            "a2 scale": {"a2_scale": w13.scale},
            "pads": {"hidden_pad": 32},
            "activation": {"activation": aiter.ActivationType.Gelu},
            "bias": {"bias1": torch.zeros(EXPERTS, 2 * INTERMEDIATE, device=device)},
            "limit": {"swiglu_limit": 7.0},
            "mask": {"expert_mask": torch.ones(EXPERTS, dtype=torch.int32, device=device)},
        }
        lines = []
        for name, change in changes.items():
            with pytest.raises(ValueError, match=".") as error:
                by_keyword(aiter, layer, **change)
            lines.append(f"{name}: {error.value}")
        some = layer | {"w13": w13[:2], "w2": layer["w2"][:2]}
        with pytest.raises(ValueError, match=r"w1_scale must be None or w1\.scale itself"):
            by_keyword(aiter, some, w1_scale=w13[2:].scale)
        with pytest.raises(TypeError, match="w2 must be a ShuffledMXFP4Tensor as the other is, found Tensor"):
            by_keyword(aiter, layer | {"w2": layer["w2"].qdata})
        assert fake.reads == []
        assert by_keyword(aiter, layer, swiglu_limit=0.0, moe_sorting_dispatch_policy=1).shape == (5, HIDDEN)
    assert_expected_inline(
        "\n".join(lines),
        """\
gate mode: gate_mode='interleave' contradicts the weights: w1 is laid out as 'mxfp4_separated', which aiter #4542 reads with gate_mode='separated'; leave it out, or make the weights with another shuffle_kind
is_shuffled: is_shuffled=False contradicts the weights, which are shuffled by the time of the call
scale: w1_scale must be None or w1.scale itself: w1 carries its own
scale of others: w1_scale must be None or w1.scale itself: w1 carries its own
scale of the other: w1_scale must be None or w1.scale itself: w1 carries its own
scale in another order: w1_scale must be None or w1.scale itself: w1 carries its own
scale to write: w1_scale must be None or w1.scale itself: w1 carries its own
quant type: quant_type must be per_1x32 for MXFP4 weights, found the value 0
block size: block_size_M is ignored or miscomputed by the kernels behind this call; leave it out
local tokens: aiter cannot take this call: for 1 token, mxmoe a4w4 in aiter #4542 would ignore num_local_tokens; shuffled_tensor.fused_moe without backend= goes to another
a2 scale: a2_scale is ignored or miscomputed by the kernels behind this call; leave it out
pads: hidden_pad must be 0 or 224, by which the weights themselves are padded
activation: aiter cannot take this call: no kernel known here computes activation='gelu'; they compute 'silu' and 'swiglu'; shuffled_tensor.fused_moe without backend= goes to another
bias: aiter cannot take this call: for 1 token, mxmoe a4w4 in aiter #4542 would ignore a bias; shuffled_tensor.fused_moe without backend= goes to another
limit: aiter cannot take this call: for 1 token, mxmoe a4w4 in aiter #4542 would ignore swiglu_limit=7; shuffled_tensor.fused_moe without backend= goes to another
mask: aiter cannot take this call: for 1 token, mxmoe a4w4 in aiter #4542 would drop expert_mask, or raise; without it, give local topk_ids, and topk_weight 0 where an expert is another rank's; shuffled_tensor.fused_moe without backend= goes to another""",
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_drop_in_takes_what_its_kernels_take(version: str) -> None:
    """gpt-oss as an engine calls it: padded activations, biases, aiter's names."""
    with override_arch("gfx950"), fake_aiter(version, tuned=False) as fake:
        import aiter

        layer = make_layer()
        generator = torch.Generator().manual_seed(3)
        biases = torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator), torch.randn(EXPERTS, HIDDEN)
        values = {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")}
        given = {"activation": aiter.ActivationType.Swiglu, "bias1": biases[0], "bias2": biases[1]}
        x = torch.nn.functional.pad(layer["hidden_states"], (0, PADDED_HIDDEN - HIDDEN))
        for limit in ({}, {"swiglu_limit": 7.0}):
            out = by_keyword(aiter, layer | {"hidden_states": x}, **given, **limit)
            expected = rounded_moe(
                "bfloat16", **layer | values, activation="swiglu", w13_bias=biases[0], w2_bias=biases[1]
            )
            assert relative_error(out[:, :HIDDEN], expected) < 0.013
        assert len(fake.reads) == 2


def test_drop_in_with_packed_activations() -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later", tuned=False) as fake:
        import aiter

        layer = make_layer()
        codes, scale = coded(5, HIDDEN // 2), moderate_scales(5, HIDDEN // 32)
        values = {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")}
        expected = rounded_moe("mxfp4, round_up", **layer | values | {"hidden_states": dense(codes, scale)})
        for columns in (HIDDEN, PADDED_HIDDEN):
            x = torch.nn.functional.pad(codes, (0, (columns - HIDDEN) // 2)).view(torch.float4_e2m1fn_x2)
            pads = torch.nn.functional.pad(scale, (0, (columns - HIDDEN) // 32), value=127)
            out = by_keyword(aiter, layer | {"hidden_states": x}, a1_scale=pads)
            assert out.shape == (5, columns)
            assert relative_error(out[:, :HIDDEN], expected) < 0.013
        assert len(fake.reads) == 2


def test_another_engines_operator_in_a_few_lines() -> None:
    library = torch.library.Library("an_engine", "FRAGMENT")
    library.define("moe(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor ids, Tensor weights) -> Tensor")

    @implements("an_engine::moe")
    def moe(x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_moe(x, w_gate_up, w_down, weights, ids)

    layer = make_layer()
    x, w13, w2, weight, ids = layer.values()
    assert torch.equal(torch.ops.an_engine.moe(x, w13, w2, ids, weight), fused_moe(**layer))
    library._destroy()


@pytest.mark.parametrize("version", VERSIONS)
def test_kernel_operands(version: str, device: str) -> None:
    with override_arch("gfx950"), fake_aiter(version) as fake:
        import aiter

        layer = make_layer(device)
        answer = answer_of(fake, layer)
        w13, w2 = layer["w13"], layer["w2"]
        first, second = w13.as_kernel_operands(), w2.as_kernel_operands()
        assert w13.as_kernel_operands().scale is first.scale
        assert type(first.weight) is Tensor
        assert first.weight.dtype is torch.float4_e2m1fn_x2
        assert (first.weight.data_ptr(), first.scale.data_ptr()) == (w13.qdata.data_ptr(), w13.scale.data_ptr())
        assert torch.equal(fused_moe(**layer), answer)

        def call() -> Tensor:
            return aiter.fused_moe.fused_moe(
                torch.nn.functional.pad(layer["hidden_states"], (0, PADDED_HIDDEN - HIDDEN)),
                first.weight,
                second.weight,
                layer["topk_weight"],
                layer["topk_ids"],
                quant_type=aiter.QuantType.per_1x32,
                w1_scale=first.scale,
                w2_scale=second.scale,
                gate_mode=first.gate_mode,
            )[:, :HIDDEN]

        assert torch.equal(call(), answer)
        w13.copy_(make_weight("w13", device).dequantize().flip(0))  # new values reach the holder, in its layout
        assert torch.equal(call(), answer_of(fake, layer))
        for change in (w13.unshuffle_, lambda: w13.detach().shuffle_(OTHER[EXPECTED[version].layout])):
            with pytest.raises(RuntimeError, match="handed out by as_kernel_operands"):
                change()
        assert w13.clone().unshuffle_().is_shuffled is False
        assert getattr(second.weight, "inter_real", None) is None  # 160 is no multiple of 128


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("layout", [*OTHER, "none"])
def test_kernel_operands_in_the_layout_that_an_engine_asks_for(version: str, layout: str, device: str) -> None:
    gate_modes = {"mxfp4_separated": "separated", "mxfp4_moe": "interleave", "none": "separated"}
    with override_arch("gfx950"), fake_aiter(version):
        w13 = make_weight("w13", device)
        operands = w13.as_kernel_operands(layout=layout, align=256)
        default = layout == EXPECTED[version].layout
        assert (operands.layout, operands.gate_mode) == (
            layout, EXPECTED[version].gate_mode if default else gate_modes[layout]
        )  # fmt: skip
        assert (operands.hidden_pad, operands.intermediate_pad) == (0, 0)
        tags = {"is_shuffled": layout != "none"} | (EXPECTED[version].tags if default else {})
        assert vars(operands.weight) == tags
        memory = in_memory(weight_parts("w13"), layout, gate_up=True)
        for found, bytes_ in zip((operands.weight.view(torch.uint8), operands.scale), memory, strict=True):
            assert torch.equal(found.cpu(), bytes_)


def test_kernel_operands_are_released(device: str) -> None:
    """The last holder's release unlocks, and each one's counts once."""
    w13 = make_weight("w13", device)
    first, second = (w13.as_kernel_operands(layout="mxfp4_moe") for _ in range(2))
    with pytest.raises(RuntimeError, match="handed out by as_kernel_operands.* release"):
        w13.as_kernel_operands(layout="mxfp4_separated")
    first.release()
    first.release()
    assert w13.layout_locked
    second.release()
    assert not w13.layout_locked
    third = w13.as_kernel_operands(layout="mxfp4_separated")
    assert w13.shuffle_kind == third.layout == "mxfp4_separated"
    w2 = make_weight("w2", device)
    w2.as_kernel_operands(layout="mxfp4_moe")
    assert w2.as_kernel_operands(layout="mxfp4_separated").layout == "mxfp4_separated"  # the same bytes


@pytest.mark.parametrize("layout", ["mxfp4_moe", "mxfp4_separated", "none"])
def test_experts_are_rows_of_bytes(device: str, layout: str) -> None:
    """As a rebalance moves them, through a buffer."""
    w13 = make_weight("w13", device)
    values, order = w13.dequantize(), [2, 0, 3, 1]
    for rows in w13.as_kernel_operands(layout=layout).expert_bytes:
        assert (rows.dtype, rows.dim(), len(rows)) == (torch.uint8, 2, len(order))
        rows.copy_(rows[order].clone())
    assert torch.equal(w13.dequantize(), values[order])


def test_kernel_operands_that_do_not_fit(device: str) -> None:
    w13 = make_weight("w13", device, kind="mxfp4_moe")
    with pytest.raises(ValueError, match="made for shuffle_kind='mxfp4_moe', but 'mxfp4_separated' is asked for"):
        w13.as_kernel_operands(layout="mxfp4_separated")
    with pytest.raises(
        ValueError, match="padded to 512 rows and 768 columns, but align=64 is 384 and 576; make it with"
    ):
        w13.as_kernel_operands(layout="mxfp4_moe", align=64)
    with pytest.raises(ValueError, match="unknown shuffle_kind 'gguu'"):
        w13.as_kernel_operands(layout="gguu")
    assert (w13.is_shuffled, w13.layout_locked) == (False, False)


def test_kernel_operands_where_there_is_no_aiter() -> None:
    with pytest.raises(RuntimeError, match="aiter's MXFP4 kernels run on gfx950, not on cpu$"):
        make_weight("w13").as_kernel_operands()
    with (
        override_arch("gfx950"),
        fake_aiter("v0.1.18 and later"),
        pytest.raises(ValueError, match="not contiguous in memory"),
    ):
        make_weight("w13")[::2].as_kernel_operands()


def test_the_intermediate_size_is_told_where_that_helps() -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        for columns, told in ((64, None), (128, 128), (192, None), (256, None), (320, None), (384, 384)):
            w2 = ShuffledMXFP4Tensor(coded(1, 256, columns // 2), moderate_scales(1, 256, columns // 32), gate_up=False)
            assert getattr(w2.as_kernel_operands().weight, "inter_real", None) == told


# --- detection


def test_versions_are_told_apart_and_reported() -> None:
    lines = []
    for version in VERSIONS:
        with override_arch("gfx950"), fake_aiter(version):
            lines.append(unversioned(str(explain(**make_layer()))))
    assert_expected_inline(
        "\n\n".join(lines),
        """\
architecture  gfx950
aiter         of unknown release, API #3470 (shuffle_kind) (57e74501a5)
triton        <version>
backend       aiter
layout        mxfp4_moe
shuffles      w13 to mxfp4_moe, w2 to mxfp4_moe
tags          is_shuffled=True, shuffle_kind='mxfp4_moe', gate_mode='separated'
kernels       HIP a4w4
activations   mxfp4, even

architecture  gfx950
aiter         of unknown release, API #3470 (is_guinterleave) (39e2ed7e8a)
triton        <version>
backend       aiter
layout        mxfp4_moe
shuffles      w13 to mxfp4_moe, w2 to mxfp4_moe
tags          is_shuffled=True, is_guinterleave=True, gate_mode='separated'
kernels       HIP a4w4
activations   mxfp4, even

architecture  gfx950
aiter         of unknown release, API #3470 (d6ede4548e, as merged)
triton        <version>
backend       aiter
layout        mxfp4_moe
shuffles      w13 to mxfp4_moe, w2 to mxfp4_moe
tags          is_shuffled=True, gate_mode='interleave'
kernels       HIP a4w4
activations   mxfp4, even

architecture  gfx950
aiter         of unknown release, API #3788 (46ecc4489d)
triton        <version>
backend       aiter
layout        mxfp4_moe
shuffles      w13 to mxfp4_moe, w2 to mxfp4_moe
tags          is_shuffled=True, shuffle_kind='mxfp4_moe', gate_mode='separated'
kernels       HIP a4w4
activations   mxfp4, even

architecture  gfx950
aiter         of unknown release, API #3827 (05567f6668)
triton        <version>
backend       aiter
layout        mxfp4_moe
shuffles      w13 to mxfp4_moe, w2 to mxfp4_moe
tags          is_shuffled=True, gate_mode='interleave'
kernels       HIP a4w4
activations   mxfp4, even

architecture  gfx950
aiter         of unknown release, API v0.1.18 and later (#3832, b2dd7703df, v0.1.16.post4, v0.1.17-longctx, v0.1.18)
triton        <version>
backend       aiter
layout        mxfp4_separated
shuffles      w13 to mxfp4_separated, w2 to mxfp4_separated
tags          is_shuffled=True, gate_mode='separated'
kernels       mxmoe a4w4
activations   mxfp4, round_up

architecture  gfx950
aiter         of unknown release, API #4542 (55f4bfeb5e)
triton        <version>
backend       aiter
layout        mxfp4_separated
shuffles      w13 to mxfp4_separated, w2 to mxfp4_separated
tags          is_shuffled=True, gate_mode='separated'
kernels       mxmoe a4w4
activations   mxfp4, round_up

architecture  gfx950
aiter         of unknown release, API v0.1.16, v0.1.17
triton        <version>
backend       aiter
layout        mxfp4_separated
shuffles      w13 to mxfp4_separated, w2 to mxfp4_separated
tags          is_shuffled=True, gate_mode='separated'
kernels       FlyDSL a4w4
activations   mxfp4, round_up

architecture  gfx950
aiter         of unknown release, API v0.1.15
triton        <version>
backend       aiter
layout        mxfp4_separated
shuffles      w13 to mxfp4_separated, w2 to mxfp4_separated
tags          is_shuffled=True, gate_mode='separated'
kernels       FlyDSL a4w4
activations   mxfp4, amax4

architecture  gfx950
aiter         of unknown release, API v0.1.14
triton        <version>
backend       aiter
layout        mxfp4_separated
shuffles      w13 to mxfp4_separated, w2 to mxfp4_separated
tags          is_shuffled=True, gate_mode='separated'
kernels       FlyDSL a4w4
activations   mxfp4, amax4""",
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Puts an `aiter` with some names into sys.modules."""

    def install(**names: Any) -> ModuleType:
        aiter, module = ModuleType("aiter"), ModuleType("aiter.fused_moe")
        aiter.fused_moe = module
        for name, value in names.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "aiter", aiter)
        monkeypatch.setitem(sys.modules, "aiter.fused_moe", module)
        return module

    return install


def test_an_aiter_of_no_known_version(installed: Callable[..., ModuleType]) -> None:
    installed(fused_moe=lambda a: a, get_2stage_cfgs=lambda token, model_dim: None)
    with override_arch("gfx950"):
        report = explain(**make_layer())
        with pytest.raises(ValueError, match="of no version known here"):
            fused_moe(**make_layer(), backend="aiter")
    assert_expected_inline(
        report.passed_over["aiter"],
        """aiter of unknown release is of no version known here: looked for fused_moe.get_2stage_cfgs with a parameter shuffle_kind, is_guinterleave or is_shuffled, and for mxfp4_moe_gemm1_a4w4, mxfp4_moe_run and _mxfp4_a4w4_stage1_fw; get_2stage_cfgs has ['model_dim', 'token']""",
    )


def test_an_aiter_from_before_the_port(installed: Callable[..., ModuleType]) -> None:
    module = installed(fused_moe=lambda hidden_states: None, get_2stage_cfgs=lambda token, is_shuffled, gate_mode: None)
    assert backend.detect().version.name == "v0.1.14"
    backend.forget(module)


def test_an_aiter_to_come_is_not_taken_for_an_old_one(installed: Callable[..., ModuleType]) -> None:
    installed(
        fused_moe=lambda hidden_states: None,
        get_2stage_cfgs=lambda token, is_shuffled, gate_mode, opus_weights_shuffled, config_file: None,
    )
    with pytest.raises(backend.Unusable, match="of no version known here"):
        backend.detect()


def test_an_aiter_that_another_thread_is_importing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Half of it looks like an older version, which reads another layout or rounds otherwise."""
    if importlib.util.find_spec("aiter"):
        pytest.skip("needs a machine without aiter")
    half, rest = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "half_and_rest", (half, rest), raising=False)
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text(
        "import sys\nfrom aiter import fused_moe\nhalf, rest = sys.half_and_rest\nhalf.set()\nrest.wait()\n"
        "mxfp4_moe_gemm1_a4w4 = print\n"
    )
    (tmp_path / "aiter" / "fused_moe.py").write_text(
        "def fused_moe(hidden_states, gate_mode): ...\n"
        "def get_2stage_cfgs(token, is_shuffled, gate_mode): ...\n"
        "_mxfp4_a4w4_stage1_fw = print\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "_IMPORT_FAILURE", [])
    importing = threading.Thread(target=importlib.import_module, args=("aiter",))
    later = threading.Timer(0.2, rest.set)
    try:
        importing.start()
        half.wait()
        later.start()
        assert backend.detect().version.name == "#3827"  # without what comes late it would be #3832
    finally:
        rest.set()
        importing.join()
        backend.forget(sys.modules["aiter.fused_moe"])
        for name in ("aiter", "aiter.fused_moe"):
            del sys.modules[name]


def test_no_aiter_and_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if importlib.util.find_spec("aiter"):
        pytest.skip("needs a machine without aiter")
    monkeypatch.setattr(backend, "_IMPORT_FAILURE", [])
    with override_arch("gfx950"):
        layer = make_layer()
        assert explain(**layer).passed_over["aiter"].startswith("aiter is not installed (its distribution is amd-aiter")
        assert torch.equal(fused_moe(**layer), fused_moe(**layer, backend="reference"))
        assert not layer["w13"].is_shuffled  # nobody here reads a shuffled layout
        with fake_aiter("v0.1.18 and later"):  # one that is loaded later is found
            assert explain(**layer).backend == "aiter"
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise RuntimeError('ROCm version file not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "_IMPORT_FAILURE", [])
    with override_arch("gfx950"):
        reason = explain(**make_layer()).passed_over["aiter"]
        assert reason == "aiter does not import (RuntimeError: ROCm version file not found)"


def test_other_architectures() -> None:
    with override_arch("gfx942"), fake_aiter("v0.1.18 and later"):
        report = explain(**make_layer())
        assert report.passed_over["aiter"] == "aiter's MXFP4 kernels run on gfx950, not on cpu, which is gfx942"
