# SPDX-License-Identifier: MIT
"""Ranks agree on how their weights lie, so that bytes may travel between them as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["agree_", "check_agreed"]


def agree_(weights: nn.Module | Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Lay weights out alike on every rank of a group, and keep them so: their bytes may then travel as they lie.

    Collective: every rank names its own weights, as many and in the same order. The numbers of experts may differ. The
    layout is the one that a rank has fixed, else the one that a rank's backend reads, else the one that most ranks
    have. It is locked from then on, on every rank, as :meth:`ShuffledMXFP4Tensor.as_kernel_operands` locks it.

    Args:
        weights: a module, all of whose parameters and buffers that are weights are meant, by their names; or weights.
            A DTensor stands for this rank's part. Other tensors are left out.
        group: which ranks; None is the default group.

    Raises:
        ValueError: names, sizes or ``align`` differ, layouts are fixed or locked to different ones, a weight is
            unusable, or is a view of rows or columns: the same on every rank, and nothing has changed.
        RuntimeError: a rank could not bring a weight into the layout: on every rank, and nothing is agreed on.
    """
    raise NotImplementedError


def check_agreed(weight: ShuffledMXFP4Tensor, group: dist.ProcessGroup | None, what: str) -> None:
    """Raise NotImplementedError, which names :func:`agree_`, where a weight's bytes mean nothing to the other ranks of
    a group: ``what`` is what would send them."""
    raise NotImplementedError
