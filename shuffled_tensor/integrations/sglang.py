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

            for target in (
                *_PROCESS,
                "sglang.srt.utils.is_gfx95_supported",
                "sglang.srt.utils.offloader.get_offloader",
            ):
                pkgutil.resolve_name(target)
    except Exception as error:  # whatever it is, SGLang starts without this
        why = f"this SGLang names things otherwise ({error})"
    if why:
        _log.info("shuffled_tensor stands aside: %s", why)
        return
    for target in _PROCESS:
        HookRegistry.register(target, _process, HookType.AROUND)


def _process(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Around what lays out a layer."""
    again = hasattr(layer, "mxfp4_experts")
    why = _not_ours(method)
    if why:
        original(method, layer)
    else:
        why = lay_out(layer, partial(original, method, layer))
    if why:
        _say_once(f"shuffled_tensor leaves MXFP4 experts to SGLang: {why}")
    elif not again:
        _say_once(f"shuffled_tensor owns MXFP4 experts: {layer.mxfp4_experts.summary} a layer")


def _not_ours(method: Any) -> str | None:
    from sglang.srt.utils import is_gfx95_supported
    from sglang.srt.utils.offloader import NoopOffloader, get_offloader

    if not is_gfx95_supported():
        return "this GPU is no gfx950"
    if not isinstance(get_offloader(), NoopOffloader):
        return "weights are offloaded"
    for name in ("use_triton_kernels", "use_marlin", "use_flashinfer", "use_deep_gemm", "use_mega_moe"):
        if getattr(method, name, False):
            return f"SGLang's kernels for them are others ({name})"
    # these look for the parameter itself while they load, and quantise into it
    if getattr(method, "quantize_shared_expert_online", False) or getattr(method, "dequantization_config", None):
        return "weights are quantised while they are loaded"
    return None


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.info(line)
