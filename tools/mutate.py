# SPDX-License-Identifier: MIT
"""``python tools/mutate.py [FILE[:LINE] ...]``: do the tests notice it when the package is wrong?

The package is changed in one small place at a time, and the tests that run that place are run, in a process that has
imported torch already. A change that no test notices has survived. It is listed, and either a test is missing or nobody
could tell the difference; the latter are left out by a line of `tools/mutants_equivalent.txt`, under the reason. Exit
status 1 where fewer than 95 % are noticed.

First each file is tried without a change. What fails then would fail with every change, and is said.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

from mutation import processes
from mutation.changes import Change, changes
from mutation.trace import Traced, trace

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shuffled_tensor"
GOALS = [f"{PACKAGE.name}/{name}" for name in ("layouts.py", "mxfp4.py", "tensor", "moe", "checkpoint")]
EQUIVALENT = ROOT / "tools" / "mutants_equivalent.txt"
GOAL = 0.95
# What takes long to import, and knows nothing of the package.
PRELOADED = (
    "torch", "torch._dynamo", "torch.testing", "einops", "numpy", "pytest", "hypothesis.stateful", "expecttest",
    "safetensors.torch", "tqdm",
)  # fmt: skip
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


class Chosen:
    """A plugin of pytest that runs some tests, in their order, and ends with one that takes ten times its seconds."""

    def __init__(self, seconds: dict[str, float], running: Path) -> None:
        self.seconds, self.running = seconds, running

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        order = {name: place for place, name in enumerate(self.seconds)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(nodeid)
        signal.alarm(20 + round(10 * self.seconds[nodeid]))


def running(tree: Path) -> Path:
    """Where it says which test runs, or which test file is imported."""
    return tree.with_suffix(".running")


def survives(traced: Traced, budget: float, change: Change, tree: Path) -> int:
    """0 where no test notices; 1 is for errors of the tool itself."""
    import pytest

    shutil.copytree(tree.with_name("package"), tree / PACKAGE.name, dirs_exist_ok=True)  # the last one was another's
    changed = tree / change.path
    changed.write_bytes(change.of(changed.read_bytes()))
    signal.alarm(120)  # for what runs at import
    for file, names in traced.tests(change, budget).items():
        running(tree).write_text(file)
        chosen = Chosen({name: traced.seconds[name] for name in names}, running(tree))
        code = processes.pytest_in(tree, "-x", file, plugin=chosen)
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return 2
    return 0


def plant(first: Path, jobs: int) -> list[Path]:
    """Copies of the repository in which nothing has to be compiled again."""
    shutil.copytree(ROOT, first, ignore=LEFT_OUT)
    shutil.copytree(first / PACKAGE.name, first.with_name("package"))  # whatever happens to the repository meanwhile
    for _, code, _ in processes.each([first], lambda _, tree: processes.pytest_in(tree, "--collect-only"), [first]):
        if code:
            raise SystemExit(processes.output(first).read_text())
    compileall.compile_dir(
        first / PACKAGE.name, quiet=2, force=True, invalidation_mode=PycInvalidationMode.CHECKED_HASH
    )
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    trees = [first, *(first.with_name(f"tree{number}") for number in range(1, jobs))]
    for tree in trees[1:]:
        shutil.copytree(first, tree)
    return trees


def preload() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import hypothesis

    # A failing example is enough: it is not made small. The same ones come every time.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutate", phases=phases, database=None, derandomize=True)
    hypothesis.settings.load_profile("mutate")


def all_changes(goals: list[str]) -> list[Change]:
    """Of files, of folders, or of a line of a file."""
    lines: dict[Path, set[int]] = {}
    for goal in goals:
        name, _, line = goal.partition(":")
        path = ROOT / name
        if not path.exists():
            raise SystemExit(f"{path} does not exist")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            length = len(file.read_bytes().splitlines())
            lines.setdefault(file, set()).update([int(line)] if line else range(1, length + 1))
    return [
        change
        for file, of_file in lines.items()
        for change in changes(str(file.relative_to(ROOT)), file.read_bytes())
        if change.line in of_file
    ]


def report(tried: dict[Change, Any], equivalent: set[str]) -> float:
    """Print it; the part that was noticed."""
    noticed = {change: found["result"] != "survived" for change, found in tried.items()}
    counted = {change: seen for change, seen in noticed.items() if seen or str(change) not in equivalent}
    for change, seen in sorted(counted.items(), key=lambda item: (item[0].path, item[0].start)):
        if not seen:
            print(f"survived, {change.path}:{change.line}:\n{change}")
    for path in [*sorted({change.path for change in tried}), ""]:
        of_file = [seen for change, seen in counted.items() if path in ("", change.path)]
        left_out = sum(path in ("", change.path) for change in tried) - len(of_file)
        rate = sum(of_file) / max(1, len(of_file))
        print(f"{path or 'all':44} {sum(of_file):4} of {len(of_file):4} noticed {rate:6.1%}, {left_out} equivalent")
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("files", nargs="*", default=GOALS, metavar="FILE[:LINE]", help=f"default: {' '.join(GOALS)}")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="the test files to run; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: as many as there are cores")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of the changes, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help="stop, and report, after S")
    parser.add_argument(
        "--results", type=Path, default=os.devnull, metavar="FILE", help="json lines; to go on from, too"
    )
    parser.add_argument("--budget", type=float, default=60, metavar="S", help="seconds of tests for a change")
    given = parser.parse_args()
    deadline = time.monotonic() + given.time_limit

    chosen = all_changes(given.files)
    if given.sample is not None or given.time_limit < float("inf"):
        random.Random(given.seed).shuffle(chosen)
    chosen = chosen[: given.sample]
    tests = given.tests or [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]
    equivalent = {line for line in EQUIVALENT.read_text().splitlines() if not line.startswith("#")}
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    known = {(found["change"], found["byte"]): found for found in map(json.loads, lines)}
    tried = {change: known[key] for change in chosen if (key := (str(change), change.start)) in known}
    waiting = [change for change in chosen if change not in tried]
    in_files: dict[str, list[int]] = {}
    for change in waiting:
        in_files.setdefault(change.path, []).extend(change.lines)
    unchanged = [Change(path, lines=range(min(lines), max(lines) + 1)) for path, lines in in_files.items()]
    preload()
    given.results.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutate") as folder, given.results.open("a") as results:
        trees = plant(Path(folder) / "tree0", given.jobs)
        traced = trace(PACKAGE, tests, ROOT / ".mutate" / "traced.jsonl", trees, deadline)
        todo = [*unchanged, *waiting]
        for change, code, tree in processes.each(todo, partial(survives, traced, given.budget), trees, deadline):
            if code == 1:
                print(f"could not be tried: {change}\n{processes.output(tree).read_text()}", flush=True)
                continue
            result = {0: "survived", -signal.SIGALRM: "timed out"}.get(code, "noticed")
            by = running(tree).read_text() if code else None
            if change in unchanged:
                if code:
                    print(f"{change.path} without a change: {result} by {by}", flush=True)
                continue
            tried[change] = {
                "file": change.path, "line": change.line, "byte": change.start, "change": str(change),
                "result": result, "by": by,
            }  # fmt: skip
            print(json.dumps(tried[change]), file=results, flush=True)
            print(f"{len(tried)}/{len(chosen)} {result} {change}", flush=True)
    print(f"\n{len(tried)} of {len(chosen)} changes were tried")
    return 0 if report(tried, equivalent) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
