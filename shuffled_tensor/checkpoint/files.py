# SPDX-License-Identifier: MIT
"""safetensors files, read part by part, and written part by part so that a killed run can go on."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["CheckpointError", "Files", "Part", "write_file"]

_CHUNK = 16 * 2**20
"""Bytes of a plain tensor that are copied at a time."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted: the message names the file, the tensor and what was found."""


class Files:
    """The tensors of one safetensors file, or of a directory of them with or without an index; nothing is read yet.

    Raises:
        FileNotFoundError: there is no such file or directory, or nothing in it.
        CheckpointError: a file is damaged or missing, or two hold one tensor, or an index that names something else
            than files beside it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        if self.path.is_dir():
            self._open_directory()
        else:
            for name in self._file(self.path).keys():  # noqa: SIM118
                self._where[name] = self.path

    def _open_directory(self) -> None:
        indices = sorted(self.path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise CheckpointError(
                f"{self.path} holds {len(indices)} indices, {indices[0].name} and others; give a file"
            )
        if indices:
            self._open_index(indices[0])
            return
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {self.path}")
        for file in files:
            for name in self._file(file).keys():  # noqa: SIM118
                if name in self._where:
                    raise CheckpointError(f"{name} is in {self._where[name].name} and in {file.name} of {self.path}")
                self._where[name] = file

    def _open_index(self, index: Path) -> None:
        try:
            names = json.loads(index.read_bytes(), object_pairs_hook=_without_duplicates)["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from error
        for name, shard in names:
            if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
                raise CheckpointError(f"{index} sends {name} to {shard!r}, which is no file beside it")
            file = index.parent / shard
            if not file.is_file():
                raise CheckpointError(f"{index} sends {name} to {shard}, which is missing")
            if name not in self._file(file).keys():  # noqa: SIM118
                raise CheckpointError(f"{index} sends {name} to {shard}, which does not hold it")
            self._where[name] = file

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise FileNotFoundError(f"no such file: {file}")
            try:
                self._open[file] = safe_open(file, framework="pt").__enter__()  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{file} is no whole safetensors file: {error}") from error
        return self._open[file]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def files(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def metadata(self, file: Path) -> dict[str, str]:
        """The header's metadata."""
        return self._open[file].metadata() or {}

    def file(self, name: str) -> Path:
        """Where a tensor is."""
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            CheckpointError: torch has none like it.
        """
        found = self._slice(name).get_dtype()
        if found not in DTYPES:
            raise CheckpointError(f"{name} in {self._where[name]} is {found}; known: {', '.join(DTYPES)}")
        return DTYPES[found]

    def _slice(self, name: str) -> Any:
        return self._open[self._where[name]].get_slice(name)

    def read(self, name: str, *index: int | slice) -> Tensor:
        """Part of a tensor, on the CPU; memory-mapped, so to be copied and not to be kept."""
        try:
            if not self.shape(name):
                return self._open[self._where[name]].get_tensor(name)  # type: ignore[no-any-return]
            return self._slice(name)[index or (slice(None),)]  # type: ignore[no-any-return]
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{name} in {self._where[name]} cannot be read: {error}") from error

    def part(self, name: str) -> Part:
        """A whole tensor, to be written elsewhere."""
        shape, dtype = self.shape(name), self.dtype(name)
        row = dtype.itemsize * math.prod(shape[1:])
        step = max(1, _CHUNK // max(row, 1))
        rows = shape[0] if shape else 1

        def read(index: int) -> Tensor:
            return self.read(name, slice(index * step, (index + 1) * step)) if shape else self.read(name)

        return Part(dtype, shape, -(-rows // step), step * row, read)


class Part(NamedTuple):
    """A tensor to be written: ``pieces`` along its first dimension, all of ``nbytes`` bytes but the last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: int
    nbytes: int
    read: Callable[[int], Tensor]

    @classmethod
    def along_experts(cls, shape: tuple[int, ...], experts: int, read: Callable[[int], Tensor]) -> Part:
        """Uint8, an expert a piece."""
        return cls(torch.uint8, shape, experts, math.prod(shape) // experts, read)


def write_file(
    path: Path,
    parts: dict[str, Part],
    metadata: dict[str, str],
    *,
    resume: bool,
    progress: Callable[[int], object] = lambda nbytes: None,
    finish: Callable[[Path], dict[str, str]] | None = None,
) -> None:
    """Write a safetensors file piece by piece, under ``path + ".partial"`` until it is whole.

    With ``resume``, a partial file that begins with the same header is gone on with. ``finish`` looks at the whole
    partial file and returns the metadata that it shall have instead, of the same length.
    """
    partial = path.with_name(path.name + ".partial")
    header, total = _header(parts, metadata)
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
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
                    file.write(memoryview((ctypes.c_char * nbytes).from_address(data.data_ptr())))
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


def _nbytes(part: Part) -> int:
    return part.dtype.itemsize * math.prod(part.shape)


def _header(parts: dict[str, Part], metadata: dict[str, str]) -> tuple[bytes, int]:
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
    text += b" " * (-len(text) % 16)  # the data that follows is aligned
    return len(text).to_bytes(8, "little") + text, place


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) != len(names) else set()
    if twice:
        raise ValueError(f"it names {sorted(twice)[0]} twice")
    return dict(pairs)
