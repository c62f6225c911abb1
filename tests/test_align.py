# SPDX-License-Identifier: MIT
"""Weights that are padded to other multiples than 256, judged by the formulas of tests/support/judges.py."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from expecttest import assert_expected_inline
from safetensors import safe_open
from torch import Tensor, nn

from shuffled_tensor import (
    CheckpointError,
    ShuffledMXFP4Tensor,
    convert,
    explain,
    fused_moe,
    load_experts,
    load_file,
    override_arch,
    quantize,
    quantize_experts_,
    refit,
    save_file,
    wrap_experts_,
)
from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.testing import fake_aiter

from .support.aiter import answer_of
from .support.bytes import LAYOUTS, marked_parts, moderate_scales, poke
from .support.checkpoints import in_format, layer_name, make_dense, store
from .support.judges import assert_holds, dense, dense_moe, in_memory, relative_error
from .support.layer import packed_arguments

ALIGNS = [(32, 32), (64, 64), (128, 128), (256, 256), (32, 256), (256, 32), (64, 128)]
# rows, columns: halves of 96 rows; columns that are a multiple of 32 alone; and K=512, where nothing is padded and a
# second shuffle would go unseen
SIZES = [(192, 96), (192, 160), (80, 288), (512, 512), (96, 512)]

Parts = tuple[Tensor, Tensor]


def make(
    parts: Parts, align: Any, layout: str = "none", *, gate_up: bool = True, dtype: torch.dtype = torch.float32
) -> ShuffledMXFP4Tensor:
    order = "contiguous" if gate_up else None
    own = (part.clone() for part in parts)
    return ShuffledMXFP4Tensor(*own, gate_up=gate_up, row_order=order, dtype=dtype, align=align).shuffle_(layout)


# --- how bytes lie


@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("align", ALIGNS)
def test_every_layout_lies_as_the_formulas_say(align: tuple[int, int], gate_up: bool) -> None:
    for rows, columns in SIZES:
        parts = marked_parts(2, rows, columns)
        weight = make(parts, align, gate_up=gate_up)
        address = weight.qdata.data_ptr()
        for layout in (*LAYOUTS, *reversed(LAYOUTS)):
            assert_holds(weight.shuffle_(layout), parts, layout, align=align)
        assert_holds(weight.unshuffle_(), parts, "none", align=align)
        assert weight.qdata.data_ptr() == address


def test_sizes_of_codes_and_scales() -> None:
    """In numbers, and not by the formulas: codes need no pads, and scales fill tiles of 8."""
    weight = make(marked_parts(1, 288, 2880), 32, gate_up=False)
    assert (list(weight.qdata.shape), list(weight.scale.shape)) == ([1, 288, 1440], [1, 288, 96])
    weight = make(marked_parts(1, 192, 96), (64, 32))
    assert (list(weight.qdata.shape), list(weight.scale.shape)) == ([1, 256, 48], [1, 256, 8])
    assert weight.nbytes == 256 * 48 + 256 * 8


def test_the_default_is_256() -> None:
    parts = marked_parts(2, 192, 160)
    memory = in_memory(parts, "none", gate_up=True)
    weights = [make(parts, 256), make(parts, (256, 256))]
    weights.append(ShuffledMXFP4Tensor(*(p.clone() for p in parts), gate_up=True, row_order="contiguous"))
    for weight in weights:
        assert torch.equal(weight.qdata, memory[0])
        assert torch.equal(weight.scale, memory[1])


def test_bytes_are_taken_over_where_they_need_no_padding() -> None:
    codes, scales = marked_parts(2, 192, 288)
    address = codes.data_ptr()
    weight = ShuffledMXFP4Tensor(codes, scales, gate_up=True, row_order="contiguous", align=32)
    assert weight.qdata.data_ptr() == address
    assert weight.scale.shape[-1] == 16


def test_interleaved_rows_and_quantised_values() -> None:
    for align in ((32, 32), (64, 128)):
        parts = marked_parts(2, 192, 160)
        interleaved = [torch.stack(part.chunk(2, 1), 2).flatten(1, 2) for part in parts]
        weight = ShuffledMXFP4Tensor(
            *interleaved, gate_up=True, row_order="interleaved", align=align, dtype=torch.float32
        )
        assert_holds(weight, parts, "none", align=align)
        values = torch.randn(2, 192, 160, generator=torch.Generator().manual_seed(0))
        weight = ShuffledMXFP4Tensor.from_hp(values, gate_up=True, row_order="contiguous", align=align)
        assert_holds(weight.shuffle_("mxfp4_moe"), quantize(values), "mxfp4_moe", align=align)


# --- reading and writing in place


def windows(rows: int, columns: int) -> list[tuple[slice, slice]]:
    half = rows // 2
    across = [slice(0, columns), slice(32, 64), slice(columns - 32, columns)]
    down = [
        slice(0, rows),
        slice(0, half),
        slice(half, rows),
        slice(half - 1, half + 1),
        slice(3, 40),
        slice(rows - 5, rows),
    ]
    return list(itertools.product(down, across))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align", [(32, 32), (64, 128), (256, 32)])
@pytest.mark.parametrize("gate_up", [True, False])
def test_views_are_read_and_written(gate_up: bool, align: tuple[int, int], layout: str) -> None:
    for rows, columns in SIZES:
        parts = codes, scales = marked_parts(2, rows, columns)
        weight = make(parts, align, layout, gate_up=gate_up)
        for salt, (down, across) in enumerate(windows(rows, columns)):
            view = weight[:, down, across]
            assert torch.equal(view.dequantize(torch.float64), dense(codes, scales)[:, down, across])
            new = marked_parts(1, down.stop - down.start, across.stop - across.start, salt=salt + 1)
            weight[1, down, across].copy_(make((new[0][0], new[1][0]), 256, gate_up=False))
            codes[1, down, across.start // 2 : across.stop // 2] = new[0][0]
            scales[1, down, across.start // 32 : across.stop // 32] = new[1][0]
            if salt % 5 == 0:
                assert_holds(weight, parts, layout, align=align)
        loaded = marked_parts(2, rows, columns, salt=99)
        weight.qdata_view[0, 2:9].copy_(loaded[0][0, 2:9])
        weight.scale_view[:].copy_(loaded[1])
        codes[0, 2:9], scales[:] = loaded[0][0, 2:9], loaded[1]
        assert torch.equal(weight.qdata_view.clone(), codes)
        assert torch.equal(weight.scale_view.clone(), scales)
        assert_holds(weight, parts, layout, align=align)
        assert_holds(weight.zero_(), (codes * 0, torch.full_like(scales, 127)), layout, align=align)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align", ALIGNS)
def test_refit(align: tuple[int, int], layout: str) -> None:
    """Bytes and pads past torch; and a second one, after one that ended early, that finds what is missing."""
    for gate_up, (rows, columns) in itertools.product((True, False), SIZES[1:4]):
        old, new = marked_parts(2, rows, columns), marked_parts(2, rows, columns, salt=1)
        module = nn.Module()
        module.weight = nn.Parameter(make(old, align, layout, gate_up=gate_up))
        expected = in_memory(new, "none", gate_up=gate_up, align=align)
        with refit(module):
            for own, now, data in zip(
                (module.weight.qdata, module.weight.scale),
                in_memory(old, "none", gate_up=gate_up, align=align),
                expected,
                strict=True,
            ):
                assert torch.equal(own, now)
                poke(own, data)
        assert_holds(module.weight, new, layout, align=align)
        with pytest.raises(KeyError), refit(module):
            raise KeyError
        with pytest.raises(RuntimeError, match="has not written all of it: scale"), refit(module):
            poke(module.weight.qdata, expected[0])
        with refit(module):
            module.weight.qdata.fill_(0xFF)
            module.weight.scale.fill_(0xFE)  # pads too
            for view, values in zip((module.weight.qdata_view, module.weight.scale_view), old, strict=True):
                view.copy_(values)
        assert_holds(module.weight, old, layout, align=align)


# --- copies are padded as what they are copies of


def picked(part: Tensor) -> Tensor:
    return part[torch.tensor([2, 0])]


COPIES: dict[str, tuple[Callable[[ShuffledMXFP4Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "clone": (torch.clone, Tensor.clone),
    "deepcopy": (copy.deepcopy, Tensor.clone),
    "to": (lambda w: w.to(torch.bfloat16), Tensor.clone),
    "index": (picked, picked),
    "expert slice": (lambda w: w[1:].clone(), lambda part: part[1:]),
    "cat": (lambda w: torch.cat([w, w[:1]]), lambda part: torch.cat([part, part[:1]])),
    "stack": (lambda w: torch.stack([w[2], w[1]]), lambda part: torch.stack([part[2], part[1]])),
    "sent": (lambda w: pickle.loads(ForkingPickler.dumps(w)), Tensor.clone),
    "pickle": (lambda w: pickle.loads(pickle.dumps(w)), Tensor.clone),
    "columns": (lambda w: w[:, :, 32:64].clone(), lambda part: part[:, :, part.shape[2] // 16 : part.shape[2] // 8]),
    "shard of experts": (lambda w: w.shard(2, 3, dim="expert"), lambda part: part[2:]),
}


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str, layout: str) -> None:
    ours, plainly = COPIES[name]
    for align, gate_up in itertools.product(((32, 32), (64, 32), (256, 256)), (True, False)):
        parts = marked_parts(3, 192, 512)  # K = 512 does not tell by what it was padded
        weight = make(parts, align, layout, gate_up=gate_up)
        copied = ours(weight)
        expected = plainly(parts[0]), plainly(parts[1])
        assert_holds(copied.shuffle_(layout), expected, layout, align=align)
        assert_holds(copied[:, :, :96].clone(), (expected[0][..., :48], expected[1][..., :3]), layout, align=align)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_shards_of_the_intermediate_size(layout: str) -> None:
    w13, w2 = marked_parts(2, 2 * 512, 512), marked_parts(2, 512, 512, salt=2)
    for align in ((32, 32), (64, 32)):
        up, down = make(w13, align, layout), make(w2, align, layout, gate_up=False)
        rows = [part[:, 40:136] for part in w13]
        assert_holds(up[:, 40:136].clone(), (rows[0], rows[1]), layout, align=align)
        for rank in range(3):  # 192, 192, 128
            of = slice(192 * rank, min(192 * (rank + 1), 512))
            halves = [torch.cat([half[:, of] for half in part.chunk(2, 1)], 1) for part in w13]
            assert_holds(up.shard(rank, 3), (halves[0], halves[1]), layout, align=align)
            columns = w2[0][..., of.start // 2 : of.stop // 2], w2[1][..., of.start // 32 : of.stop // 32]
            assert_holds(down.shard(rank, 3), columns, layout, align=align)
        joined = torch.cat([up[:, :32], up[:, 512:544]], 1)
        both = [torch.cat([part[:, :32], part[:, 512:544]], 1) for part in w13]
        assert joined.gate_up
        assert_holds(joined, (both[0], both[1]), layout, align=align)


@pytest.mark.parametrize("layouts", [("none", "mxfp4_moe"), ("mxfp4_moe", "mxfp4_moe"), ("made_up", "mxfp4_separated")])
@pytest.mark.parametrize("sizes", [(192, 96), (80, 288), (96, 1536)])
def test_weights_of_different_alignments_meet(sizes: tuple[int, int], layouts: tuple[str, str]) -> None:
    first, second = marked_parts(3, *sizes), marked_parts(3, *sizes, salt=1)
    both_parts = list(zip(first, second, strict=True))
    for (one, other), gate_up in itertools.product(
        (((32, 32), (256, 256)), ((256, 256), (64, 32)), ((32, 64), (64, 32))), (True, False)
    ):

        def both() -> tuple[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor]:
            return make(first, one, layouts[0], gate_up=gate_up), make(second, other, layouts[1], gate_up=gate_up)  # noqa: B023

        a, b = both()
        whole = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
        assert_holds(torch.cat([a, b]), whole, layouts[0], align=one)
        assert_holds(b, second, layouts[1], align=other)
        pair = torch.stack([first[0][2], second[0][1]]), torch.stack([first[1][2], second[1][1]])
        assert_holds(torch.stack([a[2], b[1]]), pair, layouts[0], align=one)
        wide = torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)
        assert_holds(torch.cat([a, b], 2), wide, layouts[0], align=one)
        third = sizes[1] // 3
        narrow = [torch.cat([x[..., : x.shape[2] // 3], y[..., : y.shape[2] // 3]]) for x, y in both_parts]
        assert_holds(torch.cat([a[..., :third], b[..., :third]]), (narrow[0], narrow[1]), layouts[0], align=one)
        assert_holds(a.copy_(b), second, layouts[0], align=one)
        a, b = both()
        a[1:].copy_(b[1:])
        mixed = [torch.cat([x[:1], y[1:]]) for x, y in both_parts]
        assert_holds(a, (mixed[0], mixed[1]), layouts[0], align=one)
        b[torch.tensor([0])] = a[:1]
        mixed = [torch.cat([x[:1], y[1:]]) for x, y in both_parts]
        assert_holds(b, (mixed[0], mixed[1]), layouts[1], align=other)
        module, state = nn.Module(), both()[1]
        module.weight = nn.Parameter(both()[0])
        module.load_state_dict({"weight": state})
        assert_holds(module.weight, second, layouts[0], align=one)


# --- files


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_torch_save_remembers(layout: str, tmp_path: Path) -> None:
    parts = marked_parts(2, 192, 512)
    for align, new in itertools.product(((32, 64), (256, 256)), (True, False)):
        weight = make(parts, align, layout)
        torch.save({"w": weight, "expert": weight[1]}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        loaded = torch.load(tmp_path / "w.pt", weights_only=True)
        assert_holds(loaded["w"].shuffle_(layout), parts, layout, align=align)
        assert loaded["expert"].qdata.data_ptr() == loaded["w"][1].qdata.data_ptr()
        assert_holds(loaded["w"][..., :96].clone(), (parts[0][..., :48], parts[1][..., :3]), layout, align=align)
    state = make(parts, 256)._storage.__reduce__()[1][2]
    assert state == {"gate_up": True, "shuffle_kind": None}  # as files were before there was another
    with pytest.raises(ValueError, match="align must be 32, 64, 128 or 256"):
        ShuffledMXFP4Tensor(*parts, gate_up=False)._storage.__reduce__()[0](*parts, state | {"align": (0, 0)})


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("align", ALIGNS)
def test_saved_as_they_lie(align: tuple[int, int], layout: str, tmp_path: Path) -> None:
    weights = {
        f"{gate_up} {rows} {columns}": (marked_parts(2, rows, columns), gate_up)
        for gate_up, (rows, columns) in itertools.product((True, False), SIZES)
    }
    made = {name: make(parts, align, layout, gate_up=gate_up) for name, (parts, gate_up) in weights.items()}
    made["single"] = make(tuple(part[0] for part in weights["True 192 160"][0]), align, layout)  # type: ignore[arg-type]
    save_file(made, tmp_path / "as_is", layout="as_is")
    save_file(made, tmp_path / "canonical")
    kept = align if layout != "none" else (256, 256)  # rows of no layout are saved without pads
    for path, lies, pads in (
        ("as_is", layout, kept),
        ("canonical", "none", (256, 256)),
    ):
        loaded = load_file(tmp_path / path)
        for name, (parts, _) in weights.items():
            assert_holds(loaded[name].to(torch.float32), parts, lies, align=pads)
        assert torch.equal(loaded["single"].qdata, loaded["True 192 160"].qdata[0])
        assert (
            load_file(tmp_path / path, device="meta")["True 192 160"].qdata.shape == loaded["True 192 160"].qdata.shape
        )


def test_padded_sizes_that_no_alignment_gives(tmp_path: Path) -> None:
    save_file({"w": make(marked_parts(2, 192, 160), 32, "mxfp4_moe")}, tmp_path / "w", layout="as_is")
    with safe_open(tmp_path / "w", "pt") as file:
        good = file.metadata()["shuffled_tensor"]
    for wrong in ([320, 80], [192, 100], [192], [192, 80, 1], [96, 80], [1024, 128], None, 7):
        said = json.loads(good)
        assert said["tensors"]["w"]["padded"] == [192, 80]
        said["tensors"]["w"]["padded"] = wrong
        said["seal"] = hashlib.sha256(json.dumps(said["tensors"], sort_keys=True).encode()).hexdigest()
        with pytest.raises(CheckpointError) as error:
            manifest.parse({"shuffled_tensor": json.dumps(said)}, tmp_path / "w")
        assert f"padded sizes {wrong} for layout 'mxfp4_moe', which has [512, 128]" in str(error.value)


@pytest.mark.parametrize("align", [None, 32, (64, 128), (32, 256)])
@pytest.mark.parametrize("stored", ["gpt-oss", "quark", "canonical", *LAYOUTS[1:3]])
def test_load_experts(stored: str, align: Any, tmp_path: Path) -> None:
    """Whole, and a rank's part by experts and by intermediate size; from files that are padded another way, too."""
    model, name = make_dense(2, 288, 160), layer_name(stored)
    tensors = in_format("gpt-oss" if stored in LAYOUTS or stored == "canonical" else stored, model, name)
    path = store(tensors, tmp_path, "file")
    of_file = (256, 256)
    if stored not in ("gpt-oss", "quark"):
        layers = load_experts(path, align=(64, 32))[name]
        made = {f"{name}.{which}_weight": getattr(layers, which) for which in ("w13", "w2")}
        if stored in LAYOUTS:
            of_file = (64, 32)
            for weight in made.values():
                weight.shuffle_(stored)
        path = tmp_path / "saved.safetensors"
        save_file(made, path, layout="canonical" if stored == "canonical" else "as_is")
    layout = stored if stored in LAYOUTS else "none"
    if align is None and of_file == (64, 32):  # to another layout, padded as the file is
        convert(path, tmp_path / "converted.safetensors", layout="mxfp4_separated")
        path, layout = tmp_path / "converted.safetensors", "mxfp4_separated"
    hidden, intermediate = of_file if align is None else align if isinstance(align, tuple) else (align, align)
    for dim, rank, world in (("expert", 0, 1), ("expert", 1, 2), ("intermediate", 0, 2), ("intermediate", 1, 2)):
        part = slice(rank, rank + 1) if dim == "expert" and world == 2 else slice(None)
        span = slice(0, 160) if dim == "expert" else slice(0, 96) if rank == 0 else slice(96, 160)
        w13 = [torch.cat([half[part, span] for half in data.chunk(2, 1)], 1) for data in model.w13]
        w2 = (
            model.w2[0][part, :, span.start // 2 : span.stop // 2],
            model.w2[1][part, :, span.start // 32 : span.stop // 32],
        )
        loaded = load_experts(path, align=align, rank=rank, world_size=world, dim=dim)[name]
        assert_holds(loaded.w13, (w13[0], w13[1]), layout, align=(intermediate, hidden))
        assert_holds(loaded.w2, w2, layout, align=(hidden, intermediate))


def test_load_into_parameters_that_are_padded_another_way(tmp_path: Path) -> None:
    model, name = make_dense(2, 288, 160), layer_name("quark")
    saved = {
        f"{name}.w13_weight": make(model.w13, (32, 64), "mxfp4_moe"),
        f"{name}.w2_weight": make(model.w2, 32, "mxfp4_separated", gate_up=False),
    }
    save_file(saved, tmp_path / "saved.safetensors", layout="as_is")
    root = nn.Module()
    owner = root
    for step in name.split("."):
        owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    for layout in LAYOUTS:
        zeros = [[torch.zeros_like(part) for part in parts] for parts in (model.w13, model.w2)]
        owner.w13_weight = nn.Parameter(make((zeros[0][0], zeros[0][1]), (64, 32), layout))
        owner.w2_weight = nn.Parameter(make((zeros[1][0], zeros[1][1]), 128, layout, gate_up=False))
        with pytest.raises(ValueError, match=r"align=32 pads new tensors, and the parameters of into= stay padded"):
            load_experts(tmp_path / "saved.safetensors", into=root, align=32)
        load_experts(tmp_path / "saved.safetensors", into=root)
        assert_holds(owner.w13_weight, model.w13, layout, align=(64, 32))
        assert_holds(owner.w2_weight, model.w2, layout, align=(128, 128))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    parts = marked_parts(2, 192, 160)
    dcp.save({"w": make(parts, 32, "mxfp4_moe")}, checkpoint_id=tmp_path, no_dist=True)
    into = {"w": make(marked_parts(2, 192, 160, salt=1), (64, 256), "mxfp4_separated")}
    dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    assert_holds(into["w"], parts, "mxfp4_separated", align=(64, 256))


# --- layers

LAYER_ALIGNS = [((32, 32), (32, 32)), ((64, 32), (32, 64)), ((256, 256), (32, 128))]


def layer_parts(hidden: int, intermediate: int) -> dict[str, Parts]:
    return {
        "w13": (marked_parts(3, 2 * intermediate, hidden)[0], moderate_scales(3, 2 * intermediate, hidden // 32)),
        "w2": (marked_parts(3, hidden, intermediate, salt=3)[0], moderate_scales(3, hidden, intermediate // 32)),
    }


def layer(hidden: int, intermediate: int, aligns: tuple[Any, Any], kind: str = "none") -> dict[str, Any]:
    parts, generator = layer_parts(hidden, intermediate), torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(5, hidden, generator=generator).bfloat16(),
        "w13": make(parts["w13"], aligns[0], kind, dtype=torch.bfloat16),
        "w2": make(parts["w2"], aligns[1], kind, gate_up=False, dtype=torch.bfloat16),
        "topk_weight": torch.rand(5, 2, generator=generator),
        "topk_ids": torch.randint(3, (5, 2), generator=generator, dtype=torch.int32),
    }


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligns", LAYER_ALIGNS)
def test_fused_moe(aligns: tuple[Any, Any], kind: str) -> None:
    for hidden, intermediate in ((288, 96), (512, 512), (160, 160)):
        arguments = layer(hidden, intermediate, aligns, kind)
        plain = arguments | {name: dense(*parts) for name, parts in layer_parts(hidden, intermediate).items()}
        expected = dense_moe(**plain)
        assert relative_error(fused_moe(**arguments, out_dtype=torch.float32), expected) <= 1e-5
        packed = packed_arguments(arguments) | {"out_dtype": "float32"}
        packed |= {
            f"{name}_{part}": packed[f"{name}_{part}"].clone() for name in ("w13", "w2") for part in ("qdata", "scale")
        }
        packed |= {f"{name}_layout": kind for name in ("w13", "w2")}
        assert relative_error(torch.ops.shuffled_tensor.fused_moe_packed(**packed), expected) <= 1e-5


def test_fused_moe_is_compiled() -> None:
    torch._dynamo.reset()
    arguments = layer(288, 96, ((64, 32), (32, 32)), "mxfp4_moe")
    expected = dense_moe(**arguments | {name: dense(*parts) for name, parts in layer_parts(288, 96).items()})

    def twice(w13: Tensor, w2: Tensor, **others: Any) -> Tensor:
        return fused_moe(w13=w13.detach(), w2=torch.cat([w2[:1], w2[1:]]), **others)

    out = torch.compile(twice, backend="aot_eager", fullgraph=True)(**arguments, out_dtype=torch.float32)
    assert relative_error(out, expected) <= 1e-5


def test_packed_sizes_that_no_alignment_gives() -> None:
    packed = packed_arguments(layer(288, 96, (32, 32)))
    changes = {
        "more rows": {"w13_qdata": packed["w13_qdata"].new_zeros(3, 2 * 288, 144)},
        "fewer columns": {"w13_qdata": packed["w13_qdata"][..., :128]},
        "a rank": {"w2_qdata": packed["w2_qdata"][0]},
        "scales as codes": {"w13_scale": packed["w13_scale"][..., :9]},
    }
    lines = []
    for name, change in changes.items():
        with pytest.raises(ValueError, match="must be") as error:
            torch.ops.shuffled_tensor.fused_moe_packed(**packed | change)
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
more rows: w13_qdata must be [3, 512, 256], or as a smaller align= pads it, found shape [3, 576, 144]
fewer columns: w13_qdata must be [3, 512, 256], or as a smaller align= pads it, found shape [3, 192, 128]
a rank: w2_qdata must be [3, 512, 128], or as a smaller align= pads it, found shape [288, 48]
scales as codes: w13_scale must be [3, 192, 16], found shape [3, 192, 9]""",
    )


@pytest.mark.parametrize("align", [32, (64, 128)])
@pytest.mark.parametrize("quantised", [True, False])
def test_modules(quantised: bool, align: Any) -> None:
    """A pair is of the hidden and the intermediate size: rows and columns of w2, columns and rows of w13."""
    hidden, intermediate = align if isinstance(align, tuple) else (align, align)
    parts = layer_parts(288, 160)
    module = nn.Module()
    for name, (codes, scales) in parts.items():
        if quantised:
            module.register_buffer(f"{name}_weight", dense(codes, scales).float())
        else:
            module.register_buffer(f"{name}_weight", codes.clone())
            module.register_buffer(f"{name}_weight_scale", scales.clone())
    make_ours: Callable[..., nn.Module] = quantize_experts_ if quantised else wrap_experts_
    for wrong in (16, (32, 32, 32), "256"):
        with pytest.raises(ValueError, match=r"align must be 32, 64, 128 or 256, or two of them \(hidden, intermed"):
            make_ours(module, row_order="contiguous", align=wrong)
    assert not any(isinstance(tensor, ShuffledMXFP4Tensor) for tensor in module.buffers())
    make_ours(module, row_order="contiguous", align=align)
    held = {name: quantize(dense(*pair).float()) if quantised else pair for name, pair in parts.items()}
    assert_holds(module.w13_weight, held["w13"], "none", align=(intermediate, hidden))
    assert_holds(module.w2_weight, held["w2"], "none", align=(hidden, intermediate))


def test_aiter_takes_multiples_of_256() -> None:
    others = "; make the weights with align=256"
    cases = {
        ((32, 32), (32, 32)): "w13 is padded to 96 rows of each half and 544 columns, not to multiples of 256" + others,
        ((256, 256), (32, 32)): "w2 is padded to 544 rows and 96 columns, not to multiples of 256" + others,
        ((256, 256), (256, 32)): "w2 is padded to 768 rows and 96 columns, not to multiples of 256" + others,
        ((256, 128), (128, 256)): "w13 is padded to 256 rows of each half and 640 columns, not to multiples of 256"
        + others,
    }
    for aligns, reason in cases.items():
        with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
            arguments = layer(544, 96, aligns)
            assert explain(**arguments).passed_over["aiter"] == reason
            expected = fused_moe(**arguments, backend="reference")
            assert torch.equal(fused_moe(**arguments), expected)
            with pytest.raises(ValueError, match=reason):
                fused_moe(**arguments, backend="aiter")
            assert fake.reads == []
            for name, gate_up in (("w13", True), ("w2", False)):  # whoever asks for operands has kernels for them
                operands = arguments[name].as_kernel_operands()
                align = aligns[name == "w2"]
                memory = in_memory(layer_parts(544, 96)[name], "mxfp4_separated", gate_up=gate_up, align=align)
                assert torch.equal(operands.weight.view(torch.uint8), memory[0])
                assert torch.equal(operands.scale, memory[1])
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:  # where 32 comes to the same as 256
        arguments = layer(768, 256, ((32, 64), (128, 32)))
        answer = answer_of(fake, arguments)
        assert explain(**arguments).backend == "aiter"
        assert torch.equal(fused_moe(**arguments), answer)


# --- errors


class Meant:
    """Says that it is 32."""

    def __eq__(self, other: object) -> bool:
        return other == 32

    def __hash__(self) -> int:
        return 32


@pytest.mark.parametrize(
    "align", [0, 16, 31, 48, 512, -32, 32.0, True, "32", None, (), (32,), (32, 48), (32, 32, 32), [32, 32], Meant()]
)
def test_other_alignments(align: Any) -> None:
    parts = marked_parts(2, 192, 160)
    kept = [part.clone() for part in parts]
    made: list[Callable[[], object]] = [
        lambda: ShuffledMXFP4Tensor(*parts, gate_up=True, row_order="contiguous", align=align),
        lambda: ShuffledMXFP4Tensor.from_hp(dense(*parts), gate_up=False, align=align),
    ]
    for attempt in made:
        with pytest.raises(ValueError, match="align must be") as error:
            attempt()
        message = "align must be 32, 64, 128 or 256, or two of them (rows of each half, columns), found "
        assert str(error.value) == message + repr(align)
    if align is not None:
        with pytest.raises(ValueError, match=r"two of them \(hidden, intermediate\), found"):
            load_experts("nowhere", align=align)
    assert all(map(torch.equal, parts, kept))


def test_a_weight_alone_has_its_own() -> None:
    weight = make(marked_parts(2, 192, 160), 32)
    with pytest.raises(TypeError, match="taken as it is, so align cannot be given"):
        ShuffledMXFP4Tensor(weight, align=64)  # type: ignore[call-arg, arg-type]
