# SPDX-License-Identifier: MIT
"""A dense layer: judged by float64 products with activations that are rounded here by plain formulas, and by F.linear."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shuffled_tensor import SCALE_RULES, ShuffledMXFP4Tensor, fused_moe, linear, override_arch, refit
from shuffled_tensor.backends.aiter import gemm
from shuffled_tensor.linear import _warn_once
from shuffled_tensor.testing import VERSIONS, fake_aiter

from .support.aiter import EXPECTED
from .support.bytes import LAYOUTS, coded, moderate_scales
from .support.judges import MAGNITUDES, dense, relative_error
from .support.layer import ShuffleCount, make_layer

# rows, columns: K=512, where a second shuffle would go unseen, without pads; padded in every way; whole tiles of rows alone
SHAPES = [(512, 512), (96, 160), (544, 256)]

# by version: how AMD's quantiser for dense layers rounds, csrc/kernels/quant_kernels.cu
DENSE_RULE = dict.fromkeys(VERSIONS, "round_up") | {"v0.1.15": "amax4", "v0.1.14": "amax4"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    _warn_once.cache_clear()
    yield
    torch._dynamo.reset()


def parts(rows: int, columns: int, experts: int = 1) -> tuple[Tensor, Tensor]:
    return coded(experts, rows, columns // 2), moderate_scales(experts, rows, columns // 32)


def make(rows: int, columns: int, gate_up: bool, kind: str | None = None, **options: Any) -> ShuffledMXFP4Tensor:
    order = "contiguous" if gate_up else None
    codes, scales = (part[0].clone() for part in parts(rows, columns))
    return ShuffledMXFP4Tensor(codes, scales, gate_up=gate_up, row_order=order, shuffle_kind=kind, **options)


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Three of four blocks' largest values lie where the rules part, at and between 1.5 and 1.75 times a power of two."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))
    blocks = x.view(-1, 32)
    for first, largest in enumerate((1.5, 1.625, -7.0)):
        blocks[first::4] = blocks[first::4].clamp(-1.5, 1.5)
        blocks[first::4, 5] = largest
    return x.to(dtype)


def rounded(x: Tensor, rule: str) -> Tensor:
    """Values of x, float64, rounded to MXFP4."""
    blocks = x.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(amax)
    power, mantissa = exponent - 1, 2 * mantissa  # amax = mantissa * 2**power, mantissa from 1 to 2
    scale = {
        "floor": power - 2,
        "even": power - 2 + (mantissa >= 1.75),
        "amax4": power - 2 + (mantissa >= 1.5),
        "round_up": torch.ceil(torch.log2(amax / 6)),
    }[rule]
    factor = torch.pow(2.0, scale.double())
    even_first = torch.tensor([MAGNITUDES[code] for code in (0, 2, 4, 6, 1, 3, 5, 7)], dtype=torch.float64)
    nearest = ((blocks / factor).abs().unsqueeze(-1) - even_first).abs().argmin(-1)
    return (even_first[nearest] * blocks.sign() * factor).flatten(-2)


def judge(x: Tensor, rule: str, of: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
    out = rounded(x, rule) @ dense(*of)[0].T
    return out if bias is None else out + bias.double()


class Kernel:
    """How often the kernel was called, and what with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import aiter

        self.calls: list[dict[str, Any]] = []
        kernel = aiter.gemm_a4w4

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            self.calls.append(kwargs)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(aiter, "gemm_a4w4", counting)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """On a gfx950 with a fake aiter."""
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        yield Kernel(monkeypatch)


# --- in plain torch


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch(rule: Any, layout: str, gate_up: bool, shape: tuple[int, int]) -> None:
    w, bias = make(*shape, gate_up).shuffle_(layout), torch.linspace(-9, 9, shape[0])
    x = activations(3, shape[1], dtype=torch.float32)
    out = linear(x, w, bias, activation_dtype="mxfp4", scale_rule=rule)
    assert relative_error(out, judge(x, rule, parts(*shape), bias)) < 1e-6
    assert w.shuffle_kind == (None if layout == "none" else layout)


