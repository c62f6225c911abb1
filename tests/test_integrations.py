# SPDX-License-Identifier: MIT
"""What engines need of this package, on a model of an engine; and the engines' own code, where its wheels are here.

ATOM has no wheel. The classes here are a model of its steps, as they were at ffdf3bb5dd: what it registers, how its loader
writes, what it puts in the place of its parameters when it lays them out, and how it sleeps.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import owners, refit, wrap_experts_
from shuffled_tensor.integrations.atom import OwnedExperts, OwnedMemory
from shuffled_tensor.integrations.experts import LeftAlone, lay_out

from .support.bytes import marked, marked_parts
from .support.judges import by_formula, dense

ROOT = Path(__file__).parents[1]
EXPERTS, HIDDEN, INTERMEDIATE = 3, 512, 256
KINDS = ("mxfp4_separated", "mxfp4_moe")
FP4 = torch.float4_e2m1fn_x2


class ModelledLayer(nn.Module):
    w13_weight: Any
    w2_weight: Any

    def __init__(self, method: ModelledMethod, bias: bool = False) -> None:
        super().__init__()
        self.quant_method = method
        for name, rows, columns in (("w13", 2 * INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE)):
            codes = torch.zeros(EXPERTS, rows, columns // 2, dtype=torch.uint8).view(FP4)
            self.put(f"{name}_weight", codes, self.load)
            self.put(f"{name}_weight_scale", torch.zeros(EXPERTS, rows, columns // 32, dtype=torch.uint8), self.load)
        self.w13_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * INTERMEDIATE), requires_grad=False) if bias else None
        if bias:
            self.w13_bias.weight_loader = lambda parameter, data: parameter.data.copy_(data)

    def put(self, name: str, data: Tensor, loader: Any = None) -> None:
        parameter = nn.Parameter(data, requires_grad=False)
        if loader is not None:
            parameter.weight_loader = loader
        setattr(self, name, parameter)

    @staticmethod
    def load(parameter: nn.Parameter, data: Tensor, shard: str, expert: int) -> None:
        into = parameter.data[expert]
        if shard in ("w1", "w3"):
            half = into.shape[0] // 2
            into = into.narrow(0, 0 if shard == "w1" else half, half)
        (into.view(torch.uint8) if into.dtype == FP4 else into).copy_(data)


class ModelledMethod:
    def __init__(self, kind: str, interleaved: bool = False) -> None:
        self.kind, self.interleaved = kind, interleaved

    def process_weights_after_loading(self, layer: ModelledLayer) -> None:
        for name, gate_up in (("w13_weight", True), ("w2_weight", False)):
            codes, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
            rows = [part.view(torch.uint8) for part in (codes.data, scale.data)]
            if gate_up and self.interleaved:
                rows = [part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for part in rows]
            codes.data = by_formula("weight", rows[0], self.kind, gate_up).view(FP4)
            codes.is_shuffled = True
            layer.put(f"{name}_scale", by_formula("scale", rows[1], self.kind, gate_up).flatten(0, 1))
        if layer.w13_bias is not None and self.interleaved:
            layer.w13_bias.data = layer.w13_bias.data.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)


class Method(OwnedExperts, ModelledMethod):
    pass


class ModelledRunner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _release_weights(self) -> None:
        self.released = {name: (one.shape, one.dtype) for name, one in self.model.named_parameters()}
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def _resume_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            shape, dtype = self.released[name]
            parameter.data = (
                torch.full(shape, 0xEE, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.ones(shape)
            )


class Runner(OwnedMemory, ModelledRunner):
    pass


def checkpoint(salt: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "w13_weight": marked_parts(EXPERTS, 2 * INTERMEDIATE, HIDDEN, salt),
        "w2_weight": marked_parts(EXPERTS, HIDDEN, INTERMEDIATE, salt + 9),
    }


def load(layer: ModelledLayer, parts: dict[str, tuple[Tensor, Tensor]], experts: range = range(EXPERTS)) -> None:
    for name, pair in parts.items():
        for suffix, data in zip(("", "_scale"), pair, strict=True):
            parameter = getattr(layer, name + suffix)
            for expert in experts:
                if name == "w2_weight":
                    parameter.weight_loader(parameter, data[expert], "w2", expert)
                else:
                    for shard, half in zip(("w1", "w3"), data[expert].chunk(2), strict=True):
                        parameter.weight_loader(parameter, half, shard, expert)


def check(layer: ModelledLayer, parts: dict[str, tuple[Tensor, Tensor]], *, interleaved: bool = False) -> None:
    """The engine's own bytes, and what this package says that they are."""
    method = layer.quant_method
    for (name, pair), weight in zip(parts.items(), layer.mxfp4_experts, strict=True):
        gate_up = name == "w13_weight"
        rows = pair
        if gate_up and interleaved:
            rows = tuple(part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for part in pair)
        for part, suffix, data in zip(("weight", "scale"), ("", "_scale"), rows, strict=True):
            found = getattr(layer, name + suffix).view(torch.uint8)
            assert torch.equal(found.flatten(), by_formula(part, data, method.kind, gate_up).flatten())
        assert torch.equal(weight.dequantize(torch.float64), dense(*rows))
        assert weight.is_shuffled
        assert weight.layout_locked


