# SPDX-License-Identifier: MIT
"""Values of a weight that a view operator returns: a copy, although torch's own would be views."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["Values"]

_C: Any = torch._C  # not all of it has types
_SET_DATA = vars(_C.TensorBase)["data"].__set__

# `+=` and its like come as add_
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift"))}
_HARMLESS = {"requires_grad_", "share_memory_"}


class Values(Tensor):
    """A plain tensor in all but that it refuses to be written, because that would not reach the weight."""

    # Of functions and not of operators, so that a kernel that gets one is called as with any other tensor.
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # dynamo does not know the names of functions, nor who may be written
            torch._dynamo.graph_break(
                msg="what transpose, permute or expand made of a ShuffledMXFP4Tensor is not traced from outside; make "
                "it in the compiled function, of the weight, or pass its clone()"
            )
            return _disable_dynamo(_call)(func, args, kwargs or {})  # nor what is left to do here
        return _call(func, args, kwargs or {})

    # Who takes tensors apart for a compiler would look for the weight, of which view operators say that this is a view.
    def _is_view(self) -> bool:
        return False

    @property
    def _base(self) -> None:  # type: ignore[override]
        return None

    # copies and files hold plain tensors
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor).detach(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for written in tree_iter(list(_written(func, args, kwargs))):
        if isinstance(written, Values):
            _refuse(func)
    with _C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
        own = [given for given in tree_iter((args, kwargs)) if isinstance(given, Values)]

        def seen(found: Tensor) -> Tensor:
            """Views of these are no more to be written than they are."""
            return found.as_subclass(Values) if any(_C._is_alias_of(given, found) for given in own) else found

        return tree_map_only(Tensor, seen, out)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What a function writes into."""
    name = getattr(func, "__name__", "")
    yield kwargs.get("out")
    if isinstance(func, torch._ops.OpOverload):
        infos = (argument.alias_info for argument in func._schema.arguments)
        yield [given for given, info in zip(args, infos, strict=False) if info is not None and info.is_write]
    elif name in _IN_PLACE or func == _SET_DATA or _is_in_place(name):
        yield args[:1]


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name not in _HARMLESS


def _refuse(func: Any) -> NoReturn:
    raise RuntimeError(
        f"{getattr(func, '__name__', func)} writes to what transpose, permute or expand made of a ShuffledMXFP4Tensor: "
        "a copy of its values, so it would not reach the weight; write to the weight itself, with copy_, or to a "
        "clone() of this"
    )
