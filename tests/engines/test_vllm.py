# SPDX-License-Identifier: MIT
"""vLLM's own code, from its wheel, with this package under its experts; and without, where vLLM alone is wrong."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shuffled_tensor import prepare, refit
from shuffled_tensor.integrations.vllm import register
from shuffled_tensor.testing import FakeAiter

from . import vllm_layer as v
from .layers import EXPERTS, HIDDEN, INTERMEDIATE, ORDER, QUARK, Checkpoint, error, gpt_oss, inputs, quark, reorder

v.make_importable()

RIGHT = 5e-3
WRONG = 0.5


@pytest.fixture
def fake() -> Iterator[FakeAiter]:
    with v.vllm() as fake:
        yield fake


@pytest.fixture(params=["vLLM alone", "owned"])
def owned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "owned")


def make(owned: bool, kind: str = "quark", intermediate: int = INTERMEDIATE, **options: Any) -> nn.Module:
    """A model of one layer, that vLLM may reload."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, Mxfp4Config
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    if owned:
        register()
    own = {"quark": QuarkConfig, "gpt_oss_mxfp4": GptOssMxfp4Config, "mxfp4": Mxfp4Config}[kind]
    config = (get_quantization_config(kind) if owned else own).from_config(QUARK)
    if kind == "gpt_oss_mxfp4":
        options |= {"activation": "SWIGLUOAI", "has_bias": True}
    model = nn.ModuleDict({"experts": v.make_layer(config, (EXPERTS, HIDDEN, intermediate), **options)})
    record_metadata_for_reloading(model)
    return model


def load(model: nn.Module, checkpoint: Checkpoint) -> None:
    layer = model["experts"]
    if checkpoint.w13_bias is None:
        v.load_quark(layer, checkpoint.tensors)
    else:
        v.load_gpt_oss(layer, checkpoint.tensors)


def process(model: nn.Module) -> None:
    model["experts"].quant_method.process_weights_after_loading(model["experts"])


def loaded(owned: bool, checkpoint: Checkpoint, **options: Any) -> nn.Module:
    model = make(owned, "quark" if checkpoint.w13_bias is None else "gpt_oss_mxfp4", **options)
    load(model, checkpoint)
    process(model)
    assert hasattr(model["experts"], "mxfp4_experts") == owned
    return model


