# SPDX-License-Identifier: MIT
"""For tests without a gfx950 GPU: a fake aiter. With it, :func:`shuffled_tensor.override_arch`."""

from shuffled_tensor.testing.fake_aiter import VERSIONS, FakeAiter, fake_aiter

__all__ = ["VERSIONS", "FakeAiter", "fake_aiter"]
