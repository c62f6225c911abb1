# SPDX-License-Identifier: MIT
"""How expert weights are named, cut and ordered in the checkpoints of the field, and how they are found by that."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.mxfp4 import BLOCK, CODES, PARTS, SCALES, Part

__all__ = [
    "PART_NAMES",
    "PROJECTIONS",
    "FormatName",
    "Layer",
    "check_layer",
    "detect",
    "find_layers",
    "formats_in",
    "group_layers",
    "is_shared",
    "manifest_weights",
]

_log = logging.getLogger("shuffled_tensor")

_PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Projections(NamedTuple):
    """A row of :data:`PROJECTIONS`."""

    before: str
    """A pattern of what stands before a projection's name, with the group prefix, and expert where each expert has
    tensors of its own."""
    names: dict[str, tuple[str, int]]
    """What a projection is part of, ``"w13"`` or ``"w2"``, and which half of it."""
    row_order: str
    """How the gate and up rows of a w13 come: ``"interleaved"`` or ``"contiguous"`` in one tensor, or ``"apart"`` in
    two."""
    formats: tuple[str, ...]
    """The rows of :data:`PART_NAMES` that it goes with."""


_BY_EXPERT = r"(?P<prefix>(?:.+\.)?(?:shared_)?experts?)(?:\.(?P<expert>\d{1,9}))?\."

PROJECTIONS = (
    Projections(
        r"(?P<prefix>(?:.+\.)?experts)\.",
        {"gate_up_proj": ("w13", 0), "down_proj": ("w2", 0)},
        "interleaved",
        ("gpt-oss",),
    ),
    Projections(
        _BY_EXPERT,
        {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)},
        "apart",
        ("quark", "compressed-tensors"),
    ),
    Projections(_BY_EXPERT, {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)}, "apart", ("deepseek",)),
    Projections(r"(?:(?P<prefix>.+)\.)?", {"w13": ("w13", 0), "w2": ("w2", 0)}, "contiguous", ("shuffled_tensor",)),
)

FormatName = Literal["auto", "gpt-oss", "quark", "compressed-tensors", "deepseek", "shuffled_tensor"]
"""What a caller may say of a checkpoint: a row of :data:`PART_NAMES`, or to have it read off the names."""

PART_NAMES: dict[str, dict[str, Part | str]] = {
    # by format; what follows a projection's name. The first is the format's own name for codes, and codes that are
    # floating point are a plain weight.
    "gpt-oss": {"_blocks": CODES, "_scales": SCALES, "_bias": BIAS},
    "quark": {".weight": CODES, ".weight_scale": SCALES, ".bias": BIAS},
    "compressed-tensors": {".weight_packed": CODES, ".weight": CODES, ".weight_scale": SCALES, ".bias": BIAS},
    "deepseek": {".weight": CODES, ".scale": SCALES},
    "shuffled_tensor": {"_weight.qdata": CODES, "_weight": CODES, "_weight.scale": SCALES, "_bias": BIAS},
}


class _Name(NamedTuple):
    """What a tensor's name says."""

    layer: str
    which: str
    half: int
    part: Part | str
    expert: int | None
    """None where one tensor holds them all."""
    row_order: str
    own: bool
    """Whether the format alone calls codes so."""


def _parse(name: str, format: str) -> _Name | None:
    for pattern, row in _patterns(format):
        match = pattern.fullmatch(name)
        if match is not None:
            expert = int(match["expert"] or 0) if "expert" in pattern.groupindex else None
            which, half = row.names[match["projection"]]
            parts = PART_NAMES[format]
            part, own = parts[match["part"]], match["part"] == next(iter(parts))
            return _Name(match["prefix"] or "", which, half, part, expert, row.row_order, own)
    return None


@cache
def _patterns(format: str) -> list[tuple[re.Pattern[str], Projections]]:
    """Of the names in a format, each with its row of projections."""
    parts = "|".join(map(re.escape, PART_NAMES[format]))
    rows = [row for row in PROJECTIONS if format in row.formats]
    projections = ["|".join(map(re.escape, row.names)) for row in rows]
    return [
        (re.compile(f"{row.before}(?P<projection>{names})(?P<part>{parts})"), row)
        for row, names in zip(rows, projections, strict=True)
    ]


class Layer(NamedTuple):
    """The experts of one layer."""

    w13: Weight
    w2: Weight


def is_shared(layer: str) -> bool:
    """Whether a layer's name is that of shared experts, which every token goes through."""
    return layer.rpartition(".")[2].startswith("shared_")


