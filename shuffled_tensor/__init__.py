# SPDX-License-Identifier: MIT
"""MXFP4 expert weights whose byte order is part of the tensor."""

from typing import TYPE_CHECKING

import torch.distributed as _torch_distributed

from shuffled_tensor.backends import BACKENDS as _BACKENDS  # chooses who computes
from shuffled_tensor.backends.aiter import interop as _interop  # registers operators of other libraries
from shuffled_tensor.device import arch, override_arch
from shuffled_tensor.layouts import LAYOUTS, shuffle_scale, shuffle_weight, unshuffle_scale, unshuffle_weight
from shuffled_tensor.linear import linear
from shuffled_tensor.modules import install_, prepare, quantize_experts_, wrap_experts_
from shuffled_tensor.moe.explain import Explanation, explain
from shuffled_tensor.moe.op import fused_moe
from shuffled_tensor.mxfp4 import SCALE_RULES, dequantize, quantize
from shuffled_tensor.picture import picture
from shuffled_tensor.tensor import ops as _ops  # registers the operations
from shuffled_tensor.tensor.dcp import sharded
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.policy import KernelOperands
from shuffled_tensor.tensor.saving import rebuild_storage, rebuild_weight
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor
from shuffled_tensor.updates import Refit, refit

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
    from shuffled_tensor.distributed import Move, agree_, broadcast_, move_experts_, plan_moves, scatter_

if _torch_distributed.is_available():  # some builds of torch do without
    from shuffled_tensor import distributed as distributed  # registers the operations between ranks

__version__ = "0.1.0.dev0"

__all__ = [
    "LAYOUTS",
    "SCALE_RULES",
    "CheckpointError",
    "Experts",
    "Explanation",
    "Finding",
    "KernelOperands",
    "Move",
    "Place",
    "Refit",
    "ShuffledMXFP4Tensor",
    "agree_",
    "arch",
    "broadcast_",
    "convert",
    "dequantize",
    "explain",
    "fused_moe",
    "implements",
    "inspect",
    "install_",
    "linear",
    "load_experts",
    "load_file",
    "move_experts_",
    "override_arch",
    "picture",
    "plan_moves",
    "prepare",
    "quantize",
    "quantize_experts_",
    "rebuild_storage",
    "rebuild_weight",
    "refit",
    "save_file",
    "scatter_",
    "sharded",
    "shuffle_scale",
    "shuffle_weight",
    "unshuffle_scale",
    "unshuffle_weight",
    "wrap_experts_",
]

implements = ShuffledMXFP4Tensor.operations.implements

del _BACKENDS, _interop, _ops


_BETWEEN_RANKS = {"Move", "agree_", "broadcast_", "move_experts_", "plan_moves", "scatter_"}


def __getattr__(name: str) -> object:
    # What is missing is of `distributed`, which a torch may lack, or of `checkpoint`, whose dependencies are an extra.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _BETWEEN_RANKS:
        from shuffled_tensor import distributed

        return getattr(distributed, name)
    try:
        from shuffled_tensor import checkpoint
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}: pip install 'shuffled_tensor[checkpoint]'"
        raise ModuleNotFoundError(message, name=error.name) from error

    return getattr(checkpoint, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
