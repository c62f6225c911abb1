# SPDX-License-Identifier: MIT
"""Every way to save x every layout in memory x every way to load: the same logical value, in the destination's layout."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.checkpoint import load_experts, load_file, save_file
from shuffled_tensor.checkpoint.source import DTYPES

from .support.bytes import LAYOUTS, SHAPES, addresses, coded, marked_parts, weight_of
from .support.checkpoints import make_dense, module_of
from .support.judges import assert_holds, dense, in_memory

Tensors = dict[str, Tensor]


class Way(NamedTuple):
    save: Callable[[Tensors, Path], object]
    load: Callable[[Path], Tensors]
    as_is: bool = False
    """Whether a fresh tensor lies as the saved one did; else row-major."""


WAYS = {
    "torch.save": Way(torch.save, lambda path: torch.load(path, weights_only=True)),
    "pickle": Way(
        lambda tensors, path: path.write_bytes(pickle.dumps(tensors)), lambda path: pickle.loads(path.read_bytes())
    ),
    "save_file": Way(save_file, load_file),
    "save_file as is": Way(lambda tensors, path: save_file(tensors, path, layout="as_is"), load_file, as_is=True),
    # torch.distributed.checkpoint belongs here too, as soon as it takes these tensors
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
gate_ups = pytest.mark.parametrize("gate_up", [True, False], ids=["gate_up", "down"])


@cache
def parts_of(*shape: int) -> tuple[Tensor, Tensor]:
    return marked_parts(*shape)


@cache
def bytes_of(shape: tuple[int, int, int], layout: str, gate_up: bool) -> tuple[Tensor, Tensor]:
    """By the index formulas."""
    return in_memory(parts_of(*shape), layout, gate_up=gate_up)


@cache
def checksum_of(shape: tuple[int, int, int], gate_up: bool) -> str:
    """Of a tensor that was never saved."""
    return weight_of(parts_of(*shape), gate_up=gate_up).logical_checksum()


def module_with(weight: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight))
    return module


# --- whole weights


@ways
@layouts
@gate_ups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_into_a_fresh_tensor(tmp_path: Path, way: Way, layout: str, gate_up: bool, shape: tuple[int, int, int]) -> None:
    weight = weight_of(parts_of(*shape), layout, gate_up=gate_up)
    way.save({"weight": weight}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")["weight"]
    assert isinstance(loaded, ShuffledMXFP4Tensor)
    assert (loaded.gate_up, loaded.dtype) == (gate_up, torch.float32)
    assert_holds(loaded, parts_of(*shape), layout if way.as_is else "none")
    assert_lies(weight, shape, layout)  # saving changes nothing
    assert loaded.logical_checksum() == checksum_of(shape, gate_up)
    assert len({*addresses(weight), *addresses(loaded)}) == 4  # memory of its own


def assert_lies(weight: ShuffledMXFP4Tensor, shape: tuple[int, int, int], layout: str) -> None:
    """It says that it lies as `layout`, and every byte does."""
    assert (weight.is_shuffled, weight.shuffle_kind) == (layout != "none", layout if layout != "none" else None)
    for found, expected in zip((weight.qdata, weight.scale), bytes_of(shape, layout, weight.gate_up), strict=True):
        assert torch.equal(found, expected)


INTO: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "load_state_dict": lambda module, loaded: module.load_state_dict({"weight": loaded}),
    "copy_": lambda module, loaded: module.weight.data.copy_(loaded),
}


@ways
@layouts
@gate_ups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_into_a_destination(tmp_path: Path, way: Way, layout: str, gate_up: bool, shape: tuple[int, int, int]) -> None:
    """In each layout, by each way to write: kind and address stay, for aliases too."""
    way.save({"weight": weight_of(parts_of(*shape), layout, gate_up=gate_up)}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")["weight"]
    other = parts_of(*shape)[0] ^ 0xFF, parts_of(*shape)[1] ^ 1
    for destination, (name, write) in product(LAYOUTS, INTO.items()):
        module = module_with(weight_of(other, destination, gate_up=gate_up))
        address, alias = addresses(module.weight), module.weight.detach()
        write(module, loaded)
        assert isinstance(module.weight, nn.Parameter), name
        assert addresses(module.weight) == addresses(alias) == address
        assert_lies(module.weight, shape, destination)
        assert module.weight.logical_checksum() == alias.logical_checksum() == checksum_of(shape, gate_up)


@layouts
@pytest.mark.parametrize("destination", LAYOUTS)
@pytest.mark.parametrize("as_is", [False, True], ids=["canonical", "as_is"])
@pytest.mark.parametrize("sizes", [(1, 512, 512), (3, 160, 96)], ids=str)
def test_load_experts_into_a_module(
    tmp_path: Path, layout: str, destination: str, as_is: bool, sizes: tuple[int, int, int]
) -> None:
    expected = make_dense(*sizes)
    tensors = {
        "layers.0.experts.w13_weight": weight_of(expected.w13, layout),
        "layers.0.experts.w2_weight": weight_of(expected.w2, layout, gate_up=False),
        "layers.0.experts.w13_bias": expected.w13_bias,
        "layers.0.experts.w2_bias": expected.w2_bias,
    }
    save_file(tensors, tmp_path / "file", layout="as_is" if as_is else "canonical")
    model = module_of({"layers.0.experts": expected}, destination)
    experts = model.get_submodule("layers.0.experts")
    address = addresses(experts.w13_weight, experts.w2_weight)
    load_experts(tmp_path / "file", into=model)
    assert addresses(experts.w13_weight, experts.w2_weight) == address
    for weight, parts in ((experts.w13_weight, expected.w13), (experts.w2_weight, expected.w2)):
        assert_holds(weight, parts, destination)
        assert weight.logical_checksum() == weight_of(parts, gate_up=weight.gate_up).logical_checksum()
    assert torch.equal(experts.w13_bias, expected.w13_bias)
    assert torch.equal(experts.w2_bias, expected.w2_bias)


@ways
@layouts
@gate_ups
def test_one_expert_without_its_dimension(tmp_path: Path, way: Way, layout: str, gate_up: bool) -> None:
    parts = marked_parts(1, 96, 160)
    single = weight_of((parts[0][0], parts[1][0]), layout, gate_up=gate_up)
    way.save({"weight": single}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")["weight"]
    assert isinstance(loaded, ShuffledMXFP4Tensor)
    assert loaded.shape == (96, 160)
    assert loaded.gate_up == gate_up
    assert loaded.qdata.shape[-2:] == in_memory(parts, layout, gate_up=gate_up)[0].shape[-2:]
    for found, expected in zip(
        (loaded.qdata, loaded.scale), in_memory(parts, layout if way.as_is else "none", gate_up=gate_up), strict=True
    ):
        assert torch.equal(found, expected[0])
    assert loaded.logical_checksum() == single.logical_checksum()
    assert torch.equal(loaded.dequantize(torch.float64), dense(*parts)[0])
    for destination in LAYOUTS:
        other = marked_parts(1, 96, 160, salt=1)
        module = module_with(weight_of((other[0][0], other[1][0]), destination, gate_up=gate_up))
        address = addresses(module.weight)
        module.load_state_dict({"weight": loaded})
        assert addresses(module.weight) == address
        assert torch.equal(module.weight.dequantize(torch.float64), dense(*parts)[0])
        assert module.weight.is_shuffled == (destination != "none")


# --- parts of weights

WINDOWS: dict[str, tuple[Any, ...]] = {
    "an expert": (1,),
    "some experts": (slice(1, 3),),
    "every other expert": (slice(None, None, 2),),
    "gate rows": (slice(None), slice(48)),
    "up rows of an expert": (2, slice(48, None)),
    "some rows": (slice(1, None), slice(40, 60)),
    "columns": (slice(None), slice(None), slice(32, 96)),
    "rows and columns": (slice(2), slice(10, 20), slice(128, 160)),
}


@ways
@layouts
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_views(tmp_path: Path, way: Way, layout: str, window: tuple[Any, ...]) -> None:
    """A view is saved and loaded as what it shows."""
    whole = marked_parts(4, 96, 160)
    view: Any = weight_of(whole, layout)
    for dim, part in enumerate(window):  # of several windows, one at a time
        view = view[(slice(None),) * (dim - (4 - 1 - view.dim())) + (part,)]
    columns = window[2] if len(window) == 3 else slice(0, 160)
    rows = window[:2]
    expected = (
        whole[0][..., columns.start // 2 : columns.stop // 2][rows],
        whole[1][..., columns.start // 32 : columns.stop // 32][rows],
    )
    way.save({"view": view, "other": torch.arange(3)}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")
    assert torch.equal(loaded["other"], torch.arange(3))
    found = loaded["view"]
    assert isinstance(found, ShuffledMXFP4Tensor)
    assert (found.shape, found.gate_up) == (view.shape, view.gate_up)
    assert torch.equal(found.dequantize(torch.float64), dense(*expected))
    own = ShuffledMXFP4Tensor(*(part.clone() for part in expected), gate_up=False)
    assert found.logical_checksum() == own.logical_checksum()
    for destination in LAYOUTS:
        target = weight_of(tuple(part.clone() ^ 1 for part in expected), destination, gate_up=view.gate_up)  # type: ignore[arg-type]
        address = addresses(target)
        target.copy_(found)
        assert addresses(target) == address
        assert target.logical_checksum() == own.logical_checksum()


# --- what else a tensor is


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(tmp_path: Path, way: Way, dtype: torch.dtype) -> None:
    parts = marked_parts(2, 96, 160)
    way.save({"weight": weight_of(parts, "mxfp4_moe", dtype=dtype)}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")["weight"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.dequantize(torch.float64), dense(*parts))


@ways
@layouts
@pytest.mark.parametrize("kind", [None, "mxfp4_moe", "mxfp4_separated"])
def test_a_fixed_kind_stays_fixed(tmp_path: Path, way: Way, layout: str, kind: str | None) -> None:
    parts = marked_parts(2, 96, 160)
    weight = ShuffledMXFP4Tensor(
        *(part.clone() for part in parts), gate_up=True, row_order="contiguous", shuffle_kind=kind
    )
    if layout != "none" and kind is not None:
        weight.shuffle_()
    way.save({"weight": weight}, tmp_path / "file")
    loaded = way.load(tmp_path / "file")["weight"]
    assert loaded.shuffle_kind == weight.shuffle_kind == kind
    assert loaded.is_shuffled == (way.as_is and weight.is_shuffled)
    loaded.shuffle_(kind or "mxfp4_moe")
    assert_holds(loaded, parts, kind or "mxfp4_moe")


def bytes_of_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's own, but for the one that torch cannot copy."""
    return torch.uint8 if tensor.dtype is torch.float4_e2m1fn_x2 else tensor.dtype


