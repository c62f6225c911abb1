# SPDX-License-Identifier: MIT
"""vLLM: its MXFP4 expert layers keep their bytes in weights of this package.

vLLM finds :func:`register` by the entry point ``shuffled_tensor`` of the group ``vllm.general_plugins``. The engine's
own method of each layer makes the parameters, loads them, lays them out, chooses and calls the kernel. What is added is
an owner of the bytes, ``layer.mxfp4_experts``: a reload then leaves kernels, scales and addresses where a rebalance and
a captured graph expect them, and whoever loads again without laying out again writes into the layout that is there.

``SHUFFLED_TENSOR_PLUGIN=0`` turns it off.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from shuffled_tensor.integrations.experts import lay_out, turned_off

__all__ = ["register"]

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_CONFIGS = {
    "quark": (f"{_QUANTIZATION}.quark.quark", "QuarkConfig"),
    "mxfp4": (f"{_QUANTIZATION}.mxfp4", "Mxfp4Config"),
    "gpt_oss_mxfp4": (f"{_QUANTIZATION}.mxfp4", "GptOssMxfp4Config"),
}
_BACKENDS = ("AITER_MXFP4_MXFP4", "AITER_MXFP4_BF16")
"""Of vLLM, that read shuffled bytes by aiter."""


def register() -> None:
    """Put weights of this package under vLLM's MXFP4 experts, or say in one line why not."""
    try:
        why = turned_off() or _override()
    except Exception as error:  # vLLM would end with it
        why = f"this vLLM names things otherwise ({error})"
    if why:
        _log().info("shuffled_tensor stands aside: %s", why)


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.shuffled_tensor")  # what is not below "vllm" is not shown


def _override() -> str | None:
    """Make the configurations of MXFP4 give methods that own bytes; or say why not."""
    from vllm.platforms import current_platform

    if not current_platform.is_rocm():
        return "it is for gfx950 GPUs, and this platform is not ROCm"
    from vllm.platforms.rocm import on_gfx950

    if not on_gfx950():
        return "it is for gfx950 GPUs, and this is another one"
    quantization: Any = import_module(_QUANTIZATION)
    owning = {name: _owning_config(name) for name in _CONFIGS}
    registered = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    for name in owning:
        if name in registered and registered[name].__module__ != __name__:
            return f"another plugin has registered quantization {name!r}: {registered[name].__module__}"
    for name, config in owning.items():
        quantization.register_quantization_config(name)(config)
    return None


def _owning_config(name: str) -> Any:
    """A configuration of vLLM's, whose methods for experts own bytes."""
    module, config = _CONFIGS[name]
    theirs: Any = getattr(import_module(module), config)

    class Owning(theirs):  # type: ignore[misc]
        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            method = super().get_quant_method(layer, prefix)
            if hasattr(method, "mxfp4_backend"):
                try:
                    why = _not_ours(layer, method.mxfp4_backend.name)
                except AttributeError as error:
                    why = f"this vLLM names things otherwise ({error})"
                if why is None:
                    method.__class__ = _owning_method(type(method))
                else:
                    _log().info_once("shuffled_tensor leaves MXFP4 experts to vLLM: %s", why)
            return method

        def __reduce__(self) -> Any:  # vLLM sends it to the processes that load the model
            return _configured, (name, vars(self))

    Owning.__name__ = theirs.__name__
    return Owning


def _configured(name: str, state: dict[str, Any]) -> Any:
    config = object.__new__(_owning_config(name))
    vars(config).update(state)
    return config


def _not_ours(layer: Any, backend: str) -> str | None:
    from vllm.config import get_current_vllm_config

    if backend not in _BACKENDS:
        return f"their backend is {backend}"
    if layer._fused_shared_expert_quantizer is not None:
        return "a shared expert is quantised into them while it is loaded, past the loaders of their parameters"
    offload = get_current_vllm_config().offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        return "weights are offloaded to the CPU"
    return None


def _owning_method(method: type[Any]) -> Any:
    """A method of vLLM's, that owns the bytes of its layer."""

    class Owning(method):  # type: ignore[misc]
        def process_weights_after_loading(self, layer: Any) -> None:
            # what vLLM makes a second time has scales of its own, which it copies into the first ones and drops
            first = getattr(self, "moe_quant_config", None), getattr(self, "moe_kernel", None)
            again = hasattr(layer, "mxfp4_experts")
            try:
                why = lay_out(layer, partial(super().process_weights_after_loading, layer))
            finally:
                if again:
                    self.moe_quant_config, self.moe_kernel = first
            if again:
                return
            if why:
                _log().warning("shuffled_tensor leaves %s to vLLM: %s", layer.layer_name, why)
            else:
                _log().info_once("shuffled_tensor owns MXFP4 experts: %s a layer", layer.mxfp4_experts.summary)
                _log().debug("shuffled_tensor owns %s", layer.layer_name)

    Owning.__name__ = method.__name__  # by which loaders tell methods apart
    return Owning
