# SPDX-License-Identifier: MIT
"""Which backend a call goes to, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import name_or_none
from shuffled_tensor.moe.call import MoECall, check, check_names, check_types
from shuffled_tensor.moe.op import Kernels, layouts_in_use, plan
from shuffled_tensor.tensor import policy

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What a call of :func:`shuffled_tensor.fused_moe` would do."""

    arch: str
    installed: dict[str, str]
    """What is installed of each backend that this machine may lack, or why it cannot be used on this device."""
    backend: str
    layout: str | None
    """The one that the backend reads; None where it reads any."""
    shuffles: dict[str, str]
    """The layouts that w13 and w2 would be brought into. On a GPU that a backend is for, the first use does that
    whoever computes."""
    tags: dict[str, Any]
    """What the backend tells its kernels of w13's layout."""
    kernels: str
    """What computes the call."""
    activations: str
    """What these kernels make of activations."""
    routes: tuple[Kernels, ...]
    """What computes the same layer for every number of tokens."""
    passed_over: dict[str, str]
    """The backends that would have been preferred, and why they do not take the call."""

    def __str__(self) -> str:
        shuffles = (f"{name} to {layout}" for name, layout in self.shuffles.items())
        lines = [
            f"architecture  {self.arch}",
            *(f"{name:14}{found}" for name, found in self.installed.items()),
            f"backend       {self.backend}",
            f"layout        {self.layout or 'any'}",
            f"shuffles      {', '.join(shuffles) or 'nothing'}",
            f"tags          {', '.join(f'{name}={value!r}' for name, value in self.tags.items()) or 'none'}",
            f"kernels       {self.kernels}",
            f"activations   {self.activations}",
            *(f"routes        {route}" for route in self.routes if len(self.routes) > 1),
            *(f"passed over   {name}: {reason}" for name, reason in self.passed_over.items()),
        ]
        return "\n".join(lines)


def explain(*args: Any, tokens: int | None = None, **kwargs: Any) -> Explanation:
    """What :func:`shuffled_tensor.fused_moe` would do with the same arguments; nothing is run, and nothing shuffled.

    Args:
        args, kwargs: as for :func:`shuffled_tensor.fused_moe`.
        tokens: explain the call as if it had so many; None takes it as it is.

    Raises:
        TypeError, ValueError: what the call itself would raise.
    """
    check_names(kwargs)
    given: MoECall[Any] = MoECall(*args, **kwargs)
    check_types(vars(given).items())
    if tokens is not None:
        if type(tokens) is not int or tokens < 0:
            raise ValueError(f"tokens must be a number of them, or None for the call's own, found {tokens!r}")
        for name in ("hidden_states", "topk_weight", "topk_ids", "hidden_scale"):
            value = getattr(given, name)
            if value is not None:
                setattr(given, name, value.new_empty(1, *value.shape[1:]).expand(tokens, *value.shape[1:]))
    call, choice = plan(given)
    check(call)
    storages = {name: getattr(given, name)._storage for name in ("w13", "w2")}
    layouts = zip(storages.items(), layouts_in_use(choice, *storages.values()), strict=True)
    device = call.w13.qdata.device
    description, count = choice.describe(call), call.hidden_states.shape[0]
    kernels = next((route for route in description.routes if count in route.tokens), description.routes[0])
    return Explanation(
        arch=arch(device),
        installed=policy.current.installed(device),
        backend=choice.backend,
        layout=name_or_none(choice.layout),
        shuffles={
            name: layout.name
            for (name, storage), layout in layouts
            if layout is not None and layout is not storage.layout
        },
        tags=dict(description.tags),
        kernels=kernels.name,
        activations=kernels.activations,
        routes=description.routes,
        passed_over=choice.passed_over,
    )
