# SPDX-License-Identifier: MIT
"""Every command where there is no terminal, in a narrow one, where nobody reads what it prints, and at Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import TextIO

import pytest
import torch

from shuffled_tensor import cli, save_file
from shuffled_tensor.checkpoint import shards
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.cli import main

from .support.checkpoints import in_format, layer_name, make_dense, write_sharded
from .support.layer import make_weight

COLUMNS = 40
SIZES = ["--experts", "8", "--hidden", "512", "--intermediate", "256", "--topk", "2"]
COMMANDS: dict[str, tuple[list[str], int]] = {
    "inspect": (["inspect", ".", "--read", "--ranks", "2"], 0),
    "inspect for programs": (["inspect", ".", "--json"], 0),
    "verify": (["verify", "ours.safetensors"], 0),
    "verify nothing": (["verify", "nothing.safetensors"], 1),
    "convert": (["convert", "others", "converted"], 0),
    "show": (["show", "mxfp4_moe"], 0),
    "show on standard output": (["show", "--ranks", "2", "--output", "-"], 0),
    "why": (["why", "others", "--arch", "gfx950", "--aiter", "v0.1.20"], 0),
    "doctor": (["doctor"], 0),
    "tune": (["tune", *SIZES], 1),
    "version": (["--version"], 0),
    "help": (["show", "--help"], 0),
}
"""With their exit status, where there is no GPU."""
PRINTING = [name for name in COMMANDS if name not in ("convert", "verify nothing", "tune")]

Stream = Callable[[], AbstractContextManager[tuple[TextIO, list[str]]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))  # for argparse, which asks the process's own terminal
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_file({f"layers.0.{which}_weight": make_weight(which) for which in ("w13", "w2")}, "ours.safetensors")
    write_sharded(
        in_format("gpt-oss", make_dense(4, 96, 64), layer_name("gpt-oss")), tmp_path / "others", 2, index=True
    )
    return tmp_path


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Also where these tests run in the background, whose processes a shell tells to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def drain(source: int, into: list[str]) -> None:
    found = b""
    try:
        while piece := os.read(source, 65536):
            found += piece
    except OSError:  # how Linux says that nobody holds a terminal any more
        pass
    into.append(found.decode())


@contextmanager
def _read_to_the_end(source: int, target: int) -> Iterator[tuple[TextIO, list[str]]]:
    shown: list[str] = []
    reader = Thread(target=drain, args=(source, shown))
    reader.start()
    with open(target, "w", encoding="utf-8") as stream:
        yield stream, shown
    reader.join()
    os.close(source)


def piped() -> AbstractContextManager[tuple[TextIO, list[str]]]:
    """A pipe to write to, and what has come out of it when all is over."""
    return _read_to_the_end(*os.pipe())


def terminal() -> AbstractContextManager[tuple[TextIO, list[str]]]:
    """A narrow terminal, and what was sent to it."""
    source, target = pty.openpty()
    fcntl.ioctl(target, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    return _read_to_the_end(source, target)


def call(arguments: list[str], out: TextIO | None, err: TextIO) -> object:
    """The exit status of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            return main(arguments)
        except SystemExit as exit:
            return exit.code


def run(name: str, out: Stream, err: Stream | None) -> tuple[str, str]:
    """What a command sends to two streams, or to one, as a person sees it who redirects nothing."""
    arguments, status = COMMANDS[name]
    shutil.rmtree("converted", ignore_errors=True)
    with ExitStack() as stack:
        stdout, printed = stack.enter_context(out())
        if err is None:
            stderr, told = stack.enter_context(open(os.dup(stdout.fileno()), "w", encoding="utf-8")), [""]
        else:
            stderr, told = stack.enter_context(err())
        assert call(arguments, stdout, stderr) == status
    return tuple(re.sub(r"in \d+\.\d s", "in some s", text) for text in (printed[0], told[0]))  # type: ignore[return-value]


