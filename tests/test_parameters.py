# SPDX-License-Identifier: MIT
"""What modules and loaders do to a Parameter: convert it, make it again, and count its bytes. It stays what it is, with
the attributes that engines have set on it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.bytes import marked_parts, weight_of
from .support.judges import assert_holds, dense

SHAPE = (2, 512, 512)


class Engine(nn.Module):
    """As engines have them: a plain and a packed Parameter, with a loader."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(weight_of(marked_parts(*SHAPE), "mxfp4_moe"))
        self.plain = nn.Parameter(torch.ones(2), requires_grad=False)
        for parameter in self.parameters():
            parameter.weight_loader = print
            parameter.extra = {"tp": 2}


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to where it is": lambda module: module.to("cpu"),
    "to what it is": lambda module: module.to(torch.float32),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.float64),
    "cpu": lambda module: module.cpu(),
    "meta": lambda module: module.to("meta"),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "share_memory": lambda module: module.share_memory(),
    "_apply": lambda module: module._apply(torch.clone),
    "_apply nothing": lambda module: module._apply(lambda tensor: tensor),
}


@pytest.fixture(params=["", "overwrite", "swap", "overwrite and swap"])
def flags(request: pytest.FixtureRequest) -> Iterator[str]:
    future = torch.__future__
    future.set_overwrite_module_params_on_conversion("overwrite" in request.param)
    future.set_swap_module_params_on_conversion("swap" in request.param)
    yield request.param
    future.set_overwrite_module_params_on_conversion(False)
    future.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_conversion_keeps_attributes(conversion: str, mode: Callable[[], Any], flags: str) -> None:
    if flags == "" and mode is torch.inference_mode:
        mode = torch.no_grad  # a plain Parameter's .data takes no inference tensor
    module = Engine()
    before = module.packed
    with mode():
        CONVERSIONS[conversion](module)
    assert module.packed is before
    assert type(before) is ShuffledMXFP4Tensor
    assert isinstance(before, nn.Parameter)
    assert vars(before) == {"_is_param": True, "weight_loader": print, "extra": {"tp": 2}}
    if flags == "" and conversion != "meta":  # where a plain one keeps its own
        assert module.plain.weight_loader is print
    assert not vars(module.state_dict()["packed"]).keys() & {"weight_loader", "extra", "_is_param"}
    assert not hasattr(nn.Parameter(before), "weight_loader")  # as of a plain one
    if conversion not in ("meta", "to_empty"):
        assert torch.equal(before.dequantize(torch.float64), dense(*marked_parts(*SHAPE)))
        assert before.is_shuffled


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded])
def test_a_copy_keeps_attributes(copied: Callable[[nn.Module], Any]) -> None:
    other = copied(Engine())
    assert isinstance(other.packed, nn.Parameter)
    assert other.packed.weight_loader is print
    assert other.packed.extra == {"tp": 2}
    assert torch.equal(other.packed.dequantize(torch.float64), dense(*marked_parts(*SHAPE)))


# --- made again: accelerate's calls


def test_a_parameter_is_made_again_of_its_data_and_attributes() -> None:
    """``param_cls(new_value, requires_grad=...)`` and ``param_cls(parameter.to(device), **parameter.__dict__)``."""
    parameter = Engine().packed
    parts = marked_parts(*SHAPE)
    again = type(parameter)(parameter.data, requires_grad=parameter.requires_grad)
    assert isinstance(again, nn.Parameter)
    assert vars(again) == {"_is_param": True}
    attributes = vars(parameter)
    attributes["requires_grad"] = parameter.requires_grad
    with_attributes = type(parameter)(parameter, **attributes)
    assert vars(with_attributes) == {"_is_param": True, "weight_loader": print, "extra": {"tp": 2}}
    for made in (again, with_attributes):
        assert_holds(made, parts, "mxfp4_moe")
        assert made.qdata.data_ptr() == parameter.qdata.data_ptr()
    parameter.unshuffle_()
    assert not again.is_shuffled  # one state
    assert type(parameter)(parameter.to("meta"), **attributes).is_meta
    one = type(parameter)(parameter[1], requires_grad=False)
    assert torch.equal(one.dequantize(torch.float64), dense(*parts)[1])


def test_what_a_weight_is_cannot_be_said_again() -> None:
    weight = Engine().packed
    for named in ({"gate_up": False}, {"shuffle_kind": "mxfp4_moe"}, {"dtype": torch.float16}):
        with pytest.raises(TypeError, match=f"is taken as it is, so {next(iter(named))} cannot be given with it"):
            ShuffledMXFP4Tensor(weight, **named)
    with pytest.raises(TypeError, match="quantise float weights with ShuffledMXFP4Tensor.from_hp"):
        ShuffledMXFP4Tensor(torch.zeros(2, 64, 64), requires_grad=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'row_ordr'"):
        ShuffledMXFP4Tensor(*marked_parts(1, 64, 64), gate_up=False, row_ordr="contiguous")


# --- bytes


def packed_bytes(experts: int, rows: int, columns: int) -> int:
    return experts * rows * (columns // 2 + columns // 32)


def test_bytes_are_those_in_memory() -> None:
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    assert weight.nbytes == packed_bytes(*SHAPE)
    assert weight[1].nbytes == weight[:1].nbytes == packed_bytes(1, 512, 512)
    assert weight[:, :64, 32:64].nbytes == packed_bytes(2, 64, 32)
    padded = weight_of(marked_parts(3, 96, 160), gate_up=True)
    assert padded.nbytes == packed_bytes(3, 512, 256)  # with pads
    assert padded.nbytes == sum(part.untyped_storage().nbytes() for part in (padded.qdata, padded.scale))
    assert padded.to("meta").nbytes == padded.nbytes
    assert weight.qdata_view.nbytes == 2 * 512 * 256
