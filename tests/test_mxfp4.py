# SPDX-License-Identifier: MIT
"""The number format, judged by its definition in float64 and by torch's own e8m0 type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shuffled_tensor import SCALE_RULES, ShuffledMXFP4Tensor, dequantize, mxfp4, quantize

from .support.bytes import coded, moderate_scales
from .support.judges import MAGNITUDES, dense


def nearest_code(value: float) -> int:
    """The code nearest to a value, ties to the even code, saturating: by looking at all of them."""
    magnitude = min(abs(value), 6.0)
    code = min(range(8), key=lambda code: (abs(MAGNITUDES[code] - magnitude), code % 2))
    return code | (8 if math.copysign(1.0, value) < 0 else 0)


def binade(value: float) -> int:
    return math.frexp(value)[1] - 1


def mantissa(value: float) -> float:
    return value / 2.0 ** binade(value)


# the exponent of the scale that each rule wants for an amax, in exact arithmetic
RULES: dict[str, Callable[[float], int]] = {
    "floor": lambda amax: binade(amax) - 2,
    "even": lambda amax: binade(amax) - 2 + (mantissa(amax) >= 1.75),
    "round_up": lambda amax: math.ceil(math.log2(float(torch.tensor(amax) * (1 / 6)))),
    "amax4": lambda amax: binade(amax / 4) + (mantissa(amax) >= 1.5),
}


def codes_of(qdata: Tensor) -> Tensor:
    return torch.stack([qdata & 15, qdata >> 4], dim=-1).flatten(-2)


def test_every_code_and_every_scale_dequantise() -> None:
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1)
    qdata = torch.arange(16, dtype=torch.uint8)
    qdata = (qdata | (15 - qdata) << 4).expand(256, 16).contiguous()
    expected = dense(qdata, scale)
    torch_scale = scale.view(torch.float8_e8m0fnu).float()
    assert torch.equal(
        torch_scale.nan_to_num(-1).double(), torch.where(scale == 255, -1.0, 2.0 ** (scale.double() - 127))
    )

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = dequantize(qdata, scale, dtype)
        assert values.dtype is dtype
        torch.testing.assert_close(values, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(values[127].signbit(), expected[127].signbit())  # -0 stays -0
    assert dequantize(qdata, scale)[255].isnan().all()


def test_low_nibble_is_the_even_column() -> None:
    qdata = torch.zeros(1, 16, dtype=torch.uint8)
    qdata[0, 1] = 0x2 | 0x7 << 4
    values = dequantize(qdata, torch.full((1, 1), 127, dtype=torch.uint8))
    assert values[0, 2:4].tolist() == [1.0, 6.0]


@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(max_examples=200, deadline=None)
@given(
    exponent=st.integers(-100, 100),
    amax=st.floats(1, 2, exclude_max=True, width=32),
    rest=st.lists(st.floats(-1, 1, width=32), min_size=31, max_size=31),
)
def test_quantise_by_definition(rule: str, exponent: int, amax: float, rest: list[float]) -> None:
    block = torch.tensor([amax, *rest], dtype=torch.float32) * 2.0**exponent
    top = float(block.abs().max())
    qdata, scale = quantize(block, scale_rule=rule)
    expected = RULES[rule](top)
    assert int(scale) - 127 == expected
    assert codes_of(qdata).tolist() == [nearest_code(float(value) / 2.0**expected) for value in block]


@pytest.mark.parametrize(
    ("rule", "amax", "byte"),
    [
        ("floor", 4.0, 127), ("floor", 8 - 2**-21, 127), ("floor", 8.0, 128),
        ("even", 7 - 2**-21, 127), ("even", 7.0, 128), ("even", 4.0, 127),
        ("round_up", 6.0, 127), ("round_up", 6 + 2**-21, 128), ("round_up", 3.0, 126), ("round_up", 3 + 2**-22, 127),
        ("amax4", 4.0, 127), ("amax4", 6 - 2**-21, 127), ("amax4", 6.0, 128), ("amax4", 8.0, 128),
    ],
)  # fmt: skip
def test_scale_rules_at_their_thresholds(rule: str, amax: float, byte: int) -> None:
    """And at the float32 just before or after."""
    _, scale = quantize(torch.full((32,), amax), scale_rule=rule)
    assert scale.tolist() == [byte]


def test_midpoints_go_to_even_codes_and_the_top_saturates() -> None:
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    above = [torch.nextafter(torch.tensor(m), torch.tensor(9.0)).item() for m in midpoints]
    below = [torch.nextafter(torch.tensor(m), torch.tensor(0.0)).item() for m in midpoints]
    block = torch.zeros(32)
    block[:21] = torch.tensor(midpoints + above + below)
    block[21:24] = torch.tensor([-0.25, -5.0, 7.9])  # 7.9 makes the floor scale 1.0, and saturates
    qdata, scale = quantize(block, scale_rule="floor")
    assert scale.tolist() == [127]
    values = dequantize(qdata, scale)
    assert values[:7].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert values[7:14].tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values[14:21].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert values[21:24].tolist() == [-0.0, -4.0, 6.0]
    assert values[21].signbit()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_zero_blocks_keep_their_signs(rule: str) -> None:
    block = torch.tensor([0.0, -0.0] * 16)
    qdata, scale = quantize(block, scale_rule=rule)
    assert scale.tolist() == [0]
    assert codes_of(qdata).tolist() == [0, 8] * 16
    assert torch.equal(dequantize(qdata, scale).signbit(), block.signbit())


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_the_smallest_amax_of_all(rule: str) -> None:
    """float32 divides 2**-149 by 6, and 2**-148, to nothing; from 3 * 2**-149 on something is left."""
    for units in range(1, 9):
        block = torch.zeros(32, dtype=torch.float64)
        block[5] = units * 2.0**-149
        qdata, scale = quantize(block, scale_rule=rule)
        something = float(block[5].float() * (1 / 6)) > 0
        assert int(scale) == (1 if rule == "round_up" and something else 0)
        assert not qdata.any()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_an_amax_too_small_for_its_scale(rule: str) -> None:
    """Scales stop at 2**-127: below 2**-125 (2**-126 / 6 for round_up) codes shrink instead, down to rounding to zero."""
    block = torch.zeros(32)
    block[:4] = torch.tensor([2.0**-127, -(2.0**-128), 2.0**-130, 2.0**-149], dtype=torch.float64).float()
    qdata, scale = quantize(block, scale_rule=rule)
    unit = 2.0 ** (int(scale) - 127)
    assert int(scale) == (1 if rule == "round_up" else 0)
    assert codes_of(qdata)[:4].tolist() == [nearest_code(float(value) / unit) for value in block[:4].double()]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_becomes_nan(rule: str, poison: float) -> None:
    values = torch.ones(2, 64)
    values[1, 40] = poison
    qdata, scale = quantize(values, scale_rule=rule)
    assert (scale == 255).tolist() == [[False, False], [False, True]]
    assert dequantize(qdata, scale).isnan().sum() == 32


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_the_largest_floats_stay_finite(rule: str) -> None:
    qdata, scale = quantize(torch.full((32,), torch.finfo(torch.float32).max), scale_rule=rule)
    assert dequantize(qdata, scale, torch.float64).isfinite().all()


def test_values_on_the_grid_round_trip() -> None:
    """Quantising what was dequantised changes no value: all codes, with a 6 in each block so that scales stay too."""
    qdata, scale = coded(4, 64), 60 + coded(4, 4, salt=3) % 128
    qdata[:, ::16] |= 0x07  # an amax code of 6, or -6
    again, scale_again = quantize(dequantize(qdata, scale), scale_rule="floor")
    assert torch.equal(scale_again, scale)
    assert torch.equal(again, qdata)


def test_heavy_tails_and_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(8, 256, generator=generator) * torch.randn(8, 256, generator=generator).exp() ** 2).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(quantize(values), quantize(values.double()), strict=True))
    weight = ShuffledMXFP4Tensor.from_hp(values, gate_up=False, scale_rule="round_up")
    assert torch.equal(weight.dequantize(torch.float64), dense(*quantize(values, scale_rule="round_up")))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_every_bfloat16_number(rule: str, spread: bool) -> None:
    """Beside numbers like it; and ``spread``, beside others of the next four binades."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = (every.view(128, 32, 16).transpose(1, 2) if spread else every.view(128, 16, 32)).flatten(0, 1)
    qdata, scale = quantize(values, scale_rule=rule)
    finite = values.isfinite().all(-1)
    assert torch.equal(scale.flatten() == 255, ~finite)
    blocks, scale = values[finite].double(), scale[finite]
    lowest = 1 if rule == "round_up" else 0
    exponents = [RULES[rule](float(block.abs().max())) + 127 if block.any() else 0 for block in blocks]
    expected = [max(exponent, lowest if block.any() else 0) for exponent, block in zip(exponents, blocks, strict=True)]
    assert scale.flatten().tolist() == expected
    scaled = blocks / torch.exp2(scale.double() - 127)
    distance = (scaled.abs().clamp(max=6).unsqueeze(-1) - torch.tensor(MAGNITUDES, dtype=torch.float64)).abs()
    codes = (distance + 1e-12 * (torch.arange(8) % 2)).argmin(-1) + 8 * scaled.signbit()
    assert torch.equal(codes_of(qdata[finite]).long(), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_quantised_a_few_blocks_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order its numbers lie in memory, each block gets what is its own."""
    qdata, scale = coded(3, 37, 256), 60 + coded(3, 37, 16, salt=3) % 128
    qdata[..., ::16] |= 0x07  # an amax code of 6, or -6
    values = dense(qdata, scale).to(dtype)
    for at_a_time in (1, 7, 1 << 20):
        monkeypatch.setattr(mxfp4, "_BLOCKS_A_CORE", at_a_time)
        for strided in (values, values.mT.contiguous().mT, values.transpose(0, 1).contiguous().transpose(0, 1)):
            found = quantize(strided, scale_rule="floor")
            assert all(torch.equal(part, expected) for part, expected in zip(found, (qdata, scale), strict=True))
    for shape in ((0, 64), (2, 0, 32), (3, 0)):
        found = quantize(torch.zeros(shape, dtype=dtype))
        assert [list(part.shape) for part in found] == [[*shape[:-1], shape[-1] // size] for size in (2, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_whoever_dequantises_first_leaves_nothing_behind(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of all bytes are kept: real ones, whatever the mode of torch they were first asked for in."""
    qdata, scale = coded(4, 32), moderate_scales(4, 2)

    def fake() -> None:
        with FakeTensorMode() as mode:
            dequantize(mode.from_tensor(qdata), mode.from_tensor(scale), dtype)

    def compiled() -> None:
        torch.compile(dequantize, backend="aot_eager", fullgraph=True)(qdata, scale, dtype)

    def other_modes() -> None:
        with torch.inference_mode(), torch.device("meta"):
            dequantize(qdata, scale, dtype)

    for first in (fake, compiled, other_modes):
        monkeypatch.setattr(mxfp4, "_PAIRS", {})
        first()
        again = torch.compile(dequantize, backend="aot_eager", fullgraph=True)(qdata, scale, dtype)
        for values in (dequantize(qdata, scale, dtype), again):
            assert type(values) is Tensor
            assert not values.is_inference()
            assert torch.equal(values, dense(qdata, scale).to(dtype))
    torch.compiler.reset()


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="floating-point values, found torch.uint8"):
        quantize(coded(32))
    with pytest.raises(ValueError, match=r"multiple of 32, found shape \[2, 33\]"):
        quantize(torch.zeros(2, 33))
    with pytest.raises(ValueError, match=r"multiple of 32, found shape \[\]"):
        quantize(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match="unknown scale_rule 'ceil'; known rules: 'floor', 'even', 'round_up', 'amax4'"
    ):
        quantize(torch.zeros(32), scale_rule="ceil")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bytes_are_read_as_bits_in_every_dtype(dtype: torch.dtype) -> None:
    qdata, scale = coded(256, 64), torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 4).contiguous()
    expected = dense(qdata, scale).to(dtype)
    for codes in (qdata, qdata.view(torch.int8), qdata.view(torch.float4_e2m1fn_x2)):
        for scales in (scale, scale.view(torch.int8), scale.view(torch.float8_e8m0fnu)):
            torch.testing.assert_close(dequantize(codes, scales, dtype), expected, rtol=0, atol=0, equal_nan=True)
    assert dequantize(qdata[:0], scale[:0]).shape == (0, 128)
    assert dequantize(qdata[0], scale[0], dtype).shape == (128,)