def manifest_weights(files: Files) -> dict[str, Weight]:
    """The weights that manifests describe.

    Raises:
        CheckpointError: as :func:`manifest.parse`; missing parts, other shapes, or parts without an entry.
    """
    found: dict[str, Weight] = {}
    for file in files.files():
        for name, entry in manifest.parse(files.metadata(file), file).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in the manifests of {found[name].files.file(f'{name}.qdata')} and {file}"
                )
            key = (None, 0) if len(entry.shape) == 3 else (0, 0)
            weight = Weight(files, name, entry.gate_up, "contiguous", entry=entry)
            for part in PARTS:
                if f"{name}.{part}" not in files:
                    raise CheckpointError(f"{name}.{part}, which the manifest of {file} describes, is missing")
                weight.tensors[part][key] = f"{name}.{part}"
            _measure(weight)
            found[name] = weight
    for name in files:
        base = name.removesuffix(".qdata")
        if base != name and f"{base}.scale" in files and base not in found:
            raise CheckpointError(
                f"{name} and {base}.scale in {files.path} are in no manifest, so their layout is unknown"
            )
    return found


def find_layers(files: Files, prefix: str = "", format: FormatName = "auto") -> dict[str, Layer]:
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
    format = detect(files, prefix) if format == "auto" else _known(format)
    entries = {file: manifest.parse(files.metadata(file), file) for file in files.files()}
    found: dict[str, dict[str, Weight]] = defaultdict(dict)
    for name in (name for name in files if name.startswith(prefix)):
        said = _parse(name, format)
        if said is None:
            continue
        weights = found[said.layer]
        if said.which not in weights:
            base = f"{said.layer}.{said.which}_weight".lstrip(".")
            weights[said.which] = Weight(files, base, said.which == "w13", said.row_order)
        weight, key = weights[said.which], (said.expert, said.half)
        named = weight.tensors[said.part]
        if key in named:
            raise CheckpointError(f"{named[key]} and {name} in {files.path} are the same part of {said.layer}")
        named[key] = name
        if name.endswith(".qdata"):
            weight.entry = entries[files.file(name)].get(name.removesuffix(".qdata"))
    for layer in [layer for layer, weights in found.items() if _is_foreign(layer, weights)]:
        _log.warning("left out %s of %s: its weights are neither MXFP4 nor plain", layer, files.path)
        del found[layer]
    if not found:
        raise CheckpointError(f"no tensor of {_among(files, prefix)} is named as in format {format!r}")
    return dict(sorted(found.items()))


def _is_foreign(layer: str, weights: dict[str, Weight]) -> bool:
    """Whether these are shared experts in some other quantisation, as DeepSeek V4's are in fp8."""
    dtypes = {weight.files.dtype(name) for weight in weights.values() for name in weight.tensors[CODES].values()}
    return is_shared(layer) and bool(dtypes) and dtypes.isdisjoint((*CODES.dtypes, *_PLAIN_DTYPES))


def _known(format: str) -> str:
    if format not in PART_NAMES:
        raise ValueError(f"unknown format {format!r}; known formats: 'auto', {', '.join(map(repr, PART_NAMES))}")
    return format


def detect(files: Files, prefix: str = "") -> str:
    """The format whose own name for codes is there.

    Raises:
        CheckpointError: there are none, or those of two formats.
    """
    examples = formats_in(files, prefix)
    if len(examples) == 1:
        return next(iter(examples))
    if examples:
        both = " and ".join(f"{name} as in {format!r}" for format, name in examples.items())
        raise CheckpointError(f"{files.path} holds {both}; say which with format=")
    raise CheckpointError(
        f"no tensor of {_among(files, prefix)} is named as MXFP4 experts are in {', '.join(map(repr, PART_NAMES))}"
    )


def formats_in(files: Files, prefix: str = "") -> dict[str, str]:
    """The formats whose own name for codes is there, each with an example."""
    names = [name for name in files if name.startswith(prefix)]
    examples: dict[str, str] = {}
    for format in PART_NAMES:
        for name in names:
            said = _parse(name, format)
            if said is not None and said.own and files.dtype(name) in CODES.dtypes:
                examples[format] = name
                break
    return examples


def _among(files: Files, prefix: str) -> str:
    return f"{files.path}" + (f" that begins with {prefix!r}" if prefix else "")


