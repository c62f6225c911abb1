# SPDX-License-Identifier: MIT
"""What a file says about its MXFP4 weights, in the metadata of its header."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch

from shuffled_tensor.checkpoint.source import BROKEN, CheckpointError, parse_json
from shuffled_tensor.layouts import ROW_MAJOR, Layout, find_layout, layout_or_none, name_or_none
from shuffled_tensor.mxfp4 import BLOCK, CODES, Part
from shuffled_tensor.tensor.checksums import DIGITS, Checksums
from shuffled_tensor.tensor.geometry import ALIGN, Geometry, RowOrder

__all__ = ["BESIDE", "Beside", "Entry", "dump", "dump_beside", "parse", "parse_beside"]

KEY = "shuffled_tensor"
VERSION = 1
BESIDE = "shuffled_tensor.json"
"""The file beside a directory's shards that says what a manifest would of weights under a checkpoint's own names."""

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


_Read = TypeVar("_Read")


class Entry(NamedTuple):
    """One weight ``<name>``, stored as uint8 ``<name>.qdata`` and ``<name>.scale``: logical and row-major where its
    layout is, else padded, as the bytes lay in memory."""

    layout: Layout
    gate_up: bool
    shape: tuple[int, ...]
    """Logical: ``[E, N, K]`` or ``[N, K]``."""
    dtype: torch.dtype
    requested_layout: Layout | None
    """The one that the weight was made for, if it was."""
    checksums: Checksums
    align: tuple[int, int] = ALIGN
    """What the stored bytes are padded to multiples of, where they are padded."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape[-2], self.shape[-1], self.gate_up, self.align)

    def stored_shape(self, part: Part) -> tuple[int, ...]:
        """Of ``<name>.qdata`` or ``<name>.scale``."""
        rows, columns = self.shape[-2:]
        one = (rows, columns // part.per_byte) if self.layout is ROW_MAJOR else self.geometry.padded_shape(part)
        return *self.shape[:-2], *one

    @property
    def padded(self) -> list[int] | None:
        """Rows and bytes of one expert's codes, where they are padded."""
        return None if self.layout is ROW_MAJOR else list(self.geometry.padded_shape(CODES))


def dump(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Metadata for a header."""
    tensors = {
        name: {
            "kind": entry.layout.name,
            "gate_up": entry.gate_up,
            "shape": entry.shape,
            "padded": entry.padded,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shuffle_kind": name_or_none(entry.requested_layout),
            **_said(entry.checksums),
        }
        for name, entry in entries.items()
    }
    return {KEY: _sealed("tensors", tensors)}


def parse(metadata: Mapping[str, str], file: Path) -> dict[str, Entry]:
    """The entries of a header's metadata; none where there is no manifest.

    Raises:
        CheckpointError: a manifest of an unknown version, a damaged one, or an entry that says something impossible.
    """
    return _unsealed(metadata[KEY], "tensors", f"the manifest of {file}", _entry) if KEY in metadata else {}


class Beside(NamedTuple):
    """What :data:`BESIDE` says of a weight that lies row-major, under the names of its checkpoint's format."""

    checksums: Checksums
    row_order: RowOrder | None
    """Of gate and up rows in one tensor, where the names do not tell."""


def dump_beside(weights: Mapping[str, Beside]) -> str:
    """The text of :data:`BESIDE`."""
    said = {name: {**_said(weight.checksums), "row_order": weight.row_order} for name, weight in weights.items()}
    return _sealed("weights", said)


def parse_beside(folder: Path) -> dict[str, Beside]:
    """What a directory's :data:`BESIDE` says, by weight; nothing where there is none.

    Raises:
        CheckpointError: as :func:`parse`.
    """
    file = folder / BESIDE
    if not file.is_file():
        return {}
    try:
        text = file.read_bytes().decode()
    except BROKEN as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return _unsealed(text, "weights", str(file), _beside)


def _sealed(key: str, said: object) -> str:
    return json.dumps({"version": VERSION, key: said, "seal": _seal(said)})


def _unsealed(text: str, key: str, where: str, read: Callable[[dict[str, Any]], _Read]) -> dict[str, _Read]:
    """What was sealed under ``key``, each value read by ``read``.

    Raises:
        CheckpointError: it is of an unknown version, or damaged, or says something impossible.
    """
    try:
        manifest = parse_json(text)
        version = manifest["version"]
        if type(version) is not int or version != VERSION:
            raise CheckpointError(
                f"{where} has format version {version!r}, and this build knows {VERSION}; use a newer shuffled_tensor"
            )
        _check_keys(manifest, "version", key, "seal")
        said = manifest[key].items()
        sealed = manifest["seal"] == _seal(manifest[key])
    except CheckpointError:
        raise
    except BROKEN as error:
        raise CheckpointError(f"{where} cannot be read: {error!r}") from error
    if not sealed:
        raise CheckpointError(f"{where} was changed or damaged: its seal does not fit")
    found = {}
    for name, raw in said:
        try:
            found[name] = read(raw)
        except BROKEN as error:
            raise CheckpointError(f"{where} says something impossible of {name}: {error}") from error
    return found


def _check_keys(raw: dict[str, Any], *known: str) -> None:
    unknown = sorted(raw.keys() - set(known))
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}; use a newer shuffled_tensor")


def _entry(raw: dict[str, Any]) -> Entry:
    shape = tuple(raw["shape"])
    if not (len(shape) in (2, 3) and all(type(size) is int and size > 0 for size in shape) and shape[-1] % BLOCK == 0):
        raise ValueError(f"shape {list(shape)}")
    if type(raw["gate_up"]) is not bool or (raw["gate_up"] and shape[-2] % 2):
        raise ValueError(f"gate_up {raw['gate_up']!r} for {shape[-2]} rows")
    if raw["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r}")
    entry = Entry(
        find_layout(raw["kind"]),
        raw["gate_up"],
        shape,
        _DTYPES[raw["dtype"]],
        layout_or_none(raw["shuffle_kind"]),
        _checksums(raw),
    )
    _check_keys(raw, "kind", "gate_up", "shape", "padded", "dtype", "shuffle_kind", "checksum", "experts")
    if entry.checksums.experts is not None and len(entry.checksums.experts) != (1, *shape)[-3]:
        raise ValueError(f"{len(entry.checksums.experts)} experts' checksums for shape {list(shape)}")
    if isinstance(raw["padded"], list):
        found = Geometry.of_codes(*entry.geometry[:3], raw["padded"])
        entry = entry if found is None else entry._replace(align=found.align)
    if raw["padded"] != entry.padded or any(type(size) is not int for size in raw["padded"] or ()):
        raise ValueError(f"padded sizes {raw['padded']} for layout {entry.layout.name!r}, which has {entry.padded}")
    return entry


def _beside(raw: dict[str, Any]) -> Beside:
    _check_keys(raw, "checksum", "experts", "row_order")
    if raw["row_order"] not in (None, *get_args(RowOrder)):
        raise ValueError(f"row_order {raw['row_order']!r}")
    return Beside(_checksums(raw), raw["row_order"])


def _said(checksums: Checksums) -> dict[str, Any]:
    """Of checksums; a file from before experts had theirs has the first alone."""
    said: dict[str, Any] = {"checksum": checksums.whole}
    return said if checksums.experts is None else said | {"experts": list(checksums.experts)}


def _checksums(raw: dict[str, Any]) -> Checksums:
    whole, experts = raw["checksum"], raw.get("experts")
    for found, digits in ((whole, 64), *((expert, DIGITS) for expert in experts or ())):
        if not isinstance(found, str) or re.fullmatch(f"[0-9a-f]{{{digits}}}", found) is None:
            raise ValueError(f"checksum {found!r}")
    return Checksums(whole, None if experts is None else tuple(experts))


def _seal(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
