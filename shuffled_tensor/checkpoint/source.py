# SPDX-License-Identifier: MIT
"""safetensors files, read part by part.

The safetensors package checks a file; its bytes are read here, by offset, and not through its memory maps, which keep
every page that was read in the process's memory, and end the process where a file becomes shorter meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["INDEX", "CheckpointError", "Files", "memory_of", "parse_json"]


DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

INDEX = ".safetensors.index.json"
"""How the file ends that says which shard holds a tensor."""

_ALL = slice(None)

_VECTORS = 1024
"""Pieces of memory that the kernel fills at a time, at most."""

_LIBC = ctypes.CDLL(None)
_LIBC.preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_LIBC.preadv.restype = ctypes.c_ssize_t

BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What is raised by JSON that is none, and by looking into it for what is not there."""


_OTHERS = {
    b"GGUF": "a GGUF file, of llama.cpp: load the safetensors that it was made of",
    b"version https://git-lfs": "a pointer of Git LFS, and no file: run `git lfs pull` where it was cloned",
    b"PK\x03\x04": "a file of torch.save, or another archive: load it with torch.load, and pass its tensors",
    b"\x80": "a pickle: load it with torch.load, and pass its tensors",
    b"<!DOCTYPE": "a web page: the download has failed",
}
"""What a file that is none of safetensors begins with, and is."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted: the message names the file, the tensor and what was found."""


