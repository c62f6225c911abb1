# SPDX-License-Identifier: MIT
"""Experts that move between ranks: plans by arithmetic; moves on 2 and 4 ranks over gloo, judged by the float64 values
that each slot should hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe
from shuffled_tensor.distributed import Move, agree_, move_experts_, moves, plan_moves

from .support.bytes import addresses, coded, moderate_scales
from .support.judges import dense, dense_moe, relative_error
from .support.ranks import Rank, on_ranks

KINDS = ("mxfp4_moe", "none", "mxfp4_separated", "mxfp4_moe")
EXPERTS = 8
SIZES = {"w13": (256, 384), "w2": (384, 128)}


def parts_of(name: str) -> tuple[Tensor, Tensor]:
    rows, columns = SIZES[name]
    return coded(EXPERTS, rows, columns // 2), moderate_scales(EXPERTS, rows, columns // 32)


def held(name: str, experts: Sequence[int], kind: str) -> ShuffledMXFP4Tensor:
    order = "contiguous" if name == "w13" else None
    parts = (part[[*experts]] for part in parts_of(name))
    return ShuffledMXFP4Tensor(*parts, gate_up=name == "w13", row_order=order).shuffle_(kind)  # type: ignore[arg-type]


def values_of(name: str, experts: Sequence[int]) -> Tensor:
    return dense(*parts_of(name))[[*experts]]


def maps(seed: int, world: int, slots: int) -> list[int]:
    """Every expert somewhere, the other slots with replicas."""
    generator = torch.Generator().manual_seed(seed)
    order = [*range(EXPERTS), *torch.randint(EXPERTS, (world * slots - EXPERTS,), generator=generator).tolist()]
    return [order[index] for index in torch.randperm(len(order), generator=generator).tolist()]


# --- plans


def test_a_plan_of_two_ranks() -> None:
    """A replica that a rank has already comes from there; what crosses, once, though it fills two slots."""
    old, new = [0, 1, 2, 3, 0, 4], [0, 4, 4, 4, 3, 2]
    assert plan_moves(old, new, 2) == [
        Move(4, 1, 2, 0, 1),
        Move(4, 1, 2, 0, 2),
        Move(4, 1, 2, 1, 0),
        Move(3, 1, 0, 1, 1),
        Move(2, 0, 2, 1, 2),
    ]
    assert plan_moves(old, old, 2) == []


def test_an_expert_comes_from_the_same_node_and_from_whoever_sends_least() -> None:
    # ranks 0 and 1 are one node, 2 and 3 another; expert 0 is on ranks 0, 2 and 3
    old = [0, 5, 1, 6, 0, 7, 0, 2]
    new = [0, 5, 0, 6, 0, 7, 0, 1]
    assert [(move.src, move.dst) for move in plan_moves(old, new, 4, ranks_per_node=2)] == [(0, 1), (1, 3)]
    sources = [move.src for move in plan_moves([0, 1, 0, 2, 3, 4, 5, 6], [0, 1, 0, 2, 0, 4, 0, 6], 4)]
    assert sources == [0, 1]  # in turn
    sources = [move.src for move in plan_moves([0, 1, 2, 3, 0, 4, 5, 6], [0, 1, 2, 0, 0, 4, 0, 6], 4, ranks_per_node=2)]
    assert sources == [0, 2]


def test_a_plan_does_what_it_is_for() -> None:
    for seed in range(20):
        old, new = maps(seed, 4, 5), maps(seed + 100, 4, 5)
        slots, moves = list(old), plan_moves(old, new, 4, ranks_per_node=2)
        for move in moves:
            assert old[move.src * 5 + move.src_slot] == move.expert
            slots[move.dst * 5 + move.dst_slot] = move.expert
        assert slots == new
        crossings = Counter({(move.src, move.src_slot, move.dst) for move in moves if move.src != move.dst})
        coming = Counter((dst, old[src * 5 + slot]) for src, slot, dst in crossings)
        assert max(coming.values(), default=1) == 1


def test_what_is_no_plan() -> None:
    with pytest.raises(ValueError, match=r"as many slots on each of 2 ranks, found 4 and 3"):
        plan_moves([0, 1, 2, 3], [0, 1, 2], 2)
    with pytest.raises(ValueError, match=r"as many slots on each of 3 ranks, found 4 and 4"):
        plan_moves([0, 1, 2, 3], [0, 1, 2, 3], 3)
    with pytest.raises(ValueError, match=r"experts \[5, 9\] are in no slot of old"):
        plan_moves([0, 1, 2, 3], [9, 1, 5, 3], 2)
    with pytest.raises(TypeError, match="old must be whole numbers"):
        plan_moves([0, 1.5], [0, 1], 2)  # type: ignore[list-item]


# --- moves


class Counted:
    """Of what torch is asked to send between ranks, and of bytes that are laid out anew."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[tuple[str, int, int]]] = []
        self.agreements = 0
        batch, gather = dist.batch_isend_irecv, dist.all_gather_object

        def batched(operations: list[dist.P2POp]) -> Any:
            self.batches.append([(op.op.__name__, op.group_peer, op.tensor.nbytes) for op in operations])
            return batch(operations)

        def gathered(*args: Any, **kwargs: Any) -> None:
            self.agreements += 1
            gather(*args, **kwargs)

        patch.setattr(dist, "batch_isend_irecv", batched)
        patch.setattr(dist, "all_gather_object", gathered)


