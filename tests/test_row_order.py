# SPDX-License-Identifier: MIT
"""Gate and up rows in turn: a weight remembers that it was made of them, and takes packed bytes so again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, quantize_experts_, refit, wrap_experts_
from shuffled_tensor.mxfp4 import dequantize

from .support.bytes import LAYOUTS, coded, moderate_scales
from .support.judges import assert_holds, dense

E = 2
SIZES = [(64, 64), (192, 160), (512, 512), (576, 288)]
"""N and K: padded in rows, in columns and in neither; 512, where shuffling twice is the identity."""


def checkpoint(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales whose rows are gate and up rows in turn."""
    codes = coded(E, rows, columns // 2).roll(seed, 1)
    return codes, moderate_scales(E, rows, columns // 32).roll(seed, 1)


def parted(data: Tensor) -> Tensor:
    """Gate rows, then up rows."""
    return torch.cat([data[:, 0::2], data[:, 1::2]], 1)


def made(rows: int, columns: int, layout: str = "none", **options: Any) -> ShuffledMXFP4Tensor:
    weight = ShuffledMXFP4Tensor(
        *checkpoint(rows, columns), gate_up=True, **{"row_order": "interleaved", **options}, dtype=torch.float32
    )
    return weight.shuffle_(layout)


def check(weight: ShuffledMXFP4Tensor, codes: Tensor, scales: Tensor, layout: str = "none") -> None:
    """That it holds this checkpoint, whose rows are gate and up rows in turn, and lies so."""
    assert torch.equal(weight.dequantize(), dense(parted(codes), parted(scales)).float())
    assert_holds(weight, (parted(codes), parted(scales)), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_same_checkpoint_again(rows: int, columns: int, layout: str) -> None:
    """By views whole and in pieces, by a refit, by values."""
    weight = made(rows, columns, layout)
    assert weight.row_order == "interleaved"
    check(weight, *checkpoint(rows, columns), layout)
    address = weight.qdata.data_ptr()

    codes, scales = checkpoint(rows, columns, seed=1)
    weight.qdata_view.copy_(codes)
    weight.scale_view.copy_(scales)
    check(weight, codes, scales, layout)
    assert torch.equal(weight.qdata_view.clone(), codes)
    assert torch.equal(weight.scale_view.clone(), scales)

    codes, scales = checkpoint(rows, columns, seed=2)
    for first, last in ((0, 1), (1, 6), (6, 33), (33, rows)):  # from gate and from up rows on, odd and even numbers
        for view, data in zip((weight.qdata_view, weight.scale_view), (codes, scales), strict=True):
            view[1].narrow(0, first, last - first).copy_(data[1, first:last])
            view[0, first:last, : data.shape[-1] // 2].copy_(data[0, first:last, : data.shape[-1] // 2])
            view[0, first:last, data.shape[-1] // 2 :].copy_(data[0, first:last, data.shape[-1] // 2 :])
            assert torch.equal(view[:, first:last].clone(), data[:, first:last])
            assert torch.equal(view[:, first:last][:, 0:1].clone(), data[:, first : first + 1])
    check(weight, codes, scales, layout)

    codes, scales = checkpoint(rows, columns, seed=3)
    with refit(nn.ParameterList([weight])):
        assert not weight.is_shuffled
        weight.qdata[:, :rows, : columns // 2] = codes
        weight.scale[:, :rows, : columns // 32] = scales
    check(weight, codes, scales, layout)
    assert weight.qdata.data_ptr() == address

    values = dense(*checkpoint(rows, columns, seed=4)).float()
    weight.refit_from_hp_(values)
    again = ShuffledMXFP4Tensor.from_hp(values, gate_up=True, row_order="interleaved")
    assert torch.equal(weight.dequantize(), parted(values))
    assert torch.equal(again.dequantize(), parted(values))

    weight.copy_(weight.dequantize())  # values come as they go
    assert torch.equal(weight.dequantize(), parted(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("was", ["interleaved", "contiguous"])
def test_told_otherwise(was: str, order: Any, layout: str) -> None:
    rows, columns = 192, 160
    weight = made(rows, columns, layout, row_order=was)
    codes, scales = checkpoint(rows, columns, seed=1)
    given = [data if order == "interleaved" else parted(data) for data in (codes, scales)]

    for view, data in zip(weight.views(row_order=order), given, strict=True):
        view.copy_(data)
        assert torch.equal(view.clone(), data)
    check(weight, codes, scales, layout)

    weight.zero_()
    with refit(nn.ParameterList([weight]), row_order=order):
        for data, target in zip(given, (weight.qdata, weight.scale), strict=True):
            if order == "interleaved":
                target[:, :rows, : data.shape[-1]] = data
            else:
                target.unflatten(1, (2, -1))[:, :, : rows // 2, : data.shape[-1]] = data.unflatten(1, (2, -1))
    check(weight, codes, scales, layout)

    weight.zero_()
    weight.refit_from_hp_(dense(*given), row_order=order)
    assert torch.equal(weight.dequantize(), dense(parted(codes), parted(scales)).float())
    assert weight.row_order == was


def through_torch_save(weight: ShuffledMXFP4Tensor) -> Any:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file)


COPIES: dict[str, Callable[[ShuffledMXFP4Tensor], Any]] = {
    "clone": ShuffledMXFP4Tensor.clone,
    "deepcopy": copy.deepcopy,
    "dtype": lambda weight: weight.to(torch.bfloat16),
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "torch.save": through_torch_save,
    "Parameter": nn.Parameter,
    "one expert": lambda weight: weight[1],
    "experts": lambda weight: weight[torch.tensor([1, 0])],
    "cat": lambda weight: torch.cat([weight, weight]),
    "columns": lambda weight: weight[:, :, 32:96].clone(),
    "compiled": lambda weight: torch.compile(lambda w: w.clone(), backend="aot_eager", fullgraph=True)(weight),
    "data": lambda weight: made(192, 160, row_order="contiguous").__setattr__("data", weight) or weight.data,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_remember(copied: Callable[[ShuffledMXFP4Tensor], Any], layout: str) -> None:
    weight = copied(made(192, 160, layout))
    assert weight.row_order == "interleaved"
    codes = weight.qdata_view.clone()
    assert torch.equal(codes[..., 0::2, :], weight.views("contiguous")[0].clone()[..., :96, :])
    assert torch.equal(codes[..., 1::2, :], weight.views("contiguous")[0].clone()[..., 96:, :])


def test_what_has_no_order() -> None:
    """Rows without gate and up; some of the rows, which lie as they are shown."""
    down = ShuffledMXFP4Tensor(*checkpoint(64, 64), gate_up=False)
    assert down.row_order is None
    some = made(64, 64)[:, :32]
    assert some.row_order is None
    assert torch.equal(some.qdata_view.clone(), checkpoint(64, 64)[0][:, 0::2])
    assert some.clone().row_order is None
    with refit(nn.ParameterList([down]), row_order="interleaved"):  # of the gate-up weights in a module
        down.qdata[:, :64, :32] = checkpoint(64, 64)[0]
    assert torch.equal(down.qdata_view.clone(), checkpoint(64, 64)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refit_that_ends_early(layout: str) -> None:
    """What was written by it lies in its order: the next one, in another order or the same, is whole or refused."""
    weight = made(192, 160, layout)
    experts = nn.ParameterList([weight])
    codes, scales = checkpoint(192, 160, seed=1)

    def write(rows: int) -> None:
        with refit(experts):
            weight.qdata[:, :rows, :80] = codes[:, :rows]
            weight.scale[:, :192, :5] = scales

    def interrupted() -> None:
        with suppress(KeyError), refit(experts):
            weight.qdata[0].zero_()
            raise KeyError

    interrupted()
    with pytest.raises(RuntimeError, match="cannot be used"):
        weight.dequantize()
    with pytest.raises(RuntimeError, match="has not written all of it"):
        write(rows=191)
    write(rows=192)
    check(weight, codes, scales, layout)

    interrupted()
    weight.copy_(dense(parted(codes), parted(scales)))
    assert torch.equal(weight.dequantize(), dense(parted(codes), parted(scales)).float())

    interrupted()
    weight.qdata[:, :192, :80], weight.scale[:, :192, :5] = codes, scales
    with pytest.raises(ValueError, match="say which of them was written, with row_order="):
        weight.mark_canonical_()
    check(weight.mark_canonical_(row_order="interleaved").shuffle_(layout), codes, scales, layout)


def test_marked_by_hand() -> None:
    weight = made(192, 160)
    codes, scales = checkpoint(192, 160, seed=1)
    weight.qdata[:, :192, :80], weight.scale[:, :192, :5] = codes, scales
    check(weight.mark_canonical_(row_order="interleaved"), codes, scales)
    check(weight.mark_canonical_(row_order="contiguous"), codes, scales)  # as row-major bytes are shown
    contiguous = made(192, 160, row_order="contiguous")
    assert contiguous.mark_canonical_() is contiguous


class Experts(nn.Module):
    def __init__(self, w13: Tensor, w13_scale: Tensor | None, w2: Tensor, w2_scale: Tensor | None) -> None:
        super().__init__()
        self.w13_weight, self.w2_weight = (nn.Parameter(data, requires_grad=False) for data in (w13, w2))
        if w13_scale is not None and w2_scale is not None:
            scales = (w13_scale, w2_scale)
            self.w13_weight_scale, self.w2_weight_scale = (nn.Parameter(data, requires_grad=False) for data in scales)


def test_wrapped_modules_remember() -> None:
    w13, w2 = checkpoint(128, 64), checkpoint(64, 64)
    wrapped = wrap_experts_(
        Experts(*w13, *w2),
        row_order="interleaved",
        w13="w13_weight",
        w13_scale="w13_weight_scale",
        w2="w2_weight",
        w2_scale="w2_weight_scale",
    )
    quantized = quantize_experts_(
        Experts(dense(*w13).float(), None, dense(*w2).float(), None),
        row_order="interleaved",
        w13="w13_weight",
        w2="w2_weight",
    )
    for module in (wrapped, quantized):
        assert (module.w13_weight.row_order, module.w2_weight.row_order) == ("interleaved", None)
        assert torch.equal(module.w13_weight.qdata_view.clone(), w13[0])


def test_bad_orders() -> None:
    weight, down = made(64, 64), ShuffledMXFP4Tensor(*checkpoint(64, 64), gate_up=False)
    for order in ("gate first", 1, True):
        with pytest.raises(ValueError, match="row_order"):
            weight.views(order)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="row_order"), refit(nn.ParameterList([weight]), row_order=order):  # type: ignore[arg-type]
            pass
        with pytest.raises(ValueError, match="row_order"):
            weight.refit_from_hp_(torch.zeros(E, 64, 64), row_order=order)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="row_order"):
            weight.mark_canonical_(row_order=order)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs gate_up=True"):
        down.views("interleaved")
    with pytest.raises(ValueError, match="needs gate_up=True"):
        weight[:, :32].views("interleaved")
    check(weight, *checkpoint(64, 64))


def test_bytes_that_are_being_written_are_not_taken_for_parted_ones() -> None:
    module = nn.Module()
    module.w13 = nn.Parameter(made(64, 64))
    with (
        refit(module),
        pytest.raises(ValueError, match="ShuffledMXFP4Tensor whose bytes lie as 'interleaved rows', so"),
    ):
        dequantize(module.w13.qdata, module.w13.scale)
