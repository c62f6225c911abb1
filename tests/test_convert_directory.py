# SPDX-License-Identifier: MIT
"""Converting a directory: a directory that whatever read the source still reads, and whose experts can be compared."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor

from shuffled_tensor import CheckpointError, ShuffledMXFP4Tensor, convert, inspect, load_experts, load_file, save_file
from shuffled_tensor.checkpoint import conversion, shards
from shuffled_tensor.checkpoint.source import Files
from shuffled_tensor.cli import main

from .support.bytes import weight_of
from .support.checkpoints import in_format, layer_name, make_dense, others, store, write_sharded
from .support.damage import flip, flip_when_read
from .support.judges import dense

LAYERS = {layer_name("quark", layer): make_dense(4, 96, 64, salt=layer) for layer in (3, 10)}
SHARDS = 3
RECORD = "shuffled_tensor.json"


def model() -> dict[str, Tensor]:
    tensors = {}
    for name, layer in LAYERS.items():
        tensors |= in_format("quark", layer, name)
    return tensors | others()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Of shards, an expert's tensors in several, and what is beside them in a repository."""
    folder = tmp_path / "source"
    write_sharded(model(), folder, SHARDS, index=True)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    (folder / ".gitattributes").write_text("")
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("")
    return folder


def plain(folder: Path) -> dict[str, Tensor]:
    """Everything by safetensors alone."""
    return {name: data for file in sorted(folder.glob("*.safetensors")) for name, data in load_plain(file).items()}


def checksums(path: Path) -> dict[str, str]:
    return {finding.name: finding.checksum for finding in inspect(path, read=True)}


def assert_is_the_model(folder: Path) -> None:
    loaded = load_experts(folder)
    assert loaded.keys() == LAYERS.keys()
    for name, layer in LAYERS.items():
        assert torch.equal(loaded[name].w13.dequantize(torch.float64), dense(*layer.w13))
        assert torch.equal(loaded[name].w2.dequantize(torch.float64), dense(*layer.w2))


