# SPDX-License-Identifier: MIT
"""Experts in other forms than MXFP4, recognised by the names and dtypes of their tensors, so that an error says what
they are and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shuffled_tensor.checkpoint.source import Files

__all__ = ["recognised"]

_DENSE = "dequantise it with the library that wrote it, and quantise the values with ShuffledMXFP4Tensor.from_hp"
_PLAIN = "quantise it with quantize_experts_, or with shuffled_tensor.transformers while it is loaded"

_OTHERS: tuple[tuple[str, str, str, str], ...] = (
    (r"\.(weight_scale_2|weight_global_scale)", ".*", "NVFP4 (blocks of 16, with an outer scale)", _DENSE),
    (r"\.weight_scale_inv", ".*", "FP8 with scales of blocks", _DENSE),
    (r"\.qweight", ".*", "AWQ's or GPTQ's integers", _DENSE),
    (r"\.weight_(shape|packed)", "I32|I64", "compressed-tensors' packed integers", _DENSE),
    (r"\.weight", "F8_.*", "FP8", _DENSE),
    (r"(\.weight|_proj)", "BF16|F16|F32", "high precision", _PLAIN),
)
"""How a tensor's name ends, its dtype, what its experts are in, and what to do; the first that fits any tensor."""

_EXPERT = re.compile(r"(?<!shared_)experts\.")


def recognised(files: Files, names: Iterable[str]) -> str:
    """What experts of these tensors are in, as the end of a message; empty where nobody knows."""
    names = [name for name in names if _EXPERT.search(name)]
    for ending, dtype, what, remedy in _OTHERS:
        for name in names:
            if re.search(rf"{ending}$", name) and re.fullmatch(dtype, files.stored(name)[0]):
                return f"; {name} is of experts in {what}: {remedy}"
    return ""
