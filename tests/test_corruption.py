# SPDX-License-Identifier: MIT
"""Damaged, lying and hostile checkpoints: refused with a message that names file and tensor, before a parameter changes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file as plain_save_file
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, refit
from shuffled_tensor.checkpoint import CheckpointError, load_experts, load_file, save_file, source, writer
from shuffled_tensor.checkpoint.source import Files

from .support.bytes import weight_of
from .support.checkpoints import (
    assert_unchanged,
    in_format,
    layer_name,
    make_dense,
    module_of,
    others,
    snapshot,
    write_sharded,
)
from .support.judges import assert_holds, dense

NAME = layer_name("quark")
DENSE = make_dense(2, 64, 64)
Tensors = dict[str, Tensor]
Header = dict[str, Any]


def quark() -> Tensors:
    return in_format("quark", DENSE, NAME)


def parse(raw: bytes) -> tuple[Header, bytes]:
    """Header and data of a file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def unparse(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def assert_refused(path: Path, message: str, *, bias: bool = False, whole_file: bool = False, **options: Any) -> None:
    """Into new tensors and into a module, nothing of which has changed. PATH in a message is the path. Of a file that is
    none, the message is how it begins: the rest is in the words of the safetensors package."""
    model = module_of({NAME: DENSE}, "mxfp4_moe", bias=bias)
    before = snapshot(model)
    loads: list[Callable[[], object]] = [
        lambda: load_experts(path, **options),
        lambda: load_experts(path, into=model, **options),
        lambda: load_file(path),
    ]
    for load in loads[: 3 if whole_file else 2]:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load()
        found = str(caught.value).replace(str(path), "PATH")
        assert found.startswith(message) if whole_file else found == message
    assert_unchanged(model, before)


# --- files that are none

Edit = Callable[[Header, bytes], bytes]
CODES, SCALE = f"{NAME}.0.down_proj.weight", f"{NAME}.1.up_proj.weight_scale"


def edited(**changes: Any) -> Edit:
    """The header's entry of one tensor with other values."""
    return lambda header, data: unparse(header | {CODES: header[CODES] | changes}, data)


BROKEN_FILES: dict[str, Edit] = {
    "empty": lambda header, data: b"",
    "seven bytes": lambda header, data: b"\x03\0\0\0\0\0\0",
    "a header of absurd length": lambda header, data: b"\xff" * 8 + data,
    "a header beyond the end": lambda header, data: struct.pack("<Q", 10**6) + data,
    "no JSON": lambda header, data: unparse(b"{]", data),
    "no UTF-8": lambda header, data: unparse(b'{"\xff"}', data),
    "no object": lambda header, data: unparse(b"[1, 2]", data),
    "a tensor twice": lambda header, data: unparse(b'{"a": 1, "a": 2}', data),
    "truncated": lambda header, data: unparse(header, data[:-1]),
    "longer": lambda header, data: unparse(header, data + b"\0"),
    "no offsets": lambda header, data: unparse(header | {CODES: {"dtype": "U8", "shape": [64, 32]}}, data),
    "no entry": lambda header, data: unparse(header | {CODES: None}, data),
    "offsets beyond the end": edited(data_offsets=[10**9, 10**9 + 2048]),
    "offsets of another tensor": lambda header, data: unparse(
        header | {CODES: header[f"{NAME}.1.down_proj.weight"]}, data
    ),
    "negative offsets": edited(data_offsets=[-2048, 0]),
    "a fraction": edited(shape=[64.0, 32]),
    "another size": edited(shape=[64, 64]),
    "an endless size": edited(shape=[2**62] * 3),
    "endless dimensions": edited(shape=[2**62] * 65),
    "a dtype that is none": edited(dtype=["U8"]),
    "a dtype that nobody knows": edited(dtype="U9"),
    "metadata that is no text": lambda header, data: unparse(header | {"__metadata__": {"format": 1}}, data),
}


@pytest.mark.parametrize("edit", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_files(tmp_path: Path, edit: Edit) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    path.write_bytes(edit(*parse(path.read_bytes())))
    assert_refused(path, "PATH is no whole safetensors file: Error while deserializing header: ", whole_file=True)


def test_a_deep_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for text in (b'{"a":' + b"[" * 10**5, b'{"a":' * 10**5):
        path.write_bytes(unparse(text, b""))
        with pytest.raises(CheckpointError, match=r"model.safetensors is no whole safetensors file: "):
            load_experts(path)


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(
        {f"{NAME}.{e}.{p}_proj.weight": torch.zeros(1, 16, dtype=torch.uint8) for e in (0, 1) for p in ("up", "gate")},
        path,
    )
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="is no whole safetensors file"):
            Files(path)


# --- tensors that do not fit each other


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def instead(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def only(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if pattern in name}


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nothing": (lambda tensors: {}, "no tensor of PATH is named as MXFP4 experts are in 'gpt-oss', 'quark', 'compressed-tensors', 'deepseek', 'shuffled_tensor'"),
    "something else": (lambda tensors: others(), "no tensor of PATH is named as MXFP4 experts are in 'gpt-oss', 'quark', 'compressed-tensors', 'deepseek', 'shuffled_tensor'"),
    "no scale": (without(SCALE), f"{NAME}.0.gate_proj.weight in PATH has no scale of expert 1 (up) beside it"),
    "no codes of an expert": (without(CODES), f"{NAME}.1.down_proj.weight in PATH has no qdata of expert 0 beside it"),
    "no up": (without(SCALE.replace("_scale", "")), f"{NAME}.0.gate_proj.weight in PATH has no qdata of expert 1 (up) beside it"),
    "no down": (only("gate"), f"{NAME}.0.gate_proj.weight in PATH has no qdata of expert 0 (up) beside it"),
    "an expert is missing": (only(".1."), f"{NAME}.1.gate_proj.weight in PATH has no qdata of expert 0 beside it"),
    "a scale of an expert without codes": (
        lambda tensors: tensors | {CODES.replace(".0.", ".7.") + "_scale": tensors[CODES + "_scale"].clone()},
        f"{NAME}.7.down_proj.weight_scale in PATH has no qdata beside it: there are 2 experts",
    ),
    "an endless number of experts": (
        lambda tensors: tensors | {CODES.replace(".0.", ".999999999."): tensors[CODES].clone()},
        f"{NAME}.0.down_proj.weight in PATH has no qdata of expert 2 beside it",
    ),
    "an expert twice": (lambda tensors: tensors | {CODES.replace(".0.", ".00."): tensors[CODES].clone()}, f"{NAME}.0.down_proj.weight and {NAME}.00.down_proj.weight in PATH are the same part of {NAME}"),
    "scales of another shape": (instead(SCALE, lambda scale: scale.repeat(1, 2)), f"{NAME}.1.up_proj.weight_scale in PATH has shape [64, 4], not [64, 2]"),
    "scales of another block": (instead(SCALE, lambda scale: scale.flatten()), f"{NAME}.1.up_proj.weight_scale in PATH has shape [128], not [64, 2]"),
    "float scales": (instead(SCALE, Tensor.float), f"{NAME}.1.up_proj.weight_scale in PATH is torch.float32, not torch.uint8 or torch.float8_e8m0fnu"),
    "scales of nvfp4": (instead(SCALE, lambda scale: scale.view(torch.float8_e4m3fn)), f"{NAME}.1.up_proj.weight_scale in PATH is torch.float8_e4m3fn, not torch.uint8 or torch.float8_e8m0fnu"),
    "codes of 32 bits": (instead(CODES, lambda codes: codes.view(torch.int32)), f"{NAME}.0.down_proj.weight in PATH is torch.int32; codes are uint8 or int8, plain weights floating point"),
    "one weight unquantised": (instead(CODES, Tensor.bfloat16), f"{NAME}.1.down_proj.weight in PATH is torch.uint8, not torch.bfloat16"),
    "float64 weights": (lambda tensors: tensors | {name: tensor.double() for name, tensor in tensors.items() if name.endswith(("up_proj.weight", "gate_proj.weight"))}, f"{NAME}.0.gate_proj.weight in PATH is torch.float64; codes are uint8 or int8, plain weights floating point"),
    "rows that differ": (instead(CODES, lambda codes: codes[:32].clone()), f"{NAME}.1.down_proj.weight in PATH has shape [64, 32], not [32, 32]"),
    "no rows": (lambda tensors: {name: tensor[:0].clone() for name, tensor in tensors.items()}, f"{NAME}.0.gate_proj.weight in PATH has shape [0, 32] an expert, not [N, K/2] or [N, K/32, 16], K in blocks of 32"),
    "columns that cut a block": (lambda tensors: {name: tensor[:, :24].clone() for name, tensor in tensors.items()}, f"{NAME}.0.gate_proj.weight in PATH has shape [64, 24] an expert, not [N, K/2] or [N, K/32, 16], K in blocks of 32"),
    "plain weights without columns": (
        lambda tensors: {name: torch.ones(64) for name in tensors if name.endswith(".weight")} | {CODES: tensors[CODES]},
        f"{NAME}.0.gate_proj.weight in PATH has shape [64] an expert, not [N, K]",
    ),
    "no w2": (lambda tensors: {name: tensor for name, tensor in tensors.items() if "down" not in name}, f"{NAME} in PATH has no w2"),
    "scales alone of w2": (lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith("down_proj.weight")}, f"{NAME} in PATH has no w2"),
    "w2 of other sizes": (
        lambda tensors: tensors | {name: tensor[:32].clone() for name, tensor in tensors.items() if "down" in name},
        f"{NAME}: for w13 [experts, 2I, K] = [2, 128, 64], w2 must be [2, 64, 64], found [2, 32, 64] in PATH",
    ),
    "names of two formats": (
        lambda tensors: tensors | in_format("deepseek", DENSE, NAME), f"PATH holds {NAME}.0.down_proj.weight as in 'quark' and {NAME}.0.w1.weight as in 'deepseek'; say which with format=",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(change(quark()), path)
    assert_refused(path, message)


def test_stacked_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", layer_name("gpt-oss")
    tensors, up = in_format("gpt-oss", DENSE, name, bias=False), f"{name}.gate_up_proj"
    odd = {key: tensor[:, :127].clone() for key, tensor in tensors.items() if key.startswith(up)}
    for changed, what in (
        (without(f"{up}_scales")(tensors), f"{up}_blocks in PATH has no scale beside it"),
        (tensors | odd, f"{up}_blocks in PATH has 127 rows, which are no gate and up"),
    ):
        plain_save_file(changed, path)
        assert_refused(path, what)


def test_biases_that_do_not_fit(tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", layer_name("gpt-oss")
    tensors = in_format("gpt-oss", DENSE, name)
    key = f"{name}.gate_up_proj_bias"
    for bias, what in (
        (tensors[key][:, :-2].clone(), "has shape [2, 126], not [2, 128]"),
        (tensors[key].view(torch.uint16), "is torch.uint16, not torch.bfloat16 or torch.float16 or torch.float32"),
    ):
        plain_save_file(tensors | {key: bias}, path)
        assert_refused(path, f"{key} in PATH {what}", bias=True)


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    """Of no concern where it is another tensor's."""
    path = tmp_path / "model.safetensors"
    plain_save_file(quark() | others(), path)
    raw = path.read_bytes()
    header, data = parse(raw)
    path.write_bytes(
        unparse(header | {"lm_head.weight": header["lm_head.weight"] | {"dtype": "F6_E2M3", "shape": [40]}}, data)
    )
    load_experts(path)
    start, end = header[CODES]["data_offsets"]
    for entry in header.values():  # 6 bits a value, so half as many bytes more
        if entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place + (end - start) // 2 for place in entry["data_offsets"]]
    header[CODES] = {"dtype": "F6_E2M3", "shape": [64, 64], "data_offsets": [start, end + (end - start) // 2]}
    path.write_bytes(unparse(header, data[:end] + bytes((end - start) // 2) + data[end:]))
    known = "BOOL, F4, U8, U16, U32, U64, I8, I16, I32, I64, F8_E4M3, F8_E4M3FNUZ, F8_E5M2, F8_E5M2FNUZ, F8_E8M0, F16, BF16, F32, F64, C64"
    assert_refused(path, f"{CODES} in PATH is 'F6_E2M3'; known: {known}")


# --- several files


def folder(tmp_path: Path, *, index: bool = True) -> Path:
    write_sharded(quark(), tmp_path / "model", 2, index=index)
    return tmp_path / "model"


def change_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def duplicate_in_index(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    text = file.read_text()
    file.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{CODES}": "{SECOND}", '))


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda path: (path / SECOND).unlink(), f"PATH/model.safetensors.index.json sends {NAME}.0.up_proj.weight to model-00002-of-00002.safetensors, which is missing"),
    "a damaged shard": (lambda path: (path / SECOND).write_bytes(b"\0" * 20), "PATH/model-00002-of-00002.safetensors is no whole safetensors file: Error while deserializing header: invalid JSON in header: EOF while parsing a value at line 1 column 0"),
    "a shard that is a folder": (lambda path: ((path / SECOND).unlink(), (path / SECOND).mkdir()), f"PATH/model.safetensors.index.json sends {NAME}.0.up_proj.weight to model-00002-of-00002.safetensors, which is missing"),
    "a tensor twice in the index": (duplicate_in_index, f"PATH/model.safetensors.index.json is no index of safetensors files: ValueError('it names {NAME}.0.down_proj.weight twice')"),
    "two shards hold a tensor": (
        lambda path: ((path / "model.safetensors.index.json").unlink(), shutil.copy(path / FIRST, path / "z.safetensors")),
        f"{NAME}.0.down_proj.weight is in model-00001-of-00002.safetensors and in z.safetensors of PATH",
    ),
    "a tensor in the other shard": (lambda path: change_index(path, lambda names: names.update({CODES: SECOND if names[CODES] == FIRST else FIRST})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to model-00002-of-00002.safetensors, which does not hold it"),
    "a tensor that is nowhere": (lambda path: change_index(path, lambda names: names.update(absent=FIRST)), "PATH/model.safetensors.index.json sends absent to model-00001-of-00002.safetensors, which does not hold it"),
    "up and out": (lambda path: change_index(path, lambda names: names.update({CODES: "../secret.safetensors"})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to '../secret.safetensors', which is no file beside it"),
    "an absolute path": (lambda path: change_index(path, lambda names: names.update({CODES: "/etc/passwd"})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to '/etc/passwd', which is no file beside it"),
    "a folder below": (lambda path: change_index(path, lambda names: names.update({CODES: "a/b.safetensors"})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to 'a/b.safetensors', which is no file beside it"),
    "the folder above": (lambda path: change_index(path, lambda names: names.update({CODES: ".."})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to .., which is missing"),
    "a null byte": (lambda path: change_index(path, lambda names: names.update({CODES: "a\0b"})), f'PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to a\x00b, which is missing'),
    "a number for a file": (lambda path: change_index(path, lambda names: names.update({CODES: 7})), f"PATH/model.safetensors.index.json sends {NAME}.0.down_proj.weight to 7, which is no file beside it"),
    "an index that is no JSON": (lambda path: (path / "model.safetensors.index.json").write_text("weights"), "PATH/model.safetensors.index.json is no index of safetensors files: JSONDecodeError('Expecting value: line 1 column 1 (char 0)')"),
    "an index of nothing": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "PATH/model.safetensors.index.json is no index of safetensors files: KeyError('weight_map')"),
    "an index that is no object": (lambda path: (path / "model.safetensors.index.json").write_text("[]"), "PATH/model.safetensors.index.json is no index of safetensors files: ValueError('no JSON object')"),
    "an index that is a list": (lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'), 'PATH/model.safetensors.index.json is no index of safetensors files: AttributeError("\'list\' object has no attribute \'items\'")'),
    "two indices": (lambda path: (path / "a.safetensors.index.json").write_text("{}"), "PATH holds 2 indices, a.safetensors.index.json and others; give a file"),
    "nothing in it": (lambda path: [file.unlink() for file in path.iterdir()], "no *.safetensors in PATH"),
    "nothing there": (shutil.rmtree, "no such file: PATH"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_broken_folders(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    path = folder(tmp_path)
    plain_save_file({CODES: torch.zeros(64, 32, dtype=torch.uint8)}, tmp_path / "secret.safetensors")
    change(path)
    assert_refused(path, message)


def test_files_are_closed(tmp_path: Path) -> None:
    """Also where the second of two is damaged: warnings are errors here, and an unclosed file is a warning."""
    path = folder(tmp_path)
    opened = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else set()
    load_experts(path)
    (path / SECOND).write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_experts(path)
    if opened:
        assert len(os.listdir("/proc/self/fd")) == len(opened)


# --- manifests that lie


def own_file(path: Path, layout: str = "as_is") -> nn.Module:
    """Two weights and biases, written by save_file."""
    model = module_of({NAME: DENSE}, "mxfp4_moe")
    save_file(model.state_dict(), path, layout=layout)
    return model


def change_manifest(change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> Edit:
    """``seal`` makes a lie that was meant."""

    def edit(header: Header, data: bytes) -> bytes:
        manifest = json.loads(header["__metadata__"]["shuffled_tensor"])
        change(manifest)
        if seal:
            text = json.dumps(manifest["tensors"], sort_keys=True)
            manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
        header["__metadata__"]["shuffled_tensor"] = json.dumps(manifest)
        return unparse(header, data)

    return edit


W13 = f"{NAME}.w13_weight"


def says(**changes: Any) -> Edit:
    return change_manifest(lambda manifest: manifest["tensors"][W13].update(changes))


def no_manifest(header: Header, data: bytes) -> bytes:
    del header["__metadata__"]
    return unparse(header, data)


def unreadable_manifest(header: Header, data: bytes) -> bytes:
    header["__metadata__"]["shuffled_tensor"] = "yes"
    return unparse(header, data)


def doubled_key(header: Header, data: bytes) -> bytes:
    text = header["__metadata__"]["shuffled_tensor"]
    header["__metadata__"]["shuffled_tensor"] = text.replace('"version": 1', '"version": 2, "version": 1')
    return unparse(header, data)


def flip_data(header: Header, data: bytes) -> bytes:
    place = header[f"{W13}.qdata"]["data_offsets"][0] + 5  # no pad, which has no checksum and is written anew
    return unparse(header, data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])


def swap(header: Header, data: bytes) -> bytes:
    """The two experts' codes."""
    start, end = header[f"{W13}.qdata"]["data_offsets"]
    middle = (start + end) // 2
    return unparse(header, data[:start] + data[middle:end] + data[start:middle] + data[end:])


LYING_MANIFESTS: dict[str, tuple[Edit, str | tuple[str, str]]] = {
    "an unknown version": (change_manifest(lambda manifest: manifest.update(version=2)), "the manifest of PATH has format version 2, and this build knows 1; use a newer shuffled_tensor"),
    "no version": (change_manifest(lambda manifest: manifest.pop("version")), "the manifest of PATH cannot be read: KeyError('version')"),
    "no manifest": (no_manifest, (f"{NAME}.w13_weight.qdata in PATH is in no manifest, so its layout is unknown", f"{NAME}.w13_weight.qdata and {NAME}.w13_weight.scale in PATH are in no manifest, so their layout is unknown")),
    "no JSON": (unreadable_manifest, "the manifest of PATH cannot be read: JSONDecodeError('Expecting value: line 1 column 1 (char 0)')"),
    "a list": (change_manifest(lambda manifest: manifest.update(tensors=[])), 'the manifest of PATH cannot be read: AttributeError("\'list\' object has no attribute \'items\'")'),
    "changed": (change_manifest(lambda manifest: manifest["tensors"][W13].update(gate_up=False), seal=False), "the manifest of PATH was changed or damaged: its seal does not fit"),
    "an unknown kind": (says(kind="mxfp4_turbo"), f"the manifest of PATH says something impossible of {NAME}.w13_weight: unknown shuffle_kind 'mxfp4_turbo'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'"),
    "another kind": (says(kind="mxfp4_separated"), f"{NAME}.w13_weight in PATH is damaged: its values have checksum 25fa0d74173b..., the manifest says 7b5d33f5c1cb..."),
    "row-major": (says(kind="none", padded=None), f"{NAME}.w13_weight.qdata in PATH has shape [2, 512, 128], not [2, 128, 32]"),
    "row-major in padded sizes": (says(kind="none"), f"the manifest of PATH says something impossible of {NAME}.w13_weight: padded sizes [512, 128] for layout 'none', which has None"),
    "other sizes": (says(shape=[2, 512, 64]), (f"{NAME}.w13_bias in PATH has shape [2, 128], not [2, 512]", f"{NAME}.w13_weight in PATH is damaged: its values have checksum 104a750d7997..., the manifest says 7b5d33f5c1cb...")),
    "other sizes, the same padded": (says(shape=[2, 120, 64]), (f"{NAME}.w13_bias in PATH has shape [2, 128], not [2, 120]", f"{NAME}.w13_weight in PATH is damaged: its values have checksum ce4b998b253a..., the manifest says 7b5d33f5c1cb...")),
    "one expert more": (says(shape=[3, 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: 2 experts' checksums for shape [3, 128, 64]"),
    "no sizes": (says(shape=[]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape []"),
    "sizes that are none": (says(shape=["2", 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape ['2', 128, 64]"),
    "no rows": (says(shape=[2, 0, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [2, 0, 64]"),
    "half a block": (says(shape=[2, 128, 48]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [2, 128, 48]"),
    "four dimensions": (says(shape=[1, 2, 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [1, 2, 128, 64]"),
    "one dimension": (says(shape=[64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [64]"),
    "half a gate": (says(shape=[2, 129, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: gate_up True for 129 rows"),
    "an endless size": (says(shape=[2, 10**30, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: padded sizes [512, 128] for layout 'mxfp4_moe', which has [1000000000000000000000000000000, 128]"),
    "other padded sizes": (says(padded=[512, 512]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: padded sizes [512, 512] for layout 'mxfp4_moe', which has [512, 128]"),
    "not gate and up": (says(gate_up=False, padded=[256, 128]), (f"{NAME}.w13_weight.qdata in PATH is [2, 128, 64] with gate_up=False by its manifest, not [experts, N, K] with gate_up=True", f"{NAME}.w13_weight.qdata in PATH has shape [2, 512, 128], not [2, 256, 128]")),
    "an unknown dtype": (says(dtype="int4"), f"the manifest of PATH says something impossible of {NAME}.w13_weight: dtype 'int4'"),
    "an unknown target": (says(shuffle_kind="fast"), f"the manifest of PATH says something impossible of {NAME}.w13_weight: unknown shuffle_kind 'fast'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'"),
    "another checksum": (says(checksum="0" * 64), f"{NAME}.w13_weight in PATH is damaged: its values have checksum 7b5d33f5c1cb..., the manifest says 000000000000..."),
    "a version that is no number": (change_manifest(lambda manifest: manifest.update(version=True)), "the manifest of PATH has format version True, and this build knows 1; use a newer shuffled_tensor"),
    "a truth for a size": (says(shape=[True, 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [True, 128, 64]"),
    "a fraction for a size": (says(shape=[2.0, 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [2.0, 128, 64]"),
    "no number for a size": (says(shape=[2, 128, float("nan")]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [2, 128, nan]"),
    "less than nothing": (says(shape=[-2, 128, 64]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: shape [-2, 128, 64]"),
    "a fraction for a padded size": (says(padded=[512.0, 128]), f"the manifest of PATH says something impossible of {NAME}.w13_weight: padded sizes [512.0, 128] for layout 'mxfp4_moe', which has [512, 128]"),
    "gate_up that is a number": (says(gate_up=1), f"the manifest of PATH says something impossible of {NAME}.w13_weight: gate_up 1 for 128 rows"),
    "a checksum that is not hex": (says(checksum="g" * 64), f"the manifest of PATH says something impossible of {NAME}.w13_weight: checksum '{'g' * 64}'"),
    "a checksum that is not lower case": (says(checksum="A" * 64), f"the manifest of PATH says something impossible of {NAME}.w13_weight: checksum '{'A' * 64}'"),
    "a key that nobody knows": (says(rotation=3), f"the manifest of PATH says something impossible of {NAME}.w13_weight: unknown keys rotation; use a newer shuffled_tensor"),
    "a key beside them": (change_manifest(lambda manifest: manifest.update(rotation=3)), "the manifest of PATH cannot be read: ValueError('unknown keys rotation; use a newer shuffled_tensor')"),
    "a key twice": (doubled_key, "the manifest of PATH cannot be read: ValueError('it names version twice')"),
    "no checksum": (says(checksum=None), f"the manifest of PATH says something impossible of {NAME}.w13_weight: checksum None"),
    "no entry": (change_manifest(lambda manifest: manifest["tensors"].pop(W13)), (f"{NAME}.w13_weight.qdata in PATH is in no manifest, so its layout is unknown", f"{NAME}.w13_weight.qdata and {NAME}.w13_weight.scale in PATH are in no manifest, so their layout is unknown")),
    "an entry that is none": (change_manifest(lambda manifest: manifest["tensors"].update({W13: 3})), f"the manifest of PATH says something impossible of {NAME}.w13_weight: 'int' object is not subscriptable"),
    "a bit flip in codes": (flip_data, f"{NAME}.w13_weight in PATH is damaged: its values have checksum 689051cb0359..., the manifest says 7b5d33f5c1cb..."),
    "swapped experts": (swap, f"{NAME}.w13_weight in PATH is damaged: its values have checksum 2dc63fbfdbb3..., the manifest says 7b5d33f5c1cb..."),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), LYING_MANIFESTS.values(), ids=LYING_MANIFESTS)
def test_lying_manifests(tmp_path: Path, edit: Edit, message: str | tuple[str, str]) -> None:
    path = tmp_path / "own.safetensors"
    own_file(path)
    path.write_bytes(edit(*parse(path.read_bytes())))
    messages = message if isinstance(message, tuple) else (message, message)
    assert_refused(path, messages[0], bias=True)
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert str(caught.value).replace(str(path), "PATH") == messages[1]


def test_bytes_by_another_name(tmp_path: Path) -> None:
    """A dtype of one byte is taken where uint8 was written: they are the same bytes."""
    path = tmp_path / "own.safetensors"
    model = own_file(path)
    header, data = parse(path.read_bytes())
    header[f"{W13}.qdata"]["dtype"], header[f"{W13}.scale"]["dtype"] = "I8", "F8_E8M0"
    path.write_bytes(unparse(header, data))
    assert load_file(path)[W13].logical_checksum() == model.get_parameter(W13).logical_checksum()  # type: ignore[attr-defined]


def test_a_manifest_of_another_file(tmp_path: Path) -> None:
    """Two files of one folder describe one weight."""
    path = tmp_path / "model"
    path.mkdir()
    own_file(path / "a.safetensors")
    header, _ = parse((path / "a.safetensors").read_bytes())
    plain_save_file({"other": torch.zeros(2)}, path / "b.safetensors", metadata=header["__metadata__"])
    with pytest.raises(CheckpointError, match=f"{W13} is in the manifests of .*a.safetensors and .*b.safetensors"):
        load_file(path)


# --- nothing changes before everything was looked at


def damage_checksum(header: Header, data: bytes) -> bytes:
    return change_manifest(lambda manifest: manifest["tensors"][f"{NAME}.z.w2_weight"].update(checksum="1" * 64))(
        header, data
    )


def test_the_last_weight_is_damaged(tmp_path: Path) -> None:
    """No parameter of any layer has changed."""
    path = tmp_path / "own.safetensors"
    model = module_of({f"{NAME}.a": DENSE, f"{NAME}.z": DENSE}, "mxfp4_moe")
    save_file(model.state_dict(), path)
    for parameter in model.parameters():
        parameter.zero_() if isinstance(parameter, ShuffledMXFP4Tensor) else parameter.data.zero_()
    path.write_bytes(damage_checksum(*parse(path.read_bytes())))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"{NAME}.z.w2_weight in .* is damaged: its values have checksum"):
        load_experts(path, into=model)
    assert_unchanged(model, before)


WRONG_MODULES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "no layer": (lambda layer: layer.__dict__["parent"].__delattr__("experts"), f"the module has no submodule '{NAME}' to load into"),
    "no weight": (lambda layer: delattr(layer, "w2_weight"), f"{NAME}.w2_weight must be a ShuffledMXFP4Tensor of shape [2, 64, 64] for what PATH holds, found nothing"),
    "a plain weight": (
        lambda layer: replace(layer, "w2_weight", torch.zeros(2, 64, 64)),
        f"{NAME}.w2_weight must be a ShuffledMXFP4Tensor of shape [2, 64, 64] for what PATH holds, found a Parameter of shape [2, 64, 64]",
    ),
    "another shape": (
        lambda layer: replace(layer, "w2_weight", weight_of((DENSE.w2[0][:1], DENSE.w2[1][:1]), gate_up=False)),
        f"{NAME}.w2_weight must be a ShuffledMXFP4Tensor of shape [2, 64, 64] for what PATH holds, found a ShuffledMXFP4Tensor of shape [1, 64, 64]",
    ),
    "a down weight": (
        lambda layer: replace(layer, "w13_weight", weight_of(DENSE.w13, gate_up=False)),
        f"{NAME}.w13_weight must have gate_up=True, found False",
    ),
    "on the meta device": (
        lambda layer: replace(layer, "w2_weight", layer.w2_weight.to("meta")),
        f"{NAME}.w2_weight is on the meta device, where nothing can be loaded; see to_empty()",
    ),
    "no bias": (lambda layer: delattr(layer, "w2_bias"), f"{NAME}.w2_bias must be of shape [2, 64] for what PATH holds, found none"),
    "another bias": (lambda layer: replace(layer, "w13_bias", torch.zeros(2, 64)), f"{NAME}.w13_bias must be of shape [2, 128] for what PATH holds, found shape [2, 64]"),
}  # fmt: skip


def replace(layer: nn.Module, name: str, tensor: Tensor) -> None:
    delattr(layer, name)
    layer.register_parameter(name, nn.Parameter(tensor))


@pytest.mark.parametrize(("change", "message"), WRONG_MODULES.values(), ids=WRONG_MODULES)
def test_modules_that_do_not_fit(tmp_path: Path, change: Callable[[nn.Module], object], message: str) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(in_format("gpt-oss", DENSE, NAME), path)
    model = module_of({NAME: DENSE}, "mxfp4_moe")
    layer = model.get_submodule(NAME)
    layer.__dict__["parent"] = model.get_submodule(NAME.removesuffix(".experts"))
    change(layer)
    kept = [parameter for parameter in layer.parameters() if parameter.device.type == "cpu"]
    holder = nn.ParameterList(kept)
    before = snapshot(holder)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('PATH', str(path)))}$"):
        load_experts(path, into=model)
    assert_unchanged(holder, before)


def test_a_bias_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    model = module_of({NAME: DENSE}, "mxfp4_moe")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"w13_bias must be absent for what .* holds, found shape \[2, 128\]"):
        load_experts(path, into=model)
    assert_unchanged(model, before)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "dim": ({"dim": "rows"}, "dim must be 'expert' or 'intermediate', or both, found 'rows'"),
    "rank": ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, found rank 2 of 2"),
    "negative rank": ({"rank": -1}, "rank must be from 0 to world_size - 1, found rank -1 of 1"),
    "experts": ({"world_size": 3}, f"{NAME}: 2 (expert) cannot be parted into 3 equal parts"),
    "blocks": (
        {"world_size": 4, "dim": "intermediate"},
        f"{NAME}: 64 (intermediate) cannot be parted into 4 parts of whole blocks of 32",
    ),
    "prefix": (
        {"prefix": "model.layers.4."},
        "no tensor of PATH that begins with 'model.layers.4.' is named as MXFP4 experts are in 'gpt-oss', 'quark', "
        "'compressed-tensors', 'deepseek', 'shuffled_tensor'",
    ),
    "format": ({"format": "gpt-oss"}, "no tensor of PATH is named as in format 'gpt-oss'"),
}


@pytest.mark.parametrize(("options", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    assert_refused(path, message, **options)


# --- a disk that fails in the middle


class Disk(io.FileIO):
    """Fails after some bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 100, 5_000, "until fsync"])
@pytest.mark.parametrize("layout", ["canonical", "as_is"])
def test_no_space_left(tmp_path: Path, room: int | str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there under that name is still there, and nothing else."""
    path = tmp_path / "own.safetensors"
    model = own_file(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if isinstance(room, str):

            def fsync(descriptor: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, "fsync", fsync)
        else:
            patch.setattr(Disk, "room", room)
            patch.setattr(writer, "open", lambda path, mode: io.BufferedRandom(Disk(path, "w+")), raising=False)
        for target in (path, tmp_path / "new.safetensors"):
            with pytest.raises(OSError, match="No space left on device"):
                save_file(model.state_dict(), target, layout=layout)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        save_file(model.state_dict(), tmp_path / "absent" / "own.safetensors")


def test_saving_is_interrupted(tmp_path: Path) -> None:
    class Interrupting(Tensor):
        def cpu(self) -> Tensor:  # type: ignore[override]
            raise KeyboardInterrupt

    tensors = {"a": torch.zeros(3), "b": torch.zeros(3).as_subclass(Interrupting)}
    with pytest.raises(KeyboardInterrupt):
        save_file(tensors, tmp_path / "own.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_is_interrupted_when_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*paths: Any) -> None:
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_file({"a": torch.ones(3)}, tmp_path / "own.safetensors")
    assert torch.equal(load_file(tmp_path / "own.safetensors")["a"], torch.ones(3))


def assert_half_loaded(model: nn.Module, kind: str = "mxfp4_moe") -> None:
    """A weight that was begun refuses; one that was not is as it was, and one that was finished is new."""
    layer = model.get_submodule(NAME)
    with pytest.raises(RuntimeError, match="this weight cannot be used: writing to it was interrupted"):
        layer.w2_weight.dequantize()
    assert_holds(layer.w13_weight, DENSE.w13, kind)


def test_a_file_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    raw = path.read_bytes()
    model = module_of({NAME: DENSE}, "mxfp4_moe", bias=False)
    plain_read = Files.read

    def shrinking(self: Files, name: str, *index: int | slice, **into: Tensor) -> Tensor:
        if "1.down_proj.weight" in name:
            os.truncate(path, len(raw) // 2)
        return plain_read(self, name, *index, **into)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", shrinking)
        with pytest.raises(
            CheckpointError, match="1.down_proj.weight in .* cannot be read: the file has become shorter"
        ):
            load_experts(path, into=model)
    assert_half_loaded(model)
    path.write_bytes(raw)
    load_experts(path, into=model)
    assert_holds(model.get_submodule(NAME).w2_weight, DENSE.w2, "mxfp4_moe")


@pytest.mark.parametrize("kind", ["none", "mxfp4_moe"])
def test_a_disk_that_cannot_be_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    model = module_of({NAME: DENSE}, kind, bias=False)
    reads, preadv = 0, os.preadv

    def failing(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        if reads > 10:  # a w13 of two experts is eight: gate and up, codes and scales; one expert of w2 is two
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match="down_proj.weight.* in .* cannot be read: .*Input/output error"):
        load_experts(path, into=model)
    assert_half_loaded(model, kind)


def test_a_kernel_that_reads_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads 2 GiB at most, and a network's disk what it has."""
    path, preadv = tmp_path / "model.safetensors", os.preadv
    plain_save_file(quark(), path)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:999]], offset))
    loaded = load_experts(path)[NAME]
    assert_holds(loaded.w13, DENSE.w13, "none")  # type: ignore[arg-type]
    assert_holds(loaded.w2, DENSE.w2, "none")  # type: ignore[arg-type]


def test_biases_of_two_dtypes(tmp_path: Path) -> None:
    """What is read raw is of one dtype; the bytes of another one would be garbage, or another tensor's."""
    path = tmp_path / "model.safetensors"
    biases = {
        f"{NAME}.{expert}.down_proj.bias": torch.ones(64, dtype=dtype)
        for expert, dtype in enumerate((torch.bfloat16, torch.float32))
    }
    plain_save_file(quark() | biases, path)
    with pytest.raises(CheckpointError, match=r"1\.down_proj\.bias in .* is torch\.float32, not torch\.bfloat16"):
        load_experts(path)


def test_targets_that_cannot_hold_the_values(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    biases = {f"{NAME}.{expert}.down_proj.bias": torch.ones(64) for expert in range(2)}
    plain_save_file(quark() | biases, path)
    for bias, message in (
        (torch.ones(2, 64, dtype=torch.int8), "must be floating point, found torch.int8"),
        (torch.ones(2, 64, device="meta"), "is on the meta device"),
    ):
        model = module_of({NAME: DENSE}, bias=False)
        model.get_submodule(NAME).w2_bias = nn.Parameter(bias, requires_grad=False)
        before = snapshot(nn.ParameterList([model.get_submodule(NAME).w13_weight]))
        with pytest.raises(ValueError, match=f"w2_bias {message}"):
            load_experts(path, into=model)
        assert_unchanged(nn.ParameterList([model.get_submodule(NAME).w13_weight]), before)
    with torch.inference_mode():
        model.get_submodule(NAME).w2_bias = nn.Parameter(torch.zeros(2, 64), requires_grad=False)
    load_experts(path, into=model)
    assert torch.equal(model.get_submodule(NAME).w2_bias, torch.ones(2, 64))


def test_pads_after_a_refit_that_was_abandoned(tmp_path: Path) -> None:
    """Loading makes the weight usable again, so its pads must be what they are defined to be."""
    path = tmp_path / "model.safetensors"
    plain_save_file(quark(), path)
    for kind in ("none", "mxfp4_moe"):
        model = module_of({NAME: DENSE}, kind, bias=False)
        weight = model.get_submodule(NAME).w2_weight

        def scribble(model: nn.Module = model, weight: Any = weight) -> None:
            with refit(model):
                weight.qdata.fill_(0xEE)
                weight.scale.fill_(200)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            scribble()
        load_experts(path, into=model)
        assert_holds(weight, DENSE.w2, kind)  # with its pads


# --- save_file's own arguments


def test_a_conjugate_view_is_saved_as_its_values(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    save_file({"c": values.conj()}, tmp_path / "c.safetensors")
    assert torch.equal(load_file(tmp_path / "c.safetensors")["c"], values.conj().resolve_conj())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    weight, path = weight_of(DENSE.w13), tmp_path / "own.safetensors"
    for tensors, options, message in (
        ({"w": weight}, {"layout": "shuffled"}, "layout must be 'canonical' or 'as_is', found 'shuffled'"),
        ({"w": weight, "w.scale": torch.zeros(1)}, {}, "a tensor cannot be called 'w.scale', which is taken"),
        ({"__metadata__": torch.zeros(1)}, {}, "a tensor cannot be called '__metadata__', which is taken"),
        ({"w": torch.zeros(1, dtype=torch.complex128)}, {}, "'w' is torch.complex128, which safetensors files do not hold"),
        ({"w": weight[:0]}, {}, "'w' has no experts or rows, found shape [0, 128, 64]"),
        ({"w": torch.zeros(1)}, {"metadata": {"step": 3}}, "metadata is text by names, found {'step': 3}"),
        ({"w": torch.zeros(1)}, {"metadata": {"shuffled_tensor": "{}"}}, "metadata['shuffled_tensor'] is the manifest's place"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            save_file(tensors, path, **options)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


# --- 500 files


def test_fuzz(tmp_path: Path) -> None:
    """In a process of its own, which a crash would end; and nothing is executed that comes from a file."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-X",
        "faulthandler",
        "-m",
        "tests.support.fuzz_checkpoints",
        str(tmp_path),
        "500",
    ]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout)
    assert outcome["loaded"] + outcome["refused"] == 500
    assert min(outcome.values()) > 150


@pytest.mark.parametrize(
    ("first", "found"),
    [
        (b"GGUF\x03\0\0\0", "is a GGUF file, of llama.cpp: load the safetensors that it was made of"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, and no file: run `git lfs pull`"),
        (b"PK\x03\x04\0\0", "is a file of torch.save, or another archive: load it with torch.load"),
        (pickle.dumps(os.getcwd), "is a pickle: load it with torch.load"),
        (b"<!DOCTYPE html>", "is a web page: the download has failed"),
        (b"\0" * 20, "is no whole safetensors file: "),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, first: bytes, found: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(first)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {found}")):
        load_experts(path)


def test_an_index_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="is the index of a checkpoint: give the directory that it is in"):
        load_experts(path)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="`hf download openai/gpt-oss-20b` prints the directory to give"):
        load_experts("openai/gpt-oss-20b")
    with pytest.raises(FileNotFoundError, match=r"no such file: missing/model.safetensors$"):
        load_experts("missing/model.safetensors")


@pytest.mark.parametrize("filled", [-1, 0, 5, 2 * 32 + 5, 3 * 32])
def test_rows_of_which_the_kernel_fills_some(filled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt, or a network's disk: what is missing is read row by row."""
    path, preadv, asked = tmp_path / "model.safetensors", source._LIBC.preadv, []
    plain_save_file(in_format("gpt-oss", DENSE, NAME), path)

    class Some:
        def preadv(self, file: int, vectors: int, count: int, offset: int) -> int:
            asked.append(count)
            whole_rows = max(filled, 0) // (ctypes.c_int64 * 2).from_address(vectors)[1]
            if whole_rows:
                preadv(file, vectors, whole_rows, offset)
            return filled

    monkeypatch.setattr(source, "_LIBC", Some())
    loaded = load_experts(path, prefix=NAME)[NAME]
    assert asked == 2 * 2 * [128]  # codes and scales of two experts, whose rows are of 32 bytes and of two
    assert_holds(loaded.w2, DENSE.w2, "none")  # type: ignore[arg-type]
    assert torch.equal(loaded.w13.dequantize(torch.float64), dense(*DENSE.w13))
