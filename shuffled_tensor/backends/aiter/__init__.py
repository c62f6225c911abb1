# SPDX-License-Identifier: MIT
"""AMD's aiter: which one is installed, and how it is called."""

from __future__ import annotations

import torch
from torch import Tensor

from shuffled_tensor.backends.aiter import call as _call
from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.backends.base import Backend
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import Description
from shuffled_tensor.tensor.policy import Reading
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["Aiter"]


class Aiter(Backend):
    """Its HIP kernels for gfx950, of whatever version is installed."""

    name = "aiter"
    arch = versions.ARCH

    def available(self, device: torch.device) -> str | None:
        return versions.unusable(device)

    def remedy(self, device: torch.device) -> str | None:
        if arch(device) != self.arch or self.available(device) is None:
            return None
        return "install or repair aiter (https://github.com/ROCm/aiter, distribution amd-aiter)"

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(way.layout for way in versions.detect().version.ways))

    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        return _call.refuse(call)

    def run(self, call: MoECall[PackedWeight]) -> Tensor:
        return _call.run(call)

    def describe(self, call: MoECall[PackedWeight]) -> Description:
        return _call.describe(call)

    def fingerprint(self) -> str:
        return versions.installed()

    def reading(self, weight: ShuffledMXFP4Tensor, layout: Layout | None) -> Reading | None:
        return _call.reading(weight, layout)
