# SPDX-License-Identifier: MIT
"""Weights of several ranks, over gloo: what travels, what is refused, and what every rank holds afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shuffled_tensor import ShuffledMXFP4Tensor, agree_, fused_moe, sharded
from shuffled_tensor.distributed import collectives
from shuffled_tensor.tensor.storage import PackedStorage

from .support.bytes import coded, moderate_scales
from .support.judges import dense, dense_moe, relative_error
from .support.ranks import Rank, on_ranks

E, H, I = 8, 384, 128  # noqa: E741
KINDS = ("mxfp4_moe", "none", "mxfp4_separated", "mxfp4_moe")
"""By rank, where ranks differ."""
NAMES = ("w13", "w2")


def parts_of(name: str, experts: int = E, salt: int = 0) -> tuple[Tensor, Tensor]:
    rows, columns, own = (2 * I, H, 0) if name == "w13" else (H, I, 3)
    scale = moderate_scales(experts, rows, columns // 32, salt=7 + salt)
    return coded(experts, rows, columns // 2, salt=own + salt), scale


def make(name: str, kind: str = "none", experts: int = E, salt: int = 0, **given: Any) -> ShuffledMXFP4Tensor:
    order = {"gate_up": True, "row_order": "contiguous"} if name == "w13" else {"gate_up": False}
    return ShuffledMXFP4Tensor(*parts_of(name, experts, salt), **order, **given).shuffle_(kind)


def values(name: str, experts: int = E, salt: int = 0) -> Tensor:
    return dense(*parts_of(name, experts, salt))


def assert_is(weight: Tensor, expected: Tensor, kind: str | None = None) -> None:
    assert type(weight) is ShuffledMXFP4Tensor
    assert weight.shape == expected.shape
    assert torch.equal(weight.dequantize(torch.float64), expected)
    assert kind is None or weight._storage.layout.name == kind


def own(at: Rank, size: int = E) -> slice:
    each = size // at.world
    return slice(at.rank * each, (at.rank + 1) * each)


# --- agreement


@on_ranks(2, 4)
def test_agreement_brings_layouts_together(at: Rank) -> None:
    weights = {name: make(name, KINDS[at.rank], salt=at.rank) for name in NAMES}
    addresses = [weight.qdata.data_ptr() for weight in weights.values()]
    agree_(weights.values())
    at.alike([weight._storage.layout.name for weight in weights.values()])
    assert addresses == [weight.qdata.data_ptr() for weight in weights.values()]
    for name, weight in weights.items():
        assert_is(weight, values(name, salt=at.rank))
        assert weight.layout_locked
        with pytest.raises(RuntimeError, match="agreed on with other ranks"):
            weight.shuffle_("none" if weight.is_shuffled else "mxfp4_moe")
    agree_(weights.values())  # again


@on_ranks(2)
def test_agreement_takes_the_layout_that_one_rank_has_fixed(at: Rank) -> None:
    weight = make("w2", "mxfp4_moe")
    if at.rank == 1:
        weight = make("w2", "mxfp4_separated", shuffle_kind="mxfp4_separated")
    agree_(weight)
    assert_is(weight, values("w2"), "mxfp4_separated")


@on_ranks(2, 4)
def test_agreement_refuses_alike_on_every_rank(at: Rank) -> None:
    last = at.rank == at.world - 1

    def refused(match: str, weight: Tensor, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match) as raised:
            agree_([weight])
        at.alike(str(raised.value))
        assert weight._storage.agreed is None  # type: ignore[attr-defined]
        assert not weight.layout_locked  # type: ignore[attr-defined]

    refused("same rows, columns, gate_up and align", make("w13", "mxfp4_moe") if last else make("w2"))
    refused("same rows, columns, gate_up and align", make("w2", align=128 if last else 256))
    kind = "mxfp4_moe" if last else "mxfp4_separated"
    refused("fixed to different layouts", make("w13", kind, shuffle_kind=kind))
    weight = make("w2", "mxfp4_moe")
    refused("view of rows or columns", weight[:, :32] if last else weight)
    if last:
        weight._storage.validity.touch("a test")
    refused("cannot be used on every rank", weight)
    with pytest.raises(ValueError, match="name as many weights") as raised:
        agree_([make("w2")] * 1 if last else [make("w2"), make("w13")])
    at.alike(str(raised.value))


@on_ranks(2)
def test_a_rank_that_cannot_lay_out_its_weight_fails_on_all(at: Rank) -> None:
    weight = make("w13", "mxfp4_moe" if at.rank == 0 else "none")
    convert = PackedStorage.convert_layout_

    def out_of_memory(storage: PackedStorage, layout: object) -> None:
        raise MemoryError("no scratch")

    PackedStorage.convert_layout_ = out_of_memory if at.rank == 1 else convert  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="not every rank could .* rank 0: None; rank 1: MemoryError: no scratch"):
            agree_(weight)
    finally:
        PackedStorage.convert_layout_ = convert  # type: ignore[method-assign]
    with pytest.raises(NotImplementedError, match="agree_"):
        dist.broadcast(weight, 0)
    agree_(weight)
    assert_is(weight, values("w13"), "mxfp4_moe")


# --- collectives


@on_ranks(2, 4)
def test_nothing_travels_without_agreement(at: Rank) -> None:
    weight, after = make("w13", "mxfp4_moe", salt=at.rank), (at.rank + 1) % at.world
    calls: list[Callable[[], object]] = [
        lambda: dist.broadcast(weight, 0),
        lambda: dist.send(weight, after),
        lambda: dist.recv(weight, after),
        lambda: dist.all_gather([make("w13") for _ in range(at.world)], weight),
        lambda: dist.all_to_all_single(make("w13"), weight),
        lambda: dist.all_gather_into_tensor(make("w13", experts=E * at.world), weight),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"call shuffled_tensor\.agree_\(weights, group\)"):
            call()
    with pytest.raises(NotImplementedError, match="packed codes are not added"):
        dist.all_reduce(weight)
    assert_is(weight, values("w13", salt=at.rank), "mxfp4_moe")


@on_ranks(2, 4)
def test_bytes_travel_as_they_lie_after_agreement(at: Rank) -> None:
    weight = make("w13", KINDS[at.rank], salt=at.rank)
    agree_(weight)
    several = [torch.empty_like(weight) for _ in range(at.world)]  # agreed on as the weight is
    exchanged = torch.empty_like(weight)
    everything = make("w13", weight._storage.layout.name, experts=E * at.world)
    agree_(everything)
    whole = torch.cat([values("w13", salt=rank) for rank in range(at.world)])
    dist.all_gather(several, weight)
    for rank, found in enumerate(several):
        assert_is(found, values("w13", salt=rank))
    dist.all_gather_into_tensor(everything, weight)
    assert_is(everything, whole)
    dist.all_to_all_single(exchanged, weight)
    assert_is(exchanged, torch.cat([values("w13", salt=rank)[own(at)] for rank in range(at.world)]))
    before, after = (at.rank - 1) % at.world, (at.rank + 1) % at.world
    received = torch.empty_like(weight)
    swaps = [dist.P2POp(dist.isend, weight[2], after), dist.P2POp(dist.irecv, received[5], before)]
    for work in dist.batch_isend_irecv(swaps):
        work.wait()
    assert_is(received[5], values("w13", salt=before)[2])
    assert_is(received[:5], torch.zeros(5, 2 * I, H, dtype=torch.float64))
    if at.rank == 0:
        dist.send(weight, 1)
    if at.rank == 1:
        dist.recv(received, 0)
        assert_is(received, values("w13"))
    work = dist.broadcast(weight, 1, async_op=True)
    assert work is not None
    work.wait()
    assert_is(weight, values("w13", salt=1))
    weight.shuffle_(weight._storage.layout.name)  # where it is, still
    with pytest.raises(TypeError, match="plain tensor: their bytes are not alike"):
        dist.all_gather_into_tensor(torch.empty(E * at.world, 2 * I, H), weight)


@on_ranks(2)
def test_agreement_is_with_the_ranks_of_its_group(at: Rank) -> None:
    alone = [dist.new_group([rank]) for rank in range(at.world)][at.rank]
    weight = make("w2", KINDS[at.rank])
    agree_([weight], alone)
    assert weight._storage.agreed is not None
    with pytest.raises(NotImplementedError, match="agree_"):
        dist.broadcast(weight, 0)
    copied = weight.clone()
    agree_([copied])
    dist.broadcast(copied, 0)
    assert_is(copied, values("w2"))
    with pytest.raises(NotImplementedError, match="agree_"):
        dist.broadcast(copied.clone(), 0)  # whose layout is free again


@on_ranks(2)
def test_a_buffer_of_one_layer_receives_another(at: Rank) -> None:
    """Layers of one size lie alike, also where only the first was used."""
    first, second = make("w2", "mxfp4_moe"), make("w2", salt=at.rank)
    agree_([first, second])
    buffer = torch.empty_like(first)
    if at.rank == 0:
        dist.send(second, 1)
    else:
        dist.recv(buffer, 0)
        assert_is(buffer, values("w2"))


@on_ranks(2)
def test_the_order_of_rows_comes_along(at: Rank) -> None:
    """So that who loads the whole again brings its rows in that order."""
    codes, scale = parts_of("w13")
    local = ShuffledMXFP4Tensor(codes[own(at)], scale[own(at)], gate_up=True, row_order="interleaved")
    mesh = init_device_mesh("cpu", (at.world,))
    for agreed in (False, True):
        if agreed:
            agree_([local])
        whole = DTensor.from_local(local, mesh, [Shard(0)]).full_tensor()
        assert whole.row_order == "interleaved"
        whole.qdata_view.copy_(codes)
        expected = ShuffledMXFP4Tensor(codes, scale, gate_up=True, row_order="interleaved")
        assert torch.equal(whole.dequantize(), expected.dequantize())


@on_ranks(4)
def test_shards_of_rows_are_saved_by_their_place(at: Rank) -> None:
    """fully_shard, over two ranks, of halves of rows that two others have."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    part = mesh["tensor"].get_local_rank()
    module = nn.Module()
    module.w = nn.Parameter(make("w13").shard(part, 2))
    fully_shard(module, mesh=mesh["data"])
    held = module.w.to_local()
    first = mesh["data"].get_local_rank() * E // 2
    assert (held.place.experts, held.place.rows) == (
        range(first, first + E // 2),
        range(I // 2 * part, I // 2 * (part + 1)),
    )
    folder = str(at.folder)
    dcp.save(sharded({"w": module.w}), checkpoint_id=folder)
    whole = torch.zeros_like(make("w13"))
    dcp.load({"w": whole}, checkpoint_id=folder)
    assert_is(whole, values("w13"))
    held.zero_()
    dcp.load(sharded({"w": module.w}), checkpoint_id=folder)
    assert_is(module.w.to_local(), make("w13").shard(part, 2)[first : first + E // 2].dequantize(torch.float64))


@on_ranks(2)
def test_what_was_known_of_scales_is_forgotten_with_them(at: Rank) -> None:
    codes, scale = parts_of("w2")
    weight = ShuffledMXFP4Tensor(codes, torch.full_like(scale, 200 if at.rank == 0 else 100), gate_up=False)
    agree_(weight)
    weight._storage.largest_scale()
    dist.broadcast(weight, 0)
    assert weight._storage.largest_scale() == 200


@on_ranks(2)
def test_what_was_to_receive_is_unusable_when_that_fails(at: Rank) -> None:
    weight, bytes_in = make("w2"), collectives._bytes_in
    agree_(weight)

    def fails(*args: object) -> Any:
        raise ConnectionError("gone")

    collectives._bytes_in = fails
    try:
        with pytest.raises(ConnectionError):
            dist.broadcast(weight, 0)
    finally:
        collectives._bytes_in = bytes_in
    if at.rank == 0:  # it has only sent
        assert_is(weight, values("w2"))
    else:
        with pytest.raises(RuntimeError, match="receiving bytes of another rank was interrupted"):
            weight.dequantize()
    weight.copy_(values("w2", salt=at.rank))
    dist.broadcast(weight, 1)
    assert_is(weight, values("w2", salt=1))


# --- DTensor


@on_ranks(2, 4)
def test_experts_in_a_dtensor(at: Rank) -> None:
    mesh, full = init_device_mesh("cpu", (at.world,)), values("w13")
    spread = distribute_tensor(make("w13", KINDS[at.rank]), mesh, [Shard(0)])
    assert_is(spread.to_local(), full[own(at)])
    assert_is(spread.full_tensor(), full)
    assert spread.full_tensor().gate_up  # type: ignore[attr-defined]
    everywhere = spread.redistribute(mesh, [Replicate()])
    assert_is(everywhere.to_local(), full)
    assert_is(everywhere.redistribute(mesh, [Shard(0)]).to_local(), full[own(at)])
    mixed = DTensor.from_local(make("w13")[own(at)].clone().shuffle_(KINDS[at.rank]), mesh, [Shard(0)])
    assert_is(mixed.full_tensor(), full)
    agree_([mixed])
    layout = mixed.to_local()._storage.layout.name
    assert_is(mixed.full_tensor(), full, layout)
    at.alike(layout)


@on_ranks(2, 4)
def test_rows_and_columns_of_w2_in_a_dtensor(at: Rank) -> None:
    mesh, full = init_device_mesh("cpu", (at.world,)), values("w2")
    for dim in (1, 2):
        spread = distribute_tensor(make("w2", "mxfp4_moe"), mesh, [Shard(dim)])
        assert_is(spread.to_local(), full.chunk(at.world, dim)[at.rank])
        assert_is(spread.full_tensor(), full)
    spread = distribute_tensor(make("w2", "mxfp4_moe"), mesh, [Shard(0)]).redistribute(mesh, [Shard(2)])
    assert_is(spread.to_local(), full.chunk(at.world, 2)[at.rank])
    own_experts = make("w2", "mxfp4_moe")[own(at)].clone()  # as on GPUs
    found = torch.ops._dtensor.shard_dim_alltoall(own_experts, 0, 2, dist.group.WORLD.group_name)
    assert_is(found, full.chunk(at.world, 2)[at.rank])


@on_ranks(2)
def test_rows_of_gate_up_weights_are_not_joined(at: Rank) -> None:
    mesh = init_device_mesh("cpu", (at.world,))
    part = make("w13").shard(at.rank, at.world)
    with pytest.raises(ValueError, match="gate, up, gate, up"):
        DTensor.from_local(part, mesh, [Shard(1)]).full_tensor()


# --- checkpoints


def split(name: str, how: str, at: Rank, kind: str = "none", salt: int = 0) -> ShuffledMXFP4Tensor:
    """This rank's part of a weight."""
    whole = make(name, salt=salt)
    if how == "experts":
        part = whole.shard(at.rank, at.world, dim="expert")
    elif how == "intermediate":
        part = whole.shard(at.rank, at.world)
    elif how == "both":
        pairs = at.world // 2
        part = whole.shard(at.rank // 2, pairs, dim="expert").shard(at.rank % 2, 2)
    elif how == "listed":  # in any order, some on several ranks, and one twice on the first
        order = [(3 * expert + 1) % E for expert in range(E)]
        listed = order[own(at)] + [order[0] if at.rank == 0 else at.rank]
        part = whole[torch.tensor(listed)]
        part.place = part.place._replace(shape=tuple(whole.shape), experts=tuple(listed))
    else:
        part = whole
    return part.shuffle_(kind)


SPLITS = ("experts", "intermediate", "both", "listed", "whole")


@on_ranks(2, 4)
def test_any_split_is_read_into_any_other(at: Rank) -> None:
    for before in SPLITS:
        saved = {name: split(name, before, at, KINDS[at.rank]) for name in NAMES}
        dcp.save(sharded(saved), checkpoint_id=at.folder / before)
        for after in SPLITS:
            state = {name: split(name, after, at, KINDS[(at.rank + 1) % 4], salt=9) for name in NAMES}
            addresses = [weight.qdata.data_ptr() for weight in state.values()]
            dcp.load(sharded(state), checkpoint_id=at.folder / before)
            assert addresses == [weight.qdata.data_ptr() for weight in state.values()]
            for name, weight in state.items():
                assert_is(weight, split(name, after, at).dequantize(torch.float64), KINDS[(at.rank + 1) % 4])
        plain = {name: torch.zeros(values(name).shape, dtype=torch.bfloat16) for name in NAMES}
        dcp.load(plain, checkpoint_id=at.folder / before)
        for name in NAMES:
            assert torch.equal(plain[name].double(), values(name))
    dist.barrier()
    for before in SPLITS:  # neither a pad nor a byte twice
        size = sum(file.stat().st_size for file in (at.folder / before).glob("*.distcp"))
        assert size < 1.1 * sum(values(name).numel() * 17 / 32 for name in NAMES)


@on_ranks(2)
def test_a_single_expert_is_parted(at: Rank) -> None:
    for name in NAMES:
        expert = make(name, KINDS[at.rank])[3].clone()
        dcp.save(sharded({"w": expert.shard(at.rank, at.world)}), checkpoint_id=at.folder / name)
        whole = torch.zeros_like(make(name, "mxfp4_separated")[3])
        dcp.load({"w": whole}, checkpoint_id=at.folder / name)
        assert_is(whole, values(name)[3])
        part = torch.zeros_like(expert.shard(at.rank, at.world))
        dcp.load(sharded({"nested": {"w": part}})["nested"], checkpoint_id=at.folder / name)
        assert_is(part, expert.shard(at.rank, at.world).dequantize(torch.float64))


@on_ranks(2)
def test_what_stands_for_a_whole_is_for_state_dicts_only(at: Rank) -> None:
    part = make("w13").shard(at.rank, at.world)
    state = sharded({"w": part, "whole": make("w2"), "plain": torch.ones(2)})
    assert state["w"].shape == (E, 2 * I, H)
    assert type(state["whole"]) is ShuffledMXFP4Tensor
    assert type(state["plain"]) is Tensor
    with pytest.raises(NotImplementedError, match="this stands for a part"):
        state["w"] + 1
    dcp.save({"w": part}, checkpoint_id=at.folder)
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):  # torch's own, of the part itself
        dcp.load({"w": part}, checkpoint_id=at.folder)
    dcp.load(sharded({"w": part.zero_()}), checkpoint_id=at.folder)  # it was saved where it belongs
    assert_is(part, make("w13").shard(at.rank, at.world).dequantize(torch.float64))


@on_ranks(2, 4)
def test_a_dense_checkpoint_is_read_into_parts(at: Rank) -> None:
    dcp.save({name: values(name).bfloat16() for name in NAMES}, checkpoint_id=at.folder)
    for after in SPLITS:
        state = {name: split(name, after, at, KINDS[at.rank], salt=9) for name in NAMES}
        dcp.load(sharded(state), checkpoint_id=at.folder)
        for name, weight in state.items():
            assert_is(weight, split(name, after, at).dequantize(torch.float64), KINDS[at.rank])


@on_ranks(2, 4)
def test_parts_are_saved_as_they_were_when_staged(at: Rank) -> None:
    parts = {name: split(name, "both" if at.world == 4 else "intermediate", at, KINDS[at.rank]) for name in NAMES}
    mesh = init_device_mesh("cpu", (at.world,))
    in_dtensor = DTensor.from_local(make("w13").shard(at.rank, at.world), mesh, [Shard(1)])
    saving = dcp.async_save(sharded({**parts, "dtensor": in_dtensor}), checkpoint_id=at.folder)
    for weight in (*parts.values(), in_dtensor.to_local()):
        weight.zero_()
    saving.result()
    whole = {name: torch.zeros_like(make(name)) for name in NAMES}
    whole["dtensor"] = torch.zeros_like(make("w13", "mxfp4_moe"))
    dcp.load(whole, checkpoint_id=at.folder)
    for name, weight in whole.items():
        assert_is(weight, values("w13" if name == "dtensor" else name))


@on_ranks(2, 4)
def test_rows_of_gate_up_weights_need_a_place_in_a_dtensor(at: Rank) -> None:
    mesh = init_device_mesh("cpu", (at.world,))

    def around(weight: Tensor) -> DTensor:
        return DTensor.from_local(weight, mesh, [Shard(1)])

    dcp.save({"w": around(split("w13", "intermediate", at, KINDS[at.rank]))}, checkpoint_id=at.folder / "placed")
    whole = torch.zeros_like(make("w13", "mxfp4_separated"))
    dcp.load({"w": whole}, checkpoint_id=at.folder / "placed")
    assert_is(whole, values("w13"))
    part = torch.zeros_like(split("w13", "intermediate", at))
    dcp.load({"w": around(part)}, checkpoint_id=at.folder / "placed")
    expected = split("w13", "intermediate", at).dequantize(torch.float64)
    assert_is(part, expected)
    part._storage.place = None  # as one that was made of tensors that somebody else has cut
    for call in (dcp.save, dcp.load):
        with pytest.raises(
            dcp.api.CheckpointException, match="no Shard says that these are the matching rows"
        ) as error:
            call({"w": around(part)}, checkpoint_id=at.folder / "placed")
        assert len(error.value.failures) == at.world
        assert_is(part, expected)
    experts = torch.zeros_like(make("w13", "mxfp4_moe")[own(at)].clone())
    dcp.load({"w": DTensor.from_local(experts, mesh, [Shard(0)])}, checkpoint_id=at.folder / "placed")
    assert_is(experts, values("w13")[own(at)])


# --- layers


def tokens(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(count)]).int()
    return torch.randn(count, H, generator=generator), torch.rand(count, 2, generator=generator), ids


def assert_right(found: Tensor) -> None:
    x, topk_weight, ids = tokens()
    expected = dense_moe(x, values("w13"), values("w2"), topk_weight, ids)
    assert relative_error(found, expected) < 1e-5


class Layer(nn.Module):
    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(make("w13", kind, dtype=torch.float32))
        self.w2_weight = nn.Parameter(make("w2", kind, dtype=torch.float32))

    def forward(self) -> Tensor:
        x, topk_weight, ids = tokens()
        return fused_moe(x, self.w13_weight, self.w2_weight, topk_weight, ids)


@on_ranks(4)
def test_a_layer_of_experts_and_halves(at: Rank) -> None:
    parts = [split(name, "both", at, KINDS[at.rank]) for name in NAMES]
    x, topk_weight, ids = tokens()
    mask = torch.zeros(E, dtype=torch.int32)
    mask[list(parts[0].place.experts)] = 1
    out = fused_moe(x, *parts, topk_weight, ids, expert_mask=mask)
    dist.all_reduce(out)
    assert_right(out)


@on_ranks(2)
def test_a_layer_of_dtensors_says_what_it_takes(at: Rank) -> None:
    mesh, layer = init_device_mesh("cpu", (at.world,)), Layer()
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(DTensor.from_local(weight, mesh, [Replicate()]), requires_grad=False))
    with pytest.raises(TypeError, match=r"pass its \.to_local\(\)"):
        layer()


@on_ranks(2)
def test_rows_that_a_trainer_parted_are_not_taken_for_gate_and_up(at: Rank) -> None:
    mesh, weight = init_device_mesh("cpu", (at.world,)), make("w13").shard(at.rank, at.world)
    trained = distribute_tensor(values("w13").bfloat16(), mesh, [Shard(1)])
    for call in (
        lambda: ShuffledMXFP4Tensor.from_hp(trained, gate_up=True, row_order="contiguous"),
        lambda: weight.refit_from_hp_(trained),
        lambda: make("w13").copy_(trained),
    ):
        with pytest.raises(TypeError, match="gate rows alone on one rank and up rows alone on another"):
            call()
    assert_is(weight, make("w13").shard(at.rank, at.world).dequantize(torch.float64))


@on_ranks(2, 4)
def test_experts_that_do_not_come_out_even(at: Rank) -> None:
    mesh, full = init_device_mesh("cpu", (at.world,)), values("w13", experts=7)
    for source in (None, 0):
        spread = distribute_tensor(make("w13", "mxfp4_moe", experts=7), mesh, [Shard(0)], src_data_rank=source)
        assert_is(spread.to_local(), full.chunk(at.world)[at.rank])
        assert_is(spread.full_tensor(), full)


@on_ranks(2, 4)
def test_state_dicts_of_dtensors(at: Rank) -> None:
    mesh, layer = init_device_mesh("cpu", (at.world,)), Layer("mxfp4_moe")
    for name, weight in list(layer.named_parameters()):
        part = weight.detach()[own(at)].clone().shuffle_(KINDS[at.rank])
        setattr(layer, name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]), requires_grad=False))
    full = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name in NAMES if at.rank == 0 else ():
        assert_is(full[f"{name}_weight"], values(name))
    new = {f"{name}_weight": make(name, salt=5) for name in NAMES}
    set_model_state_dict(layer, new, options=StateDictOptions(full_state_dict=True))
    for name in NAMES:
        assert_is(getattr(layer, f"{name}_weight").to_local(), values(name, salt=5)[own(at)], KINDS[at.rank])
    plain = {f"{name}_weight": values(name).bfloat16() for name in NAMES} if at.rank == 0 else {}
    set_model_state_dict(layer, plain, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name in NAMES:
        assert_is(getattr(layer, f"{name}_weight").to_local(), values(name)[own(at)], KINDS[at.rank])


# --- fully_shard


def fully_sharded(kind: str, mesh: DeviceMesh, layer: nn.Module | None = None, **given: Any) -> nn.Module:
    layer = layer or Layer(kind)
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, **given)
    return layer


