# SPDX-License-Identifier: MIT
"""What ``save_pretrained`` writes: forms that others read. gpt-oss is saved as OpenAI's ``mxfp4``; every other model as
compressed-tensors' ``mxfp4-pack-quantized``, one tensor an expert and projection."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from shuffled_tensor.integrations.transformers.experts import experts_of, is_packed
from shuffled_tensor.integrations.transformers.packing import stacks_experts
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["BY_EXPERT", "saved_config", "saved_state"]

BY_EXPERT = {
    "experts.gate_up_proj": ("experts.*.gate_proj", "experts.*.up_proj"),
    "experts.down_proj": ("experts.*.down_proj",),
}
"""What a projection's tensors are called, expert by expert, where a model has no names for them."""


def saved_config(model: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a model, by which of its experts are packed."""
    plain = [name for name, module in experts_of(model).items() if not is_packed(module)]
    if model.config.model_type == "gpt_oss":
        others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": others + plain}
    weights = {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
        "scale_dtype": "torch.uint8", "observer": "minmax",
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": "mxfp4-pack-quantized"}},
        # all that is no expert, whatever it is called in the file; and experts that are not packed
        "ignore": [r"re:^(?!.*\.experts(\.|$)).*$", *(rf"re:^{re.escape(name)}(\..*)?$" for name in plain)],
    }


def saved_state(model: Any) -> dict[str, Tensor]:
    """A model's state_dict, with packed experts as plain row-major tensors on the CPU, whatever their layout."""
    state: dict[str, Tensor] = {}
    names = _names_by_expert(model)
    for name, value in model.state_dict().items():
        if not isinstance(value, ShuffledMXFP4Tensor):
            state[name] = value
        elif model.config.model_type == "gpt_oss":
            experts, _ = get_module_from_name(model, name)
            order = "interleaved" if value.gate_up and not experts.is_concatenated else None
            codes, scales = (view.clone().cpu() for view in value.views(order))  # type: ignore[arg-type]
            state |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
        else:
            target, sources = next((target, sources) for target, sources in names.items() if name.endswith(target))
            views, rows = value.views(), value.shape[1] // len(sources)
            for half, source in enumerate(sources):
                for expert in range(len(value)):
                    tensor = f"{name.removesuffix(target)}{source}".replace("*", str(expert))
                    parts = (view[expert].narrow(0, half * rows, rows).clone().cpu() for view in views)
                    state |= dict(zip((f"{tensor}.weight_packed", f"{tensor}.weight_scale"), parts, strict=True))
    return state


def _names_by_expert(model: Any) -> dict[str, tuple[str, ...]]:
    """By the end of a stacked weight's name, that of each expert's tensors, as the model's checkpoints have them."""
    own = {
        converter._original_target_patterns[0].replace("\\", ""): tuple(
            source.removesuffix(".weight").replace("\\", "") for source in converter._original_source_patterns
        )
        for converter in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(converter, WeightConverter) and stacks_experts(converter)
    }
    return own or BY_EXPERT
