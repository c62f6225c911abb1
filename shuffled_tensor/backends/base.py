# SPDX-License-Identifier: MIT
"""What a backend is, and how one is chosen."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from shuffled_tensor.device import arch, meant
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.call import MoECall, PackedWeight
from shuffled_tensor.moe.op import Choice, Description
from shuffled_tensor.tensor.policy import Policy, Reading
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["BACKENDS", "Backend", "FirstUse", "select", "unavailable"]

_log = logging.getLogger("shuffled_tensor")


class Backend(ABC):
    """Who computes a layer."""

    name: ClassVar[str]
    arch: ClassVar[str | None] = None
    """The architecture that it is for: there, weights are laid out for it at first use, and any other backend is slow
    enough to be worth a line in the log. None where it is for no one of them."""

    def available(self, device: torch.device) -> str | None:
        """Why it cannot run anything on a device, or None."""
        return None

    def remedy(self, device: torch.device) -> str | None:
        """What to install for it to run on a device; None where it runs already, or nothing would help."""
        return None

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        """Those that it reads on a device, the one that it wants first; none where it reads any."""
        return ()

    def layout(self, call: MoECall[PackedWeight]) -> Layout | None:
        """The one in which it reads a call's weights: theirs, or the one that it wants; None where it reads any."""
        layouts = self.layouts(call.w13.qdata.device)
        return call.w13.fixed if call.w13.fixed in layouts else next(iter(layouts), None)

    def misread(self, call: MoECall[PackedWeight]) -> str | None:
        """Which weight of a call is fixed to a layout that it does not read, or not with the other's; or None."""
        layout = self.layout(call)
        for name, weight in (("w13", call.w13), ("w2", call.w2)):
            fixed = weight.fixed
            if layout is not None and fixed is not None and not fixed.same_bytes(layout, weight.geometry.gate_up):
                read = " or ".join(repr(each.name) for each in self.layouts(call.w13.qdata.device))
                return (
                    f"{name} is fixed to {fixed.name!r}, and it reads {read}; make both weights without a shuffle_kind"
                )
        return None

    @abstractmethod
    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        """Why it does not take a call whose weights it reads, or None; looks at everything but data and how the weights
        lie now."""

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

    def reading(self, weight: ShuffledMXFP4Tensor, layout: Layout | None) -> Reading | None:
        """How its kernels read a weight, in a layout or, if none is asked for, in the one that it is to have; None
        where they do not."""
        return None


BACKENDS: dict[str, Backend] = {}
"""In the order of preference. The last one refuses nothing."""


def unavailable(backend: Backend, device: torch.device) -> str | None:
    """Why nothing runs on a device by this backend, or None.

    ``SHUFFLED_TENSOR_BACKENDS``, names with commas between them, leaves out all others.
    """
    named = os.environ.get("SHUFFLED_TENSOR_BACKENDS")
    if named:
        names = [name.strip() for name in named.split(",")]
        for name in names:
            if name not in BACKENDS:
                known = ", ".join(map(repr, BACKENDS))
                raise ValueError(f"SHUFFLED_TENSOR_BACKENDS names {name!r}; known backends: {known}")
        if backend.name not in names:
            return f"SHUFFLED_TENSOR_BACKENDS={named} leaves it out"
    return backend.available(meant(device))


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
        reason = unavailable(backend, device) or backend.misread(call) or backend.refuse(call)
        if reason is None:
            warn = partial(_warn, name, passed_over, device)
            return Choice(name, backend.layout(call), passed_over, names[place:], backend.run, backend.describe, warn)
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

    def layout_at_first_use(self, device: torch.device, fixed: Layout | None) -> Layout | None:
        here = arch(device)
        for backend in BACKENDS.values():
            if backend.arch not in (None, here):
                continue
            layouts = backend.layouts(device) if unavailable(backend, device) is None else ()
            if fixed is not None and (backend.arch == here or fixed in layouts):
                return fixed
            if layouts and fixed is None:
                return layouts[0]
        return None

    def installed(self, device: torch.device) -> dict[str, str]:
        found = ((name, backend.fingerprint()) for name, backend in BACKENDS.items())
        return {name: fingerprint for name, fingerprint in found if fingerprint is not None}

    def fingerprint(self, device: torch.device) -> str:
        here = [backend for backend in BACKENDS.values() if backend.arch in (None, arch(device))]
        found = {backend.name: unavailable(backend, device) or backend.fingerprint() for backend in here}
        operators = torch.ops.shuffled_tensor  # perhaps of another version of this package
        schemas = [operators.fused_moe_packed.default._schema, operators.linear_mxfp4_packed.default._schema]
        return f"{arch(device)}, {found}, {schemas}"

    def reading(self, weight: ShuffledMXFP4Tensor, layout: Layout | None) -> Reading:
        reasons = []
        for backend in BACKENDS.values():
            if backend.arch is not None:
                reason = unavailable(backend, weight.device)
                found = backend.reading(weight, layout) if reason is None else None
                if found is not None:
                    return found
                reasons.append(f"{backend.name}: {reason or 'it does not read the layout that the weight is fixed to'}")
        if layout is not None:
            return super().reading(weight, layout)
        raise RuntimeError(
            f"as_kernel_operands() needs a layout= where no kernel library tells it; {'; '.join(reasons)}"
        )
