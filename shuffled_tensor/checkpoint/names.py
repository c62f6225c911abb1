# SPDX-License-Identifier: MIT
"""How expert weights are named, cut and ordered in the checkpoints of the field, and how they are found by that."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.measure import PLAIN_DTYPES, measure
from shuffled_tensor.checkpoint.others import recognised
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, Part
from shuffled_tensor.tensor.checks import check_row_order
from shuffled_tensor.tensor.geometry import RowOrder

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
    "unknown_tensors",
]

_log = logging.getLogger("shuffled_tensor")


class Projections(NamedTuple):
    """A row of :data:`PROJECTIONS`."""

    before: str
    """A pattern of what stands before a projection's name, with the group prefix, and expert where each expert has
    tensors of its own."""
    names: dict[str, tuple[str, int]]
    """What a projection is part of, ``"w13"`` or ``"w2"``, and which half of it."""
    apart: bool
    """Whether gate and up rows come in two tensors."""


class Parts(NamedTuple):
    """A row of :data:`PART_NAMES`."""

    names: dict[str, Part | str]
    """What follows a projection's name. The first is the format's own name for codes, and codes that are floating point
    are a plain weight."""
    row_order: RowOrder | None
    """Of gate and up rows that are in one tensor; None where it is one in some models and the other in others."""


_EXPERT = r"(?P<prefix>(?:.+\.)?(?:shared_)?experts?)(?:\.(?P<expert>\d{1,9}))?\."

PROJECTIONS = (
    Projections(_EXPERT, {"gate_up_proj": ("w13", 0), "down_proj": ("w2", 0)}, apart=False),
    Projections(_EXPERT, {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)}, apart=True),
    Projections(_EXPERT, {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)}, apart=True),
)
"""Each of which goes with each row of :data:`PART_NAMES` but our own."""

_OWN = Projections(r"(?:(?P<prefix>.+)\.)?", {"w13": ("w13", 0), "w2": ("w2", 0)}, apart=False)

FormatName = Literal["auto", "gpt-oss", "quark", "compressed-tensors", "deepseek", "shuffled_tensor"]
"""What a caller may say of a checkpoint: a row of :data:`PART_NAMES`, or to have it read off the names."""

PART_NAMES = {
    "gpt-oss": Parts({"_blocks": CODES, "_scales": SCALES, "_bias": BIAS}, "interleaved"),
    "quark": Parts({".weight": CODES, ".weight_scale": SCALES, ".bias": BIAS}, None),
    "compressed-tensors": Parts(
        {".weight_packed": CODES, ".weight": CODES, ".weight_scale": SCALES, ".bias": BIAS}, None
    ),
    "deepseek": Parts({".weight": CODES, ".scale": SCALES}, None),
    "shuffled_tensor": Parts(
        {"_weight.qdata": CODES, "_weight": CODES, "_weight.scale": SCALES, "_bias": BIAS}, "contiguous"
    ),
}
"""By format."""


_EXPERTS = re.compile(r"(?P<layer>(?:.+\.)?\w*experts?)\.")
"""What the name of any tensor of experts begins with, in whatever format."""


class _Name(NamedTuple):
    """What a tensor's name says."""

    layer: str
    which: str
    half: int
    part: Part | str
    expert: int | None
    """None where one tensor holds them all; 0 of a shared one, which has no number."""
    row_order: RowOrder | Literal["apart"] | None
    own: bool
    """Whether the format alone calls codes so."""


def _parse(name: str, format: str) -> _Name | None:
    parts, row_order = PART_NAMES[format]
    for pattern, row in _patterns(format):
        match = pattern.fullmatch(name)
        if match is not None:
            layer = match["prefix"] or ""
            number = None if row is _OWN else match["expert"] or ("0" if is_shared(layer) else None)
            expert = None if number is None else int(number)
            which, half = row.names[match["projection"]]
            order = "apart" if row.apart else row_order
            return _Name(layer, which, half, parts[match["part"]], expert, order, match["part"] == next(iter(parts)))
    return None


