# SPDX-License-Identifier: MIT
"""AMD's aiter: which one is installed, and how it is called."""

from shuffled_tensor.backends.aiter.call import kernel_operands, kind, refuse, run, tagged_weight
from shuffled_tensor.backends.aiter.versions import (
    ARCH,
    VERSIONS,
    Unusable,
    detect,
    forget,
    installed,
    unusable,
)

__all__ = [
    "ARCH",
    "VERSIONS",
    "Unusable",
    "detect",
    "forget",
    "installed",
    "kernel_operands",
    "kind",
    "refuse",
    "run",
    "tagged_weight",
    "unusable",
]
