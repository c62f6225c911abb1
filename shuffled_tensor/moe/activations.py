# SPDX-License-Identifier: MIT
"""What stands between the two GEMMs of a layer: one row an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "ActivationName"]

ActivationName = Literal["silu", "gelu", "swiglu"]


class Activation(NamedTuple):
    """A row of :data:`ACTIVATIONS`."""

    function: Callable[[Tensor, Tensor], Tensor]
    """Of gate and up."""
    limit: float | None = None
    """What gate and up are clamped to where the caller names no limit."""

    def __call__(self, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
        """The intermediate; the gate clamped to at most, up to plus and minus ``limit``."""
        limit = self.limit if limit is None else limit
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.function(gate, up)


ACTIVATIONS: dict[ActivationName, Activation] = {
    "silu": Activation(lambda gate, up: F.silu(gate) * up),
    "gelu": Activation(lambda gate, up: F.gelu(gate) * up),
    # gpt-oss
    "swiglu": Activation(lambda gate, up: gate * torch.sigmoid(1.702 * gate) * (up + 1), limit=7.0),
}
