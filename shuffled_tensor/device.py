# SPDX-License-Identifier: MIT
"""Which GPU architecture a device is: the one place that a test overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["arch", "override_arch", "real_arch"]

_OVERRIDES: list[tuple[torch.device | None, str]] = []


def arch(device: torch.device | str) -> str:
    """``"gfx950"``, ``"gfx942"``, ``"sm_90"``, or the device's type where that says all (``"cpu"``)."""
    if isinstance(device, str):
        device = torch.device(device)
    for scope, name in reversed(_OVERRIDES):
        if device.type in ("cpu", "cuda") if scope is None else _covers(scope, device):
            return name
    return real_arch(device)


@contextmanager
def override_arch(name: str, device: torch.device | str | None = None) -> Iterator[None]:
    """Inside, a CPU or CUDA device (``device``, or all of them) counts as the GPU ``name``, for every thread."""
    entry = (None if device is None else torch.device(device), name)
    _OVERRIDES.append(entry)
    try:
        yield
    finally:
        _OVERRIDES.remove(entry)


def _covers(scope: torch.device, device: torch.device) -> bool:
    return scope.type == device.type and scope.index in (None, device.index)


@cache
def real_arch(device: torch.device) -> str:
    """The same, whatever is overridden: what a kernel is compiled for."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]  # "gfx950:sramecc+:xnack-"
    return f"sm_{properties.major}{properties.minor}"
