# SPDX-License-Identifier: MIT
"""Tests that run on several ranks, over gloo: processes that are started once, and run one check after the other."""

from __future__ import annotations

import atexit
import importlib
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

__all__ = ["Rank", "on_ranks"]

_COLLECTIVE = timedelta(seconds=30)
"""After which a rank stops to wait for one that has failed."""
_CHECK = 90.0
"""Seconds after which a check that has not ended has failed."""


class Rank:
    """What a check is given: who it is, of how many, and a folder that all of them see."""

    def __init__(self, rank: int, world: int, folder: str) -> None:
        self.rank, self.world, self.folder = rank, world, Path(folder)

    def alike(self, found: Any) -> None:
        """Raise AssertionError where this is not the same on every rank."""
        import torch.distributed as dist

        ranks: list[Any] = [None] * self.world
        dist.all_gather_object(ranks, found)
        assert all(each == ranks[0] for each in ranks), ranks


def on_ranks(*worlds: int) -> Callable[[Callable[[Rank], None]], Callable[..., None]]:
    """Make a test of a check that is run by every rank of a group, for groups of so many."""

    def decorate(check: Callable[[Rank], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("world", worlds)
        def test(world: int, tmp_path: Path) -> None:
            _crew(world).run((check.__module__, check.__name__), str(tmp_path))

        test.__doc__ = check.__doc__
        test.check = check  # type: ignore[attr-defined]
        return test  # type: ignore[no-any-return]

    return decorate


class _Crew:
    """The processes of a group."""

    def __init__(self, world: int) -> None:
        context = get_context("spawn")
        self.folder = TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, check: tuple[str, str], folder: str) -> None:
        for pipe in self.pipes:
            with suppress(OSError):  # one that has died is found out below
                pipe.send((*check, folder))
        said: dict[int, str] = {}
        end = time.monotonic() + _CHECK
        while len(said) < len(self.pipes) and time.monotonic() < end:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in said}
            for pipe in wait(list(waiting), timeout=1):
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    said[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self.processes[rank].join(1)
                    said[rank] = f"it died, with {self.processes[rank].exitcode}"
        failed = {rank: said.get(rank, "no end") for rank in range(len(self.pipes)) if said.get(rank) != "ok"}
        if failed:  # they are out of step: others are started for the next check
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {text}" for rank, text in failed.items()), pytrace=False)

    def stop(self) -> None:
        _CREWS.pop(len(self.processes), None)
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


_CREWS: dict[int, _Crew] = {}


def _crew(world: int) -> _Crew:
    if world not in _CREWS:
        _CREWS[world] = _Crew(world)
    return _CREWS[world]


@atexit.register
def _stop_all() -> None:
    for crew in list(_CREWS.values()):
        crew.stop()


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=_COLLECTIVE
    )
    while True:
        try:
            module, name, place = pipe.recv()
        except EOFError:
            os._exit(0)  # at exit, gloo aborts in some runs
        try:
            getattr(importlib.import_module(module), name).check(Rank(rank, world, place))
            dist.barrier()
            pipe.send("ok")
        except BaseException:
            pipe.send(traceback.format_exc())
