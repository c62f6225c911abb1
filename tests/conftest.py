# SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator

import pytest

from shuffled_tensor.layouts import LAYOUTS

from .support import bytes as test_bytes
from .support.made_up import MADE_UP


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what stands in for a gfx950 GPU")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="module")
def made_up_layout(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules that test every layout, the table has one row more."""
    with pytest.MonkeyPatch.context() as patch:
        if getattr(request.module, "LAYOUTS", None) is test_bytes.LAYOUTS:
            patch.setitem(LAYOUTS, MADE_UP.name, MADE_UP)
        yield
