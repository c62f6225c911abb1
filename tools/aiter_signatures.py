# SPDX-License-Identifier: MIT
"""``python tools/aiter_signatures.py CLONE`` prints tests/data/aiter_signatures.json, read from a clone of aiter.

The clone needs the tags and the pull requests (``git fetch origin 'refs/pull/*/head:refs/pull/*'``). It is only read:
nothing of aiter is imported or executed, and nothing of it is kept but names of functions and of parameters.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from typing import Any

__all__ = ["signatures", "text"]

# The commits that the table of versions is about, and the releases around them.
REVISIONS = (
    "57e74501a5", "39e2ed7e8a", "d6ede4548e", "46ecc4489d", "05567f6668", "b2dd7703df", "de07f3885e", "e4048607a5",
    "55f4bfeb5e", "2bb3bca2df", "v0.1.14", "v0.1.15", "v0.1.16", "v0.1.17", "v0.1.16.post4", "v0.1.16.post6",
    "v0.1.17-longctx", "v0.1.18", "v0.1.19", "v0.1.20.post1",
)  # fmt: skip
FUNCTIONS = ("fused_moe", "fused_moe_", "get_2stage_cfgs")
ATTRIBUTES = (
    "_mxfp4_moe_run", "mxfp4_moe_run", "_MXFP4_PORT_KIND", "_mxfp4_a4w4_stage1_fw",
    "fused_dynamic_mxfp8_quant_moe_sort",
)  # fmt: skip
HIP_OPERATOR = "mxfp4_moe_gemm1_a4w4"


def signatures(clone: str) -> dict[str, dict[str, Any]]:
    """What tells one aiter from another, for each of `REVISIONS` that the clone has."""
    return {
        revision: _read(clone, revision)
        for revision in REVISIONS
        if _git(clone, "rev-parse", "-q", "--verify", f"{revision}^{{commit}}")
    }


def text(found: dict[str, dict[str, Any]]) -> str:
    """JSON with each list on one line."""
    return re.sub(r"\[([^][]*)\]", lambda names: f"[{' '.join(names[1].split())}]", json.dumps(found, indent=1))


def _read(clone: str, revision: str) -> dict[str, Any]:
    module = ast.parse(_git(clone, "show", f"{revision}:aiter/fused_moe.py"))
    functions, values = _top_level(module)
    return {
        "commit": _git(clone, "rev-parse", f"{revision}^{{commit}}").strip(),
        "parameters": {name: _parameters(functions[name]) for name in FUNCTIONS},
        "attributes": {name: values.get(name) for name in ATTRIBUTES if name in functions or name in values},
        "hip": bool(_git(clone, "grep", "-lwE", f"def {HIP_OPERATOR}", revision, "--", "aiter/ops")),
    }


def _top_level(module: ast.Module) -> tuple[dict[str, ast.FunctionDef], dict[str, Any]]:
    """The functions that a module defines, and the values that names have which it assigns or imports; None where one
    is no constant."""
    functions, values = {}, {}
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef):
            functions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            constant = statement.value.value if isinstance(statement.value, ast.Constant) else None
            values.update({target.id: constant for target in statement.targets if isinstance(target, ast.Name)})
        elif isinstance(statement, ast.ImportFrom):
            values.update({name.asname or name.name: None for name in statement.names})
    return functions, values


def _parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def _git(clone: str, *command: str) -> str:
    """What git prints; nothing where it finds nothing."""
    return subprocess.run(["git", "-C", clone, *command], capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    print(text(signatures(sys.argv[1])))
