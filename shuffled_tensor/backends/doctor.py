# SPDX-License-Identifier: MIT
"""Which backends this machine has, what they do with the layers of known models, and what to install or change."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import torch

from shuffled_tensor.backends.base import BACKENDS, Backend, unavailable
from shuffled_tensor.device import arch, meta_as
from shuffled_tensor.layouts import LAYOUTS
from shuffled_tensor.moe.models import MODELS, explain_model, tokens_of

__all__ = ["doctor"]

_DRIVERS = {"NVIDIA": Path("/proc/driver/nvidia/version"), "amdgpu": Path("/sys/module/amdgpu/version")}
"""Files in which Linux says the version of a GPU's driver."""


def doctor() -> str:
    """This machine, as ``python -m shuffled_tensor doctor`` prints it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    lines = [f"verdict       {_verdict(devices)}", f"torch         {torch.__version__}"]
    for name, backend in BACKENDS.items():
        fingerprint = backend.fingerprint()
        if fingerprint is not None:
            lines.append(f"{name:14}{fingerprint}")
    for name in ("safetensors", "transformers"):
        try:
            lines.append(f"{name:14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if devices[1:]:
        lines.append(f"driver        {_driver()}")
    for device in devices:
        lines.append(f"{device!s:14}{arch(device)}")
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            lines.append(f"  GPU         {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
        lines += [f"  {name:12}{_on(backend, device)}" for name, backend in BACKENDS.items()]
    lines.append(f"layouts       {', '.join(map(repr, LAYOUTS))}")
    lines += _routes(_main(devices))
    lines.append(f"to change     {_advice(devices)}")
    return "\n".join(lines)


def _main(devices: list[torch.device]) -> torch.device:
    """The one that a model would be on."""
    return devices[1] if len(devices) > 1 else devices[0]


def _driver() -> str:
    for name, path in _DRIVERS.items():
        if path.exists():
            found = re.search(r"(?<![\w.])\d+(\.\d+)+", path.read_text(encoding="utf-8"))
            return f"{name} {found[0] if found else 'of unknown version'}"
    return "of unknown version"


def _routes(device: torch.device) -> list[str]:
    """A line a family of models: who computes its layers on a device, and by which kernels."""
    lines = [f"routes        on {device}, of the layers of"]
    with meta_as(device):
        for model in MODELS:
            found = explain_model(model)
            kernels = "; ".join(
                route.name if len(found.routes) == 1 else f"{tokens_of(route)} tokens: {route.name}"
                for route in found.routes
            )
            lines.append(f"  {model.name:20}{found.backend}, {kernels}")
    return lines


def _verdict(devices: list[torch.device]) -> str:
    device = _main(devices)
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