def test_the_rule_is_even_where_there_are_no_kernels() -> None:
    x, w = activations(5, 512), make(512, 512, False)
    out = linear(x, w, activation_dtype="mxfp4")
    errors = {rule: relative_error(out, judge(x, rule, parts(512, 512))) for rule in SCALE_RULES}
    assert errors.pop("even") < 3e-3
    assert min(errors.values()) > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_any_leading_dimensions_and_dtype(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = activations(*leading, 160, dtype=dtype), make(96, 160, True)
    out = linear(x, w, torch.ones(96, dtype=torch.float16), activation_dtype="mxfp4")
    assert (out.shape, out.dtype) == ((*leading, 96), dtype)
    assert out.is_contiguous()
    if x.numel():
        assert relative_error(out, judge(x, "even", parts(96, 160)) + 1) < 3e-3


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 96).bfloat16()])
def test_activations_as_they_come_are_f_linear(bias: Tensor | None, kernel: Kernel) -> None:
    """Also on a gfx950, where nothing is shuffled, and with a gradient."""
    x, w = activations(3, 160).requires_grad_(), make(96, 160, True)
    expected = F.linear(x, w.dequantize(), bias)
    out = linear(x, w, bias)
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert torch.equal(linear(x, w[32:64]), F.linear(x, w[32:64]))
    assert (w.is_shuffled, kernel.calls) == (False, [])


def test_what_is_mxfp4_already_is_not_rounded() -> None:
    x, w = dense(*parts(4, 512))[0].bfloat16(), make(96, 512, False)
    out = linear(x, w, activation_dtype="mxfp4", scale_rule="floor")
    torch.testing.assert_close(out, F.linear(x.float(), w.dequantize(torch.float32)).bfloat16())


