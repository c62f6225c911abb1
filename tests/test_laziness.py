# SPDX-License-Identifier: MIT
"""When weights are shuffled: on first use on a gfx950 GPU, once; and never otherwise, unless asked."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, arch, explain, fused_moe, override_arch, prepare
from shuffled_tensor.backends import base, triton
from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.backends.doctor import _DRIVERS, doctor
from shuffled_tensor.moe import op
from shuffled_tensor.moe.models import MODELS
from shuffled_tensor.testing import fake_aiter

from .support.layer import MoE, ShuffleCount, make_layer, make_weight
from .support.reports import unversioned


@pytest.fixture
def shuffles(monkeypatch: pytest.MonkeyPatch) -> ShuffleCount:
    return ShuffleCount(monkeypatch)


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    layer = make_layer(device)
    return layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]


@pytest.mark.usefixtures("no_triton")
def test_nothing_shuffles_unasked(shuffles: ShuffleCount, device: str) -> None:
    """On a CPU or another GPU nothing does, and on the target neither does moving, wrapping, copying or explaining."""
    with fake_aiter("v0.1.18 and later"):
        fused_moe(**make_layer(device))
        with override_arch("gfx950"):
            module = MoE().to(device).to(torch.float16).to(torch.bfloat16)
            copied = module.w13_weight.clone()
            module.load_state_dict(module.state_dict())
            explain(**make_layer(device))
            assert not module.w13_weight.is_shuffled
            assert not copied.is_shuffled
    assert shuffles.count == 0


def test_first_use_shuffles_once(shuffles: ShuffleCount, device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        module = MoE(device)
        address = module.w13_weight.qdata.data_ptr()
        for _ in range(3):
            module(*inputs(device))
        assert shuffles.count == 2
        module.load_state_dict(MoE(device).state_dict())
        module(*inputs(device))
        assert module.w13_weight.qdata.data_ptr() == address
    assert shuffles.count == 2


def test_every_alias_sees_the_new_layout(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("#3470 (shuffle_kind)"):
        weight = make_weight("w13", device)
        parameter = nn.Parameter(weight)
        module = nn.Module()
        module.register_parameter("w13", parameter)
        with torch.inference_mode():
            seen_in_inference = weight.detach()
        aliases = [weight, weight.detach(), parameter, module.state_dict()["w13"], weight[:], seen_in_inference]
        expert, experts = weight[2], weight[1:3]
        fused_moe(**(make_layer(device) | {"w13": parameter}))
        values = make_weight("w13", device).dequantize()
        for alias in aliases:
            assert (alias.shuffle_kind, alias.is_shuffled) == ("mxfp4_moe", True)
            assert torch.equal(alias.dequantize(), values)
        assert torch.equal(expert.dequantize(), values[2])
        assert torch.equal(experts.dequantize(), values[1:3])


def test_eight_threads_at_once(shuffles: ShuffleCount, device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        expected = fused_moe(**make_layer(device))
        shuffles.count = 0
        layer = make_layer(device)
        barrier, outs = threading.Barrier(8), []

        def call() -> None:
            stream = torch.cuda.Stream() if device == "cuda" else None
            barrier.wait()
            with torch.cuda.stream(stream):
                outs.append(fused_moe(**layer))
            if stream is not None:
                stream.synchronize()

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert shuffles.count == 2
    assert len(outs) == 8
    assert all(torch.equal(out, expected) for out in outs)


def test_being_flattened_for_the_compiler_is_a_first_use(shuffles: ShuffleCount, device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        expected = MoE(device)(*inputs(device))
        shuffles.count = 0
        module = MoE(device)
        before = module.state_dict()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(*inputs(device)), expected)
        assert shuffles.count == 2
        assert before["w13_weight"].is_shuffled
        module.w13_weight.__tensor_flatten__()
    assert shuffles.count == 2


def test_another_kind_is_laid_out_anew_where_the_target_was_open(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        expected = fused_moe(**make_layer(device))
        for kinds in (("mxfp4_moe", "mxfp4_moe"), ("mxfp4_moe", None), (None, "mxfp4_separated")):
            layer = make_layer(device)
            for name, kind in zip(("w13", "w2"), kinds, strict=True):
                if kind is not None:
                    layer[name].shuffle_(kind)
            assert torch.equal(fused_moe(**layer), expected)
            assert layer["w13"].shuffle_kind == layer["w2"].shuffle_kind == "mxfp4_separated"


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.usefixtures("no_triton")
def test_a_fixed_kind_is_kept(shuffled: bool, device: str) -> None:
    """Also where aiter has no kernels for the call that read it."""
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        layer = make_layer(device) | {"w13": make_weight("w13", device, kind="mxfp4_moe")}
        if shuffled:
            layer["w13"].shuffle_()
        report = explain(**layer)
        assert report.backend == "reference"
        assert "it would take weights made with shuffle_kind='mxfp4_separated'" in report.passed_over["aiter"]
        with pytest.raises(ValueError, match="aiter cannot take this call"):
            fused_moe(**layer, backend="aiter")
        assert torch.equal(fused_moe(**layer), fused_moe(**make_layer(device), backend="reference"))
        assert layer["w13"].shuffle_kind == "mxfp4_moe"
        none = make_layer(device) | {"w2": make_weight("w2", device, kind="none")}
        assert "w2 is fixed to 'none', and it reads" in explain(**none).passed_over["aiter"]
        assert fake.reads == []
        same = make_layer(device) | {
            "w2": make_weight("w2", device, kind="mxfp4_moe")
        }  # the same bytes in both layouts
        assert torch.equal(fused_moe(**same), fused_moe(**make_layer(device)))
        assert (same["w13"].shuffle_kind, same["w2"].shuffle_kind) == ("mxfp4_separated", "mxfp4_moe")
        assert len(fake.reads) == 2


@pytest.mark.usefixtures("no_triton")
def test_a_fixed_kind_is_shuffled_into_without_aiter(device: str) -> None:
    module = nn.Module()
    module.register_parameter("w2", nn.Parameter(make_weight("w2", device, kind="mxfp4_moe")))
    prepare(module)
    assert not module.w2.is_shuffled
    with override_arch("gfx950"):
        prepare(module)
    assert module.w2.is_shuffled


def test_bad_arguments_are_found_before_anything_is_shuffled(device: str) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        layer = make_layer(device)
        with pytest.raises(TypeError, match="topk_ids must be"):
            fused_moe(**(layer | {"topk_ids": layer["topk_ids"].float()}))
        assert not layer["w13"].is_shuffled


@pytest.mark.parametrize("progress", [False, True])
def test_prepare(progress: bool, shuffles: ShuffleCount, device: str, caplog: pytest.LogCaptureFixture) -> None:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"), caplog.at_level(logging.INFO, "shuffled_tensor"):
        expected = MoE(device)(*inputs(device))
        shuffles.count = 0
        model = nn.Sequential(MoE(device), MoE(device), nn.Linear(2, 2))
        model[1].w2_weight = nn.Parameter(model[0].w2_weight)  # tied: another object, the same bytes
        assert prepare(model, progress=progress) is model
        assert shuffles.count == 3
        prepare(model)
        assert torch.equal(model[1](*inputs(device)), expected)
    assert shuffles.count == 3
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("prepared 3 MXFP4 weights (3 mxfp4_separated): shuffled 0.00 GiB in ")
    assert second.startswith("prepared 3 MXFP4 weights (3 mxfp4_separated): shuffled 0.00 GiB in ")


def test_prepare_says_how_much_it_moved(caplog: pytest.LogCaptureFixture) -> None:
    experts = nn.Module()
    codes, scales = torch.zeros(8, 1024, 1024, dtype=torch.uint8), torch.zeros(8, 1024, 64, dtype=torch.uint8)
    experts.w2 = nn.Parameter(ShuffledMXFP4Tensor(codes, scales, gate_up=False))  # 8.5 MiB
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"), caplog.at_level(logging.INFO, "shuffled_tensor"):
        prepare(experts)
        prepare(experts)
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == [
        "prepared 1 MXFP4 weights (1 mxfp4_separated): shuffled 0.01 GiB",
        "prepared 1 MXFP4 weights (1 mxfp4_separated): shuffled 0.00 GiB",
    ]


@pytest.mark.usefixtures("no_triton")
def test_a_fallback_on_the_target_is_logged_once(device: str, caplog: pytest.LogCaptureFixture) -> None:
    base._warn_once.cache_clear()  # another test may have met the same reason
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"), caplog.at_level(logging.WARNING, "shuffled_tensor"):
        for _ in range(2):
            fused_moe(**make_layer(device), swiglu_limit=123.0, activation="gelu")
            fused_moe(**make_layer(device))
    messages = [record.getMessage() for record in caplog.records]
    reason = "no kernel known here computes activation='gelu'; they compute 'silu' and 'swiglu'"
    assert messages == [f"fused_moe goes to the reference backend, not to aiter: {reason}"]


def test_a_shape_without_a_kernel_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not for every number of tokens that comes."""
    base._warn_once.cache_clear()
    with (
        override_arch("gfx950"),
        fake_aiter("#3470 (shuffle_kind)", tuned=False),
        caplog.at_level(logging.WARNING, "shuffled_tensor"),
    ):
        for tokens in (5, 6, 7, 8):
            fused_moe(**make_layer(tokens=tokens))
    assert [record.getMessage() for record in caplog.records] == [
        "fused_moe goes to the reference backend, not to aiter: for 1 token, FlyDSL a4w4 in aiter #3470 (shuffle_kind) "
        "reads 'mxfp4_separated', not 'mxfp4_moe'; it would take weights made with shuffle_kind='mxfp4_separated'"
    ]