@pytest.mark.parametrize("layout", ["canonical", "as_is"])
def test_plain_tensors(tmp_path: Path, layout: str) -> None:
    """Of every dtype that a file can hold, on whole addresses, beside ours."""
    tensors = {
        f"{index:02} {dtype}": torch.randint(0, 2, (3, 1 + index, 5)).to(dtype)
        for index, dtype in enumerate(DTYPES.values())
        if dtype is not torch.float4_e2m1fn_x2
    }
    two_a_byte = coded(3, 4, 8).view(torch.float4_e2m1fn_x2)
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(12).view(3, 4).t(),
        "parameter": nn.Parameter(torch.ones(7)),
        "float4": two_a_byte,
        "float4, every other row": two_a_byte[:, ::2],
        "float4, transposed": two_a_byte.transpose(0, 1),
        "float4, empty": two_a_byte[:0],
        "weight": weight_of(marked_parts(2, 96, 160), "mxfp4_separated"),
        "big": torch.arange(3 * 2**23, dtype=torch.uint8).view(3, -1),  # more than is copied at a time
    }
    save_file(tensors, tmp_path / "file", {"format": "pt"}, layout=layout)
    loaded, plain = load_file(tmp_path / "file"), safetensors.torch.load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name != "weight":
            assert plain[name].dtype == loaded[name].dtype == tensor.dtype
            assert plain[name].shape == loaded[name].shape == tensor.shape
            for found in (plain[name], loaded[name]):
                assert torch.equal(
                    found.view(-1).view(torch.uint8),
                    tensor.detach().view(bytes_of_dtype(tensor)).contiguous().view(-1).view(torch.uint8),
                )
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata()["format"] == "pt"
    raw = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 16 == 0
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % plain[name].element_size() == 0


