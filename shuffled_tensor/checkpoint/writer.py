# SPDX-License-Identifier: MIT
"""Writing a safetensors file piece by piece, so that a run that was killed can go on."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.checkpoint.source import DTYPES, CheckpointError, Files, memory_of

__all__ = ["Pieces", "lock", "own_file", "whole_tensor", "write_file"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CHUNK = 16 * 2**20
"""Bytes of a plain tensor that are copied at a time."""

_LONGEST_HEADER = 100_000_000
"""Bytes: what readers of safetensors files accept."""


class Pieces(NamedTuple):
    """A tensor to be written: its dtype and shape as the header says them, and its bytes in ``pieces``, all of ``step``
    bytes but the last."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    step: int
    read: Callable[[int], Tensor]

    @property
    def pieces(self) -> int:
        return -(-self.nbytes // self.step)

    @property
    def alignment(self) -> int:
        """Of the bytes, for those who map the file."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...], pieces: int, read: Callable[[int], Tensor]) -> Pieces:
        """A torch tensor in equal pieces."""
        nbytes = dtype.itemsize * math.prod(shape)
        if dtype is torch.float4_e2m1fn_x2:  # a header counts values, and this holds two
            shape = *shape[:-1], 2 * shape[-1]
        return cls(_NAMES[dtype], shape, nbytes, max(1, nbytes // pieces), read)


def whole_tensor(files: Files, name: str) -> Pieces:
    """A whole tensor of a checkpoint, to be written elsewhere, byte for byte."""
    dtype, shape, nbytes = files.stored(name)

    def read(index: int) -> Tensor:
        return files.read_bytes(name, index * _CHUNK, min((index + 1) * _CHUNK, nbytes))

    return Pieces(dtype, shape, nbytes, _CHUNK, read)


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

    Raises:
        ValueError: a header that is longer than what readers accept; nothing is written.
        OSError: the file cannot be written, or ``path + ".partial"`` is not a file of its own.
    """
    partial = path.with_name(path.name + ".partial")
    # as other writers do, so that every tensor is aligned for those who map the file
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].alignment))
    header, total = _header(parts, metadata)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(
            f"names and metadata take {len(header)} bytes; readers of safetensors files accept {_LONGEST_HEADER}"
        )
    with open(own_file(partial), "r+b") as file:
        lock(file, partial)
        try:
            if not resume or file.read(len(header)) != header:
                file.seek(0)
                file.truncate()
                file.write(header)
            written = min(file.seek(0, os.SEEK_END) - len(header), total)
            place = 0
            for part in parts.values():
                for index in range(part.pieces):
                    nbytes = min(part.step, part.nbytes - index * part.step)
                    if place + nbytes > written:
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
                partial.unlink(missing_ok=True)
            raise


def own_file(partial: Path) -> int:
    """A descriptor of the partial file, new or begun; never of something else that goes by its name."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileExistsError(f"{partial}, which is to be written, is a symbolic link; remove it") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise FileExistsError(f"{partial}, which is to be written, is no file or has another name too; remove it")
    return descriptor


def lock(file: BinaryIO, partial: Path) -> None:
    """Keep other runs from writing the same file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:  # it was whole, and got its name, before it was locked
        raise BlockingIOError(f"another run is writing {partial}, or just has; wait for it")


def _header(parts: dict[str, Pieces], metadata: dict[str, str]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, part in parts.items():
        entries[name] = {
            "dtype": part.dtype,
            "shape": part.shape,
            "data_offsets": [place, place + part.nbytes],
        }
        place += part.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 16)  # the data that follows is aligned
    return len(text).to_bytes(8, "little") + text, place
