# SPDX-License-Identifier: MIT
"""Writing new values past the tensors: by RDMA, by another process, by any loader that knows row-major bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from shuffled_tensor.prepare import weights_of
from shuffled_tensor.storage import PackedStorage

__all__ = ["refit"]

_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def refit(module: _Module) -> Iterator[_Module]:
    """Open an update: inside, ``qdata`` and ``scale`` of every weight are row-major bytes, padded, at the same address.

    They may be written in whole or in part, by any means, also through raw pointers. On leaving, pads are rewritten and
    every weight is laid out as it was before, in place, in scratch of at most 64 MiB or one expert.

    An exception inside leaves the weights row-major, and unusable until they are written whole: by another refit, by
    ``load_state_dict`` or ``copy_``; or until ``mark_canonical_()`` says that what they hold is a weight.

    Raises:
        RuntimeError: a refit of a weight is open, or its bytes are unusable or perhaps shared with another process.
    """
    storages = weights_of(module)
    for storage in storages:
        storage.check_refit()
    with ExitStack() as stack:
        for storage in storages:
            stack.enter_context(_open(storage))
        yield module


@contextmanager
def _open(storage: PackedStorage) -> Iterator[None]:
    storage.open_refit()
    try:
        yield
        storage.close_refit()
    except BaseException as error:
        storage.abandon_refit(error)
        raise
