# SPDX-License-Identifier: MIT
"""Parts of weights in ``torch.distributed.checkpoint``: each is written to, and read from, its place in the whole.

A file holds row-major values without pads, so any part is read into any other, and into plain tensors.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["sharded"]

aten = torch.ops.aten


def sharded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for ``dcp.save`` and ``dcp.load``, in which this rank's parts stand for their wholes.

    ``dcp.save(sharded(model.state_dict()), ...)`` writes every part where its :attr:`ShuffledMXFP4Tensor.place` says;
    ``dcp.load`` of the same writes into the parts, in the layout and at the address that they have. Both are right from
    any split to any other. Parts in DTensors of the size of the whole need no ``sharded``; weights that are no parts,
    and whatever else is in the dict, are left as they are.
    """
    return {name: sharded(value) if isinstance(value, Mapping) else _standing(value) for name, value in state.items()}


def _standing(value: Any) -> Any:
    part = getattr(value, "_local_tensor", value)  # of a DTensor of parts, which has another size than the whole
    if not isinstance(part, ShuffledMXFP4Tensor) or part.parted is None:
        return value
    return value if part is not value and value.shape == part.place.shape else _Sharded.of(part)


class _Piece(NamedTuple):
    """What lies together in the whole: where it begins there, and which experts and rows of the part it is."""

    offsets: torch.Size
    experts: slice
    rows: slice

    def of(self, weight: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
        """The view of it."""
        view = weight[self.rows] if weight.dim() == 2 else weight[self.experts, self.rows]
        assert isinstance(view, ShuffledMXFP4Tensor)  # for the type checker
        return view

    def sizes(self, weight: ShuffledMXFP4Tensor) -> torch.Size:
        grid = self.experts.stop - self.experts.start, self.rows.stop - self.rows.start, weight.shape[-1]
        return torch.Size(grid[-weight.dim() :])


def _pieces(weight: ShuffledMXFP4Tensor, place: Place) -> list[_Piece]:
    """Runs of experts, and of these each half alone where there are more rows than here."""
    halves = weight._storage.geometry.halves
    here, all_rows = len(place.rows), place.shape[1] // halves
    rows = [slice(half * here, (half + 1) * here) for half in range(halves)]
    if here == all_rows:
        rows = [slice(0, halves * here)]
    step = max(1, len(place.experts)) if isinstance(place.experts, range) else 1
    pieces = []
    for start in range(0, len(place.experts), step):
        for half, own in enumerate(rows):
            offsets = place.experts[start], half * all_rows + place.rows.start, place.columns.start
            pieces.append(_Piece(torch.Size(offsets[-weight.dim() :]), slice(start, start + step), own))
    return pieces


def _write_items(self: ShuffledMXFP4Tensor, fqn: str, object: Any) -> list[WriteItem]:
    """What of this goes where into a file; ``object`` is this, or what stands for it in the state dict."""
    from torch.distributed.checkpoint import planner_helpers
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
    from torch.distributed.tensor import DTensor

    place = self.parted
    if place is None:
        if not isinstance(object, DTensor):
            return [planner_helpers._create_write_item_for_tensor(fqn, object)]
        _check_rows(self, object)
        return [planner_helpers._create_write_items_for_dtensor(fqn, object)]
    properties = TensorProperties.create_from_tensor(self)
    return [
        WriteItem(
            index=MetadataIndex(fqn, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offsets, piece.sizes(self)), properties, torch.Size(place.shape[-self.dim() :])
            ),
        )
        # an expert may be here twice
        for offsets, piece in {piece.offsets: piece for piece in _pieces(self, place)}.items()
    ]


