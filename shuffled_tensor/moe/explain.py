# SPDX-License-Identifier: MIT
"""Which backend a call goes to, and why."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from shuffled_tensor import backends
from shuffled_tensor.backends import aiter
from shuffled_tensor.device import arch
from shuffled_tensor.moe.call import MoECall
from shuffled_tensor.moe.op import fused_moe, plan

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What a call of :func:`shuffled_tensor.fused_moe` would do."""

    arch: str
    aiter: str
    """The aiter that is installed and its version, or why none can be used."""
    backend: str
    layout: str | None
    """The layout that the backend reads; None where it reads any."""
    shuffles: dict[str, str]
    """What w13 and w2 would be laid out anew as. On the GPU that aiter is for, the first use does that whoever
    computes."""
    tags: dict[str, Any]
    """Attributes that w13 would carry, and the gate mode it would be passed with."""
    activations: str
    passed_over: dict[str, str]
    """The backends that would have been preferred, and why they do not take the call."""

    def __str__(self) -> str:
        shuffles = (f"{name} to {layout}" for name, layout in self.shuffles.items())
        lines = [
            f"architecture  {self.arch}",
            f"aiter         {self.aiter}",
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
    bound = inspect.signature(fused_moe).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    leading = ("hidden_states", "w13", "w2", "topk_weight", "topk_ids", "out_dtype", "backend", "hidden_scale")
    fields = list(MoECall.__dataclass_fields__)
    options = fields[fields.index("hidden_scale") + 1 :]
    call, choice = plan(*(given[name] for name in (*leading, *options)))
    call.check()
    weights = {"w13": given["w13"], "w2": given["w2"]}
    storages = [weight._storage for weight in weights.values()]
    if choice.kind is not None:
        for storage in storages:
            storage.check_usable_as(choice.kind)
    kinds = backends.kinds_in_use(choice, *storages)
    shuffles = {
        name: layout.name
        for name, layout, storage in zip(weights, kinds, storages, strict=True)
        if layout is not None and layout is not storage.layout
    }
    device = call.w13_qdata.device
    tags: dict[str, Any] = {}
    activations = "as they come" if call.activation_dtype is None else f"mxfp4, {call.intermediate_scale_rule}"
    if choice.backend == "aiter":
        version = aiter.detect().version
        tags = {"is_shuffled": True, **version.w13_tags, "gate_mode": version.gate_mode}
        activations = f"mxfp4, {version.scale_rule}"
    return Explanation(
        arch=arch(device),
        aiter=aiter.installed(),
        backend=choice.backend,
        layout=None if choice.kind is None else choice.kind.name,
        shuffles=shuffles,
        tags=tags,
        activations=activations,
        passed_over=choice.passed_over,
    )
