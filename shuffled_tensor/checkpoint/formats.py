# SPDX-License-Identifier: MIT
"""How expert weights are named, cut and ordered in the checkpoints of the field: one row a format."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.files import CheckpointError, Files
from shuffled_tensor.geometry import PER_BYTE
from shuffled_tensor.layouts import ShuffleKind, unshuffle_scale, unshuffle_weight
from shuffled_tensor.mxfp4 import BLOCK
from shuffled_tensor.storage import checksum

__all__ = ["FORMATS", "Layer", "Weight", "check_layer", "detect", "find_layers", "group_layers", "manifest_weights"]

_CODE_DTYPES = (torch.uint8, torch.int8)
_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
_PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Format(NamedTuple):
    """A row of :data:`FORMATS`."""

    pattern: re.Pattern[str]
    """Of a tensor's name, with the groups prefix, projection and part, and expert where each has tensors of its own."""
    projections: dict[str, tuple[str, int]]
    """What a projection is part of, ``"w13"`` or ``"w2"``, and which half of it."""
    parts: dict[str, str]
    """What a part is: ``"qdata"`` (or a plain weight, where it is floating point), ``"scale"`` or ``"bias"``."""
    row_order: str
    """How gate and up rows come in one tensor; ``"apart"`` where they are two."""


_BY_EXPERT = r"(?P<prefix>(?:.+\.)?(?:shared_)?experts?)(?:\.(?P<expert>\d+))?"
_GATE_UP_DOWN = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)}

FORMATS = {
    "gpt-oss": Format(
        re.compile(
            r"(?P<prefix>(?:.+\.)?experts)\.(?P<projection>gate_up_proj|down_proj)_(?P<part>blocks|scales|bias)"
        ),
        {"gate_up_proj": ("w13", 0), "down_proj": ("w2", 0)},
        {"blocks": "qdata", "scales": "scale", "bias": "bias"},
        "interleaved",
    ),
    "quark": Format(
        re.compile(_BY_EXPERT + r"\.(?P<projection>gate_proj|up_proj|down_proj)\.(?P<part>weight|weight_scale|bias)"),
        _GATE_UP_DOWN,
        {"weight": "qdata", "weight_scale": "scale", "bias": "bias"},
        "apart",
    ),
    "compressed-tensors": Format(
        re.compile(
            _BY_EXPERT
            + r"\.(?P<projection>gate_proj|up_proj|down_proj)\.(?P<part>weight_packed|weight|weight_scale|bias)"
        ),
        _GATE_UP_DOWN,
        {"weight_packed": "qdata", "weight": "qdata", "weight_scale": "scale", "bias": "bias"},
        "apart",
    ),
    "deepseek": Format(
        re.compile(_BY_EXPERT + r"\.(?P<projection>w1|w2|w3)\.(?P<part>weight|scale)"),
        {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)},
        {"weight": "qdata", "scale": "scale"},
        "apart",
    ),
    "shuffled_tensor": Format(
        re.compile(r"(?:(?P<prefix>.+)\.)?(?P<projection>w13|w2)_(?P<part>weight\.qdata|weight\.scale|weight|bias)"),
        {"w13": ("w13", 0), "w2": ("w2", 0)},
        {"weight.qdata": "qdata", "weight": "qdata", "weight.scale": "scale", "bias": "bias"},
        "contiguous",
    ),
}


