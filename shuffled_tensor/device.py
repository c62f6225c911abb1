# SPDX-License-Identifier: MIT
"""Which GPU architecture a device is: the one place that a test overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["arch", "meant", "meta_as", "override_arch", "real_arch"]

_OVERRIDES: list[tuple[torch.device | None, str]] = []
_META_AS: list[torch.device] = []


def arch(device: torch.device | str) -> str:
    """``"gfx950"``, ``"gfx942"``, ``"sm_90"``, or the device's type where that says all (``"cpu"``)."""
    if isinstance(device, str):
        device = torch.device(device)
    device = meant(device)
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


@contextmanager
def meta_as(device: torch.device) -> Iterator[None]:
    """Inside, what is asked about a layer on the meta device, which has sizes only, is answered as if it were on this
    one, for every thread."""
    _META_AS.append(device)
    try:
        yield
    finally:
        _META_AS.remove(device)


def meant(device: torch.device) -> torch.device:
    """The device that is asked about: itself, but for the meta device inside of :func:`meta_as`."""
    return _META_AS[-1] if device.type == "meta" and _META_AS else device


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