def check_layer(layer: str, weights: dict[str, Weight]) -> Layer:
    """One layer's weights, measured.

    Raises:
        CheckpointError: a part is missing, or has another shape or dtype than the rest.
    """
    for which in ("w13", "w2"):
        if which not in weights or not weights[which].tensors[CODES]:
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
    codes = weight.tensors[CODES]
    first = next(iter(codes.values()))
    shape, dtype = weight.files.shape(first), weight.files.dtype(first)
    stacked = (None, 0) in codes
    weight.quantized = dtype in CODES.dtypes
    if not weight.quantized:
        if dtype not in _PLAIN_DTYPES:
            raise _wrong(weight, first, f"is {dtype}; codes are uint8 or int8, plain weights floating point")
        weight.dtype = dtype
    halves = 2 if weight.gate_up and weight.row_order == "apart" else 1
    experts = shape[0] if stacked and shape else len({expert for expert, _ in codes})
    lead = (experts,) if stacked else ()
    if weight.entry is not None:
        logical, weight.dtype = (1, *weight.entry.shape)[-3:], weight.entry.dtype
        expected = {part: weight.entry.stored_shape(part) for part in PARTS}
        if stacked != (len(weight.entry.shape) == 3) or weight.entry.gate_up != weight.gate_up:
            what = f"{list(weight.entry.shape)} with gate_up={weight.entry.gate_up}"
            raise _wrong(weight, first, f"is {what} by its manifest, not [experts, N, K] with gate_up={weight.gate_up}")
    else:
        if weight.row_order == "contiguous" and weight.quantized:
            raise _wrong(weight, first, "is in no manifest, so its layout is unknown")
        rows, columns = _logical(weight, first, shape[len(lead) :])
        logical = (experts, rows * halves, columns)
        expected = {CODES: shape, SCALES: (*lead, rows, columns // BLOCK)}
    weight.shape = (logical[0], logical[1], logical[2])
    if weight.gate_up and weight.shape[1] % 2:
        raise _wrong(weight, first, f"has {weight.shape[1]} rows, which are no gate and up")
    biases = [weight.files.dtype(name) for name in weight.tensors[BIAS].values()]
    one = tuple(biases[:1]) if set(biases[:1]) <= set(_PLAIN_DTYPES) else _PLAIN_DTYPES
    keys = [(None, 0)] if stacked else [(expert, half) for expert in range(experts) for half in range(halves)]
    _check_part(weight, first, CODES, keys, CODES.dtypes if weight.quantized else (dtype,), expected[CODES])
    if weight.quantized:
        _check_part(weight, first, SCALES, keys, SCALES.dtypes, expected[SCALES])
    if biases:
        _check_part(weight, first, BIAS, keys, one, (*lead, weight.shape[1] // halves))


def _logical(weight: Weight, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of codes or plain values, from its shape without experts."""
    rows, columns = 0, 0
    if len(shape) == 2:
        rows, columns = shape[0], shape[1] * (CODES.per_byte if weight.quantized else 1)
    elif len(shape) == 3 and shape[2] == 16 and weight.quantized:
        rows, columns = shape[0], shape[1] * BLOCK
    if not rows or not columns or (weight.quantized and columns % BLOCK):
        wanted = "[N, K/2] or [N, K/32, 16], K in blocks of 32" if weight.quantized else "[N, K]"
        raise _wrong(weight, name, f"has shape {list(shape)} an expert, not {wanted}")
    return rows, columns


def _check_part(
    weight: Weight,
    first: str,
    part: Part | str,
    keys: Sequence[tuple[int | None, int]],
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    """Whether all tensors of a part are there, and of one shape and a known dtype."""
    names = weight.tensors[part]
    missing = [key for key in keys if key not in names]
    if missing:
        expert, half = missing[0]
        where = ("" if expert is None else f" of expert {expert}") + (" (up)" if half else "")
        raise _wrong(weight, first, f"has no {part}{where} beside it")
    if len(names) > len(keys):
        extra = next(name for key, name in names.items() if key not in keys)
        raise _wrong(weight, extra, f"has no qdata beside it: there are {weight.shape[0]} experts")
    for name in names.values():
        if weight.files.dtype(name) not in dtypes:
            raise _wrong(weight, name, f"is {weight.files.dtype(name)}, not {' or '.join(map(str, dtypes))}")
        if weight.files.shape(name) != shape:
            raise _wrong(weight, name, f"has shape {list(weight.files.shape(name))}, not {list(shape)}")


def _wrong(weight: Weight, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{name} in {weight.files.file(name)} {what}")
