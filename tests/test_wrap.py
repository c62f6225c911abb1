# SPDX-License-Identifier: MIT
"""A module's own weights become ours, in place: as engines hold them, packed, and from high precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, quantize, quantize_experts_, wrap_experts_

from .support.bytes import coded, moderate_scales
from .support.judges import dense, dense_moe, relative_error

EXPERTS, HIDDEN, INTERMEDIATE = 4, 288, 160


def loader(parameter: Tensor, loaded: Tensor) -> None: ...


def parameter(data: Tensor, **attributes: Any) -> nn.Parameter:
    made = nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Engine(nn.Module):
    """A layer as vLLM and SGLang make it."""

    def __init__(self, salt: int = 0, code_dtype: torch.dtype = torch.uint8, scale_dtype: torch.dtype = torch.uint8):
        super().__init__()
        shapes = {"w13": (2 * INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}
        self.parts = {}
        for name, (rows, columns) in shapes.items():
            codes = coded(EXPERTS, rows, columns // 2, salt=salt)
            scales = moderate_scales(EXPERTS, rows, columns // 32, salt=salt + 1)
            self.parts[name] = codes.clone(), scales.clone()
            self.register_parameter(f"{name}_weight", parameter(codes.view(code_dtype), weight_loader=loader))
            self.register_parameter(f"{name}_weight_scale", parameter(scales.view(scale_dtype), weight_loader=loader))


@pytest.mark.parametrize(
    "dtypes", [(torch.uint8, torch.uint8), (torch.int8, torch.float8_e8m0fnu), (torch.float4_e2m1fn_x2, torch.uint8)]
)
@pytest.mark.parametrize("row_order", ["contiguous", "interleaved"])
def test_packed_weights_of_every_submodule(row_order: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    model = nn.ModuleDict({"dense": nn.Linear(8, 8), "a": Engine(0, *dtypes), "b": Engine(50, *dtypes)})
    assert wrap_experts_(model, row_order=row_order, dtype=torch.float16) is model
    for name in ("a", "b"):
        layer = model[name]
        for which in ("w13", "w2"):
            weight = getattr(layer, f"{which}_weight")
            expected = dense(*layer.parts[which])
            if which == "w13" and row_order == "interleaved":
                expected = torch.cat([expected[:, 0::2], expected[:, 1::2]], 1)
            assert isinstance(weight, ShuffledMXFP4Tensor)
            assert isinstance(weight, nn.Parameter)
            assert weight.dtype is torch.float16
            assert weight.weight_loader is loader
            assert torch.equal(weight.dequantize(torch.float64), expected)
            assert getattr(layer, f"{which}_weight_scale") is None
    assert [name for name, _ in model.named_parameters()] == [
        *("dense.weight", "dense.bias", "a.w13_weight", "a.w2_weight", "b.w13_weight", "b.w2_weight")
    ]


def test_bytes_are_taken_over_where_nothing_needs_padding() -> None:
    module = nn.Module()
    codes, scales = coded(2, 512, 128), moderate_scales(2, 512, 8)
    module.register_buffer("gate_up", codes)
    module.register_buffer("gate_up_s", scales)
    module.register_buffer("down", coded(2, 256, 128))
    module.register_buffer("down_s", moderate_scales(2, 256, 8))
    names = {"w13": "gate_up", "w13_scale": "gate_up_s", "w2": "down", "w2_scale": "down_s"}
    wrap_experts_(module, row_order="contiguous", shuffle_kind="mxfp4_moe", **names)
    assert isinstance(module.gate_up, nn.Parameter)
    assert module.gate_up.qdata.data_ptr() == codes.data_ptr()
    assert module.gate_up.scale.data_ptr() == scales.data_ptr()
    assert module.gate_up.shuffle_kind == "mxfp4_moe"
    assert list(module.state_dict()) == ["gate_up", "down"]


def test_a_weight_that_two_modules_share_stays_shared() -> None:
    first, second = Engine(), Engine()
    for name, tensor in first.named_parameters():
        second.register_parameter(name, tensor)
    model = nn.ModuleList([first, second])
    wrap_experts_(model, row_order="contiguous")
    assert first.w13_weight is second.w13_weight
    first.w13_weight.shuffle_("mxfp4_moe")
    assert torch.equal(second.w13_weight.dequantize(torch.float64), dense(*first.parts["w13"]))


def test_a_parameter_wrapped_again_is_the_same_weight() -> None:
    """What tells weights apart is their memory: two storages over the same bytes would shuffle them twice."""
    first, second = Engine(), Engine()
    for name, tensor in first.named_parameters():
        second.register_parameter(name, parameter(tensor.data))
    model = nn.ModuleList([first, second])
    wrap_experts_(model, row_order="contiguous")
    assert first.w13_weight is second.w13_weight
    meta = nn.ModuleList([Engine(), Engine()]).to("meta")
    wrap_experts_(meta, row_order="contiguous")
    assert meta[0].w13_weight is not meta[1].w13_weight


def test_codes_of_two_weights_with_other_scales() -> None:
    first, second = Engine(), Engine()
    second.w13_weight = first.w13_weight
    with pytest.raises(ValueError, match=r"1\.w13_weight: its codes are also another weight's"):
        wrap_experts_(nn.ModuleList([first, second]), row_order="contiguous")
    assert type(first.w13_weight) is nn.Parameter


class OwnParameter(nn.Parameter):
    """As vLLM's: the loader is a property."""

    def __new__(cls, data: Tensor, weight_loader: Callable[..., None]) -> OwnParameter:
        made = super().__new__(cls, data, requires_grad=False)
        made._weight_loader = weight_loader
        return made

    @property
    def weight_loader(self) -> Callable[..., None]:
        return self._weight_loader


