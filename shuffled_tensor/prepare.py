# SPDX-License-Identifier: MIT
"""Shuffling everything now, at a time of the caller's choosing."""

from __future__ import annotations

import logging
import time
from collections import Counter

from torch import nn

from shuffled_tensor import backends
from shuffled_tensor.storage import PackedStorage
from shuffled_tensor.tensor import ShuffledMXFP4Tensor

__all__ = ["prepare"]

_log = logging.getLogger("shuffled_tensor")


def weights_of(module: nn.Module) -> list[PackedStorage]:
    """The storages of a module's parameters and buffers, each once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if isinstance(t, ShuffledMXFP4Tensor)]
    return list({id(tensor._storage): tensor._storage for tensor in tensors}.values())


def prepare(module: nn.Module, *, progress: bool = False) -> nn.Module:
    """Lay out every :class:`ShuffledMXFP4Tensor` of a module as its first use would, and log one line about it.

    Call it before a CUDA graph is captured and before the first request. On a device whose backend reads any layout,
    nothing changes.

    Args:
        module: parameters and buffers of it and its submodules are prepared, in place.
        progress: show a tqdm progress bar (the extra ``checkpoint`` installs tqdm).

    Returns:
        ``module``.
    """
    storages = steps = weights_of(module)
    if progress:
        from tqdm import tqdm

        steps = tqdm(storages, desc="shuffling MXFP4 weights", unit="weight")
    start, moved, kinds = time.perf_counter(), 0, Counter[str]()
    for storage in steps:
        kind = backends.kind_at_first_use(storage.qdata.device, storage.target)
        if kind is not None and kind is not storage.kind:
            storage.relayout_(kind)
            moved += storage.qdata.nbytes + storage.scale.nbytes
        kinds[storage.kind.value] += 1
    _log.info(
        "prepared %d MXFP4 weights (%s): shuffled %.2f GiB in %.2f s",
        len(storages),
        ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none found",
        moved / 2**30,
        time.perf_counter() - start,
    )
    return module
