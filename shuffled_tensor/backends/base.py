# SPDX-License-Identifier: MIT
"""What a backend is, and how one is chosen."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import Choice, Description
from shuffled_tensor.tensor.policy import KernelOperands, Policy
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["BACKENDS", "Backend", "FirstUse", "select"]

_log = logging.getLogger("shuffled_tensor")


class Backend(ABC):
    """Who computes a layer."""

    name: ClassVar[str]
    arch: ClassVar[str | None] = None
    """The architecture that it is for: there, weights are laid out for it at first use, and any other backend is slow
    enough to be worth a line in the log. None where it runs on any, as nobody's first choice."""
    remedy: ClassVar[str] = ""
    """What to install where it is missing."""

    def available(self, device: torch.device) -> str | None:
        """Why it cannot run anything on a device, or None."""
        return None

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        """Those that it reads on a device, the one that it wants first; none where it reads any."""
        return ()

    def layout(self, device: torch.device) -> Layout | None:
        """The one that it wants, or None where it reads any."""
        return next(iter(self.layouts(device)), None)

    @abstractmethod
    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        """Why it does not take a call, or None; looks at everything but data and layouts."""

    @abstractmethod
    def run(self, call: MoECall[PackedWeight]) -> Tensor:
        """``[tokens, K]`` of a call that it does not refuse, with weights in a layout that it reads."""

    @abstractmethod
    def describe(self, call: MoECall[PackedWeight]) -> Description:
        """How it would run a call."""

    def fingerprint(self) -> str | None:
        """What is installed of it, or why that cannot be used; None where it comes with this package. Compiled code
        made under another one is not reused."""
        return None

    def kernel_operands(self, weight: ShuffledMXFP4Tensor) -> KernelOperands:
        """A weight as its kernels take it."""
        raise NotImplementedError


BACKENDS: dict[str, Backend] = {}
"""In the order of preference. The last one refuses nothing."""


def select(call: MoECall[PackedWeight], wanted: Sequence[str] | None) -> Choice:
    """The backend for a call: the first that takes it, of all or of those wanted.

    Raises:
        ValueError: the caller asked for one that does not exist, or that refuses this call.
    """
    names = tuple(BACKENDS if wanted is None else wanted)
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(map(repr, BACKENDS))}")
    device = call.w13.qdata.device
    passed_over: dict[str, str] = {}
    for place, name in enumerate(names):
        backend = BACKENDS[name]
        reason = backend.available(device) or backend.refuse(call)
        if reason is None:
            warn = partial(_warn, name, passed_over, device)
            return Choice(name, backend.layout(device), passed_over, names[place:], backend.run, backend.describe, warn)
        passed_over[name] = reason
    reasons = "; ".join(f"{name} cannot take this call: {reason}" for name, reason in passed_over.items())
    raise ValueError(f"{reasons}; shuffled_tensor.fused_moe without backend= goes to another")


def _warn(backend: str, passed_over: dict[str, str], device: torch.device) -> None:
    for name, reason in passed_over.items():
        if BACKENDS[name].arch == arch(device):
            _warn_once(backend, name, reason)


@cache
def _warn_once(backend: str, passed_over: str, reason: str) -> None:
    _log.warning("fused_moe goes to the %s backend, not to %s: %s", backend, passed_over, reason)


class FirstUse(Policy):
    """What a tensor gets to know of the backends."""

    def layout_at_first_use(self, device: torch.device, requested: Layout | None) -> Layout | None:
        here = arch(device)
        for backend in BACKENDS.values():
            if backend.arch == here:
                if requested is not None:
                    return requested
                if backend.available(device) is None:
                    return backend.layout(device)
        return None

    def installed(self, device: torch.device) -> dict[str, str]:
        found = ((name, backend.fingerprint()) for name, backend in BACKENDS.items())
        return {name: fingerprint for name, fingerprint in found if fingerprint is not None}

    def fingerprint(self, device: torch.device) -> str:
        here = [backend for backend in BACKENDS.values() if backend.arch in (None, arch(device))]
        found = {backend.name: backend.available(device) or backend.fingerprint() for backend in here}
        schema = torch.ops.shuffled_tensor.fused_moe_packed.default._schema  # of another version of this package
        return f"{arch(device)}, {found}, {schema}"

    def kernel_operands(self, weight: ShuffledMXFP4Tensor) -> KernelOperands:
        reasons = []
        for backend in BACKENDS.values():
            if backend.arch is not None:
                reason = backend.available(weight.device)
                if reason is None:
                    return backend.kernel_operands(weight)
                reasons.append(f"{backend.name}: {reason}")
        raise RuntimeError(f"as_kernel_operands() lays bytes out for a kernel library; {'; '.join(reasons)}")
