# SPDX-License-Identifier: MIT
"""What the files of a checkpoint hold, before anything is loaded: transformers fills what it does not find with random
numbers, and reads what it does not know as something else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from safetensors import safe_open

__all__ = ["check_names", "names_in"]

_EXPERT = re.compile(r"(?<!shared_)experts\.\d+\.[^.]+\.(?P<end>.+)$")
_KNOWN = {"weight", "weight_packed", "weight_scale", "scale", "bias"}
_QUANTIZED = re.compile(
    r"\.(weight_packed|weight_scale\w*|scale|scales|qweight|qzeros|g_idx|weight_zero_point|input_scale|weight_shape)$"
)


def names_in(files: Iterable[str]) -> set[str]:
    """Of the tensors, by their headers."""
    found: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= set(opened.keys())
    return found


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for what would be taken for something else: experts in a form that is not MXFP4's, or other
    weights that are quantised, too."""
    for name in sorted(names):
        expert = _EXPERT.search(name)
        if expert and expert["end"] not in _KNOWN:
            raise ValueError(
                f"{name} is no part of MXFP4 experts as they are known here ({', '.join(sorted(_KNOWN))}); load such a "
                "checkpoint with the quantisation that it names"
            )
        if not expert and _QUANTIZED.search(name):
            raise ValueError(
                f"{name}: weights beside the experts are quantised, too, and only experts are read packed here; load "
                "such a checkpoint with the quantisation that it names"
            )
