# SPDX-License-Identifier: MIT
"""Which backends this machine has, and what to install or change."""

from __future__ import annotations

import torch

from shuffled_tensor.backends.base import BACKENDS, Backend, unavailable
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import LAYOUTS

__all__ = ["doctor"]


def doctor() -> str:
    """This machine, as ``python -m shuffled_tensor doctor`` prints it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    lines = [f"verdict       {_verdict(devices)}", f"torch         {torch.__version__}"]
    for name, backend in BACKENDS.items():
        fingerprint = backend.fingerprint()
        if fingerprint is not None:
            lines.append(f"{name:14}{fingerprint}")
    for device in devices:
        lines.append(f"{device!s:14}{arch(device)}")
        lines += [f"  {name:12}{_on(backend, device)}" for name, backend in BACKENDS.items()]
    lines.append(f"layouts       {', '.join(map(repr, LAYOUTS))}")
    lines.append(f"to change     {_advice(devices)}")
    return "\n".join(lines)


def _verdict(devices: list[torch.device]) -> str:
    """Of the device that a model would be on."""
    device = devices[1] if len(devices) > 1 else devices[0]
    first, *others = [backend.name for backend in BACKENDS.values() if unavailable(backend, device) is None]
    where = "CPU only" if arch(device) == "cpu" else arch(device)
    if not others:
        return f"{where}: the {first} backend alone, for tests and conversions, not for serving"
    return f"{where}: the {first} backend, and {' and '.join(others)} for the calls that it does not take"


def _on(backend: Backend, device: torch.device) -> str:
    reason = unavailable(backend, device)
    if reason is not None:
        return f"no: {reason}"
    layouts = ", ".join(repr(layout.name) for layout in backend.layouts(device))
    return f"yes, reads {layouts or 'any layout'}"


def _advice(devices: list[torch.device]) -> str:
    remedies = [backend.remedy(device) for backend in BACKENDS.values() for device in devices]
    if any(remedies):
        return "; ".join(dict.fromkeys(filter(None, remedies)))
    *others, last = BACKENDS.values()
    if all(unavailable(backend, device) for backend in others for device in devices):
        names = " nor ".join(backend.name for backend in others)
        return f"nothing: neither {names} runs here, and the {last.name} backend runs everything"
    return "nothing: weights are shuffled on first use"
