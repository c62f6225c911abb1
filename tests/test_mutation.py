# SPDX-License-Identifier: MIT
"""What `tools/mutate.py` changes in a file, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from expecttest import assert_expected_inline

SOURCE = '''\
"""A page."""
__all__ = ["half"]
NAMES: tuple[str, ...] = ("é", "b")

def half(size: int, least: int = 0) -> "int":
    """Half of it."""
    if size < least or not size:
        raise ValueError(f"{size - 1} is too small")
    rest = NAMES[1:]  # of all
    rest.clear()
    return min(size // 2, least)
'''


def test_one_change_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    from mutation.changes import changes

    source = SOURCE.encode()
    found = list(changes("page.py", source))
    for change in found:
        lines = zip(source.splitlines(), change.of(source).splitlines(), strict=True)
        assert [number for number, (old, new) in enumerate(lines, 1) if old != new] == [change.line]
        compile(change.of(source), "page.py", "exec")
    assert len({change.of(source) for change in found}) == len(found)
    assert_expected_inline(
        "\n".join(f"{change.line} {change.scope}: {change.original} -> {change.changed}" for change in found),
        """\
3 module: 'é' -> 'XXéXX'
3 module: 'b' -> 'XXbXX'
5 half: 0 -> 1
7 half: size < least or not size -> True
7 half: size < least or not size -> False
7 half: size < least or not size -> size < least and (not size)
7 half: size < least -> size <= least
7 half: not size -> size
9 half: 1: -> :
9 half: 1 -> 2
10 half: rest.clear() -> pass
11 half: min(size // 2, least) -> None
11 half: min -> max
11 half: size // 2 -> size * 2
11 half: 2 -> 3""",
    )
