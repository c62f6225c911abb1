# SPDX-License-Identifier: MIT
"""Which values the kernel of :mod:`~shuffled_tensor.backends.triton.quantize` takes, and how it is launched."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from shuffled_tensor.backends.triton import unusable
from shuffled_tensor.backends.triton.moves import on
from shuffled_tensor.mxfp4 import BLOCK, BOUNDARIES, Quantizer, ScaleRule
from shuffled_tensor.owners import is_real

__all__ = ["TritonQuantizer", "launch"]

_log = logging.getLogger("shuffled_tensor")

_PAIRS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
"""How the kernel sees two values."""

_BLOCKS = 128
"""That a program has: one of them a thread."""


class TritonQuantizer(Quantizer):
    """On GPUs that Triton compiles for."""

    def __init__(self) -> None:
        self._failed = False

    def takes(self, values: Tensor) -> bool:
        return (
            values.dtype in _PAIRS
            and not self._failed
            and not torch.compiler.is_compiling()
            and is_real(values)
            and unusable(values.device) is None
            and not _len_torch_dispatch_stack()  # a mode would not see it
            and not torch._C._are_functorch_transforms_active()
            and not (
                values.is_cuda and torch.cuda.is_current_stream_capturing()
            )  # which may meet the kernel before it is compiled
        )

    def quantize(self, values: Tensor, qdata: Tensor, scale: Tensor, scale_rule: ScaleRule) -> bool:
        if not self.takes(values):
            return False
        try:
            launch(values, qdata, scale, scale_rule)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler: found before a byte is written
            self._failed = True
            _log.warning("values are quantised without Triton, which failed: %s", error)
        return not self._failed


def launch(values: Tensor, qdata: Tensor, scale: Tensor, scale_rule: ScaleRule) -> None:
    """Write contiguous uint8 codes and scales of bfloat16 or float32 values, whose number is a multiple of 32."""
    from shuffled_tensor.backends.triton import quantize

    values = values.detach().contiguous()
    if values.data_ptr() % 16:
        values = values.clone()
    blocks = values.numel() // BLOCK
    if not blocks:
        return
    with on(values.device):
        quantize.quantize[(-(-blocks // _BLOCKS),)](
            values.view(_PAIRS[values.dtype]),
            qdata,
            scale,
            blocks,
            RULE=scale_rule,
            BOUNDARIES=BOUNDARIES,
            BLOCKS=_BLOCKS,
        )
