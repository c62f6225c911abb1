# SPDX-License-Identifier: MIT
"""Families of models, by what their layers of experts are to a backend, a row each, of which README's table has the
names; and what config.json says of such a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffled_tensor.moe.activations import ACTIVATIONS, ActivationName
from shuffled_tensor.moe.explain import Explanation, explain
from shuffled_tensor.moe.op import MANY, Kernels
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["MODELS", "Layer", "Model", "explain_layer", "explain_model", "layer_in", "tokens_of"]


class Model(NamedTuple):
    """A row of :data:`MODELS`. Sizes are those of one of its checkpoints."""

    name: str
    model_types: tuple[str, ...]
    """What config.json calls it."""
    experts: int
    hidden: int
    intermediate: int
    topk: int
    activation: ActivationName = "silu"
    parameters: Mapping[str, float] = {}
    """Of the activation, where config.json names none and they are not its defaults."""
    bias: bool = False


_NEEDED = {"situ_beta": 4.0, "situ_linear_beta": 25.0}
"""Parameters of activations that have no default: Kimi-K3's."""

MODELS = (
    Model("DeepSeek V3 and R1", ("deepseek_v3", "deepseek_v32"), 256, 7168, 2048, 8),
    Model("Kimi K2", ("kimi_k2", "kimi_k25"), 384, 7168, 2048, 8),
    Model("Qwen3", ("qwen3_moe",), 128, 4096, 1536, 8),
    Model("DeepSeek V4", ("deepseek_v4",), 256, 4096, 2048, 6, "silu", {"swiglu_limit": 10.0}),
    Model("gpt-oss", ("gpt_oss",), 128, 2880, 2880, 4, "swiglu", bias=True),
    Model("MiniMax-M3", ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"), 128, 6144, 3072, 4, "swiglu"),
    Model("Kimi-K3", ("kimi_k3",), 896, 3584, 3072, 16, "situ", _NEEDED),
)

_HIDDEN_ACT: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swigluoai": "swiglu",
    "situ": "situ",
}
"""What config.json calls an activation."""

_TOPK = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")


class Layer(NamedTuple):
    """What config.json says of a layer of experts."""

    model_type: str
    activation: ActivationName
    parameters: dict[str, float]
    """Those that are not the activation's defaults."""
    topk: int | None


def layer_in(config: Mapping[str, Any], activation: ActivationName | None = None) -> Layer:
    """What a config.json says of its model's layers of experts; of another activation, if one is given.

    gpt-oss and MiniMax-M3 are known by their names, or by a ``swiglu_alpha``: they say ``"silu"`` and mean SwiGLU.

    Raises:
        TypeError, ValueError: an activation that :func:`shuffled_tensor.fused_moe` does not have, or what is no number
            of experts, or no parameter.
    """
    text = config.get("text_config") or config
    said: Mapping[str, Any] = {} if activation is not None else text
    if activation is None:
        names = [each.get("model_type") for each in (config, text)]
        model = next((model for name in names for model in MODELS if name in model.model_types), None)
        hidden_act = text.get("hidden_act") or "silu"
        if hidden_act not in _HIDDEN_ACT:
            known = ", ".join(_HIDDEN_ACT)
            raise ValueError(f"hidden_act={hidden_act!r} is no activation of fused_moe; known are {known}")
        activation = _HIDDEN_ACT[hidden_act]
        if activation == "silu" and (model is not None or text.get("swiglu_alpha")):
            activation = "swiglu" if model is None else model.activation
        if model is not None and model.activation == activation:
            said = dict(model.parameters) | {name: value for name, value in text.items() if value}
    parameters = {}
    for name, default in ACTIVATIONS[activation].parameters.items():
        value = said.get(name) or said.get(f"activation_{name}") or (_NEEDED[name] if default is None else None)
        if value is not None:
            parameters[name] = float(value)
    topk = next((text[name] for name in _TOPK if text.get(name)), None)
    if topk is not None and (type(topk) is not int or topk < 1):
        raise ValueError(f"a token goes to {topk!r} experts")
    return Layer(str(config.get("model_type") or "no model_type"), activation, parameters, topk)


def explain_layer(
    w13: ShuffledMXFP4Tensor,
    w2: ShuffledMXFP4Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk: int,
    activation: ActivationName,
    parameters: Mapping[str, Any],
) -> Explanation:
    """What :func:`shuffled_tensor.fused_moe` would do with such a layer and bfloat16 tokens, on the GPU that the meta
    device stands for. All tensors are on the meta device."""
    return explain(
        torch.empty(1, w13.shape[2], dtype=torch.bfloat16, device="meta"),
        w13,
        w2,
        torch.empty(1, topk, device="meta"),
        torch.empty(1, topk, dtype=torch.int32, device="meta"),
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=activation,
        **parameters,
    )


def explain_model(model: Model) -> Explanation:
    """The same of a layer of this family."""

    def weight(rows: int, columns: int, **kind: Any) -> ShuffledMXFP4Tensor:
        codes, scale = (
            torch.empty(model.experts, rows, columns // numbers, dtype=torch.uint8, device="meta")
            for numbers in (2, 32)
        )
        return ShuffledMXFP4Tensor(codes, scale, **kind)

    w13 = weight(2 * model.intermediate, model.hidden, gate_up=True, row_order="contiguous")
    w2 = weight(model.hidden, model.intermediate, gate_up=False)
    w13_bias, w2_bias = (torch.empty(each.shape[:2], device="meta") if model.bias else None for each in (w13, w2))
    return explain_layer(w13, w2, w13_bias, w2_bias, model.topk, model.activation, model.parameters)


def tokens_of(route: Kernels) -> str:
    """For which numbers of tokens a route is taken, in words."""
    first, last = route.tokens[0], route.tokens[-1]
    if last >= MANY:
        return "any" if first == 1 else f"{first} or more"
    return f"{first} to {last}"
