# SPDX-License-Identifier: MIT
"""What torch is told of every operator of this package: who computes it, and that nothing is differentiated or mapped
through it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["LIBRARY", "implement", "passing_autograd"]

LIBRARY = torch.library.Library("shuffled_tensor", "DEF")
"""Where operators are defined, before they are implemented."""


def implement(
    name: str, function: Callable[..., Tensor], *, layer: str, fake: Callable[..., Tensor] | None = None
) -> None:
    """Have ``function`` compute ``shuffled_tensor::name`` on any device, and ``fake`` say what it returns; errors call
    it ``layer``."""
    operator = getattr(torch.ops.shuffled_tensor, name).default
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _autograd(operator, layer), "Autograd", with_keyset=True)
    torch.library.register_vmap(operator, partial(_no_vmap, layer), lib=LIBRARY)
    if fake is not None:
        torch.library.register_fake(f"shuffled_tensor::{name}", fake, lib=LIBRARY)


def passing_autograd() -> AbstractContextManager[None]:
    """Around a call of an operator: where neither a gradient nor a tangent can be asked for, it goes past what is
    registered here for Autograd, which would look at each argument for them."""
    apart = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return nullcontext() if apart else torch._C._AutoDispatchBelowAutograd()


def _no_gradient(layer: str) -> NoReturn:
    raise RuntimeError(
        f"{layer} has no gradient; call it under torch.no_grad(), or compute with .dequantize() to train through it"
    )


def _autograd(operator: torch._ops.OpOverload, layer: str) -> Callable[..., Tensor]:
    """What an operator does where torch differentiates: the same, and an error if a gradient is asked for."""

    def below(keyset: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)  # type: ignore[no-any-return]

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            return below(*args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> NoReturn:
            _no_gradient(layer)

    def run(keyset: Any, *args: Any) -> Tensor:
        # torch's own registration looks for requires_grad alone: a tangent would be dropped without a word
        if forward_ad._current_level >= 0 and any(  # else no tensor has one, and each would be asked
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise RuntimeError(
                f"{layer} has no gradient, in forward mode neither: torch.func.jvp, jacfwd and forward_ad cannot go "
                "through it; compute with .dequantize() to differentiate"
            )
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            if torch._C._are_functorch_transforms_active():
                _no_gradient(layer)  # torch.func takes no Function made here
            return NoGradient.apply(keyset, *args)  # type: ignore[no-any-return,no-untyped-call]
        return below(keyset, *args)

    return run


def _no_vmap(layer: str, info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(f"{layer} has no vmap rule; flatten the batch into tokens, [batch * tokens, K]")
