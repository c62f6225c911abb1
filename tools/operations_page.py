# SPDX-License-Identifier: MIT
"""``python tools/operations_page.py`` prints docs/OPERATIONS.md, the table of operations, from the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.tensor.base import Operations
from shuffled_tensor.tensor.part_view import PartView
from shuffled_tensor.tensor.refused import REFUSED

__all__ = ["page"]

_HEAD = """\
# What each operation does to a ShuffledMXFP4Tensor

Made by `python tools/operations_page.py` from the table that `__torch_dispatch__` looks operators up in.

What torch takes apart before (`narrow`, `chunk`, `tensor_split`, `matmul`, `setitem`, ...) arrives as these. An
operator that is not here raises `NotImplementedError` and names `.dequantize()`.
"""

_LAST = (None, "Layers", "Refused")


def page() -> str:
    """The Markdown of docs/OPERATIONS.md."""
    views = "# And to a view of codes or scales (`qdata_view`, `scale_view`)\n"
    return "\n".join([_HEAD, *_tables(ShuffledMXFP4Tensor.operations), views, *_tables(PartView.operations)])


def _tables(operations: Operations) -> list[str]:
    lines = []
    groups = sorted(operations.groups.items(), key=lambda item: item[0] in _LAST and _LAST.index(item[0]))
    for group, operators in groups:
        lines += [f"## {group}\n", "| operators | what happens |", "|---|---|"]
        for does, rows in groupby(operators, lambda operator: _does(operations[operator])):
            lines.append(f"| {', '.join(f'`{row}`' for row in rows)} | {does} |")
        lines.append("")
    return lines


def _does(handler: Callable[..., Any]) -> str:
    if isinstance(handler, partial):
        if handler.args[0] in REFUSED:
            why, remedy = handler.args[:2]
            return f"It {why}: {remedy}."
        handler = handler.func
    return " ".join((inspect.getdoc(handler) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    print(page(), end="")
