# SPDX-License-Identifier: MIT
"""The triton backend's form for gfx950 on a CPU, with arithmetic in place of its instruction."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from shuffled_tensor.backends.triton import layer, numbers, stage


@triton.jit
def _tiles_by_arithmetic(words, scale):
    """What gfx950's instruction makes of words: codes by their place in it, bits from the last to the first."""
    words = words.to(tl.int32)
    factor = numbers.powers_of_two(scale)
    first = tl.join(numbers.fp4_values(words & 15) * factor, numbers.fp4_values((words >> 4) & 15) * factor)
    second = tl.join(numbers.fp4_values((words >> 8) & 15) * factor, numbers.fp4_values((words >> 12) & 15) * factor)
    third = tl.join(numbers.fp4_values((words >> 16) & 15) * factor, numbers.fp4_values((words >> 20) & 15) * factor)
    fourth = tl.join(numbers.fp4_values((words >> 24) & 15) * factor, numbers.fp4_values((words >> 28) & 15) * factor)
    return tl.join(tl.join(first, second), tl.join(third, fourth)).to(tl.bfloat16)


@triton.jit
def _dot_of_float32(a, b, acc, TARGET: tl.constexpr):
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


def as_on_gfx950(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "bf16_of_tiles", _tiles_by_arithmetic)
    monkeypatch.setattr(stage, "_dot", _dot_of_float32)
    monkeypatch.setattr(layer, "_target", lambda device: (numbers.CDNA4.value, False))
