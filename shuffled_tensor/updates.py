# SPDX-License-Identifier: MIT
"""Updates: new values are written past the tensors, into the bytes of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from shuffled_tensor.modules import weights_of
from shuffled_tensor.tensor.checks import check_row_order
from shuffled_tensor.tensor.geometry import RowOrder
from shuffled_tensor.tensor.storage import PackedStorage

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Refit", "refit"]

_Refitted = TypeVar("_Refitted")


class Refit(AbstractContextManager[_Refitted]):
    """An update of weights' bytes: see :func:`refit`."""

    def __init__(self, of: _Refitted, storages: list[PackedStorage], row_order: RowOrder | None, whole: bool) -> None:
        self._of, self._storages, self._options = of, storages, (row_order, whole)
        self._mark = object()
        """By which a storage knows who has opened it."""

    def begin(self) -> Self:
        """Open it, as the ``with`` statement does. Raises what :func:`refit` does."""
        for storage in self._storages:
            storage.check_refit(self._options[0])
        with self._or_abandoned():
            for storage in self._storages:
                storage.open_refit(self._mark, *self._options)
        return self

    def end(self) -> None:
        """Everything is written: lay it out. Raises what :func:`refit` does on leaving."""
        with self._or_abandoned():
            for storage in self._storages:
                storage.close_refit()

    def abandon(self, error: BaseException) -> None:
        """Something went wrong: the weights are unusable until they are written whole."""
        for storage in self._storages:  # what another refit has opened meanwhile is that one's to end
            storage.validity.abandon_refit(self._mark, error)

    def __del__(self) -> None:
        self.abandon(GeneratorExit())  # if nobody has ended it, nobody will

    @contextmanager
    def _or_abandoned(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def __enter__(self) -> _Refitted:
        self.begin()
        return self._of

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.end()
        else:
            self.abandon(error)


def refit(of: _Refitted, *, row_order: RowOrder | None = None, whole: bool = False) -> Refit[_Refitted]:
    """An update: inside, ``qdata`` and ``scale`` of every weight are row-major bytes, padded, at the same address.

    ``with refit(model):`` is one way, ``update = refit(model).begin()`` and ``update.end()``, or
    ``update.abandon(error)``, another, for code that is told of both ends by different calls.

    Gate and up rows come in ``row_order``; None is each weight's own, in which it was made: where that is
    ``"contiguous"``, gate rows and their pads, then up rows and theirs; ``"interleaved"``, rows in turn, then all pads.

    They may be written in whole or in part, by any means, also through raw pointers. At the end, pads are rewritten and
    every weight is laid out as it was before, in place, in scratch of at most 64 MiB or one expert.

    With ``whole``, all of every weight is going to be written, so no bytes are brought into row-major order first: what
    stands there means nothing. At the end, it is found out whether something was left: scales, rows, 1 KiB of a row, or
    columns of 61 rows.

    An exception inside leaves the weights row-major, and unusable until they are written whole: by another refit, which
    finds out whether it was, by ``load_state_dict`` or ``copy_``; or until ``mark_canonical_()`` says that what they
    hold is a weight.

    Args:
        of: a module, a :class:`ShuffledMXFP4Tensor`, or a list, tuple or dict of such.
        row_order: see above.
        whole: see above.

    Raises:
        ValueError: there is no :class:`ShuffledMXFP4Tensor` in ``of``, or the order is unknown.
        RuntimeError: at the beginning: a refit of a weight is open, or its bytes are perhaps shared with another
            process; at the end: a weight that was unusable before, or is refitted ``whole``, was not written whole.
    """
    if row_order is not None:
        check_row_order(True, row_order, rows=0)
    return Refit(of, weights_of(of), row_order, whole)
