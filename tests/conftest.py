# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shuffled_tensor.layouts import LAYOUTS

from .support import bytes as test_bytes
from .support.made_up import MADE_UP


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start import the package from here too, wherever they run and whatever is installed or was
    measured there."""
    if (
        config.getoption("--device") == "cpu"
    ):  # kernels run in Triton's interpreter, which is chosen when it is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["SHUFFLED_TENSOR_CACHE"] = str(Path(__file__).parent / "nothing was measured")
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what stands in for a gfx950 GPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What aiter does not take goes to the reference, also where a GPU stands in for a gfx950."""
    monkeypatch.setenv("SHUFFLED_TENSOR_BACKENDS", "aiter,reference")


@pytest.fixture(autouse=True, scope="module")
def made_up_layout(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules that test every layout, the table has one row more."""
    with pytest.MonkeyPatch.context() as patch:
        if getattr(request.module, "LAYOUTS", None) is test_bytes.LAYOUTS:
            patch.setitem(LAYOUTS, MADE_UP.name, MADE_UP)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share small tensors mostly wait for each other, and the last bits of a sum depend on how many they
    are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