@on_ranks(2, 4)
def test_packed_shards_are_gathered(at: Rank) -> None:
    layer = fully_sharded("mxfp4_moe", init_device_mesh("cpu", (at.world,)))
    for _ in range(3):
        assert_right(layer())
    layer.reshard()
    shards = [weight.to_local() for weight in layer.parameters()]
    assert all(type(shard) is ShuffledMXFP4Tensor for shard in shards)
    assert sum(shard.nbytes for shard in shards) * at.world == sum(weight.nbytes for weight in Layer().parameters())
    full = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
    assert_is(full["w13_weight"], values("w13"))
    dcp.save(get_model_state_dict(layer), checkpoint_id=at.folder)
    whole = torch.zeros_like(make("w13"))
    dcp.load({"w13_weight": whole}, checkpoint_id=at.folder)
    assert_is(whole, values("w13"))


@on_ranks(2, 4)
def test_shards_that_lie_differently_are_gathered(at: Rank) -> None:
    layer = fully_sharded(KINDS[at.rank], init_device_mesh("cpu", (at.world,)))
    for _ in range(2):
        assert_right(layer())


@on_ranks(2)
def test_what_a_first_use_laid_out_is_gathered_again(at: Rank) -> None:
    class Uses(Layer):
        def forward(self) -> Tensor:
            for weight, kind in zip(self.parameters(), ("mxfp4_separated", "mxfp4_moe"), strict=True):
                weight.shuffle_(kind)  # type: ignore[operator]
            return super().forward()

    layer = fully_sharded("", init_device_mesh("cpu", (at.world,)), Uses("none"))
    for _ in range(3):
        assert_right(layer())


