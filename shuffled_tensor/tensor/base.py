# SPDX-License-Identifier: MIT
"""What torch needs of a tensor whose bytes are kept elsewhere: the mechanics under :class:`ShuffledMXFP4Tensor` and
:class:`PartView`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor

from shuffled_tensor.tensor.geometry import Window
from shuffled_tensor.tensor.storage import PackedStorage

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Operations", "Operator", "StorageTensor"]

Operator = torch._ops.OpOverload | str
"""One that another library registers, perhaps later or never, is named: ``"engine::fused_moe"``."""

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


class Operations(dict[Operator, Callable[..., Any]]):
    """What each operator does to a class of tensors; one that is not a key raises NotImplementedError."""

    def __init__(self) -> None:
        self.groups: dict[str, list[Operator]] = {}
        """The keys under the headings of docs/OPERATIONS.md."""

    def implements(self, *operators: Operator, group: str = "Layers") -> Callable[[_Handler], _Handler]:
        """Make a function the rows for some operators; it is called with the operator's arguments.

        The first paragraph of its docstring says what it does to a tensor, under the heading ``group``.
        """

        def register(handler: _Handler) -> _Handler:
            self.update(dict.fromkeys(operators, handler))
            self.groups.setdefault(group, []).extend(operators)
            return handler

        return register


class StorageTensor(Tensor):
    """A window over a :class:`PackedStorage`, which every alias shares."""

    # In slots, because engines copy, update and exchange a parameter's `__dict__`, in which only users' attributes are.
    __slots__ = ("_storage", "_window")

    _storage: PackedStorage
    _window: Window

    operations: ClassVar[Operations]
    _remedy: ClassVar[str]
    """What to call instead, in the message of an operation that is not defined."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def _over(cls, storage: PackedStorage, window: Window, shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        # A view that inference_mode makes of a tensor from outside it could not share a version counter
        # (pytorch#164872).
        with torch.inference_mode(False), torch.no_grad():
            self = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=storage.device, requires_grad=False
            )
        torch._C._set_throw_on_mutable_data_ptr(self)  # where its empty memory got into a plain tensor: not a crash
        self._storage, self._window = storage, window
        storage.own()
        return self

    def _no_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"a {type(self).__name__} has no values in memory that torch could use directly; {self._remedy}"
        )

    apply_ = __dlpack__ = _no_memory  # torch does them in C, and crashes on a wrapper
    numpy = tolist = __array__ = _no_memory  # of these it says that they are not supported, and nothing more

    def storage(self) -> NoReturn:
        # What safetensors asks for when `untyped_storage()` has no address: it takes a NotImplementedError from here
        # for a tensor on the meta device, and writes whatever memory is there.
        raise RuntimeError(
            f"a {type(self).__name__} has no storage of its own, which safetensors' functions and save_pretrained "
            "would write; save a ShuffledMXFP4Tensor with shuffled_tensor.save_file, or what its .dequantize() returns"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = cls.operations.get(func) or cls.operations.get(func.name())
        kwargs = kwargs or {}
        if handler is None:
            # in inference mode torch does not take composite operators (narrow, chunk, to) apart itself
            out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            raise NotImplementedError(f"{func} is not defined on a {cls.__name__}; {cls._remedy}")
        return cls._corrected(func, args, kwargs, handler(*args, **kwargs))

    @classmethod
    def _corrected(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """What an operator returns, as torch wants to see its aliases."""
        return out