def test_override_arch() -> None:
    assert arch("cpu") == "cpu"
    with override_arch("gfx950"):
        assert (arch("cpu"), arch("cuda:1"), arch("meta")) == ("gfx950", "gfx950", "meta")
        with override_arch("gfx942", "cuda:1"):
            assert (arch("cuda:0"), arch("cuda:1")) == ("gfx950", "gfx942")
            with override_arch("sm_90", "cuda"):
                assert (arch("cuda:1"), arch("cpu")) == ("sm_90", "gfx950")
    assert arch("cpu") == "cpu"


def test_importing_the_package_imports_neither_aiter_nor_triton() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import shuffled_tensor; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['colorsys', 'einops', 'shuffled_tensor']"


def test_doctor() -> None:
    def run() -> str:
        return unversioned(doctor())

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: its report is shown here")
    with fake_aiter("v0.1.18 and later", tuned=False):
        plain = run()
        with override_arch("gfx950"):
            target = run()
    assert_expected_inline(
        f"{plain}\n\n{target}",
        """\
verdict       CPU only: the reference backend alone, for tests and conversions, not for serving
torch         <version>
aiter         of unknown release, API v0.1.18 and later (#3832, b2dd7703df, v0.1.16.post4, v0.1.17-longctx, v0.1.18)
triton        <version>
cpu           cpu
  aiter       no: aiter's MXFP4 kernels run on gfx950, not on cpu
  triton      no: it compiles for GPUs, found cpu
  reference   yes, reads any layout
layouts       'none', 'mxfp4_moe', 'mxfp4_separated'
routes        on cpu, of the layers of
  DeepSeek V3 and R1  reference, plain torch
  Kimi K2             reference, plain torch
  Qwen3               reference, plain torch
  DeepSeek V4         reference, plain torch
  gpt-oss             reference, plain torch
  MiniMax-M3          reference, plain torch
  Kimi-K3             reference, plain torch
to change     nothing: neither aiter nor triton runs here, and the reference backend runs everything

verdict       gfx950: the aiter backend, and reference for the calls that it does not take
torch         <version>
aiter         of unknown release, API v0.1.18 and later (#3832, b2dd7703df, v0.1.16.post4, v0.1.17-longctx, v0.1.18)
triton        <version>
cpu           gfx950
  aiter       yes, reads 'mxfp4_separated', 'mxfp4_moe'
  triton      no: it compiles for GPUs, found cpu
  reference   yes, reads any layout
layouts       'none', 'mxfp4_moe', 'mxfp4_separated'
routes        on cpu, of the layers of
  DeepSeek V3 and R1  aiter, FlyDSL a4w4
  Kimi K2             aiter, FlyDSL a4w4
  Qwen3               aiter, FlyDSL a4w4
  DeepSeek V4         aiter, FlyDSL a4w4
  gpt-oss             aiter, 1 to 255 tokens: CK-Tile a16w4, K in parts; 256 or more tokens: FlyDSL a4w4
  MiniMax-M3          aiter, 1 to 255 tokens: CK-Tile a16w4, K in parts; 256 or more tokens: FlyDSL a4w4
  Kimi-K3             reference, plain torch
to change     nothing: weights are shuffled on first use""",
    )
    with override_arch("gfx950"):
        assert "install or repair aiter" in run()
    command = [sys.executable, "-m", "shuffled_tensor", "doctor"]
    assert "torch  " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("installed", "too_old", "here", "change"),
    [
        (True, None, "yes, reads 'mxfp4_separated', 'mxfp4_moe'", "nothing: weights are shuffled on first use"),
        (
            False,
            None,
            "no: no triton is installed",
            "install triton, in the version that PyTorch's build for GPUs asks for",
        ),
        (
            False,
            "old",
            "no: old",
            "nothing: neither aiter nor triton runs here, and the reference backend runs everything",
        ),
    ],
)
def test_doctor_on_another_gpu(
    installed: bool, too_old: str | None, here: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton, "_installed", lambda: installed)
    monkeypatch.setattr(triton, "_too_old", lambda device: too_old)
    monkeypatch.setattr(triton, "_version", lambda: "3.6.0")
    with override_arch("sm_90", "cuda"), fake_aiter("v0.1.18 and later"):
        report = doctor().splitlines()
    gpu = report.index("cuda:0        sm_90")
    assert report[gpu + 1] == "  GPU         NVIDIA H200, 140.0 GiB"
    assert report[gpu + 3] == f"  triton      {here}"
    computes = "triton, triton w4a16" if "yes" in here else "reference, plain torch"
    routes = report.index("routes        on cuda:0, of the layers of")
    assert [line[22:] for line in report[routes + 1 : -1]] == [computes] * len(MODELS)
    assert report[-1] == f"to change     {change}"
    runs = (
        "triton backend, and reference for the calls that it does not take"
        if "yes" in here
        else "reference backend alone"
    )
    assert report[0].startswith(f"verdict       sm_90: the {runs}")
    assert f"triton        {'3.6.0' if installed else 'not installed'}" in report


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "NVIDIA",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version:  gcc 12.3.0\n",
            "NVIDIA 570.124.06",
        ),
        ("NVIDIA", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n", "NVIDIA 535.104.05"),
        ("amdgpu", "6.12.12\n", "amdgpu 6.12.12"),
        (None, "", "of unknown version"),
    ],
)
def test_doctor_says_versions(
    name: str | None, text: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the driver as Linux says it, where there is a GPU; and of packages that are installed."""
    (tmp_path / "version").write_text(text)
    for each in _DRIVERS:
        monkeypatch.setitem(_DRIVERS, each, tmp_path / ("version" if each == name else "nothing"))
    versions_of = {"safetensors": "0.6.2"}

    def version(name: str) -> str:
        if name in versions_of:
            return versions_of[name]
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "driver" not in doctor() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="a GPU", total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton, "_too_old", lambda device: None)
    with override_arch("sm_90", "cuda"), fake_aiter("v0.1.18 and later"):
        report = doctor().splitlines()
    assert f"driver        {said}" in report
    assert "safetensors   0.6.2" in report
    assert not any(line.startswith("transformers") for line in report)


def test_capturing_a_graph_before_first_use_is_refused(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        weight = make_weight("w13", device)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="prepare"), torch.cuda.graph(graph):
            weight.shuffle_("mxfp4_separated")
        assert not weight.is_shuffled


def test_relayout_of_a_view_made_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = make_weight("w13")
        weight.shuffle_("mxfp4_moe")
    weight.shuffle_("mxfp4_separated")
    assert torch.equal(weight.dequantize(), make_weight("w13").dequantize())


@pytest.mark.parametrize("name", ["plan", "_PACKED"])
def test_another_thread_lays_weights_out_while_a_call_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """What the call says of its bytes is compared with what it must be, not what the weights have become since: after
    it was planned, as where a mode is to see it, and where it is lowered at once."""
    expected = fused_moe(**make_layer(device), out_dtype=torch.float32)
    layer, function = make_layer(device), getattr(op, name)

    def relayout() -> None:
        for weight in (layer["w13"], layer["w2"]):
            weight.shuffle_("mxfp4_separated")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if name == "plan":
            planned = function(*args, **kwargs)
            relayout()
            return planned
        relayout()
        return function(*args, **kwargs)

    with override_arch("gfx950"), fake_aiter("v0.1.18 and later"):
        monkeypatch.setattr(op, name, interrupted)
        with torch.device(device) if name == "plan" else nullcontext():
            out = fused_moe(**layer, out_dtype=torch.float32)  # no kernel of aiter gives float32: the reference runs
    assert layer["w13"].is_shuffled
    torch.testing.assert_close(out, expected)


def test_a_key_of_compiled_code_asks_no_backend_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "detect", lambda: pytest.fail("aiter was looked for"))
    make_weight("w13")._stable_hash_for_caching()
