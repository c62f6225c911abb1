# SPDX-License-Identifier: MIT
"""``from_pretrained(path, quantization_config=Mxfp4Config())``: experts come as weights of this package, from
checkpoints in MXFP4 as they are, and from others quantised while they are loaded. No layer exists in high precision."""

from __future__ import annotations

import logging
from fnmatch import translate
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from shuffled_tensor.integrations.transformers.checking import check_names, names_in
from shuffled_tensor.integrations.transformers.experts import (
    FUNCTION,
    PROJECTIONS,
    experts_of,
    is_packed,
    pack_,
    prepare_,
    why_not,
)
from shuffled_tensor.integrations.transformers.packing import SUFFIXES, Pack, PartBias, Quantize, stacks_experts
from shuffled_tensor.integrations.transformers.saving import BY_EXPERT, saved_config, saved_state
from shuffled_tensor.mxfp4 import BLOCK, ScaleRule
from shuffled_tensor.tensor.geometry import interleave_rows

__all__ = ["Mxfp4Config", "config_for", "quantize_model_", "use_for_mxfp4"]

_log = logging.getLogger("shuffled_tensor")

_Model = TypeVar("_Model", bound=nn.Module)

METHOD = "shuffled_mxfp4"
"""By which transformers finds the quantizer; no file ever names it, because who has not this package would be given
experts at random."""


@register_quantization_config(METHOD)
class Mxfp4Config(transformers.Mxfp4Config):  # type: ignore[misc]
    """Experts in MXFP4, as :class:`shuffled_tensor.ShuffledMXFP4Tensor`.

    It has the name of transformers' own, because that compares a checkpoint's config with the caller's by this name.

    Args:
        modules_to_not_convert: names of modules whose experts stay in high precision.
        scale_rule: one of :data:`shuffled_tensor.SCALE_RULES`, for weights that are quantised.
        shuffle_kind: fixes the layout; None leaves that to the backend that first uses the weights.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        scale_rule: ScaleRule = "even",
        shuffle_kind: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(modules_to_not_convert, dequantize)
        if dequantize:
            raise ValueError("packed experts stay packed: for dequantize=True, pass transformers' own Mxfp4Config")
        self.quant_method = METHOD
        self.scale_rule: ScaleRule = scale_rule
        self.shuffle_kind = shuffle_kind
        self.saved: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of :meth:`ShuffledMXFP4Tensor.from_hp`."""
        return {"scale_rule": self.scale_rule, "shuffle_kind": self.shuffle_kind}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What is put onto the config that a checkpoint has: from then on, it is for this quantizer."""
        own = {name: value for name, value in vars(self).items() if name != "modules_to_not_convert"}
        return own | {"to_be_left": self.modules_to_not_convert}

    def to_dict(self) -> dict[str, Any]:
        """What a saved model's config.json says."""
        return dict(self.saved or {"quant_method": METHOD})