def loaded(kind: str, **options: Any) -> ModelledLayer:
    layer = ModelledLayer(Method(kind), **options)
    load(layer, checkpoint(0))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def addresses(layer: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in layer.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_bytes_are_owned_where_they_are(kind: str) -> None:
    layer = loaded(kind)
    before = addresses(layer)
    check(layer, checkpoint(0))
    for salt in (1, 2):
        load(layer, checkpoint(salt))
        check(layer, checkpoint(salt))
        layer.quant_method.process_weights_after_loading(layer)
        check(layer, checkpoint(salt))
    assert addresses(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_comes(kind: str) -> None:
    layer, right = loaded(kind), checkpoint(0)
    load(layer, checkpoint(1), range(1, 2))
    for name, pair in checkpoint(1).items():
        for own, new in zip(right[name], pair, strict=True):
            own[1] = new[1]
    check(layer, right)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_in_turn(kind: str) -> None:
    layer = ModelledLayer(Method(kind, interleaved=True), bias=True)
    for salt in (0, 1):
        for name, pair in checkpoint(salt).items():
            for suffix, data in zip(("", "_scale"), pair, strict=True):
                parameter = getattr(layer, name + suffix)
                for expert in range(EXPERTS):
                    parameter.weight_loader(parameter, data[expert], "all", expert)
        bias = torch.arange(2.0 * INTERMEDIATE * EXPERTS).view(EXPERTS, -1) + salt
        layer.w13_bias.weight_loader(layer.w13_bias, bias)
        layer.quant_method.process_weights_after_loading(layer)
        check(layer, checkpoint(salt), interleaved=True)
        assert layer.mxfp4_experts.w13.row_order == "interleaved"
        assert torch.equal(layer.w13_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_sleep_frees_the_memory_and_waking_takes_new(kind: str) -> None:
    layer = loaded(kind)
    runner = Runner(nn.ModuleList([layer]))
    held = [weakref.ref(weight.qdata) for weight in layer.mxfp4_experts]
    runner._release_weights()
    assert [each() for each in held] == [None, None]
    with pytest.raises(RuntimeError, match="this weight cannot be used: its bytes were given up"):
        layer.mxfp4_experts.w13.dequantize()
    runner._resume_weights()
    with pytest.raises(RuntimeError, match="this weight cannot be used: its bytes were given up"):
        layer.mxfp4_experts.w13.dequantize()
    load(layer, checkpoint(1))
    layer.quant_method.process_weights_after_loading(layer)
    check(layer, checkpoint(1))


@pytest.mark.parametrize("kind", KINDS)
def test_dummy_weights_stay_what_they_are(kind: str) -> None:
    layer = ModelledLayer(Method(kind))
    layer.quant_method.process_weights_after_loading(layer)
    assert not any(parameter.view(torch.uint8).any() for parameter in layer.parameters())
    load(layer, checkpoint(1))
    check(layer, checkpoint(1))


def test_weights_of_this_package_as_parameters() -> None:
    """Without the mixins: each step is right, or says what is wrong."""
    layer = ModelledLayer(ModelledMethod("mxfp4_separated"))
    load(layer, checkpoint(0))
    wrap_experts_(layer, row_order="contiguous")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):  # its scale is None
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises((TypeError, ValueError), match="copy_ takes"):
        load(layer, checkpoint(1))
    with pytest.raises(TypeError, match=r"\.data takes a ShuffledMXFP4Tensor"):
        ModelledRunner(layer)._release_weights()
    with pytest.raises(NotImplementedError, match=r"aten\.view\.dtype"):  # the bytes that a rebalance sends
        layer.w13_weight[0].view(torch.uint8)
    assert torch.equal(layer.w13_weight.dequantize(torch.float64), dense(*checkpoint(0)["w13_weight"]))


def test_an_update_by_this_package() -> None:
    layer = loaded("mxfp4_moe")
    update = refit(list(layer.mxfp4_experts)).begin()
    for weight, pair in zip(layer.mxfp4_experts, checkpoint(3).values(), strict=True):
        weight.qdata.copy_(pair[0])
        weight.scale.copy_(pair[1])
    update.end()
    check(layer, checkpoint(3))


def test_a_layer_that_is_no_layer_of_experts() -> None:
    layer = ModelledLayer(Method("mxfp4_moe"))
    layer.w2_weight.is_shuffled = True
    layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layer, "mxfp4_experts")


def test_other_sizes_in_the_place_of_owned_ones() -> None:
    layer = loaded("mxfp4_moe")
    for name in ("w13_weight", "w2_weight"):
        layer.put(name, marked(EXPERTS - 1, 512, getattr(layer, name).shape[2]), layer.load)
        layer.put(f"{name}_scale", marked(EXPERTS - 1, 512, getattr(layer, name).shape[2] // 16), layer.load)
    with pytest.raises(
        LeftAlone, match=r"weights of \[\(2, 512, 512\), \(2, 512, 256\)\], mxfp4_moe, rows contiguous, came"
    ):
        layer.quant_method.process_weights_after_loading(layer)
    for weight, pair in zip(layer.mxfp4_experts, checkpoint(0).values(), strict=True):
        assert torch.equal(weight.dequantize(torch.float64), dense(*pair))


def test_another_order_in_the_place_of_the_owned_one() -> None:
    layer = loaded("mxfp4_moe")
    for name, (codes, scale) in checkpoint(1).items():
        layer.put(name, codes.view(FP4), layer.load)
        layer.put(f"{name}_scale", scale, layer.load)
    layer.quant_method.kind = "mxfp4_separated"
    with pytest.raises(LeftAlone, match="mxfp4_separated, rows contiguous, came in the place of"):
        layer.quant_method.process_weights_after_loading(layer)
    for weight, pair in zip(layer.mxfp4_experts, checkpoint(0).values(), strict=True):
        assert torch.equal(weight.dequantize(torch.float64), dense(*pair))


def test_laid_out_anew_from_new_tensors_and_loaded_again() -> None:
    layer = loaded("mxfp4_moe")
    before = [weight.qdata.data_ptr() for weight in layer.mxfp4_experts]
    for name, (codes, scale) in checkpoint(1).items():
        layer.put(name, codes.view(FP4), layer.load)
        layer.put(f"{name}_scale", scale, layer.load)
    layer.quant_method.process_weights_after_loading(layer)
    check(layer, checkpoint(1))
    assert [getattr(layer, name).data_ptr() for name in checkpoint(0)] == before
    load(layer, checkpoint(2))
    check(layer, checkpoint(2))


def test_the_first_expert_tells_nothing() -> None:
    """As one that was pruned: another one tells."""
    parts = {name: tuple(data.clone() for data in pair) for name, pair in checkpoint(0).items()}
    parts["w13_weight"][0][0] = 0
    layer = ModelledLayer(Method("mxfp4_moe"))
    load(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    check(layer, parts)


@pytest.mark.parametrize("empty", [False, True])
def test_nothing_is_changed_in_a_layer_that_is_left_alone(empty: bool) -> None:
    parts = {name: tuple(data.clone() for data in pair) for name, pair in checkpoint(0).items()}
    if empty:
        parts["w13_weight"][0][0] = 0
    layers = [ModelledLayer(method) for method in (ModelledMethod("made_up"), Method("made_up"))]
    for layer in layers:
        load(layer, parts)
        layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layers[1], "mxfp4_experts")
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_an_engine_after_its_sleep(kind: str) -> None:
    """Its loader leaves the last rows and columns alone."""
    layer = loaded(kind)
    runner = Runner(nn.ModuleList([layer]))
    runner._release_weights()
    runner._resume_weights()
    layer.w2_weight.weight_loader = layer.mxfp4_experts._through_view(
        lambda parameter, data, *_: parameter.data[:, :480, :96].copy_(data), "w2_weight"
    )
    new = checkpoint(1)["w2_weight"][0]
    layer.w2_weight.weight_loader(layer.w2_weight, new[:, :480, :96])
    layer.quant_method.process_weights_after_loading(layer)
    found = layer.mxfp4_experts.view("w2_weight").clone()
    assert torch.equal(found[:, :480, :96], new[:, :480, :96])
    assert not found[:, 480:].any()
    assert not found[:, :, 96:].any()
    assert (layer.mxfp4_experts.view("w2_weight_scale").clone() == 127).all()


def test_bias_rows_after_a_sleep() -> None:
    layer = ModelledLayer(Method("mxfp4_moe", interleaved=True), bias=True)
    interleaved = {"w13_weight": checkpoint(0)["w13_weight"], "w2_weight": checkpoint(0)["w2_weight"]}
    for name, pair in interleaved.items():
        for suffix, data in zip(("", "_scale"), pair, strict=True):
            for expert in range(EXPERTS):
                getattr(layer, name + suffix).weight_loader(getattr(layer, name + suffix), data[expert], "all", expert)
    layer.quant_method.process_weights_after_loading(layer)
    runner = Runner(nn.ModuleList([layer]))
    runner._release_weights()
    runner._resume_weights()
    bias = torch.arange(2.0 * INTERMEDIATE * EXPERTS).view(EXPERTS, -1)
    layer.w13_bias.weight_loader(layer.w13_bias, bias)
    assert torch.equal(layer.w13_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], 1))


def test_memory_that_comes_back_is_known_to_be_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator may give the same again, whose owner was forgotten when it was freed."""
    weight = loaded("mxfp4_moe").mxfp4_experts.w13
    memory = weight.qdata, weight.scale
    weight._storage.give_up()
    known: list[Tensor] = []
    monkeypatch.setattr(owners, "register", lambda storage, record, *data: known.extend(data))
    weight._storage.take(*memory)
    assert [each.data_ptr() for each in known] == [each.data_ptr() for each in memory]


def test_a_layer_on_the_meta_device() -> None:
    layer = ModelledLayer(Method("mxfp4_moe")).to("meta")
    assert lay_out(layer, lambda: None) == "w13_weight has no memory"


def test_a_parameter_that_nobody_loads() -> None:
    layer = ModelledLayer(Method("mxfp4_moe"))
    del layer.w2_weight_scale.weight_loader
    assert lay_out(layer, lambda: None) == "nobody loads w2_weight_scale"


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHUFFLED_TENSOR_PLUGIN", "0")
    assert not hasattr(loaded("mxfp4_moe"), "mxfp4_experts")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_find_the_plugin(engine: str) -> None:
    from importlib.metadata import entry_points

    group = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}[engine]
    (plugin,) = (each for each in entry_points(group=group) if each.name == "shuffled_tensor")
    assert plugin.load().__module__ == f"shuffled_tensor.integrations.{engine}"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_engines_own_code(engine: str) -> None:
    """Some of tests/engines/, in the environment that `make test-engines` has made."""
    python = ROOT / ".engines/venv/bin/python"
    if sys.platform == "win32" or not (ROOT / ".engines/installed").exists():
        pytest.skip("waits for the engines' wheels: `make test-engines` fetches them")
    tests = [
        f"tests/engines/test_{engine}.py",
        "-W",
        "ignore",
        "-k",
        "checkpoint_says or rebalance",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
