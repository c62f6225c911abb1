# SPDX-License-Identifier: MIT
"""What a file says about its MXFP4 weights, in the metadata of its header."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shuffled_tensor.checkpoint.source import BROKEN, CheckpointError, parse_json
from shuffled_tensor.layouts import ROW_MAJOR, Layout, find_layout, layout_or_none, name_or_none
from shuffled_tensor.mxfp4 import BLOCK, CODES, Part
from shuffled_tensor.tensor.geometry import ALIGN, Geometry

__all__ = ["Entry", "dump", "parse"]

KEY = "shuffled_tensor"
VERSION = 1
NO_CHECKSUM = "0" * 64
"""Stands in a partial file until everything in it was read back."""

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


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
    checksum: str
    """``logical_checksum()``."""
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
            "checksum": entry.checksum,
        }
        for name, entry in entries.items()
    }
    return {KEY: json.dumps({"version": VERSION, "tensors": tensors, "seal": _seal(tensors)})}


def parse(metadata: Mapping[str, str], file: Path) -> dict[str, Entry]:
    """The entries of a header's metadata; none where there is no manifest.

    Raises:
        CheckpointError: a manifest of an unknown version, a damaged one, or an entry that says something impossible.
    """
    if KEY not in metadata:
        return {}
    try:
        manifest = parse_json(metadata[KEY])
        version = manifest["version"]
        if type(version) is not int or version != VERSION:
            raise CheckpointError(
                f"the manifest of {file} has format version {version!r}, and this build knows {VERSION}; use a newer "
                "shuffled_tensor"
            )
        _check_keys(manifest, "version", "tensors", "seal")
        tensors = manifest["tensors"].items()
        sealed = manifest["seal"] == _seal(manifest["tensors"])
    except CheckpointError:
        raise
    except BROKEN as error:
        raise CheckpointError(f"the manifest of {file} cannot be read: {error!r}") from error
    if not sealed:
        raise CheckpointError(f"the manifest of {file} was changed or damaged: its seal does not fit")
    entries = {}
    for name, raw in tensors:
        try:
            entries[name] = _entry(raw)
        except BROKEN as error:
            raise CheckpointError(f"the manifest of {file} says something impossible of {name}: {error}") from error
    return entries


def _check_keys(raw: dict[str, Any], *known: str) -> None:
    unknown = sorted(raw.keys() - set(known))
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}; use a newer shuffled_tensor")


def _entry(raw: dict[str, Any]) -> Entry:
    shape = tuple(raw["shape"])
    checksum = raw["checksum"]
    if not (len(shape) in (2, 3) and all(type(size) is int and size > 0 for size in shape) and shape[-1] % BLOCK == 0):
        raise ValueError(f"shape {list(shape)}")
    if type(raw["gate_up"]) is not bool or (raw["gate_up"] and shape[-2] % 2):
        raise ValueError(f"gate_up {raw['gate_up']!r} for {shape[-2]} rows")
    if raw["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r}")
    if not isinstance(checksum, str) or re.fullmatch("[0-9a-f]{64}", checksum) is None:
        raise ValueError(f"checksum {checksum!r}")
    entry = Entry(
        find_layout(raw["kind"]),
        raw["gate_up"],
        shape,
        _DTYPES[raw["dtype"]],
        layout_or_none(raw["shuffle_kind"]),
        checksum,
    )
    _check_keys(raw, "kind", "gate_up", "shape", "padded", "dtype", "shuffle_kind", "checksum")
    if isinstance(raw["padded"], list):
        found = Geometry.of_codes(*entry.geometry[:3], raw["padded"])
        entry = entry if found is None else entry._replace(align=found.align)
    if raw["padded"] != entry.padded or any(type(size) is not int for size in raw["padded"] or ()):
        raise ValueError(f"padded sizes {raw['padded']} for layout {entry.layout.name!r}, which has {entry.padded}")
    return entry


def _seal(tensors: object) -> str:
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()
