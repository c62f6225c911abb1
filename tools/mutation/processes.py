# SPDX-License-Identifier: MIT
"""Work in processes forked from one that has imported torch, each in a copy of the repository."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

__all__ = ["each", "output", "pytest_in"]

# Of what was imported before the fork, pytest cannot rewrite the asserts any more, and need not.
_PYTEST = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")

_Task = TypeVar("_Task")


def each(
    tasks: Iterable[_Task], work: Callable[[_Task, Path], int], trees: list[Path], deadline: float = float("inf")
) -> Iterator[tuple[_Task, int, Path]]:
    """The tasks as they end, each with what its work returned, or minus the signal that ended it, and its tree.

    One is done in each tree at a time; the next one in that tree begins when this generator is asked again.
    """
    waiting, free = iter(tasks), [*trees]
    running: dict[int, tuple[_Task, Path]] = {}
    try:
        while time.monotonic() < deadline:
            while free and (task := next(waiting, None)) is not None:
                tree = free.pop()
                running[_fork(partial(work, task, tree), tree)] = task, tree
            if not running:
                return
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                time.sleep(0.01)
                continue
            task, tree = running.pop(process)
            _end(process)
            free.append(tree)
            yield task, os.waitstatus_to_exitcode(status), tree
    finally:
        for process in running:
            _end(process)
            os.waitpid(process, 0)


def pytest_in(tree: Path, *arguments: str, plugin: object = None) -> int:
    import pytest

    plugins = [] if plugin is None else [plugin]
    return int(pytest.main([*_PYTEST, f"--basetemp={tree.with_suffix('.tmp')}", *arguments], plugins))


def output(tree: Path) -> Path:
    """Where the last process in a tree printed to."""
    return tree.with_suffix(".out")


def _fork(work: Callable[[], int], tree: Path) -> int:
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # the child was first
            os.setpgid(process, process)
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        printed = os.open(output(tree), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(printed, stream)
        os.chdir(tree)
        sys.path[0] = str(tree)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(process: int) -> None:
    """And all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
