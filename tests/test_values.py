# SPDX-License-Identifier: MIT
"""Sizes, flags, numbers and types that mean nothing: refused at once, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, picture, quantize, shuffle_weight

from .support.bytes import coded, moderate_scales
from .support.judges import dense


def parts(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return coded(experts, rows, columns // 2), moderate_scales(experts, rows, columns // 32)


def make(shape: tuple[int, int, int]) -> ShuffledMXFP4Tensor:
    return ShuffledMXFP4Tensor(*parts(*shape), gate_up=True, row_order="contiguous")


@pytest.mark.parametrize("gate_up", [None, 1, 0, "no", "yes", torch.tensor(True)])
def test_gate_up_is_true_or_false(gate_up: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ShuffledMXFP4Tensor(*parts(2, 64, 64), gate_up=gate_up, row_order="contiguous"),
        lambda: ShuffledMXFP4Tensor.from_hp(torch.zeros(2, 64, 64), gate_up=gate_up),
        lambda: picture("mxfp4_moe", 64, 512, gate_up=gate_up),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="gate_up must be True .* or False .*, found"):
            call()


@pytest.mark.parametrize("rank", [2, 3])
def test_an_expert_has_rows_and_columns(rank: int) -> None:
    for shape in ((2, 0, 64), (2, 64, 0), (0, 0, 64)):
        with pytest.raises(ValueError, match="an expert needs rows|K must be a multiple"):
            ShuffledMXFP4Tensor(*(part[(0,) * (3 - rank)] for part in parts(2, *shape[1:])), gate_up=False)
        with pytest.raises(ValueError, match="an expert needs rows and columns"):
            ShuffledMXFP4Tensor.from_hp(torch.zeros(shape[3 - rank :]), gate_up=False)
    none = ShuffledMXFP4Tensor(*parts(0, 64, 64), gate_up=False)
    assert none.shuffle_("mxfp4_moe").dequantize().shape == (0, 64, 64)
    assert [tuple(part.shape) for part in none.split(2)] == [(0, 64, 64)]
    assert none.clone().permute_experts_([]).shape == (0, 64, 64)


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_slices_of_nothing_are_copied(layout: str) -> None:
    weight = make((3, 96, 160)).shuffle_(layout)
    for empty in ((slice(None), slice(5, 5)), (slice(None), slice(96, None)), (..., slice(0, 0)), slice(3, None)):
        weight[empty].copy_(weight[empty].clone())
        joined = torch.cat([weight[empty], weight[empty].clone()])
        plain = dense(*parts(3, 96, 160))[empty]
        assert torch.equal(joined.dequantize(torch.float64), torch.cat([plain, plain]))
        assert torch.equal(weight[empty].clone().unshuffle_().dequantize(torch.float64), plain)
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(3, 96, 160)))


@pytest.mark.parametrize(
    "order", [[0.5, 1, 2], [True, False, 2], torch.tensor([0.0, 1, 2]), torch.tensor([True, False, True]), "012"]
)
def test_experts_are_permuted_by_whole_numbers(order: Any) -> None:
    weight = make((3, 96, 160))
    with pytest.raises(TypeError, match="order must be whole numbers, found"):
        weight.permute_experts_(order)
    for rank, world_size in ((True, 3), (0.5, 3), (0, 3.0), ("0", 3), (None, 3)):
        with pytest.raises(TypeError, match="rank and world_size must be whole numbers, found"):
            weight.shard(rank, world_size, dim="expert")
    for rank, world_size in ((0, 0), (0, -1), (-1, 3), (3, 3)):
        with pytest.raises(ValueError, match=f"found rank {rank} of {world_size}"):
            weight.shard(rank, world_size, dim="expert")
    with pytest.raises(TypeError, match=r"the experts of index_copy_ must be whole numbers, found 0\.5"):
        weight.index_copy_(0, torch.tensor([0.5]), weight[:1].clone())
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(3, 96, 160)))
    weight.permute_experts_(torch.tensor([2, 0, 1], dtype=torch.int32))
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(3, 96, 160))[[2, 0, 1]])


SPLITS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "split(-1)": lambda w: w.split(-1),
    "split(0)": lambda w: w.split(0),
    "split(-1) of rows": lambda w: w.split(-1, 1),
    "split(2)": lambda w: w.split(2),
    "split(7)": lambda w: w.split(7),
    "split(64) of columns": lambda w: w.split(64, -1),
    "split of no dim": lambda w: w.split(1, 3),
    "split(0) of none": lambda w: w[:0].split(0),
    "split(2) of none": lambda w: w[:0].split(2),
    "sizes": lambda w: w.split([1, 2]),
    "sizes with none": lambda w: w.split([0, 3]),
    "too many": lambda w: w.split([2, 2]),
    "too few": lambda w: w.split([1, 1]),
    "negative": lambda w: w.split([4, -1]),
    "no sizes": lambda w: w.split([]),
    "sizes of rows": lambda w: w.split([32, 64], 1),
    "sizes of no dim": lambda w: w.split([1, 2], -4),
    "chunk(0)": lambda w: w.chunk(0),
    "chunk(-1)": lambda w: w.chunk(-1),
    "chunk(2)": lambda w: w.chunk(2),
    "chunk(5)": lambda w: w.chunk(5),
    "tensor_split(0)": lambda w: w.tensor_split(0),
    "tensor_split(2)": lambda w: w.tensor_split(2),
    "unbind": lambda w: w.unbind(),
    "unbind of no dim": lambda w: w.unbind(3),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_what_torch_does_not_split_is_not_split_here(split: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Judged by a plain tensor: the same parts, or an error where that has one."""
    weight = make((3, 96, 160))
    plain = dense(*parts(3, 96, 160))
    try:
        expected = split(plain)
    except (RuntimeError, IndexError) as error:
        with pytest.raises((ValueError, RuntimeError) if isinstance(error, RuntimeError) else IndexError):
            split(weight)
        return
    found = split(weight)
    assert len(found) == len(expected)
    assert all(torch.equal(a.dequantize(torch.float64), b) for a, b in zip(found, expected, strict=True))


def test_no_tensors() -> None:
    qdata, scale = parts(2, 64, 64)
    weight = ShuffledMXFP4Tensor(qdata, scale, gate_up=False)
    calls: dict[str, Callable[[], object]] = {
        "qdata must be a tensor, found list": lambda: ShuffledMXFP4Tensor(qdata.tolist(), scale, gate_up=False),
        "scale must be a tensor, found list": lambda: ShuffledMXFP4Tensor(qdata, scale.tolist(), gate_up=False),
        "scale must be a tensor, found NoneType": lambda: ShuffledMXFP4Tensor(qdata, None, gate_up=False),
        "qdata must be a tensor, found ndarray": lambda: ShuffledMXFP4Tensor(qdata.numpy(), scale, gate_up=False),
        "weight must be a tensor, found list": lambda: ShuffledMXFP4Tensor.from_hp([[0.0] * 32], gate_up=False),
        "weight must be a tensor, found NoneType": lambda: weight.refit_from_hp_(None),
        "values must be a tensor, found float": lambda: quantize(0.5),
        "qdata must be a tensor, found bytes": lambda: shuffle_weight(b"0", "mxfp4_moe", gate_up=False),
        "out must be a tensor, found list": lambda: shuffle_weight(qdata, "mxfp4_moe", gate_up=False, out=[]),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()
    for kind in (["mxfp4_moe"], 1, b"mxfp4_moe"):
        with pytest.raises(ValueError, match="unknown shuffle_kind"):
            weight.shuffle_(kind)
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(2, 64, 64)))
