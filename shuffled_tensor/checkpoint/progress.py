# SPDX-License-Identifier: MIT
"""How far something long has come: a bar in a terminal, and elsewhere a line of the log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["progress"]

_log = logging.getLogger("shuffled_tensor")

_SECONDS = 30.0
"""Between two lines."""


@contextmanager
def progress(what: str, total: int, unit: str, position: int = 0) -> Iterator[Callable[[int], object]]:
    """What is given is to be told how many units more are done. Bytes (``"B"``) are shown in KB, MB, and so on.

    No bar is shown of nothing. ``position`` is the bar's line, where there are several at once.
    """
    hidden = None if total else True  # None: where there is no terminal
    with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", position=position, disable=hidden) as bar:
        done, told = 0, time.monotonic()

        def tell(more: int) -> None:
            nonlocal done, told
            done += more
            bar.update(more)
            if bar.disable and time.monotonic() - told >= _SECONDS:
                told = time.monotonic()
                shown = tqdm.format_sizeof if unit == "B" else str
                _log.info("%s: %s of %s %s (%d %%)", what, shown(done), shown(total), unit, 100 * done // max(1, total))

        yield tell