@on_ranks(4)
def test_replicas_of_shards_and_shards_of_experts(at: Rank) -> None:
    layer = fully_sharded("mxfp4_moe", init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    for _ in range(2):
        assert_right(layer())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    rank, whole = mesh.get_local_rank("experts"), Layer("mxfp4_moe")

    class Local(Layer):
        def forward(self) -> Tensor:
            x, topk_weight, ids = tokens()
            mask = torch.zeros(E, dtype=torch.int32)
            mask[rank * E // 2 : (rank + 1) * E // 2] = 1
            weights = [weight.to_local() for weight in self.parameters()]  # type: ignore[operator]
            return fused_moe(x, *weights, topk_weight, ids, expert_mask=mask)

    layer = Local()
    for name, weight in whole.named_parameters():
        part = weight.detach()[rank * E // 2 : (rank + 1) * E // 2].clone()
        placed = DTensor.from_local(part, mesh["experts"], [Shard(0)])
        setattr(layer, name, nn.Parameter(placed, requires_grad=False))
    fully_sharded("", mesh["data"], layer)
    for _ in range(2):
        out = layer()
        dist.all_reduce(out, group=mesh.get_group("experts"))
        assert_right(out)


@on_ranks(2, 4)
def test_what_fully_shard_cannot_part_is_refused_on_every_rank(at: Rank) -> None:
    mesh = init_device_mesh("cpu", (at.world,))
    with pytest.raises(ValueError, match="parts a ShuffledMXFP4Tensor along experts, dim 0, and not into"):
        fully_sharded("mxfp4_moe", mesh, shard_placement_fn=lambda parameter: Shard(1))
    layer = Layer()
    layer.w13_weight = nn.Parameter(make("w13", experts=7))
    uneven = fully_sharded("", mesh, layer)
    with pytest.raises(ValueError, match="along experts, dim 0, in equal parts") as raised:
        uneven()
    at.alike(type(raised.value).__name__)
    dist.barrier()
