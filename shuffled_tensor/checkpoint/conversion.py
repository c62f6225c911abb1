# SPDX-License-Identifier: MIT
"""From one checkpoint to another, row-major or in the layout of a kernel: streamed, resumable, checked at the end."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.names import FormatName, find_layers, manifest_weights
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.checkpoint.writer import Pieces, whole_tensor, write_file
from shuffled_tensor.layouts import ROW_MAJOR, Layout, find_layout
from shuffled_tensor.mxfp4 import CODES, PARTS, Part
from shuffled_tensor.tensor.geometry import RowOrder
from shuffled_tensor.tensor.storage import checksum

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str = "canonical",
    format: FormatName = "auto",
    row_order: RowOrder | None = None,
) -> None:
    """Write the experts of a checkpoint to a safetensors file with a manifest, which :func:`load_experts` and
    :func:`load_file` trust; all other tensors come along as they are.

    One expert at a time is in memory. Until everything is written, and was read back and compared, it lies under
    ``destination + ".partial"``; a run that was killed is gone on with by another one like it.

    Args:
        source: a safetensors file or a directory of them, as :func:`load_experts` takes it.
        destination: the file.
        layout: ``"canonical"`` for row-major bytes without padding, or the ``shuffle_kind`` that they shall lie in.
        format, row_order: of the source, as :func:`load_experts` takes them.

    Raises:
        FileNotFoundError: there is no source, or no folder for the destination.
        FileExistsError: the destination exists.
        CheckpointError: the source is damaged, or what was written is not what was read; nothing is left of it then.
        ValueError: an unknown layout or format.
        OSError: the destination cannot be written; another run goes on from there.
    """
    wanted = ROW_MAJOR if layout == "canonical" else find_layout(layout)
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it, or give another name")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"no such folder to write to: {destination.parent}")
    with Files(source) as files:
        weights, parts = _plan(files, format, row_order, wanted)
        kept = {key: text for file in files.files() for key, text in files.metadata(file).items()}

        def metadata(checksums: dict[str, str]) -> dict[str, str]:
            entries = {name: _entry(weight, wanted, checksums[name]) for name, weight in weights.items()}
            return {"format": "pt", **kept, **manifest.dump(entries)}

        begun = metadata(dict.fromkeys(weights, manifest.NO_CHECKSUM))
        total = sum(part.nbytes for part in parts.values())
        with tqdm(total=total, desc=f"writing {destination.name}", unit="B", unit_scale=True, disable=None) as progress:
            write_file(
                destination,
                parts,
                begun,
                resume=True,
                progress=progress.update,
                finish=lambda partial: metadata(_compared(weights, parts, partial)),
            )


def _plan(
    files: Files, format: FormatName, row_order: RowOrder | None, layout: Layout
) -> tuple[dict[str, Weight], dict[str, Pieces]]:
    """The MXFP4 weights of a checkpoint, and everything that is to be written of it."""
    weights: dict[str, Weight] = {}
    parts: dict[str, Pieces] = {}
    copied = set(files)
    found = {weight.name: weight for layer in find_layers(files, "", format, row_order).values() for weight in layer}
    for name, weight in (manifest_weights(files) | found).items():
        copied -= set(weight.names())
        if weight.quantized:
            weights[name] = weight
            parts |= {f"{name}.{part}": _packed(weight, part, layout) for part in PARTS}
        else:
            parts[name] = _plain(weight, CODES, weight.shape, weight.dtype)
        if weight.tensors[BIAS]:
            dtype = files.dtype(next(iter(weight.tensors[BIAS].values())))
            parts[f"{name.removesuffix('weight')}bias"] = _plain(weight, BIAS, weight.shape[:2], dtype)
    for name in sorted(copied):
        if name in parts:
            raise CheckpointError(f"{name} in {files.file(name)} is called what an expert weight would be written as")
        parts[name] = whole_tensor(files, name)
    return weights, parts


def _compared(weights: dict[str, Weight], parts: dict[str, Pieces], partial: Path) -> dict[str, str]:
    """The checksums of the weights as they were written, which are those of what was read.

    Raises:
        CheckpointError: they are not, or another tensor has changed.
    """
    packed = {f"{name}.{part}" for name in weights for part in PARTS}
    with Files(partial) as written:
        checksums = {name: weight.checksum() for name, weight in manifest_weights(written).items()}
        for name, weight in weights.items():
            if checksums[name] != (weight.checksum() if weight.entry is None else weight.entry.checksum):
                raise CheckpointError(
                    f"{name} of {weight.files.path} is damaged, or was while it was written, or {partial} was begun "
                    "from another source; try again"
                )
        for name, part in parts.items():
            if name not in packed and _checksum(part) != _checksum(whole_tensor(written, name)):
                raise CheckpointError(f"{name} was damaged while it was written to {partial}")
    return checksums


def _packed(weight: Weight, part: Part, layout: Layout) -> Pieces:
    """Codes or scales of a weight, to be written in a layout."""
    span = range(weight.intermediate)
    entry = _entry(weight, layout, manifest.NO_CHECKSUM)

    def read(expert: int) -> Tensor:
        data = weight.read(part, expert, span).unsqueeze(0)
        if layout is ROW_MAJOR:
            return data
        return layout.order(part, weight.gate_up).shuffle(entry.geometry.pad(part, data))

    return Pieces.of(torch.uint8, entry.stored_shape(part), weight.shape[0], read)


def _entry(weight: Weight, layout: Layout, checksum: str) -> manifest.Entry:
    """What the manifest will say of a weight; the layout that it was made for stays, and so does how it is padded."""
    if weight.entry is not None:
        return weight.entry._replace(layout=layout, checksum=checksum)
    return manifest.Entry(layout, weight.gate_up, weight.shape, weight.dtype, None, checksum)


def _plain(weight: Weight, part: Part | str, shape: tuple[int, ...], dtype: torch.dtype) -> Pieces:
    """Values that are not quantised, to be written for all experts together."""
    span = range(weight.intermediate)
    return Pieces.of(dtype, shape, shape[0], lambda expert: weight.read(part, expert, span))


def _checksum(part: Pieces) -> str:
    return checksum(part.shape, map(part.read, range(part.pieces)))
