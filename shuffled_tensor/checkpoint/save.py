# SPDX-License-Identifier: MIT
"""Saving tensors so that they can be trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.source import DTYPES
from shuffled_tensor.checkpoint.writer import Pieces, write_file
from shuffled_tensor.layouts import ROW_MAJOR
from shuffled_tensor.mxfp4 import PARTS, Part
from shuffled_tensor.tensor.storage import locked
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["save_file"]


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    layout: Literal["canonical", "as_is"] = "canonical",
) -> None:
    """Write tensors to a safetensors file, as ``safetensors.torch.save_file`` does, among them
    :class:`ShuffledMXFP4Tensor`.

    One of those becomes two uint8 tensors ``<name>.qdata`` and ``<name>.scale``, which any tool can read, and an entry
    of a manifest in the header's metadata: layout, gate_up, logical and padded sizes, dtype, checksum of the logical
    value. The file appears when it is whole.

    Args:
        layout: ``"canonical"`` writes logical row-major bytes, whatever the layout in memory; ``"as_is"`` the padded
            bytes as they lie.

    Raises:
        ValueError: an unknown layout, or names that clash.
        OSError: the file cannot be written; what was written of it is removed.
    """
    if layout not in ("canonical", "as_is"):
        raise ValueError(f"layout must be 'canonical' or 'as_is', found {layout!r}")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata is text by names, found {metadata}")
    if manifest.KEY in metadata:
        raise ValueError(f"metadata[{manifest.KEY!r}] is the manifest's place")
    packed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ShuffledMXFP4Tensor)}
    for name, weight in packed.items():
        if weight.numel() == 0:
            raise ValueError(f"{name!r} has no experts or rows, found shape {list(weight.shape)}")
    with locked(*(tensor._storage for tensor in packed.values())):  # values, layouts and checksums stay those of now
        pieces: dict[str, Pieces] = {}
        entries = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, ShuffledMXFP4Tensor):
                if layout == "as_is" and tensor.is_part_of_experts:
                    tensor = tensor.clone()  # it has no bytes that lie in any way
                    assert isinstance(tensor, ShuffledMXFP4Tensor)
                entries[name] = _entry(tensor, layout)
                new = {f"{name}.{part}": _packed_part(tensor, entries[name], part) for part in PARTS}
            else:
                new = {name: _plain_part(name, tensor)}
            for key in new:
                if key in pieces or key == "__metadata__":
                    raise ValueError(f"a tensor cannot be called {key!r}, which is taken")
            pieces |= new
        if entries:
            metadata |= manifest.dump(entries)
        write_file(Path(path), pieces, metadata, resume=False)


def _entry(tensor: ShuffledMXFP4Tensor, layout: str) -> manifest.Entry:
    storage = tensor._storage
    return manifest.Entry(
        storage.layout if layout == "as_is" else ROW_MAJOR,
        tensor.gate_up,
        tuple(tensor.shape),
        tensor.dtype,
        storage.requested_layout,
        tensor.logical_checksum(),
    )


def _packed_part(tensor: ShuffledMXFP4Tensor, entry: manifest.Entry, part: Part) -> Pieces:
    storage, window = tensor._storage, tensor._window

    def read(index: int) -> Tensor:
        expert = window.experts[index]
        experts = range(expert, expert + 1)
        canonical = entry.layout is ROW_MAJOR
        found = storage.read(window._replace(experts=experts)) if canonical else storage.select(experts)
        return found[PARTS.index(part)].cpu()

    return Pieces.along_experts(entry.stored_shape(part), window.shape[0], read)


def _plain_part(name: str, tensor: Tensor) -> Pieces:
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors files do not hold")
    return Pieces(
        tensor.dtype,
        tuple(tensor.shape),
        1,
        tensor.nbytes,
        lambda index: tensor.detach().cpu().resolve_conj().resolve_neg(),
    )
