# SPDX-License-Identifier: MIT
"""``fully_shard`` of weights: each rank keeps some experts, packed, and gathers the others for a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shuffled_tensor.distributed.agreement import agree_
from shuffled_tensor.layouts import Layout
from shuffled_tensor.mxfp4 import PARTS
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__: list[str] = []


def _pre_all_gather(
    self: ShuffledMXFP4Tensor, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[Tensor, ...], Layout]:
    """What FSDP gathers: codes and scales as they lie, on which ranks agree at the first time.

    Raises:
        ValueError: experts that do not come out even, or rows or columns are parted; on every rank alike.
    """
    experts, *expert = outer_size
    if list(self.shape[1:]) != expert or len(self) * mesh.size() != experts:
        raise ValueError(
            f"fully_shard parts a ShuffledMXFP4Tensor along experts, dim 0, in equal parts: {list(outer_size)} on "
            f"{mesh.size()} ranks does not come out so, found {list(self.shape)}; leave it out with ignored_params, or "
            "part it with shard()"
        )
    group = mesh.get_group()
    if not self._storage.agrees(torch.distributed.get_process_group_ranks(group)):
        agree_([self], group)
    return tuple(self.bytes_around(part) for part in PARTS), self._storage.layout


def _post_all_gather(
    self: ShuffledMXFP4Tensor,
    all_gather_outputs: tuple[Tensor, Tensor],
    layout: Layout,
    param_dtype: torch.dtype,
    *,
    out: Any = None,
) -> tuple[ShuffledMXFP4Tensor, tuple[Tensor, Tensor]] | None:
    """The whole weight over what FSDP gathered; or, where it has gathered into ``out`` again, that this is so."""
    if out is not None:
        # its first use may have laid out what was gathered before
        getattr(out, "_local_tensor", out)._storage.received(layout)
        return None
    storage = self._storage
    gathered = PackedStorage(*all_gather_outputs, storage.geometry, layout, storage.requested_layout, storage.row_order)
    return self._like(gathered, param_dtype), all_gather_outputs


# Here, and not in the class, because they speak to other ranks.
ShuffledMXFP4Tensor.fsdp_pre_all_gather = _pre_all_gather  # type: ignore[attr-defined]
ShuffledMXFP4Tensor.fsdp_post_all_gather = _post_all_gather  # type: ignore[attr-defined]
