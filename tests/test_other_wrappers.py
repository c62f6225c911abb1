# SPDX-License-Identifier: MIT
"""Tensors of other libraries that wrap tensors: what is not taken says so before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe

from .support.bytes import marked_parts, weight_of
from .support.judges import assert_holds
from .support.layer import make_layer

SHAPE = (2, 512, 512)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(tensor: Tensor) -> Tensor:
    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


WRAPPED: dict[str, Callable[[Tensor], Tensor]] = {"DTensor": sharded, "TwoTensor": lambda x: TwoTensor(x, x.clone())}

WRITES: dict[str, Callable[[ShuffledMXFP4Tensor, Tensor], Any]] = {
    "copy_": lambda weight, source: weight.copy_(source),
    "copy_ to some": lambda weight, source: weight[1:].copy_(source[1:]),
    "index_copy_": lambda weight, source: weight.index_copy_(0, torch.arange(2), source),
    "index_put_": lambda weight, source: weight.__setitem__(torch.arange(2), source),
    "w[:] =": lambda weight, source: weight.__setitem__(slice(None), source),
    "foreach": lambda weight, source: torch._foreach_copy_([weight], [source]),
    "refit_from_hp_": lambda weight, source: weight.refit_from_hp_(source),
    "load_state_dict": lambda weight, source: module_of(weight).load_state_dict({"w": source}),
}


def module_of(weight: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(weight)
    return module


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_written(packed: bool, wrapped: str, write: str) -> None:
    if packed and (wrapped == "TwoTensor" or write == "copy_ to some"):
        pytest.skip("a part of it is made by the other library")
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, "mxfp4_moe")
    values = weight_of(marked_parts(*SHAPE, salt=1)) if packed else torch.ones(SHAPE)
    with pytest.raises(Exception, match=f"is a {wrapped} of shape .*, whose parts are not seen; pass"):
        WRITES[write](weight, WRAPPED[wrapped](values))
    assert_holds(weight, parts, "mxfp4_moe")


def test_a_value_in_a_wrapper_is_not_taken() -> None:
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    with pytest.raises(TypeError, match=r"value is a TwoTensor of shape \[\], whose parts are not seen; pass"):
        weight.fill_(TwoTensor(torch.tensor(1.0), torch.tensor(2.0)))
    assert_holds(weight, marked_parts(*SHAPE), "mxfp4_moe")


def test_bytes_in_wrappers_are_not_taken() -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts)
    for wrap in WRAPPED.values():
        with pytest.raises(TypeError, match=r"qdata is a \w+ of shape \[2, 512, 256\]"):
            ShuffledMXFP4Tensor(*map(wrap, parts), gate_up=False)
        with pytest.raises(TypeError, match=r"weight is a \w+ of shape"):
            ShuffledMXFP4Tensor.from_hp(wrap(torch.ones(SHAPE)), gate_up=False)
        with pytest.raises(TypeError, match=r"source is a \w+ of shape"):
            weight.qdata_view.copy_(wrap(marked_parts(*SHAPE, salt=1)[0]))
    assert_holds(weight, parts, "none")


@pytest.mark.parametrize("argument", ["hidden_states", "w13", "w2", "topk_weight", "topk_ids"])
def test_a_layer_names_the_argument(argument: str) -> None:
    layer = make_layer()
    layer[argument] = sharded(layer[argument])
    with pytest.raises(TypeError, match=f"{argument} is a DTensor of shape .* pass its .to_local"):
        fused_moe(**layer)


def test_ddp_says_how_to_leave_a_weight_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), module_of(weight_of(marked_parts(*SHAPE), "mxfp4_moe")))
    with pytest.raises(NotImplementedError, match="_set_params_and_buffers_to_ignore_for_model"):
        nn.parallel.DistributedDataParallel(module)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["1.w"])
    nn.parallel.DistributedDataParallel(module)
    assert_holds(module[1].w, marked_parts(*SHAPE), "mxfp4_moe")
