# SPDX-License-Identifier: MIT
"""Which weight some memory belongs to: a byte buffer knows its owner, however it was handed out.

Plain tensors, arrays and parameters over the bytes of a weight do not say how those lie. So whoever takes bytes in asks
here. What is known of them outlives the weight: it is forgotten with the memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Owner", "check_row_major", "find", "is_real", "owned", "owners", "register"]


class Record(Protocol):
    """What is known of bytes."""

    def why_not_row_major(self) -> str | None:
        """What a plain tensor over them would be taken for wrongly, or None."""


class Owner(NamedTuple):
    """Who owns a range of addresses."""

    start: int
    stop: int
    memory: StorageWeakRef
    storage: Callable[[], Any]
    """The PackedStorage, which may be gone."""
    record: Any
    """What is known of its bytes, which stays."""

    def alive(self) -> bool:
        """Whether the memory is still the one that was registered: neither freed nor resized away."""
        memory = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if memory is None:
            return False
        start: int = memory.data_ptr()
        return start <= self.start and self.stop <= start + memory.nbytes()


_OWNERS: list[Owner] = []
"""By address; no two overlap. Every change is a single operation of the list, so that an interrupt cannot part it."""
_START = attrgetter("start")
_LOCK = threading.RLock()

_limit = 256
"""From how many on the forgotten ones are looked for."""


def register(storage: object | None, record: Record, *parts: Tensor) -> None:
    """Say that the memory of these tensors is a storage's from now on; None where it has no owner any more."""
    global _limit
    owned_by: Any = (lambda: None) if storage is None else weakref.ref(storage)
    with _LOCK:
        for data in parts:
            start, stop = _extent(data)
            if start == stop:
                continue
            owner = Owner(start, stop, StorageWeakRef(data.untyped_storage()), owned_by, record)
            _OWNERS[_overlapping(start, stop)] = []  # of memory that was freed, or that is given to this storage
            insort(_OWNERS, owner, key=_START)
        if len(_OWNERS) > _limit:
            _OWNERS[:] = [owner for owner in _OWNERS if owner.alive()]
            _limit = max(256, 2 * len(_OWNERS))


def is_real(data: Tensor) -> bool:
    """Whether there are bytes behind a tensor: not where a compiler traces with fake ones, nor on the meta device."""
    return type(data) in (Tensor, nn.Parameter) and data.device.type != "meta"


def find(data: Tensor) -> Owner | None:
    """The owner of memory that a tensor shows a part of; None also where there is no memory."""
    if not is_real(data):
        return None
    start, stop = _extent(data)
    with _LOCK:
        found = _OWNERS[_overlapping(start, stop)] if start < stop else []
    return next((owner for owner in found if owner.alive()), None)


def owned(data: Tensor) -> bool:
    """Whether a weight that is there owns memory that a tensor shows a part of."""
    owner = find(data)
    return owner is not None and owner.storage() is not None


def check_row_major(name: str, data: Tensor) -> None:
    """Raise ValueError for bytes of a weight that do not lie as plain ones do; ``name`` is the argument's."""
    owner = None if torch.compiler.is_compiling() else find(data)
    reason = None if owner is None else owner.record.why_not_row_major()
    if reason is not None:
        raise ValueError(
            f"{name} is memory of a ShuffledMXFP4Tensor {reason}, so it would be taken for other values than it holds; "
            "use that tensor itself, its clone(), its .qdata_view and .scale_view (clone() gives plain bytes), or call "
            "its unshuffle_() first"
        )


def owners() -> list[Any]:
    """The storages that own memory now."""
    with _LOCK:
        found = [owner.storage() for owner in _OWNERS]
    return list({id(storage): storage for storage in found if storage is not None}.values())


def _extent(data: Tensor) -> tuple[int, int]:
    """The addresses of the first byte that a tensor shows, and behind the last."""
    start = data.data_ptr()
    if data.numel() == 0 or start == 0:
        return 0, 0
    if data.is_contiguous():
        return start, start + data.nbytes
    last = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
    return start, start + (last + 1) * data.element_size()


def _overlapping(start: int, stop: int) -> slice:
    first = bisect_right(_OWNERS, start, key=_START)
    if first and _OWNERS[first - 1].stop > start:
        first -= 1
    last = bisect_right(_OWNERS, stop - 1, key=_START)
    return slice(first, max(first, last))


def _in_child() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # another thread may have held it when this process was forked


os.register_at_fork(after_in_child=_in_child)
