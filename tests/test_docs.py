# SPDX-License-Identifier: MIT
"""Every code block of every page runs, prints what the page shows, and names what exists."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from shuffled_tensor import ShuffledMXFP4Tensor, override_arch
from shuffled_tensor.cli import main
from shuffled_tensor.testing import fake_aiter

from .support.checkpoints import in_format, layer_name, make_dense, write_sharded
from .support.reports import unversioned

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def gpt_oss(folder: Path) -> None:
    """A small checkpoint in the place of the one that pages name."""
    write_sharded(
        in_format("gpt-oss", make_dense(4, 288, 320), layer_name("gpt-oss")), folder / "gpt-oss-120b", 2, index=True
    )


SETUP: dict[str, Callable[[Path], None]] = {"README.md": gpt_oss, "docs/FORMAT.md": gpt_oss}
"""What lies in the folder where a page's blocks run; all else the page makes itself."""


class Block(NamedTuple):
    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found, lines = [], (ROOT / page).read_text(encoding="utf-8").split("\n")
    start = None
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            if start is None:
                start = number
            else:
                found.append(Block(lines[start].strip().strip("`"), "\n".join(lines[start + 1 : number]), start + 2))
                start = None
    assert start is None, f"{page}: the block from line {start} on has no end"
    return found


def run_python(block: Block, page: str, namespace: dict[str, Any], *, gfx950: bool) -> None:
    """As it is pasted; `python gfx950` blocks on a device that counts as that GPU, with a fake aiter."""
    code = compile("\n" * (block.line - 1) + block.text, page, "exec")  # tracebacks name the page's lines
    with ExitStack() as stack:
        for context in (override_arch("gfx950"), fake_aiter("v0.1.18 and later")) if gfx950 else (nullcontext(),):
            stack.enter_context(context)
        exec(code, namespace)


TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def run_command(line: str) -> None:
    """Our own commands run; of others, what they name must exist."""
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "shuffled_tensor"] or words[0] == "shuffled-tensor":
        assert main(words[1 if words[0] == "shuffled-tensor" else 3 :]) == 0, line
        return
    assert words[0] in ("make", "pip", "pytest", "python"), f"what is {line!r}?"
    if words[0] == "make":
        assert words[1:], line
        assert set(words[1:]) <= set(TARGETS), line
    elif words[0] == "pip":
        assert words[1] in ("install", "wheel"), line
        for word in words[2:]:
            assert word in ("--no-deps", "safetensors", "tqdm", "shuffled_tensor-*.whl") or is_path(word), word
    elif words[0] == "pytest":
        assert words[1:], line
        for word in words[1:]:
            assert word.startswith("--") or word in ("cpu", "cuda") or is_path(word.split("::")[0]), word
    else:
        assert re.fullmatch(r"(benchmarks|tools|examples)/\w+\.py", words[1]), line
        assert is_path(words[1]), line
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in (ROOT / words[1]).read_text(encoding="utf-8"), f"{words[1]} has no {option}"
        if ">" in words:
            assert is_path(words[words.index(">") + 1]), line


def is_path(word: str) -> bool:
    return bool(glob.glob(str(ROOT / word.split("[")[0])))


def comparable(text: str) -> str:
    """Without what differs between machines and runs: checksums, addresses, versions, trailing blanks."""
    text = re.sub(r"\b[0-9a-f]{12}([0-9a-f]{52})?\b", "checksum", unversioned(text))
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def check_page(page: str, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str]]:
    """Runs the blocks of a page in order; yields each shown output, and what was printed."""
    namespace: dict[str, Any] = {"__name__": "page"}
    printed: str | None = None
    for block in blocks(page):
        if block.kind in ("python", "python gfx950"):
            run_python(block, page, namespace, gfx950=block.kind != "python")
            printed = capsys.readouterr().out
        elif block.kind == "sh":
            for line in block.text.splitlines():
                if line.strip():
                    capsys.readouterr()
                    run_command(line)
            printed = capsys.readouterr().out  # of the last one
        elif block.kind in ("text", "json"):
            assert printed is not None, f"{page}:{block.line} is the output of nothing"
            yield comparable(block.text), comparable(printed)
            printed = None
        elif block.kind == "text measured":  # on another machine; says which
            assert printed == "", f"{page}:{block.line} names no command before it"
            assert re.match(r"torch 2\.\d+\.\d+\+\w+ on (cpu|NVIDIA )", block.text), (
                f"{page}:{block.line} names no device"
            )
        elif block.kind in ("text demo", "text torchao"):
            pass  # compared in test_quickstart.py, run in test_transformers.py
        else:
            pytest.fail(f"{page}:{block.line}: nobody runs a block of kind {block.kind!r}")


@pytest.fixture
def _as_before() -> Iterator[None]:
    """What pages leave in the process is gone afterwards: operators registered, functions compiled."""
    operations = ShuffledMXFP4Tensor.operations
    known, groups = dict(operations), {group: list(names) for group, names in operations.groups.items()}
    yield
    operations.clear()
    operations.update(known)
    operations.groups = groups
    torch.compiler.reset()


@pytest.mark.usefixtures("_as_before")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_and_prints_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    SETUP.get(page, lambda folder: None)(tmp_path)
    for shown, printed in check_page(page, capsys):
        assert shown == printed


def test_the_demo_is_shown_once() -> None:
    assert [page for page in PAGES for block in blocks(page) if block.kind == "text demo"] == ["docs/BACKENDS.md"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """Of the headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            assert page == "CHANGELOG.md", f"{page} links out of the repository: {link}"
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), f"{page} links to {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked >= {page for page in PAGES if page != "README.md"}


def test_no_page_mentions_where_it_was_written() -> None:
    for page in PAGES:
        assert "/work" not in (ROOT / page).read_text(encoding="utf-8"), page
