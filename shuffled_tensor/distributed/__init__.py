# SPDX-License-Identifier: MIT
"""Weights of several ranks: which bytes may travel between them, and how."""

from shuffled_tensor.distributed import collectives as _collectives  # registers the operations between ranks
from shuffled_tensor.distributed import fsdp as _fsdp  # gives the class its hooks
from shuffled_tensor.distributed.agreement import agree_
from shuffled_tensor.distributed.moves import Move, move_experts_, plan_moves
from shuffled_tensor.distributed.push import broadcast_, scatter_
from shuffled_tensor.tensor.place import Place

__all__ = ["Move", "Place", "agree_", "broadcast_", "move_experts_", "plan_moves", "scatter_"]

del _collectives, _fsdp
