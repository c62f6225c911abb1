# SPDX-License-Identifier: MIT
"""``python -m shuffled_tensor.operations`` prints docs/OPERATIONS.md, the table of operations, from the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

from shuffled_tensor.refusals import REFUSED
from shuffled_tensor.wrapper import GROUPS, OPERATIONS

__all__ = ["page"]

_HEAD = """\
# What each operation does to a ShuffledMXFP4Tensor

Made by `python -m shuffled_tensor.operations` from the table that `__torch_dispatch__` looks operators up in.

What torch takes apart before (`narrow`, `chunk`, `tensor_split`, `matmul`, `setitem`, ...) arrives as these. An
operator that is not here raises `NotImplementedError` and names `.dequantize()`.
"""


def page() -> str:
    """The Markdown of docs/OPERATIONS.md."""
    lines = [_HEAD]
    for group, operators in sorted(GROUPS.items(), key=lambda item: item[0] == "Refused"):
        lines += [f"## {group}\n", "| operators | what happens |", "|---|---|"]
        for does, rows in groupby(operators, lambda operator: _does(OPERATIONS[operator])):
            lines.append(f"| {', '.join(f'`{row}`' for row in rows)} | {does} |")
        lines.append("")
    return "\n".join(lines)


def _does(handler: Callable[..., Any]) -> str:
    if isinstance(handler, partial):
        if handler.args[0] in REFUSED:
            why, remedy = handler.args[:2]
            return f"It {why}: {remedy}."
        handler = handler.func
    return " ".join((inspect.getdoc(handler) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    print(page(), end="")
