# SPDX-License-Identifier: MIT
"""Whether bytes are a weight: one state machine, whose every transition is a method here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

from shuffled_tensor.layouts import Layout

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
    VALID       :meth:`changing`, inside     INVALID; back to VALID at its end, or INVALID
                                             for good after an exception
    INVALID     :meth:`changing`             INVALID: a write that is not known to be whole mends nothing
    REFIT       :meth:`changing`             REFIT
    VALID       :meth:`open_refit`           REFIT
    INVALID     :meth:`open_refit`           REFIT, where an abandoned refit is taken up
    REFIT       :meth:`abandon_refit`        INVALID
    REFIT       :meth:`recover`              VALID: the refit was closed
    INVALID     :meth:`recover`              VALID: everything was written, or vouched for
    =========== ============================ ================================================
    """

    __slots__ = ("_reason", "layout_after_refit", "state")

    def __init__(self) -> None:
        self.state = State.VALID
        self.layout_after_refit: Layout | None = None
        """While a refit is open, or was abandoned or could not be closed: the layout to return to."""
        self._reason: str | None = None

    @property
    def invalid_reason(self) -> str | None:
        """Why the bytes must not be read as a weight now, or None."""
        return "it is being written in a refit" if self.state is State.REFIT else self._reason

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
    def changing(self, what: str) -> Iterator[None]:
        """Around everything that changes bytes or layout: an exception inside leaves the bytes invalid."""
        before = self.state, self._reason
        if self.state is State.VALID:
            self.state, self._reason = State.INVALID, f"{what} was interrupted"
        yield
        self.state, self._reason = before

    def open_refit(self, layout: Layout) -> None:
        """``layout`` is where the bytes came from, unless a refit that was abandoned remembers."""
        self.layout_after_refit = self.layout_after_refit or layout
        self.state, self._reason = State.REFIT, None

    def abandon_refit(self, error: BaseException) -> None:
        self.state = State.INVALID
        self._reason = f"a refit ended early ({type(error).__name__}), and its bytes may be partly old and partly new"

    def recover(self) -> None:
        """The bytes are a weight again."""
        self.state, self._reason = State.VALID, None
