# SPDX-License-Identifier: MIT
"""Weights of this package as parameters of vLLM's layers, without the plugin: every step of vLLM's is right, or says what
is wrong. See `docs/INTEGRATIONS.md` for what to do instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from shuffled_tensor import ShuffledMXFP4Tensor, install_, wrap_experts_
from shuffled_tensor.testing import FakeAiter

from . import vllm_layer as v
from .layers import EXPERTS, HIDDEN, INTERMEDIATE, quark
from .test_vllm import load, make, off, process, reload

v.make_importable()


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeAiter]:
    with v.vllm() as fake:
        yield fake


@pytest.fixture
def model() -> nn.Module:
    model = make(False)
    load(model, quark(0))
    wrap_experts_(model["experts"], row_order="contiguous")
    return model


@pytest.mark.parametrize("owned", [False, True])
def test_laying_out(owned: bool) -> None:
    model = make(owned)
    load(model, quark(0))
    wrap_experts_(model["experts"], row_order="contiguous")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):  # its scale is None
        process(model)


def test_calling_the_kernel(model: nn.Module) -> None:
    other = make(False)
    load(other, quark(0))
    process(other)
    for name in ("w13_weight", "w2_weight"):
        setattr(other["experts"], name, getattr(model["experts"], name))
    with pytest.raises(NotImplementedError, match=r"vllm\.rocm_aiter_fused_moe\.default is not defined on a Shuffled"):
        off(other, quark(0))


def test_loading(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="packed bytes are written through .qdata_view and .scale_view"):
        load(model, quark(1))
    assert torch.equal(model["experts"].w13_weight.dequantize(torch.float64), quark(0).w13)


def test_layerwise_reload(model: nn.Module) -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    weight = model["experts"].w13_weight
    record_metadata_for_reloading(model)
    with pytest.raises(TypeError, match="packed bytes are written through .qdata_view and .scale_view"):
        reload(model, quark(1))
    assert torch.equal(weight.dequantize(torch.float64), quark(0).w13)


def test_a_reload_that_makes_it_anew_from_its_meta_tensor(model: nn.Module) -> None:
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

    weight = model["experts"].w13_weight
    meta = to_meta_tensor(weight)
    assert (meta.device.type, meta.shape, meta.weight_loader) == ("meta", weight.shape, weight.weight_loader)
    with pytest.raises(TypeError, match="object layout differs"):
        materialize_meta_tensor(meta)


def test_rebalancing(model: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match="cannot be viewed as"):
        list(model["experts"].get_expert_weights())


def test_sharded_state(model: nn.Module) -> None:
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    with pytest.raises(RuntimeError, match="invalid python storage"):
        ShardedStateLoader._filter_subtensors(model.state_dict())


def test_checksums(model: nn.Module) -> None:
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

    digests = compute_tensor_digests(model)
    assert len(digests) == 4
    model["experts"].w13_weight[0] = model["experts"].w13_weight[1]
    changed = compute_tensor_digests(model)
    assert [digests[name] == changed[name] for name in digests].count(False) == 2  # the codes and scales of w13


def test_replacing_it_by_another(model: nn.Module) -> None:
    """In place: whoever holds the address sees the new values."""
    from vllm.model_executor.utils import replace_parameter

    layer = model["experts"]
    weight, address = layer.w13_weight, layer.w13_weight.qdata.data_ptr()
    other = copy.deepcopy(layer.w13_weight.data)
    other.copy_(quark(1).w13.float())
    other.tag = "new"
    replace_parameter(layer, "w13_weight", other)
    assert layer.w13_weight is weight
    assert weight.tag == "new"
    assert weight.qdata.data_ptr() == address
    assert torch.equal(weight.dequantize(torch.float64), quark(1).w13)


def test_offloading(model: nn.Module) -> None:
    """As the prefetch offloader does, whatever the parameter is."""
    layer = model["experts"]
    with pytest.raises(TypeError, match=r"\.data takes a ShuffledMXFP4Tensor"):
        layer.w13_weight.data = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2, dtype=torch.uint8)
    assert isinstance(layer.w13_weight, ShuffledMXFP4Tensor)


def test_replacing_a_plain_parameter_by_it(model: nn.Module) -> None:
    """torch lets a plain parameter take a wrapper's inside, which has no memory, and leaves no way to refuse it. What is
    written there raises; `install_` is what puts a weight in a parameter's place."""
    from vllm.model_executor.utils import replace_parameter

    plain = make(False)["experts"]
    replace_parameter(plain, "w13_weight", model["experts"].w13_weight.data)
    assert not isinstance(plain.w13_weight, ShuffledMXFP4Tensor)
    with pytest.raises(RuntimeError, match="mutable data pointer|Cannot access data pointer"):
        plain.w13_weight.data.fill_(0)

    other = make(False)["experts"]
    install_(other, "w13_weight", model["experts"].w13_weight.data)
    assert torch.equal(other.w13_weight.dequantize(torch.float64), quark(0).w13)
    assert other.w13_weight.weight_loader is not None
