# SPDX-License-Identifier: MIT
"""Experts are picked, moved, joined and dealt out in any layout, weight and scale together; nothing is unshuffled for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe
from shuffled_tensor.layouts import Order

from .support.bytes import LAYOUTS, addresses, marked, marked_parts, moderate_scales, weight_of
from .support.judges import assert_holds, dense, dense_moe, in_memory, relative_error

SHAPES = [(5, 512, 512), (5, 96, 160)]
INDEX = torch.tensor([3, 0, 3, 4])


@contextmanager
def bytes_stay_as_they_lie() -> Iterator[None]:
    """Fails where any byte is brought from one order into another."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was laid out anew")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Order, "_permute", refuse)
        yield


# written once, for our tensor and for the plain bytes that judge it
VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "unbind": lambda w: w.unbind(),
    "iteration": lambda w: list(w),
    "split": lambda w: w.split(2),
    "split of a split": lambda w: w.split(3)[0].split(2),
    "split in sizes": lambda w: torch.split(w, [1, 3, 1]),
    "chunk": lambda w: w.chunk(2),
    "tensor_split": lambda w: w.tensor_split(3),
    "steps": lambda w: w[1::2],
    "narrow": lambda w: w.narrow(0, 1, 3),
    "negative": lambda w: w[-2],
    "one of some": lambda w: w[::2][1],
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "index_select": lambda w: w.index_select(0, INDEX),
    "index_select of a view": lambda w: torch.index_select(w[::2], 0, torch.tensor([2, 1])),
    "index": lambda w: w[INDEX],
    "index of a view": lambda w: w[1:][INDEX - 1],
    "a list": lambda w: w[[4, 1]],
    "a mask": lambda w: w[torch.tensor([True, False, True, True, False])],
    "negative index": lambda w: w[torch.tensor([-1, 0])],
    "no expert": lambda w: w[torch.tensor([], dtype=torch.int64)],
    "cat": lambda w: torch.cat([w[3:], w, w[:1]]),
    "stack": lambda w: torch.stack([w[4], w[0], w[4]]),
    "stack, from behind": lambda w: torch.stack(list(w), -3),
    "clone": lambda w: w[1:4].clone(),
}


