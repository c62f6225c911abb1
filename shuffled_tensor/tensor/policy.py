# SPDX-License-Identifier: MIT
"""What a tensor asks of whoever computes with it, so that it need not know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.layouts import Layout

if TYPE_CHECKING:
    from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["KernelOperands", "Policy", "current", "install"]


class KernelOperands(NamedTuple):
    """What :meth:`ShuffledMXFP4Tensor.as_kernel_operands` returns.

    Attributes:
        weight: float4_e2m1fn_x2 ``[E, padded N, padded K/2]``, with the attributes that the installed kernels read.
        scale: uint8 ``[E, padded N, padded K/32]``, K to a multiple of 256.
        gate_mode: the ``gate_mode`` that a call of those kernels with this weight must be given.
    """

    weight: Tensor
    scale: Tensor
    gate_mode: str


class Policy:
    """Of a machine on which nothing computes: every weight stays as it is."""

    def layout_at_first_use(self, device: torch.device, requested: Layout | None) -> Layout | None:
        """The layout that a weight on this device is brought into when it is first used; None where it stays as it is.

        Args:
            requested: the one that the weight was made for, if it was.
        """
        return None

    def installed(self, device: torch.device) -> dict[str, str]:
        """What is installed of each backend that a machine may lack, or why it cannot be used."""
        return {}

    def fingerprint(self, device: torch.device) -> str:
        """What the choice of a backend depends on beside the call: compiled code made under another one is not
        reused."""
        return ""

    def kernel_operands(self, weight: ShuffledMXFP4Tensor) -> KernelOperands:
        """What :meth:`ShuffledMXFP4Tensor.as_kernel_operands` returns."""
        raise RuntimeError("as_kernel_operands() lays bytes out for a kernel library, and none is known here")


current = Policy()


def install(policy: Policy) -> None:
    """Ask this one from now on."""
    global current
    current = policy
