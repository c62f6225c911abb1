# SPDX-License-Identifier: MIT
"""What stands between the two GEMMs of a layer: one row an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "PARAMETERS", "Activation", "ActivationName"]

ActivationName = Literal["silu", "gelu", "gelu_tanh", "swiglu", "situ"]


class Activation(NamedTuple):
    """A row of :data:`ACTIVATIONS`."""

    function: Callable[..., Tensor]
    """Of gate and up, and of the parameters by their names."""
    parameters: Mapping[str, float | None]
    """The options of a call that it takes, and what each is where the caller names none: None must be named."""

    def __call__(self, gate: Tensor, up: Tensor, **given: float | None) -> Tensor:
        """The intermediate; parameters of other activations are left aside."""
        return self.function(gate, up, **self.named(given))

    def named(self, given: Mapping[str, float | None]) -> dict[str, float | None]:
        """All its parameters, in the order of the row: as given, or by default."""
        return {name: default if given.get(name) is None else given[name] for name, default in self.parameters.items()}


def _limited(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of the gate clamped to at most, and up to plus and minus, ``swiglu_limit``."""

    def of_clamped(gate: Tensor, up: Tensor, swiglu_limit: float, **parameters: float) -> Tensor:
        return function(gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit), **parameters)

    return of_clamped


def _swiglu(gate: Tensor, up: Tensor, swiglu_alpha: float) -> Tensor:
    """Of gpt-oss and MiniMax-M3. The config.json of the latter, and vLLM's FusedMoEConfig, name the parameters so."""
    return gate * torch.sigmoid(swiglu_alpha * gate) * (up + 1)


def _situ(gate: Tensor, up: Tensor, situ_beta: float, situ_linear_beta: float) -> Tensor:
    """Of Kimi-K3: ``SituAndMul`` in its modeling_kimi_linear.py, aiter's ``situv2``, vLLM's ``MoEActivation.SITU``.

    aiter's first GEMM names the parameters so; Kimi-K3's config.json and vLLM put ``activation_`` before. There is no
    default, because they disagree: 4 and 25 in that config.json and in aiter's own judge, 1 and an up that stays as it
    is in the model's code, 1 and 1 where aiter's operator is given none. The model has no ``swiglu_limit``.
    """
    return situ_beta * (gate / situ_beta).tanh() * gate.sigmoid() * (situ_linear_beta * (up / situ_linear_beta).tanh())


ACTIVATIONS: dict[ActivationName, Activation] = {
    "silu": Activation(_limited(lambda gate, up: F.silu(gate) * up), {"swiglu_limit": math.inf}),
    "gelu": Activation(_limited(lambda gate, up: F.gelu(gate) * up), {"swiglu_limit": math.inf}),
    "gelu_tanh": Activation(
        _limited(lambda gate, up: F.gelu(gate, approximate="tanh") * up), {"swiglu_limit": math.inf}
    ),
    "swiglu": Activation(_limited(_swiglu), {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}),
    "situ": Activation(_situ, {"situ_beta": None, "situ_linear_beta": None}),
}

PARAMETERS = tuple(dict.fromkeys(name for row in ACTIVATIONS.values() for name in row.parameters))
"""The options of a call that only some activations take."""
