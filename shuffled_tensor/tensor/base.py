# SPDX-License-Identifier: MIT
"""What torch needs of a tensor whose bytes are kept elsewhere: the mechanics under :class:`ShuffledMXFP4Tensor`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, return_and_correct_aliasing

from shuffled_tensor import backends
from shuffled_tensor.tensor.geometry import Window
from shuffled_tensor.tensor.storage import PackedStorage, is_real

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GROUPS", "OPERATIONS", "Wrapper", "implements"]

OPERATIONS: dict[torch._ops.OpOverload | str, Callable[..., Any]] = {}
"""What each operator does to a :class:`ShuffledMXFP4Tensor`; one that is not a key raises NotImplementedError.

An operator that another library registers, perhaps later or never, is named: ``"aiter::fused_moe_"``.
"""

GROUPS: dict[str, list[torch._ops.OpOverload | str]] = {}
"""The keys of :data:`OPERATIONS` under the headings of docs/OPERATIONS.md."""

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


def implements(*operators: torch._ops.OpOverload | str, group: str = "Layers") -> Callable[[_Handler], _Handler]:
    """Make a function the rows of :data:`OPERATIONS` for some operators; it is called with the operator's arguments.

    The first paragraph of its docstring says what it does to a tensor, under the heading ``group``.
    """

    def register(handler: _Handler) -> _Handler:
        OPERATIONS.update(dict.fromkeys(operators, handler))
        GROUPS.setdefault(group, []).extend(operators)
        return handler

    return register


class Wrapper(Tensor):
    """A window over a :class:`PackedStorage`, which every alias shares, as a tensor of its logical shape and dtype."""

    _storage: PackedStorage
    _window: Window
    _index: int | slice | None
    """What takes this tensor's experts out of the storage's; None where it is all of the storage."""
    _views: dict[str, tuple[Tensor, Tensor]]
    """Of some of the experts: the storage's codes and scales, and the part of them that is this tensor's."""
    _carried: dict[str, Any]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def _wrap(cls, storage: PackedStorage, window: Window, rank: int, dtype: torch.dtype) -> Self:
        """A tensor over a window of a storage; rank 2 shows a single expert."""
        # A view that inference_mode makes of a tensor from outside it could not share a version counter
        # (pytorch#164872).
        with torch.inference_mode(False), torch.no_grad():
            self = torch.Tensor._make_wrapper_subclass(
                cls, window.shape[-rank:], dtype=dtype, device=storage.qdata.device, requires_grad=False
            )
        self._storage = storage
        self._window = window
        self._views = {}
        experts = window.experts
        if rank == 2:
            self._index = experts[0]
        elif len(experts) == storage.qdata.shape[0] and storage.whole_rows(window):
            self._index = None
        else:
            self._index = slice(experts.start, experts.stop, experts.step)
        return self

    def _view(self, rank: int | None = None, **window: range) -> Self:
        """A part of this tensor, over the same bytes."""
        return self._wrap(self._storage, self._window._replace(**window), rank or self.dim(), self.dtype)

    def _like(self, storage: PackedStorage, dtype: torch.dtype | None = None) -> Self:
        """All of another storage, as a tensor of this one's rank."""
        return self._wrap(storage, storage.whole(range(storage.qdata.shape[0])), self.dim(), dtype or self.dtype)

    @property
    def is_part_of_experts(self) -> bool:
        """Whether this is a view of some rows or columns, whose bytes have no place of their own in memory."""
        return not self._storage.whole_rows(self._window)

    def _own_bytes(self, part: str) -> Tensor:
        data: Tensor = getattr(self._storage, part)
        if self._index is None:
            return data
        if self.is_part_of_experts:
            raise ValueError(
                "a view of rows or columns has no bytes of its own in memory; clone() it, or write to it with copy_"
            )
        if not is_real(data):
            return data[self._index]
        # The same object each time, because dynamo tells the tensors in a tensor apart by what they are; and no fake
        # one, although dynamo asks in its fake mode.
        base, view = self._views.get(part, (None, data))
        if base is not data:
            with _disable_current_modes(), torch.no_grad(), torch.inference_mode(data.is_inference()):
                view = data[self._index]
            self._views[part] = data, view
        return view

    @property
    def qdata(self) -> Tensor:
        """The packed codes as they lie in memory, padded: uint8 ``[E, padded N, padded K/2]`` (or without E). Shares
        the storage."""
        return self._own_bytes("qdata")

    @property
    def scale(self) -> Tensor:
        """The e8m0 scales as they lie in memory, padded: uint8 ``[E, padded N, padded K/32]`` (or without E). Shares
        the storage."""
        return self._own_bytes("scale")

    def data_ptr(self) -> int:
        """The address of the codes: it stays through shuffles and refits."""
        return self.qdata.data_ptr()

    def _no_values_in_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("its values are packed; call .dequantize() for a plain tensor")

    apply_ = __dlpack__ = _no_values_in_memory  # torch does them in C, and crashes on a wrapper

    def share_memory_(self) -> Self:
        """Move codes and scales to shared memory; a later change of layout replaces them instead of rewriting them."""
        self._storage.qdata.share_memory_()
        self._storage.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the codes are in shared memory."""
        return bool(self._storage.qdata.is_shared())

    @property
    def data(self) -> Self:
        """Another tensor over the same bytes; assigning a :class:`ShuffledMXFP4Tensor` takes over its storage."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._storage.pinned is not None:
            raise RuntimeError(
                "the bytes were handed out by as_kernel_operands(), whose holder would not see others; write values "
                "with copy_"
            )
        if isinstance(value, type(self)) and (value.shape, value.dtype, value.device) == (
            self.shape,
            self.dtype,
            self.device,
        ):
            self._storage, self._window, self._index = value._storage, value._window, value._index
            self._views = {}
            return
        raise TypeError(
            f".data takes a ShuffledMXFP4Tensor of shape {list(self.shape)}, {self.dtype}, on {self.device}, found "
            f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}, on {value.device}; write values "
            "with copy_, packed bytes through .qdata_view and .scale_view"
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Does nothing: packed codes have no gradient, and ``nn.Parameter`` asks for one by default."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False, whatever is assigned to it."""
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        pass

    def user_attributes(self) -> dict[str, Any]:
        """What others have set on this object (``weight_loader``, ``_is_param``)."""
        own = Wrapper.__annotations__
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        # Being flattened for the compiler is a first use: here, and only here, it sees the real bytes.
        storage = self._storage
        storage.check_readable()
        kind = backends.kind_at_first_use(self.device, storage.target)
        if kind not in (None, storage.kind) and is_real(storage.qdata):
            storage.relayout_(kind)
        return ["qdata", "scale"], (storage.geometry, storage.kind, storage.target, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> Self:
        geometry, kind, target, dtype = context
        qdata, scale = inner["qdata"], inner["scale"]
        rank = qdata.dim()
        if rank == 2:
            qdata, scale = qdata.unsqueeze(0), scale.unsqueeze(0)
        storage = PackedStorage(qdata, scale, geometry, kind, target)
        return cls._wrap(storage, storage.whole(range(len(qdata))), rank, dtype)

    def _stable_hash_for_caching(self) -> str:
        """What distinguishes a compiled artefact in torch's caches: layout and sizes, and who would run it."""
        _, context = self.__tensor_flatten__()
        inner = [(tuple(part.shape), part.stride()) for part in (self.qdata, self.scale)]
        known = (
            type(self).__qualname__,
            tuple(self.shape),
            context,
            inner,
            self.device,
            backends.fingerprint(self.device),
            str(torch.ops.shuffled_tensor.fused_moe_packed.default._schema),  # of another version of this package
        )
        return hashlib.sha256(repr(known).encode()).hexdigest()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = OPERATIONS.get(func) or OPERATIONS.get(func.name())
        if handler is None:
            # in inference mode torch does not take composite operators (narrow, chunk, to) apart itself
            out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
            raise NotImplementedError(
                f"{func} is not defined on ShuffledMXFP4Tensor, whose bytes are packed codes in an order of their own; "
                f"call .dequantize() for a plain tensor of its values"
            )
        kwargs = kwargs or {}
        out = handler(*args, **kwargs)
        return return_and_correct_aliasing(func, args, kwargs, out) if isinstance(out, cls) else out
