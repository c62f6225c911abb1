# SPDX-License-Identifier: MIT
"""SGLang's own code, from its wheel, with this package under its experts; and without, where SGLang alone is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shuffled_tensor import ShuffledMXFP4Tensor, prepare, refit, wrap_experts_
from shuffled_tensor.integrations import sglang as plugin
from shuffled_tensor.testing import FakeAiter

from . import sglang_layer as s
from .layers import EXPERTS, ORDER, QUARK, Checkpoint, error, gpt_oss, inputs, quark, reorder

s.make_importable()

RIGHT = 5e-3
WRONG = 0.5
MENDED = "SGLang has mended this: say so in docs/INTEGRATIONS.md"


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeAiter]:
    with s.sglang() as fake:
        yield fake
        unhook()


@pytest.fixture(params=["SGLang alone", "owned"])
def owned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "owned")


def hook() -> None:
    """As `load_plugins` does it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.register()
    HookRegistry.apply_hooks()


def unhook() -> None:
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod
    from sglang.srt.layers.quantization.quark.schemes.quark_w4a4_mxfp4_moe import QuarkW4A4MXFp4MoE
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.reset()
    for hooked in (Mxfp4MoEMethod, QuarkW4A4MXFp4MoE):
        process = hooked.process_weights_after_loading
        hooked.process_weights_after_loading = getattr(process, "__wrapped__", process)


