# SPDX-License-Identifier: MIT
"""The layer, judged by dense float64 arithmetic and by the output of AMD's gfx950 machine code."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shuffled_tensor import LAYOUTS, ShuffledMXFP4Tensor, explain, fused_moe, mxfp4
from shuffled_tensor.moe.activations import ACTIVATIONS, ActivationName
from shuffled_tensor.mxfp4 import dequantize, quantize
from shuffled_tensor.tensor.storage import PackedStorage

from .support.bytes import coded, moderate_scales
from .support.judges import cosine, dense, dense_moe, relative_error
from .support.layer import make_layer, packed_arguments, weight_parts

GOLDEN = Path(__file__).parent / "data" / "fmoe_silu_gfx950.safetensors"
KINDS = ("mxfp4_moe", "mxfp4_separated")


def golden_weights(golden: dict[str, Tensor]) -> tuple[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor]:
    w13 = ShuffledMXFP4Tensor(golden["w13"], golden["w13_scale"], gate_up=True, row_order="contiguous")
    return w13, ShuffledMXFP4Tensor(golden["w2"], golden["w2_scale"], gate_up=False)


def golden_output(golden: dict[str, Tensor], w13: Tensor, w2: Tensor, **options: Any) -> Tensor:
    options = {"activation_dtype": "mxfp4", "scale_rule": "amax4", "hidden_scale": golden["x_scale"]} | options
    return fused_moe(golden["x"], w13, w2, golden["topk_weight"], golden["topk_ids"], **options)


@pytest.mark.parametrize("w13_kind", [None, *KINDS])
@pytest.mark.parametrize("w2_kind", [None, *KINDS])
def test_amds_machine_code(w13_kind: str | None, w2_kind: str | None) -> None:
    golden = load_file(GOLDEN)
    w13, w2 = golden_weights(golden)
    for weight, kind in ((w13, w13_kind), (w2, w2_kind)):
        if kind is not None:
            weight.shuffle_(kind)
    out = golden_output(golden, w13, w2)
    assert out.dtype is torch.bfloat16
    assert cosine(out, golden["out"]) >= 0.99999


def test_amds_machine_code_tells_the_definitions_apart() -> None:
    golden = load_file(GOLDEN)
    w13, w2 = golden_weights(golden)
    assert cosine(golden_output(golden, w13, w2, activation_dtype=None, scale_rule=None), golden["out"]) < 0.995
    assert cosine(golden_output(golden, w13, w2, scale_rule="even"), golden["out"]) < 0.999


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_weight_is_dequantised_a_few_rows_at_a_time(
    kind: str | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer()
    expected = dense_moe(*(dense(*weight_parts(value)) if value in ("w13", "w2") else layer[value] for value in layer))
    for weight in (layer["w13"], layer["w2"]):
        weight.shuffle_(kind or "none")
    monkeypatch.setattr(mxfp4, "_WEIGHTS_A_CORE", rows * layer["w13"].shape[2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    out = fused_moe(**layer, out_dtype=torch.float32, backend="reference")
    assert relative_error(out, expected) < 1e-6


def test_unshuffled_bytes_taken_for_shuffled_ones_are_garbage() -> None:
    """The bug that this library exists to prevent, made by hand: a tag over bytes that it does not describe."""
    golden = load_file(GOLDEN)
    for mistaken in ("w13", "w2"):
        w13, w2 = golden_weights({name: data.clone() for name, data in golden.items()})
        lying = {"w13": w13, "w2": w2}[mistaken]
        (w2 if lying is w13 else w13).shuffle_("mxfp4_separated")
        lying._storage.validity.layout = LAYOUTS["mxfp4_separated"]
        assert cosine(golden_output(golden, w13, w2), golden["out"]) < 0.5


KINDS_OR_NONE = st.sampled_from([None, *KINDS])


@st.composite
def activations(draw: Any) -> dict[str, Any]:
    """An activation, and some of the parameters that it takes."""
    name = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "swiglu", "situ"]))
    if name == "situ":
        return {"activation": name, "situ_beta": draw(st.sampled_from([0.5, 4.0])), "situ_linear_beta": 25.0}
    alpha = {"swiglu_alpha": draw(st.sampled_from([None, 0.5, 2.5]))} if name == "swiglu" else {}
    return {"activation": name, "swiglu_limit": draw(st.sampled_from([None, 0.5, 3.0])), **alpha}


def count_of_tokens(count: int) -> Tensor:
    return torch.tensor([count], dtype=torch.int32)


@st.composite
def layers(draw: Any) -> dict[str, Any]:
    """A random layer as plain bytes, tokens routed to it, and what is asked of it."""
    experts, intermediate, hidden = (
        draw(st.integers(1, 4)),
        32 * draw(st.integers(1, 10)),
        32 * draw(st.integers(1, 10)),
    )
    tokens, topk, ranks = draw(st.integers(0, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masked, biased = draw(st.booleans()), draw(st.booleans())
    known = experts * ranks if masked else experts
    mask = None
    if masked:
        mask = torch.zeros(known, dtype=torch.int32)
        mask[torch.randperm(known, generator=generator)[:experts]] = 1
    randn: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "w13": (
            coded(experts, 2 * intermediate, hidden // 2),
            moderate_scales(experts, 2 * intermediate, hidden // 32) - 6,
        ),
        "w2": (coded(experts, hidden, intermediate // 2, salt=5), moderate_scales(experts, hidden, intermediate // 32)),
        "hidden_states": randn(tokens, hidden),
        "topk_weight": torch.rand(tokens, topk, generator=generator),
        "topk_ids": torch.randint(
            known, (tokens, topk), generator=generator, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        ),
        "kinds": (draw(KINDS_OR_NONE), draw(KINDS_OR_NONE)),
        "options": {
            "w13_bias": randn(experts, 2 * intermediate) if biased else None,
            "w2_bias": randn(experts, hidden) if biased else None,
            "expert_mask": mask,
            "num_local_tokens": draw(st.none() | st.integers(0, tokens).map(count_of_tokens)),
            "doweight_stage1": draw(st.booleans()),
            **draw(activations()),
        },
    }


@settings(max_examples=100, deadline=None)
@given(layer=layers())
def test_dense_float64(layer: dict[str, Any]) -> None:
    expected = dense_moe(
        layer["hidden_states"],
        dense(*layer["w13"]),
        dense(*layer["w2"]),
        layer["topk_weight"],
        layer["topk_ids"],
        **layer["options"],
    )
    w13 = ShuffledMXFP4Tensor(*layer["w13"], gate_up=True, row_order="contiguous")
    w2 = ShuffledMXFP4Tensor(*layer["w2"], gate_up=False)
    for weight, kind in zip((w13, w2), layer["kinds"], strict=True):
        if kind is not None:
            weight.shuffle_(kind)
    out = fused_moe(layer["hidden_states"], w13, w2, layer["topk_weight"], layer["topk_ids"], **layer["options"])
    assert out.dtype is torch.float32
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= 1e-5 or not expected.any()


def small_layer() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(4, 64, generator=generator),
        "w13": ShuffledMXFP4Tensor(coded(3, 128, 32), moderate_scales(3, 128, 2), gate_up=True, row_order="contiguous"),
        "w2": ShuffledMXFP4Tensor(coded(3, 64, 32, salt=1), moderate_scales(3, 64, 2), gate_up=False),
        "topk_weight": torch.rand(4, 2, generator=generator),
        "topk_ids": torch.randint(3, (4, 2), generator=generator, dtype=torch.int32),
    }


@pytest.mark.parametrize("rule", ["floor", "even", "round_up", "amax4"])
def test_quantised_activations_by_definition(rule: str) -> None:
    """Both roundings, done here by hand around float64 GEMMs."""
    layer = small_layer()
    w13, w2 = (layer[name].dequantize(torch.float64) for name in ("w13", "w2"))
    x = dequantize(*quantize(layer["hidden_states"], scale_rule=rule), torch.float64)
    expected = torch.zeros(4, 64, dtype=torch.float64)
    for token in range(4):
        for slot in range(2):
            expert = int(layer["topk_ids"][token, slot])
            gate, up = (w13[expert] @ x[token]).chunk(2)
            middle = dequantize(*quantize(gate * torch.sigmoid(gate) * up, scale_rule=rule), torch.float64)
            expected[token] += layer["topk_weight"][token, slot] * (w2[expert] @ middle)
    out = fused_moe(**layer, activation_dtype="mxfp4", scale_rule=rule)
    assert relative_error(out, expected) <= 1e-5
    if rule == "even":
        assert torch.equal(fused_moe(**layer, activation_dtype="mxfp4"), out)
    else:
        assert not torch.equal(fused_moe(**layer, activation_dtype="mxfp4", scale_rule="even"), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_the_result(dtype: torch.dtype) -> None:
    layer = small_layer()
    layer["hidden_states"] = layer["hidden_states"].to(dtype)
    assert fused_moe(**layer).dtype is dtype
    assert fused_moe(**layer, out_dtype=torch.float16).dtype is torch.float16
    qdata, scale = quantize(layer["hidden_states"])
    packed = fused_moe(**(layer | {"hidden_states": qdata}), hidden_scale=scale, out_dtype=torch.float32)
    values = fused_moe(**(layer | {"hidden_states": dequantize(qdata, scale)}))
    assert torch.equal(packed, values)
    assert fused_moe(**(layer | {"hidden_states": qdata}), hidden_scale=scale).dtype is layer["w13"].dtype


def test_only_experts_with_tokens_are_dequantised() -> None:
    """An expert whose scales are NaN spoils nothing as long as nobody routes to it."""
    layer = small_layer()
    layer["w13"].scale[1] = 255
    layer["topk_ids"] = torch.tensor([[0, 2], [2, 0], [0, 0], [2, 2]])
    assert fused_moe(**layer).isfinite().all()
    layer["topk_ids"][2, 1] = 1
    assert fused_moe(**layer).isfinite().all(dim=1).tolist() == [True, True, False, True]


def test_experts_of_a_larger_weight() -> None:
    layer = small_layer()
    layer["w13"].shuffle_("mxfp4_moe")
    part = layer | {"w13": layer["w13"][1:], "w2": layer["w2"][1:], "topk_ids": layer["topk_ids"] % 2}
    whole = layer | {"topk_ids": layer["topk_ids"] % 2 + 1}
    assert torch.equal(fused_moe(**part), fused_moe(**whole))


GRID = [-20.0, -8.0, -7.0, -1.5, -0.25, 0.0, 0.25, 0.5, 1.0, 6.5, 7.0, 8.0, 20.0]
GATES, UPS = torch.cartesian_prod(*2 * [torch.tensor(GRID, dtype=torch.float64)]).T
"""Past every limit."""


def assert_is(name: ActivationName, formula: Callable[[float, float], float], **parameters: float | None) -> None:
    by_hand = torch.tensor([formula(*pair) for pair in zip(GATES.tolist(), UPS.tolist(), strict=True)])
    torch.testing.assert_close(ACTIVATIONS[name](GATES, UPS, **parameters), by_hand.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 0.5, 7.0])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "swiglu"])
def test_activations_by_formula(name: ActivationName, limit: float | None) -> None:
    """The gate is clamped from above alone, up from both sides."""
    most = limit or (7.0 if name == "swiglu" else math.inf)

    def expected(gate: float, up: float) -> float:
        gate, up = min(gate, most), max(-most, min(up, most))
        if name == "gelu":
            return gate * (1 + math.erf(gate / math.sqrt(2))) / 2 * up
        if name == "gelu_tanh":
            return gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up
        sharpness, shift = (1.702, 1.0) if name == "swiglu" else (1.0, 0.0)
        return gate / (1 + math.exp(-sharpness * gate)) * (up + shift)

    assert_is(name, expected, swiglu_limit=limit)
    assert_is(name, expected, swiglu_limit=limit, swiglu_alpha=None, situ_beta=0.1)  # as a call hands them over


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.702, 3.0])
def test_the_alpha_of_swiglu(alpha: float) -> None:
    def expected(gate: float, up: float) -> float:
        gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
        return gate / (1 + math.exp(-alpha * gate)) * (up + 1)

    assert_is("swiglu", expected, swiglu_alpha=alpha)


@pytest.mark.parametrize(("beta", "linear_beta"), [(4.0, 25.0), (25.0, 4.0), (0.5, 1.0)])
def test_situ_by_formula(beta: float, linear_beta: float) -> None:
    """Both are bounded, by their own, and the sigmoid is of the gate as it came."""

    def expected(gate: float, up: float) -> float:
        bounded = beta * math.tanh(gate / beta), linear_beta * math.tanh(up / linear_beta)
        return bounded[0] * bounded[1] / (1 + math.exp(-gate))

    assert_is("situ", expected, situ_beta=beta, situ_linear_beta=linear_beta)


def test_the_tanh_approximation_is_torchs_own() -> None:
    found = ACTIVATIONS["gelu_tanh"](GATES, UPS)
    assert torch.equal(found, torch.nn.GELU(approximate="tanh")(GATES) * UPS)
    assert not torch.allclose(found, ACTIVATIONS["gelu"](GATES, UPS), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_padding_among_the_tokens_is_not_looked_at(count: int, packed: bool, shape: tuple[int, ...]) -> None:
    """Ids of no expert, weights and hidden states of NaN."""
    layer = small_layer()
    dense_layer = layer | {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")}
    if packed:
        layer["hidden_states"], layer["hidden_scale"] = quantize(layer["hidden_states"])
        layer["out_dtype"] = torch.float32
        dense_layer["hidden_states"] = dense(layer["hidden_states"], layer["hidden_scale"])
    expected = dense_moe(**dense_layer)
    assert expected.any(dim=1).all()
    layer["topk_ids"][count:] = torch.tensor([-7, 10**6])
    layer["topk_weight"][count:] = math.nan
    if packed:
        layer["hidden_scale"][count:] = 255
    else:
        layer["hidden_states"][count:] = math.nan
    out = fused_moe(**layer, num_local_tokens=torch.full(shape, count, dtype=torch.int32))
    assert out.shape == expected.shape
    assert not count or relative_error(out[:count], expected[:count]) <= 1e-5
    assert not out[count:].any()


def test_an_expert_of_padding_alone_is_not_dequantised() -> None:
    layer = small_layer()
    layer["topk_ids"] = torch.tensor([[0, 2], [2, 0], [1, 1], [1, 1]])
    read = []
    canonical = PackedStorage.canonical

    def reading(storage: PackedStorage, experts: range) -> tuple[Tensor, Tensor]:
        read.append(experts)
        return canonical(storage, experts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedStorage, "canonical", reading)
        fused_moe(**layer, num_local_tokens=torch.tensor([2], dtype=torch.int32))
    assert {expert for experts in read for expert in experts} == {0, 2}


def test_no_gradient() -> None:
    layer = small_layer()
    layer["hidden_states"].requires_grad_()
    with pytest.raises(RuntimeError, match="fused_moe has no gradient"):
        fused_moe(**layer).sum().backward()


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_torchs_own_checks_of_the_operators(kind: str | None) -> None:
    layer = small_layer()
    if kind is not None:
        layer["w13"].shuffle_(kind)
        layer["w2"].shuffle_(kind)
    torch.library.opcheck(torch.ops.shuffled_tensor.fused_moe.default, tuple(layer.values()))
    packed = packed_arguments(layer) | {"out_dtype": "float32", "backend": "reference"}
    torch.library.opcheck(torch.ops.shuffled_tensor.fused_moe_packed.default, (), packed)


def test_bad_input() -> None:
    layer = small_layer()
    x, w13, w2, ids = layer["hidden_states"], layer["w13"], layer["w2"], layer["topk_ids"]
    packed_x, x_scale = quantize(x)
    other = ShuffledMXFP4Tensor(coded(2, 64, 32), moderate_scales(2, 64, 2), gate_up=False)
    wide = ShuffledMXFP4Tensor(coded(3, 64, 64), moderate_scales(3, 64, 4), gate_up=False)
    changes: dict[str, dict[str, Any]] = {
        "plain w13": {"w13": w13.dequantize()},
        "both plain": {"w13": w13.dequantize(), "w2": w2.dequantize()},
        "plain w2": {"w2": w2.qdata},
        "one expert": {"w13": w13[0]},
        "exchanged": {"w13": w2, "w2": w13},
        "experts": {"w2": other},
        "intermediate": {"w2": wide},
        "hidden size": {"hidden_states": x[:, :32]},
        "hidden rank": {"hidden_states": x[0]},
        "hidden dtype": {"hidden_states": x.double()},
        "packed without scale": {"hidden_states": x.to(torch.uint8)},
        "float with scale": {"hidden_states": x[:, :32], "hidden_scale": x_scale},
        "scale shape": {"hidden_states": packed_x, "hidden_scale": x_scale[:2]},
        "float ids": {"topk_ids": ids.float()},
        "ids rank": {"topk_ids": ids[:, 0]},
        "ids tokens": {"topk_ids": ids[:3]},
        "ids too large": {"topk_ids": ids + 1},
        "ids negative": {"topk_ids": ids - 1},
        "weight shape": {"topk_weight": layer["topk_weight"][:, :1]},
        "weight dtype": {"topk_weight": ids},
        "bias shape": {"w13_bias": torch.zeros(3, 64)},
        "bias dtype": {"w2_bias": torch.zeros(3, 64, dtype=torch.int32)},
        "mask dtype": {"expert_mask": torch.ones(3, dtype=torch.bool)},
        "mask length": {"expert_mask": torch.ones(2, dtype=torch.int32)},
        "mask sum": {"expert_mask": torch.ones(4, dtype=torch.int32)},
        "activation": {"activation": "relu"},
        "activation dtype": {"activation_dtype": "fp8"},
        "scale rule": {"activation_dtype": "mxfp4", "scale_rule": "ceil"},
        "scale rule alone": {"scale_rule": "even"},
        "limit": {"swiglu_limit": 0.0},
        "alpha": {"activation": "swiglu", "swiglu_alpha": -1.702},
        "alpha of silu": {"swiglu_alpha": 1.702},
        "limit of situ": {"activation": "situ", "situ_beta": 4.0, "situ_linear_beta": 25.0, "swiglu_limit": 7.0},
        "betas of swiglu": {"activation": "swiglu", "situ_beta": 4.0, "situ_linear_beta": 25.0},
        "situ alone": {"activation": "situ"},
        "situ without a bound of up": {"activation": "situ", "situ_beta": 4.0},
        "bound of up that is none": {"activation": "situ", "situ_beta": 4, "situ_linear_beta": math.inf},
        "count of tokens, dtype": {"num_local_tokens": torch.tensor([2])},
        "count of tokens, shape": {"num_local_tokens": torch.tensor([2, 2], dtype=torch.int32)},
        "count of tokens, rank": {"num_local_tokens": torch.tensor([[2]], dtype=torch.int32)},
        "more tokens than rows": {"num_local_tokens": torch.tensor([5], dtype=torch.int32)},
        "fewer tokens than none": {"num_local_tokens": torch.tensor(-1, dtype=torch.int32)},
        "count of tokens, device": {"num_local_tokens": torch.tensor(2, dtype=torch.int32, device="meta")},
        "out dtype": {"out_dtype": torch.int8},
        "backend": {"backend": "cuda"},
        "device": {"topk_weight": layer["topk_weight"].to("meta")},
    }
    lines = []
    for name, change in changes.items():
        with pytest.raises((TypeError, ValueError)) as error:
            fused_moe(**(layer | change))
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
plain w13: TypeError: w13 must be a ShuffledMXFP4Tensor, found Tensor of torch.bfloat16; wrap packed bytes, or use from_hp
both plain: TypeError: w13 must be a ShuffledMXFP4Tensor, found Tensor of torch.bfloat16; wrap packed bytes, or use from_hp
plain w2: TypeError: w2 must be a ShuffledMXFP4Tensor, found Tensor of torch.uint8; wrap packed bytes, or use from_hp
one expert: ValueError: w13 must be [experts, N, K], found shape [128, 64]
exchanged: ValueError: w13 must be made with gate_up=True and w2 with gate_up=False, found False and True
experts: ValueError: for w13 of shape [3, 128, 64], w2 must be [experts, K, I] = [3, 64, 64], found shape [2, 64, 64]
intermediate: ValueError: for w13 of shape [3, 128, 64], w2 must be [experts, K, I] = [3, 64, 64], found shape [3, 64, 128]
hidden size: ValueError: hidden_states must be [tokens, 64] for this w13, found [4, 32]
hidden rank: ValueError: hidden_states must be [tokens, 64] for this w13, found [64]
hidden dtype: TypeError: hidden_states must be torch.bfloat16 or torch.float16 or torch.float32 (or packed uint8 with hidden_scale), found torch.float64
packed without scale: TypeError: hidden_states must be torch.bfloat16 or torch.float16 or torch.float32 (or packed uint8 with hidden_scale), found torch.uint8
float with scale: TypeError: hidden_states with hidden_scale must be torch.uint8 or torch.int8 or torch.float4_e2m1fn_x2, found torch.float32
scale shape: ValueError: hidden_scale must be [4, 2], found shape [2, 2]
float ids: TypeError: topk_ids must be torch.int32 or torch.int64, found torch.float32
ids rank: ValueError: topk_ids must be [4, topk], found shape [4]
ids tokens: ValueError: topk_ids must be [4, topk], found shape [3, 2]
ids too large: ValueError: topk_ids must be in 0..2, found 1..3
ids negative: ValueError: topk_ids must be in 0..2, found -1..1
weight shape: ValueError: topk_weight must be [4, 2], found shape [4, 1]
weight dtype: TypeError: topk_weight must be floating point, found torch.int32
bias shape: ValueError: w13_bias must be [3, 128], found shape [3, 64]
bias dtype: TypeError: w2_bias must be torch.bfloat16 or torch.float16 or torch.float32, found torch.int32
mask dtype: TypeError: expert_mask must be torch.int32, found torch.bool
mask length: ValueError: expert_mask must be [global experts], 1 where local, found shape [2] for 3 local experts
mask sum: ValueError: expert_mask marks 4 local experts, but the weights hold 3
activation: ValueError: unknown activation 'relu'; known activations: 'silu', 'gelu', 'gelu_tanh', 'swiglu', 'situ'
activation dtype: ValueError: activation_dtype must be None (activations as they come) or 'mxfp4', found 'fp8'
scale rule: ValueError: unknown scale_rule 'ceil'; known rules: 'floor', 'even', 'round_up', 'amax4'
scale rule alone: ValueError: scale_rule='even' quantises activations, so it needs activation_dtype='mxfp4'
limit: ValueError: swiglu_limit must be positive and finite, or infinite, or None for the activation's own, found 0.0
alpha: ValueError: swiglu_alpha must be positive and finite, or None for the activation's own, found -1.702
alpha of silu: ValueError: activation='silu' takes no swiglu_alpha; it takes swiglu_limit, and swiglu_alpha is for 'swiglu'
limit of situ: ValueError: activation='situ' takes no swiglu_limit; it takes situ_beta and situ_linear_beta, and swiglu_limit is for 'silu', 'gelu', 'gelu_tanh', 'swiglu'
betas of swiglu: ValueError: activation='swiglu' takes no situ_beta; it takes swiglu_limit and swiglu_alpha, and situ_beta is for 'situ'
situ alone: ValueError: activation='situ' needs situ_beta, which has no default
situ without a bound of up: ValueError: activation='situ' needs situ_linear_beta, which has no default
bound of up that is none: ValueError: situ_linear_beta must be positive and finite, found inf
count of tokens, dtype: TypeError: num_local_tokens must be torch.int32, found torch.int64
count of tokens, shape: ValueError: num_local_tokens must be one number, [1] or of no dimension, found shape [2]
count of tokens, rank: ValueError: num_local_tokens must be one number, [1] or of no dimension, found shape [1, 1]
more tokens than rows: ValueError: num_local_tokens must be in 0..4, the rows of hidden_states, found 5
fewer tokens than none: ValueError: num_local_tokens must be in 0..4, the rows of hidden_states, found -1
count of tokens, device: ValueError: all tensors must be on the device of w13, cpu; found num_local_tokens on meta
out dtype: TypeError: out_dtype must be torch.bfloat16 or torch.float16 or torch.float32, found torch.int8
backend: ValueError: unknown backend 'cuda'; known backends: 'aiter', 'triton', 'reference'
device: ValueError: all tensors must be on the device of w13, cpu; found topk_weight on meta""",
    )


