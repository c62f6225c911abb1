# SPDX-License-Identifier: MIT
"""What is known of the bytes of one storage: in which layout they are, and whether they are a weight: one state
machine, whose every transition is a method here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

from shuffled_tensor.layouts import ROW_MAJOR, Layout
from shuffled_tensor.tensor.geometry import RowOrder

__all__ = ["State", "Validity"]


class State(Enum):
    VALID = auto()
    """The bytes are a weight."""
    REFIT = auto()
    """A refit is open: somebody else writes row-major bytes."""
    INVALID = auto()
    """Something is being changed, or ended early: the bytes may be no weight."""


class Validity:
    """The state of one storage.

    =========== ============================ ================================================
    from        by                           to
    =========== ============================ ================================================
    VALID       :meth:`touch`                INVALID: bytes are about to move
    INVALID     :meth:`touch`                INVALID
    REFIT       :meth:`touch`                REFIT
    any         :meth:`changing`, at its end what it was at its beginning; after an exception
                                             it stays, INVALID if bytes were touched
    VALID       :meth:`open_refit`           REFIT
    INVALID     :meth:`open_refit`           REFIT, which must write everything
    REFIT       :meth:`abandon_refit`        INVALID
    any         :meth:`give_up`              INVALID: there are no bytes
    any         :meth:`recover`              VALID: everything was written, or vouched for
    =========== ============================ ================================================
    """

    __slots__ = ("_changing", "_reason", "largest_scale", "layout", "layout_after_refit", "refit", "row_order", "state")

    def __init__(self, layout: Layout, row_order: RowOrder) -> None:
        self.layout = layout
        """The one that the bytes are in now."""
        self.row_order: RowOrder = row_order
        """Of the rows of the tensors that they were made of: those who write packed bytes bring more of them."""
        self.state = State.VALID
        self.layout_after_refit: Layout | None = None
        """While a refit is open, or was abandoned or could not be closed: the layout to return to."""
        self.refit: object = None
        """The one that is open, so that each ends its own."""
        self.largest_scale: int | None = None
        """Of all scale bytes; None until somebody has looked, since the last write."""
        self._reason: str | None = None
        self._changing = False

    @property
    def invalid_reason(self) -> str | None:
        """Why the bytes must not be read as a weight now, or None."""
        return "it is being written in a refit" if self.state is State.REFIT else self._reason

    def why_not_row_major(self) -> str | None:
        """What plain bytes would be taken for wrongly; none of a refit, in which they are row-major."""
        if self.state is State.INVALID:
            return f"that is unusable ({self._reason})"
        return None if self.layout is ROW_MAJOR else f"whose bytes lie as {self.layout.name!r}"

    def check(self) -> None:
        """Raise RuntimeError where the bytes are not a weight."""
        if self.state is not State.VALID:
            remedy = (
                "wait until that ends"
                if self.state is State.REFIT
                else "write it whole, with load_state_dict, copy_ or another refit, or say what its bytes are with "
                "mark_canonical_() or mark_shuffled_(shuffle_kind)"
            )
            raise RuntimeError(f"this weight cannot be used: {self.invalid_reason}; {remedy}")

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Around everything that changes bytes or layout: an exception after :meth:`touch` leaves the bytes invalid.

        Gives whether this is the outermost one: what it consists of is over when all of it is.
        """
        if self._changing:
            yield False
            return
        before = self.state, self._reason
        self._changing = True
        try:
            yield True
            self.state, self._reason = before
        finally:
            self._changing = False

    def forked(self) -> None:
        """Whoever was changing the bytes is not in this process: what was touched stays invalid."""
        self._changing = False

    def touch(self, what: str) -> None:
        """Just before a byte moves."""
        self.largest_scale = None
        if self.state is State.VALID:
            self._reason = f"{what} was interrupted"
            self.state = State.INVALID

    def open_refit(self, refit: object, layout: Layout) -> None:
        """``layout`` is where the bytes came from, unless a refit that was abandoned remembers."""
        self.layout_after_refit = self.layout_after_refit or layout
        self.refit = refit
        self.state, self._reason = State.REFIT, None

    def abandon_refit(self, refit: object, error: BaseException) -> None:
        """Where this refit is open, it has ended early."""
        if self.refit is refit:
            self._reason = (
                f"a refit ended early ({type(error).__name__}), and its bytes may be partly old and partly new"
            )
            self.state, self.refit = State.INVALID, None

    def give_up(self) -> None:
        """The memory is somebody else's from now on."""
        self.state, self._reason, self.refit = State.INVALID, "its bytes were given up", None
        self.largest_scale = None

    def recover(self) -> None:
        """The bytes are a weight again."""
        self.state, self._reason, self.refit, self.layout_after_refit = State.VALID, None, None, None
        self.largest_scale = None
