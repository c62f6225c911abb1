# SPDX-License-Identifier: MIT
"""Which backend a call goes to, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import name_or_none
from shuffled_tensor.moe.call import MoECall, check, check_names, check_types
from shuffled_tensor.moe.op import check_layouts, layouts_in_use, plan
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
    activations: str
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
            f"activations   {self.activations}",
            *(f"passed over   {name}: {reason}" for name, reason in self.passed_over.items()),
        ]
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """What :func:`shuffled_tensor.fused_moe` would do with the same arguments; nothing is run, and nothing shuffled.

    Raises:
        TypeError, ValueError: what the call itself would raise.
    """
    check_names(kwargs)
    given: MoECall[Any] = MoECall(*args, **kwargs)
    check_types(vars(given).items())
    call, choice = plan(given)
    check(call)
    storages = {name: getattr(given, name)._storage for name in ("w13", "w2")}
    check_layouts(choice, *storages.values())
    layouts = zip(storages.items(), layouts_in_use(choice, *storages.values()), strict=True)
    device = call.w13.qdata.device
    description = choice.describe(call)
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
        tags=description.tags,
        activations=description.activations,
        passed_over=choice.passed_over,
    )
