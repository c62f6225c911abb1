# SPDX-License-Identifier: MIT
"""Views that write: any window of a weight, or of its codes or scales alone, is written where its bytes lie, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, refit

from .support.bytes import LAYOUTS, SHAPES, addresses, marked, marked_parts, weight_of
from .support.judges import assert_holds, dense, in_memory


def test_every_run_of_the_test_data_is_its_own() -> None:
    qdata, scale = marked_parts(3, 512, 512)
    assert len(qdata.view(-1, 16).unique(dim=0)) == qdata.numel() // 16
    assert len(scale.view(-1, 8).unique(dim=0)) == scale.numel() // 8


# --- windows of the weight


def windows(rows: int, columns: int) -> dict[str, tuple[Any, ...]]:
    """Experts, rows and columns."""
    half = rows // 2
    return {
        "one expert": (1,),
        "the last expert": (-1,),
        "the others": (slice(1, None),),
        "every other": (slice(None, None, 2),),
        "gate": (slice(None), slice(half)),
        "up": (slice(None), slice(half, None)),
        "up of one expert": (1, slice(half, None)),
        "rows of both halves": (slice(None), slice(half - 5, half + 7)),
        "one row": (0, slice(half + 3, half + 4)),
        "all but a row": (0, slice(-1)),
        "columns": (slice(None), slice(None), slice(32, 96)),
        "the first columns": (0, slice(None), slice(64)),
        "the last columns": (1, slice(None), slice(-32, None)),
        "a patch": (slice(1, None), slice(7, half + 1), slice(64, 128)),
        "no row": (slice(None), slice(5, 5)),
    }


def of_bytes(window: tuple[Any, ...], per_byte: int) -> tuple[Any, ...]:
    """The same window of codes or scales, whose last dimension counts bytes."""
    if len(window) < 3:
        return window
    start, stop = (None if end is None else end // per_byte for end in (window[2].start, window[2].stop))
    return (*window[:2], slice(start, stop))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_of_the_weight(shape: tuple[int, int, int], gate_up: bool, layout: str) -> None:
    salts = count(1)
    parts = marked_parts(*shape)
    weight = weight_of(parts, layout, gate_up=gate_up)
    held = weight.detach()
    address = addresses(weight)
    for name, window in windows(*shape[1:]).items():
        view = weight[window]
        assert torch.equal(view.dequantize(torch.float64), dense(*parts)[window]), name
        new = marked_parts(shape[0], view.shape[-2], view.shape[-1], salt=next(salts))
        new = tuple(part[: len(parts[0][window])] if view.dim() == 3 else part[0] for part in new)
        for part, values, per_byte in zip(parts, new, (2, 32), strict=True):
            part[of_bytes(window, per_byte)] = values
        if view.numel():
            source = ShuffledMXFP4Tensor(*(part.clone() for part in new), gate_up=False, dtype=torch.float32)
            view.copy_(source.shuffle_(LAYOUTS[next(salts) % 3]))
        assert_holds(held, parts, layout)
        assert torch.equal(view.dequantize(torch.float64), dense(*parts)[window]), name
    assert addresses(weight) == address


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_point_values_into_a_window(dtype: torch.dtype, layout: str) -> None:
    weight = weight_of(marked_parts(3, 96, 160), layout)
    expected = dense(*marked_parts(3, 96, 160))
    values = dense(*marked_parts(3, 96, 160, salt=2))  # of the format, so quantising them changes none
    for window in windows(96, 160).values():
        weight[window].copy_(values[window].to(dtype))
        expected[window] = values[window]
        assert torch.equal(weight.dequantize(torch.float64), expected)
    for part, empty, fill in zip(
        (weight.qdata, weight.scale),
        in_memory((torch.ones(3, 96, 80).byte(), torch.ones(3, 96, 5).byte()), layout, gate_up=True),
        (0, 127),
        strict=True,
    ):
        assert (part[empty == fill] == fill).all()  # the pads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_copy_of_a_window_has_bytes_of_its_own_in_the_same_layout(shape: tuple[int, int, int], layout: str) -> None:
    parts = marked_parts(*shape)
    weight = weight_of(parts, layout)
    for name, window in windows(*shape[1:]).items():
        if not weight[window].numel():
            continue
        copied = weight[window].clone()
        chosen = tuple(
            part[of_bytes(window, per_byte)].reshape(-1, copied.shape[-2], copied.shape[-1] // per_byte)
            for part, per_byte in zip(parts, (2, 32), strict=True)
        )
        whole = len(window) < 2 or window[1] == slice(None)  # else gate and up rows are not matched any more
        assert copied.gate_up == whole, name
        if copied.dim() == 3:
            assert_holds(copied, chosen, layout)
        assert torch.equal(copied.dequantize(torch.float64), dense(*chosen).view(copied.shape)), name
        copied.copy_(torch.zeros(copied.shape))
    assert_holds(weight, parts, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_one_weight_onto_each_other(layout: str) -> None:
    """Gate and up change places, with a copy between; then rows move on by one expert, where the windows overlap."""
    qdata, scale = marked_parts(3, 96, 160)
    weight = weight_of((qdata, scale), layout)
    gate = weight[:, :48].clone()
    weight[:, :48].copy_(weight[:, 48:])
    weight[:, 48:].copy_(gate)
    assert_holds(weight, (qdata.roll(48, 1), scale.roll(48, 1)), layout)
    weight[1:, :48].copy_(weight[:2, :48])
    for part in (qdata, scale):
        part.copy_(part.roll(48, 1))
        part[1:, :48] = part[:2, :48].clone()
    assert_holds(weight, (qdata, scale), layout)


# --- codes or scales alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_of_codes_and_of_scales(shape: tuple[int, int, int], gate_up: bool, layout: str) -> None:
    salts = count(1)
    parts = marked_parts(*shape)
    weight = weight_of(parts, layout, gate_up=gate_up)
    address = addresses(weight)
    for place, (view, dtypes) in enumerate(
        (
            (weight.qdata_view, (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)),
            (weight.scale_view, (torch.uint8, torch.float8_e8m0fnu)),
        )
    ):
        part = parts[place]
        cases = {name: of_bytes(window, (2, 32)[place]) for name, window in windows(*shape[1:]).items()}
        cases["columns within a block"] = (0, slice(3, 50), slice(3, 5))
        cases["everything"] = (slice(None),)
        for name, window in cases.items():
            assert (view[window].shape, view[window].dtype) == (part[window].shape, torch.uint8)
            new = 27 + marked(*part[window].shape, salt=next(salts)) % 200
            part[window] = new
            if new.numel():
                view[window].copy_(new.view(dtypes[next(salts) % len(dtypes)]))
            read = view[window].clone()
            assert type(read) is Tensor
            assert torch.equal(read, part[window]), name
            assert_holds(weight, parts, layout)
        assert torch.equal(view[1:][::2][-1].clone(), part[1:][::2][-1])
    assert addresses(weight) == address


def test_a_view_outlives_a_change_of_layout() -> None:
    parts, new = marked_parts(2, 512, 512), marked_parts(2, 512, 512, salt=1)
    weight = weight_of(parts)
    rows, codes, scales = weight[1, 256:], weight.qdata_view[1].narrow(0, 0, 256), weight.scale_view[0]
    for layout in ("mxfp4_moe", "mxfp4_separated", "none"):
        weight.shuffle_(layout)
        rows.copy_(ShuffledMXFP4Tensor(new[0][1, 256:].clone(), new[1][1, 256:].clone(), gate_up=False))
        codes[:] = new[0][1, :256]
        scales.copy_(new[1][0])
        parts[0][1], parts[1][1, 256:], parts[1][0] = new[0][1], new[1][1, 256:], new[1][0]
        assert_holds(weight, parts, layout)
        new = tuple(part.roll(1, 1) for part in new)


def test_what_a_view_refuses() -> None:
    parts = marked_parts(3, 96, 160)
    weight = weight_of(parts, "mxfp4_moe")
    view = weight.qdata_view
    with pytest.raises(TypeError, match=r"takes packed bytes .*, found torch.float32"):
        view.copy_(torch.zeros(3, 96, 80))
    with pytest.raises(ValueError, match=r"bytes of shape \[96, 80\], found \[96, 79\]"):
        view[0].copy_(torch.zeros(96, 79, dtype=torch.uint8))
    for windowed, index in ((view, 3), (view, -4), (view[1:], 2), (view[1:], -3)):
        with pytest.raises(IndexError, match=f"expert {index} is out of range for {len(windowed)} experts"):
            windowed.select(0, index)
        with pytest.raises(IndexError):
            windowed[index]
    with pytest.raises(NotImplementedError, match="only experts are selected one by one"):
        view.select(-2, 0)
    for call in (lambda: view[0][3], lambda: view[:, ::2], lambda: view[..., ::2], lambda: view.add_(1)):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(NotImplementedError):
        weight[:, :48][0][3]
    with pytest.raises(ValueError, match="no bytes of its own in memory"):
        _ = weight[:, :48].qdata
    assert_holds(weight, parts, "mxfp4_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_is_copied_into_memory(layout: str) -> None:
    """Of both parts: whole, an expert counted from either end and along a dimension counted from either, a window."""
    parts = marked_parts(3, 96, 160)
    weight = weight_of(parts, layout)
    for view, part in zip((weight.qdata_view, weight.scale_view), parts, strict=True):
        for window, expected in (
            (view, part),
            (view.select(0, 1), part[1]),
            (view.select(-3, -3), part[0]),
            (view.narrow(-2, 40, 20), part[:, 40:60]),
        ):
            target = torch.zeros_like(expected)
            assert target.copy_(window) is target
            assert torch.equal(target, expected)
            assert window.clone().is_contiguous()


def test_a_view_says_how_to_reach_its_bytes() -> None:
    with pytest.raises(NotImplementedError, match=r"clone\(\) it for plain bytes, or write inside `with refit"):
        weight_of(marked_parts(1, 64, 64)).qdata_view.data_ptr()


@pytest.mark.parametrize(
    "pointer",
    [
        lambda weight: weight.qdata_view.data_ptr(),
        lambda weight: weight.qdata_view.untyped_storage().data_ptr(),
        lambda weight: weight[:, :48].qdata.data_ptr(),
    ],
)
def test_bytes_without_a_place_have_no_address(pointer: Callable[[ShuffledMXFP4Tensor], int]) -> None:
    """Neither 0 nor the start of the whole, which a raw writer would take."""
    with pytest.raises((NotImplementedError, ValueError, RuntimeError)):
        pointer(weight_of(marked_parts(3, 96, 160), "mxfp4_moe"))


# --- a loader


def load_as_vllm_does(
    param: Tensor, shard_id: str, expert: int, loaded: Tensor, tp_rank: int, *, through_data: bool = True
) -> None:
    """vLLM's FusedMoE.weight_loader: `param` has this rank's shape, `loaded` is one projection of one expert, whole."""
    expert_data = (param.data if through_data else param)[expert]
    if shard_id == "w2":
        size = expert_data.shape[1]
        expert_data.copy_(loaded.narrow(1, size * tp_rank, size))
        return
    size = expert_data.shape[0] // 2
    expert_data = expert_data.narrow(0, 0 if shard_id == "w1" else size, size)
    expert_data.copy_(loaded.narrow(0, size * tp_rank, size))


@pytest.mark.parametrize("state", [*LAYOUTS, "in a refit of none", "in a refit of mxfp4_moe"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 512), (288, 192)])  # of a rank: unpadded, and padded
@pytest.mark.parametrize("through", ["parameter", "view"])
def test_a_loader_of_shards(state: str, rank: int, hidden: int, intermediate: int, through: str) -> None:
    experts, own = 2, slice(rank * intermediate // 2, (rank + 1) * intermediate // 2)
    w1, w3 = (marked_parts(experts, intermediate, hidden, salt=salt) for salt in (1, 2))
    w2 = marked_parts(experts, hidden, intermediate, salt=3)
    w13_of_rank = tuple(torch.cat([gate[:, own], up[:, own]], 1) for gate, up in zip(w1, w3, strict=True))
    start, stop = own.start, own.stop
    w2_of_rank = w2[0][..., start // 2 : stop // 2], w2[1][..., start // 32 : stop // 32]

    layout = state.split()[-1]
    module = nn.Module()
    for name, shape, gate_up in (
        ("w13", (experts, intermediate, hidden), True),
        ("w2", (experts, hidden, intermediate // 2), False),
    ):
        module.register_parameter(name, nn.Parameter(weight_of(marked_parts(*shape, salt=9), layout, gate_up=gate_up)))
    address = addresses(module.w13, module.w2)
    with refit(module) if state.startswith("in") else nullcontext():
        params = {
            (name, part): getattr(getattr(module, name), f"{part}_view")
            for name in ("w13", "w2")
            for part in ("qdata", "scale")
        }
        if through == "parameter":  # as an engine registers them
            params = {key: nn.Parameter(view, requires_grad=False) for key, view in params.items()}
        for expert in reversed(range(experts)):
            for shard_id, source in (("w3", w3), ("w2", w2), ("w1", w1)):
                for part, loaded in zip(("scale", "qdata"), reversed(source), strict=True):
                    param = params["w2" if shard_id == "w2" else "w13", part]
                    load_as_vllm_does(
                        param, shard_id, expert, loaded[expert], rank, through_data=through == "parameter"
                    )
    assert_holds(module.w13, w13_of_rank, layout)
    assert_holds(module.w2, w2_of_rank, layout)
    assert addresses(module.w13, module.w2) == address


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loader_of_values(layout: str) -> None:
    """The same into the weight itself: floating-point and packed experts, one projection at a time."""
    w1, w3 = (marked_parts(2, 48, 160, salt=salt) for salt in (1, 2))
    param = nn.Parameter(weight_of(marked_parts(2, 96, 160), layout))
    for expert in range(2):
        packed = ShuffledMXFP4Tensor(w1[0][expert].clone(), w1[1][expert].clone(), gate_up=False)
        load_as_vllm_does(param, "w1", expert, packed.shuffle_("mxfp4_moe"), 0)
        load_as_vllm_does(param, "w3", expert, dense(w3[0][expert], w3[1][expert]).float(), 0)
    expected = torch.cat([dense(*w1), dense(*w3)], 1)
    assert torch.equal(param.dequantize(torch.float64), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_by_dtype(layout: str) -> None:
    """As loaders' parameters have them; reading gives that dtype, and it can be written in any."""
    parts, new = marked_parts(2, 96, 160), marked_parts(2, 96, 160, salt=1)
    weight = weight_of(parts, layout)
    for part, view, found, written, dtype in (
        ("qdata", weight.qdata_view, parts[0], new[0], torch.float4_e2m1fn_x2),
        ("scale", weight.scale_view, parts[1], new[1], torch.float8_e8m0fnu),
    ):
        seen = view.view(dtype)
        assert (seen.dtype, seen[1].dtype, seen.shape) == (dtype, dtype, view.shape)
        assert torch.equal(seen[:, 5:9].clone().view(torch.uint8), found[:, 5:9])
        seen[1].narrow(0, 3, 90).copy_(written[1, 3:93].view(dtype))
        seen[0].view(torch.uint8).copy_(written[0])
        expected = torch.stack([written[0], torch.cat([found[1, :3], written[1, 3:93], found[1, 93:]])])
        assert torch.equal(view.clone(), expected)
        with pytest.raises(TypeError, match=f"a view of {part} shows bytes as .*found torch.int64"):
            view.view(torch.int64)