@register_quantizer(METHOD)
class Mxfp4Quantizer(HfQuantizer):  # type: ignore[misc]
    quantized_element_size = 1 / 2 + 1 / BLOCK
    is_trainable, is_compileable = True, True  # what surrounds the experts

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        given = dict(vars(quantization_config))  # of a checkpoint's own class where it is packed, with our attributes
        if given.pop("dequantize", False):
            raise ValueError("use_for_mxfp4() has packed experts stay packed, and dequantize=True was asked for")
        if given.pop("to_be_left", None):
            raise ValueError(
                "modules_to_not_convert was given for a checkpoint that is packed: what it has packed stays packed"
            )
        self.quantization_config = Mxfp4Config()
        self.quantization_config.__dict__.update(given | {"quant_method": METHOD})
        self.experts: dict[str, Any] = {}
        self.found: set[str] = set()
        """Names of the experts' weights that have come out of the checkpoint."""
        self._names: set[str] = set()
        self._replaced: dict[WeightConverter, WeightConverter] = {}

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("packed experts cannot be offloaded to disk; map them to a GPU or to the CPU")

    def update_attn_implementation(self, config: Any) -> Any:
        """Before the model is built: its experts function, unless the caller has chosen one."""
        if config._experts_implementation is None:
            config._experts_implementation = FUNCTION
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._names = names_in(checkpoint_files or [])
            check_names(self._names)
        skip = self.get_modules_to_not_convert(model, self.quantization_config.modules_to_not_convert or [])
        for name, module in experts_of(model).items():
            reason = why_not(module) if should_convert_module(name, skip) else "modules_to_not_convert names it"
            if reason:
                _log.info("%s stays as it is: %s", name, reason)
            else:
                prepare_(name, module)
                self.experts[name] = module
        if not self.experts:
            raise ValueError(f"{type(model).__name__} has no experts that MXFP4 weights could replace")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, name = param_name.rpartition(".")
        return owner in self.experts and name in PROJECTIONS

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Those of the model that stack one tensor an expert stack packed ones too, into ours."""
        converters = []
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter) and stacks_experts(converter):
                names = [name.removesuffix(".weight") for name in converter._original_source_patterns]
                sources = [name + suffix for name in names for suffix in SUFFIXES]
                # a list of its own: a copy shares it, and changes it
                packing = converter.copy(
                    sources, [*converter._original_target_patterns], operations=[Pack(self, names)]
                )
                self._replaced[packing], converter = converter, packing
            converters.append(converter)
        if self.pre_quantized and not self._replaced:
            for target, own in BY_EXPERT.items():
                sources = [name + suffix for name in own for suffix in SUFFIXES]
                converters.append(WeightConverter(sources, target, [Pack(self, list(own))]))
        if any(not module.is_concatenated and module.has_bias for module in self.experts.values()):
            converters.append(WeightConverter("gate_up_proj_bias", "gate_up_proj_bias", [PartBias(self)]))
        if self.pre_quantized:
            converters += [
                WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [Pack(self)]) for name in PROJECTIONS
            ]
        return converters

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # layers that are not packed are saved as the model's own converters say; packed ones have names of their own
        own = [self._replaced.get(used, used) for used in model._weight_conversions]
        model._weight_conversions = [used for used in own if not isinstance(getattr(used, "operations", [0])[0], Pack)]
        self._replaced.clear()
        for name, experts in list(self.experts.items()):
            if is_packed(experts):
                continue
            del self.experts[name]  # the checkpoint has not packed it
            missing = [f"{name}.{projection}" for projection in PROJECTIONS if not self._came(f"{name}.{projection}")]
            if self._names and missing:
                raise ValueError(f"{missing[0]} is in no file of the checkpoint, so it would be random")
            if experts.has_bias and not experts.is_concatenated:
                experts.gate_up_proj_bias.data = interleave_rows(experts.gate_up_proj_bias.data)
        self.quantization_config.saved = saved_config(model)

    def _came(self, name: str) -> bool:
        """Whether a weight was loaded: by an operation of ours, or as it is in the file."""
        return name in self.found or any(name.endswith(there) or there.endswith(name) for there in self._names)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return saved_state(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for experts in experts_of(model).values():
            if not is_packed(experts):
                continue
            for name in PROJECTIONS:
                value = getattr(experts, name).dequantize(dtype)
                if name == "gate_up_proj" and not experts.is_concatenated:
                    value = interleave_rows(value)
                value = value.transpose(1, 2).contiguous() if experts.is_transposed else value
                setattr(experts, name, nn.Parameter(value, requires_grad=False))
            if experts.has_bias and not experts.is_concatenated:
                experts.gate_up_proj_bias.data = interleave_rows(experts.gate_up_proj_bias.data)
        model.set_experts_implementation("grouped_mm")
        return model


def quantize_model_(model: _Model, config: Mxfp4Config | None = None) -> _Model:
    """Quantise the experts of a model that is loaded already, in place and one weight after the other, and have them
    computed by :func:`shuffled_tensor.fused_moe`. It is saved as one that was loaded so.

    Raises:
        ValueError: it has no experts that MXFP4 weights could replace: the log says of each why; or it is no whole
            model of transformers, or quantised otherwise.
    """
    anything: Any = model
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"give the whole model: a {type(model).__name__} has no configuration that says who runs experts"
        )
    if not isinstance(getattr(model, "hf_quantizer", None), Mxfp4Quantizer | None):
        raise ValueError(f"{type(model).__name__} is quantised already, by {type(model.hf_quantizer).__name__}")
    quantizer = Mxfp4Quantizer(config or Mxfp4Config(), pre_quantized=False)
    quantizer._process_model_before_weight_loading(anything)
    for name, experts in quantizer.experts.items():
        pack_(experts, **quantizer.quantization_config.options)
        _log.info("%s: found %s, packed", name, " and ".join(PROJECTIONS))
    anything.set_experts_implementation(FUNCTION)
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    anything._weight_conversions = quantizer.update_weight_conversions(conversions)
    anything.hf_quantizer, anything.is_quantized, anything.quantization_method = quantizer, True, METHOD
    quantizer.postprocess_model(anything)
    quantizer.quantization_config.saved = saved_config(model)
    return model


def use_for_mxfp4() -> None:
    """Have every checkpoint of ``"quant_method": "mxfp4"`` (gpt-oss) loaded so, whoever calls from_pretrained."""
    AUTO_QUANTIZER_MAPPING["mxfp4"] = Mxfp4Quantizer


def config_for(path: str, **kwargs: Any) -> Any:
    """The config of a checkpoint in another form of MXFP4 (Quark, compressed-tensors, DeepSeek), to be given to
    ``from_pretrained(path, config=...)``; ``kwargs`` are those of ``AutoConfig.from_pretrained``."""
    config = transformers.AutoConfig.from_pretrained(path, **kwargs)
    found = getattr(config, "quantization_config", None)
    if found is None:
        raise ValueError(f"{path} is not quantised: pass quantization_config=Mxfp4Config() to from_pretrained")
    found = found if isinstance(found, dict) else found.to_dict()
    skip = found.get("ignore") or found.get("exclude") or found.get("modules_to_not_convert") or []
    patterns = [_pattern(name) for name in skip]
    config.quantization_config = {"quant_method": METHOD, "modules_to_not_convert": patterns}
    return config


def _pattern(name: str) -> str:
    """Of modules that a checkpoint has not packed, as transformers reads them: Quark has globs there, and
    compressed-tensors expressions behind `re:`."""
    if name.startswith("re:"):
        return name.removeprefix("re:")
    return translate(name) if "*" in name else name
