# SPDX-License-Identifier: MIT
"""Writing a safetensors file piece by piece, so that a run that was killed can go on."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.checkpoint.source import DTYPES, CheckpointError, Files, memory_of

__all__ = ["Pieces", "whole_tensor", "write_file"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CHUNK = 16 * 2**20
"""Bytes of a plain tensor that are copied at a time."""


class Pieces(NamedTuple):
    """A tensor to be written: ``pieces`` along its first dimension, all of ``nbytes`` bytes but the last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: int
    nbytes: int
    read: Callable[[int], Tensor]

    @classmethod
    def along_experts(cls, shape: tuple[int, ...], experts: int, read: Callable[[int], Tensor]) -> Pieces:
        """Uint8, an expert a piece."""
        return cls(torch.uint8, shape, experts, math.prod(shape) // experts, read)


def whole_tensor(files: Files, name: str) -> Pieces:
    """A whole tensor of a checkpoint, to be written elsewhere."""
    shape, dtype = files.shape(name), files.dtype(name)
    row = dtype.itemsize * math.prod(shape[1:])
    step = max(1, _CHUNK // max(row, 1))
    rows = shape[0] if shape else 1

    def read(index: int) -> Tensor:
        return files.read(name, slice(index * step, (index + 1) * step)) if shape else files.read(name)

    return Pieces(dtype, shape, -(-rows // step), step * row, read)


def write_file(
    path: Path,
    parts: dict[str, Pieces],
    metadata: dict[str, str],
    *,
    resume: bool,
    progress: Callable[[int], object] = lambda nbytes: None,
    finish: Callable[[Path], dict[str, str]] | None = None,
) -> None:
    """Write a safetensors file piece by piece, under ``path + ".partial"`` until it is whole.

    With ``resume``, a partial file that begins with the same header is gone on with, and one that could not be finished
    stays, but for a CheckpointError; else it is removed. ``finish`` looks at the whole partial file and returns the
    metadata that it shall have instead, of the same length.
    """
    partial = path.with_name(path.name + ".partial")
    # as other writers do, so that every tensor is aligned for those who map the file
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize))
    header, total = _header(parts, metadata)
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
        _lock(file, partial)
        try:
            if not resume or file.read(len(header)) != header:
                file.seek(0)
                file.truncate()
                file.write(header)
            written = min(file.seek(0, os.SEEK_END) - len(header), total)
            place = 0
            for part in parts.values():
                for index in range(part.pieces):
                    nbytes = min(part.nbytes, _nbytes(part) - index * part.nbytes)
                    if nbytes and place + nbytes > written:
                        file.seek(len(header) + place)
                        data = part.read(index).contiguous()
                        assert data.nbytes == nbytes
                        file.write(memory_of(data))
                    place += nbytes
                    progress(nbytes)
            file.truncate(len(header) + total)
            file.flush()
            if finish is not None:
                final, _ = _header(parts, finish(partial))
                assert len(final) == len(header)
                file.seek(0)
                file.write(final)
                file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            if not resume or isinstance(error, CheckpointError):
                partial.unlink()
            raise


def _lock(file: BinaryIO, partial: Path) -> None:
    """Keep other runs from writing the same file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:  # it was whole, and got its name, before it was locked
        raise BlockingIOError(f"another run is writing {partial}, or just has; wait for it")


def _nbytes(part: Pieces) -> int:
    return part.dtype.itemsize * math.prod(part.shape)


def _header(parts: dict[str, Pieces], metadata: dict[str, str]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, part in parts.items():
        entries[name] = {
            "dtype": _NAMES[part.dtype],
            "shape": part.shape,
            "data_offsets": [place, place + _nbytes(part)],
        }
        place += _nbytes(part)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 16)  # the data that follows is aligned
    return len(text).to_bytes(8, "little") + text, place