@on_ranks(2, 4)
def test_experts_move_with_their_scales_and_biases(at: Rank) -> None:
    """Replicas too, several times, in place; from layouts that differ as from those that do not."""
    slots = EXPERTS // at.world + 2
    for kinds in (("mxfp4_moe",), KINDS):
        now = maps(1, at.world, slots)
        mine = now[at.rank * slots : (at.rank + 1) * slots]
        weights = [held(name, mine, kinds[at.rank % len(kinds)]) for name in SIZES]
        plain = [
            torch.tensor([[float(expert)] * 3 for expert in mine], dtype=torch.bfloat16),
            torch.tensor([100 + expert for expert in mine], dtype=torch.uint8),
            torch.nn.Parameter(torch.tensor([[[float(expert)] * 2] * 4 for expert in mine])),
        ]
        before = addresses(*weights)
        for seed in range(2, 7):
            new = maps(seed, at.world, slots)
            move_experts_([plain[0], *weights, *plain[1:]], now, new)
            now = new
            mine = now[at.rank * slots : (at.rank + 1) * slots]
            for name, weight in zip(SIZES, weights, strict=True):
                assert torch.equal(weight.dequantize(torch.float64), values_of(name, mine)), (kinds, seed, name)
            assert plain[0].tolist() == [[float(expert)] * 3 for expert in mine]
            assert plain[1].tolist() == [100 + expert for expert in mine]
            assert plain[2].tolist() == [[[float(expert)] * 2] * 4 for expert in mine]
            assert addresses(*weights) == before


@on_ranks(2, 4)
def test_a_layer_gives_what_it_gave(at: Rank) -> None:
    """Each token's slot finds its expert wherever it has gone."""
    slots = EXPERTS // at.world + 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 384, generator=generator)
    weight, ids = torch.rand(6, 2, generator=generator), torch.randint(EXPERTS, (6, 2), generator=generator)
    expected = dense_moe(x, values_of("w13", range(EXPERTS)), values_of("w2", range(EXPERTS)), weight, ids)
    now = maps(1, at.world, slots)
    own = slice(at.rank * slots, (at.rank + 1) * slots)
    weights = [held(name, now[own], "mxfp4_moe") for name in SIZES]
    for seed in range(2, 5):
        new = maps(seed, at.world, slots)
        move_experts_(weights, now, new)
        now = new
        physical = torch.tensor([[now.index(expert) for expert in row] for row in ids.tolist()], dtype=torch.int32)
        mask = torch.zeros(len(now), dtype=torch.int32)
        mask[own] = 1
        out = fused_moe(x, *weights, weight, physical, expert_mask=mask)
        dist.all_reduce(out)
        assert relative_error(out, expected) < 1e-5


@on_ranks(2, 4)
def test_one_message_to_each_rank_and_one_agreement_at_first(at: Rank) -> None:
    """No bytes are laid out anew where layouts agree, and the bytes that come are those of experts, each once."""
    slots = 4
    now, new = maps(1, at.world, slots), maps(2, at.world, slots)
    own = slice(at.rank * slots, (at.rank + 1) * slots)
    weights = [held(name, now[own], "mxfp4_moe") for name in SIZES]
    bias = torch.tensor([[float(expert)] for expert in now[own]])
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        patch.setattr(type(weights[0]._storage), "_permutation", None)  # nobody may ask for it
        received = move_experts_([*weights, bias], now, new)
        assert counted.agreements == 1
        sent = [[peer for kind, peer, _ in batch if kind == "isend"] for batch in counted.batches]
        assert len(sent) == 2  # w13; then w2, which leaves room for the bias
        assert all(len(peers) == len(set(peers)) for peers in sent)
        each = sum(data[:1].nbytes for weight in weights for data in (weight.qdata, weight.scale)) + bias[:1].nbytes
        come = len(set(new[own]) - set(now[own]))
        assert received == come * each == sum(n for batch in counted.batches for kind, _, n in batch if kind == "irecv")
        move_experts_([*weights, bias], new, now)
        assert counted.agreements == 1
        assert move_experts_([*weights, bias], now, now) == 0
    for name, weight in zip(SIZES, weights, strict=True):
        assert torch.equal(weight.dequantize(torch.float64), values_of(name, now[own]))