def make(owned: bool, checkpoint: Checkpoint) -> nn.Module:
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.layers.quantization.quark.quark import QuarkConfig

    if owned:
        hook()
    if checkpoint.w13_bias is None:
        return s.make_layer(QuarkConfig.from_config(QUARK))
    swiglu = {"activation": "silu", "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "with_bias": True}
    return s.make_layer(Mxfp4Config.from_config({"quant_method": "mxfp4"}), **swiglu)


def load(layer: nn.Module, checkpoint: Checkpoint) -> None:
    (s.load_quark if checkpoint.w13_bias is None else s.load_gpt_oss)(layer, checkpoint.tensors)


def process(layer: nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def loaded(owned: bool, checkpoint: Checkpoint) -> nn.Module:
    layer = make(owned, checkpoint)
    load(layer, checkpoint)
    process(layer)
    assert hasattr(layer, "mxfp4_experts") == owned
    return layer


def update_from_disk(layer: nn.Module, checkpoint: Checkpoint) -> None:
    """As `update_weights_from_disk` does it."""
    layer.quant_method.restore_weights_before_loading(layer)
    load(layer, checkpoint)
    process(layer)


def rebalance(layer: nn.Module) -> None:
    """As `expert_location_updater` does it."""
    reorder([parameter.data[:EXPERTS] for parameter in layer.parameters()])


def off(layer: nn.Module, right: Checkpoint) -> float:
    return error(s.forward(layer, inputs()), right)


def addresses(layer: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}


def one_expert(new: Checkpoint, others: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint of expert 2 alone, and what is right when it has come."""
    tensors = {name: data for name, data in new.tensors.items() if name.startswith("2.")}
    w13, w2 = others.w13.clone(), others.w2.clone()
    w13[2], w2[2] = new.w13[2], new.w2[2]
    return new._replace(tensors=tensors), Checkpoint({}, w13, w2)


both = pytest.mark.parametrize("checkpoint", [pytest.param(quark, id="Quark"), pytest.param(gpt_oss, id="gpt-oss")])


@both
def test_a_layer_computes_what_the_checkpoint_says(owned: bool, checkpoint: Any) -> None:
    assert off(loaded(owned, checkpoint(0)), checkpoint(0)) < RIGHT


@both
def test_updates_and_a_rebalance(checkpoint: Any) -> None:
    layer = loaded(True, checkpoint(0))
    before = addresses(layer)
    for salt, update in enumerate((update_from_disk, update_from_disk, load, load), 1):
        update(layer, checkpoint(salt))
        assert off(layer, checkpoint(salt)) < RIGHT
    if (
        checkpoint is quark
    ):  # SGLang moves rows of gpt-oss's scales, which it has in two dimensions, as if they were experts
        rebalance(layer)
        assert off(layer, checkpoint(4).permuted(ORDER)) < RIGHT
    update_from_disk(layer, checkpoint(5))
    assert off(layer, checkpoint(5)) < RIGHT
    assert addresses(layer) == before


def test_an_update_moves_every_tensor_of_sglang_alone() -> None:
    layer = loaded(False, quark(0))
    before = addresses(layer)
    update_from_disk(layer, quark(1))
    assert off(layer, quark(1)) < RIGHT
    assert not before.items() & addresses(layer).items(), MENDED


def test_load_weights_alone(owned: bool) -> None:
    """As `update_weights_from_tensor` does it."""
    layer = loaded(owned, quark(0))
    load(layer, quark(1))
    if owned:
        assert off(layer, quark(1)) < RIGHT
    else:
        assert off(layer, quark(1)) > WRONG, MENDED
        assert layer.w13_weight.is_shuffled


@pytest.mark.parametrize("update", [update_from_disk, load])
def test_one_expert_alone_comes(owned: bool, update: Any) -> None:
    layer = loaded(owned, quark(0))
    new, right = one_expert(quark(1), quark(0))
    update(layer, new)
    if owned:
        assert off(layer, right) < RIGHT
    else:
        assert off(layer, right) > 0.1, MENDED


def test_a_second_load_of_gpt_oss_by_sglang_alone() -> None:
    layer = loaded(False, gpt_oss(0))
    with pytest.raises(AttributeError, match="weight_loader"):  # of scales that were made anew
        load(layer, gpt_oss(1))


@both
def test_dummy_weights_tell_nothing_until_real_ones_come(checkpoint: Any) -> None:
    """As in rollouts that start with --load-format dummy."""
    layer = make(True, checkpoint(0))
    for parameter in layer.parameters():
        parameter.zero_()
    process(layer)
    assert not any(parameter.view(torch.uint8).any() for parameter in (layer.w13_weight, layer.w2_weight))
    load(layer, checkpoint(1))
    assert off(layer, checkpoint(1)) < RIGHT


def test_this_package_on_the_engines_layer() -> None:
    layer = loaded(True, quark(0))
    weight = layer.mxfp4_experts.w13
    assert torch.equal(weight.dequantize(torch.float64), quark(0).w13)
    prepare(layer)
    with refit(layer):
        assert not weight.is_shuffled
    load(layer, quark(1))
    assert torch.equal(weight.dequantize(torch.float64), quark(1).w13)
    assert off(layer, quark(1)) < RIGHT


@both
def test_sharded_state(checkpoint: Any, tmp_path: Path) -> None:
    """What `save_sharded_model` writes is loaded into a model that holds something else, by name."""
    from safetensors.torch import load_file, save_file
    from sglang.srt.model_loader.loader import ShardedStateLoader

    others = [loaded(owned, checkpoint(2)) for owned in (False, True)]
    layer = loaded(True, checkpoint(0))
    load(layer, checkpoint(1))
    save_file(ShardedStateLoader._filter_subtensors(layer.state_dict()), tmp_path / "state.safetensors")
    for other in others:
        for name, data in load_file(tmp_path / "state.safetensors").items():
            other.state_dict()[name].copy_(data)
        assert off(other, checkpoint(1)) < RIGHT


# --- weights of this package as parameters, without the plugin


def test_our_weights_as_parameters() -> None:
    layer = make(False, quark(0))
    load(layer, quark(0))
    wrap_experts_(layer, row_order="contiguous")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):  # its scale is None
        process(layer)
    with pytest.raises(NotImplementedError, match="aten.view.dtype changes size or memory"):
        off(layer, quark(0))
    with pytest.raises(ValueError, match="copy_ takes values of shape"):
        load(layer, quark(1))
    with pytest.raises(TypeError, match=r"\.data takes a ShuffledMXFP4Tensor"):
        layer.replace_expert_tensor("w13_weight", torch.zeros(4, 512, 256, dtype=torch.uint8))
    rebalance(layer)  # codes and scales together
    assert isinstance(layer.w13_weight, ShuffledMXFP4Tensor)
    assert torch.equal(layer.w13_weight.dequantize(torch.float64), quark(0).w13[ORDER])


# --- standing aside


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plugin, "_said", set())
    caplog.set_level(logging.INFO, "shuffled_tensor")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "shuffled_tensor"]


def hooks() -> int:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return len(HookRegistry._hooks)


def test_one_line_says_that_it_is_on(said: Any) -> None:
    loaded(True, quark(0))
    loaded(True, quark(0))
    assert said() == ["shuffled_tensor owns MXFP4 experts: mxfp4_separated, 0.00 GiB a layer"]


def test_turned_off(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHUFFLED_TENSOR_PLUGIN", "0")
    plugin.register()
    assert said() == ["shuffled_tensor stands aside: SHUFFLED_TENSOR_PLUGIN=0"]
    assert hooks() == 0


def test_a_pytorch_that_is_not_for_rocm(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    plugin.register()
    assert said() == ["shuffled_tensor stands aside: it is for gfx950 GPUs, and this PyTorch is not for ROCm"]
    assert hooks() == 0


def test_an_sglang_that_names_things_otherwise(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.layers.quantization.mxfp4 as renamed

    monkeypatch.delattr(renamed, "Mxfp4MoEMethod")
    plugin.register()
    assert len(said()) == 1
    assert "names things otherwise" in said()[0]
    assert hooks() == 0


def test_another_gpu(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.utils

    monkeypatch.setattr(sglang.srt.utils, "is_gfx95_supported", lambda: False)
    layer = make(True, quark(0))
    load(layer, quark(0))
    process(layer)
    assert said() == ["shuffled_tensor leaves MXFP4 experts to SGLang: this GPU is no gfx950"]
    assert not hasattr(layer, "mxfp4_experts")
    assert off(layer, quark(0)) < RIGHT


def test_offloaded_weights_are_left_to_sglang(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.utils import offloader

    monkeypatch.setattr(offloader, "_instance", object())
    layer = make(True, quark(0))
    load(layer, quark(0))
    process(layer)
    assert said() == ["shuffled_tensor leaves MXFP4 experts to SGLang: weights are offloaded"]
    assert not hasattr(layer, "mxfp4_experts")


def test_experts_that_are_quantised_while_they_are_loaded(said: Any) -> None:
    layer = make(True, quark(0))
    load(layer, quark(0))
    layer.scheme.quantize_shared_expert_online = True
    process(layer)
    assert said() == ["shuffled_tensor leaves MXFP4 experts to SGLang: weights are quantised while they are loaded"]
    assert not hasattr(layer, "mxfp4_experts")


def test_other_kernels_of_sglang(said: Any) -> None:
    layer = make(True, gpt_oss(0))
    layer.quant_method.use_marlin = True
    plugin._process(lambda method, layer: None, layer.quant_method, layer)
    assert said() == [
        "shuffled_tensor leaves MXFP4 experts to SGLang: SGLang's kernels for them are others (use_marlin)"
    ]


def test_weights_that_were_laid_out_already(said: Any) -> None:
    layer = make(True, quark(0))
    load(layer, quark(0))
    layer.w2_weight.is_shuffled = True
    process(layer)
    assert said()[-1].endswith("w2_weight is tagged as shuffled already")
    assert not hasattr(layer, "mxfp4_experts")