def _chunk_list(self: ShuffledMXFP4Tensor) -> Callable[[], list[ChunkStorageMetadata]]:
    """A method that only a part has: of others, what surrounds them says where they are."""
    place = self.parted
    if place is None:
        from torch.distributed.tensor import DTensor

        # a DTensor asks whether there is this method, before anything is read, and does not say what it is
        holder = sys._getframe(1).f_locals.get("self")
        if isinstance(holder, DTensor):
            _check_rows(self, holder)
        raise AttributeError("a weight that is no part has no chunks")
    return partial(_chunks_of, self, place)


def _chunks_of(self: ShuffledMXFP4Tensor, place: Place) -> list[ChunkStorageMetadata]:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return [ChunkStorageMetadata(piece.offsets, piece.sizes(self)) for piece in _pieces(self, place)]


def _tensor_shard(self: ShuffledMXFP4Tensor, index: MetadataIndex) -> ShuffledMXFP4Tensor:
    """The view of this that a file's item is read from or written into."""
    place = self.parted
    if place is None:
        return self
    pieces = _pieces(self, place)
    own = pieces[index.index : index.index + 1] if index.index is not None else []  # an expert may be here twice
    for piece in (*own, *pieces):
        if piece.offsets == index.offset:
            return piece.of(self)
    raise ValueError(f"{index.fqn}: nothing of this part begins at {index.offset}, found {place}")


def _check_rows(weight: ShuffledMXFP4Tensor, holder: Tensor) -> None:
    """Raise NotImplementedError where a DTensor parts rows of gate and up together."""
    if weight.gate_up and weight.shape[-2] != holder.shape[-2]:
        raise NotImplementedError(
            f"a DTensor of shape {list(holder.shape)} holds gate-up rows of shape {list(weight.shape)}, and "
            "no Shard says that these are the matching rows of both halves; make the part with shard(), or set its "
            ".place, which says where it lies"
        )


# Here, and not in the class, so that what writes a checkpoint and what reads it stand side by side.
ShuffledMXFP4Tensor.__create_write_items__ = _write_items  # type: ignore[attr-defined]
ShuffledMXFP4Tensor.__create_chunk_list__ = property(_chunk_list)  # type: ignore[attr-defined]
ShuffledMXFP4Tensor.__get_tensor_shard__ = _tensor_shard  # type: ignore[attr-defined]


class _Holder(Tensor):
    __slots__ = ("_part",)  # of a base, since torch's stager copies what is in `__dict__` and in the class's own slots

    _part: ShuffledMXFP4Tensor


_STAGING = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.new_empty.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.copy_.default,
    aten.is_pinned.default,
    aten.pin_memory.default,
    aten._pin_memory.default,
}
"""What torch's stagers and planners do to a tensor."""


class _Sharded(_Holder):
    """A part as a state dict wants it: with the size of the whole."""

    __slots__ = ()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, part: ShuffledMXFP4Tensor) -> _Sharded:
        shape = part.place.shape[-part.dim() :]
        with torch.inference_mode(False), torch.no_grad():
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)
        self._part = part
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _STAGING:
            raise NotImplementedError(
                f"{func}: this stands for a part of a ShuffledMXFP4Tensor in a state dict; use the part itself"
            )
        of_parts = list(tree_map_only(_Sharded, lambda holder: holder._part, args))
        if func is aten.new_empty.default and tuple(of_parts[1]) == tuple(args[0].shape):
            of_parts[1] = of_parts[0].shape
        out = func(*of_parts, **kwargs or {})
        if func is aten.copy_.default:
            return args[0]
        return cls.of(out) if isinstance(out, ShuffledMXFP4Tensor) else out

    def share_memory_(self) -> _Sharded:
        self._part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self._part.is_shared()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sharded:
        return self.of(copy.deepcopy(self._part, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Sharded.of, (self._part,)  # within one job, to a process that writes the file

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self._part!r} as a part of {list(self.shape)}"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return _write_items(self._part, fqn, object)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return _chunks_of(self._part, self._part.place)

    def __get_tensor_shard__(self, index: MetadataIndex) -> ShuffledMXFP4Tensor:
        return _tensor_shard(self._part, index)
