# SPDX-License-Identifier: MIT
"""The checkpoint formats of the field: whatever names, dtypes and row orders a model is written in, it is the same."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file as plain_save_file
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, convert, fused_moe, inspect
from shuffled_tensor.checkpoint import CheckpointError, Experts, load_experts, load_file, save_file
from shuffled_tensor.checkpoint import weight as checkpoint_weight
from shuffled_tensor.checkpoint.source import Files

from .support.bytes import LAYOUTS, addresses, weight_of
from .support.checkpoints import (
    FORMATS,
    SIZES,
    STORED,
    Dense,
    in_format,
    in_halves,
    layer_name,
    make_dense,
    module_of,
    others,
    store,
)
from .support.judges import assert_holds, dense, dense_moe, relative_error

DIMS = ("expert", "intermediate")


def assert_is(loaded: Experts, expected: Dense, *, bias: bool) -> None:
    """Fresh weights, row-major and padded, and biases."""
    for weight, parts, gate_up in ((loaded.w13, expected.w13, True), (loaded.w2, expected.w2, False)):
        assert isinstance(weight, ShuffledMXFP4Tensor)
        assert (weight.gate_up, weight.dtype) == (gate_up, torch.bfloat16)
        assert_holds(weight, parts, "none")
    for found, rows in ((loaded.w13_bias, expected.w13_bias), (loaded.w2_bias, expected.w2_bias)):
        if bias:
            assert found is not None
            assert found.dtype == rows.dtype
            assert torch.equal(found, rows)
        else:
            assert found is None


# --- the same logical weights


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_whole(tmp_path: Path, format: str, size: str, stored: str) -> None:
    expected, name = make_dense(*SIZES[size]), layer_name(format)
    path = store(in_format(format, expected, name) | others(), tmp_path, stored)
    loaded = load_experts(path)
    assert list(loaded) == [name]
    assert_is(loaded[name], expected, bias=format == "gpt-oss")


def test_the_same_file_again(tmp_path: Path) -> None:
    """Its packed tensors, written by an engine's loader into what was loaded from it."""
    expected, name = make_dense(*SIZES["padded"]), layer_name("gpt-oss")
    path = store(in_format("gpt-oss", expected, name), tmp_path, "file")
    loaded, tensors = load_experts(path)[name], safetensors.torch.load_file(path)
    loaded.w13.shuffle_("mxfp4_moe").zero_()  # type: ignore[operator]
    loaded.w13.qdata_view.copy_(tensors[f"{name}.gate_up_proj_blocks"].flatten(-2))  # type: ignore[attr-defined]
    loaded.w13.scale_view.copy_(tensors[f"{name}.gate_up_proj_scales"])  # type: ignore[attr-defined]
    loaded.w13.unshuffle_()  # type: ignore[operator]
    assert_is(loaded, expected, bias=True)