# --- what torch does around a call


def as_packed(layer: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The operator on plain tensors, of the hidden states."""
    packed = packed_arguments(layer) | {"out_dtype": "float32", "backend": "reference"}
    operator = torch.ops.shuffled_tensor.fused_moe_packed.default
    return lambda x: operator(**(packed | {"hidden_states": x}))


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(lambda row: f(x + row).sum()), (x,), (x,)),
    "vmap of jvp": lambda f, x: torch.vmap(lambda row: torch.func.jvp(f, (x,), (x + row,))[1])(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "functional jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
    "functional jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> object:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


def dual_without_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> object:
    with torch.no_grad():
        return dual(f, x)


FORWARD_MODE |= {"forward_ad": dual, "forward_ad under no_grad": dual_without_grad}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch, which forward mode calls
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transform", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_no_derivative_is_silently_zero(transform: Callable[..., object], packed: bool) -> None:
    layer = small_layer()
    call = as_packed(layer) if packed else lambda x: fused_moe(**(layer | {"hidden_states": x}))
    with pytest.raises((RuntimeError, NotImplementedError), match="fused_moe has no (gradient|vmap rule)"):
        transform(call, layer["hidden_states"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_no_tangent_of_other_arguments() -> None:
    layer = small_layer()
    for name in ("topk_weight", "w2_bias"):
        value = layer.get(name, torch.ones(3, 64))
        with pytest.raises(RuntimeError, match="fused_moe has no gradient, in forward mode neither"):
            torch.func.jvp(lambda value, name=name: fused_moe(**(layer | {name: value})), (value,), (value,))
    with torch.autograd.forward_ad.dual_level():  # what has no tangent is computed
        assert torch.equal(fused_moe(**layer), fused_moe(**layer))


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_that_a_derivative_does_not_go_through(packed: bool) -> None:
    layer = small_layer()
    call = as_packed(layer) if packed else lambda x: fused_moe(**(layer | {"hidden_states": x}))
    found = torch.func.grad(lambda scale: (scale * call(layer["hidden_states"])).sum())(torch.tensor(2.0))
    assert torch.equal(found, call(layer["hidden_states"]).sum())


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **kwargs or {})


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_a_mode_sees_the_operator_that_takes_our_tensors(mode: Callable[[], Any]) -> None:
    layer = small_layer()
    expected = fused_moe(**layer)
    with mode() as seen:
        out = fused_moe(**layer)
    assert "shuffled_tensor.fused_moe.default" in seen.operators
    assert torch.equal(out, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_is_checked_after_one_that_was_right(packed: bool) -> None:
    """Nothing that was found right once is taken for right where a shape or a dtype is another one."""
    layer = small_layer() | {"w13_bias": torch.zeros(3, 128), "expert_mask": torch.ones(3, dtype=torch.int32)}
    layer |= {"num_local_tokens": torch.tensor([4], dtype=torch.int32), "out_dtype": torch.float32}
    function: Callable[..., Tensor] = fused_moe
    if packed:
        layer, function = packed_arguments(layer), torch.ops.shuffled_tensor.fused_moe_packed
        layer["out_dtype"] = "float32"
    function(**layer)
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "of another dtype": lambda value: value.to(torch.complex64),
        "of another shape": lambda value: value.repeat(2, *[1] * (value.dim() - 1))[:-1],
        "on another device": lambda value: value.to("meta"),
    }
    for name in ("hidden_states", "topk_weight", "topk_ids", "w13_bias", "expert_mask", "num_local_tokens"):
        for what, made in wrong.items():
            if (name, what) in (("expert_mask", "of another shape"), ("num_local_tokens", "of another shape")):
                continue  # a longer mask, and one number again, are right
            with pytest.raises((TypeError, ValueError), match="hidden_states|topk|w13_bias|expert_mask|num_local"):
                function(**layer | {name: made(layer[name])})
    function(**layer)


def test_an_explanation_is_not_written_to() -> None:
    found = explain(**small_layer())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.backend = "another"  # type: ignore[misc]


def test_help_says_what_the_arguments_are() -> None:
    text = str(fused_moe.__doc__)
    assert "{arguments}" not in text
    assert all(name in text for name in inspect.signature(fused_moe).parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    layer = small_layer()
    expected = fused_moe(**layer)
    values, weights = layer["hidden_states"], layer["w13"].dequantize(torch.float32)
    packed = quantize(values)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w13, self.w2 = (torch.nn.Parameter(layer[name], requires_grad=False) for name in ("w13", "w2"))

        def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
            return fused_moe(x, self.w13, self.w2, weight, ids)

    rest = values, layer["topk_weight"], layer["topk_ids"]
    program = torch.export.export(Module(), rest, strict=False)
    decomposed = program.run_decompositions().module()
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        for function in (Module(), program.module(), decomposed, compiled):
            out = function(*rest)
            assert out.dtype is torch.float32
            assert torch.equal(out, expected)
        assert torch.equal(as_packed(layer)(values), expected)
        assert all(torch.equal(a, b) for a, b in zip(quantize(values), packed, strict=True))
        assert torch.equal(dequantize(*packed), dense(*packed).float())
        assert torch.equal(layer["w13"].dequantize(torch.float32), weights)
        assert torch.is_autocast_enabled("cpu")
        assert torch.nn.functional.linear(values, layer["w13"][0]).dtype is dtype  # torch's own meaning


# --- arguments that are of no such type


def test_arguments_of_other_types() -> None:
    layer = small_layer()
    w13 = layer["w13"]
    changes: dict[str, dict[str, Any]] = {
        "no w13": {"w13": None},
        "list": {"w2": [layer["w2"]]},
        "parameter": {"w13": torch.nn.Parameter(w13.dequantize())},
        "part": {"w13": w13.qdata_view},
        "two tensors": {"w13": TwoTensor(w13.dequantize(), w13.dequantize())},
        "hidden states": {"hidden_states": layer["hidden_states"].tolist()},
        "weight as hidden states": {"hidden_states": w13},
        "ids": {"topk_ids": None},
        "bias": {"w2_bias": 0.0},
        "mask": {"expert_mask": [1, 1, 1]},
        "count of tokens": {"num_local_tokens": 2},
        "doweight_stage1": {"doweight_stage1": None},
        "doweight_stage1 as 1": {"doweight_stage1": 1},
        "limit": {"swiglu_limit": "7"},
        "limit as True": {"swiglu_limit": True},
        "no activation": {"activation": None},
        "activation": {"activation": ["silu"]},
        "activation dtype": {"activation_dtype": torch.bfloat16},
        "scale rule": {"scale_rule": 1},
        "backend": {"backend": ["reference"]},
        "backend by number": {"backend": 1},
        "backends": {"backend": "aiter, aiter"},
        "backends that exist": {"backend": "aiter, reference"},
        "no backend": {"backend": ""},
        "out dtype": {"out_dtype": "bfloat16"},
    }
    lines = []
    for name, change in changes.items():
        with pytest.raises((TypeError, ValueError)) as error:
            fused_moe(**(layer | change))
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
        with pytest.raises(error.type):
            explain(**(layer | change))
    assert_expected_inline(
        "\n".join(lines),
        """\
no w13: TypeError: w13 must be a ShuffledMXFP4Tensor, found NoneType
list: TypeError: w2 must be a ShuffledMXFP4Tensor, found list
parameter: TypeError: w13 must be a ShuffledMXFP4Tensor, found Parameter of torch.bfloat16; wrap packed bytes, or use from_hp
part: TypeError: w13 must be a ShuffledMXFP4Tensor, found PartView
two tensors: TypeError: w13 is a TwoTensor of shape [3, 128, 64], whose parts are not seen; pass what it wraps
hidden states: TypeError: hidden_states must be a plain tensor, found list
weight as hidden states: TypeError: hidden_states must be a plain tensor, found ShuffledMXFP4Tensor
ids: TypeError: topk_ids must be a plain tensor, found NoneType
bias: TypeError: w2_bias must be a plain tensor, found float
mask: TypeError: expert_mask must be a plain tensor, found list
count of tokens: TypeError: num_local_tokens must be a plain tensor, found int
doweight_stage1: TypeError: doweight_stage1 must be True or False, found None
doweight_stage1 as 1: TypeError: doweight_stage1 must be True or False, found 1
limit: TypeError: swiglu_limit must be a number or None, found '7'
limit as True: TypeError: swiglu_limit must be a number or None, found True
no activation: ValueError: unknown activation None; known activations: 'silu', 'gelu', 'gelu_tanh', 'swiglu', 'situ'
activation: ValueError: unknown activation ['silu']; known activations: 'silu', 'gelu', 'gelu_tanh', 'swiglu', 'situ'
activation dtype: ValueError: unknown activation_dtype torch.bfloat16; known activation_dtypes: 'mxfp4'
scale rule: ValueError: unknown scale_rule 1; known scale_rules: 'floor', 'even', 'round_up', 'amax4'
backend: ValueError: unknown backend ['reference']; known backends: 'aiter', 'triton', 'reference'
backend by number: ValueError: unknown backend 1; known backends: 'aiter', 'triton', 'reference'
backends: ValueError: unknown backend 'aiter, aiter'; known backends: 'aiter', 'triton', 'reference'
backends that exist: ValueError: unknown backend 'aiter, reference'; known backends: 'aiter', 'triton', 'reference'
no backend: ValueError: unknown backend ''; known backends: 'aiter', 'triton', 'reference'
out dtype: TypeError: out_dtype must be torch.bfloat16 or torch.float16 or torch.float32, found 'bfloat16'""",
    )


def test_a_dtensor_is_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    layer = small_layer()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("w13", "w2", "hidden_states", "topk_ids"):
            sharded = DTensor.from_local(layer[name], mesh, [Replicate()])
            with pytest.raises(TypeError, match=rf"{name} is a DTensor of .*; pass its \.to_local\(\)"):
                fused_moe(**(layer | {name: sharded}))
            assert torch.equal(fused_moe(**(layer | {name: sharded.to_local()})), fused_moe(**layer))
    finally:
        torch.distributed.destroy_process_group()


def test_packed_hidden_states_in_every_dtype() -> None:
    layer = small_layer()
    qdata, scale = quantize(layer["hidden_states"])
    expected = fused_moe(**(layer | {"hidden_states": dense(qdata, scale).float()}), out_dtype=torch.bfloat16)
    for codes in (qdata, qdata.view(torch.int8), qdata.view(torch.float4_e2m1fn_x2)):
        for scales in (scale, scale.view(torch.float8_e8m0fnu)):
            out = fused_moe(**(layer | {"hidden_states": codes}), hidden_scale=scales)
            assert torch.equal(out, expected)
        with pytest.raises(TypeError, match="hidden_scale must be .* found torch.float32"):
            fused_moe(**(layer | {"hidden_states": codes}), hidden_scale=scale.float())


def test_bad_input_of_compiled_code() -> None:
    """The operator on plain tensors, as an exported program calls it: it cannot know that bytes belong to sizes."""
    layer = small_layer()  # 3 experts, 4 tokens, 64 hidden and intermediate, padded to 256
    good = packed_arguments(layer) | {"out_dtype": "float32", "backend": "reference"}
    operator = torch.ops.shuffled_tensor.fused_moe_packed.default
    expected = dense_moe(**layer | {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")})
    assert relative_error(operator(**good), expected) <= 1e-5

    mask = torch.tensor([1, 1, 1], dtype=torch.int32)
    changes: dict[str, dict[str, Any]] = {
        "rows of w13": {"w13_rows": 192},
        "columns of w13": {"w13_columns": 96},
        "rows of w2": {"w2_rows": 96},
        "columns of w2": {"w2_columns": 32},
        "codes of fewer experts": {"w2_qdata": good["w2_qdata"][1:]},
        "codes without pads": {"w13_qdata": good["w13_qdata"][:, :128]},
        "codes without some pads": {"w13_qdata": good["w13_qdata"][:, :320]},
        "scales without pads": {"w2_scale": good["w2_scale"][..., :2]},
        "layout": {"w2_layout": "gguu"},
        "hidden rank": {"hidden_states": good["hidden_states"][0]},
        "three ranks of ids": {"topk_ids": good["topk_ids"][..., None]},
        "scale dtype": {"hidden_states": quantize(layer["hidden_states"])[0], "hidden_scale": torch.zeros(4, 2)},
        "bias of w2, shape": {"w2_bias": torch.zeros(3, 128)},
        "bias of w13, dtype": {"w13_bias": torch.zeros(3, 128, dtype=torch.float64)},
        "mask rank": {"expert_mask": mask.view(1, 3)},
        "negative limit": {"swiglu_limit": -1.0},
        "limit that is no number": {"swiglu_limit": math.nan},
        "rule": {"scale_rule": "even"},
        "out dtype": {"out_dtype": "float64"},
        "device of the scales": {"w2_scale": good["w2_scale"].to("meta")},
        "device of a bias": {"w2_bias": torch.zeros(3, 64, device="meta")},
    }
    lines = []
    for name, change in changes.items():
        with pytest.raises((TypeError, ValueError)) as error:
            operator(**(good | change))
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
rows of w13: ValueError: w13 must have 128 rows and 64 columns, found (192, 64)
columns of w13: ValueError: w13 must have 128 rows and 64 columns, found (128, 96)
rows of w2: ValueError: w2 must have 64 rows and 64 columns, found (96, 64)
columns of w2: ValueError: w13 must have 64 rows and 64 columns, found (128, 64)
codes of fewer experts: ValueError: w2_qdata must be [3, 256, 128], found shape [2, 256, 128]
codes without pads: ValueError: w13_scale must be [3, 128, 8], found shape [3, 512, 8]
codes without some pads: ValueError: w13_qdata must be [3, 512, 128], or as a smaller align= pads it, found shape [3, 320, 128]
scales without pads: ValueError: w2_scale must be [3, 256, 8], found shape [3, 256, 2]
layout: ValueError: unknown shuffle_kind 'gguu'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
hidden rank: ValueError: hidden_states must be [tokens, K], found shape [64]
three ranks of ids: ValueError: topk_ids must be [4, topk], found shape [4, 2, 1]
scale dtype: TypeError: hidden_scale must be torch.uint8 or torch.float8_e8m0fnu, found torch.float32
bias of w2, shape: ValueError: w2_bias must be [3, 64], found shape [3, 128]
bias of w13, dtype: TypeError: w13_bias must be torch.bfloat16 or torch.float16 or torch.float32, found torch.float64
mask rank: ValueError: expert_mask must be [global experts], 1 where local, found shape [1, 3] for 3 local experts
negative limit: ValueError: swiglu_limit must be positive and finite, or infinite, or None for the activation's own, found -1.0
limit that is no number: ValueError: swiglu_limit must be positive and finite, or infinite, or None for the activation's own, found nan
rule: ValueError: scale_rule='even' quantises activations, so it needs activation_dtype='mxfp4'
out dtype: TypeError: out_dtype must be torch.bfloat16 or torch.float16 or torch.float32, found torch.float64
device of the scales: ValueError: all tensors must be on the device of w13, cpu; found w2 on meta
device of a bias: ValueError: all tensors must be on the device of w13, cpu; found w2_bias on meta""",
    )
    for accepted in ({"expert_mask": mask}, {"swiglu_limit": 1e9}, {"w2_bias": torch.zeros(3, 64).half()}):
        assert torch.equal(operator(**(good | accepted)), operator(**good))