@pytest.fixture
def flush() -> Iterator[Callable[[bool], bool]]:
    """torch.set_flush_denormal, which is off again afterwards."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_flushing_subnormal_numbers_changes_nothing(
    rule: str, dtype: torch.dtype, flush: Callable[[bool], bool]
) -> None:
    flush(False)
    steps = torch.linspace(-1, 1, 32, dtype=torch.float64) * 2.0 ** torch.arange(-147, -115).unsqueeze(1)
    blocks = torch.cat([steps, torch.zeros(1, 32), -torch.zeros(1, 32), torch.full((1, 32), 2.0**127)]).to(dtype)
    blocks[-1, ::2] = 0  # zeros beside the largest scale
    units = [RULES[rule](float(block.abs().max())) if block.any() else -127 for block in blocks.float()]
    lowest = -126 if rule == "round_up" else -127
    units = [max(unit, lowest if block.any() else -127) for unit, block in zip(units, blocks.float(), strict=True)]
    expected = [
        [nearest_code(float(value) / 2.0**unit) for value in block]
        for unit, block in zip(units, blocks.float().double(), strict=True)
    ]
    for flushed in (False, True):
        flush(flushed)
        qdata, scale = quantize(blocks, scale_rule=rule)
        flush(False)
        assert codes_of(qdata).tolist() == expected
        assert (scale.flatten().int() - 127).tolist() == units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_value_while_subnormal_numbers_are_flushed(dtype: torch.dtype, flush: Callable[[bool], bool]) -> None:
    scale = torch.arange(255, dtype=torch.uint8).view(255, 1)
    qdata = (torch.arange(16) | (15 - torch.arange(16)) << 4).byte().expand(255, 16)
    values = dequantize(qdata, scale, dtype)
    weight = ShuffledMXFP4Tensor(qdata.contiguous(), scale, gate_up=False).dequantize(dtype)
    flush(False)
    expected = bits(dense(qdata, scale).to(dtype))
    assert torch.equal(bits(values), expected)
    assert torch.equal(bits(weight), expected)


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_every_byte_under_every_scale_in_pieces(
    rows: int, flushed: bool, flush: Callable[[bool], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of moderate scales, of odd ones and of both; the last one is shorter, and the bytes have padding."""
    flush(False)
    monkeypatch.setattr(mxfp4, "_WEIGHTS_A_CORE", rows * 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    qdata = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    scale = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 16)
    mixed = scale.flip(0).clone()
    mixed[:, 3] = 120
    for scales in (scale, mixed):
        padded = [torch.cat([data, data], dim=1)[:, : data.shape[1]] for data in (qdata, scales)]
        flush(flushed)
        values = torch.cat([piece.clone() for piece in mxfp4.dequantize_pieces(*padded)])
        flush(False)
        expected = dense(qdata, scales).float()
        number = ~expected.isnan()
        assert torch.equal(values.isnan(), ~number)
        assert torch.equal(bits(values)[number], bits(expected)[number])  # -0 stays -0


