# SPDX-License-Identifier: MIT
"""Converting a checkpoint: the same values in another layout, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor

from shuffled_tensor import CheckpointError, convert, load_experts, load_file, save_file
from shuffled_tensor.checkpoint import writer
from shuffled_tensor.checkpoint.shards import Shard
from shuffled_tensor.checkpoint.source import Files, memory_of

from .support.bytes import coded, moderate_scales
from .support.damage import flip, flip_when_read
from .support.judges import by_formula, dense
from .support.layer import EXPERTS, HIDDEN, INTERMEDIATE, make_weight, weight_parts

LAYOUTS = ("canonical", "mxfp4_moe", "mxfp4_separated")
LAYER = "model.layers.3.mlp"


def quark() -> dict[str, Tensor]:
    """A checkpoint with everything: experts, biases, shared experts that are not quantised, and other weights."""
    tensors: dict[str, Tensor] = {
        "lm_head.weight": coded(6, 32).view(torch.bfloat16),
        "model.step": torch.tensor(7),
        f"{LAYER}.gate.weight": coded(EXPERTS, 64).view(torch.float32),
    }
    for which, projections in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        for part, data in zip(("weight", "weight_scale"), weight_parts(which), strict=True):
            for expert, rows in enumerate(data):
                for name, own in zip(projections, rows.chunk(len(projections)), strict=True):
                    tensors[f"{LAYER}.experts.{expert}.{name}.{part}"] = own.clone()
    for name, shape in (
        ("gate_proj", (INTERMEDIATE, HIDDEN)),
        ("up_proj", (INTERMEDIATE, HIDDEN)),
        ("down_proj", (HIDDEN, INTERMEDIATE)),
    ):
        tensors[f"{LAYER}.shared_experts.{name}.weight"] = torch.randn(
            shape, generator=torch.Generator().manual_seed(1)
        ).bfloat16()
    return tensors


def padded(part: str, data: Tensor, which: str) -> Tensor:
    """Gate and up rows, and columns, padded to multiples of 256."""
    width, fill = (128, 0) if part == "qdata" else (8, 127)
    halves = data.unflatten(1, (2 if which == "w13" else 1, -1))
    rows, columns = halves.shape[2:]
    return F.pad(halves, (0, -columns % width, 0, -rows % 256), value=fill).flatten(1, 2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_plain(quark(), path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written(layout: str, source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "converted.safetensors"
    convert(source, destination, layout=layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted.safetensors", "source.safetensors"]

    plain, written = quark(), load_plain(destination)  # other tools can read it
    for name in ("lm_head.weight", "model.step", f"{LAYER}.gate.weight"):
        assert torch.equal(written[name].flatten().view(torch.uint8), plain[name].flatten().view(torch.uint8))
    gate, up = (plain[f"{LAYER}.shared_experts.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(written[f"{LAYER}.shared_experts.w13_weight"][0], torch.cat([gate, up]))

    for which in ("w13", "w2"):
        parts = weight_parts(which)
        for part, data in zip(("qdata", "scale"), parts, strict=True):
            stored = written[f"{LAYER}.experts.{which}_weight.{part}"]
            if layout == "canonical":
                assert torch.equal(stored, data)
            else:
                assert torch.equal(
                    stored,
                    by_formula(
                        {"qdata": "weight", "scale": "scale"}[part], padded(part, data, which), layout, which == "w13"
                    ),
                )
        loaded = load_file(destination)[f"{LAYER}.experts.{which}_weight"]
        assert loaded.shuffle_kind == (None if layout == "canonical" else layout)
        assert torch.equal(loaded.dequantize(torch.float64), dense(*parts))
    layers = load_experts(destination)
    assert list(layers) == [f"{LAYER}.experts", f"{LAYER}.shared_experts"]
    assert torch.equal(layers[f"{LAYER}.experts"].w2.dequantize(torch.float64), dense(*weight_parts("w2")))
    assert torch.equal(layers[f"{LAYER}.shared_experts"].w13[0], torch.cat([gate, up]))


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_from_one_layout_to_another(first: str, second: str, source: Path, tmp_path: Path) -> None:
    direct, between, after = (tmp_path / f"{name}.safetensors" for name in ("direct", "between", "after"))
    convert(source, direct, layout=second)
    convert(source, between, layout=first)
    convert(between, after, layout=second)
    assert after.read_bytes() == direct.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_files_keep_what_they_say(layout: str, tmp_path: Path) -> None:
    """The kinds that weights were made for, weights that are no layer's, biases, and metadata of others."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    tensors = {
        "w13_weight": make_weight("w13", kind="mxfp4_moe"),
        "w2_weight": make_weight("w2"),
        "extra": make_weight("w2")[1].clone(),
        "w2_bias": torch.ones(EXPERTS, HIDDEN),
    }
    save_file(tensors, first, {"mine": "kept"}, layout="as_is")
    convert(first, second, layout=layout)
    loaded = load_file(second)
    assert sorted(loaded) == sorted(tensors)
    assert loaded["w13_weight"]._storage.requested_layout.name == "mxfp4_moe"
    assert loaded["w2_weight"]._storage.requested_layout is None
    for name, which in (("w13_weight", "w13"), ("w2_weight", "w2")):
        assert torch.equal(loaded[name].dequantize(torch.float64), dense(*weight_parts(which)))
    assert torch.equal(loaded["extra"].dequantize(torch.float64), dense(*weight_parts("w2"))[1])
    assert torch.equal(loaded["w2_bias"], tensors["w2_bias"])
    with Files(second) as files_:
        assert files_.metadata(second)["mine"] == "kept"


