# SPDX-License-Identifier: MIT
"""Tensors of every dtype and kind, in files that are read, written and converted; and what must not be written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from shuffled_tensor import CheckpointError, ShuffledMXFP4Tensor, convert, inspect, load_experts, load_file, save_file
from shuffled_tensor.checkpoint.source import Files

from .support.bytes import coded, weight_of
from .support.checkpoints import SIZES, in_format, interleave, layer_name, make_dense
from .support.judges import dense

DENSE = make_dense(*SIZES["padded"])
NAME = layer_name("quark")

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Of a value, by the dtypes that the safetensors package knows."""


def raw_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file by its specification."""
    header, data = {}, b""
    for name, (dtype, shape, own) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parsed(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    data = raw[start:]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


def every_dtype() -> dict[str, tuple[str, list[int], bytes]]:
    tensors = {}
    for dtype, bits in BITS.items():
        for shape in ([6, 8], [0, 4], [2, 1, 4]):
            count = torch.Size(shape).numel() * bits // 8
            tensors[f"{dtype} {shape}"] = (dtype, shape, bytes(coded(count, salt=bits).numpy() % 2))
    return tensors


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe"])
def test_other_tensors_come_along_byte_for_byte(layout: str, tmp_path: Path) -> None:
    others = every_dtype()
    others["odd"] = ("F4", [2, 3, 5, 1, 4], bytes(range(60)))
    others["an odd last dimension"] = ("F4", [4, 3], bytes(range(6)))
    others["big"] = ("F4", [2, 17 * 2**20], bytes(17) * 2**20)  # more than is copied at a time
    safetensors.torch.save_file(in_format("quark", DENSE, NAME), tmp_path / "experts")
    raw_file(tmp_path / "source.safetensors", parsed(tmp_path / "experts") | others)
    with safe_open(tmp_path / "source.safetensors", "pt") as file:
        assert set(others) <= set(file.keys())
    convert(tmp_path / "source.safetensors", tmp_path / "to.safetensors", layout=layout)
    with safe_open(tmp_path / "to.safetensors", "pt"):
        pass  # checks the whole header
    written = parsed(tmp_path / "to.safetensors")
    for name, other in others.items():
        assert written[name] == other, name
    found = load_experts(tmp_path / "to.safetensors")[NAME]
    assert torch.equal(found.w13.dequantize(torch.float64), dense(*DENSE.w13))


def test_load_file_gives_what_safetensors_gives(tmp_path: Path) -> None:
    for name, tensor in every_dtype().items():
        raw_file(tmp_path / "file", {name: tensor})
        if tensor[0].startswith("F6_"):
            with pytest.raises(CheckpointError, match=rf"^{re.escape(name)} in .* is '{tensor[0]}'; known: BOOL, F4, "):
                load_file(tmp_path / "file")
            continue
        found, plain = load_file(tmp_path / "file")[name], safetensors.torch.load_file(tmp_path / "file")[name]
        assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
        assert torch.equal(found.view(torch.uint8), plain.view(torch.uint8)), name
    raw_file(tmp_path / "file", {"w": ("F4", [2, 3], b"abc")})
    with pytest.raises(CheckpointError, match=r"^w in .* is F4 of shape \[2, 3\], which torch cannot hold$"):
        load_file(tmp_path / "file")


def test_experts_in_float4(tmp_path: Path) -> None:
    tensors = in_format("quark", DENSE, NAME)
    tensors = {
        name: data.view(torch.float4_e2m1fn_x2) if name.endswith(".weight") else data for name, data in tensors.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "f4.safetensors")
    for rank in range(2):
        found = load_experts(tmp_path / "f4.safetensors", rank=rank, world_size=2)[NAME]
        assert torch.equal(found.w13.dequantize(torch.float64), dense(*DENSE.w13).chunk(2)[rank])
        assert torch.equal(found.w2.dequantize(torch.float64), dense(*DENSE.w2).chunk(2)[rank])
    stacked = in_format("gpt-oss", DENSE, NAME)
    for name in [name for name in stacked if name.endswith("_blocks")]:
        stacked[name] = stacked[name].view(torch.float4_e2m1fn_x2)
    safetensors.torch.save_file(stacked, tmp_path / "f4.safetensors")
    found = load_experts(tmp_path / "f4.safetensors", dim="intermediate", rank=1, world_size=2)[NAME]
    gate, up = (half.chunk(2, 1)[1] for half in dense(*DENSE.w13).chunk(2, 1))
    assert torch.equal(found.w13.dequantize(torch.float64), torch.cat([gate, up], 1))
    assert torch.equal(found.w2.dequantize(torch.float64), dense(*DENSE.w2).chunk(2, 2)[1])


# --- what is no plain tensor


def wrappers() -> dict[str, Any]:
    with FakeTensorMode():
        fake = torch.zeros(4)
    return {
        "a wrapper": TwoTensor(torch.ones(4), torch.ones(4)),
        "a parameter of a wrapper": nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4))),
        "fake": fake,
        "meta": torch.zeros(4, device="meta"),
        "our own on meta": weight_of(DENSE.w13).to("meta"),
        "a part view": weight_of(DENSE.w13).qdata_view,
        "sparse": torch.eye(4).to_sparse(),
        "sparse rows": torch.eye(4).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "float4 without a dimension": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "numpy": torch.zeros(4).numpy(),
        "nothing": None,
    }


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_has_no_values_is_refused_by_name(tmp_path: Path) -> None:
    for name, tensor in wrappers().items():
        with pytest.raises((TypeError, ValueError), match=f"^{name!r} "):
            save_file({"first": torch.zeros(3), name: tensor}, tmp_path / "file")
        assert list(tmp_path.iterdir()) == [], name


def test_a_dtensor_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"^'w' is a DTensor, .* what .to_local\(\)"):
            save_file({"w": tensor}, tmp_path / "file")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "file").exists()


def test_names_and_metadata_that_a_header_cannot_say(tmp_path: Path) -> None:
    one = torch.zeros(1)
    for tensors, metadata, message in (
        ({"\ud800": one}, None, r"a tensor's name must be text that has a UTF-8 form, found '\\ud800'"),
        ({1: one, "1": one}, None, "a tensor's name must be text, found 1"),
        ({None: one}, None, "a tensor's name must be text, found None"),
        ({"w": one}, {"a": "\udfff"}, r"metadata must be text that has a UTF-8 form, found '\\udfff'"),
        ({"w": one}, {"\udfff": "a"}, r"metadata must be text that has a UTF-8 form, found '\\udfff'"),
        ({"w": one}, {"a": "long" * 25_000_000}, "names and metadata take 100.* bytes; readers"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            save_file(tensors, tmp_path / "file", metadata)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []
    weight = weight_of(DENSE.w13)
    with pytest.raises(ValueError, match="^a tensor's name must be text, found 1$"):
        save_file({1: weight}, tmp_path / "file")  # type: ignore[dict-item]
    names = {"": one, "naïve/𝄞": one, "a\0b\n": one}
    save_file(names, tmp_path / "file", {"": "𝄞"})
    assert safetensors.torch.load_file(tmp_path / "file").keys() == load_file(tmp_path / "file").keys() == names.keys()


@pytest.mark.parametrize("kind", ["a symbolic link", "a dangling link", "a hard link", "a pipe", "a directory"])
def test_nothing_is_written_through_the_name_of_a_partial_file(kind: str, tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "new.safetensors"
    partial = tmp_path / "new.safetensors.partial"
    if kind == "a dangling link":
        partial.symlink_to(victim)
    elif kind == "a pipe":
        os.mkfifo(partial)
    elif kind == "a directory":
        partial.mkdir()
    else:
        victim.write_bytes(b"precious")
        (partial.symlink_to if kind == "a symbolic link" else partial.hardlink_to)(victim)
    source = tmp_path / "source.safetensors"
    safetensors.torch.save_file(in_format("quark", DENSE, NAME), source)
    for write in (lambda: save_file({"w": torch.zeros(3)}, target), lambda: convert(source, target)):
        with pytest.raises(OSError, match=r"new\.safetensors\.partial"):
            write()
        assert not target.exists()
        if kind == "a dangling link":
            assert not victim.exists()
        elif victim.exists():
            assert victim.read_bytes() == b"precious"


def test_plain_tensors_alone_are_a_file_as_any_other(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.ones(3)}, tmp_path / "ours", metadata)
        safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_codes_that_do_not_lie_row_by_row(tmp_path: Path) -> None:
    codes = coded(4, 8)
    save_file({"x": codes.view(torch.float4_e2m1fn_x2).t()}, tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["x"].view(torch.uint8), codes.t())


# --- devices


@pytest.mark.parametrize("layout", ["canonical", "as_is"])
def test_on_the_meta_device(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    w13 = weight_of(DENSE.w13, "mxfp4_moe")
    w2 = weight_of(DENSE.w2, "mxfp4_moe", gate_up=False)
    f4 = coded(4, 8).view(torch.float4_e2m1fn_x2)
    save_file(
        {"e.w13_weight": w13, "e.w2_weight": w2, "one": w13[1], "e.w13_bias": DENSE.w13_bias, "f4": f4}, path, layout=layout
    )  # fmt: skip
    real = load_file(path)
    monkeypatch.delattr(Files, "_fill")  # headers are all that is read
    meta = load_file(path, device="meta")
    assert real.keys() == meta.keys()
    for name, tensor in meta.items():
        assert tensor.is_meta
        assert type(tensor) is type(real[name])
        assert (tensor.shape, tensor.dtype) == (real[name].shape, real[name].dtype)
        if isinstance(tensor, ShuffledMXFP4Tensor):
            assert (tensor.gate_up, tensor.shuffle_kind) == (real[name].gate_up, real[name].shuffle_kind)
            assert (tensor.qdata.shape, tensor.scale.shape) == (real[name].qdata.shape, real[name].scale.shape)
    found = load_experts(path, device="meta", dim="intermediate", rank=1, world_size=2)["e"]
    assert all(tensor is None or tensor.is_meta for tensor in found)
    assert found.w13.shape == (4, 320, 288)
    assert found.w2.shape == (4, 288, 160)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "", "cuda:99", 3.5])
def test_devices_that_are_none(device: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(in_format("quark", DENSE, NAME), path)
    for load in (load_file, load_experts):
        with pytest.raises(ValueError, match=f"^device {re.escape(repr(device))} cannot be used here: "):
            load(path, device=device)


def test_under_another_default_device(tmp_path: Path) -> None:
    source, here, there = (tmp_path / name for name in ("source.safetensors", "here.safetensors", "there.safetensors"))
    tensors: dict[str, Tensor] = in_format("gpt-oss", DENSE, NAME) | {"x": torch.ones(3)}
    safetensors.torch.save_file(tensors, source)
    convert(source, here, layout="mxfp4_moe")
    expected = inspect(source, read=True)
    with torch.device("meta"):
        convert(source, there, layout="mxfp4_moe")
        assert inspect(source, read=True) == expected
        found = load_experts(source)[NAME]
        loaded = load_file(there)
        save_file(loaded, tmp_path / "again.safetensors", layout="as_is")
    assert there.read_bytes() == here.read_bytes()
    assert torch.equal(found.w13.dequantize(torch.float64), dense(*DENSE.w13))
    assert torch.equal(found.w13_bias, DENSE.w13_bias)
    assert torch.equal(
        load_file(tmp_path / "again.safetensors")[f"{NAME}.w2_weight"].qdata, loaded[f"{NAME}.w2_weight"].qdata
    )
    assert torch.equal(interleave(DENSE.w13_bias), tensors[f"{NAME}.gate_up_proj_bias"])


# --- others' functions


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_safetensors_own_functions_say_what_to_use(layout: str, tmp_path: Path) -> None:
    weight, path = weight_of(DENSE.w13, layout), tmp_path / "file"
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(weight))
    module.register_parameter("bias", nn.Parameter(torch.ones(3)))
    parts: list[Any] = [weight, weight[1], weight[:, :4], nn.Parameter(weight), weight.qdata_view, weight.scale_view]
    for write in (
        *(lambda part=part: safetensors.torch.save_file({"w": part, "x": torch.ones(1)}, path) for part in parts),
        lambda: safetensors.torch.save({"w": weight}),
        lambda: safetensors.torch.save_model(module, path),
    ):
        with pytest.raises(RuntimeError, match=r"save a ShuffledMXFP4Tensor with shuffled_tensor\.save_file") as caught:
            write()
        assert not isinstance(caught.value, NotImplementedError)
        assert list(tmp_path.iterdir()) == []


def test_conversions_out_of_torch_say_what_to_use() -> None:
    weight: Any = weight_of(DENSE.w13)
    for convert_ in (weight.numpy, weight.tolist, lambda: np.asarray(weight), lambda: weight.numpy(force=True)):
        with pytest.raises(RuntimeError, match=r"call \.dequantize\(\) for a plain tensor of its values"):
            convert_()
