# SPDX-License-Identifier: MIT
"""The small changes that `tools/mutate.py` makes to a file: one operator, constant, condition or statement at a time.

What nobody's code depends on stays as it is: docstrings, annotations, what a `raise` says, what is logged, `__repr__`,
`__all__`, `if TYPE_CHECKING`, and `strict=`, which only asserts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

__all__ = ["Change", "changes"]

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_UNTOUCHED = ("annotation", "returns", "type_params")
_TYPES = ("Literal", "TypeVar", "cast")
_LOGS = ("_log", "log", "logger", "logging", "warnings")


@dataclass(frozen=True)
class Change:
    """A file with one change. As text it is ``path: function: original -> changed``, the same wherever it stands."""

    path: str
    scope: str = "module"
    lines: range = range(0)
    """Of the statement, without the body that it may have: a test that runs the change runs one of them."""
    cached: bool = False
    """Whether it stands in a function whose result is kept, so that only the first test of a process runs it."""
    line: int = 0
    original: str = ""
    changed: str = ""
    start: int = 0
    stop: int = 0
    """Which bytes of the file are replaced,"""
    inserted: bytes = b""
    """and by which."""

    def __str__(self) -> str:
        return f"{self.path}: {self.scope}: {self.original} -> {self.changed}"

    def of(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.inserted + source[self.stop :]


def changes(path: str, source: bytes) -> Iterator[Change]:
    """All that still compile, in the order of the file."""
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    for change, node, changed in _walk(ast.parse(source), Change(path)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        found = replace(
            change,
            line=node.lineno,
            original=" ".join(source[start:stop].decode().split()),  # unparsed, f-strings differ from Python to Python
            changed=changed,
            start=start,
            stop=stop,
            inserted=(changed if isinstance(node, (ast.stmt, ast.Slice)) else f"({changed})").encode(),
        )
        try:
            compile(found.of(source), path, "exec")
        except SyntaxError:
            continue
        yield found


_Node = ast.stmt | ast.expr
_Found = tuple[Change, _Node, str]


def _walk(node: ast.AST, at: Change) -> Iterator[_Found]:
    if _untouched(node):
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        cached = any("cache" in ast.unparse(decorator) for decorator in node.decorator_list)
        name = node.name if at.scope == "module" else f"{at.scope}.{node.name}"
        at = replace(at, scope=name, cached=at.cached or cached)
    if isinstance(node, ast.stmt):
        first = min(part.lineno for part in (*getattr(node, "decorator_list", ()), node))
        body = getattr(node, "body", None)
        last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
        at = replace(at, lines=range(first, last + 1))
    for changed, text in _of(node):
        yield at, changed, text
    if not isinstance(node, ast.JoinedStr):
        for name, value in ast.iter_fields(node):
            if name not in _UNTOUCHED:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from _walk(child, at)


def _untouched(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant()) | ast.keyword("strict"):
            return True
        case ast.Assign([ast.Name("__all__")]) | ast.If(ast.Name("TYPE_CHECKING")) | ast.FunctionDef("__repr__"):
            return True
        case ast.Subscript(ast.Name(name)) | ast.Call(ast.Name(name)):
            return name in _TYPES
        case ast.Call(ast.Attribute(ast.Name(name))):
            return name in _LOGS
    return False


def _of(node: ast.AST) -> Iterator[tuple[_Node, str]]:
    """Of this node, not of what is inside."""
    match node:
        case ast.Compare(left, operators, right):
            for place, operator in enumerate(operators):
                swapped: list[ast.cmpop] = [*operators]
                swapped[place] = _swapped(operator)
                yield node, ast.unparse(ast.Compare(left, swapped, right))
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATORS:
            yield node, ast.unparse(ast.BinOp(left, _swapped(operator), right))
        case ast.BoolOp(operator, values):
            yield node, ast.unparse(ast.BoolOp(_swapped(operator), values))
        case ast.UnaryOp(_, operand):
            yield node, ast.unparse(operand)
        case ast.Constant(bool() as value):
            yield node, repr(not value)
        case ast.Constant(int() | float() as value):
            yield node, repr(value + 1)
        case ast.Constant(str() as value):
            yield node, repr(f"XX{value}XX")
        case ast.JoinedStr():
            yield node, "'XX'"
        case ast.Call(ast.Name(name) as function) if name in _FUNCTIONS:
            yield function, _FUNCTIONS[name]
        case ast.Slice(lower, upper, step):
            if lower:
                yield node, ast.unparse(ast.Slice(None, upper, step))
            if upper:
                yield node, ast.unparse(ast.Slice(lower, None, step))
        case ast.Return(ast.expr() as value) if ast.unparse(value) != "None":
            yield value, "None"
        case ast.If(test) | ast.IfExp(test):
            yield from ((test, "True"), (test, "False"))
        case ast.While(test):
            yield test, "False"
        case ast.comprehension(ifs=tests):
            yield from ((test, value) for test in tests for value in ("True", "False"))
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"
        case ast.Expr(ast.Yield() | ast.YieldFrom()):
            pass
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield node, "pass"


def _swapped(operator: ast.AST) -> Any:
    return _OPERATORS[type(operator)]()