def test_dimensions_are_counted_from_either_end() -> None:
    parts = marked_parts(3, 96, 160)
    weight = weight_of(parts, "mxfp4_moe")
    for dim in (0, -3):
        for found in (weight.select(dim, 1), weight.unbind(dim)[1], weight.split(1, dim)[1][0]):
            assert torch.equal(found.dequantize(torch.float64), dense(*parts)[1])
        assert torch.equal(torch.cat([weight[:1], weight[1:]], dim).dequantize(torch.float64), dense(*parts))
    for dim in (3, -4):
        for take in (lambda w, dim: w.unbind(dim), lambda w, dim: w.split(1, dim), lambda w, dim: w.select(dim, 0)):
            with pytest.raises(IndexError, match=r"^dim must be in -3\.\.2, found|^Dimension out of range"):
                take(weight, dim)


def test_strides_of_its_own_are_itself() -> None:
    parts = marked_parts(3, 96, 160)
    weight = weight_of(parts, "mxfp4_moe")
    assert torch.equal(weight.as_strided(weight.shape, weight.stride()).dequantize(torch.float64), dense(*parts))
    with pytest.raises(NotImplementedError, match="slice it"):
        weight.as_strided(weight.shape, weight.stride(), 160)
    with pytest.raises(TypeError, match=r"the logical dtype must be .*, found torch.int8"):
        torch.zeros_like(weight, dtype=torch.int8)
    assert weight.is_pinned() is False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_byte_everywhere(layout: str) -> None:
    """As loaders fill what a checkpoint does not reach."""
    qdata, scale = marked_parts(3, 96, 160)
    weight = weight_of((qdata, scale), layout)
    weight.qdata_view[1].narrow(0, 32, 40).zero_()
    weight.scale_view[2].narrow(1, 1, 3).fill_(127)
    qdata[1, 32:72], scale[2, :, 1:4] = 0, 127
    assert_holds(weight, (qdata, scale), layout)
