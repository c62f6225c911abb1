# SPDX-License-Identifier: MIT
"""torch.distributed.checkpoint: one process, and two that hold the experts of one weight."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.judges import dense
from .support.layer import MoE, make_weight, weight_parts

pytestmark = [
    # torch says so of any call in one process
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    # and torch 2.10 of itself
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

KINDS = ("none", "mxfp4_moe", "mxfp4_separated")


def empty(weight: torch.Tensor, kind: str) -> ShuffledMXFP4Tensor:
    made = torch.zeros_like(weight)
    assert isinstance(made, ShuffledMXFP4Tensor)
    return made.shuffle_(kind)


@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("ours", KINDS)
def test_into_a_differently_laid_out_model(ours: str, theirs: str, tmp_path: Path) -> None:
    saved, loaded = MoE(), MoE()
    for weight in saved.parameters():
        weight.shuffle_(ours)
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    for weight in loaded.parameters():
        weight.zero_().shuffle_(theirs)
    before = {name: weight.qdata.data_ptr() for name, weight in loaded.named_parameters()}
    dcp.load(loaded.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight.dequantize(torch.float64), dense(*weight_parts(name.removesuffix("_weight"))))
        assert weight.qdata.data_ptr() == before[name]
        assert weight._storage.layout.name == theirs


def test_a_file_does_not_depend_on_the_layout_in_memory(tmp_path: Path) -> None:
    files = []
    for kind in KINDS:
        dcp.save({"w": make_weight("w13").shuffle_(kind)}, checkpoint_id=tmp_path / kind, no_dist=True)
        files.append((tmp_path / kind / "__0_0.distcp").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "stager",
    [lambda: None, lambda: DefaultStager(StagingOptions(False, True, True, False)), BlockingAsyncStager],
    ids=["torch's own choice", "in a thread, shared memory", "blocking"],
)
def test_what_was_staged_is_what_is_saved(stager: Callable[[], Any], kind: str, tmp_path: Path) -> None:
    model = MoE()
    weights = {name.removesuffix("_weight"): weight.shuffle_(kind) for name, weight in model.named_parameters()}
    expert, rows = weights["w13"][1], weights["w2"][:, 16:48]
    expected = {name: dense(*weight_parts(name)) for name in ("w13", "w2")}
    expected |= {"expert": expected["w13"][1], "rows": expected["w2"][:, 16:48]}
    given = {name: weight.detach() for name, weight in {**weights, "expert": expert, "rows": rows}.items()}
    saved = dcp.async_save(given, checkpoint_id=tmp_path, no_dist=True, async_stager=stager())
    if not isinstance(saved, Future):  # it is staged in another thread
        saved.staging_completion.result()
        saved = saved.upload_completion
    for weight in weights.values():
        weight.zero_()
    saved.result()
    loaded = {name: empty(weight.clone(), "mxfp4_separated") for name, weight in given.items()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    for name, weight in loaded.items():
        assert torch.equal(weight.dequantize(torch.float64), expected[name])
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 1.2 * sum(weight.numel() for weight in given.values())  # packed, as they are: not in bfloat16


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh, expected = init_device_mesh("cpu", (2,)), dense(*weight_parts("w13"))
    experts = slice(2 * rank, 2 * rank + 2)
    own = make_weight("w13").shuffle_("mxfp4_moe")[experts].clone()
    dcp.save({"w": DTensor.from_local(own, mesh, [Shard(0)])}, checkpoint_id=f"{folder}/saved")

    sharded = DTensor.from_local(empty(own, "mxfp4_separated"), mesh, [Shard(0)])
    dcp.load({"w": sharded}, checkpoint_id=f"{folder}/saved")
    found = sharded.to_local()
    assert isinstance(found, ShuffledMXFP4Tensor)
    assert found.shuffle_kind == "mxfp4_separated"
    assert torch.equal(found.dequantize(torch.float64), expected[experts])
    whole = empty(make_weight("w13"), "mxfp4_moe")
    dcp.load({"w": whole}, checkpoint_id=f"{folder}/saved")
    assert torch.equal(whole.dequantize(torch.float64), expected)

    changed = make_weight("w13").shuffle_("mxfp4_moe")[experts].clone()
    saving = dcp.async_save({"w": DTensor.from_local(changed, mesh, [Shard(0)])}, checkpoint_id=f"{folder}/async")
    changed.zero_()
    saving.result()
    dcp.load({"w": whole.zero_()}, checkpoint_id=f"{folder}/async")
    assert torch.equal(whole.dequantize(torch.float64), expected)
    dist.destroy_process_group()


def test_experts_of_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    whole = empty(make_weight("w13"), "mxfp4_separated")  # and in one process, without the others
    dcp.load({"w": whole}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert torch.equal(whole.dequantize(torch.float64), dense(*weight_parts("w13")))
