# SPDX-License-Identifier: MIT
"""transformers' models whose experts are packed: ``from shuffled_tensor.transformers import Mxfp4Config``, then
``AutoModelForCausalLM.from_pretrained(path, quantization_config=Mxfp4Config())``."""

from shuffled_tensor.integrations.transformers import Mxfp4Config, config_for, quantize_model_, use_for_mxfp4

__all__ = ["Mxfp4Config", "config_for", "quantize_model_", "use_for_mxfp4"]