@dataclass
class Weight:
    """One of the two weights of a layer, as its tensors lie in the files."""

    files: Files
    name: str
    gate_up: bool
    row_order: str
    tensors: dict[str, dict[tuple[int | None, int], str]] = field(default_factory=lambda: defaultdict(dict))
    """Names, by part, and by expert (None: one tensor holds them all) and half."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """Logical, ``[E, N, K]``."""
    dtype: torch.dtype = torch.bfloat16
    quantized: bool = True
    """Else its values are plain, of `dtype`."""
    entry: manifest.Entry | None = None
    """What the file's manifest says of it."""

    @property
    def intermediate(self) -> int:
        return self.shape[1] // 2 if self.gate_up else self.shape[2]

    def read(self, part: str, expert: int, span: range) -> Tensor:
        """One expert's ``"qdata"`` (plain values where not quantised), ``"scale"`` or ``"bias"``, row-major and gate
        rows first. ``span`` is of the intermediate dimension: rows of both halves of a w13, columns of a w2."""
        if not self.gate_up:
            per_byte = 1 if part == "bias" or not self.quantized else PER_BYTE[part]
            columns = slice(span.start // per_byte, span.stop // per_byte)
            return self._rows(part, expert, 0, slice(None), slice(None) if part == "bias" else columns)
        if self.row_order == "interleaved":
            rows = self._rows(part, expert, 0, slice(2 * span.start, 2 * span.stop))
            return torch.cat([rows[0::2], rows[1::2]])
        half, offset = (1, 0) if self.row_order == "apart" else (0, self.intermediate)
        gate = self._rows(part, expert, 0, slice(span.start, span.stop))
        up = self._rows(part, expert, half, slice(offset + span.start, offset + span.stop))
        return torch.cat([gate, up])

    def checksum(self) -> str:
        """Of the logical value as it is stored."""
        span = range(self.intermediate)
        parts = ("qdata", "scale")
        return checksum(self.shape, (self.read(part, e, span) for e in range(self.shape[0]) for part in parts))

    def _rows(self, part: str, expert: int, half: int, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Rows of one tensor as plain values, or as bytes."""
        stacked = (None, 0) in self.tensors[part]
        name = self.tensors[part][None if stacked else expert, half]
        lead = (expert,) if stacked else ()
        if self.entry is not None and self.entry.kind is not ShuffleKind.NONE and part in PER_BYTE:
            return self._canonical(name, part, expert)[rows, columns]
        shape = self.files.shape(name)
        if len(shape) == 1 + len(lead):
            return self.files.read(name, *lead, rows)
        if len(shape) == 3 + len(lead):  # blocks [..., K/32, 16]
            columns = slice(*(None if end is None else end // shape[-1] for end in (columns.start, columns.stop)))
            return self.files.read(name, *lead, rows, columns).flatten(-2)
        data = self.files.read(name, *lead, rows, columns)
        return data.view(torch.uint8) if data.dtype.itemsize == 1 else data

    def _canonical(self, name: str, part: str, expert: int) -> Tensor:
        assert self.entry is not None
        stored = self.files.read(name, slice(expert, expert + 1)).contiguous()
        unshuffle = unshuffle_weight if part == "qdata" else unshuffle_scale
        data = unshuffle(stored, self.entry.kind, gate_up=self.gate_up)
        return self.entry.geometry.halves_of(data).flatten(1, 2)[0]


class Layer(NamedTuple):
    """The experts of one layer."""

    w13: Weight
    w2: Weight


def manifest_weights(files: Files) -> dict[str, Weight]:
    """The weights that manifests describe.

    Raises:
        CheckpointError: as :func:`manifest.parse`; missing parts, other shapes, or parts without an entry.
    """
    found = {}
    for file in files.files():
        for name, entry in manifest.parse(files.metadata(file), file).items():
            key = (None, 0) if len(entry.shape) == 3 else (0, 0)
            weight = Weight(files, name, entry.gate_up, "contiguous", entry=entry)
            for part in PER_BYTE:
                if f"{name}.{part}" not in files:
                    raise CheckpointError(f"{name}.{part}, which the manifest of {file} describes, is missing")
                weight.tensors[part][key] = f"{name}.{part}"
            _measure(weight)
            found[name] = weight
    for name in files:
        base = name.removesuffix(".qdata")
        if base != name and f"{base}.scale" in files and base not in found:
            raise CheckpointError(
                f"{name} and {base}.scale in {files.path} are no entry of its manifest, so their layout is unknown"
            )
    return found


def find_layers(files: Files, prefix: str = "", format: str = "auto") -> dict[str, Layer]:
    """The expert layers whose names begin with ``prefix``, by what their names have in common.

    Raises:
        CheckpointError: no tensor, or tensors of two formats, are named as MXFP4 experts; a part is missing, doubled,
            or has another shape or dtype than the rest.
        ValueError: an unknown format.
    """
    return {layer: check_layer(layer, weights) for layer, weights in group_layers(files, prefix, format).items()}


def group_layers(files: Files, prefix: str, format: str) -> dict[str, dict[str, Weight]]:
    """The tensors named as expert weights, by layer and by ``"w13"`` and ``"w2"``; whether they fit is not looked at.

    Raises:
        CheckpointError: no tensor, or tensors of two formats, are named as MXFP4 experts; a part is doubled.
        ValueError: an unknown format.
    """
    row = FORMATS[detect(files, prefix) if format == "auto" else _known(format)]
    entries = {file: manifest.parse(files.metadata(file), file) for file in files.files()}
    found: dict[str, dict[str, Weight]] = defaultdict(dict)
    for name in (name for name in files if name.startswith(prefix)):
        match = row.pattern.fullmatch(name)
        if match is None:
            continue
        layer, (which, half), part = (
            match["prefix"] or "",
            row.projections[match["projection"]],
            row.parts[match["part"]],
        )
        if which not in found[layer]:
            found[layer][which] = Weight(files, f"{layer}.{which}_weight".lstrip("."), which == "w13", row.row_order)
        weight = found[layer][which]
        key = (int(match["expert"] or 0) if "expert" in row.pattern.groupindex else None, half)
        if key in weight.tensors[part]:
            raise CheckpointError(
                f"{weight.tensors[part][key]} and {name} in {files.path} are the same part of {layer}"
            )
        weight.tensors[part][key] = name
        if part == "qdata":
            weight.entry = entries[files.file(name)].get(name.removesuffix(".qdata"))
    if not found:
        raise CheckpointError(f"no tensor of {files.path} that begins with {prefix!r} is named as in format {format!r}")
    return dict(sorted(found.items()))


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known formats: 'auto', {', '.join(map(repr, FORMATS))}")
    return format


def detect(files: Files, prefix: str = "") -> str:
    """The format whose own name for codes is there.

    Raises:
        CheckpointError: there are none, or those of two formats.
    """
    names = [name for name in files if name.startswith(prefix)]
    examples: dict[str, str] = {}
    for format, row in FORMATS.items():
        own = next(iter(row.parts))
        for name in names:
            match = row.pattern.fullmatch(name)
            if match is not None and match["part"] == own and files.dtype(name) in _CODE_DTYPES:
                examples[format] = name
                break
    if len(examples) == 1:
        return next(iter(examples))
    if examples:
        both = " and ".join(f"{name} as in {format!r}" for format, name in examples.items())
        raise CheckpointError(f"{files.path} holds {both}; say which with format=")
    raise CheckpointError(
        f"no tensor of {files.path} that begins with {prefix!r} is named as MXFP4 experts are in "
        f"{', '.join(map(repr, FORMATS))}"
    )


def check_layer(layer: str, weights: dict[str, Weight]) -> Layer:
    """One layer's weights, measured.

    Raises:
        CheckpointError: a part is missing, or has another shape or dtype than the rest.
    """
    for which in ("w13", "w2"):
        if which not in weights or not weights[which].tensors["qdata"]:
            raise CheckpointError(f"{layer} in {next(iter(weights.values())).files.path} has no {which}")
        _measure(weights[which])
    w13, w2 = weights["w13"], weights["w2"]
    experts, rows, hidden = w13.shape
    if w2.shape != (experts, hidden, rows // 2):
        raise CheckpointError(
            f"{layer}: for w13 [experts, 2I, K] = {list(w13.shape)}, w2 must be {[experts, hidden, rows // 2]}, found "
            f"{list(w2.shape)} in {w2.files.path}"
        )
    return Layer(w13, w2)


def _measure(weight: Weight) -> None:
    """Fill in what the tensors' shapes and dtypes say, and check that they all say the same."""
    codes = weight.tensors["qdata"]
    first = next(iter(codes.values()))
    shape, dtype = weight.files.shape(first), weight.files.dtype(first)
    stacked = (None, 0) in codes
    weight.quantized = dtype in _CODE_DTYPES
    if not weight.quantized:
        if dtype not in _PLAIN_DTYPES:
            raise _wrong(weight, first, f"is {dtype}; codes are uint8 or int8, plain weights floating point")
        weight.dtype = dtype
    experts = shape[0] if stacked else 1 + max(expert or 0 for expert, _ in codes)
    halves = 2 if weight.gate_up and weight.row_order == "apart" else 1
    keys = [(None, 0)] if stacked else [(expert, half) for expert in range(experts) for half in range(halves)]
    if weight.entry is not None:
        expected = dict(zip(("qdata", "scale"), weight.entry.stored_shapes(), strict=True))
        logical, weight.dtype = (1, *weight.entry.shape)[-3:], weight.entry.dtype
        if stacked != (len(weight.entry.shape) == 3) or weight.entry.gate_up != weight.gate_up:
            what = f"{list(weight.entry.shape)} with gate_up={weight.entry.gate_up}"
            raise _wrong(weight, first, f"is {what} by its manifest, not [experts, N, K] with gate_up={weight.gate_up}")
    else:
        if weight.row_order == "contiguous" and weight.quantized:
            raise _wrong(weight, first, "has no manifest, which files of shuffled_tensor have")
        expected, logical = _expected(weight, first, shape[1:] if stacked else shape, experts, halves, stacked)
    weight.shape = (logical[0], logical[1], logical[2])
    if weight.gate_up and weight.shape[1] % 2:
        raise _wrong(weight, first, f"has {weight.shape[1]} rows, which are no gate and up")
    expected["bias"] = ((experts,) if stacked else ()) + (weight.shape[1] // halves,)
    for part in ("qdata", *(["scale"] if weight.quantized else []), *(["bias"] if weight.tensors["bias"] else [])):
        dtypes = {
            "qdata": _CODE_DTYPES if weight.quantized else (dtype,),
            "scale": _SCALE_DTYPES,
            "bias": _PLAIN_DTYPES,
        }
        missing = [key for key in keys if key not in weight.tensors[part]]
        if missing or len(weight.tensors[part]) != len(keys):
            where = "" if stacked or not missing else f" of expert {missing[0][0]}"
            raise _wrong(weight, first, f"has no {part}{where} beside it, or one too many")
        for name in weight.tensors[part].values():
            if weight.files.dtype(name) not in dtypes[part]:
                raise _wrong(weight, name, f"is {weight.files.dtype(name)}, not {' or '.join(map(str, dtypes[part]))}")
            if weight.files.shape(name) != expected[part]:
                raise _wrong(weight, name, f"has shape {list(weight.files.shape(name))}, not {list(expected[part])}")


def _expected(
    weight: Weight, first: str, shape: tuple[int, ...], experts: int, halves: int, stacked: bool
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """The shapes of codes and scales, and the logical one, that follow from those of the first codes."""
    lead = (experts,) if stacked else ()
    if not weight.quantized:
        if len(shape) != 2:
            raise _wrong(weight, first, f"has shape {list(shape)} an expert, not [N, K]")
        return {"qdata": lead + shape}, (experts, shape[0] * halves, shape[1])
    columns = 2 * shape[1] if len(shape) == 2 else BLOCK * shape[1] if len(shape) == 3 and shape[2] == 16 else 0
    if not columns or columns % BLOCK:
        raise _wrong(
            weight, first, f"has shape {list(shape)} an expert, not [N, K/2] or [N, K/32, 16], K in blocks of 32"
        )
    return {"qdata": lead + shape, "scale": (*lead, shape[0], columns // BLOCK)}, (experts, shape[0] * halves, columns)


def _wrong(weight: Weight, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{name} in {weight.files.file(name)} {what}")
