# SPDX-License-Identifier: MIT
"""What torch needs of codes and scales that are one tensor of their logical shape: the mechanics under
:class:`ShuffledMXFP4Tensor`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes, return_and_correct_aliasing

from shuffled_tensor.layouts import find_layout, layout_or_none, name_or_none
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, Part
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.base import StorageTensor
from shuffled_tensor.tensor.geometry import Window, slice_of
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.storage import PackedStorage

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Wrapper"]


class _Nowhere(int):
    """A 0 that says of what it is the address. By a plain one, who finds tied parameters by their addresses would take
    any weight for any other, as accelerate's ``dispatch_model`` does, which puts one in the place of the rest."""

    _of: tuple[int, ...]

    def __new__(cls, *of: int) -> _Nowhere:
        self = super().__new__(cls)
        self._of = of
        return self

    def __eq__(self, other: object) -> bool:
        return self._of == other._of if isinstance(other, _Nowhere) else other == 0

    def __ne__(self, other: object) -> bool:  # int has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self._of)


class Wrapper(StorageTensor):
    """Codes and scales of a window as a tensor of its logical shape and dtype."""

    __slots__ = ("_index", "_traced", "_views")

    _index: int | slice | None
    """What takes this tensor's experts out of the storage's; None where it is all of the storage."""
    _views: dict[Part, tuple[Tensor, Tensor]]
    """Of some of the experts: the storage's codes and scales, and the part of them that is this tensor's."""
    _traced: tuple[torch.Size, range] | None
    """Of what a compiler has taken apart, and of its views: the shape of the former, and which of its experts these
    are."""

    _remedy = "its bytes are packed codes in an order of their own: call .dequantize() for a plain tensor of its values"

    @classmethod
    def _wrap(cls, storage: PackedStorage, window: Window, rank: int, dtype: torch.dtype) -> Self:
        """A tensor over a window of a storage; rank 2 shows a single expert."""
        self = cls._over(storage, window, window.shape[-rank:], dtype)
        self._views, self._traced = {}, None
        experts = window.experts
        if rank == 2:
            self._index = experts[0]
        elif experts == storage.experts and storage.whole_rows(window):
            self._index = None
        else:
            self._index = slice(experts.start, experts.stop, experts.step)
        if self._index is not None and not storage.is_real:
            # now, because a compiler takes tensors apart outside the modes in which its bytes can be viewed
            self._views = {part: (storage.bytes_of(part), storage.bytes_of(part)[self._index]) for part in PARTS}
        return self

    def _view(self, rank: int | None = None, **window: range) -> Self:
        """A part of this tensor, over the same bytes."""
        view = self._wrap(self._storage, self._window._replace(**window), rank or self.dim(), self.dtype)
        view._traced = self._traced and (self._traced[0], view._window.experts)
        return view

    def _like(self, storage: PackedStorage, dtype: torch.dtype | None = None) -> Self:
        """All of another storage, as a tensor of this one's rank."""
        return self._wrap(storage, storage.whole(), self.dim(), dtype or self.dtype)

    @property
    def gate_up(self) -> bool:
        """Whether the rows are gate rows, then up rows; a view of some rows has them as they come."""
        geometry = self._storage.geometry
        return geometry.gate_up and len(self._window.rows) == geometry.rows

    @property
    def is_part_of_experts(self) -> bool:
        """Whether this is a view of some rows or columns, whose bytes have no place of their own in memory."""
        return self._index is not None and not self._storage.whole_rows(self._window)

    @property
    def parted(self) -> Place | None:
        """Where this lies in the whole of which it is a part; None of a whole, and of a view of rows or columns."""
        place = self._storage.place
        if place is None or self.is_part_of_experts:
            return None
        return place if self._index is None else place.part(experts=self._window.experts)

    def _own_bytes(self, part: Part) -> Tensor:
        if self.is_part_of_experts:
            raise ValueError(
                "a view of rows or columns has no bytes of its own in memory; clone() it, or write to it with copy_"
            )
        return self.bytes_around(part)

    def bytes_around(self, part: Part) -> Tensor:
        """All of the experts of which this tensor shows rows and columns."""
        data = self._storage.bytes_of(part)
        if self._index is None:
            return data
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
        return self._own_bytes(CODES)

    @property
    def scale(self) -> Tensor:
        """The e8m0 scales as they lie in memory, padded: uint8 ``[E, padded N, padded K/32]`` (or without E), K
        to a multiple of 256. Shares the storage."""
        return self._own_bytes(SCALES)

    def data_ptr(self) -> int:
        """0: there is no memory that holds ``numel()`` values of this dtype. The codes and scales have addresses, which
        stay through shuffles and refits: ``qdata.data_ptr()`` and ``scale.data_ptr()``. Only tensors that start at the
        same codes have an equal 0."""
        if not self._storage.is_real:
            return 0
        return _Nowhere(self.bytes_around(CODES).data_ptr(), self._window.rows.start, self._window.columns.start)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes in memory that this tensor shows, codes and scales with their pads; of a view of rows or columns,
        their own. ``numel() * element_size()`` is the size of the logical values."""
        if self.is_part_of_experts:
            return sum(self.numel() // part.per_byte for part in PARTS)
        return sum(self.bytes_around(part).nbytes for part in PARTS)

    def share_memory_(self) -> Self:
        """Move codes and scales to shared memory; a later change of layout replaces them instead of rewriting them."""
        self._storage.share_memory_()
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
        if self._storage.handed_out:
            raise RuntimeError(
                "the bytes were handed out by as_kernel_operands(), whose holder would not see others; write values "
                "with copy_"
            )
        if isinstance(value, type(self)) and (value.shape, value.dtype, value.device, value.gate_up) == (
            self.shape,
            self.dtype,
            self.device,
            self.gate_up,
        ):
            self._storage, self._window, self._index = value._storage, value._window, value._index
            self._views = {}
            return
        raise TypeError(
            f".data takes a ShuffledMXFP4Tensor of shape {list(self.shape)}, {self.dtype}, on {self.device}, with "
            f"gate_up={self.gate_up}, found {type(value).__name__} of shape {list(value.shape)}, {value.dtype}, on "
            f"{value.device}{f', with gate_up={value.gate_up}' if isinstance(value, type(self)) else ''}; write values "
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

    _qdata_around = property(partial(bytes_around, part=CODES))
    _scale_around = property(partial(bytes_around, part=SCALES))

    # What a compiled function returns of its input is made again from the input itself: torch asks the one that was put
    # together from what the graph returned for its base, and for the same view of another.

    @property
    def _base(self) -> Tensor | None:  # type: ignore[override]
        if self._traced is None or not self._storage.is_real:
            return super()._base
        return torch.empty(self._traced[0], dtype=self.dtype, device="meta")

    def _view_func(self, base: Tensor) -> Any:
        if self._traced is None or not isinstance(base, Wrapper):
            return super()._view_func(base)  # type: ignore[misc]
        experts = base._window.experts[slice_of(self._traced[1])]
        return base._wrap(base._storage, self._window._replace(experts=experts), self.dim(), self.dtype)

    def is_new_state_of(self, traced: Self) -> bool:
        """Whether this is what a graph made of its input, which is written back now: whole, as they lie.

        Raises:
            RuntimeError: in another layout, which a graph cannot record.
        """
        state = self._traced is not None and not isinstance(self._storage.qdata, FunctionalTensor)
        if state and self._storage.layout is not traced._storage.layout:
            raise RuntimeError(
                f"the layout of a weight cannot change in a compiled function, from {traced._storage.layout.name!r} to "
                f"{self._storage.layout.name!r}; call shuffle_ or unshuffle_ outside it"
            )
        return state

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        # Being flattened for the compiler is a first use: here, and only here, it sees the real bytes.
        # Dynamo's guards ask twice for each weight in every compiled call.
        storage = self._storage
        storage.check_readable()
        layout, validity = policy.current.layout_at_first_use(storage.device, storage.fixed_layout), storage.validity
        if layout is not None and layout is not validity.layout and storage.is_real:
            storage.convert_layout_(layout)
        # Names, because dynamo's guards compare them.
        names = validity.layout.name, name_or_none(storage.requested_layout)
        inner = ["_qdata_around", "_scale_around"] if self.is_part_of_experts else ["qdata", "scale"]
        traced = None if self._traced is None or storage.is_real else self._traced
        return inner, (storage.geometry, *names, validity.row_order, self.dtype, *self._window[1:], traced)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> Self:
        geometry, layout, shuffle_kind, row_order, dtype, rows, columns, traced = context
        given = dict(zip(PARTS, inner.values(), strict=True))
        rank = given[CODES].dim()
        qdata, scale = (data.unsqueeze(0) if rank == 2 else data for data in given.values())
        found = PackedStorage.owner_of(qdata, scale, geometry)  # which knows better how they lie now
        if found is None:
            layouts = find_layout(layout), layout_or_none(shuffle_kind)
            storage = PackedStorage(qdata, scale, geometry, *layouts, row_order)
            found = storage, storage.experts
        storage, experts = found
        self = cls._wrap(storage, Window(experts, rows, columns), rank, dtype)
        self._traced = (self.shape, experts) if isinstance(qdata, FunctionalTensor) else traced
        if rank == 2:  # not other views of the same
            self._views = {part: (storage.bytes_of(part), data) for part, data in given.items()}
        return self

    @classmethod
    def _corrected(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return return_and_correct_aliasing(func, args, kwargs, out) if isinstance(out, (cls, list)) else out

    def _stable_hash_for_caching(self) -> str:
        """What distinguishes a compiled artefact in torch's caches: layout and sizes, and who would run it."""
        _, context = self.__tensor_flatten__()
        inner = [(tuple(data.shape), data.stride()) for data in map(self.bytes_around, PARTS)]
        known = (
            type(self).__qualname__,
            tuple(self.shape),
            context,
            inner,
            self.device,
            policy.current.fingerprint(self.device),
        )
        return hashlib.sha256(repr(known).encode()).hexdigest()