def test_bad_bytes() -> None:
    qdata, scale = coded(2, 32), coded(2, 2)
    cases: dict[str, tuple[Any, ...]] = {
        "one number": (qdata[0, 0], scale[0, 0]),
        "float scales": (qdata, scale.float()),
        "int32 scales": (qdata, scale.int()),
        "fp4 scales": (qdata, scale.view(torch.float4_e2m1fn_x2)),
        "fp8 codes": (qdata.view(torch.float8_e4m3fn), scale),
        "float codes": (qdata.float(), scale),
        "list": ([1], scale),
        "no scale": (qdata, None),
        "scale shape": (qdata, scale[:, :1]),
        "scale rows": (qdata, scale[:1]),
        "scale rank": (qdata, scale.flatten()),
        "columns": (qdata[:, :20], scale),
        "exchanged": (scale, qdata),
        "device": (qdata, scale.to("meta")),
        "dtype": (qdata, scale, torch.int8),
        "dtype by name": (qdata, scale, "bfloat16"),
    }
    lines = []
    for name, arguments in cases.items():
        with pytest.raises((TypeError, ValueError)) as error:
            dequantize(*arguments)
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
    for values in (scale.view(torch.float8_e8m0fnu), qdata.view(torch.float4_e2m1fn_x2), [1.0]):
        with pytest.raises(TypeError) as error:
            quantize(values)
        lines.append(str(error.value))
    with pytest.raises(ValueError, match=r"unknown scale_rule \['even'\]; known rules"):
        quantize(torch.zeros(32), scale_rule=["even"])
    assert_expected_inline(
        "\n".join(lines),
        """\
one number: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [] and []
float scales: TypeError: scale must be torch.uint8 or torch.float8_e8m0fnu or torch.int8, found torch.float32
int32 scales: TypeError: scale must be torch.uint8 or torch.float8_e8m0fnu or torch.int8, found torch.int32
fp4 scales: TypeError: scale must be torch.uint8 or torch.float8_e8m0fnu or torch.int8, found torch.float4_e2m1fn_x2
fp8 codes: TypeError: qdata must be torch.uint8 or torch.int8 or torch.float4_e2m1fn_x2, found torch.float8_e4m3fn
float codes: TypeError: qdata must be torch.uint8 or torch.int8 or torch.float4_e2m1fn_x2, found torch.float32
list: TypeError: qdata must be a tensor, found list
no scale: TypeError: scale must be a tensor, found NoneType
scale shape: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [2, 32] and [2, 1]
scale rows: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [2, 32] and [1, 2]
scale rank: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [2, 32] and [4]
columns: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [2, 20] and [2, 2]
exchanged: ValueError: for K columns, a multiple of 32, qdata must be [..., K/2] and scale [..., K/32], found shapes [2, 2] and [2, 32]
device: ValueError: qdata and scale must be on one device, found cpu and meta
dtype: TypeError: dequantize gives torch.bfloat16, torch.float16, torch.float32, torch.float64, found dtype=torch.int8
dtype by name: TypeError: dequantize gives torch.bfloat16, torch.float16, torch.float32, torch.float64, found dtype='bfloat16'
quantize takes floating-point values, found torch.float8_e8m0fnu
quantize takes floating-point values, found torch.float4_e2m1fn_x2
values must be a tensor, found list""",
    )