@on_ranks(4)
def test_ranks_of_a_group_move_among_themselves(at: Rank) -> None:
    """By their numbers in it."""
    group = dist.new_group([3, 1])
    if at.rank in (1, 3):
        rank, slots = dist.get_rank(group), EXPERTS // 2
        now, new = maps(1, 2, slots), maps(2, 2, slots)
        own = slice(rank * slots, (rank + 1) * slots)
        weight = held("w2", now[own], KINDS[at.rank])
        move_experts_([weight], now, new, group)
        assert torch.equal(weight.dequantize(torch.float64), values_of("w2", new[own]))


@on_ranks(2)
def test_a_weight_knows_which_experts_it_holds(at: Rank) -> None:
    """And says so where ``old`` is another map."""
    order = "contiguous"
    whole = ShuffledMXFP4Tensor(*parts_of("w13"), gate_up=True, row_order=order)
    weight = whole.shard(at.rank, 2, dim="expert")
    now, new = [*range(8)], [7, 0, 0, 1, 5, 2, 3, 4]
    own = slice(at.rank * 4, at.rank * 4 + 4)
    move_experts_([weight], now, new)
    assert weight.place == whole.place._replace(experts=tuple(new[own]))
    assert torch.equal(weight.dequantize(torch.float64), values_of("w13", new[own]))
    with pytest.raises(ValueError, match=r"holds the experts .* of its whole, and old says"):
        move_experts_([weight], now, new)
    views = weight[1:3]  # of which nothing else moves
    assert move_experts_([views], [0, 0, 2, 3], [2, 0, 0, 3]) > 0
    expected = [[7, 2, 0, 1], [5, 0, 3, 4]][at.rank]
    assert weight.place.experts == tuple(expected)
    assert torch.equal(weight.dequantize(torch.float64), values_of("w13", expected))


@on_ranks(2)
def test_what_cannot_move_is_refused_before_anything_does(at: Rank) -> None:
    weight = held("w13", [0, 1], "mxfp4_moe")
    before = weight.dequantize(torch.float64)
    now, new = [0, 1, 2, 3], [2, 3, 0, 1]
    for tensors, kind, words in (
        ([weight, torch.zeros(3, 5)], ValueError, r"weights\[1\] has 3 slots, and old names 2 of each rank"),
        ([weight[:, :64]], ValueError, r"weights\[0\] must be whole experts"),
        ([weight, torch.zeros(5, 2).T], ValueError, r"weights\[1\] is not contiguous"),
    ):
        with pytest.raises(kind, match=words):
            move_experts_(tensors, now, new)
    with pytest.raises(ValueError, match=r"experts \[4\] are in no slot"):
        move_experts_([weight], now, [4, 0, 1, 2])
    other = held("w2" if at.rank else "w13", [0, 1], "mxfp4_moe")
    with pytest.raises(ValueError, match="must have the same rows, columns"):
        move_experts_([other], now, new)
    assert torch.equal(weight.dequantize(torch.float64), before)


@on_ranks(2, 4)
def test_a_move_that_ends_early_leaves_weights_unusable(at: Rank) -> None:
    slots = EXPERTS // at.world
    now, new = maps(1, at.world, slots), maps(2, at.world, slots)
    weights = [held(name, now[at.rank * slots : (at.rank + 1) * slots], "mxfp4_moe") for name in SIZES]
    agree_(weights)

    def gone(*args: Any) -> None:
        raise ConnectionError("gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", gone)
        with pytest.raises(ConnectionError):
            move_experts_(weights, now, new)
    for weight in weights:
        with pytest.raises(RuntimeError, match="cannot be used: writing to it was interrupted"):
            weight.dequantize()
    with pytest.raises(RuntimeError, match="cannot be used"):
        move_experts_(weights, now, new)


def test_a_weight_that_is_named_twice_is_not_moved_twice() -> None:
    weight = ShuffledMXFP4Tensor(coded(2, 64, 32), coded(2, 64, 2), gate_up=False)
    with pytest.raises(ValueError, match="two of the weights are the same memory, which would move twice"):
        moves._check([weight, weight.detach()], [0, 1], [1, 0])
    part = weight.shard(0, 1, dim="expert")
    with pytest.raises(ValueError, match=r"is of a whole of 2 experts, and new says \[-1, 0\]"):
        moves._check([part], [0, 1], [-1, 0])
