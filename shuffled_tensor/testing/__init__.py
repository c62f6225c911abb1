# SPDX-License-Identifier: MIT
"""For tests without a gfx950 GPU: a contract double of aiter. With it, :func:`shuffled_tensor.override_arch`."""

from shuffled_tensor.testing.aiter_double import ERAS, Double, aiter_double

__all__ = ["ERAS", "Double", "aiter_double"]