# --- what others see


@layouts
@gate_ups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_tools_read_plain_bytes(tmp_path: Path, layout: str, gate_up: bool, shape: tuple[int, int, int]) -> None:
    """Row-major and logical, or padded as they lay."""
    parts = parts_of(*shape)
    weight = weight_of(parts, layout, gate_up=gate_up)
    for way, expected in (("canonical", parts), ("as_is", bytes_of(shape, layout, gate_up))):
        if way == "as_is" and layout == "none":
            expected = parts  # row-major needs no pads
        save_file({"a.b": weight}, tmp_path / "file", layout=way)
        plain = safetensors.torch.load_file(tmp_path / "file")
        assert sorted(plain) == ["a.b.qdata", "a.b.scale"]
        assert plain["a.b.qdata"].dtype == plain["a.b.scale"].dtype == torch.uint8
        assert torch.equal(plain["a.b.qdata"], expected[0])
        assert torch.equal(plain["a.b.scale"], expected[1])


def test_a_file_does_not_depend_on_the_layout_in_memory(tmp_path: Path) -> None:
    files = set()
    for layout in LAYOUTS:
        save_file({"weight": weight_of(marked_parts(*SHAPES[1]), layout)}, tmp_path / "file")
        files.add((tmp_path / "file").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("way", ["torch.save", "save_file", "save_file as is"])
def test_in_a_new_process_that_only_imports_the_package(tmp_path: Path, way: str) -> None:
    tensors, expected = {}, []
    for gate_up in (True, False):
        for layout in LAYOUTS[:3]:  # a made-up one is known to this process alone
            tensors[f"{len(expected)}"] = weight_of(parts_of(*SHAPES[1]), layout, gate_up=gate_up)
            expected.append(checksum_of(SHAPES[1], gate_up))
    tensors["view"] = tensors["1"][1, 40:60]
    WAYS[way].save(tensors, tmp_path / "file")
    if way == "torch.save":
        program = f"import torch, shuffled_tensor; loaded = torch.load({str(tmp_path / 'file')!r}, weights_only=True)"
    else:
        program = f"from shuffled_tensor.checkpoint import load_file; loaded = load_file({str(tmp_path / 'file')!r})"
    program += "; print(*(loaded[name].logical_checksum() for name in sorted(loaded)))"
    command = [sys.executable, "-W", "error", "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [*expected, tensors["view"].clone().logical_checksum()]
