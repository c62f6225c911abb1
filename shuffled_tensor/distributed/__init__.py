# SPDX-License-Identifier: MIT
"""Weights of several ranks: which bytes may travel between them, and how."""

from shuffled_tensor.distributed import collectives as _collectives  # registers the operations between ranks
from shuffled_tensor.distributed.agreement import agree_
from shuffled_tensor.distributed.push import broadcast_, scatter_
from shuffled_tensor.tensor.place import Place

__all__ = ["Place", "agree_", "broadcast_", "scatter_"]

del _collectives
