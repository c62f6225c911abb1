# SPDX-License-Identifier: MIT
"""A layout that nobody reads: other tiles, tiles that do not follow each other row by row, gate and up interleaved in
scales alone. Where a test runs over all layouts, it runs over this one."""

from __future__ import annotations

from shuffled_tensor.layouts import Layout

MADE_UP = Layout(
    "made_up",
    down=("e (n r) c -> e n r c", "e (n h r) (c t q) -> e c n t h q r"),
    gate_up=("e (n r) c -> e n c r", "e (g n r) (c t q) -> e c n q g r t"),
    sizes=(("g", 2), ("r", 8), ("h", 4), ("t", 4), ("q", 2)),
)