def reload(model: nn.Module, checkpoint: Checkpoint | None) -> None:
    """As `reload_weights` does it."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    if checkpoint is not None:
        load(model, checkpoint)
    finalize_layerwise_reload(model, None)


def rebalance(model: nn.Module) -> None:
    """As `rebalance_execute` does it."""
    reorder(list(model["experts"].get_expert_weights()))


def off(model: nn.Module, right: Checkpoint) -> float:
    return error(model["experts"].forward_modular(*inputs()), right)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


CHECKPOINTS = [pytest.param(quark, id="Quark"), pytest.param(gpt_oss, id="gpt-oss")]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_layer_computes_what_the_checkpoint_says(fake: FakeAiter, owned: bool, checkpoint: Any) -> None:
    assert off(loaded(owned, checkpoint(0)), checkpoint(0)) < RIGHT


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_reloads_and_a_rebalance(fake: FakeAiter, owned: bool, checkpoint: Any) -> None:
    model = loaded(owned, checkpoint(0))
    before = addresses(model)
    for salt in (1, 2):
        reload(model, checkpoint(salt))
        assert off(model, checkpoint(salt)) < RIGHT
    reload(model, None)  # brings nothing for this layer
    assert off(model, checkpoint(2)) < RIGHT
    rebalance(model)
    assert addresses(model) == before
    if not owned:  # its kernel holds the scales of the last reload, which nobody has moved
        assert off(model, checkpoint(2).permuted(ORDER)) > WRONG, "vLLM has mended this: say so in docs/INTEGRATIONS.md"
        return
    assert off(model, checkpoint(2).permuted(ORDER)) < RIGHT
    reload(model, checkpoint(3))
    assert off(model, checkpoint(3)) < RIGHT
    assert addresses(model) == before


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_loading_again_without_laying_out_again(fake: FakeAiter, checkpoint: Any) -> None:
    model = loaded(True, checkpoint(0))
    before = addresses(model)
    load(model, checkpoint(1))  # as `model.load_weights` of a weight update
    assert off(model, checkpoint(1)) < RIGHT
    process(model)  # as some do then
    assert off(model, checkpoint(1)) < RIGHT
    reload(model, checkpoint(2))
    assert off(model, checkpoint(2)) < RIGHT
    assert addresses(model) == before


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_vllm_alone_makes_of_loading_again(fake: FakeAiter, checkpoint: Any) -> None:
    """The day this does not raise, see what it computes, and say so in docs/INTEGRATIONS.md."""
    model = loaded(False, checkpoint(0))
    with pytest.raises(NotImplementedError, match="Float4_e2m1fn_x2"):
        load(model, checkpoint(1))


def test_one_expert_alone_comes(fake: FakeAiter) -> None:
    model, right, new = loaded(True, quark(0)), quark(0), quark(1)
    list(model["experts"].load_weights([(name, data) for name, data in new.tensors.items() if name.startswith("2.")]))
    for part in ("w13", "w2"):
        getattr(right, part)[2] = getattr(new, part)[2]
    assert off(model, right) < RIGHT


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_sharded_state(fake: FakeAiter, checkpoint: Any, tmp_path: Path) -> None:
    """What `save_sharded_state` writes is loaded into a model that has been loaded with something else, by name."""
    from safetensors.torch import load_file, save_file
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    model = loaded(True, checkpoint(0))
    reload(model, checkpoint(1))
    state = ShardedStateLoader._filter_subtensors(model.state_dict())
    save_file({name: data.view(torch.uint8) for name, data in state.items()}, tmp_path / "state.safetensors")
    for owned in (False, True):
        other = loaded(owned, checkpoint(2))
        before = addresses(other)
        for name, data in load_file(tmp_path / "state.safetensors").items():
            parameter = other.state_dict()[name]
            parameter.copy_(data.view(parameter.dtype))
        assert off(other, checkpoint(1)) < RIGHT
        assert addresses(other) == before


def test_experts_without_biases_in_interleaved_tiles(fake: FakeAiter) -> None:
    """DeepSeek-V4's and Kimi-K3's: gate and up apart in the checkpoint, in turn for the kernel."""
    models = [make(owned, "mxfp4") for owned in (False, True)]
    for model in models:
        load(model, quark(0))
        process(model)
    weight = models[1]["experts"].mxfp4_experts.w13
    assert (weight.shuffle_kind, weight.row_order) == ("mxfp4_moe", "contiguous")
    before = addresses(models[1])
    for salt in (0, 1, 2):
        if salt == 1:
            for model in models:
                reload(model, quark(1))
        elif salt == 2:
            load(models[1], quark(2))
            reload(models[0], quark(2))
        assert torch.equal(weight.dequantize(torch.float64), quark(salt).w13)
        alone, owned = (model["experts"].forward_modular(*inputs()) for model in models)
        assert torch.equal(alone, owned)
    assert addresses(models[1]) == before


def test_expert_parallel() -> None:
    with v.vllm(tuned=False):  # the kernels of tuned rows take no expert mask
        right = quark(0)
        model = loaded(True, right, expert_parallel=(2, 1))
        assert model["experts"].mxfp4_experts.w13.shape[0] == EXPERTS // 2
        right.w2[: EXPERTS // 2] = 0  # of the other rank
        assert error(model["experts"].forward_modular(*inputs()), right, fused=False) < RIGHT


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_bytes_that_a_sleeping_engine_gave_up(fake: FakeAiter, checkpoint: Any) -> None:
    """Sleep at level 2 keeps addresses and nothing else; waking, the engine reloads, or loads into place."""
    model = loaded(True, checkpoint(0))
    for again in (reload, load):
        for parameter in model.parameters():
            parameter.view(torch.uint8).fill_(0xFF)
        again(model, checkpoint(1))
        assert off(model, checkpoint(1)) < RIGHT


def test_this_package_on_the_engines_model(fake: FakeAiter) -> None:
    model = loaded(True, quark(0))
    weight = model["experts"].mxfp4_experts.w13
    assert torch.equal(weight.dequantize(torch.float64), quark(0).w13)
    prepare(model)
    reload(model, quark(1))
    assert torch.equal(weight.dequantize(torch.float64), quark(1).w13)
    with refit(model):
        assert weight.is_shuffled is False
    weight.copy_(quark(2).w13.float())
    model["experts"].mxfp4_experts.w2.copy_(quark(2).w2.float())
    assert off(model, quark(2)) < RIGHT
    with pytest.raises(RuntimeError, match="handed out"):
        weight.unshuffle_()


def test_dummy_weights_tell_nothing_until_real_ones_come(fake: FakeAiter) -> None:
    """As in rollouts that start with --load-format dummy."""
    for checkpoint in (quark, gpt_oss):
        model = make(True, "quark" if checkpoint is quark else "gpt_oss_mxfp4")
        process(model)
        assert not any(
            parameter.view(torch.uint8).any() for name, parameter in model.named_parameters() if "scale" not in name
        )
        load(model, checkpoint(0))
        assert off(model, checkpoint(0)) < RIGHT
        reload(model, checkpoint(1))
        assert off(model, checkpoint(1)) < RIGHT
        assert torch.equal(model["experts"].mxfp4_experts.w13.dequantize(torch.float64), checkpoint(1).w13)
        load(model, checkpoint(2))
        assert off(model, checkpoint(2)) < RIGHT


@pytest.mark.parametrize("intermediate", [384, 160])
def test_sizes_that_the_engine_pads(fake: FakeAiter, intermediate: int) -> None:
    alone, ours = (make(owned, intermediate=intermediate) for owned in (False, True))
    for model in (alone, ours):
        load(model, quark(0, intermediate))
        process(model)
    out = [model["experts"].forward_modular(*inputs()) for model in (alone, ours)]
    assert torch.equal(*out)


# --- standing aside


def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vLLM's logger shows."""
    from vllm import logger as vllm_logger

    lines: list[str] = []
    vllm_logger._print_info_once.cache_clear()
    logger = logging.getLogger("vllm.plugins.shuffled_tensor")
    monkeypatch.setattr(logger, "handlers", [handler := logging.Handler()])
    logger.setLevel(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    return lines


def test_one_line_says_that_it_is_on(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch)
    loaded(True, quark(0))
    loaded(True, quark(0))
    assert [line for line in lines if "owns" in line] == [
        "shuffled_tensor owns MXFP4 experts: mxfp4_separated, 0.00 GiB a layer"
    ]


def test_turned_off(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch)
    monkeypatch.setenv("SHUFFLED_TENSOR_PLUGIN", "0")
    _forget(monkeypatch)
    register()
    assert lines == ["shuffled_tensor stands aside: SHUFFLED_TENSOR_PLUGIN=0"]
    _nothing_is_registered()


def test_a_vllm_that_names_things_otherwise(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.model_executor.layers.quantization.mxfp4 as renamed

    lines = said(monkeypatch)
    _forget(monkeypatch)
    monkeypatch.delattr(renamed, "GptOssMxfp4Config")
    register()
    assert len(lines) == 1
    assert "names things otherwise" in lines[0]
    assert "GptOssMxfp4Config" in lines[0]
    _nothing_is_registered()


def test_another_gpu(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms.rocm as rocm

    lines = said(monkeypatch)
    _forget(monkeypatch)
    monkeypatch.setattr(rocm, "on_gfx950", lambda: False)
    register()
    assert lines == ["shuffled_tensor stands aside: it is for gfx950 GPUs, and this is another one"]
    _nothing_is_registered()


def test_two_plugins(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

    lines = said(monkeypatch)
    _forget(monkeypatch)

    @quantization.register_quantization_config("quark")
    class Theirs(QuarkConfig):
        pass

    register()
    assert lines == [f"shuffled_tensor stands aside: another plugin has registered quantization 'quark': {__name__}"]
    assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG == {"quark": Theirs}


def test_registered_twice(fake: FakeAiter) -> None:
    register()
    register()
    assert off(loaded(True, quark(0)), quark(0)) < RIGHT


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization

    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})


def _nothing_is_registered() -> None:
    from vllm.model_executor.layers import quantization

    assert not quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG


@pytest.mark.parametrize(("group", "field"), [("uva", "cpu_offload_gb"), ("prefetch", "offload_group_size")])
def test_offloaded_weights_are_left_to_vllm(fake: FakeAiter, monkeypatch: Any, group: str, field: str) -> None:
    from vllm.config import get_current_vllm_config

    lines = said(monkeypatch)
    monkeypatch.setattr(getattr(get_current_vllm_config().offload_config, group), field, 8)
    model = make(True)
    load(model, quark(0))
    process(model)
    assert not hasattr(model["experts"], "mxfp4_experts")
    assert off(model, quark(0)) < RIGHT
    assert "weights are offloaded" in lines[-1]


def test_a_checkpoint_that_is_mxfp4_in_part(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization import get_quantization_config

    lines = said(monkeypatch)
    register()
    config = get_quantization_config("quark").from_config(QUARK | {"exclude": ["model.layers.0.mlp.experts"]})
    layer = v.make_layer(config, (EXPERTS, HIDDEN, INTERMEDIATE))
    assert type(layer.quant_method) is UnquantizedFusedMoEMethod
    assert not lines


@pytest.mark.parametrize("kind", ["quark", "mxfp4", "gpt_oss_mxfp4"])
def test_the_configuration_reaches_another_process(fake: FakeAiter, kind: str) -> None:
    """vLLM makes it in its front end, and sends it to those that load the model."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    config = get_quantization_config(kind).from_config(QUARK)
    for sent in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert (type(sent).__name__, vars(sent).keys()) == (type(config).__name__, vars(config).keys())
        layer = v.make_layer(sent, (EXPERTS, HIDDEN, INTERMEDIATE))
        assert "Owning" in type(layer.quant_method).__qualname__


def test_a_shared_expert_that_is_quantised_into_them(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    lines = said(monkeypatch)
    monkeypatch.setattr(
        RoutedExperts, "_get_fused_shared_expert_quantizer", lambda self: lambda weight: (weight, weight)
    )
    model = make(True)
    process(model)
    assert not hasattr(model["experts"], "mxfp4_experts")
    assert "a shared expert is quantised into them" in lines[-1]


def test_another_backend_of_vllm(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
    from vllm.model_executor.layers.quantization.quark import quark_moe

    emulation = Mxfp4MoeBackend.EMULATION
    monkeypatch.setattr(quark_moe, "select_mxfp4_moe_backend", lambda *_, **__: (emulation, nn.Module))
    lines = said(monkeypatch)
    make(True)
    assert lines[-1] == "shuffled_tensor leaves MXFP4 experts to vLLM: their backend is EMULATION"


def test_weights_that_were_laid_out_already(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch)
    model = make(True)
    load(model, quark(0))
    model["experts"].w13_weight.is_shuffled = True
    process(model)
    assert "w13_weight is tagged as shuffled already" in lines[-1]
    assert not hasattr(model["experts"], "mxfp4_experts")


def test_a_layout_that_is_not_known(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The day the engine lays out otherwise, the layer is its own."""
    import aiter.ops.shuffle

    lines = said(monkeypatch)
    model = make(True)
    load(model, quark(0))
    monkeypatch.setattr(
        aiter.ops.shuffle, "shuffle_weight", lambda weight, **_: weight.view(torch.uint8).flip(1).view(weight.dtype)
    )
    process(model)
    assert "in no way that is known here" in lines[-1]
    assert not hasattr(model["experts"], "mxfp4_experts")
    for parameter in model.parameters():
        assert not hasattr(parameter.weight_loader, "__wrapped__")


def test_a_reload_in_a_layout_that_is_not_known(fake: FakeAiter, monkeypatch: pytest.MonkeyPatch) -> None:
    import aiter.ops.shuffle

    model = loaded(True, quark(0))
    monkeypatch.setattr(
        aiter.ops.shuffle, "shuffle_weight", lambda weight, **_: weight.view(torch.uint8).flip(1).view(weight.dtype)
    )
    with pytest.raises(RuntimeError, match="in no way that is known here"):
        reload(model, quark(1))
    experts = model["experts"].mxfp4_experts
    assert torch.equal(experts.w13.dequantize(torch.float64), quark(0).w13)
