# SPDX-License-Identifier: MIT
"""From one checkpoint to another, row-major or in the layout of a kernel: streamed, resumable, checked at the end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.names import FormatName, find_layers, manifest_weights
from shuffled_tensor.checkpoint.progress import progress
from shuffled_tensor.checkpoint.shards import Shard, as_they_are, under_our_names
from shuffled_tensor.checkpoint.source import INDEX, CheckpointError, Files
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.checkpoint.writer import lock, own_file
from shuffled_tensor.layouts import ROW_MAJOR, Layout, find_layout
from shuffled_tensor.mxfp4 import PARTS
from shuffled_tensor.tensor.geometry import RowOrder

__all__ = ["convert"]

_log = logging.getLogger("shuffled_tensor")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str = "canonical",
    format: FormatName = "auto",
    row_order: RowOrder | None = None,
    single_file: bool = False,
) -> None:
    """Write a checkpoint again, its experts with checksums that :func:`load_experts` compares, and in the layout that
    is wanted; all else comes along as it is.

    A directory becomes a directory of as many shards, with an index where there was one, and with the files beside them
    (configuration, tokenizer). Row-major experts keep their names and bytes there, for whatever read the source, and
    their checksums are in ``shuffled_tensor.json`` beside. A file becomes a file, and so does a directory with
    ``single_file``; in it, and in any other layout, experts are called as :func:`save_file` calls them, with a manifest
    in the header.

    One expert at a time is in memory. Until everything is written, and was read back and compared, it lies under
    ``destination + ".partial"``; a run that was killed is gone on with by another one like it.

    Args:
        source: a safetensors file or a directory of them, as :func:`load_experts` takes it.
        destination: the file or directory.
        layout: ``"canonical"`` for row-major bytes without padding, or the ``shuffle_kind`` that they shall lie in.
        format, row_order: of the source, as :func:`load_experts` takes them.
        single_file: write one file, whatever the source is.

    Raises:
        FileNotFoundError: there is no source, or no folder for the destination.
        FileExistsError: the destination exists.
        CheckpointError: the source is damaged, or what was written is not what was read; that file is removed then.
        ValueError: an unknown layout, format or row order; a directory that would get a file's name; a destination that
            would change the source.
        OSError: the destination cannot be written; another run goes on from there.
    """
    wanted = ROW_MAJOR if layout == "canonical" else find_layout(layout)
    destination, begun = Path(destination), time.perf_counter()
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists; remove it, or give another name")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"no such folder to write to: {destination.parent}")
    partial = destination.with_name(f"{destination.name}.partial")
    with Files(source) as files:
        if partial.exists() and partial.samefile(files.path):
            raise ValueError(f"{partial} is where {destination} would be written first, and the source; rename it")
        found = (weight for layer in find_layers(files, "", format, row_order).values() for weight in layer)
        weights = manifest_weights(files) | {weight.name: weight for weight in found}
        if single_file and files.path.is_dir() and destination.parent.samefile(files.path):
            raise ValueError(f"{destination} would be a shard of the source; give it another folder")
        if single_file or not files.path.is_dir():
            shards = under_our_names(files, weights.values(), wanted, lambda name: destination.name)
            with _bars(destination, shards) as (written, compared):
                shards[destination.name].write(destination, written, compared)
        elif destination.suffix == ".safetensors":
            raise ValueError(f"a directory becomes a directory, and {destination} is a file's name; see single_file")
        else:
            shards = _to_directory(files, weights, wanted, destination, partial)
        _log.info(
            "wrote %d weights, %.2f GiB with all else, to %s in %.1f s",
            len(weights),
            sum(shard.nbytes for shard in shards.values()) / 2**30,
            destination,
            time.perf_counter() - begun,
        )


_Told = Callable[[int], object]

_BEGUN = ".begun"
"""Beside the shards of a conversion that is under way: what it is made of."""

_OTHER_WEIGHTS = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


@contextmanager
def _bars(destination: Path, shards: Mapping[str, Shard]) -> Iterator[tuple[_Told, _Told]]:
    total = sum(shard.nbytes for shard in shards.values())
    with (
        progress(f"writing {destination.name}", total, "B") as written,
        progress(f"comparing {destination.name}", total, "B", position=1) as compared,
    ):
        yield written, compared


def _to_directory(
    files: Files, weights: dict[str, Weight], layout: Layout, destination: Path, partial: Path
) -> dict[str, Shard]:
    row_major = all(weight.entry is None or weight.entry.layout is ROW_MAJOR for weight in weights.values())
    kept = layout is ROW_MAJOR and row_major
    if kept:
        shards = as_they_are(files, weights.values())
    else:
        shards = under_our_names(files, weights.values(), layout, lambda name: files.file(name).name)
    if not os.path.lexists(partial):
        partial.mkdir()
    elif partial.is_symlink() or not partial.is_dir() or (any(partial.iterdir()) and not (partial / _BEGUN).exists()):
        raise FileExistsError(f"{partial}, which is to be written, is there, and not of a conversion; remove it")
    with open(own_file(partial / _BEGUN), "r+b") as begun, _bars(destination, shards) as (written, compared):
        lock(begun, partial / _BEGUN)
        source = _fingerprint(files, weights, layout)
        if begun.read() != source:  # what is there is of another source, or for another layout
            for path in partial.iterdir():
                if path.name != _BEGUN:
                    path.unlink()
            begun.seek(0)
            begun.truncate()
            begun.write(source)
            begun.flush()
        for name, shard in shards.items():
            if (partial / name).exists():
                written(shard.nbytes)
                shard.compare(partial / name, compared)
            else:
                shard.write(partial / name, written, compared)
        _copy_what_is_beside(files, partial, but={*shards}, index=kept)
        if kept:
            _write_beside(weights, partial, compared)
        elif len(shards) > 1:
            _write_index(shards, partial / f"model{INDEX}")
        os.replace(partial, destination)  # before it is no more a conversion's, so that no other run begins in it
        (destination / _BEGUN).unlink()
    return shards


def _fingerprint(files: Files, weights: dict[str, Weight], layout: Layout) -> bytes:
    """Of what a conversion is made of: another run goes on with what is there where it is the same."""
    of = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files.files()]
    found = [(weight.name, weight.row_order, weight.shape) for weight in weights.values()]
    return json.dumps([layout.name, of, found, list(files)]).encode()


def _copy_what_is_beside(files: Files, partial: Path, *, but: set[str], index: bool) -> None:
    """Configuration, tokenizer and the like."""
    left_out = []
    for path in sorted(files.path.iterdir()):
        made_anew = path.name == manifest.BESIDE or (path.name.endswith(INDEX) and not index)
        if path.name in but or path.name.startswith(".") or made_anew:
            continue
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS:
            shutil.copyfile(path, partial / path.name)
        else:
            left_out.append(path.name)
    if left_out:
        _log.warning("left out what is beside the shards of %s: %s", files.path, ", ".join(left_out))


def _write_beside(weights: dict[str, Weight], partial: Path, compared: _Told) -> None:
    """The checksums of experts that kept their names, after a look whether they are what was read."""
    told = {}
    with Files(partial) as files:
        for name, weight in weights.items():
            # the same tensors, elsewhere: they lie as in the source
            found = replace(weight, files=files).checksums()
            if found.whole != weight.expected:
                for shard in {files.file(tensor) for tensor in weight.names()}:
                    shard.unlink()
                raise CheckpointError(
                    f"{name} of {weight.files.path} is damaged, or was while it was written; try again"
                )
            told[name] = manifest.Beside(found, weight.told_order)
            compared(sum(files.stored(tensor)[2] for part in PARTS for tensor in weight.tensors[part].values()))
    (partial / manifest.BESIDE).write_text(manifest.dump_beside(told), encoding="utf-8")


def _write_index(shards: dict[str, Shard], index: Path) -> None:
    where = {part: name for name, shard in shards.items() for part in shard.parts}
    total = sum(shard.nbytes for shard in shards.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2)
    index.write_text(text, encoding="utf-8")
