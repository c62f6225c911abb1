# SPDX-License-Identifier: MIT
"""transformers' models whose experts are packed: public as ``shuffled_tensor.transformers``."""

from shuffled_tensor.integrations.transformers.loading import Mxfp4Config, config_for, quantize_model_, use_for_mxfp4

__all__ = ["Mxfp4Config", "config_for", "quantize_model_", "use_for_mxfp4"]
