# SPDX-License-Identifier: MIT
"""The experts modules of transformers' models, on packed weights.

transformers gives every such module the same names (`gate_up_proj`, `down_proj`, and their `_bias`) and says of each
class how its weights lie: `is_transposed`, `is_concatenated` (all gate rows, then all up rows), `has_bias`, `has_gate`.
What it does not say is the activation, which is code: it is found out by trying it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shuffled_tensor.moe.activations import ACTIVATIONS
from shuffled_tensor.moe.op import fused_moe
from shuffled_tensor.tensor.geometry import interleave_rows, part_rows
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["FUNCTION", "PROJECTIONS", "experts_of", "is_packed", "order_of", "pack_", "prepare_", "why_not"]

_log = logging.getLogger("shuffled_tensor")

FUNCTION = "shuffled_tensor"
"""What the experts function is registered as: a model's ``experts_implementation``."""

PROJECTIONS = ("gate_up_proj", "down_proj")


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The experts modules of a model, by name, whatever their weights are."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def is_packed(experts: Any) -> bool:
    """Whether the weights of an experts module are ours; some have no gate, and other names."""
    return isinstance(getattr(experts, "gate_up_proj", None), ShuffledMXFP4Tensor)


def why_not(experts: Any) -> str | None:
    """Why the weights of an experts module cannot be ours, or None."""
    if not experts.has_gate:
        return "its experts have no gate"
    if experts.has_post_expert_norm:
        return "its experts end in a norm"
    if is_packed(experts):
        return "its weights are packed already"
    rows, columns = experts.gate_up_proj.shape[-2:]
    hidden, intermediate = (rows, columns // 2) if experts.is_transposed else (columns, rows // 2)
    if hidden % 32 or intermediate % 32:
        return f"its sizes {hidden} and {intermediate} are not multiples of 32"
    return None


def order_of(experts: Any, projection: str) -> dict[str, Any]:
    """How the rows of a projection come, as a ShuffledMXFP4Tensor is told of it."""
    if projection == "down_proj":
        return {"gate_up": False}
    return {"gate_up": True, "row_order": "contiguous" if experts.is_concatenated else "interleaved"}


def prepare_(name: str, experts: Any) -> None:
    """Before its weights are packed: find out how it is to be called."""
    experts.packed_gate = _gate_of(experts)
    if experts.packed_gate is None:
        _log.info("%s: its activation is none that kernels know, so it runs one expert at a time", name)


def pack_(experts: Any, **options: Any) -> None:
    """Quantise the weights of an experts module, one after the other, and bring its bias into their order."""
    for projection in PROJECTIONS:
        values = getattr(experts, projection)
        values = values.transpose(-1, -2) if experts.is_transposed else values
        packed = ShuffledMXFP4Tensor.from_hp(values.detach(), **order_of(experts, projection), **options)
        setattr(experts, projection, nn.Parameter(packed, requires_grad=False))
    if experts.has_bias and not experts.is_concatenated:
        experts.gate_up_proj_bias.data = part_rows(experts.gate_up_proj_bias.data)


def _gate_of(experts: Any) -> dict[str, Any] | None:
    """What `fused_moe` calls the activation of an experts module; None where it has no name for it."""
    given = {float(value) for value in vars(experts).values() if type(value) in (int, float)}
    numbers = sorted(number for number in given if 0 < number < math.inf)
    # beyond every limit, or it would not be seen; on the CPU and in float64, whatever the context makes
    beyond = [sign * 1.5 * number for number in numbers for sign in (1, -1)]
    points = torch.tensor([*range(-12, 13), *beyond], dtype=torch.float64, device="cpu")
    gate, up = torch.meshgrid(points, points, indexing="ij")
    rows = torch.stack((gate, up), -2 if experts.is_concatenated else -1).flatten(-2)
    try:
        with torch.no_grad():
            found = experts._apply_gate(rows)
    except RuntimeError:  # it has parameters, elsewhere or of another dtype: none that kernels know has any
        return None
    for call in _calls(numbers):
        if torch.allclose(found, ACTIVATIONS[call["activation"]](gate, up, **call), rtol=1e-6, atol=1e-6):
            return {name: value for name, value in call.items() if value is not None}
    return None


def _calls(numbers: list[float]) -> Iterator[dict[str, Any]]:
    """Every activation, with every one of these numbers for its parameters."""
    for name, activation in ACTIVATIONS.items():
        choices = [numbers if default is None else [None, *numbers] for default in activation.parameters.values()]
        for chosen in product(*choices):
            yield {"activation": name, **dict(zip(activation.parameters, chosen, strict=True))}


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function."""
    if not is_packed(self):  # a layer that is not packed
        plain: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return plain
    if not hasattr(self, "packed_gate"):  # somebody else has packed it
        prepare_(type(self).__name__, self)
    bias = {"w13_bias": self.gate_up_proj_bias, "w2_bias": self.down_proj_bias} if self.has_bias else {}
    wants_gradient = any(given.requires_grad for given in (hidden_states, top_k_weights, *bias.values()))
    if (wants_gradient and torch.is_grad_enabled()) or self.packed_gate is None:
        return _one_by_one(self, hidden_states, top_k_index, top_k_weights)
    if self._is_expert_parallel:  # other ranks' experts have ids behind these, and weight 0
        top_k_index = top_k_index.clamp(max=self.num_experts - 1)
    return fused_moe(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_weights, top_k_index, **self.packed_gate, **bias
    )


def _one_by_one(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """With any activation, and with a gradient: the experts in use are dequantised one at a time, and once more for the
    backward."""
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:  # another rank's
            continue
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        first, second = (self.gate_up_proj_bias[expert], self.down_proj_bias[expert]) if self.has_bias else (None, None)
        rows = F.linear(hidden_states[token], self.gate_up_proj[expert], first)
        rows = self._apply_gate(rows if self.is_concatenated else interleave_rows(rows))
        rows = F.linear(rows, self.down_proj[expert], second) * top_k_weights[token, slot, None]
        out = out.index_add(0, token, rows.to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(FUNCTION, _forward)