def test_two_runs_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused, also where the first has just given the file its name."""
    destination = tmp_path / "converted.safetensors"
    read, tried = Files.read, []

    def another(self: Files, name: str, *index: Any, **into: Tensor) -> Tensor:
        if not tried:
            tried.append(name)
            with pytest.raises(BlockingIOError, match="another run is writing .*partial"):
                convert(source, destination)
        return read(self, name, *index, **into)

    monkeypatch.setattr(Files, "read", another)
    convert(source, destination)
    assert tried
    destination.unlink()
    replace, named = os.replace, []

    def while_it_gets_its_name(*paths: Path) -> None:
        with pytest.raises(BlockingIOError, match="another run is writing .*partial"):
            save_file({"w": torch.ones(2)}, destination)  # which would begin anew, and remove what it could not finish
        named.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", while_it_gets_its_name)
    convert(source, destination)
    assert named
    assert sorted(load_file(destination)) == sorted(
        [
            "lm_head.weight",
            "model.step",
            f"{LAYER}.gate.weight",
            *(f"{LAYER}.{layer}.{which}_weight" for layer in ("experts", "shared_experts") for which in ("w13", "w2")),
        ]
    )
    partial = tmp_path / "late.safetensors.partial"
    partial.write_bytes(b"")
    with open(partial, "r+b") as file:
        partial.rename(tmp_path / "late.safetensors")
        with pytest.raises(BlockingIOError, match="or just has"):
            writer.lock(file, partial)


def test_another_source_of_the_same_shapes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun from one is not taken for the other, also where only a tensor that comes along differs."""
    other, destination = tmp_path / "other.safetensors", tmp_path / "converted.safetensors"
    name = f"{LAYER}.input_scale"
    save_plain(quark() | {name: torch.ones(2)}, source)
    save_plain(quark() | {name: torch.zeros(2)}, other)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(
            Shard, "_compare", lambda shard, *_: {name: entry.checksums for name, (_, entry) in shard.weights.items()}
        )
        with pytest.raises(KeyboardInterrupt):
            convert(source, destination)
    with pytest.raises(CheckpointError, match=f"{name} was damaged while it was written"):
        convert(other, destination)
    convert(other, destination)
    assert torch.equal(load_plain(destination)[name], torch.zeros(2))


