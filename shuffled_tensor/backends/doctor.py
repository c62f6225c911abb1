# SPDX-License-Identifier: MIT
"""Which backends this machine has, and what to install or change."""

from __future__ import annotations

import torch

from shuffled_tensor.backends import aiter
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import LAYOUTS

__all__ = ["doctor"]


def doctor() -> str:
    """This machine, as ``python -m shuffled_tensor doctor`` prints it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    lines = [f"torch         {torch.__version__}", f"aiter         {aiter.installed()}"]
    for device in devices:
        reason = aiter.unusable(device)
        lines.append(f"{device!s:14}{arch(device)}")
        lines.append(
            f"  aiter       {f'no: {reason}' if reason else f'yes, reads {aiter.detect().version.layout.name!r}'}"
        )
        lines.append("  reference   yes, reads any layout")
    lines.append(f"kinds         {', '.join(map(repr, LAYOUTS))}")
    lines.append(f"to change     {_advice(devices)}")
    return "\n".join(lines)


def _advice(devices: list[torch.device]) -> str:
    if not any(arch(device) == aiter.ARCH for device in devices):
        return f"nothing: no device here is {aiter.ARCH}, and the reference backend runs everything"
    if any(aiter.unusable(device) is None for device in devices):
        return "nothing: weights are shuffled on first use"
    return "install or repair aiter (https://github.com/ROCm/aiter, distribution amd-aiter)"
