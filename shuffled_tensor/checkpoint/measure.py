# SPDX-License-Identifier: MIT
"""What the shapes and dtypes of a weight's tensors say of it, and whether they all say the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shuffled_tensor.checkpoint.source import CheckpointError
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.mxfp4 import BLOCK, CODES, PARTS, SCALES, Part

__all__ = ["PLAIN_DTYPES", "measure"]

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of weights that are not quantised, and of biases."""


def measure(weight: Weight) -> None:
    """Fill in what the tensors' shapes and dtypes say, and check that they all say the same.

    Raises:
        CheckpointError: they do not.
    """
    codes = weight.tensors[CODES]
    first = next(iter(codes.values()))
    shape, dtype = weight.files.shape(first), weight.files.dtype(first)
    stacked = (None, 0) in codes
    weight.quantized = dtype in CODES.dtypes
    if not weight.quantized:
        if dtype not in PLAIN_DTYPES:
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
        if weight.own and weight.quantized:
            raise _wrong(weight, first, "is in no manifest, so its layout is unknown")
        rows, columns = _logical(weight, first, shape[len(lead) :])
        logical = (experts, rows * halves, columns)
        expected = {CODES: shape, SCALES: (*lead, rows, columns // BLOCK)}
    weight.shape = (logical[0], logical[1], logical[2])
    recorded = weight.recorded
    if recorded is not None and recorded.experts is not None and len(recorded.experts) != weight.shape[0]:
        raise _wrong(weight, first, f"is of {weight.shape[0]} experts, and {len(recorded.experts)} have checksums")
    if weight.gate_up and weight.shape[1] % 2:
        raise _wrong(weight, first, f"has {weight.shape[1]} rows, which are no gate and up")
    if weight.gate_up and weight.row_order is None:
        raise _wrong(
            weight,
            first,
            "holds gate and up rows in one tensor, and its name does not tell in which order: say row_order="
            "'interleaved' (g0, u0, g1, u1, ..., as gpt-oss) or 'contiguous' (all gate rows, then all up rows)",
        )
    biases = [weight.files.dtype(name) for name in weight.tensors[BIAS].values()]
    one = tuple(biases[:1]) if set(biases[:1]) <= set(PLAIN_DTYPES) else PLAIN_DTYPES
    keys = [(expert, half) for expert in ([None] if stacked else range(experts)) for half in range(halves)]
    _check_part(weight, first, CODES, keys, CODES.dtypes if weight.quantized else (dtype,), expected[CODES])
    if weight.quantized:
        _check_part(weight, first, SCALES, keys, SCALES.dtypes, expected[SCALES])
    elif weight.tensors[SCALES]:
        raise _wrong(
            weight, first, f"is {dtype}, but has scales beside it: {next(iter(weight.tensors[SCALES].values()))}"
        )
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
