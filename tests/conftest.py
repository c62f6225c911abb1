# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Processes that tests start import the package from here too, wherever they run and whatever is installed."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what stands in for a gfx950 GPU")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))
