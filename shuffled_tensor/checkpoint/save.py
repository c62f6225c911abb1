# SPDX-License-Identifier: MIT
"""Saving tensors so that they can be trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
        ValueError: an unknown layout, names that clash, names or metadata that are not text with a UTF-8 form, or a
            tensor that a file cannot hold: on the meta device, sparse, another library's wrapper (a DTensor), of a
            dtype that safetensors files do not have. Nothing is written.
        TypeError: what is no tensor. Nothing is written.
        OSError: the file cannot be written; what was written of it is removed.
    """
    if layout not in ("canonical", "as_is"):
        raise ValueError(f"layout must be 'canonical' or 'as_is', found {layout!r}")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata is text by names, found {metadata}")
    for pair in metadata.items():
        for text in pair:
            _check_text("metadata", text)
    if manifest.KEY in metadata:
        raise ValueError(f"metadata[{manifest.KEY!r}] is the manifest's place")
    packed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ShuffledMXFP4Tensor)}
    for name, weight in packed.items():
        if weight.numel() == 0:
            raise ValueError(f"{name!r} has no experts or rows, found shape {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device, where there are no values to save")
    for name, tensor in tensors.items():
        _check_text("a tensor's name", name)
        if name not in packed:
            _check_plain(name, tensor)
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
        storage.checksums(tensor._window),
        storage.geometry.align,
    )


def _packed_part(tensor: ShuffledMXFP4Tensor, entry: manifest.Entry, part: Part) -> Pieces:
    storage, window = tensor._storage, tensor._window

    def read(index: int) -> Tensor:
        expert = window.experts[index]
        experts = range(expert, expert + 1)
        canonical = entry.layout is ROW_MAJOR
        found = storage.read(window._replace(experts=experts)) if canonical else storage.select(experts)
        return found[PARTS.index(part)].cpu()

    return Pieces.of(torch.uint8, entry.stored_shape(part), window.shape[0], read)


def _plain_part(name: str, tensor: Tensor) -> Pieces:
    def read(index: int) -> Tensor:
        if tensor.dtype is torch.float4_e2m1fn_x2:  # which torch can view and little else
            return tensor.detach().view(torch.uint8).cpu()
        return tensor.detach().cpu().resolve_conj().resolve_neg()

    return Pieces.of(tensor.dtype, tuple(tensor.shape), 1, read)


def _check_text(what: str, found: object) -> None:
    """Raise ValueError for what a header, which is JSON in UTF-8, cannot say."""
    if not isinstance(found, str):
        raise ValueError(f"{what} must be text, found {found!r}")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be text that has a UTF-8 form, found {found!r}") from error


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError or ValueError for what is no tensor with values in memory of its own."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} must be a tensor, found {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name!r} is a tensor of layout {tensor.layout}; save what .to_dense() makes of it")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors files do not hold")
    if tensor.is_meta:
        raise ValueError(f"{name!r} is on the meta device, where there are no values to save")
    if tensor.dtype is torch.float4_e2m1fn_x2 and not tensor.dim():
        raise ValueError(f"{name!r} is {tensor.dtype} without a dimension, which safetensors files do not hold")
    try:
        memory = not isinstance(tensor, FakeTensor) and (not tensor.numel() or tensor.untyped_storage().data_ptr() != 0)
    except RuntimeError:
        memory = False
    if not memory or is_traceable_wrapper_subclass(tensor):
        raise ValueError(
            f"{name!r} is a {type(tensor).__name__}, whose values are not in memory of its own; save the plain tensors "
            "or the ShuffledMXFP4Tensor in it (of a DTensor, what .to_local() or .full_tensor() returns)"
        )