@cache
def _patterns(format: str) -> list[tuple[re.Pattern[str], Projections]]:
    """Of the names in a format, each with its row of projections."""
    parts = "|".join(map(re.escape, PART_NAMES[format].names))
    rows = (_OWN,) if format == "shuffled_tensor" else PROJECTIONS
    return [
        (re.compile(f"{row.before}(?P<projection>{'|'.join(map(re.escape, row.names))})(?P<part>{parts})"), row)
        for row in rows
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
            measure(weight)
            found[name] = weight
    for name in files:
        base = name.removesuffix(".qdata")
        if base != name and f"{base}.scale" in files and base not in found:
            raise CheckpointError(
                f"{name} and {base}.scale in {files.path} are in no manifest, so their layout is unknown"
            )
    return found


def find_layers(
    files: Files, prefix: str = "", format: FormatName = "auto", row_order: RowOrder | None = None
) -> dict[str, Layer]:
    """The expert layers whose names begin with ``prefix``, by what their names have in common.

    Raises:
        CheckpointError: no tensor, or tensors of two formats, are named as MXFP4 experts; a part is missing, doubled,
            or has another shape or dtype than the rest; gate and up rows are in one tensor, and nobody says how.
        ValueError: an unknown format or row order, or one that is not the format's.
    """
    layers = group_layers(files, prefix, format, row_order)
    for problem in unknown_tensors(files, layers.items(), prefix, format).values():
        raise CheckpointError(problem)
    return {layer: check_layer(layer, weights) for layer, weights in layers.items()}


def unknown_tensors(
    files: Files, layers: Iterable[tuple[str, dict[str, Weight]]], prefix: str, format: FormatName
) -> dict[str, str]:
    """What is wrong with tensors that belong to experts by their names, and to none of the weights found: an outer
    scale or an order of columns, which changes every value, or experts in a format that is not known. By layer.

    Experts in no format that are plain, and shared ones that are not packed, are left out with a warning; those of
    another format too, where the caller said which is wanted.
    """
    layers = list(layers)
    read = {name for _, weights in layers for weight in weights.values() for name in weight.names()}
    described = {name for file in files.files() for name in manifest.parse(files.metadata(file), file)}
    read |= {f"{name}.{part}" for name in described for part in PARTS}
    # beside our own weights, which are parameters of a module, there may be other buffers of it
    own = {layer for layer, weights in layers if any(weight.own for weight in weights.values())}
    own |= {match["layer"] for match in map(_EXPERTS.match, described) if match is not None}
    companions = [(layer, re.compile(re.escape(f"{layer}.".lstrip(".")) + r"w(13|2)_")) for layer in own]
    theirs = {layer for layer, _ in layers} - own
    others = [] if format == "auto" else [other for other in formats_in(files, prefix) if other != format]
    found, left_out = defaultdict(list), set()
    for name in (name for name in files if name.startswith(prefix) and name not in read):
        layer = next((layer for layer, pattern in companions if pattern.match(name)), None)
        match = _EXPERTS.match(name)
        if layer is not None:
            found[layer].append(name)
        elif match is not None:
            layer = match["layer"]
            if any(_parse(name, other) is not None for other in others):
                left_out.add(layer)
            elif layer in theirs:
                found[layer].append(name)
            elif layer in own or is_shared(layer):
                if files.is_any_of(name, CODES.dtypes) and "scale" not in name:
                    found[layer].append(name)
                left_out.add(layer)
            elif files.is_any_of(name, PLAIN_DTYPES):
                left_out.add(layer)
            else:
                found[layer].append(name)
    for layer in sorted(left_out - own - theirs - set(found)):
        why = "its weights are neither MXFP4 nor plain" if is_shared(layer) else "its names are not those of the format"
        _log.warning("left out %s of %s: %s", layer, files.path, why)
    problems = {layer: _unknown(files, layer, names) for layer, names in sorted(found.items())}
    if format == "auto":
        there = {weight.name for _, weights in layers for weight in weights.values()}
        for name in manifest.parse_beside(files.path):
            if name.startswith(prefix) and name not in there:
                problems[name.rpartition(".")[0]] = (
                    f"{name}, of which {manifest.BESIDE} in {files.path} has a checksum, is not there: a shard is "
                    "missing or was changed; remove that file if this is meant"
                )
    return problems


def _unknown(files: Files, layer: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors of {layer} are" if len(names) > 1 else " is"
    return (
        f"{names[0]} in {files.file(names[0])}{more} named as in no format that is known, so what it says of the "
        f"experts would be lost; load_experts(prefix=...) reads layers without such tensors{recognised(files, names)}"
    )


def group_layers(
    files: Files, prefix: str, format: str, row_order: RowOrder | None = None
) -> dict[str, dict[str, Weight]]:
    """The tensors named as expert weights, by layer and by ``"w13"`` and ``"w2"``; whether they fit is not looked at.

    Raises:
        CheckpointError: no tensor, or tensors of two formats, are named as MXFP4 experts; a part is doubled.
        ValueError: an unknown format or row order, or one that is not the format's.
    """
    format = detect(files, prefix) if format == "auto" else _known(format)
    if row_order is not None:
        check_row_order(True, row_order, rows=0)
        if PART_NAMES[format].row_order not in (None, row_order):
            raise ValueError(f"rows of format {format!r} are {PART_NAMES[format].row_order}, not {row_order}")
    entries = {file: manifest.parse(files.metadata(file), file) for file in files.files()}
    beside = manifest.parse_beside(files.path)
    found: dict[str, dict[str, Weight]] = defaultdict(dict)
    for name in (name for name in files if name.startswith(prefix)):
        said = _parse(name, format)
        if said is None:
            continue
        weights = found[said.layer]
        if said.which not in weights:
            base = f"{said.layer}.{said.which}_weight".lstrip(".")
            record = beside.get(base)
            gate_up = said.which == "w13"
            told = None if said.row_order or not gate_up else row_order or (record.row_order if record else None)
            if told is not None and record is not None and record.row_order not in (None, told):
                raise ValueError(f"{manifest.BESIDE} says that rows of {base} are {record.row_order}, not {told}")
            weights[said.which] = Weight(files, base, gate_up, said.row_order or told, told)
            weights[said.which].beside = None if record is None else record.checksums
        weight, key = weights[said.which], (said.expert, said.half)
        named = weight.tensors[said.part]
        if key in named:
            raise CheckpointError(f"{named[key]} and {name} in {files.path} are the same part of {said.layer}")
        named[key] = name
        if name.endswith(".qdata"):
            weight.entry = entries[files.file(name)].get(name.removesuffix(".qdata"))
    for layer in [layer for layer, weights in found.items() if _is_foreign(files, layer, weights, format)]:
        del found[layer]
    if not found:
        raise CheckpointError(f"no tensor of {_among(files, prefix)} is named as in format {format!r}")
    return dict(sorted(found.items()))


def _is_foreign(files: Files, layer: str, weights: dict[str, Weight], format: str) -> bool:
    """Whether these are experts of another format that calls codes or scales alike, or shared ones in some other
    quantisation, as DeepSeek V4's are in fp8."""
    codes, scales = ([name for w in weights.values() for name in w.tensors[part].values()] for part in PARTS)
    if not (codes and scales):
        found, missing = (codes, SCALES) if codes else (scales, CODES)
        for other, (parts, _) in PART_NAMES.items():
            for name in found if other != format else ():
                stems = [name.removesuffix(suffix) for suffix in parts if name.endswith(suffix)]
                ends = [suffix for suffix, part in parts.items() if part is missing]
                if any(stem + end in files for stem in stems for end in ends):
                    return True
    known = (*CODES.dtypes, *PLAIN_DTYPES)
    return is_shared(layer) and bool(codes) and not any(files.is_any_of(name, known) for name in codes)


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
        f"{recognised(files, (name for name in files if name.startswith(prefix)))}"
    )


def formats_in(files: Files, prefix: str = "") -> dict[str, str]:
    """The formats whose own name for codes is there, each with an example. Of those that call codes alike, the one
    whose name for scales stands beside them."""
    names = [name for name in files if name.startswith(prefix)]
    examples: dict[str, str] = {}
    beside: dict[str, str] = {}
    for format, (parts, _) in PART_NAMES.items():
        codes = next(iter(parts))
        scales = next(suffix for suffix, part in parts.items() if part is SCALES)
        for name in (name for name in names if name.endswith(codes)):
            said = _parse(name, format)
            if said is not None and said.own and files.is_any_of(name, CODES.dtypes):
                examples.setdefault(format, name)
                if name.removesuffix(codes) + scales in files:
                    beside[format] = name
                    break
    first: dict[str, str] = {}  # without scales, the first of those that call codes alike will do
    for format, name in examples.items():
        first.setdefault(name, format)
    return beside or {format: name for name, format in first.items()}


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
        measure(weights[which])
    w13, w2 = weights["w13"], weights["w2"]
    experts, rows, hidden = w13.shape
    if w2.shape != (experts, hidden, rows // 2):
        raise CheckpointError(
            f"{layer}: for w13 [experts, 2I, K] = {list(w13.shape)}, w2 must be {[experts, hidden, rows // 2]}, found "
            f"{list(w2.shape)} in {w2.files.path}"
        )
    return Layer(w13, w2)