# --- by aiter's kernels


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_version(version: str, gate_up: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rule, bias = DENSE_RULE[version], torch.linspace(-9, 9, shape[0])
    with override_arch("gfx950"), fake_aiter(version):
        kernel, w = Kernel(monkeypatch), make(*shape, gate_up)
        for tokens in (1, 300):
            x = activations(tokens, shape[1])
            for given in (None, rule):
                out = linear(x, w, bias, activation_dtype="mxfp4", scale_rule=given)
                assert (out.dtype, out.is_contiguous()) == (torch.bfloat16, True)
                errors = {one: relative_error(out, judge(x, one, parts(*shape), bias)) for one in SCALE_RULES}
                assert errors.pop(rule) < 4e-3
                assert min(errors.values()) > 0.01
        assert w.shuffle_kind == EXPECTED[version].layout
        assert kernel.calls == 4 * [{"dtype": torch.bfloat16, "bpreshuffle": True}]


@pytest.mark.parametrize("version", ["#3788", "v0.1.18 and later"])
@pytest.mark.parametrize("kind", ["mxfp4_moe", "mxfp4_separated"])
@pytest.mark.parametrize("gate_up", [False, True])
def test_a_fixed_layout_is_read_as_it_is(
    version: str, kind: str, gate_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever one the kernels for experts read."""
    x, w = activations(7, 160), make(96, 160, gate_up, kind)
    with override_arch("gfx950"), fake_aiter(version):
        kernel = Kernel(monkeypatch)
        out = linear(x, w, activation_dtype="mxfp4")
        assert len(kernel.calls) == 1
    assert relative_error(out, judge(x, "round_up", parts(96, 160))) < 4e-3
    assert (w.shuffle_kind, w.is_shuffled) == (kind, True)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3)])
def test_any_leading_dimensions(leading: tuple[int, ...], kernel: Kernel) -> None:
    x, w = activations(*leading, 160), make(96, 160, True)
    out = linear(x, w, torch.ones(96), activation_dtype="mxfp4")
    assert (out.shape, out.dtype, out.is_contiguous()) == ((*leading, 96), torch.bfloat16, True)
    assert len(kernel.calls) == (x.numel() > 0)
    if x.numel():
        assert relative_error(out, judge(x, "round_up", parts(96, 160)) + 1) < 4e-3


def test_activations_in_columns(kernel: Kernel) -> None:
    x = activations(512, 512)
    out = linear(x.T.contiguous().T[:, ::2], make(96, 256, False), activation_dtype="mxfp4")
    assert relative_error(out, judge(x[:, ::2], "round_up", parts(96, 256))) < 4e-3


def test_a_layer_and_its_experts_share_one_layout(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffles, layer = ShuffleCount(monkeypatch), make_layer()
    for _ in range(2):
        for expert in (0, 2):
            w = layer["w13"][expert]
            out = linear(layer["hidden_states"], w, activation_dtype="mxfp4")
            expected = rounded(layer["hidden_states"], "round_up") @ w.dequantize(torch.float64).T
            assert relative_error(out, expected) < 4e-3
        fused_moe(**layer)
    assert shuffles.count == 2  # of w13 and of w2
    assert len(kernel.calls) == 4


@pytest.mark.parametrize(
    ("x", "w", "rule", "reason"),
    [
        ({"dtype": torch.float16}, {}, None, "x is torch.float16, not bfloat16"),
        ({"dtype": torch.float32}, {}, None, "x is torch.float32, not bfloat16"),
        ({}, {}, "even", "it quantises by 'round_up', not scale_rule='even'"),
        (
            {},
            {"kind": "none"},
            None,
            "its kernels read 'mxfp4_separated' and 'mxfp4_moe', and w lies as 'none'",
        ),
        (
            {},
            {"kind": "made_up"},
            None,
            "its kernels read 'mxfp4_separated' and 'mxfp4_moe', and w lies as 'made_up'",
        ),
        (
            {},
            {"align": (64, 256)},
            None,
            "w is padded to 64 rows of each half and 256 columns, not to multiples of 256; make it with align=256",
        ),
        (
            {},
            {"align": (256, 32)},
            None,
            "w is padded to 256 rows of each half and 160 columns, not to multiples of 256; make it with align=256",
        ),
    ],
)
def test_what_aiter_does_not_take(
    x: dict[str, Any], w: dict[str, Any], rule: Any, reason: str, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    values, weight = activations(4, 160, **x), make(96, 160, True, **w)
    with caplog.at_level(logging.WARNING, "shuffled_tensor"):
        for _ in range(2):
            out = linear(values, weight, activation_dtype="mxfp4", scale_rule=rule)
    assert relative_error(out, judge(values, "even", parts(96, 160))) < 3e-3
    assert kernel.calls == []
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"linear goes to plain torch, not to aiter: {reason}"]


def test_elsewhere_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with fake_aiter("v0.1.18 and later"), caplog.at_level(logging.WARNING, "shuffled_tensor"):
        linear(activations(4, 160), make(96, 160, True), activation_dtype="mxfp4")
    assert caplog.records == []


def test_without_aiter_on_its_gpu(caplog: pytest.LogCaptureFixture) -> None:
    x = activations(4, 160)
    with override_arch("gfx950"), caplog.at_level(logging.WARNING, "shuffled_tensor"):
        out = linear(x, make(96, 160, True), activation_dtype="mxfp4")
    assert relative_error(out, judge(x, "even", parts(96, 160))) < 3e-3
    assert "not to aiter: aiter is not installed" in caplog.text


def test_autocast_changes_nothing(kernel: Kernel) -> None:
    x, w = activations(4, 160, dtype=torch.float32), make(96, 160, True)
    expected = linear(x, w, activation_dtype="mxfp4")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, w, activation_dtype="mxfp4"), expected)
        bytes_as_they_lie = w.qdata, w.scale, w.shuffle_kind, *w.shape, True
        assert torch.equal(torch.ops.shuffled_tensor.linear_mxfp4_packed(x, *bytes_as_they_lie), expected)


# --- the fake kernels, which must be wrong where the real ones are


def in_tiles(shape: tuple[int, int], kind: str, gate_up: bool = True) -> tuple[Tensor, Tensor]:
    w = make(*shape, gate_up).shuffle_(kind)
    return w.qdata.view(torch.float4_e2m1fn_x2), w.scale.view(torch.float8_e8m0fnu)


def test_the_fake_kernel_reads_bytes(kernel: Kernel) -> None:
    import aiter

    shape, x, bias = (512, 512), activations(40, 512), torch.full((1, 512), 100.0)
    quantize = aiter.get_hip_quant(aiter.QuantType.per_1x32)
    codes, scale = quantize(x, quant_dtype=torch.float4_e2m1fn_x2, shuffle=True)
    _, in_rows = quantize(x, quant_dtype=torch.float4_e2m1fn_x2, shuffle=False)
    right, scales = in_tiles(shape, "mxfp4_separated")
    expected = judge(x, "round_up", parts(*shape))

    def error(b: Tensor, b_scale: Tensor, a_scale: Tensor = scale, **options: Any) -> float:
        return relative_error(aiter.gemm_a4w4(codes, b, a_scale, b_scale, **options), expected)

    assert scale.shape == (256, 16)
    assert in_rows.shape == (40, 16)
    assert error(right, scales) < 4e-3
    assert error(right, scales, bias=bias) < 4e-3  # dropped
    for kind in ("none", "mxfp4_moe"):
        b, b_scale = in_tiles(shape, kind)
        assert not error(b, scales) < 0.5, kind
        assert not error(right, b_scale) < 0.1, kind
    assert not error(right, scales, in_rows) < 0.1
    assert not error(right, scales, bpreshuffle=False) < 0.5
    assert error(in_tiles(shape, "none")[0], scales, bpreshuffle=False) < 4e-3


# --- compiled


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("on_gfx950", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend: str, on_gfx950: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(make(96, 160, True))
    bias, shuffles = torch.ones(96), ShuffleCount(monkeypatch)

    def call(x: Tensor) -> Tensor:
        return linear(x, module.weight, bias, activation_dtype="mxfp4") * 2

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)

    def check() -> None:
        for tokens in (4, 5):
            x = activations(tokens, 160)
            expected = 2 * (judge(x, "round_up" if on_gfx950 else "even", parts(96, 160)) + 1)
            assert relative_error(compiled(x), expected) < 4e-3

    if on_gfx950:
        with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
            kernel = Kernel(monkeypatch)
            check()
            assert len(kernel.calls) == 2
            assert shuffles.count == 1
            module.weight.copy_(module.weight.clone())
            module.weight.unshuffle_()
            check()
    else:
        check()
        module.weight.shuffle_("mxfp4_moe")
        check()


@pytest.mark.parametrize("version", ["#3788", "v0.1.18 and later"])
def test_one_expert_compiled(version: str) -> None:
    layer = make_layer()

    def call(x: Tensor, w: Tensor) -> Tensor:
        return linear(x, w[1], activation_dtype="mxfp4")

    with override_arch("gfx950"), fake_aiter(version):
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(layer["hidden_states"], layer["w13"])
    values = layer["w13"][1].dequantize(torch.float64)
    assert relative_error(found, rounded(layer["hidden_states"], "round_up") @ values.T) < 4e-3
    assert layer["w13"].shuffle_kind == EXPECTED[version].layout


def test_export_save_load_run(kernel: Kernel) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(make(96, 160, True))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight, activation_dtype="mxfp4")

    x, module = activations(4, 160), Dense()
    file, count = io.BytesIO(), torch.export.Dim("tokens")
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=[{0: count}]), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = activations(9, 160)
    assert relative_error(loaded(x), judge(x, "round_up", parts(96, 160))) < 4e-3
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("kind", ["none", "mxfp4_moe"])
def test_torchs_own_checks_of_the_operators(kind: str) -> None:
    x, w, bias = activations(2, 3, 160), make(96, 160, True).shuffle_(kind), torch.ones(96)
    torch.library.opcheck(torch.ops.shuffled_tensor.linear_mxfp4.default, (x, w, bias))
    packed = x, w.qdata, w.scale, kind, *w.shape, True, bias, "floor"
    torch.library.opcheck(torch.ops.shuffled_tensor.linear_mxfp4_packed.default, packed)


# --- other threads


def test_while_the_layout_changes(kernel: Kernel) -> None:
    x, w, done = activations(4, 160), make(96, 160, True), threading.Event()
    expected = judge(x, "round_up", parts(96, 160))

    def relayout() -> None:
        while not done.is_set():
            w.shuffle_("mxfp4_moe")
            w.unshuffle_()

    thread = threading.Thread(target=relayout)
    thread.start()
    try:
        for _ in range(100):
            assert relative_error(linear(x, w, activation_dtype="mxfp4"), expected) < 4e-3
    finally:
        done.set()
        thread.join()


def test_a_refit_waits_for_a_call_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = activations(4, 160), make(96, 160, True)
    inside, written, out = threading.Event(), threading.Event(), []
    refuse = gemm.refuse

    def slow(*args: Any) -> str | None:
        inside.set()
        written.wait(0.5)
        return refuse(*args)

    monkeypatch.setattr(gemm, "refuse", slow)
    thread = threading.Thread(target=lambda: out.append(linear(x, w, activation_dtype="mxfp4")))
    thread.start()
    inside.wait()
    with refit(w):
        w.qdata.zero_()
    written.set()
    thread.join()
    assert relative_error(out[0], judge(x, "even", parts(96, 160))) < 3e-3


def test_bytes_whose_weight_was_laid_out_anew() -> None:
    """As compiled code has them, that another thread overtakes: the weight knows better how they lie."""
    x, w = activations(4, 160), make(96, 160, True)
    given = x, w.qdata, w.scale, "none", *w.shape, True
    expected = torch.ops.shuffled_tensor.linear_mxfp4_packed(*given)
    w.shuffle_("mxfp4_moe")
    assert torch.equal(torch.ops.shuffled_tensor.linear_mxfp4_packed(*given), expected)


# --- what is refused


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        lambda call, x: call(x.requires_grad_()).sum().backward(),
        lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
        lambda call, x: torch.func.jvp(call, (x,), (x,)),
        lambda call, x: torch.func.vmap(call)(x),
    ],
    ids=["backward", "grad", "jvp", "vmap"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_no_gradient_through_mxfp4_activations(packed: bool, transform: Callable[..., object]) -> None:
    w = make(96, 160, True)

    def call(x: Tensor) -> Tensor:
        if packed:
            return torch.ops.shuffled_tensor.linear_mxfp4_packed(x, w.qdata, w.scale, "none", *w.shape, True)
        return linear(x, w, activation_dtype="mxfp4")

    with pytest.raises(
        (RuntimeError, NotImplementedError),
        match="linear with activation_dtype='mxfp4' has no (gradient|vmap rule)",
    ):
        transform(call, activations(4, 160, dtype=torch.float32))


BAD = [
    (
        {"w": torch.ones(96, 160)},
        TypeError,
        "w must be a ShuffledMXFP4Tensor, found Tensor; wrap packed bytes, or use from_hp",
    ),
    (
        {"w": make(96, 160, True).view(1, 96, 160)},
        ValueError,
        "w must be [N, K], a dense layer's or one expert, w[e]; found shape [1, 96, 160]",
    ),
    (
        {"w": make(96, 160, True)[:64]},
        ValueError,
        "w is a view of rows or columns, whose bytes have no place of their own in memory; clone() it",
    ),
    ({"x": make(96, 160, True)}, TypeError, "x must be a plain tensor, found ShuffledMXFP4Tensor"),
    ({"x": [1.0]}, TypeError, "x must be a plain tensor, found list"),
    ({"x": torch.ones(3, 96)}, ValueError, "x must be [..., 160] for w of shape [96, 160], found shape [3, 96]"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must be [..., 160] for w of shape [96, 160], found shape []"),
    (
        {"x": torch.ones(3, 160).double()},
        TypeError,
        "x must be torch.bfloat16 or torch.float16 or torch.float32, found torch.float64",
    ),
    (
        {"x": torch.ones(3, 160, device="meta")},
        ValueError,
        "all tensors must be on the device of w, cpu; found x on meta",
    ),
    ({"bias": 1.0}, TypeError, "bias must be a plain tensor, found float"),
    ({"bias": torch.ones(1, 96)}, ValueError, "bias must be [96] for w of shape [96, 160], found shape [1, 96]"),
    (
        {"bias": torch.ones(96).int()},
        TypeError,
        "bias must be torch.bfloat16 or torch.float16 or torch.float32, found torch.int32",
    ),
    (
        {"bias": torch.ones(96, device="meta")},
        ValueError,
        "all tensors must be on the device of w, cpu; found bias on meta",
    ),
    (
        {"activation_dtype": "fp8"},
        ValueError,
        "activation_dtype must be None (activations as they come) or 'mxfp4', found 'fp8'",
    ),
    (
        {"scale_rule": "odd"},
        ValueError,
        "unknown scale_rule 'odd'; known rules: 'floor', 'even', 'round_up', 'amax4'",
    ),
    (
        {"scale_rule": "even", "activation_dtype": None},
        ValueError,
        "scale_rule='even' quantises activations, so it needs activation_dtype='mxfp4'",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str, kernel: Kernel) -> None:
    given = {"x": activations(3, 160), "w": make(96, 160, True), "activation_dtype": "mxfp4"} | wrong
    with pytest.raises(error) as caught:
        linear(**given)
    assert str(caught.value) == message
    assert not getattr(given["w"], "is_shuffled", False)


def test_bad_bytes() -> None:
    x, w = activations(3, 160), make(96, 160, True)
    operator = torch.ops.shuffled_tensor.linear_mxfp4_packed
    with pytest.raises(ValueError, match=r"w_qdata and w_scale must be \[512, 128\] and \[512, 8\], .* \[500, 128\]"):
        operator(x, w.qdata[:500], w.scale, "none", *w.shape, True)
    with pytest.raises(ValueError, match=r"must be \[512, 128\] and \[512, 8\], .* and \[512, 5\]"):
        operator(x, w.qdata, w.scale[:, :5], "none", *w.shape, True)
    with pytest.raises(TypeError, match="w must be a ShuffledMXFP4Tensor"):
        torch.ops.shuffled_tensor.linear_mxfp4(x, torch.ones(96, 160))


def test_a_weight_while_it_is_refitted() -> None:
    w = make(96, 160, True)
    with refit(w), pytest.raises(RuntimeError, match="refit"):
        linear(activations(3, 160), w, activation_dtype="mxfp4")
