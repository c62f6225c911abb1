# SPDX-License-Identifier: MIT
"""SGLang: its MXFP4 expert layers keep their bytes in weights of this package.

SGLang finds :func:`register` by the entry point ``shuffled_tensor`` of the group ``sglang.srt.plugins``. The engine
makes the parameters, loads them, lays them out and calls the kernel as before; its parameters stay plain tensors. What
is added is an owner of the bytes, ``layer.mxfp4_experts``: from then on the loaders on the parameters write where bytes
belong, so that ``load_weights`` alone, of all experts or of one, is a refit in place, and the laying out that may
follow has nothing to do.

``SHUFFLED_TENSOR_PLUGIN=0`` turns it off.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shuffled_tensor.integrations.experts import lay_out, turned_off

__all__ = ["register"]

_log = logging.getLogger("shuffled_tensor")

_QUANTIZATION = "sglang.srt.layers.quantization"
_PROCESS = (
    f"{_QUANTIZATION}.quark.schemes.quark_w4a4_mxfp4_moe.QuarkW4A4MXFp4MoE.process_weights_after_loading",
    f"{_QUANTIZATION}.mxfp4.Mxfp4MoEMethod.process_weights_after_loading",
)
"""What lays out experts."""

_said: set[str] = set()


def register() -> None:
    """Put weights of this package under SGLang's MXFP4 experts, or say in one line why not."""
    why = turned_off() or (None if torch.version.hip else "it is for gfx950 GPUs, and this PyTorch is not for ROCm")
    try:
        if not why:
            from sglang.srt.plugins.hook_registry import HookRegistry, HookType

            for target in _PROCESS:
                pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        why = f"this SGLang names things otherwise ({error})"
    if why:
        _log.info("shuffled_tensor stands aside: %s", why)
        return
    for target in _PROCESS:
        HookRegistry.register(target, _process, HookType.AROUND)


def _process(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Around what lays out a layer."""
    from sglang.srt.utils import is_gfx95_supported

    if not is_gfx95_supported():
        original(method, layer)
        _say_once("shuffled_tensor leaves MXFP4 experts to SGLang: this GPU is no gfx950")
        return
    again = hasattr(layer, "mxfp4_experts")
    why = lay_out(layer, partial(original, method, layer))
    if why:
        _say_once(f"shuffled_tensor leaves MXFP4 experts to SGLang, layer {layer.layer_id} first: {why}")
    elif not again:
        _say_once(f"shuffled_tensor owns MXFP4 experts: {layer.mxfp4_experts.summary} a layer")
        _log.debug("shuffled_tensor owns the experts of layer %s", layer.layer_id)


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.info(line)
