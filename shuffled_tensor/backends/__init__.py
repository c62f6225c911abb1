# SPDX-License-Identifier: MIT
"""Who computes a mixture-of-experts layer. To add a backend: a subclass of :class:`Backend`, and its place here."""

from shuffled_tensor import layouts, mxfp4
from shuffled_tensor.backends.aiter import Aiter
from shuffled_tensor.backends.base import BACKENDS, Backend, FirstUse, select
from shuffled_tensor.backends.reference import Reference
from shuffled_tensor.backends.triton import Triton
from shuffled_tensor.backends.triton.moves import TritonMover
from shuffled_tensor.backends.triton.quantizer import TritonQuantizer
from shuffled_tensor.moe import op
from shuffled_tensor.tensor import policy

__all__ = ["BACKENDS", "Backend", "select"]

BACKENDS.update({backend.name: backend for backend in (Aiter(), Triton(), Reference())})

op.install(select)
policy.install(FirstUse())
layouts.install(TritonMover())
mxfp4.install(TritonQuantizer())
