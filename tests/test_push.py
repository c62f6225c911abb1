# SPDX-License-Identifier: MIT
"""Values of one rank in the weights of the others: on 2 and 4 ranks over gloo, judged by float64 values of the parts
that each rank should hold, and by checksums of the whole, quantised in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe
from shuffled_tensor.distributed import Place, broadcast_, push, scatter_

from .support.bytes import addresses, coded, moderate_scales
from .support.judges import dense
from .support.layer import make_layer
from .support.ranks import Rank, on_ranks

KINDS = ("mxfp4_moe", "none", "mxfp4_separated", "mxfp4_moe")
"""Of the ranks: no two neighbours lay their weights out alike."""

SIZES = {"w13": (8, 256, 384), "w2": (8, 384, 128)}
"""Padded along rows, and along columns; four ranks part either in whole blocks."""


def parts_of(name: str, salt: int = 0) -> tuple[Tensor, Tensor]:
    experts, rows, columns = SIZES[name]
    return coded(experts, rows, columns // 2, salt=salt), moderate_scales(experts, rows, columns // 32, salt=salt + 7)


def make(name: str, kind: str = "none", salt: int = 0) -> ShuffledMXFP4Tensor:
    order = "contiguous" if name == "w13" else None
    return ShuffledMXFP4Tensor(*parts_of(name, salt), gate_up=name == "w13", row_order=order).shuffle_(kind)  # type: ignore[arg-type]


def values_of(name: str) -> Tensor:
    """bfloat16, none of which is an MXFP4 number by chance alone."""
    return torch.randn(SIZES[name], generator=torch.Generator().manual_seed(11)).bfloat16()


def quantised(name: str) -> ShuffledMXFP4Tensor:
    order = "contiguous" if name == "w13" else None
    return ShuffledMXFP4Tensor.from_hp(values_of(name), gate_up=name == "w13", row_order=order)  # type: ignore[arg-type]


def parted(name: str, values: Any, how: str, rank: int, world: int) -> Any:
    """A rank's part of plain values: of experts, of matching rows of gate and up or columns, of both, or all."""
    ep, tp = {"ep": (world, 1), "tp": (1, world), "ep x tp": (world // 2, 2), "whole": (1, 1)}[how]
    expert, tensor = divmod(rank % (ep * tp), tp)
    values = values.chunk(ep)[expert]
    if name == "w13":
        return values.unflatten(1, (2, -1)).chunk(tp, 2)[tensor].flatten(1, 2)
    return values.chunk(tp, 2)[tensor]


def part_of(weight: ShuffledMXFP4Tensor, how: str, rank: int, world: int) -> ShuffledMXFP4Tensor:
    """The same of a weight, which knows its place."""
    ep, tp = {"ep": (world, 1), "tp": (1, world), "ep x tp": (world // 2, 2), "whole": (1, 1)}[how]
    expert, tensor = divmod(rank % (ep * tp), tp)
    return weight.shard(expert, ep, dim="expert").shard(tensor, tp)


HOWS = ("ep", "tp", "ep x tp", "whole")


@on_ranks(2, 4)
def test_bf16_of_one_rank_comes_into_any_part(at: Rank) -> None:
    """In messages of two experts, as what quantising the whole gives, to the byte."""
    rank, world = at.rank, at.world
    for name in SIZES:
        expected = quantised(name)
        for how in HOWS:
            for send in (broadcast_, scatter_):
                weight = part_of(make(name, KINDS[rank], salt=5), how, rank, world)
                before = addresses(weight)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(push, "_CHUNK", 2 * (SIZES[name][1] * SIZES[name][2] * 17 // 32))
                    send(weight, values_of(name) if rank == world - 1 else None, src=world - 1)
                want = parted(name, expected.dequantize(torch.float64), how, rank, world)
                assert torch.equal(weight.dequantize(torch.float64), want), (name, how, send)
                assert weight.logical_checksum() == part_of(expected, how, rank, world).logical_checksum()
                assert addresses(weight) == before
                assert weight._storage.layout.name == KINDS[rank]


@on_ranks(2, 4)
def test_packed_values_are_sent_as_they_are(at: Rank) -> None:
    """Also a part of one rank into other parts of all; and into weights that are no sender's."""
    rank, world = at.rank, at.world
    for name in SIZES:
        new = dense(*parts_of(name, salt=9))
        for send in (broadcast_, scatter_):
            weight = part_of(make(name, KINDS[rank]), "tp", rank, world)
            send(weight, make(name, "mxfp4_moe", salt=9) if rank == 0 else None)
            assert torch.equal(weight.dequantize(torch.float64), parted(name, new, "tp", rank, world))
            weight = part_of(make(name, KINDS[rank], salt=3), "ep", rank, world)
            for src in range(world):
                send(weight, part_of(make(name, KINDS[rank], salt=9), "tp", rank, world), src=src)
            assert torch.equal(weight.dequantize(torch.float64), parted(name, new, "ep", rank, world))


@on_ranks(2, 4)
def test_a_trainer_of_parts_sends_into_other_parts(at: Rank) -> None:
    """Each rank trains some experts, or some rows, in plain bfloat16, and says which."""
    rank, world = at.rank, at.world
    for name, (experts, rows, columns) in SIZES.items():
        halves = 2 if name == "w13" else 1
        for how in ("ep", "tp"):
            mine = parted(name, values_of(name), how, rank, world)
            each = [range(experts), range(rows // halves), range(columns)]
            axis = 0 if how == "ep" else halves % 2 + 1
            cut = len(each[axis]) // world
            each[axis] = range(rank * cut, (rank + 1) * cut)
            for send in (broadcast_, scatter_):
                weight = part_of(make(name, KINDS[rank], salt=4), "ep x tp", rank, world)
                for src in range(world):
                    place = Place((experts, rows, columns), *each)
                    send(weight, mine, src=src, place=place, row_order="contiguous" if halves == 2 else None)
                want = part_of(quantised(name), "ep x tp", rank, world)
                assert weight.logical_checksum() == want.logical_checksum(), (name, how, send)


@on_ranks(2, 4)
def test_experts_that_are_listed(at: Rank) -> None:
    """As a rebalance leaves them: in any order, with replicas on a rank and between ranks."""
    rank = at.rank
    mine = [(3 * slot + rank) % 8 for slot in range(4)] + [rank, 5]
    new = dense(*parts_of("w13", salt=9))
    for send in (broadcast_, scatter_):
        weight = make("w13", KINDS[rank])[torch.tensor(mine)]
        weight.place = make("w13").place._replace(experts=tuple(mine))
        send(weight, make("w13", salt=9) if rank == 0 else None)
        assert torch.equal(weight.dequantize(torch.float64), new[mine])
    # and from such a one
    whole = make("w13", KINDS[rank])
    source = make("w13", salt=9)[torch.tensor(mine)]
    source.place = make("w13").place._replace(experts=tuple(mine))
    broadcast_(whole, source if rank == 0 else None)
    want = dense(*parts_of("w13"))
    here = [(3 * slot) % 8 for slot in range(4)] + [0, 5]
    want[here] = new[here]
    assert torch.equal(whole.dequantize(torch.float64), want)


@on_ranks(2, 4)
def test_several_weights_in_one_call(at: Rank) -> None:
    """Of several chunks each, into parts that one rank holds none of; ranks speak to each other once."""
    rank, told = at.rank, []
    real = push._told
    for send in (broadcast_, scatter_):
        weights = [
            None if (rank, index) == (1, 1) else part_of(make(name, KINDS[rank]), "ep x tp", rank, at.world)
            for index, name in enumerate(("w13", "w2", "w2"))
        ]
        addresses = [None if weight is None else weight.qdata.data_ptr() for weight in weights]
        values = [values_of("w13"), values_of("w2"), make("w2", salt=9)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(push, "_CHUNK", 60_000)
            patch.setattr(push, "_told", lambda *args: told.append(1) or real(*args))
            send(weights, values if rank == 0 else None, row_order=["contiguous", None, None] if rank == 0 else None)
        for index, want in enumerate((quantised("w13"), quantised("w2"), make("w2", salt=9))):
            weight = weights[index]
            if weight is not None:
                want = part_of(want, "ep x tp", rank, at.world)
                assert weight.logical_checksum() == want.logical_checksum(), (send, index)
                assert weight.qdata.data_ptr() == addresses[index]
    assert len(told) == 2
    weight = make("w2")
    with pytest.raises(ValueError, match="rank 0: values must be one, or as many as there are weights, found 1 for 2"):
        broadcast_([weight, weight], [weight] if rank == 0 else None)
    with pytest.raises(ValueError, match="every rank must pass as many weights, found 1, 2"):
        broadcast_([weight] * (2 if rank else 1))
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts_of("w2")))


@on_ranks(2)
def test_what_ranks_say_may_be_long(at: Rank) -> None:
    """A place of experts that were listed is more than a page where they are thousands."""
    few, many = ((at.rank, tuple(range(3000, 3000 + experts))) for experts in (3, 3000))
    for own in (few, many if at.rank else few, many):
        assert push._told(own, None)[at.rank] == own
        assert [rank for rank, _ in push._told(own, None)] == [0, 1]


@on_ranks(2, 4)
def test_a_rank_that_only_sends(at: Rank) -> None:
    rank = at.rank
    for send in (broadcast_, scatter_):
        weight = None if rank == 1 else make("w2", KINDS[rank])
        send(weight, values_of("w2") if rank == 1 else None, src=1)
        if weight is not None:
            assert weight.logical_checksum() == quantised("w2").logical_checksum()
        send(None, values_of("w2") if rank == 1 else None, src=1)  # into nothing


@on_ranks(2, 4)
def test_rows_in_turn_become_gate_rows_then_up_rows(at: Rank) -> None:
    rank = at.rank
    values = values_of("w13")
    turn = values.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    weight = make("w13", KINDS[rank])
    broadcast_(weight, turn if rank == 0 else None, row_order="interleaved")
    assert weight.logical_checksum() == quantised("w13").logical_checksum()
    # by default as the sender's weight was made
    own = ShuffledMXFP4Tensor(*parts_of("w13"), gate_up=True, row_order="interleaved" if rank == 0 else "contiguous")
    broadcast_(own, turn if rank == 0 else None)
    assert own.logical_checksum() == quantised("w13").logical_checksum()


@on_ranks(2, 4)
def test_one_expert_and_its_own_weight_and_other_dtypes(at: Rank) -> None:
    """Weights of two dimensions; a sender without values sends what it holds, and keeps it."""
    rank = at.rank
    weight = make("w2", KINDS[rank], salt=rank)[3].clone()
    broadcast_(weight, src=1)
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts_of("w2", salt=1))[3])
    for dtype in (torch.float32, torch.float16, torch.float64):
        values = values_of("w2")[2].to(dtype)
        scatter_(weight, values if rank == 0 else None, scale_rule="floor")
        want = ShuffledMXFP4Tensor.from_hp(values, gate_up=False, scale_rule="floor")
        assert weight.logical_checksum() == want.logical_checksum()


@on_ranks(2, 4)
def test_what_does_not_fit_is_refused_on_every_rank(at: Rank) -> None:
    rank = at.rank
    weight = make("w13" if rank else "w2")
    cases: list[tuple[str, type[Exception], Any]] = [
        ("rank 0 sends of a whole of .8, 384, 128., gate_up=False", ValueError, lambda: broadcast_(weight)),
        ("rank 0: the rank that sends has neither", ValueError, lambda: broadcast_(None)),
        ("rank 0: the logical dtype must be", TypeError, lambda: broadcast_(weight, torch.zeros(8, 384, 128).int())),
        ("rank 0: unknown scale_rule", ValueError, lambda: broadcast_(weight, values_of("w2"), scale_rule="up")),  # type: ignore[arg-type]
        (
            "rank 0: this place is one of a part of shape .8, 384, 128., and the part has .4, 384, 128.",
            ValueError,
            lambda: broadcast_(weight, values_of("w2")[:4], place=make("w2").place),
        ),
        ("rank 0: values are pushed from and into whole", ValueError, lambda: broadcast_(weight, make("w2")[:, :64])),
    ]  # fmt: skip
    for words, kind, call in cases:
        with pytest.raises(kind, match=words):
            call()
    with pytest.raises(ValueError, match=r"gate_up=.* row_order= that their rows are gate and up"):
        broadcast_(make("w13") if rank else None, None if rank else values_of("w13"))
    expected = dense(*parts_of("w13" if rank else "w2"))
    assert torch.equal(weight.dequantize(torch.float64), expected)  # and nothing was written


@on_ranks(2)
def test_places_that_values_do_not_have_are_refused_on_every_rank(at: Rank) -> None:
    """Packed values, too; before anything is written, and without a rank that waits for one that has raised."""
    rank, weight = at.rank, make("w2")
    place = weight.place
    cases: list[tuple[Tensor, Place, str]] = [
        (make("w2", salt=3)[:1].clone(), place._replace(experts=range(4)), "and the part has .1, 384, 128."),
        (make("w2", salt=3)[:3].clone(), place._replace(experts=range(4)), "and the part has .3, 384, 128."),
        (values_of("w2")[:4], place._replace(experts=range(6, 10)), "a part lies within experts, rows of each half"),
        (values_of("w2")[..., :96], place._replace(columns=range(16, 112)), "columns in whole blocks of 32"),
    ]
    for values, where, message in cases:
        with pytest.raises(ValueError, match=f"rank 0: .*{message}"):
            broadcast_(weight, values if rank == 0 else None, place=where if rank == 0 else None)
    for call in (
        lambda: broadcast_(weight[:4], weight[4:] if rank == 0 else None),
        lambda: broadcast_([weight, None], [make("w2"), weight] if rank == 0 else None),
    ):
        with pytest.raises(ValueError, match=r"rank 0: values lie in a weight that is written; clone\(\) them"):
            call()
    with pytest.raises(TypeError, match=r"rank 1: a ShuffledMXFP4Tensor is written, found Tensor"):
        broadcast_(torch.zeros(SIZES["w2"]) if rank else weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 7 of 2 was to send 1 weights"):
        broadcast_(weight, src=7)
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts_of("w2")))


@on_ranks(2)
def test_a_weight_under_another_name_is_its_own_source(at: Rank) -> None:
    for other in (lambda w: w.data, lambda w: w.detach(), lambda w: w[:]):
        weight = torch.nn.Parameter(make("w2", salt=at.rank))
        broadcast_(weight, other(weight) if at.rank == 0 else None)
        assert torch.equal(weight.dequantize(torch.float64), dense(*parts_of("w2")))


@on_ranks(2, 4)
def test_a_push_that_ends_early_leaves_weights_unusable_until_the_next(at: Rank) -> None:
    """On every rank, also where the first message is the one that fails."""
    rank = at.rank
    layer = make_layer()
    new = layer["w13"].dequantize().flip(0)
    for fails in (0, 2):
        weight = layer["w13"].clone().shuffle_(KINDS[rank])
        sent = [dist.broadcast] * fails

        def gone(*args: Any, sent: list[Any] = sent, **kwargs: Any) -> Any:
            if not sent:
                raise ConnectionError("gone")
            return sent.pop()(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(push, "_CHUNK", 1)
            patch.setattr(dist, "broadcast", gone)
            with pytest.raises(ConnectionError):
                broadcast_(weight, new if rank == 0 else None)
        with pytest.raises(RuntimeError, match="this weight cannot be used: writing to it was interrupted"):
            fused_moe(**layer | {"w13": weight})
        broadcast_(weight, new if rank == 0 else None)
        assert torch.equal(weight.dequantize(), new)
        fused_moe(**layer | {"w13": weight})


@on_ranks(2, 4)
def test_what_was_not_sent_does_not_make_a_broken_weight_whole(at: Rank) -> None:
    rank = at.rank
    weight = make("w2", KINDS[rank])
    weight._storage.validity.touch("a test")
    broadcast_(weight, make("w2").shard(0, 2, dim="expert") if rank == 0 else None)
    with pytest.raises(RuntimeError, match="cannot be used"):
        weight.dequantize()
    broadcast_(weight, make("w2", salt=9) if rank == 0 else None)
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts_of("w2", salt=9)))


@on_ranks(2, 4)
def test_a_scatter_sends_what_is_held_and_no_more(at: Rank) -> None:
    """Bytes that come to each rank: its part, without pads; and a quarter of bfloat16's, and scales."""
    rank, world = at.rank, at.world
    received = []
    real = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        received.extend(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return real(operations)

    weight = part_of(make("w13", KINDS[rank]), "ep x tp", rank, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counting)
        scatter_(weight, values_of("w13") if rank == 0 else None)
    assert sum(received) == (weight.numel() * 17 // 32 if rank else 0)
