# SPDX-License-Identifier: MIT
"""MXFP4 expert weights whose byte order is part of the tensor."""

from typing import TYPE_CHECKING

from shuffled_tensor import aten as _aten  # registers the operations
from shuffled_tensor import drop_in as _drop_in  # and those of other libraries
from shuffled_tensor.device import arch, override_arch
from shuffled_tensor.layouts import ShuffleKind, shuffle_scale, shuffle_weight, unshuffle_scale, unshuffle_weight
from shuffled_tensor.mxfp4 import SCALE_RULES, dequantize, quantize
from shuffled_tensor.ops import fused_moe
from shuffled_tensor.picture import picture
from shuffled_tensor.prepare import prepare
from shuffled_tensor.refit import refit
from shuffled_tensor.report import Explanation, explain
from shuffled_tensor.saving import rebuild_storage, rebuild_weight
from shuffled_tensor.tensor import KernelOperands, ShuffledMXFP4Tensor
from shuffled_tensor.wrap import quantize_experts_, wrap_experts_
from shuffled_tensor.wrapper import implements

if TYPE_CHECKING:
    from shuffled_tensor.checkpoint import (
        CheckpointError,
        Experts,
        Finding,
        convert,
        inspect,
        load_experts,
        load_file,
        save_file,
    )

__all__ = [
    "SCALE_RULES",
    "CheckpointError",
    "Experts",
    "Explanation",
    "Finding",
    "KernelOperands",
    "ShuffleKind",
    "ShuffledMXFP4Tensor",
    "arch",
    "convert",
    "dequantize",
    "explain",
    "fused_moe",
    "implements",
    "inspect",
    "load_experts",
    "load_file",
    "override_arch",
    "picture",
    "prepare",
    "quantize",
    "quantize_experts_",
    "rebuild_storage",
    "rebuild_weight",
    "refit",
    "save_file",
    "shuffle_scale",
    "shuffle_weight",
    "unshuffle_scale",
    "unshuffle_weight",
    "wrap_experts_",
]

del _aten, _drop_in


def __getattr__(name: str) -> object:
    # What is missing is of `checkpoint`, whose dependencies are an extra.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from shuffled_tensor import checkpoint
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}: pip install 'shuffled_tensor[checkpoint]'"
        raise ModuleNotFoundError(message, name=error.name) from error

    return getattr(checkpoint, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
