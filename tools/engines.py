# SPDX-License-Identifier: MIT
"""Unpack the serving engines that tests/engines/ runs, from their pinned wheels, without what is compiled: a folder
each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ENGINES = {"vllm": "0.33.0", "sglang": "0.5.23"}


def unpack(name: str, version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as wheels:
        download = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", wheels]
        subprocess.run([sys.executable, "-m", *download, f"{name}=={version}"], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        with ZipFile(wheel) as archive:
            files = [file for file in archive.namelist() if not file.endswith(".so")]  # which are gigabytes
            archive.extractall(folder / f"{name}-{version}", files)


if __name__ == "__main__":
    for name, version in ENGINES.items():
        unpack(name, version, Path(sys.argv[1]))