def test_no_command_is_missing_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no command"])
    known = capsys.readouterr().err.partition("choose from ")[2]
    assert set(re.findall(r"\w+", known)) == {arguments[0] for arguments, _ in COMMANDS.values()} - {"--version"}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_terminal(name: str, folder: Path) -> None:
    out, err = run(name, piped, piped)
    assert not {"\r", "\x1b"} & {*out, *err}
    if COMMANDS[name][1]:
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    else:
        assert re.fullmatch("wrote 2 weights, .* to converted in some s\n" if name == "convert" else "", err)
        assert out.endswith("\n") or name == "convert"
    if name == "help":
        assert max(map(len, out.splitlines())) <= COLUMNS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_narrow_terminal(name: str, folder: Path) -> None:
    """The lines are those that a pipe gets, each alone on its line, beside a progress bar that fits."""
    out, err = run(name, piped, piped)
    beside_a_bar, bar = run(name, piped, terminal)
    assert beside_a_bar == out
    both, _ = run(name, terminal, None)
    lines = [line.removesuffix("\r") for line in both.split("\n")]
    assert [line for line in lines if line and "\r" not in line] == [line for line in (out + err).splitlines() if line]
    drawn = [piece.replace("\x1b[A", "") for line in lines if "\r" in line for piece in line.split("\r")]  # of two
    assert max(map(len, drawn), default=0) <= COLUMNS
    assert bool(drawn) == ("%|" in bar) == (name in ("inspect", "verify", "convert"))


# --- standard output that takes nothing


@pytest.mark.parametrize("name", COMMANDS)
def test_nobody_reads_standard_output(name: str, folder: Path) -> None:
    arguments, status = COMMANDS[name]
    source, target = os.pipe()
    os.close(source)
    with piped() as (stderr, told), open(target, "w", encoding="utf-8") as stdout:
        assert call(arguments, stdout, stderr) == (141 if name in PRINTING else status)
    assert told[0].startswith("error: ") if status else told[0] == "" or name == "convert"
    assert name != "convert" or Path("converted").exists()


@pytest.mark.parametrize("name", PRINTING)
def test_a_full_disk(name: str, folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with piped() as (stderr, told), open("/dev/full", "w", encoding="utf-8") as stdout:
        assert call(COMMANDS[name][0], stdout, stderr) == 1
    assert told[0].splitlines() == ["error: [Errno 28] No space left on device"]


@pytest.mark.parametrize("name", [name for name in PRINTING if name not in ("version", "help")])
def test_no_standard_output_at_all(name: str, folder: Path) -> None:
    """As after `>&-` in a shell. Version and help go to standard error then."""
    with piped() as (stderr, told):
        assert call(COMMANDS[name][0], None, stderr) == 0
    assert told[0] == ""


def test_processes_end_quietly_where_nobody_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left in a buffer when a process ends is no traceback, nor what is more than one holds."""
    processes = []
    for unbuffered, arguments in (
        ("", ["--version"]),
        ("", ["show", "--ranks", "2", "--rows", "61440", "--output", "-"]),
        ("1", ["inspect", "."]),
    ):
        monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
        command = [sys.executable, "-W", "error", "-m", "shuffled_tensor", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.close()
        processes.append(process)
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    assert ended == 3 * [("", 141)]


# --- Ctrl-C


WORK = {
    "inspect": (Weight, "read"),
    "verify": (Weight, "read"),
    "convert": (shards, "write_file"),
    "show": (cli, "picture"),
    "show on standard output": (cli, "rank_picture"),
    "doctor": (cli, "doctor"),
    "tune": (cli, "unavailable"),
}
"""Something that each command calls."""


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("name", WORK)
def test_an_interrupt_is_a_line_and_a_status(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())
    monkeypatch.setattr(*WORK[name], lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with terminal() as (stderr, told), piped() as (stdout, printed):
        assert call(COMMANDS[name][0], stdout, stderr) == 130
    assert printed[0] == ""
    assert told[0].endswith("stopped\r\n")
    assert told[0].splitlines()[-1] == "stopped"  # not behind a bar
    begun = [folder / "converted.partial"] if name == "convert" else []
    assert sorted(folder.iterdir()) == sorted(before + begun)
    assert name != "convert" or "the same command goes on from what is in converted.partial\r\n" in told[0]


SLOWLY = """
import sys, time
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.cli import main

def read(*_):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(60)

Weight.read = read
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("_interruptible")
def test_processes_are_interrupted(folder: Path) -> None:
    processes = []
    for name in ("verify", "convert"):
        command = [sys.executable, "-W", "error", "-c", SLOWLY, *COMMANDS[name][0]]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = []
    for process in processes:
        assert process.stderr is not None
        begun = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        ended.append((begun, *process.communicate(), process.returncode))
    goes_on = "the same command goes on from what is in converted.partial\n"
    assert ended == [("reading\n", "", "stopped\n", 130), ("reading\n", "", f"{goes_on}stopped\n", 130)]
    assert not (folder / "converted").exists()
