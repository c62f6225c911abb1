# SPDX-License-Identifier: MIT
"""`make demo` prints what docs/BACKENDS.md shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_demo_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    shown = re.search(r"```text demo\n(.*?)```", (ROOT / "docs" / "BACKENDS.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None

    def comparable(text: str) -> str:
        # the last digits of float32 sums differ between machines
        return re.sub(r"(\d\.\d)e-07", "small", text).strip()

    assert comparable(printed) == comparable(shown.group(1))
