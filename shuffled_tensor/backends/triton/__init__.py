# SPDX-License-Identifier: MIT
"""Kernels in Triton: the layer on any GPU that Triton compiles for, from the bytes as aiter's kernels read them, and
the moves between layouts."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from shuffled_tensor.backends.base import Backend
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import LAYOUTS, Layout
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import MANY, Description, Kernels

__all__ = ["Triton", "unusable"]

_OLDEST = (8, 0)
"""Compute capability: the first with products of bfloat16."""


class Triton(Backend):
    """Weights become bfloat16 in registers, exactly; activations are bfloat16, and products accumulated in float32.

    Each token's slots are computed apart and added in their order, so that every run gives the same bits. Nothing waits
    for the device. Wrong data for which the reference raises, such as an expert that does not exist, makes the results
    of its token NaN.
    """

    name = "triton"

    def available(self, device: torch.device) -> str | None:
        return _unusable_there(arch(device)) if device.type == "meta" else unusable(device)

    def remedy(self, device: torch.device) -> str | None:
        if device.type != "cuda" or _too_old(device) or _installed():
            return None
        return "install triton, in the version that PyTorch's build for GPUs asks for"

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        return LAYOUTS["mxfp4_separated"], LAYOUTS["mxfp4_moe"]

    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        if call.hidden_states.dtype is torch.float32 and call.activation_dtype is None:
            return "it multiplies bfloat16, and hidden_states are float32; activation_dtype='mxfp4' rounds them"
        if not 0 < len(call.w13.qdata) < 1 << 16:
            return f"it takes 1 to 65535 experts, found {len(call.w13.qdata)}"
        for name, weight in (("w13", call.w13), ("w2", call.w2)):
            if not (weight.qdata.is_contiguous() and weight.scale.is_contiguous()):
                return f"the experts of {name} are not contiguous in memory; .clone() them"
        return None

    def describe(self, call: MoECall[PackedWeight]) -> Description:
        rule = call.intermediate_scale_rule
        activations = "bfloat16" if rule is None else f"mxfp4, {rule}"
        return Description((Kernels(range(1, MANY + 1), "triton w4a16", activations),), {})

    def run(self, call: MoECall[PackedWeight]) -> Tensor:
        from shuffled_tensor.backends.triton.layer import run  # not before there is a Triton to import

        return run(call)

    def fingerprint(self) -> str | None:
        return _version() if _installed() else "not installed"


def unusable(device: torch.device) -> str | None:
    """Why no kernel in Triton runs on a device, or None."""
    if device.type != "cuda":
        return f"it compiles for GPUs, found {device.type}"
    return _too_old(device) or (None if _installed() else "no triton is installed")


def _unusable_there(name: str) -> str | None:
    """The same of a machine that is only spoken of, by its architecture: PyTorch's build for its GPU brings Triton."""
    if name.startswith("gfx"):
        return None
    return _older(divmod(int(name[3:]), 10)) if name.startswith("sm_") else f"it compiles for GPUs, found {name}"


def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _version() -> str:
    """Of the module: its distribution has other names beside PyTorch for ROCm."""
    import triton

    return str(triton.__version__)


@cache
def _too_old(device: torch.device) -> str | None:
    return None if torch.version.hip else _older(torch.cuda.get_device_capability(device))


def _older(found: tuple[int, int]) -> str | None:
    return None if found >= _OLDEST else f"it needs compute capability 8.0 or later, found {found[0]}.{found[1]}"