@pytest.mark.parametrize("operation", [*VIEWS, *COPIES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
def test_picked_and_joined(operation: str, gate_up: bool, layout: str) -> None:
    run = (VIEWS | COPIES)[operation]
    for shape in SHAPES if operation in ("index_select", "cat", "unbind") else SHAPES[1:]:
        parts = marked_parts(*shape)
        weight = weight_of(parts, layout, gate_up=gate_up)
        with bytes_stay_as_they_lie():
            found = run(weight)
        expected = [run(part) for part in in_memory(parts, layout, gate_up=gate_up)]
        values = run(dense(*parts))
        if not isinstance(found, list | tuple):
            found, expected, values = [found], [[part] for part in expected], [values]
        assert len(found) == len(values)
        for own, qdata, scale, value in zip(found, *expected, values, strict=True):
            assert isinstance(own, ShuffledMXFP4Tensor)
            assert (own.is_shuffled, own.gate_up, own.dtype) == (layout != "none", gate_up, torch.float32)
            assert torch.equal(own.qdata, qdata)
            assert torch.equal(own.scale, scale)
            assert torch.equal(own.dequantize(torch.float64), value)
            own.copy_(torch.ones(own.shape))  # into a view it goes through, into a copy it does not
            assert torch.equal(own.dequantize(), torch.ones(own.shape))
        touched = (weight.dequantize(torch.float64) != dense(*parts)).any()
        assert bool(touched) == (operation in VIEWS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("theirs", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_written_over_others(shape: tuple[int, int, int], theirs: str, layout: str) -> None:
    qdata, scale = parts = marked_parts(*shape)
    weight = weight_of(parts, layout)
    address = addresses(weight)
    for salt, write in enumerate(
        (
            lambda w, new, index: w.index_copy_(0, index, new),
            lambda w, new, index: w.__setitem__(index, new),
            lambda w, new, index: w.index_put_((index,), new),
            lambda w, new, index: w.__setitem__(
                torch.zeros(5, dtype=torch.bool).index_fill_(0, index.sort()[0], True), new
            ),
            lambda w, new, index: w.__setitem__(slice(1, 4), new),
            lambda w, new, index: [w[expert].copy_(values) for expert, values in zip(index.tolist(), new, strict=True)],
        ),
        1,
    ):
        new = marked_parts(3, *shape[1:], salt=salt)
        index = torch.tensor([4, 0, 2]).roll(salt)
        for part, values in zip(parts, new, strict=True):
            write(part, values, index)
        source = weight_of(new, theirs)
        if theirs == layout:
            with bytes_stay_as_they_lie():
                write(weight, source, index)
        else:
            write(weight, source, index)
        assert_holds(source, new, theirs)
        assert_holds(weight, parts, layout)
    assert addresses(weight) == address
    weight[torch.tensor([1, 3])] = 0.5
    expected = dense(qdata, scale)
    expected[[1, 3]] = 0.5
    assert torch.equal(weight.dequantize(torch.float64), expected)


def test_written_over_others_in_a_narrow_dtype() -> None:
    """Bytes are moved, not values: float16 holds neither of the scales here."""
    qdata, scale = marked_parts(2, 96, 160, salt=1)
    for write in (
        lambda w, new: w.index_copy_(0, torch.tensor([2, 0]), new),
        lambda w, new: w.__setitem__(torch.tensor([2, 0]), new),
    ):
        weight = weight_of(marked_parts(3, 96, 160), "mxfp4_moe", dtype=torch.float16)
        write(weight, weight_of((qdata, scale), "mxfp4_moe", dtype=torch.float16))
        assert_holds(weight[torch.tensor([2, 0])], (qdata, scale), "mxfp4_moe")


def test_one_expert_over_several_and_over_none() -> None:
    qdata, scale = marked_parts(2, 96, 160, salt=1)
    source = weight_of((qdata, scale), dtype=torch.float16)
    for values in (source[1], source[1:]):
        weight = weight_of(marked_parts(3, 96, 160), "mxfp4_moe", dtype=torch.float16)
        for index in (torch.tensor([], dtype=torch.int64), torch.tensor([2, 0])):
            weight.index_put_((index,), values)
        assert_holds(weight[[2, 0]], (qdata[[1, 1]], scale[[1, 1]]), "mxfp4_moe")
        assert_holds(weight[1:2], tuple(part[1:2] for part in marked_parts(3, 96, 160)), "mxfp4_moe")


def test_what_is_written_in_place_is_returned() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            weight = weight_of(marked_parts(3, 96, 160), "mxfp4_moe")
            other = weight_of(marked_parts(3, 96, 160, salt=1))
            assert weight.copy_(other) is weight
            assert weight.copy_(weight) is weight
            assert weight.index_copy_(0, torch.tensor([1]), other[:1]) is weight
            view, scales = weight.scale_view, marked_parts(3, 96, 160)[1]
            assert view.copy_(scales) is view


def test_experts_written_twice_at_once_are_refused() -> None:
    parts = marked_parts(3, 96, 160)
    weight, other = weight_of(parts, "mxfp4_moe"), weight_of(marked_parts(3, 96, 160, salt=1))
    for index, source in (([1, 1], other[:2]), ([0, -3], other[:2]), ([0, 1], other), ([1, 2], other[:2, :32])):
        with pytest.raises(ValueError, match="index_copy_ takes different experts and values of shape"):
            weight.index_copy_(0, torch.tensor(index), source)
    assert_holds(weight, parts, "mxfp4_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_swapped_and_moved_along(layout: str) -> None:
    """As rebalancing does it; a source that is being overwritten is read first, or refused as torch refuses it."""
    parts = marked_parts(4, 96, 160)
    weight = weight_of(parts, layout)
    for write in (
        lambda w: w.__setitem__([0, 3], w[[3, 0]]),
        lambda w: w.index_copy_(0, torch.tensor([1, 2, 3]), w[torch.tensor([0, 1, 2])]),
        lambda w: w[0].copy_(w[2]),
    ):
        write(weight)
        for part in parts:
            write(part)
        assert_holds(weight, parts, layout)
    for write in (
        lambda w: w.index_copy_(0, torch.tensor([1, 2, 3]), w[:3]),
        lambda w: w.__setitem__(slice(1, None), w[:-1]),
    ):
        try:
            write(weight)
        except (RuntimeError, ValueError):
            pass
        else:
            for part in parts:
                part[1:] = part[:-1].clone()
        assert_holds(weight, parts, layout)


ORDERS = {
    "one cycle": [1, 2, 3, 4, 0],
    "two cycles": [3, 4, 2, 0, 1],
    "a swap": [0, 3, 2, 1, 4],
    "nothing": [0, 1, 2, 3, 4],
    "no involution": [2, 4, 1, 0, 3],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind_of_order", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_permutations_in_place(layout: str, kind_of_order: Callable[[list[int]], Any], order: list[int]) -> None:
    parts = marked_parts(5, 96, 160)
    weight = weight_of(parts, layout)
    alias, address = weight.detach(), addresses(weight)
    with bytes_stay_as_they_lie():
        assert weight.permute_experts_(kind_of_order(order)) is weight
    assert_holds(alias, tuple(part[order] for part in parts), layout)
    assert addresses(weight) == address


def test_permutations_of_some_experts_and_what_is_none() -> None:
    parts = marked_parts(5, 96, 160)
    weight = weight_of(parts, "mxfp4_moe")
    weight[1:4].permute_experts_([2, 0, 1])
    order = [0, 3, 1, 2, 4]
    for wrong in ([0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, -1]):
        with pytest.raises(ValueError, match="each of the 5 experts once"):
            weight.permute_experts_(wrong)
    with pytest.raises(ValueError, match="experts once"):
        weight[0].permute_experts_([0])
    assert_holds(weight, tuple(part[order] for part in parts), "mxfp4_moe")


# --- shared experts appended


@pytest.mark.parametrize("theirs", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_experts_appended(shape: tuple[int, int, int], gate_up: bool, layout: str, theirs: str) -> None:
    routed, shared = marked_parts(*shape), marked_parts(1, *shape[1:], salt=1)
    weight, other = weight_of(routed, layout, gate_up=gate_up), weight_of(shared, theirs, gate_up=gate_up)
    joined = torch.cat([weight, other])
    assert_holds(joined, tuple(torch.cat(pair) for pair in zip(routed, shared, strict=True)), layout)
    assert_holds(other, shared, theirs)
    single = torch.stack([weight[1], other[0]])
    assert_holds(single, tuple(torch.stack([a[1], b[0]]) for a, b in zip(routed, shared, strict=True)), layout)


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(lambda: torch.zeros(1, 96, 160), id="a plain tensor"),
        pytest.param(lambda: weight_of(marked_parts(1, 94, 160)), id="fewer rows, as many with pads"),
        pytest.param(lambda: weight_of(marked_parts(1, 96, 192)), id="more columns, as many with pads"),
        pytest.param(lambda: weight_of(marked_parts(1, 96, 160), gate_up=False), id="no gate and up rows"),
        pytest.param(lambda: weight_of(marked_parts(1, 96, 160), dtype=torch.bfloat16), id="another dtype"),
        pytest.param(lambda: weight_of(marked_parts(1, 192, 160))[:, :96], id="rows of which some are gate rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("behind", [True, False])
def test_experts_of_another_format_or_shape_are_not_joined(shared: Callable[[], Tensor], behind: bool) -> None:
    tensors = [weight_of(marked_parts(2, 96, 160), "mxfp4_moe"), shared()]
    pair = tensors if behind else tensors[::-1]
    with pytest.raises((TypeError, ValueError), match=r"joined .* found"):
        torch.cat(pair)
    with pytest.raises((TypeError, ValueError), match=r"joined .* found"):
        torch.stack([tensor[0] for tensor in pair])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_experts_are_joined_by_value(layout: str) -> None:
    """A view of rows is not gate-up any more, and what it is joined with must not be read as if it were."""
    parts, down = marked_parts(2, 1024, 512), marked_parts(2, 512, 512, salt=1)
    up = weight_of(parts, layout)[:, 512:]
    assert not up.gate_up
    for others, gate_up in ((down, False), (tuple(part[:, :512] for part in parts), None)):
        other = weight_of(parts, layout)[:, :512] if gate_up is None else weight_of(others, layout, gate_up=False)
        joined = torch.cat([up, other])
        assert_holds(joined, tuple(torch.cat([a[:, 512:], b]) for a, b in zip(parts, others, strict=True)), layout)


# --- shards


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "world_size"), [((2, 1024, 512), 2), ((3, 384, 160), 2), ((2, 384, 288), 3)], ids=str
)
def test_shards_of_gate_and_up(shape: tuple[int, int, int], world_size: int, layout: str) -> None:
    parts = marked_parts(*shape)
    weight = weight_of(parts, layout, dtype=torch.float64)
    size = shape[1] // 2 // world_size
    for rank in range(world_size):
        own = slice(rank * size, (rank + 1) * size)
        expected = tuple(torch.cat([half[:, own] for half in part.chunk(2, 1)], 1) for part in parts)
        shard = weight.shard(rank, world_size)
        assert (shard.gate_up, shard.dtype) == (True, torch.float64)
        assert_holds(shard, expected, layout)
        one = weight[1].shard(rank, world_size)
        assert torch.equal(one.dequantize(torch.float64), dense(*expected)[1])
        shard.copy_(torch.zeros(shard.shape))
    assert_holds(weight, parts, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "world_size"), [((2, 512, 1024), 2), ((3, 160, 192), 2), ((2, 288, 192), 3)], ids=str
)
def test_shards_of_the_down_weight(shape: tuple[int, int, int], world_size: int, layout: str) -> None:
    qdata, scale = marked_parts(*shape)
    weight = weight_of((qdata, scale), layout, gate_up=False)
    for rank in range(world_size):
        expected = qdata.chunk(world_size, 2)[rank], scale.chunk(world_size, 2)[rank]
        shard = weight.shard(rank, world_size)
        assert not shard.gate_up
        assert_holds(shard, expected, layout)
        shard.copy_(torch.zeros(shard.shape))
    assert_holds(weight, (qdata, scale), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
def test_shards_of_experts(gate_up: bool, layout: str) -> None:
    parts = marked_parts(6, 96, 160)
    weight = weight_of(parts, layout, gate_up=gate_up)
    for rank in range(3):
        with bytes_stay_as_they_lie():
            shard = weight.shard(rank, 3, dim="expert")
        assert_holds(shard, tuple(part[2 * rank : 2 * rank + 2] for part in parts), layout)
        shard.copy_(torch.zeros(shard.shape))
    assert_holds(weight, parts, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_on_two_ranks(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w13_parts = marked(3, 256, 80), moderate_scales(3, 256, 5)
    w2_parts = marked(3, 160, 64, salt=1), moderate_scales(3, 160, 4)
    w13, w2 = weight_of(w13_parts, layout), weight_of(w2_parts, layout, gate_up=False)
    x, routing = torch.randn(4, 160, generator=generator), torch.rand(4, 2, generator=generator)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    out = sum(fused_moe(x, w13.shard(rank, 2), w2.shard(rank, 2), routing, ids) for rank in range(2))
    assert relative_error(out, dense_moe(x, dense(*w13_parts), dense(*w2_parts), routing, ids)) < 1e-5


def test_a_shard_keeps_a_fixed_kind_not_yet_used() -> None:
    weight = ShuffledMXFP4Tensor(
        *marked_parts(2, 128, 64), gate_up=True, row_order="contiguous", shuffle_kind="mxfp4_moe"
    )
    for shard in (weight.shard(1, 2), weight.shard(1, 2, dim="expert")):
        assert (shard.shuffle_kind, shard.is_shuffled) == ("mxfp4_moe", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "world_size": 2, "dim": "rows"}, "dim must be 'expert'.* or 'intermediate', found 'rows'"),
        ({"rank": 2, "world_size": 2}, "found rank 2 of 2"),
        ({"rank": -1, "world_size": 2}, "found rank -1 of 2"),
        ({"rank": 0, "world_size": 5}, "64 .* cannot be parted into 5"),
        ({"rank": 0, "world_size": 4}, "64 .* cannot be parted into 4 .* blocks of 32"),
        ({"rank": 0, "world_size": 2, "dim": "expert"}, "3 .* cannot be parted into 2"),
    ],
)
@pytest.mark.parametrize("gate_up", [True, False])
def test_shards_that_are_refused(gate_up: bool, arguments: dict[str, Any], message: str) -> None:
    weight = weight_of(marked_parts(3, 128, 64), gate_up=gate_up)
    with pytest.raises(ValueError, match=message):
        weight.shard(**arguments)


def test_one_expert_has_no_shards_of_experts() -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        weight_of(marked_parts(2, 128, 64))[0].shard(0, 2, dim="expert")


@pytest.mark.parametrize(("layout", "tile"), [("mxfp4_moe", 16), ("mxfp4_separated", 32)])
def test_only_the_tiles_that_hold_some_rows_are_unshuffled(
    layout: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(marked_parts(2, 1024, 512), layout)
    unshuffled: list[int] = []

    unshuffle = Order.unshuffle

    def spy(order: Order, data: Tensor, out: Tensor | None = None, **scratch: Any) -> Tensor:
        unshuffled.append(data.shape[1])
        return unshuffle(order, data, out, **scratch)

    monkeypatch.setattr(Order, "unshuffle", spy)
    for read, rows in (
        (lambda: weight.shard(1, 2), 256),
        (lambda: weight[:, 40:70].dequantize(), -(-70 // tile) * tile - 40 // tile * tile),
        (lambda: weight[:, -1:].dequantize(), tile),
    ):
        unshuffled.clear()
        read()
        assert max(unshuffled) == 2 * rows  # of gate and up
        unshuffled.clear()