def test_the_loader_of_an_engines_own_parameter_class_stays() -> None:
    module = Engine()
    module.w13_weight = OwnParameter(module.w13_weight.data, loader)
    wrap_experts_(module, row_order="contiguous")
    assert isinstance(module.w13_weight, ShuffledMXFP4Tensor)
    assert module.w13_weight.weight_loader is loader


def broken(change: Callable[[Engine], object]) -> tuple[nn.ModuleDict, Engine]:
    model = nn.ModuleDict({"fine": Engine(), "broken": Engine()})
    change(model["broken"])
    return model, model["broken"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            lambda e: setattr(e.w13_weight_scale, "is_shuffled", True),
            ValueError,
            "broken.w13_weight: it is tagged is_shuffled, so its bytes are not row-major",
            id="scales shuffled already",
        ),
        pytest.param(
            lambda e: [
                setattr(e, f"w2_{part}", parameter(getattr(e, f"w2_{part}")[:3].clone()))
                for part in ("weight", "weight_scale")
            ],
            ValueError,
            r"broken.w2_weight: for w13_weight of shape \[4, 320, 288\], .* it must be .* \[4, 288, 160\], found \[3, 288, 160\]",
            id="another number of experts",
        ),
        pytest.param(
            lambda e: setattr(e.w2_weight, "is_shuffled", True),
            ValueError,
            "broken.w2_weight: it is tagged is_shuffled, so its bytes are not row-major; wrap weights before",
            id="shuffled already",
        ),
        pytest.param(
            lambda e: setattr(e, "w2_weight", parameter(torch.zeros(4, 288, 160))),
            TypeError,
            "broken.w2_weight: qdata must be torch.uint8 or .*, found torch.float32; quantise float weights",
            id="not packed",
        ),
        pytest.param(
            lambda e: setattr(e, "w13_weight_scale", parameter(e.w13_weight_scale[:, 1:].clone())),
            ValueError,
            r"broken.w13_weight: scale must be \[4, 320, 9\], .* found shape \[4, 319, 9\]",
            id="scales of another shape",
        ),
    ],
)
def test_nothing_changes_where_a_weight_does_not_fit(
    change: Callable[[Engine], object], error: type[Exception], message: str
) -> None:
    model, _ = broken(change)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(error, match=message):
        wrap_experts_(model, row_order="contiguous")
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_what_wrapping_must_be_told() -> None:
    model = Engine()
    with pytest.raises(ValueError, match="w13_weight: gate_up=True needs row_order"):
        wrap_experts_(model, row_order="any")
    with pytest.raises(ValueError, match="no submodule of Engine holds gate_up_proj, w2_weight, w13_weight_scale"):
        wrap_experts_(model, row_order="contiguous", w13="gate_up_proj")
    with pytest.raises(ValueError, match="unknown shuffle_kind 'gguu'"):
        wrap_experts_(model, row_order="contiguous", shuffle_kind="gguu")
    with pytest.raises(TypeError, match=r"the logical dtype must be .* found torch\.int8"):
        wrap_experts_(model, row_order="contiguous", dtype=torch.int8)
    assert type(model.w13_weight) is nn.Parameter
    wrap_experts_(model, row_order="contiguous")
    with pytest.raises(ValueError, match="no submodule of Engine holds"):
        wrap_experts_(model, row_order="contiguous")
    with pytest.raises(ValueError, match="w13_weight: expert weights to quantise are plain and .* found Shuffled"):
        quantize_experts_(model, row_order="contiguous")