def test_names_and_bytes_are_kept(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted = tmp_path / "converted"
    assert main(["convert", str(source), str(converted)]) == 0
    assert re.search(r"\nwrote 4 weights, .* to .*converted in .* s\n$", capsys.readouterr().err)
    shard_names = [f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors" for shard in range(SHARDS)]
    beside = ["config.json", "model.safetensors.index.json", RECORD, "tokenizer.json"]
    assert sorted(path.name for path in converted.iterdir()) == sorted([*shard_names, *beside])
    for name in shard_names:
        found, expected = load_plain(converted / name), load_plain(source / name)
        assert found.keys() == expected.keys()
        assert all(found[key].dtype == data.dtype and torch.equal(found[key], data) for key, data in expected.items())
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert_is_the_model(converted)
    assert checksums(converted) == checksums(source)
    assert all(finding.recorded for finding in inspect(converted))
    assert main(["verify", str(source)]) == 3
    assert main(["verify", str(converted)]) == 0
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_beside_says_every_experts_checksum(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "converted")
    told = json.loads((tmp_path / "converted" / RECORD).read_text())
    assert told["version"] == 1
    for name, layer in LAYERS.items():
        for which, parts in (("w13", layer.w13), ("w2", layer.w2)):
            weight = weight_of(parts, gate_up=which == "w13")
            own = [weight[expert].logical_checksum()[:16] for expert in range(4)]
            expected = {"checksum": weight.logical_checksum(), "experts": own, "row_order": None}
            assert told["weights"][f"{name}.{which}_weight"] == expected
    assert len(told["weights"]) == 4


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe", "mxfp4_separated"])
def test_a_rank_compares_the_experts_that_it_reads(layout: str, source: Path, tmp_path: Path) -> None:
    """Also where it goes into parameters, none of which has changed then."""
    converted, name = tmp_path / "converted", layer_name("quark", 10)
    convert(source, converted, layout=layout)
    if layout == "canonical":
        flip(converted, f"{name}.0.up_proj.weight")
    else:
        flip(converted, f"{name}.w13_weight.qdata")  # the first byte of expert 0
    message = rf"{re.escape(name)}.w13_weight in .* is damaged: expert 0 has checksum"
    with pytest.raises(CheckpointError, match=message):
        load_experts(converted, rank=0, world_size=4)
    module = torch.nn.Module()
    owner: Any = module
    for step in name.split("."):
        owner.add_module(step, torch.nn.Module())
        owner = owner.get_submodule(step)
    whole = load_experts(source, prefix=f"{name}.", rank=0, world_size=4)[name]
    owner.w13_weight, owner.w2_weight = torch.nn.Parameter(whole.w13.zero_()), torch.nn.Parameter(whole.w2.zero_())
    with pytest.raises(CheckpointError, match=message):
        load_experts(converted, prefix=f"{name}.", rank=0, world_size=4, into=module)
    assert not owner.w13_weight.dequantize().any()
    assert not owner.w2_weight.dequantize().any()
    for rank in range(1, 4):
        loaded = load_experts(converted, rank=rank, world_size=4)[name]
        assert torch.equal(loaded.w13.dequantize(torch.float64), dense(*LAYERS[name].w13)[rank : rank + 1])
    with pytest.raises(CheckpointError, match="is damaged: its values have checksum"):
        load_experts(converted)
    (problem,) = (problem for finding in inspect(converted, read=True) for problem in finding.problems)
    assert problem.startswith("damaged in experts 0: it was written with checksum ")
    assert main(["verify", str(converted)]) == 1


def test_a_single_file_says_every_experts_checksum(tmp_path: Path) -> None:
    path, weight = tmp_path / "own.safetensors", weight_of(LAYERS[layer_name("quark")].w13)
    save_file({"w13_weight": weight, "one": weight[1].clone()}, path)
    with Files(path) as files:
        told = json.loads(files.metadata(path)["shuffled_tensor"])["tensors"]
    assert told["w13_weight"]["experts"] == [weight[expert].logical_checksum()[:16] for expert in range(4)]
    assert told["one"]["experts"] == [weight[1].logical_checksum()[:16]]
    flip(tmp_path, "one.scale")
    with pytest.raises(CheckpointError, match="one in .* is damaged"):
        load_file(path)


@pytest.mark.parametrize("layout", ["mxfp4_moe", "mxfp4_separated"])
def test_in_a_kernels_layout(layout: str, source: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    convert(source, converted, layout=layout)
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in converted.glob("*.safetensors") for name in load_plain(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(data.nbytes for data in plain(converted).values())
    assert (converted / "config.json").exists()
    assert not (converted / RECORD).exists()
    assert all(torch.equal(plain(converted)[name], data) for name, data in others().items())
    assert_is_the_model(converted)
    assert {loaded.w13.shuffle_kind for loaded in load_experts(converted).values()} == {layout}
    assert checksums(converted) == checksums(source)
    assert main(["verify", str(converted)]) == 0
    back = tmp_path / "back"
    convert(converted, back)  # row-major, under our names
    assert_is_the_model(back)
    assert checksums(back) == checksums(source)
    again = tmp_path / "again"
    convert(back, again)  # which keeps names and bytes
    assert plain(again).keys() == plain(back).keys()
    assert_is_the_model(again)
    assert main(["verify", str(again)]) == 0


def test_a_directory_in_one_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a directory becomes a directory, and .*one.safetensors is a file's name"):
        convert(source, tmp_path / "one.safetensors")
    assert main(["convert", str(source), str(tmp_path / "one.safetensors"), "--single-file"]) == 0
    assert_is_the_model(tmp_path / "one.safetensors")
    assert checksums(tmp_path / "one.safetensors") == checksums(source)


def test_a_directory_of_one_shard_has_no_index(tmp_path: Path) -> None:
    source = store(model(), tmp_path, "folder")
    convert(source, tmp_path / "converted", layout="mxfp4_moe")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["model-00001-of-00001.safetensors"]
    assert_is_the_model(tmp_path / "converted")


def test_an_order_of_rows_that_was_told_is_kept(tmp_path: Path) -> None:
    name, layer = "model.layers.3.mlp.experts", LAYERS[layer_name("quark")]
    (tmp_path / "source").mkdir()
    tensors = {}
    for projection, parts in (("gate_up_proj", layer.w13), ("down_proj", layer.w2)):
        for suffix, data in zip(("weight", "weight_scale"), parts, strict=True):
            tensors[f"{name}.{projection}.{suffix}"] = data
    save_plain(tensors, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "converted", row_order="contiguous")
    found = load_experts(tmp_path / "converted")[name]
    assert torch.equal(found.w13.dequantize(torch.float64), dense(*layer.w13))
    assert main(["verify", str(tmp_path / "converted")]) == 0


# --- on the way


class _Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("second", ["canonical", "mxfp4_moe"])
def test_another_run_goes_on(second: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are whole are not written again, but for another layout or of a source that has changed."""
    converted, written = tmp_path / "converted", []
    write = shards.write_file

    def counted(path: Path, *args: Any, **kwargs: Any) -> None:
        if len(written) == 2:
            raise _Stop
        write(path, *args, **kwargs)
        written.append(path.name)

    monkeypatch.setattr(shards, "write_file", counted)
    with pytest.raises(_Stop):
        convert(source, converted)
    assert not converted.exists()
    first, written[:] = list(written), []
    monkeypatch.setattr(
        shards, "write_file", lambda path, *args, **kwargs: (written.append(path.name), write(path, *args, **kwargs))
    )
    convert(source, converted, layout=second)
    assert len(first) == 2
    assert len(written) == (1 if second == "canonical" else SHARDS)
    assert_is_the_model(converted)
    assert checksums(converted) == checksums(source)
    assert not list(tmp_path.glob("*.partial"))


def test_a_source_that_has_changed_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = tmp_path / "converted"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_copy_what_is_beside", lambda *_, **__: (_ for _ in ()).throw(_Stop))
        with pytest.raises(_Stop):
            convert(source, converted)
    assert (tmp_path / "converted.partial").is_dir()
    changed = sorted(source.glob("*.safetensors"))[0]
    tensors = load_plain(changed)
    name = next(
        name for name in tensors if "layernorm" in name or "embed" in name or "lm_head" in name or "gate.weight" in name
    )
    tensors[name] = tensors[name] + 1
    save_plain(tensors, changed)
    convert(source, converted)
    assert torch.equal(plain(converted)[name], tensors[name])


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe"])
@pytest.mark.parametrize("name", ["lm_head.weight", f"{layer_name('quark')}.1.up_proj.weight"])
def test_damage_on_the_way(
    name: str, layout: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips in memory, once, between two reads of the source; nothing is left."""
    flip_when_read(name, monkeypatch)
    with pytest.raises(CheckpointError, match="damaged"):
        convert(source, tmp_path / "converted", layout=layout)
    assert not (tmp_path / "converted").exists()
    convert(source, tmp_path / "converted", layout=layout)
    assert_is_the_model(tmp_path / "converted")


def test_two_runs_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, tried = shards.write_file, []

    def another(*args: Any, **kwargs: Any) -> None:
        if not tried:
            tried.append(args[0])
            with pytest.raises(BlockingIOError, match="another run is writing .*partial"):
                convert(source, tmp_path / "converted", layout="mxfp4_moe")
        write(*args, **kwargs)

    monkeypatch.setattr(shards, "write_file", another)
    convert(source, tmp_path / "converted")
    assert tried
    assert_is_the_model(tmp_path / "converted")


def test_another_run_while_the_directory_gets_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def another(here: Path, there: Path) -> None:
        if Path(there).name == "converted":
            with pytest.raises(BlockingIOError, match="another run is writing .*partial"):
                convert(source, tmp_path / "converted", layout="mxfp4_moe")
        replace(here, there)

    monkeypatch.setattr(os, "replace", another)
    convert(source, tmp_path / "converted")
    assert_is_the_model(tmp_path / "converted")
    assert not (tmp_path / "converted" / ".begun").exists()


def test_what_is_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it, or give another name"):
        convert(source, tmp_path / "converted")
    (tmp_path / "other.partial").write_text("somebody's")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "other")
    assert (tmp_path / "other.partial").read_text() == "somebody's"


# --- what is beside the shards


def change(folder: Path, edit: Any, seal: bool = True) -> None:
    path = folder / RECORD
    told = json.loads(path.read_text())
    edit(told)
    if seal:
        from shuffled_tensor.checkpoint.manifest import _seal

        told["seal"] = _seal(told["weights"])
    path.write_text(json.dumps(told))


WEIGHT = f"{layer_name('quark')}.w2_weight"
LIES: dict[str, tuple[Any, bool, str]] = {
    "no JSON": (None, False, r"shuffled_tensor.json cannot be read"),
    "another version": (lambda told: told.update(version=2), True, "format version 2, and this build knows 1"),
    "changed": (lambda told: told["weights"][WEIGHT].update(checksum="0" * 64), False, "its seal does not fit"),
    "another checksum": (lambda told: told["weights"][WEIGHT].update(checksum="0" * 64), True, r"is damaged: its values have checksum .*, shuffled_tensor.json says 0{12}"),
    "no checksum": (lambda told: told["weights"][WEIGHT].pop("checksum"), True, "something impossible of .*w2_weight: 'checksum'"),
    "an expert's checksum too short": (lambda told: told["weights"][WEIGHT]["experts"].append("0"), True, "something impossible of .*: checksum '0'"),
    "experts that are none": (lambda told: told["weights"][WEIGHT].update(experts=7), True, "something impossible"),
    "an expert too many": (lambda told: told["weights"][WEIGHT]["experts"].append("0" * 16), True, "is of 4 experts, and 5 have checksums"),
    "an unknown order": (lambda told: told["weights"][WEIGHT].update(row_order="mixed"), True, "row_order 'mixed'"),
    "more than is known": (lambda told: told["weights"][WEIGHT].update(more=1), True, "unknown keys more; use a newer"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "seal", "message"), LIES.values(), ids=LIES)
def test_a_record_that_lies(edit: Any, seal: bool, message: str, source: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    convert(source, converted)
    if edit is None:
        (converted / RECORD).write_bytes(b"\xff{")
    else:
        change(converted, edit, seal)
    with pytest.raises(CheckpointError, match=message):
        load_experts(converted)
    assert main(["verify", str(converted)]) == 1


def test_a_weight_of_another_model_in_a_converted_directory(source: Path, tmp_path: Path) -> None:
    converted, name = tmp_path / "converted", layer_name("quark")
    convert(source, converted)
    shard = next(path for path in converted.glob("*.safetensors") if f"{name}.2.down_proj.weight" in load_plain(path))
    tensors = load_plain(shard)
    tensors[f"{name}.2.down_proj.weight"] ^= 17
    save_plain(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{name}.w2_weight in .*converted is damaged"):
        load_experts(converted)
    (converted / RECORD).unlink()  # and whoever knows better removes it
    assert isinstance(load_experts(converted)[name].w2, ShuffledMXFP4Tensor)


# --- what must not be lost


def test_the_source_is_not_where_it_would_be_written(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "model.partial"
    source.rename(partial)
    before = {path.name: path.read_bytes() for path in partial.glob("*.*")}
    with pytest.raises(ValueError, match="is where .*model would be written first, and the source; rename it"):
        convert(partial, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in partial.glob("*.*")} == before
    one = tmp_path / "one.safetensors.partial"
    save_plain(model(), one)
    with pytest.raises(ValueError, match="and the source; rename it"):
        convert(one, tmp_path / "one.safetensors")
    assert_is_the_model(one)
    with pytest.raises(ValueError, match="would be a shard of the source"):
        convert(partial, partial / "one.safetensors", single_file=True)


def test_somebody_elses_directory_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "converted.partial" / "more").mkdir(parents=True)
    (tmp_path / "converted.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"converted.partial, which is to be written, is there, and not of a conver"
    ):
        convert(source, tmp_path / "converted")
    assert sorted(path.name for path in (tmp_path / "converted.partial").iterdir()) == ["more", "thesis.txt"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="dangling exists"):
        convert(source, tmp_path / "dangling")


def stopped(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A conversion that has written all shards, and what it left."""
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_copy_what_is_beside", lambda *_, **__: (_ for _ in ()).throw(_Stop))
        with pytest.raises(_Stop):
            convert(source, destination, **options)
    return destination.with_name(f"{destination.name}.partial")


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe"])
def test_a_shard_that_was_damaged_between_two_runs(
    layout: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(stopped(source, tmp_path / "converted", monkeypatch, layout=layout), "lm_head.weight")
    with pytest.raises(CheckpointError, match="lm_head.weight was damaged while it was written"):
        convert(source, tmp_path / "converted", layout=layout)
    convert(source, tmp_path / "converted", layout=layout)
    assert torch.equal(plain(tmp_path / "converted")["lm_head.weight"], others()["lm_head.weight"])
    assert not (tmp_path / "converted" / ".begun").exists()


def test_another_source_of_the_same_names_sizes_and_times(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of a model, out of one kind of archive."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for shard in sorted(other.glob("*.safetensors")):
        flip(other, next(name for name in load_plain(shard) if name in others()))
        os.utime(shard, ns=(0, 0))
        os.utime(source / shard.name, ns=(0, 0))
    stopped(source, tmp_path / "converted", monkeypatch, layout="mxfp4_moe")
    convert(other, tmp_path / "converted", layout="mxfp4_moe")
    found, expected = plain(tmp_path / "converted"), plain(other)
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in others())


def test_a_weight_that_the_record_names_and_nobody_has(source: Path, tmp_path: Path) -> None:
    converted, name = tmp_path / "converted", layer_name("quark", 10)
    convert(source, converted)
    (converted / "model.safetensors.index.json").unlink()
    for shard in converted.glob("*.safetensors"):
        save_plain({key: data for key, data in load_plain(shard).items() if not key.startswith(name)}, shard)
    message = rf"{re.escape(name)}.w13_weight, of which shuffled_tensor.json in .* has a checksum, is not there"
    with pytest.raises(CheckpointError, match=message.replace("w13", "w2")):
        load_experts(converted)
    assert main(["verify", str(converted)]) == 1
    assert load_experts(converted, prefix=f"{layer_name('quark')}.").keys() == {layer_name("quark")}


def test_an_order_of_rows_that_the_record_contradicts(tmp_path: Path) -> None:
    name, layer = "model.layers.3.mlp.experts", LAYERS[layer_name("quark")]
    (tmp_path / "source").mkdir()
    tensors = {
        f"{name}.{projection}.{suffix}": data
        for projection, parts in (("gate_up_proj", layer.w13), ("down_proj", layer.w2))
        for suffix, data in zip(("weight", "weight_scale"), parts, strict=True)
    }
    save_plain(tensors, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "converted", row_order="contiguous")
    with pytest.raises(
        ValueError, match=r"shuffled_tensor.json says that rows of .*w13_weight are contiguous, not inter"
    ):
        load_experts(tmp_path / "converted", row_order="interleaved", rank=0, world_size=2, dim="intermediate")


def test_what_is_left_out_is_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(source, tmp_path / "converted")
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"left out what is beside the shards of {source}: original, pytorch_model.bin"
    ]
