# SPDX-License-Identifier: MIT
"""How expert weights are named, cut and ordered in the checkpoints of the field, and how they are found by that."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.mxfp4 import BLOCK
from shuffled_tensor.tensor.geometry import PER_BYTE

__all__ = [
    "FORMATS",
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
    """How the gate and up rows of a w13 come: ``"interleaved"`` or ``"contiguous"`` in one tensor, or ``"apart"`` in
    two."""


_BY_EXPERT = r"(?P<prefix>(?:.+\.)?(?:shared_)?experts?)(?:\.(?P<expert>\d{1,9}))?"
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
                f"{name} and {base}.scale in {files.path} are in no manifest, so their layout is unknown"
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
    dtypes = {weight.files.dtype(name) for weight in weights.values() for name in weight.tensors["qdata"].values()}
    return is_shared(layer) and bool(dtypes) and dtypes.isdisjoint((*_CODE_DTYPES, *_PLAIN_DTYPES))


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known formats: 'auto', {', '.join(map(repr, FORMATS))}")
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
        f"no tensor of {_among(files, prefix)} is named as MXFP4 experts are in {', '.join(map(repr, FORMATS))}"
    )


def formats_in(files: Files, prefix: str = "") -> dict[str, str]:
    """The formats whose own name for codes is there, each with an example."""
    names = [name for name in files if name.startswith(prefix)]
    examples: dict[str, str] = {}
    for format, row in FORMATS.items():
        own = next(iter(row.parts))
        for name in names:
            match = row.pattern.fullmatch(name)
            if match is not None and match["part"] == own and files.dtype(name) in _CODE_DTYPES:
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
    halves = 2 if weight.gate_up and weight.row_order == "apart" else 1
    experts = shape[0] if stacked and shape else len({expert for expert, _ in codes})
    lead = (experts,) if stacked else ()
    if weight.entry is not None:
        logical, weight.dtype = (1, *weight.entry.shape)[-3:], weight.entry.dtype
        expected = dict(zip(PER_BYTE, weight.entry.stored_shapes(), strict=True))
        if stacked != (len(weight.entry.shape) == 3) or weight.entry.gate_up != weight.gate_up:
            what = f"{list(weight.entry.shape)} with gate_up={weight.entry.gate_up}"
            raise _wrong(weight, first, f"is {what} by its manifest, not [experts, N, K] with gate_up={weight.gate_up}")
    else:
        if weight.row_order == "contiguous" and weight.quantized:
            raise _wrong(weight, first, "is in no manifest, so its layout is unknown")
        rows, columns = _logical(weight, first, shape[len(lead) :])
        logical = (experts, rows * halves, columns)
        expected = {"qdata": shape, "scale": (*lead, rows, columns // BLOCK)}
    weight.shape = (logical[0], logical[1], logical[2])
    if weight.gate_up and weight.shape[1] % 2:
        raise _wrong(weight, first, f"has {weight.shape[1]} rows, which are no gate and up")
    expected["bias"] = (*lead, weight.shape[1] // halves)
    biases = [weight.files.dtype(name) for name in weight.tensors["bias"].values()]
    dtypes = {
        "qdata": _CODE_DTYPES if weight.quantized else (dtype,),
        "scale": _SCALE_DTYPES,
        "bias": tuple(biases[:1]) if set(biases[:1]) <= set(_PLAIN_DTYPES) else _PLAIN_DTYPES,
    }
    keys = [(None, 0)] if stacked else [(expert, half) for expert in range(experts) for half in range(halves)]
    for part in ("qdata", *(["scale"] if weight.quantized else []), *(["bias"] if weight.tensors["bias"] else [])):
        _check_part(weight, first, part, keys, dtypes[part], expected[part])


def _logical(weight: Weight, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of codes or plain values, from its shape without experts."""
    rows, columns = 0, 0
    if len(shape) == 2:
        rows, columns = shape[0], shape[1] * (PER_BYTE["qdata"] if weight.quantized else 1)
    elif len(shape) == 3 and shape[2] == 16 and weight.quantized:
        rows, columns = shape[0], shape[1] * BLOCK
    if not rows or not columns or (weight.quantized and columns % BLOCK):
        wanted = "[N, K/2] or [N, K/32, 16], K in blocks of 32" if weight.quantized else "[N, K]"
        raise _wrong(weight, name, f"has shape {list(shape)} an expert, not {wanted}")
    return rows, columns


def _check_part(
    weight: Weight,
    first: str,
    part: str,
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
