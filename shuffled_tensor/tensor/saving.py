# SPDX-License-Identifier: MIT
"""How weights go into files and to other processes.

``pickle``, ``torch.save`` and ``torch.distributed.checkpoint`` write the names of :func:`rebuild_weight` and
:func:`rebuild_storage` into every file, as ``shuffled_tensor.rebuild_weight`` and ``shuffled_tensor.rebuild_storage``,
and call them with what the file holds. So both names, and every key of their ``state``, are a file format: they are
read forever. A later version may add a key, with a meaning for files that do not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from shuffled_tensor.layouts import find_layout, layout_or_none, name_or_none
from shuffled_tensor.mxfp4 import CODES, PARTS
from shuffled_tensor.owners import is_real
from shuffled_tensor.tensor.geometry import ALIGN, Geometry, RowOrder, Window, align_of
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["rebuild_storage", "rebuild_weight"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _frozen(function: _Function) -> _Function:
    """Files name a function by where the package shows it, so that the file that defines it may move."""
    function.__module__ = "shuffled_tensor"
    torch.serialization.add_safe_globals([function])
    return function


@_frozen
def rebuild_storage(qdata: Tensor, scale: Tensor, state: dict[str, Any]) -> PackedStorage:
    """The bytes of a saved weight, which its aliases in the file share. For files to call, not for users.

    Args:
        qdata, scale: row-major logical codes, uint8 ``[E, N, K/2]``, and scales, uint8 ``[E, N, K/32]``.
        state: ``"gate_up"``, ``"shuffle_kind"``, and, where they are not those of a constructor that was not told,
            ``"row_order"`` and ``"align"``, a pair. Of a part, ``"place"``: ``"shape"`` of the whole, ``"rows"`` and
            ``"columns"``, each ``(start, stop)``, and either ``"experts"``, likewise, or ``"listed"``, all of them.

    Raises:
        ValueError: the file is of a later version.
    """
    _check_keys(state, "gate_up", "shuffle_kind", "row_order", "align", "place")
    align, layout = align_of(state.get("align", ALIGN)), layout_or_none(state["shuffle_kind"])
    geometry = Geometry(qdata.shape[1], qdata.shape[2] * CODES.per_byte, state["gate_up"], align)
    row_order = state.get("row_order", "contiguous")
    storage = _Unread(qdata, scale, geometry, requested_layout=layout, row_order=row_order)
    if "place" in state:
        storage.place = _read_place(state["place"])
    return storage


def _read_place(state: dict[str, Any]) -> Place:
    _check_keys(state, "shape", "experts", "listed", "rows", "columns")
    experts = tuple(state["listed"]) if "listed" in state else range(*state["experts"])
    return Place(tuple(state["shape"]), experts, range(*state["rows"]), range(*state["columns"]))


def _write_place(place: Place) -> dict[str, Any]:
    shape, experts, *grid = place
    state: dict[str, Any] = {"shape": shape}
    if isinstance(experts, range):
        state["experts"] = experts.start, experts.stop
    else:
        state["listed"] = experts
    return state | {axis: (part.start, part.stop) for axis, part in zip(("rows", "columns"), grid, strict=True)}


_QDATA, _SCALE = (vars(PackedStorage)[part.name] for part in PARTS)  # slots


def _packed(slot: Any) -> Any:
    """What a slot holds once its owner is packed."""

    def get(storage: _Unread) -> Tensor:
        storage._pack()
        data: Tensor = slot.__get__(storage)
        return data

    return property(get, slot.__set__)


class _Unread(PackedStorage):
    """Logical bytes out of a file, which become a storage when somebody first looks at them.

    Not before: ``torch.load`` fills the tensors of a file without zip format after it has rebuilt all objects in it, so
    that a copy of them would hold what was in the memory before.
    """

    __slots__ = ()

    qdata, scale = _packed(_QDATA), _packed(_SCALE)

    @property
    def experts(self) -> range:
        return range(len(_QDATA.__get__(self)))

    @property
    def device(self) -> torch.device:
        device: torch.device = _QDATA.__get__(self).device
        return device

    @property
    def is_real(self) -> bool:
        return is_real(_QDATA.__get__(self))

    def own(self) -> None:
        """Not yet: these bytes are not the ones that it will have."""

    def _pack(self) -> None:
        with self.lock, torch.no_grad(), torch.inference_mode(False), _disable_current_modes():
            if type(self) is PackedStorage:
                return  # another thread was faster
            qdata, scale = _QDATA.__get__(self), _SCALE.__get__(self)
            packed = PackedStorage.pack(qdata, scale, gate_up=self.geometry.gate_up, align=self.geometry.align)
            self.qdata, self.scale = packed.qdata, packed.scale
            self.__class__ = PackedStorage  # type: ignore[assignment]
            self.own()


@_frozen
def rebuild_weight(storage: PackedStorage, state: dict[str, Any]) -> ShuffledMXFP4Tensor:
    """A saved weight, over a storage. For files to call, not for users.

    Args:
        storage: what :func:`rebuild_storage` returned.
        state: ``"experts"``, ``"rows"`` and ``"columns"`` of the storage that the weight shows, each ``(start, stop,
            step)``; ``"dim"``, 3 or 2; ``"dtype"``, the logical dtype; ``"attributes"`` that users have set on it.

    Raises:
        ValueError: the file is of a later version.
    """
    _check_keys(state, *Window._fields, "dim", "dtype", "attributes")
    window = Window(*(range(*state[axis]) for axis in Window._fields))
    weight = ShuffledMXFP4Tensor._wrap(storage, window, state["dim"], state["dtype"])
    weight.__dict__.update(state["attributes"])
    return weight


def _check_keys(state: dict[str, Any], *known: str) -> None:
    unknown = sorted(state.keys() - set(known))
    if unknown:
        raise ValueError(
            f"this file was saved by a later version of shuffled_tensor, which says {', '.join(unknown)} of a weight; "
            "read it with that version"
        )


def _reduce_storage(storage: PackedStorage) -> tuple[Any, ...]:
    # What is written is canonical and without padding, whatever the layout in memory: a file does not depend on a GPU
    # or on what computes there. What is written of a tensor is all of the memory that it is a view of.
    qdata, scale = (
        data if data.untyped_storage().nbytes() == data.nbytes else data.clone(memory_format=torch.contiguous_format)
        for data in storage.canonical(storage.experts)
    )
    geometry, kind = storage.geometry, name_or_none(storage.requested_layout)
    state: dict[str, Any] = {"gate_up": geometry.gate_up, "shuffle_kind": kind}
    # a file of what there was first is as it was
    if storage.row_order != "contiguous":
        state["row_order"] = storage.row_order
    if geometry.align != ALIGN:
        state["align"] = geometry.align
    if storage.place is not None:
        state["place"] = _write_place(storage.place)
    return rebuild_storage, (qdata, scale, state)


def _reduce_weight(weight: ShuffledMXFP4Tensor, protocol: Any) -> tuple[Any, ...]:
    if isinstance(weight._storage.qdata, FakeTensor):
        # Nobody saves those: torch before 2.12 makes a key for its compile caches this way.
        return str, (weight._stable_hash_for_caching(),)
    # The storage is an object of its own in the file, so that aliases saved together stay aliases.
    window = {
        axis: (part.start, part.stop, part.step) for axis, part in zip(Window._fields, weight._window, strict=True)
    }
    state = {**window, "dim": weight.dim(), "dtype": weight.dtype, "attributes": weight.__dict__}
    return rebuild_weight, (weight._storage, state)


# Here, and not in the classes, so that what makes a file and what reads it stand side by side.
PackedStorage.__reduce__ = _reduce_storage  # type: ignore[method-assign, assignment]
ShuffledMXFP4Tensor.__reduce_ex__ = _reduce_weight  # type: ignore[method-assign, assignment]


def _share_storage(storage: PackedStorage) -> tuple[Any, ...]:
    """For torch.multiprocessing: the bytes themselves, as they lie, in shared memory.

    Neither process lays them out anew in place from now on, so what each believes of them stays true.
    """
    with storage.held():
        if storage.device.type == "cpu":
            storage.share_memory_()  # here, and not when torch pickles them, so that it is known where they are now
        storage.sent = True
        layouts = storage.layout.name, name_or_none(storage.requested_layout)
        known = *layouts, storage.row_order, storage.place
        return _receive_storage, (storage.qdata, storage.scale, tuple(storage.geometry), *known)


def _receive_storage(
    qdata: Tensor,
    scale: Tensor,
    geometry: tuple[Any, ...],
    layout: str,
    shuffle_kind: str | None,
    row_order: RowOrder,
    place: Place | None,
) -> PackedStorage:
    layouts = find_layout(layout), layout_or_none(shuffle_kind)
    storage = PackedStorage(qdata, scale, Geometry(*geometry), *layouts, row_order)
    storage.place = place
    storage.sent = True
    return storage


ForkingPickler.register(PackedStorage, _share_storage)