def test_checksums_are_equal_across_formats(tmp_path: Path) -> None:
    expected, found = make_dense(*SIZES["padded"]), set()
    for format in FORMATS:
        folder = tmp_path / format
        folder.mkdir()
        loaded = load_experts(store(in_format(format, expected, layer_name(format)), folder, "with index"))
        (experts,) = loaded.values()
        found.add((experts.w13.logical_checksum(), experts.w2.logical_checksum()))  # type: ignore[attr-defined]
    (pair,) = found
    assert pair[0] != pair[1]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_ranks(tmp_path: Path, format: str, dim: str, size: str) -> None:
    whole, name = make_dense(*SIZES[size]), layer_name(format)
    bias = format in ("gpt-oss", "quark")
    path = store(in_format(format, whole, name, bias=bias), tmp_path, "with index")
    for rank in range(2):
        loaded = load_experts(path, rank=rank, world_size=2, dim=dim)
        assert_is(loaded[name], in_halves(whole, dim, rank), bias=bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", ["whole", *DIMS])
@pytest.mark.parametrize("format", FORMATS)
def test_into_parameters(tmp_path: Path, format: str, cut: str, layout: str) -> None:
    """Layout and address are the parameter's, values the checkpoint's; what held the parameter before holds them too."""
    whole, name = make_dense(*SIZES["padded"]), layer_name(format)
    bias = format != "deepseek"
    path = store(in_format(format, whole, name, bias=bias), tmp_path, "without")
    for rank in range(1 if cut == "whole" else 2):
        expected = whole if cut == "whole" else in_halves(whole, cut, rank)
        model = module_of({name: expected}, layout, bias=bias)
        experts = model.get_submodule(name)
        weights = experts.w13_weight, experts.w2_weight
        held, address = [weight.detach() for weight in weights], addresses(*weights)
        options: dict[str, Any] = {} if cut == "whole" else {"rank": rank, "world_size": 2, "dim": cut}
        loaded = load_experts(path, into=model, **options)
        assert [loaded[name].w13, loaded[name].w2] == [experts.w13_weight, experts.w2_weight]
        assert addresses(*weights) == address
        for aliases in (weights, held):
            assert_holds(aliases[0], expected.w13, layout)
            assert_holds(aliases[1], expected.w2, layout)
        if bias:
            assert torch.equal(experts.w13_bias, expected.w13_bias)
            assert torch.equal(experts.w2_bias, expected.w2_bias)


def test_a_weight_that_refuses_to_be_used_is_good_again_after_a_load(tmp_path: Path) -> None:
    expected, name = make_dense(*SIZES["512"]), layer_name("quark")
    path = store(in_format("quark", expected, name), tmp_path, "file")
    model = module_of({name: expected}, "mxfp4_moe", bias=False)
    weight = model.get_submodule(name).w13_weight
    with pytest.raises(KeyError), weight.writing():
        raise KeyError
    load_experts(path, into=model)
    assert_holds(weight, expected.w13, "mxfp4_moe")


# --- the layer's output


def routed(hidden: int, experts: int, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return {
        "hidden_states": torch.randn(tokens, hidden, generator=generator) / 8,
        "topk_weight": torch.rand(tokens, 2, generator=generator),
        "topk_ids": ids.int(),
    }


def output(loaded: Experts, call: dict[str, Tensor], **options: Any) -> Tensor:
    weights = {"w13": loaded.w13, "w2": loaded.w2, "w13_bias": loaded.w13_bias, "w2_bias": loaded.w2_bias}
    return fused_moe(**call, **weights, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_layers_output(tmp_path: Path, format: str, size: str) -> None:
    """Whole, and as the sum of two ranks' outputs, it is what dense weights give."""
    experts, hidden, _ = SIZES[size]
    whole, name = make_dense(*SIZES[size]), layer_name(format)
    bias, activation = format == "gpt-oss", "swiglu" if format == "gpt-oss" else "silu"
    path = store(in_format(format, whole, name), tmp_path, "with index")
    call = routed(hidden, experts)
    biases = {"w13_bias": whole.w13_bias, "w2_bias": whole.w2_bias} if bias else {}
    expected = dense_moe(**call, w13=dense(*whole.w13), w2=dense(*whole.w2), activation=activation, **biases)
    found = output(load_experts(path)[name], call, activation=activation)
    assert relative_error(found, expected) <= 1e-5
    for dim in DIMS:
        total = torch.zeros_like(found)
        for rank in range(2):
            loaded = load_experts(path, rank=rank, world_size=2, dim=dim)[name]
            mask = (torch.arange(experts) * 2 // experts == rank).int() if dim == "expert" else None
            total += output(loaded, call, activation=activation, expert_mask=mask)
        assert relative_error(total, expected) <= 1e-5, dim


PER_RANK = {  # of an intermediate size, by ranks; the first two are gpt-oss's, whose ranges are vLLM's
    (2880, 4): (736, 736, 736, 672),
    (2880, 8): (384, 384, 384, 384, 384, 384, 384, 192),
    (2880, 2): (1440, 1440),
    (320, 3): (128, 128, 64),
    (288, 2): (160, 128),
    (512, 3): (192, 192, 128),
    (96, 3): (32, 32, 32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("intermediate", "ranks"), PER_RANK)
def test_ranks_that_do_not_come_out_even(intermediate: int, ranks: int, layout: str, tmp_path: Path) -> None:
    """Read from a file or cut from a weight, each rank has whole blocks, and all outputs together are the layer's."""
    whole, name, hidden = make_dense(2, 64, intermediate), layer_name("gpt-oss"), 64
    path = store(in_format("gpt-oss", whole, name), tmp_path, "file")
    call = routed(hidden, 2)
    w13, w2 = dense(*whole.w13), dense(*whole.w2)
    expected = dense_moe(**call, w13=w13, w2=w2, activation="swiglu", w13_bias=whole.w13_bias, w2_bias=whole.w2_bias)
    layer = load_experts(path)[name]
    layer.w13.shuffle_(layout)
    layer.w2.shuffle_(layout)
    from_files, from_weights, start = torch.zeros_like(expected), torch.zeros_like(expected), 0
    for rank, size in enumerate(PER_RANK[intermediate, ranks]):
        own, start = slice(start, start + size), start + size
        found = load_experts(path, dim="intermediate", rank=rank, world_size=ranks)[name]
        shards = layer.w13.shard(rank, ranks), layer.w2.shard(rank, ranks)
        gate_and_up = torch.cat([half[:, own] for half in w13.chunk(2, 1)], 1)
        for part, of_w2 in ((found, found.w2), (Experts(*shards, None, None), shards[1])):
            assert torch.equal(part.w13.dequantize(torch.float64), gate_and_up)
            assert torch.equal(of_w2.dequantize(torch.float64), w2[..., own])
        assert torch.equal(found.w13_bias, torch.cat([half[:, own] for half in whole.w13_bias.chunk(2, 1)], 1))
        assert torch.equal(found.w2_bias, whole.w2_bias * (rank == 0))
        from_files += output(found, call, activation="swiglu")
        shard = Experts(*shards, found.w13_bias, found.w2_bias)
        from_weights += output(shard, call, activation="swiglu")
    assert start == intermediate
    assert relative_error(from_files, expected) <= 1e-5
    assert relative_error(from_weights, expected) <= 1e-5


@pytest.mark.parametrize("format", ["gpt-oss", "quark"])
@pytest.mark.parametrize(("intermediate", "parts"), [(288, 2), (320, 3)])
def test_parted_along_both_dimensions(format: str, intermediate: int, parts: int, tmp_path: Path) -> None:
    """Half of the experts, and of these a part of the intermediate dimension, in either order of the two."""
    whole, name, experts = make_dense(4, 64, intermediate), layer_name(format), 4
    path = store(in_format(format, whole, name), tmp_path, "file")
    call, activation = routed(64, experts), "swiglu" if format == "gpt-oss" else "silu"
    biases = {"w13_bias": whole.w13_bias, "w2_bias": whole.w2_bias} if format == "gpt-oss" else {}
    w13, w2 = dense(*whole.w13), dense(*whole.w2)
    expected = dense_moe(**call, w13=w13, w2=w2, activation=activation, **biases)
    total = torch.zeros_like(expected)
    for half in range(2):
        of_experts, mask = slice(2 * half, 2 * half + 2), (torch.arange(experts) // 2 == half).int()
        for rank, size in enumerate(PER_RANK[intermediate, parts]):
            start = sum(PER_RANK[intermediate, parts][:rank])
            own = slice(start, start + size)
            found = load_experts(path, rank=(half, rank), world_size=(2, parts), dim=("expert", "intermediate"))[name]
            other = load_experts(path, rank=(rank, half), world_size=(parts, 2), dim=("intermediate", "expert"))[name]
            gate_and_up = torch.cat([rows[of_experts, own] for rows in w13.chunk(2, 1)], 1)
            for layer in (found, other):
                assert torch.equal(layer.w13.dequantize(torch.float64), gate_and_up)
                assert torch.equal(layer.w2.dequantize(torch.float64), w2[of_experts, :, own])
            total += output(found, call, activation=activation, expert_mask=mask)
    assert relative_error(total, expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (0, 0), "world_size": 2, "dim": ("expert", "intermediate")}, "must be one each, or as many"),
        ({"rank": (0, 0), "world_size": (2, 2)}, "must be one each, or as many"),
        ({"rank": (0, 0), "world_size": (2, 2), "dim": ("expert", "expert")}, "or both, found"),
        ({"rank": (0, 2), "world_size": (2, 2), "dim": ("expert", "intermediate")}, "found rank 2 of 2"),
        ({"dim": "rows"}, "dim must be 'expert' or 'intermediate', or both, found 'rows'"),
    ],
)
def test_parts_that_there_are_not(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = store(in_format("quark", make_dense(4, 64, 64), layer_name("quark")), tmp_path, "file")
    with pytest.raises(ValueError, match=message):
        load_experts(path, **options)


@pytest.mark.parametrize(("intermediate", "ranks"), [(96, 4), (288, 4), (288, 8), (32, 2)])
def test_blocks_that_do_not_suffice_are_an_error_on_every_rank(intermediate: int, ranks: int, tmp_path: Path) -> None:
    whole, name = make_dense(2, 64, intermediate), layer_name("gpt-oss")
    path = store(in_format("gpt-oss", whole, name), tmp_path, "file")
    layer = load_experts(path)[name]
    message = rf"{intermediate} \(intermediate\) cannot be parted into {ranks} parts of whole blocks of 32"
    for rank in range(ranks):
        for call in (
            lambda rank: load_experts(path, dim="intermediate", rank=rank, world_size=ranks),
            lambda rank: layer.w13.shard(rank, ranks),
            lambda rank: layer.w2.shard(rank, ranks),
        ):
            with pytest.raises(ValueError, match=message):
                call(rank)


# --- what else is in a checkpoint


@pytest.mark.parametrize("format", FORMATS)
def test_several_layers_and_one_of_them(tmp_path: Path, format: str) -> None:
    layers = {layer_name(format, layer): make_dense(2, 64, 64, salt=layer) for layer in (0, 3, 30)}
    tensors = {k: v for name, layer in layers.items() for k, v in in_format(format, layer, name).items()}
    path = store(tensors | others(3) | others(30), tmp_path, "with index")
    loaded = load_experts(path)
    assert sorted(loaded) == sorted(layers)
    for name, expected in layers.items():
        assert_is(loaded[name], expected, bias=format == "gpt-oss")
    (one,) = load_experts(path, prefix=layer_name(format, 3).removesuffix("experts"))
    assert one == layer_name(format, 3)
    model = module_of({layer_name(format, 3): layers[layer_name(format, 3)]}, bias=format == "gpt-oss")
    with pytest.raises(ValueError, match=f"the module has no submodule '{re.escape(layer_name(format, 0))}'"):
        load_experts(path, into=model)
    load_experts(path, prefix=f"{layer_name(format, 3)}.", into=model)


def shared_name(format: str) -> str:
    return layer_name(format).replace("experts", "shared_experts")


SHARED = [format for format in FORMATS if format != "gpt-oss"]  # which has none


@pytest.mark.parametrize("format", SHARED)
def test_quantised_shared_experts(tmp_path: Path, format: str) -> None:
    """Experts without a number; parallel experts do not part them."""
    routed, shared = make_dense(4, 64, 128), make_dense(1, 64, 256, salt=2)
    path = store(
        in_format(format, routed, layer_name(format)) | in_format(format, shared, shared_name(format)), tmp_path, "file"
    )
    assert_is(load_experts(path)[shared_name(format)], shared, bias=False)
    for rank in range(2):
        loaded = load_experts(path, rank=rank, world_size=2)
        assert_is(loaded[layer_name(format)], in_halves(routed, "expert", rank), bias=False)
        assert_is(loaded[shared_name(format)], shared, bias=False)
        loaded = load_experts(path, rank=rank, world_size=2, dim="intermediate")
        assert_is(loaded[shared_name(format)], in_halves(shared, "intermediate", rank), bias=False)


def plain_shared(format: str, hidden: int, intermediate: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gate, up, down = ("w1", "w3", "w2") if format == "deepseek" else ("gate_proj", "up_proj", "down_proj")
    shapes = {gate: (intermediate, hidden), up: (intermediate, hidden), down: (hidden, intermediate)}
    return {
        f"{shared_name(format)}.{projection}.weight": torch.randn(shape).to(dtype)
        for projection, shape in shapes.items()
    }


def test_numbered_shared_experts(tmp_path: Path) -> None:
    shared = make_dense(2, 64, 128)
    tensors = {
        name.replace("experts.", "shared_experts."): data
        for name, data in in_format("quark", shared, layer_name("quark")).items()
    }
    path = store(tensors, tmp_path, "file")
    assert_is(load_experts(path)[shared_name("quark")], shared, bias=False)


@pytest.mark.parametrize("format", ["quark", "deepseek"])  # compressed-tensors would take Quark's as well
def test_a_layer_of_another_format_is_left_out_where_one_is_named(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where both call codes alike, or scales."""
    tensors = {}
    for number, each in enumerate(SHARED):
        tensors |= in_format(each, make_dense(2, 64, 64, salt=number), f"layers.{number}.mlp.experts")
    path, own = store(tensors, tmp_path, "file"), SHARED.index(format)
    with caplog.at_level(logging.WARNING, "shuffled_tensor"):
        (found,) = load_experts(path, format=format).items()  # type: ignore[arg-type]
    assert found[0] == f"layers.{own}.mlp.experts"
    assert_is(found[1], make_dense(2, 64, 64, salt=own), bias=False)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", SHARED)
def test_unquantised_shared_experts(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    routed, plain = make_dense(2, 64, 128), plain_shared(format, 64, 128, dtype)
    gate, up, down = plain.values()
    path = store(in_format(format, routed, layer_name(format)) | plain, tmp_path, "without")
    loaded = load_experts(path)
    assert_is(loaded[layer_name(format)], routed, bias=False)
    shared = loaded[shared_name(format)]
    assert type(shared.w13) is type(shared.w2) is Tensor
    assert shared.w13.dtype == shared.w2.dtype == dtype
    assert torch.equal(shared.w13, torch.cat([gate, up])[None])
    assert torch.equal(shared.w2, down[None])
    second = load_experts(path, rank=1, world_size=2, dim="intermediate")[shared_name(format)]
    assert torch.equal(second.w13, torch.cat([gate[64:], up[64:]])[None])
    assert torch.equal(second.w2, down[None, :, 64:])
    model = module_of({layer_name(format): routed, shared_name(format): make_dense(1, 64, 128)}, bias=False)
    with pytest.raises(ValueError, match=r"shared_experts.w13_weight must be a plain tensor of shape \[1, 256, 64\]"):
        load_experts(path, into=model)
    owner = model.get_submodule(shared_name(format))
    for name, shape in (("w13_weight", (1, 256, 64)), ("w2_weight", (1, 64, 128))):
        delattr(owner, name)
        owner.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))
    load_experts(path, into=model)
    assert torch.equal(owner.w2_weight, down[None])


def test_one_weight_of_two_quantised(tmp_path: Path) -> None:
    """Each weight is what its own tensors say."""
    routed, name = make_dense(2, 64, 128), layer_name("quark")
    tensors = in_format("quark", routed, name)
    for expert in range(2):
        del tensors[f"{name}.{expert}.down_proj.weight_scale"]
        tensors[f"{name}.{expert}.down_proj.weight"] = torch.full((64, 128), expert, dtype=torch.bfloat16)
    path = store(tensors, tmp_path, "file")
    assert {finding.name: finding.layout for finding in inspect(path)} == {
        f"{name}.w13_weight": "canonical",
        f"{name}.w2_weight": "plain bfloat16",
    }
    loaded = load_experts(path)[name]
    assert_holds(loaded.w13, routed.w13, "none")  # type: ignore[arg-type]
    assert torch.equal(loaded.w2, torch.stack([torch.full((64, 128), e, dtype=torch.bfloat16) for e in range(2)]))


def test_shared_experts_in_fp8_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in DeepSeek V4 Flash, with scales of tiles."""
    routed, name = make_dense(2, 64, 128), layer_name("deepseek")
    shared = {}
    for key, rows in plain_shared("deepseek", 64, 128, torch.float8_e4m3fn).items():
        shared[key] = rows
        shared[key.replace("weight", "scale")] = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    path = store(in_format("deepseek", routed, name) | shared, tmp_path, "file")
    with caplog.at_level(logging.WARNING, "shuffled_tensor"):
        loaded = load_experts(path)
    assert list(loaded) == [name]
    assert_is(loaded[name], routed, bias=False)
    assert caplog.messages == [
        f"left out layers.3.ffn.shared_experts of {path}: its weights are neither MXFP4 nor plain"
    ]
    with pytest.raises(CheckpointError, match="no tensor of .* named as in format 'deepseek'"):
        load_experts(path, prefix="layers.3.ffn.shared", format="deepseek")
    path = tmp_path / "other.safetensors"
    plain_save_file({k.replace("shared_experts", "experts.0"): v for k, v in shared.items()}, path)
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight in .* is torch.float8_e4m3fn; codes are"):
        load_experts(path, format="deepseek")


def test_shared_experts_in_mxfp8_are_left_out(tmp_path: Path) -> None:
    """Their scales have the dtype of our codes."""
    routed, name = make_dense(2, 64, 128), layer_name("quark")
    shared = plain_shared("quark", 64, 128, torch.float8_e4m3fn)
    scales = {f"{key}_scale": torch.ones(len(rows), 1, dtype=torch.uint8) for key, rows in shared.items()}
    path = store(in_format("quark", routed, name) | shared | scales, tmp_path, "file")
    loaded = load_experts(path)
    assert list(loaded) == [name]
    assert_is(loaded[name], routed, bias=False)


def test_a_download_cache_of_symbolic_links(tmp_path: Path) -> None:
    expected, name = make_dense(2, 64, 64), layer_name("quark")
    real = store(in_format("quark", expected, name), tmp_path, "with index")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        blob = file.rename(tmp_path / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / blob.name)
    assert_is(load_experts(snapshot)[name], expected, bias=False)


# --- only what is wanted is read


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_rank_reads_only_its_part(tmp_path: Path, format: str, dim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But whole rows of a down weight, of which a disk reads several at once."""
    whole = {layer_name(format, layer): make_dense(4, 64, 128, salt=layer) for layer in (1, 2)}
    tensors = {k: v for name, layer in whole.items() for k, v in in_format(format, layer, name).items()}
    path = store(tensors | others(), tmp_path, "with index")
    read: list[int] = []
    plain_read = Files.read

    def counted(self: Files, name: str, *index: int | slice, **into: Tensor) -> Tensor:
        found = plain_read(self, name, *index, **into)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(Files, "read", counted)
    read_rows = Files.read_rows
    monkeypatch.setattr(
        Files, "read_rows", lambda self, name, start, out: (read.append(out.nbytes), read_rows(self, name, start, out))
    )
    load_experts(path, prefix=layer_name(format, 2), rank=1, world_size=2, dim=dim)
    mine = in_halves(whole[layer_name(format, 2)], dim, 1)
    if dim == "intermediate":
        mine = mine._replace(w2=whole[layer_name(format, 2)].w2)
    biases = 0
    if format == "gpt-oss":
        biases = mine.w13_bias.nbytes + (mine.w2_bias.nbytes if dim == "expert" else 0)
    assert sum(read) == sum(part.nbytes for pair in mine[:2] for part in pair) + biases
    largest = max(part.nbytes for pair in whole[layer_name(format, 2)][:2] for part in pair) // 4
    assert max(read) <= largest  # an expert at a time


def test_damage_in_the_part_of_another_rank(tmp_path: Path) -> None:
    """A rank that would look for it would read all of the checkpoint."""
    expected, name, path = make_dense(2, 64, 64), "experts", tmp_path / "own.safetensors"
    parts = {"w13_weight": weight_of(expected.w13), "w2_weight": weight_of(expected.w2, gate_up=False)}
    save_file({f"{name}.{key}": weight for key, weight in parts.items()}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last expert
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_experts(path, into=module_of({name: expected}, bias=False))
    mine = in_halves(expected, "expert", 0)
    model = module_of({name: mine}, bias=False)
    load_experts(path, into=model, rank=0, world_size=2)
    assert_holds(model.get_submodule(name).w13_weight, mine.w13, "none")
    assert_holds(model.get_submodule(name).w2_weight, mine.w2, "none")


@pytest.mark.parametrize("cached", [1, 2000])
def test_interleaved_rows_in_several_runs(cached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large experts are read; a run of rows may be longer than what it shall be, and the last one shorter."""
    expected, name = make_dense(*SIZES["padded"]), layer_name("gpt-oss")
    path = store(in_format("gpt-oss", expected, name), tmp_path, "file")
    monkeypatch.setattr(checkpoint_weight, "_CACHED", cached)
    assert_is(load_experts(path)[name], expected, bias=True)


def test_into_some_columns_of_a_larger_weight(tmp_path: Path) -> None:
    """What is beside them stays."""
    expected, name = make_dense(2, 64, 64), layer_name("quark")
    path = store(in_format("quark", expected, name), tmp_path, "file")
    model, around = module_of({name: expected}, bias=False), make_dense(2, 64, 128, salt=1).w2
    whole = weight_of(around, gate_up=False)
    model.get_submodule(name).w2_weight = torch.nn.Parameter(whole[:, :, 64:])
    load_experts(path, into=model)
    assert torch.equal(whole[:, :, :64].dequantize(torch.float64), dense(*around)[:, :, :64])  # type: ignore[attr-defined]
    assert torch.equal(whole[:, :, 64:].dequantize(torch.float64), dense(*expected.w2))  # type: ignore[attr-defined]


# --- formats told and not told


def test_the_format_may_be_said(tmp_path: Path) -> None:
    expected, name = make_dense(2, 64, 64), layer_name("quark")
    quark, other = in_format("quark", expected, name), in_format("compressed-tensors", make_dense(2, 64, 64, 5), name)
    other = {key: part for key, part in other.items() if key.endswith("packed")}  # the scales' names are the same
    path = store(quark | other, tmp_path, "file")
    with pytest.raises(CheckpointError, match=r"proj.weight as in 'quark' and .*proj.weight_packed as in"):
        load_experts(path)
    assert_is(load_experts(path, format="quark")[name], expected, bias=False)
    with pytest.raises(ValueError, match="unknown format 'gguf'; known formats: 'auto', 'gpt-oss', 'quark'"):
        load_experts(path, format="gguf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_is", [False, True], ids=["canonical", "as_is"])
def test_own_format(tmp_path: Path, layout: str, as_is: bool) -> None:
    """What save_file wrote of a module's parameters, whole and in ranks."""
    whole = make_dense(*SIZES["padded"])
    model = module_of({"model.layers.3.mlp.experts": whole}, layout)
    experts = model.get_submodule("model.layers.3.mlp.experts")
    source = module_of({"model.layers.3.mlp.experts": whole}, layout).get_submodule("model.layers.3.mlp.experts")
    load_experts(store(in_format("gpt-oss", whole, "model.layers.3.mlp.experts"), tmp_path, "file"), into=model)
    path = tmp_path / "own.safetensors"
    save_file(model.state_dict(), path, layout="as_is" if as_is else "canonical")
    loaded = load_experts(path)["model.layers.3.mlp.experts"]
    assert loaded.w13.dtype == torch.float32
    assert_holds(loaded.w13, whole.w13, layout if as_is else "none")  # type: ignore[arg-type]
    assert_holds(loaded.w2, whole.w2, layout if as_is else "none")  # type: ignore[arg-type]
    assert torch.equal(loaded.w13_bias, whole.w13_bias)  # type: ignore[arg-type]
    for dim in DIMS:
        for rank in range(2):
            part = load_experts(path, rank=rank, world_size=2, dim=dim)["model.layers.3.mlp.experts"]
            mine = in_halves(whole, dim, rank)
            assert_holds(part.w13, mine.w13, layout if as_is else "none")  # type: ignore[arg-type]
            assert_holds(part.w2, mine.w2, layout if as_is else "none")  # type: ignore[arg-type]
            assert torch.equal(part.w2_bias, mine.w2_bias)  # type: ignore[arg-type]
    # at the top of a file, into the submodule that is the module itself
    save_file(experts.state_dict(), path)
    load_experts(path, into=source)
    assert_holds(source.w13_weight, whole.w13, layout)


@pytest.mark.parametrize("layout", ["canonical", "as_is"])
def test_a_weight_is_saved_without_a_copy_of_it(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be all the memory that there is."""
    parts, path = make_dense(2, 64, 64).w13, tmp_path / "own.safetensors"
    weight = weight_of(parts, "mxfp4_moe")
    monkeypatch.setattr(Tensor, "clone", None)
    save_file(
        {"w": weight, "x": weight[1:]} | ({"rows": weight[:, :9]} if layout == "canonical" else {}), path, layout=layout
    )
    monkeypatch.undo()
    assert torch.equal(load_file(path)["w"].dequantize(torch.float64), dense(*parts))  # type: ignore[operator]


def test_inside_other_contexts(tmp_path: Path) -> None:
    """Engines make models under a default device and in inference mode."""
    expected, name = make_dense(2, 64, 64), layer_name("gpt-oss")
    path = store(in_format("gpt-oss", expected, name), tmp_path, "file")
    with torch.device("meta"):
        loaded = load_experts(path, device="cpu")
    assert_is(loaded[name], expected, bias=True)
    model = module_of({name: expected}, "mxfp4_moe")
    with torch.inference_mode():
        load_experts(path, into=model)
    assert_holds(model.get_submodule(name).w13_weight, expected.w13, "mxfp4_moe")


def test_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """One line in the log, and no progress bar where nobody looks."""
    path = store(in_format("quark", make_dense(2, 64, 64), layer_name("quark")), tmp_path, "file")
    with caplog.at_level(logging.INFO, "shuffled_tensor"):
        load_experts(path)
    (line,) = caplog.messages
    assert re.fullmatch(rf"loaded the experts of 1 layers, 0.00 GiB, from {re.escape(str(path))} in \d+.\d\d s", line)
    assert capsys.readouterr() == ("", "")


def test_summary_of_more_than_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(in_format("quark", make_dense(2, 512, 1536), layer_name("quark")), path)
    with caplog.at_level(logging.INFO, "shuffled_tensor"):
        load_experts(path)
    assert f"{2 * 3 * 512 * 1536 * 17 / 32 / 2**30:.2f} GiB" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_where_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(in_format("quark", make_dense(2, 64, 64), layer_name("quark")), tmp_path, "file")
    for run, said in (
        (lambda: load_experts(path), r"loading experts: 100%.* 2/2 .*weights(/s)?\]"),
        (lambda: inspect(path, read=True), r"reading experts: 100%.* 4/4 "),
        (lambda: convert(path, tmp_path / "new.safetensors"), r"writing new\.safetensors: 100%.*k/\d+\.?\d*k "),
    ):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        run()
        assert re.search(said, terminal.getvalue()), terminal.getvalue()
