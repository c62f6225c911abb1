# SPDX-License-Identifier: MIT
"""Who computes a mixture-of-experts layer, how one is chosen, and the report of that choice."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shuffled_tensor.backends import aiter, reference
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.call import MoECall
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

_log = logging.getLogger("shuffled_tensor")


class Backend(Protocol):
    """What a module of this package offers."""

    def refuse(self, call: MoECall, /) -> str | None:
        """Why it does not take a call, or None; looks at everything but data and kinds."""

    def kind(self, device: torch.device, /) -> Layout | None:
        """The layout that it reads on a device; None where it reads any."""

    def run(self, call: MoECall, /) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"aiter": aiter, "reference": reference}
"""In the order of preference. The last one refuses nothing."""


class Choice(NamedTuple):
    backend: str
    kind: Layout | None
    """The layout that both weights must have; None where any will do."""
    passed_over: dict[str, str]
    """Why each preferred backend does not take the call."""
    candidates: str
    """This backend, and those that would take the call if it were refused after all: as `select` takes them."""


def select(call: MoECall, wanted: str | None) -> Choice:
    """Choose the backend for a call: the first that takes it, of all or of those wanted (``"aiter, reference"``).

    Raises:
        ValueError: the caller asked for one that does not exist, or that refuses this call.
    """
    names = list(BACKENDS) if wanted is None else wanted.split(", ")
    if not BACKENDS.keys() >= set(names):
        raise ValueError(f"unknown backend {wanted!r}; known backends: {', '.join(map(repr, BACKENDS))}")
    passed_over: dict[str, str] = {}
    for place, name in enumerate(names):
        reason = BACKENDS[name].refuse(call)
        if reason is None:
            kind = BACKENDS[name].kind(call.w13_qdata.device)
            return Choice(name, kind, passed_over, ", ".join(names[place:]))
        passed_over[name] = reason
    raise ValueError(
        f"{wanted} cannot take this call: {passed_over[str(wanted)]}; "
        "shuffled_tensor.fused_moe without backend= goes to another"
    )


def kinds_in_use(choice: Choice, *storages: PackedStorage) -> list[Layout | None]:
    """The kind that each weight of a call is brought into by it; None where it stays as it is.

    This is a first use whoever computes, so that no later one changes the layout under a call that is running.
    """
    return [choice.kind or kind_at_first_use(storage.qdata.device, storage.requested_layout) for storage in storages]


def kind_at_first_use(device: torch.device, requested: Layout | None) -> Layout | None:
    """The kind that a weight on this device is shuffled into when it is first used; None where it stays as it is."""
    if arch(device) != aiter.ARCH:
        return None
    return requested or aiter.kind(device)


def fingerprint(device: torch.device) -> str:
    """What `select` depends on beside the call: compiled code made under another one is not reused."""
    return f"{arch(device)}, {aiter.unusable(device) or aiter.detect().version.name}"


def warn_when_passed_over(choice: Choice, device: torch.device) -> None:
    """On the GPU that aiter is for, another backend is slow enough to be worth a line in the log, once a reason."""
    if "aiter" in choice.passed_over and arch(device) == aiter.ARCH:
        _warn(choice.backend, choice.passed_over["aiter"])


@cache
def _warn(backend: str, reason: str) -> None:
    _log.warning("fused_moe goes to the %s backend, not to aiter: %s", backend, reason)


class _Policy(policy.Policy):
    def layout_at_first_use(self, device: torch.device, requested: Layout | None) -> Layout | None:
        return kind_at_first_use(device, requested)

    def fingerprint(self, device: torch.device) -> str:
        return f"{fingerprint(device)}, {torch.ops.shuffled_tensor.fused_moe_packed.default._schema}"

    def kernel_operands(self, weight: ShuffledMXFP4Tensor) -> policy.KernelOperands:
        return aiter.kernel_operands(weight)


policy.install(_Policy())
