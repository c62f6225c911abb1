# SPDX-License-Identifier: MIT
"""One file of a conversion: what is to be in it, how it is written, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.names import manifest_weights
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.checkpoint.writer import Pieces, whole_tensor, write_file
from shuffled_tensor.layouts import ROW_MAJOR, Layout
from shuffled_tensor.mxfp4 import CODES, PARTS, Part
from shuffled_tensor.tensor.checksums import DIGITS, Checksums, checksum

__all__ = ["Shard", "as_they_are", "under_our_names"]


@dataclass
class Shard:
    """What one file is to hold."""

    metadata: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[Weight, manifest.Entry]] = field(default_factory=dict)
    """The packed ones under our names: where each is read from, and its entry, without checksums yet."""
    parts: dict[str, Pieces] = field(default_factory=dict)
    """All that is written, these weights' parts too."""
    compared_later: set[str] = field(default_factory=set)
    """Parts of experts that are spread over several files."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def write(self, path: Path, written: Callable[[int], object], compared: Callable[[int], object]) -> None:
        """Write the file, or go on with one that was begun, and compare it; both are told how many bytes more are done.

        Raises:
            CheckpointError: what was written is not what was read.
            OSError: it cannot be written.
        """
        begun = self._metadata({name: entry.checksums for name, (_, entry) in self.weights.items()})
        write_file(
            path,
            self.parts,
            begun,
            resume=True,
            progress=written,
            finish=lambda partial: self._metadata(self._compare(partial, compared)),
        )

    def compare(self, path: Path, compared: Callable[[int], object]) -> None:
        """Compare a file that an earlier run has written; it is removed where it is not what is read.

        Raises:
            CheckpointError: it is not.
        """
        try:
            self._compare(path, compared)
        except CheckpointError:
            path.unlink()
            raise

    def _metadata(self, checksums: Mapping[str, Checksums]) -> dict[str, str]:
        entries = {name: entry._replace(checksums=checksums[name]) for name, (_, entry) in self.weights.items()}
        return {"format": "pt", **self.metadata, **(manifest.dump(entries) if entries else {})}

    def _compare(self, partial: Path, compared: Callable[[int], object]) -> dict[str, Checksums]:
        """The checksums of the weights as they were written, which are those of what was read."""
        checksums = {}
        with Files(partial) as files:
            written = manifest_weights(files) if self.weights else {}
            for name, (weight, _) in self.weights.items():
                checksums[name] = written[name].checksums()
                if checksums[name].whole != weight.expected:
                    raise CheckpointError(
                        f"{name} of {weight.files.path} is damaged, or was while it was written, or {partial} was "
                        "begun from another source; try again"
                    )
                compared(sum(self.parts[f"{name}.{part}"].nbytes for part in PARTS))
            packed = {f"{name}.{part}" for name in self.weights for part in PARTS}
            for name, part in self.parts.items():
                if name not in packed and name not in self.compared_later:
                    if _checksum(part) != _checksum(whole_tensor(files, name)):
                        raise CheckpointError(f"{name} was damaged while it was written to {partial}")
                    compared(part.nbytes)
        return checksums


def under_our_names(
    files: Files, weights: Iterable[Weight], layout: Layout, file_of: Callable[[str], str]
) -> dict[str, Shard]:
    """A whole checkpoint by the files that it is to be in, a weight in the file of its first tensor: experts in a
    layout and under our names, the rest as it is.

    Raises:
        CheckpointError: another tensor has a name that an expert weight needs.
    """
    shards = _with_metadata(files, file_of)
    for shard in shards.values():
        shard.metadata.pop(manifest.KEY, None)
    copied, taken = set(files), set()
    for weight in weights:
        copied -= set(weight.names())
        shard = shards[file_of(next(iter(weight.names())))]
        before = set(shard.parts)
        if weight.quantized:
            entry = _entry(weight, layout)
            shard.weights[weight.name] = weight, entry
            shard.parts |= {f"{weight.name}.{part}": _packed(weight, part, entry) for part in PARTS}
        else:
            shard.parts[weight.name] = _plain(weight, CODES, weight.shape, weight.dtype)
        if weight.tensors[BIAS]:
            dtype = files.dtype(next(iter(weight.tensors[BIAS].values())))
            name = f"{weight.name.removesuffix('weight')}bias"
            shard.parts[name] = _plain(weight, BIAS, weight.shape[:2], dtype)
        taken |= set(shard.parts) - before
    for name in sorted(copied):
        if name in taken:
            raise CheckpointError(f"{name} in {files.file(name)} is called what an expert weight would be written as")
        shards[file_of(name)].parts[name] = whole_tensor(files, name)
    return {name: shard for name, shard in shards.items() if shard.parts}


def as_they_are(files: Files, weights: Iterable[Weight]) -> dict[str, Shard]:
    """A whole checkpoint by its files, every tensor with its name and bytes."""
    experts = {name for weight in weights for part in PARTS for name in weight.tensors[part].values()}
    shards = _with_metadata(files, lambda name: files.file(name).name)
    for name in files:
        shard = shards[files.file(name).name]
        shard.parts[name] = whole_tensor(files, name)
        if name in experts:
            shard.compared_later.add(name)
    return shards


def _with_metadata(files: Files, file_of: Callable[[str], str]) -> dict[str, Shard]:
    shards: dict[str, Shard] = {}
    for file, name in dict.fromkeys((files.file(name), file_of(name)) for name in files):
        shards.setdefault(name, Shard()).metadata |= files.metadata(file)
    return shards


def _packed(weight: Weight, part: Part, entry: manifest.Entry) -> Pieces:
    """Codes or scales of a weight, to be written in a layout."""
    span = range(weight.intermediate)

    def read(expert: int) -> Tensor:
        data = weight.read(part, expert, span).unsqueeze(0)
        if entry.layout is ROW_MAJOR:
            return data
        return entry.layout.order(part, weight.gate_up).shuffle(entry.geometry.pad(part, data))

    return Pieces.of(torch.uint8, entry.stored_shape(part), weight.shape[0], read)


def _entry(weight: Weight, layout: Layout) -> manifest.Entry:
    """What the manifest will say of a weight; the layout that it was made for stays, and so does how it is padded."""
    # what stands in a partial file until everything in it was read back
    none = Checksums("0" * 64, ("0" * DIGITS,) * weight.shape[0])
    if weight.entry is not None:
        return weight.entry._replace(layout=layout, checksums=none)
    return manifest.Entry(layout, weight.gate_up, weight.shape, weight.dtype, None, none)


def _plain(weight: Weight, part: Part | str, shape: tuple[int, ...], dtype: torch.dtype) -> Pieces:
    """Values that are not quantised, to be written for all experts together."""
    span = range(weight.intermediate)
    return Pieces.of(dtype, shape, shape[0], lambda expert: weight.read(part, expert, span))


def _checksum(part: Pieces) -> str:
    return checksum(part.shape, map(part.read, range(part.pieces)))
