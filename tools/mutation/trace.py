# SPDX-License-Identifier: MIT
"""Which test runs which line: traced once, and kept for as long as the files are the same."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from mutation import processes
from mutation.changes import Change

__all__ = ["Traced", "trace"]

# Dynamo compiles from the code, without running its lines.
UNTRACED = ("tests/test_compile.py",)
CALLS = 100
"""Of one function in one test that are traced; more would only take time."""
PART = 8192
"""Bytes of a test file for each of the processes in which its tests are traced."""

_Lines = set[tuple[str, int]]


class Traced:
    """What is known of the tests that pass: their seconds, and by file and line which of them run it."""

    def __init__(self, parts: Iterable[dict[str, Any]]) -> None:
        self.seconds: dict[str, float] = {}
        self._imported: _Lines = set()
        self._by_line: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._by_file: dict[str, set[str]] = defaultdict(set)
        self._elsewhere: set[str] = set()  # these run in another process, or are not traced
        for part in parts:
            self._imported |= {(path, line) for path, lines in part["imported"].items() for line in lines}
            for name, test in part["tests"].items():
                self.seconds[name] = test["seconds"]
                if not test["lines"]:
                    self._elsewhere.add(name)
                for path, lines in test["lines"].items():
                    self._by_file[path].add(name)
                    for line in lines:
                        self._by_line[path, line].add(name)

    def tests(self, change: Change, budget: float) -> dict[str, list[str]]:
        """Those that may notice a change, by test file: the likeliest first, for so many seconds."""
        places = [(change.path, line) for line in change.lines]
        direct = set().union(*(self._by_line[place] for place in places))
        chosen = [direct]
        if change.cached or not self._imported.isdisjoint(places):  # who depends on it need not have run it
            chosen += [self._by_file[change.path] - direct, self._elsewhere]
        elif not direct:
            chosen = [self._elsewhere]
        files: dict[str, list[str]] = {}
        for name in (name for names in chosen for name in self._fastest(names)):
            budget -= self.seconds[name]
            if budget > 0 or not files:
                files.setdefault(name.split("::")[0], []).append(name)
        own = f"tests/test_{Path(change.path).stem}.py"
        return dict(sorted(files.items(), key=lambda item: item[0] != own))

    def _fastest(self, names: set[str]) -> list[str]:
        """One case of each test, then another of each, ..."""
        seen: Counter[str] = Counter()
        ranked = []
        for name in sorted(names, key=lambda name: (self.seconds[name], name)):
            function = name.split("[")[0]
            ranked.append((seen[function], name))
            seen[function] += 1
        return [name for _, name in sorted(ranked, key=lambda item: item[0])]


def trace(package: Path, files: list[str], kept: Path, trees: list[Path], deadline: float) -> Traced:
    """Of some test files. What ``kept`` has of the same package and the same test file is believed."""
    root = package.parent
    shared = _digest(*sorted(package.rglob("*.py")), *sorted((root / "tests" / "support").glob("*.py")))
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {part["key"]: part for part in map(json.loads, lines) if part["key"].startswith(shared)}
    sizes = {file: (root / file).stat().st_size for file in files}
    parts = [_Part(file, first, 1 + sizes[file] // PART) for file in files for first in range(1 + sizes[file] // PART)]
    keys = {part: f"{shared}{_digest(root / part.file)} {part.first} {part.step}" for part in parts}
    missing = [part for part in parts if keys[part] not in known]
    kept.parent.mkdir(exist_ok=True)
    with kept.open("w") as file:
        for part in known.values():
            print(json.dumps(part), file=file)
        for part, code, tree in processes.each(missing, partial(_trace, package.name), trees, deadline):
            if code:
                print(f"{part} could not be traced, and is left out: {processes.output(tree).read_text()}", flush=True)
                continue
            found = known[keys[part]] = {"key": keys[part], **json.loads(_result(tree).read_text())}
            print(json.dumps(found), file=file, flush=True)
            print(f"traced {len(found['tests'])} of {part}; failed: {' '.join(found['failed']) or 'none'}", flush=True)
    return Traced(known[key] for key in keys.values() if key in known)


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


class _Part(NamedTuple):
    """Every so many tests of a file."""

    file: str
    first: int
    step: int


def _trace(package: str, part: _Part, tree: Path) -> int:
    recorder = _Recorder(tree / package, part)
    recorder.start()
    processes.pytest_in(tree, part.file, plugin=recorder)
    sys.settrace(None)
    _result(tree).write_text(json.dumps(recorder.result()))
    return 0


def _result(tree: Path) -> Path:
    return tree.with_suffix(".json")


class _Recorder:
    """A plugin of pytest."""

    def __init__(self, package: Path, part: _Part) -> None:
        self.package, self.part = str(package), part
        self.calls: Counter[CodeType] = Counter()
        self.lines: _Lines = set()
        self.imported: _Lines | None = None
        self.tests: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        if self.part.file not in UNTRACED:
            threading.settrace(self._call)
            sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if not code.co_filename.startswith(self.package) or self.calls[code] == CALLS:
            return None
        self.calls[code] += 1
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.part.first :: self.part.step]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.imported is None:
            self.imported = self.lines
        signal.alarm(600)  # it hangs
        self.calls.clear()
        self.lines = set()
        self.tests[nodeid] = {"seconds": 0.0, "outcome": "passed"}
        self.start()  # again, where a test has set its own

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid]["seconds"] += report.duration
        if not report.passed:
            self.tests[report.nodeid]["outcome"] = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tests[nodeid]["lines"] = self._by_file(self.lines)

    def _by_file(self, lines: _Lines) -> dict[str, list[int]]:
        found = defaultdict(list)
        for path, line in sorted(lines):
            found[str(Path(path).relative_to(Path(self.package).parent))].append(line)
        return found

    def result(self) -> dict[str, Any]:
        outcomes = {name: test.pop("outcome") for name, test in self.tests.items()}
        tests = {name: test for name, test in self.tests.items() if outcomes[name] == "passed"}
        failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
        return {"imported": self._by_file(self.imported or set()), "tests": tests, "failed": failed}