class Transformers(nn.Module):
    """A layer as transformers makes it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(dtype)
        self.gate_up_proj = nn.Parameter(gate_up)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator).to(dtype))


@pytest.mark.parametrize("rule", ["even", "round_up"])
def test_quantised_in_place(rule: str) -> None:
    module = Transformers()
    module.gate_up_proj.weight_loader = loader
    plain = module.gate_up_proj.detach().clone(), module.down_proj.detach().clone()
    names = {"w13": "gate_up_proj", "w2": "down_proj"}
    quantize_experts_(module, row_order="contiguous", scale_rule=rule, **names)
    assert module.gate_up_proj.weight_loader is loader
    values = [dense(*quantize(weight, scale_rule=rule)) for weight in plain]
    for weight, expected in zip((module.gate_up_proj, module.down_proj), values, strict=True):
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight.dequantize(torch.float64), expected)
    tokens, generator = 5, torch.Generator().manual_seed(4)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator)
    routing = torch.rand(tokens, 2, generator=generator), torch.randint(EXPERTS, (tokens, 2), generator=generator)
    out = fused_moe(hidden_states, module.gate_up_proj, module.down_proj, *routing)
    assert relative_error(out, dense_moe(hidden_states, *values, *routing)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "options", "error", "message"),
    [
        (torch.float8_e4m3fn, {}, TypeError, r"gate_up_proj: the logical dtype must be .* found torch\.float8_e4m3fn"),
        (torch.bfloat16, {"scale_rule": "odd"}, ValueError, "gate_up_proj: unknown scale_rule 'odd'"),
        (torch.bfloat16, {"row_order": "guug"}, ValueError, "gate_up_proj: gate_up=True needs row_order"),
    ],
)
def test_nothing_is_quantised_where_a_weight_does_not_fit(
    dtype: torch.dtype, options: dict[str, str], error: type[Exception], message: str
) -> None:
    module = Transformers(dtype)
    with pytest.raises(error, match=message):
        quantize_experts_(module, **{"row_order": "contiguous", "w13": "gate_up_proj", "w2": "down_proj", **options})
    assert type(module.gate_up_proj) is nn.Parameter
    assert type(module.down_proj) is nn.Parameter


def test_transposed_weights_are_not_taken_for_others() -> None:
    module = Transformers()
    for name in ("gate_up_proj", "down_proj"):  # as gpt-oss has them
        setattr(module, name, nn.Parameter(getattr(module, name).transpose(1, 2)))
    with pytest.raises(ValueError, match=r"down_proj: for gate_up_proj of shape .* held transposed"):
        quantize_experts_(module, row_order="interleaved", w13="gate_up_proj", w2="down_proj")


def test_quantising_a_large_weight_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch is bounded: no more than 64 MiB of float32, or one expert, at a time."""
    from shuffled_tensor import mxfp4

    sizes = []
    plain = mxfp4.quantize

    def counting(values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(values))
        return plain(values, **options)

    weight = torch.randn(6, 2048, 4096, generator=torch.Generator().manual_seed(5)).bfloat16()  # 32 MiB an expert
    monkeypatch.setattr(mxfp4, "quantize", counting)
    packed = ShuffledMXFP4Tensor.from_hp(weight, gate_up=False)
    assert sizes == [2, 2, 2]
    assert torch.equal(packed[5].dequantize(torch.float64), dense(*plain(weight[5])))