def test_what_is_refused_leaves_nothing(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "converted.safetensors"
    with pytest.raises(ValueError, match="unknown shuffle_kind 'gguu'"):
        convert(source, destination, layout="gguu")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "nothing.safetensors", destination)
    with pytest.raises(FileNotFoundError, match="no such folder to write to: .*absent"):
        convert(source, tmp_path / "absent" / "converted.safetensors")
    with pytest.raises(FileExistsError, match="exists; remove it, or give another name"):
        convert(source, source)
    clash = tmp_path / "clash.safetensors"
    save_plain({**quark(), f"{LAYER}.experts.w2_weight.scale": torch.zeros(2)}, clash)
    with pytest.raises(
        CheckpointError, match=r"experts\.w2_weight\.scale in .* is named as in no format that is known"
    ):
        convert(clash, destination)
    both = tmp_path / "both"
    both.mkdir()
    save_plain(quark(), both / "theirs.safetensors")
    save_file(
        {f"{LAYER}.experts.{which}_weight": make_weight(which) for which in ("w13", "w2")}, both / "own.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"w13_weight\.qdata in .*own.* is called what an expert weight would be"):
        convert(both, destination, format="quark", single_file=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "clash.safetensors", "source.safetensors"]


@pytest.mark.parametrize("name", ["lm_head.weight", f"{LAYER}.experts.1.up_proj.weight"])
def test_damage_on_the_way_is_found_when_it_is_read_back(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips in memory, once, between two reads of the source."""
    flip_when_read(name, monkeypatch)
    with pytest.raises(CheckpointError, match="damaged"):
        convert(source, tmp_path / "converted.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]
    convert(source, tmp_path / "converted.safetensors")


def test_a_source_that_is_not_what_its_manifest_says(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    convert(source, first, layout="mxfp4_moe")
    flip(first, f"{LAYER}.experts.w13_weight.qdata")
    with pytest.raises(CheckpointError, match=r"experts\.w13_weight of .*first.safetensors is damaged"):
        convert(first, second)
    assert not second.exists()


def test_no_space_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "converted.safetensors"

    class Full:
        """A file on a disk that is full after a while."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 100_000

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    monkeypatch.setattr(writer, "open", lambda *args: Full(open(*args)), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        convert(source, destination)
    assert not destination.exists()
    monkeypatch.undo()
    convert(source, destination)  # goes on with what is there
    whole = tmp_path / "whole.safetensors"
    convert(source, whole)
    assert destination.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("second", ["canonical", "mxfp4_moe"])
def test_another_run_goes_on_with_what_is_there(
    second: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is not written again, but for another layout."""
    reads, stop = 0, 0
    read = Files.read

    def counting(self: Files, name: str, *index: Any, **into: Tensor) -> Tensor:
        nonlocal reads
        reads += self.path == source
        if stop and reads == stop:
            raise KeyboardInterrupt
        return read(self, name, *index, **into)

    monkeypatch.setattr(Files, "read", counting)
    whole, destination = tmp_path / "whole.safetensors", tmp_path / "converted.safetensors"
    convert(source, whole, layout=second)
    needed, reads, stop = reads, 0, 15
    with pytest.raises(KeyboardInterrupt):
        convert(source, destination)
    assert not destination.exists()
    reads, stop = 0, 0
    convert(source, destination, layout=second)
    assert reads == needed if second == "mxfp4_moe" else needed - 15 <= reads < needed - 10
    assert destination.read_bytes() == whole.read_bytes()


def test_killed_at_20_moments(tmp_path: Path) -> None:
    """By the kernel, wherever it is; each time a second run ends with the file of an uninterrupted one."""
    hidden, intermediate, experts = 512, 512, 16
    tensors = {}
    for expert in range(experts):
        for name, rows, columns in (
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ):
            prefix = f"{LAYER}.experts.{expert}.{name}"
            tensors[f"{prefix}.weight"] = coded(rows, columns // 2, salt=expert)
            tensors[f"{prefix}.weight_scale"] = moderate_scales(rows, columns // 32, salt=expert)
    source, whole, destination = (tmp_path / f"{name}.safetensors" for name in ("source", "whole", "converted"))
    partial = tmp_path / "converted.safetensors.partial"
    save_plain(tensors, source)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shuffled_tensor.checkpoint"])

    def start(to: Path) -> Any:
        process = context.Process(target=convert, args=(source, to), kwargs={"layout": "mxfp4_moe"})
        process.start()
        return process

    start(tmp_path / "warm.safetensors").join()
    begin = time.monotonic()
    start(whole).join()
    duration = time.monotonic() - begin
    expected, moments, on_the_way = whole.read_bytes(), random.Random(0), 0
    for _ in range(20):
        process = start(destination)
        time.sleep(duration * moments.random())
        process.kill()
        process.join()
        on_the_way += partial.exists()
        if destination.exists():
            assert destination.read_bytes() == expected
        else:
            start(destination).join()
            assert destination.read_bytes() == expected
        assert not partial.exists()
        destination.unlink()
    assert on_the_way > 3


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe"])
def test_killed_inside_every_piece(layout: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the kernel cut short, at, before and after every border: all of the piece is written again, and none
    before it."""
    whole, destination = tmp_path / "whole.safetensors", tmp_path / "converted.safetensors"
    partial = tmp_path / "converted.safetensors.partial"
    convert(source, whole, layout=layout)
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "_compare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, destination, layout=layout)
    begun = partial.read_bytes()
    start = 8 + int.from_bytes(begun[:8], "little")
    header = json.loads(begun[8:start])
    borders = {place for name, entry in header.items() if name != "__metadata__" for place in entry["data_offsets"]}
    for name, entry in header.items():
        if name.endswith((".qdata", ".scale")):
            first, last = entry["data_offsets"]
            borders |= {first + expert * (last - first) // EXPERTS for expert in range(EXPERTS)}
    pieces: list[int] = []
    monkeypatch.setattr(writer, "memory_of", lambda data: pieces.append(data.nbytes) or memory_of(data))
    for cut in sorted({0, 5, start - 1, start} | {start + border + near for border in borders for near in (-1, 0, 1)}):
        if cut > len(begun):
            continue
        partial.write_bytes(begun[:cut])
        pieces.clear()
        convert(source, destination, layout=layout)
        assert destination.read_bytes() == whole.read_bytes(), cut
        done = max((border for border in borders if start + border <= cut), default=0)
        assert sum(pieces) == len(begun) - start - done, cut
        destination.unlink()
