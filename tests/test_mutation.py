# SPDX-License-Identifier: MIT
"""What `tools/mutate.py` changes in a file, and what it leaves as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

TOOLS = Path(__file__).parents[1] / "tools"
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
    monkeypatch.syspath_prepend(TOOLS)
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
3 module: "é" -> 'XXéXX'
3 module: "b" -> 'XXbXX'
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


PACKAGE = '''\
"""A package."""
EMPTY = 0

def clipped(size, most):
    if size > most:
        size -= size - most
    return size

def unseen():
    return EMPTY
'''
TESTS = """\
import pytest
from shuffled_tensor.layouts import EMPTY, clipped

@pytest.mark.parametrize("size", [3, 5])
def test_clipped(size):
    assert clipped(size, 3) == 3

def test_empty():
    assert EMPTY == 0

def test_fails():
    assert clipped(1, 1) == 0
"""


def test_a_run_and_another_that_goes_on_from_it(tmp_path: Path) -> None:
    files = {"shuffled_tensor/__init__.py": "", "shuffled_tensor/layouts.py": PACKAGE, "tests/test_layouts.py": TESTS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(TOOLS, tmp_path / "tools")
    equivalent = "# It subtracts 0.\nshuffled_tensor/layouts.py: clipped: size > most -> size >= most"
    (tmp_path / "tools" / "mutants_equivalent.txt").write_text(equivalent)
    results = tmp_path / ".mutate" / "results.jsonl"

    def run() -> str:
        arguments = ["shuffled_tensor/layouts.py", "--jobs", "2", "--results", str(results)]
        command = [sys.executable, "tools/mutate.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "failed: tests/test_layouts.py::test_fails" in (first := run())
    found = {line["change"].partition(": ")[2]: line for line in map(json.loads, results.read_text().splitlines())}
    by = {change: line["by"] and line["by"].partition("::")[2].partition("[")[0] for change, line in found.items()}
    assert {change: (line["line"], line["result"], by[change]) for change, line in found.items()} == {
        "module: 0 -> 1": (2, "noticed", "test_empty"),
        "clipped: size > most -> True": (5, "survived", None),
        "clipped: size > most -> False": (5, "noticed", "test_clipped"),
        "clipped: size > most -> size >= most": (5, "survived", None),
        "clipped: size -= size - most -> pass": (6, "noticed", "test_clipped"),
        "clipped: size - most -> size + most": (6, "noticed", "test_clipped"),
        "clipped: size -> None": (7, "noticed", "test_clipped"),
        "unseen: EMPTY -> None": (10, "survived", None),
    }
    assert first.endswith("5 of    7 noticed  71.4%, 1 equivalent\n")
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:4]) + "\n")
    run()
    assert sorted(results.read_text().splitlines()) == sorted(lines)
