# SPDX-License-Identifier: MIT
"""What a tensor asks of whoever computes with it, so that it need not know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.layouts import ROW_MAJOR, Layout
from shuffled_tensor.mxfp4 import CODES

if TYPE_CHECKING:
    from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["KernelOperands", "Policy", "Reading", "as_operand", "current", "install"]


class Reading(NamedTuple):
    """How kernels read a weight."""

    layout: Layout
    gate_mode: str
    attributes: dict[str, Any]
    """What they look for on its tensor."""


@dataclass(frozen=True, eq=False)
class KernelOperands:
    """What :meth:`ShuffledMXFP4Tensor.as_kernel_operands` returns.

    Attributes:
        weight: float4_e2m1fn_x2 ``[E, padded N, padded K/2]``, with the attributes that the installed kernels read.
        scale: uint8 ``[E, padded N, padded K/32]``, K to a multiple of 256.
        layout: the name of the one in which both lie.
        gate_mode: what kernel libraries call it: the ``gate_mode`` that a call with this weight must be given.
        hidden_pad, intermediate_pad: what a call must say of the padding: 0, whatever it is. Pads are zeros, and some
            kernels leave real rows out where they are told of pads.
    """

    weight: Tensor
    scale: Tensor
    layout: str
    gate_mode: str
    _release: Callable[[], None] = field(repr=False)
    hidden_pad: int = 0
    intermediate_pad: int = 0

    @property
    def expert_bytes(self) -> tuple[Tensor, Tensor]:
        """Codes and scales as they lie, uint8 ``[E, bytes]`` each, over the same bytes: what a rebalance moves, row by
        row. Another rank's rows fit where its weight has the same sizes, padding and layout."""
        return self.weight.view(torch.uint8).flatten(1), self.scale.flatten(1)

    def release(self) -> None:
        """Say that these tensors are not used any more. The weight may be laid out anew when nobody else holds it."""
        self._release()


def as_operand(qdata: Tensor, attributes: dict[str, Any]) -> Tensor:
    """Codes as the float4_e2m1fn_x2 tensor that kernels take, over the same bytes, with what they look for on it."""
    weight = qdata.view(torch.float4_e2m1fn_x2)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


class Policy:
    """Of a machine on which nothing computes: every weight stays as it is."""

    def layout_at_first_use(self, device: torch.device, fixed: Layout | None) -> Layout | None:
        """The layout that a weight on this device is brought into when it is first used; None where it stays as it is.

        Args:
            fixed: the one that the weight was made for, or is held in, if it is.
        """
        return None

    def installed(self, device: torch.device) -> dict[str, str]:
        """What is installed of each backend that a machine may lack, or why it cannot be used."""
        return {}

    def fingerprint(self, device: torch.device) -> str:
        """What the choice of a backend depends on beside the call: compiled code made under another one is not
        reused."""
        return ""

    def reading(self, weight: ShuffledMXFP4Tensor, layout: Layout | None) -> Reading:
        """How kernels read a weight; in the layout that its caller asks for, if it does.

        Raises:
            RuntimeError: no layout is asked for, and there are no kernels that could say.
        """
        if layout is None:
            raise RuntimeError("as_kernel_operands() lays bytes out for a kernel library, and none is known here")
        interleaved = layout.order(CODES, True).interleaved
        return Reading(layout, "interleave" if interleaved else "separated", {"is_shuffled": layout is not ROW_MAJOR})


current = Policy()


def install(policy: Policy) -> None:
    """Ask this one from now on."""
    global current
    current = policy