class _Stored(NamedTuple):
    """A tensor in a file, whose bytes are ``start`` to ``end`` of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Files:
    """The tensors of one safetensors file, or of a directory of them with or without an index.

    The files stay open, so that what is read is what was looked at, until this is closed or its ``with`` block ends.
    Symbolic links are followed: a download cache is made of them. Several threads may read at once.

    Raises:
        FileNotFoundError: there is no such file or directory, or nothing in it.
        CheckpointError: a file is damaged or missing, or two hold one tensor, or an index that names something else
            than files beside it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open: dict[Path, BinaryIO] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        self._held: dict[Path, dict[str, _Stored]] = {}
        self._tensors: dict[str, _Stored] = {}
        try:
            if self.path.is_dir():
                self._open_directory()
            else:
                self._tensors = self._file(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_directory(self) -> None:
        indices = sorted(self.path.glob(f"*{INDEX}"))
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
            for name, stored in self._file(file).items():
                if name in self._tensors:
                    before = self._tensors[name].file.name
                    raise CheckpointError(f"{name} is in {before} and in {file.name} of {self.path}")
                self._tensors[name] = stored

    def _open_index(self, index: Path) -> None:
        try:
            names = parse_json(index.read_bytes().decode())["weight_map"].items()
        except BROKEN as error:
            raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from error
        held: dict[str, dict[str, _Stored]] = {}
        for name, shard in names:
            if not isinstance(shard, str) or (shard not in held and Path(shard).name != shard):
                raise CheckpointError(f"{index} sends {name} to {shard!r}, which is no file beside it")
            if shard not in held:  # of hundreds of thousands of names, few are another's
                file = index.parent / shard
                if not file.is_file():
                    raise CheckpointError(f"{index} sends {name} to {shard}, which is missing")
                held[shard] = self._file(file)
            if name not in held[shard]:
                raise CheckpointError(f"{index} sends {name} to {shard}, which does not hold it")
            self._tensors[name] = held[shard][name]

    def _file(self, file: Path) -> dict[str, _Stored]:
        """The tensors of one file."""
        if file not in self._held:
            if not file.is_file():
                raise FileNotFoundError(f"no such file: {file}{_where_it_may_be(file)}")
            self._open[file] = open(file, "rb")  # noqa: SIM115  (closed with the rest)
            try:
                self._metadata[file], self._held[file] = _read_header(file, self._open[file])
            except (SafetensorError, *BROKEN) as error:
                what = _what_else(file) or f"no whole safetensors file: {error}"
                raise CheckpointError(f"{file} is {what}") from error
        return self._held[file]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def files(self) -> list[Path]:
        """Those that hold tensors."""
        return sorted({stored.file for stored in self._tensors.values()})

    def metadata(self, file: Path) -> dict[str, str]:
        """The header's metadata."""
        return self._metadata[file]

    def file(self, name: str) -> Path:
        """Where a tensor is."""
        return self._tensors[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in elements of :meth:`dtype`, of which one of F4 is two values."""
        stored = self._tensors[name]
        if stored.dtype != "F4":
            return stored.shape
        if not stored.shape or stored.shape[-1] % 2:
            raise CheckpointError(
                f"{name} in {stored.file} is F4 of shape {list(stored.shape)}, which torch cannot hold"
            )
        return *stored.shape[:-1], stored.shape[-1] // 2

    def stored(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """What the header says of a tensor, whether torch has such a dtype or not: dtype, shape, and bytes."""
        stored = self._tensors[name]
        return stored.dtype, stored.shape, stored.end - stored.start

    def is_any_of(self, name: str, dtypes: Collection[torch.dtype]) -> bool:
        """Whether a tensor's dtype is among these; False for one that torch does not have."""
        return DTYPES.get(self._tensors[name].dtype) in dtypes

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            CheckpointError: torch has none like it.
        """
        found = self._tensors[name].dtype
        if found not in DTYPES:
            raise CheckpointError(f"{name} in {self.file(name)} is {found!r}; known: {', '.join(DTYPES)}")
        return DTYPES[found]

    def read(self, name: str, *index: int | slice, out: Tensor | None = None) -> Tensor:
        """Part of a tensor, on the CPU: ``index`` is one number for each of the first dimensions and then perhaps a
        slice, without a step, of the next one.

        Args:
            out: bytes to read into, or values of the tensor's dtype, as many as are read; else memory of its own.

        Raises:
            CheckpointError: a dtype that torch does not have, or bytes that cannot be read.
        """
        dtype, shape, start = self.dtype(name), self.shape(name), self._tensors[name].start
        for place in index:
            if place == _ALL:
                continue
            row = dtype.itemsize * math.prod(shape[1:])
            if isinstance(place, int):
                start, shape = start + range(shape[0])[place] * row, shape[1:]
            else:
                rows = range(shape[0])[place]
                start, shape = start + rows.start * row, (len(rows), *shape[1:])
        direct = out is not None and out.is_contiguous()
        data = out if direct else torch.empty(shape, dtype=dtype, device="cpu")
        assert data is not None
        assert data.nbytes == dtype.itemsize * math.prod(shape)
        self._fill(data, name, start)
        return data if direct or out is None else out.copy_(data.view(out.dtype).view(out.shape))

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        """Read some of a tensor's bytes, from ``start`` on, into rows that lie apart: ``out`` is uint8 ``[M, N, B]`` on
        the CPU, and each row of it is contiguous.

        Raises:
            CheckpointError: they cannot be read.
        """
        stored, (_, each, size) = self._tensors[name], out.shape
        pairs = zip(out.shape[:2], out.stride()[:2], strict=True)
        of_some, of_each = (torch.arange(count, device="cpu") * stride for count, stride in pairs)
        places = (out.data_ptr() + of_some[:, None] + of_each).flatten()
        vectors = torch.stack([places, torch.full_like(places, size)], 1)  # of struct iovec
        for first in range(0, len(vectors), _VECTORS):
            part = vectors[first : first + _VECTORS]
            descriptor, where = self._open[stored.file].fileno(), stored.start + start + first * size
            found = _LIBC.preadv(descriptor, part.data_ptr(), len(part), where)
            for row in range(first + max(found, 0) // size, first + len(part)):  # what the kernel left, or why
                self._fill(out[row // each, row % each], name, start=stored.start + start + row * size)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Some of a tensor's bytes, uint8, whatever its dtype.

        Raises:
            CheckpointError: they cannot be read.
        """
        data = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        self._fill(data, name, self._tensors[name].start + start)
        return data

    def _fill(self, data: Tensor, name: str, start: int) -> None:
        """Read from a place in a tensor's file into contiguous memory."""
        stored = self._tensors[name]
        done, memory = 0, memoryview(memory_of(data))
        while done < data.nbytes:  # of more than 2 GiB, the kernel reads a part
            try:
                found = os.preadv(self._open[stored.file].fileno(), [memory[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{name} in {stored.file} cannot be read: {error}") from error
            if not found:
                raise CheckpointError(f"{name} in {stored.file} cannot be read: the file has become shorter")
            done += found


def _what_else(file: Path) -> str | None:
    """What a file is that is none of safetensors, by its first bytes."""
    with open(file, "rb") as data:
        first = data.read(64)
    if file.name.endswith(INDEX):
        return "the index of a checkpoint: give the directory that it is in"
    if first[8:9] == b"{":  # a header, behind its length
        return None
    return next((what for begin, what in _OTHERS.items() if first.startswith(begin)), None)


def _where_it_may_be(path: Path) -> str:
    """Of a name on the Hugging Face hub, how it becomes a directory."""
    if len(path.parts) != 2 or path.suffix == ".safetensors" or path.parent.exists():
        return ""
    return f"; where it is a name on the Hugging Face hub, `hf download {path}` prints the directory to give"


def _read_header(file: Path, data: BinaryIO) -> tuple[dict[str, str], dict[str, _Stored]]:
    """The metadata and the tensors; raises any of BROKEN, or SafetensorError."""
    with safe_open(file, framework="pt"):
        pass  # it has checked that the tensors are one behind the other and fill the file
    length = int.from_bytes(data.read(8), "little")
    header = parse_json(data.read(length).decode())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
    return metadata, tensors


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object; raises one of BROKEN."""
    parsed = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(parsed, dict):
        raise ValueError("no JSON object")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it names {twice} twice")
    return found


def memory_of(data: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a contiguous tensor on the CPU, for a file to read or write."""
    return (ctypes.c_char * data.nbytes).from_address(data.data_ptr())
