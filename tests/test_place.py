# SPDX-License-Identifier: MIT
"""A part of a weight knows where it lies in the whole, for as long as it does."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shuffled_tensor import Place, ShuffledMXFP4Tensor, load_experts, refit, save_file

from .support.judges import dense
from .support.layer import EXPERTS, HIDDEN, INTERMEDIATE, make_weight, weight_parts

W13, W2 = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)


def in_whole(name: str, place: Place) -> torch.Tensor:
    """The values of the whole at a place, in float64."""
    whole = dense(*weight_parts(name)).unflatten(1, (2 if name == "w13" else 1, -1))
    rows, columns = (slice(part.start, part.stop) for part in place[2:])
    return whole[list(place.experts)][:, :, rows, columns].flatten(1, 2)


PARTS: dict[str, tuple[str, Callable[[ShuffledMXFP4Tensor], ShuffledMXFP4Tensor], Place]] = {
    "experts": ("w13", lambda w: w.shard(1, 2, dim="expert"), Place(W13, range(2, 4), range(160), range(544))),
    "halves of rows": ("w13", lambda w: w.shard(1, 2), Place(W13, range(4), range(96, 160), range(544))),
    "columns": ("w2", lambda w: w.shard(1, 2), Place(W2, range(4), range(544), range(96, 160))),
    "a shard of a shard": (
        "w13",
        lambda w: w.shard(1, 2, dim="expert").shard(0, 2).shard(1, 3),
        Place(W13, range(2, 4), range(32, 64), range(544)),
    ),
    "experts of columns": (
        "w2",
        lambda w: w.shard(0, 2).shard(1, 4, dim="expert"),
        Place(W2, range(1, 2), range(544), range(96)),
    ),
    "a view of a part": (
        "w2",
        lambda w: w.shard(1, 2)[1:3],  # type: ignore[dict-item, return-value]
        Place(W2, range(1, 3), range(544), range(96, 160)),
    ),
    "every second": (
        "w13",
        lambda w: w.shard(1, 2)[::2],  # type: ignore[dict-item, return-value]
        Place(W13, (0, 2), range(96, 160), range(544)),
    ),
    "one of a part": (
        "w13",
        lambda w: w.shard(1, 2)[1:2],  # type: ignore[dict-item, return-value]
        Place(W13, range(1, 2), range(96, 160), range(544)),
    ),
    "permuted": (
        "w13",
        lambda w: w.shard(1, 2, dim="expert").permute_experts_([1, 0]),
        Place(W13, (3, 2), range(160), range(544)),
    ),
    "the whole": ("w13", lambda w: w, Place(W13, range(4), range(160), range(544))),
}


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
@pytest.mark.parametrize(("name", "part", "place"), PARTS.values(), ids=PARTS)
def test_a_place_says_which_values_are_here(
    name: str, part: Callable[[ShuffledMXFP4Tensor], ShuffledMXFP4Tensor], place: Place, layout: str
) -> None:
    found = part(make_weight(name).shuffle_(layout))
    assert found.place == place
    assert torch.equal(found.dequantize(torch.float64), in_whole(name, place))


def saved(weight: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, ShuffledMXFP4Tensor)
    return loaded


def refitted(weight: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    with refit(weight):
        pass
    return weight


def unchanged(weight: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    module, other = nn.Module(), nn.Module()
    module.w, other.w = nn.Parameter(weight), nn.Parameter(torch.zeros_like(weight))
    other.load_state_dict(module.state_dict())
    return other.w


KEEP: dict[str, Callable[[ShuffledMXFP4Tensor], object]] = {
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": saved,
    "refit": refitted,
    "shuffle_": lambda w: w.shuffle_("mxfp4_separated"),
    "Parameter": nn.Parameter,
    "load_state_dict": unchanged,
    "copy_": lambda w: w.copy_(w.dequantize()),
    "all of it": lambda w: w[:],
}


@pytest.mark.parametrize("part", ["a shard of a shard", "permuted"])
@pytest.mark.parametrize("keep", KEEP)
def test_a_place_is_kept(keep: str, part: str) -> None:
    name, make, place = PARTS[part]
    found = KEEP[keep](make(make_weight(name).shuffle_("mxfp4_moe")))
    assert isinstance(found, ShuffledMXFP4Tensor)
    assert found.place == place
    assert torch.equal(found.dequantize(torch.float64), in_whole(name, place))


ENDS: dict[str, Callable[[ShuffledMXFP4Tensor], torch.Tensor]] = {
    "index": lambda w: w[torch.tensor([1, 0])],
    "index_select": lambda w: w.index_select(0, torch.tensor([1, 0])),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w[0], w[1]]),
    "rows": lambda w: w[:, :32].clone(),
    "columns": lambda w: w[..., :32],
}


@pytest.mark.parametrize("end", ENDS)
def test_a_place_ends_where_something_else_is_made_of_it(end: str) -> None:
    found = ENDS[end](make_weight("w2").shard(1, 2))
    assert isinstance(found, ShuffledMXFP4Tensor)
    assert found.place == Place.whole((found.shape[0], found.shape[1], found.shape[2]), 1)
    assert found.parted is None


def test_a_place_that_does_not_fit_is_refused() -> None:
    weight = make_weight("w13")
    part = weight.shard(1, 2)
    for wrong, message in (
        (part.place._replace(experts=range(3)), "one of a part of shape"),
        (part.place._replace(experts=(0, 1, 2, 4)), "lies within experts, rows of each half"),
        (part.place._replace(rows=range(100, 164)), "lies within experts, rows of each half"),
        (part.place._replace(shape=(4, 320, 512)), "lies within experts, rows of each half"),
    ):
        with pytest.raises(ValueError, match=message):
            part.place = wrong
    with pytest.raises(ValueError, match="a view lies where the tensor"):
        part[1:].place = part.place
    assert part.place == PARTS["halves of rows"][2]
    part.place = part.place._replace(experts=(3, 0, 0, 1))  # as after a rebalance
    assert part[1:3].place.experts == (0, 0)


def test_loading_says_which_part_it_is(tmp_path: Path) -> None:
    weights = {"experts.w13_weight": make_weight("w13"), "experts.w2_weight": make_weight("w2")}
    save_file(weights, tmp_path / "layer.safetensors")
    both = {"rank": (1, 1), "world_size": (2, 2), "dim": ("expert", "intermediate")}
    (loaded,) = load_experts(tmp_path, **both).values()  # type: ignore[arg-type]
    for name, weight in zip(("w13", "w2"), loaded[:2], strict=True):
        assert isinstance(weight, ShuffledMXFP4Tensor)
        assert weight.place == make_weight(name).shard(1, 2, dim="expert").shard(1, 2).place
        assert torch.equal(weight.dequantize(torch.float64), in_whole(name, weight.place))
    module = nn.Module()
    module.experts = nn.Module()
    for name in ("w13", "w2"):
        setattr(module.experts, f"{name}_weight", nn.Parameter(make_weight(name).shard(0, 2, dim="expert")))
    load_experts(tmp_path, into=module, rank=1, world_size=2)
    assert module.experts.w13_weight.place == PARTS["experts"][2]
    assert torch.equal(module.experts.w13_weight.dequantize(torch.float64), in_whole("w13", PARTS["experts"][2]))


def test_experts_of_a_place_are_numbers_in_their_order() -> None:
    """A stepped range is a list of its own, and ids out of a tensor are numbers; others are refused."""
    weight = make_weight("w2")
    whole = weight.place
    part = weight[torch.tensor([1, 3])].clone()
    for experts in (range(1, 4, 2), tuple(torch.tensor([1, 3])), (1, 3)):
        part.place = whole._replace(experts=experts)
        assert part.place.experts == (1, 3)
        assert all(type(expert) is int for expert in part.place.experts)
    with pytest.raises(TypeError, match="the experts of a place must be whole numbers, found 1.5"):
        part.place = whole._replace(experts=(1.5, 3))  # type: ignore[arg-type]


def test_all_of_a_whole_is_a_place_too() -> None:
    """What a move in a group of one makes of it is known afterwards."""
    part = make_weight("w13").shard(0, 1, dim="expert").permute_experts_([3, 2, 1, 0])
    assert part.place.experts == (3, 2, 1, 0)
