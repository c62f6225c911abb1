# SPDX-License-Identifier: MIT
"""What each aten operation does to a :class:`ShuffledMXFP4Tensor`: the rows of
``ShuffledMXFP4Tensor.operations``. A handler's docstring is its line in docs/OPERATIONS.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map_only

from shuffled_tensor import mxfp4
from shuffled_tensor.mxfp4 import PARTS, SCALES
from shuffled_tensor.owners import is_real
from shuffled_tensor.tensor.checks import check_logical_dtype, check_plain, whole_numbers
from shuffled_tensor.tensor.join import along_experts, axis_of, bytes_of, first_of, join, lie_alike, materialized
from shuffled_tensor.tensor.refused import refuse
from shuffled_tensor.tensor.storage import PackedStorage, locked
from shuffled_tensor.tensor.values import Values
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

aten = torch.ops.aten

implements = ShuffledMXFP4Tensor.operations.implements

same_bytes = partial(implements, group="The same bytes, seen again")
copies = partial(implements, group="A copy, in the same layout")
writes = partial(implements, group="New values, written in whatever layout the tensor has")
reads = partial(implements, group="Read as plain values, dequantised for the call")
beside = partial(implements, group="Plain tensors beside it, and facts about it")

# --- the same bytes, seen again


@same_bytes(aten.detach.default, aten.alias.default)
def alias(self: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    """Another tensor over the same bytes."""
    out = self._view()
    # Module.to, and all else that goes through Module._apply, swaps nn.Parameter(converted), which detaches, into the
    # Parameter: a plain one would have kept its weight_loader.
    caller = sys._getframe(2)  # beyond __torch_dispatch__
    applying = caller.f_back
    if applying and (caller.f_code, applying.f_code) == (nn.Parameter.__new__.__code__, nn.Module._apply.__code__):
        vars(out).update(vars(applying.f_locals["param"]))
    return out


@same_bytes(aten.select.int)
def select(self: ShuffledMXFP4Tensor, dim: int, index: int) -> ShuffledMXFP4Tensor:
    """A view of one expert; of one row or column it is refused."""
    if axis_of(self, dim) != "experts":
        raise NotImplementedError(
            f"select along dim {dim} of a ShuffledMXFP4Tensor of shape {list(self.shape)}: a single row or "
            "column is no "
            "weight; take a slice of length 1, or call .dequantize()"
        )
    if not -len(self) <= index < len(self):
        raise IndexError(f"expert {index} is out of range for a tensor of {len(self)} experts")
    expert = self._window.experts[index]
    return self._view(rank=2, experts=range(expert, expert + 1))


def _fsdp_asks(frames: int) -> bool:
    """Whether it is ``fully_shard`` that called an operator, so many frames above."""
    return sys._getframe(frames).f_globals.get("__name__") == "torch.distributed.fsdp._fully_shard._fsdp_param"


def _reshaped(operator: torch._ops.OpOverload, self: ShuffledMXFP4Tensor, *args: Any) -> ShuffledMXFP4Tensor:
    """``[1, N, K]`` seen as ``[N, K]`` or back, or as it is; any other shape would part values that share a scale."""
    size = list(operator(torch.empty(self.shape, device="meta"), *args).shape)
    one = list(self.shape[-2:])
    if size == [self.numel()] and _fsdp_asks(3):
        return self._view()  # fully_shard keeps a flat view of a shard, and does not read it where there are hooks
    if size != list(self.shape) and not (len(self._window.experts) == 1 and size in (one, [1, *one])):
        raise NotImplementedError(
            f"a ShuffledMXFP4Tensor of shape {list(self.shape)} cannot be viewed as {size}: its shape is "
            "[experts, N, K]; call .dequantize(). Where DistributedDataParallel flattens what it sends, leave the "
            "weight out: DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names); where "
            "set_model_state_dict(broadcast_from_rank0=True) does, give it .dequantize() of the weight, which is "
            "quantised again where it arrives"
        )
    return self._view(rank=len(size))


for _operator in (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
):
    same_bytes(_operator)(partial(_reshaped, _operator))


@same_bytes(aten.as_strided.default)
def as_strided(
    self: ShuffledMXFP4Tensor, size: list[int], stride: list[int], storage_offset: int | None = None
) -> ShuffledMXFP4Tensor:
    """The tensor as it is, which FSDP2 asks for; other sizes or strides are refused."""
    if (tuple(size), tuple(stride), storage_offset or 0) != (self.shape, self.stride(), 0):
        refuse("takes other sizes or strides than those", "slice it", aten.as_strided.default)
    return self._view()


@same_bytes(aten.slice.Tensor)
def slice_(
    self: ShuffledMXFP4Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> ShuffledMXFP4Tensor:
    """A view of experts, rows or columns (at multiples of 32) that can be read and written in any layout."""
    axis = axis_of(self, dim)
    part = getattr(self._window, axis)[start:end:step]
    if axis != "experts" and step != 1:
        raise NotImplementedError(f"{axis} of a ShuffledMXFP4Tensor are sliced without steps; call .dequantize()")
    if axis == "columns" and (part.start % mxfp4.BLOCK or part.stop % mxfp4.BLOCK):
        raise ValueError(
            f"columns {part.start}..{part.stop} cut through a block of {mxfp4.BLOCK} that shares a scale; "
            f"slice at multiples of {mxfp4.BLOCK}, or call .dequantize()"
        )
    return self._view(**{axis: part})


@same_bytes(aten.split.Tensor)
def split(self: ShuffledMXFP4Tensor, split_size: int, dim: int = 0) -> list[ShuffledMXFP4Tensor]:
    """Views, as slicing gives them."""
    axis_of(self, dim)
    size = self.shape[dim]
    if split_size < 0 or (split_size == 0 and size):
        raise ValueError(f"split takes parts of one or more, found {split_size} (dim {dim} has {size})")
    starts = range(0, size, split_size) if size else [0]  # torch splits nothing into one part of nothing
    return [slice_(self, dim, start, start + split_size) for start in starts]


@same_bytes(aten.split_with_sizes.default)
def split_with_sizes(self: ShuffledMXFP4Tensor, split_sizes: list[int], dim: int = 0) -> list[ShuffledMXFP4Tensor]:
    """Views, as slicing gives them."""
    axis_of(self, dim)
    if sum(split_sizes) != self.shape[dim]:
        raise ValueError(f"split sizes {list(split_sizes)} do not add up to the {self.shape[dim]} of dim {dim}")
    if min(split_sizes, default=0) < 0:
        raise ValueError(f"split sizes must not be negative, found {list(split_sizes)}")
    ends = [sum(split_sizes[: place + 1]) for place in range(len(split_sizes))]
    return [slice_(self, dim, end - size, end) for size, end in zip(split_sizes, ends, strict=True)]


@same_bytes(aten.unbind.int)
def unbind(self: ShuffledMXFP4Tensor, dim: int = 0) -> list[ShuffledMXFP4Tensor]:
    """Views of the experts, one by one."""
    axis_of(self, dim)
    return [select(self, dim, index) for index in range(self.shape[dim])]


# --- the same values, in bytes of their own; the layout is kept


@copies(aten.clone.default)
def clone(self: ShuffledMXFP4Tensor, *, memory_format: torch.memory_format | None = None) -> ShuffledMXFP4Tensor:
    """A copy in the same layout."""
    return _map_bytes(self, partial(Tensor.clone, memory_format=torch.contiguous_format))


@copies(aten._to_copy.default)
def to_copy(
    self: ShuffledMXFP4Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **ignored: Any,
) -> ShuffledMXFP4Tensor:
    """A copy in the same layout, on another device or of another logical dtype; the codes stay."""
    # `ignored`: layout, pin_memory and memory_format, which the `to` of a strided tensor fills with their defaults
    check_logical_dtype(dtype or self.dtype)
    return _map_bytes(self, lambda data: data.to(device or data.device, non_blocking=non_blocking, copy=True), dtype)


@copies(aten.index.Tensor)
def index(self: ShuffledMXFP4Tensor, indices: list[Tensor | None]) -> ShuffledMXFP4Tensor:
    """A copy of the experts that one vector picks."""
    picked = _expert_vector(self, indices)
    return _picked_by(self, lambda data: data[picked])


@copies(aten.index_select.default)
def index_select(self: ShuffledMXFP4Tensor, dim: int, index: Tensor) -> ShuffledMXFP4Tensor:
    """A copy of the experts that a vector picks."""
    _check_experts(self, dim, "index_select")
    return _picked_by(self, lambda data: data.index_select(0, index))


@copies(aten.cat.default)
def cat(tensors: list[Tensor], dim: int = 0) -> ShuffledMXFP4Tensor:
    """Experts, rows or columns of several tensors behind each other, laid out and padded as the first; formats and
    shapes are checked. Rows are gate and up rows where they are both halves of gate-up weights, all gate rows first."""
    first = first_of(tensors, dim)
    return join(first, tensors, dim)


@copies(aten.stack.default)
def stack(tensors: list[Tensor], dim: int = 0) -> ShuffledMXFP4Tensor:
    """Single experts to one tensor, laid out and padded as the first; formats and shapes are checked."""
    first = first_of(tensors)
    if first.dim() != 2 or dim not in (0, -3):
        raise NotImplementedError(
            "experts [N, K] are stacked along dim 0; tensors of several experts are joined by torch.cat"
        )
    joined = along_experts(first, tensors)
    return joined._view(rank=3)


@copies(aten.empty_like.default, aten.zeros_like.default)
def zeros_like(
    self: ShuffledMXFP4Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **ignored: Any
) -> ShuffledMXFP4Tensor:
    """Zeros in the same layout, agreed on with the same ranks: what is not written yet (after ``Module.to_empty``) is
    defined all the same."""
    check_logical_dtype(dtype or self.dtype)
    out = _map_bytes(self, lambda data: torch.zeros_like(data, device=device), dtype)
    out._storage.scale.fill_(SCALES.pad)
    if not self.is_part_of_experts:
        out._storage.agreed = self._storage.agreed
    return out


@copies(aten.new_empty.default)
def new_empty(
    self: ShuffledMXFP4Tensor,
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **ignored: Any,
) -> Tensor:
    """Of its own shape a copy in the same layout, which is what the stager of ``dcp.async_save`` takes it for, and so
    never reads memory that nobody wrote; else a plain tensor of the logical dtype."""
    if tuple(size) == self.shape and (dtype or self.dtype) in mxfp4.LOGICAL_DTYPES:
        return to_copy(self, dtype=dtype, device=device)
    made: Tensor = _plain(aten.new_empty.default, self, size, dtype=dtype or self.dtype, device=device or self.device)
    return made


@copies(aten.new_zeros.default)
def new_zeros(
    self: ShuffledMXFP4Tensor,
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **ignored: Any,
) -> Tensor:
    """Zeros of as many experts of its own size as asked for, in the same layout; of any other size or of a dtype that a
    weight cannot have, a plain tensor."""
    dtype, device = dtype or self.dtype, torch.device(device or self.device)
    if len(size) != 3 or tuple(size[1:]) != self.shape[-2:] or self.dim() != 3 or dtype not in mxfp4.LOGICAL_DTYPES:
        if _fsdp_asks(3):
            raise ValueError(
                f"fully_shard parts a ShuffledMXFP4Tensor along experts, dim 0, and not into {list(size)}; leave it "
                "out with ignored_params, or part it with shard()"
            )
        made: Tensor = _plain(aten.new_zeros.default, self, size, dtype=dtype, device=device)
        return made
    storage = self._storage
    geometry = storage.geometry._replace(rows=self.shape[1], columns=self.shape[2], gate_up=self.gate_up)
    zeros = PackedStorage.empty(size[0], geometry, device, storage.layout)
    zeros.requested_layout, zeros.validity.row_order = storage.requested_layout, storage.row_order
    zeros.qdata.zero_()
    zeros.scale.fill_(SCALES.pad)
    if self.parted is not None and _fsdp_asks(3):
        comes_next = sys._getframe(2).f_locals.get("sharded_param")
        if not isinstance(comes_next, ShuffledMXFP4Tensor):
            raise NotImplementedError("fully_shard of this torch does not tell which experts of a part a rank keeps")
        zeros.place = comes_next.place
    return self._like(zeros, dtype)


@copies(aten.constant_pad_nd.default)
def constant_pad_nd(self: ShuffledMXFP4Tensor, pad: list[int], value: float = 0) -> ShuffledMXFP4Tensor:
    """Experts of zeros behind the others, as DTensor asks for where experts do not come out even; other pads are
    refused."""
    if self.dim() != 3 or len(pad) != 6 or any(pad[:5]) or value:
        remedy = "pick experts with an index, or join them with torch.cat"
        refuse("adds rows, columns or values", remedy, aten.constant_pad_nd.default)
    return cat([self, new_zeros(self, [pad[5], *self.shape[1:]])])


@copies(aten._pin_memory.default, aten.pin_memory.default)
def pin_memory(self: ShuffledMXFP4Tensor, device: torch.device | None = None) -> ShuffledMXFP4Tensor:
    """A copy in page-locked memory, in the same layout."""
    return _map_bytes(self, Tensor.pin_memory)


# --- new values


@writes(aten.copy_.default)
def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copies values; the destination keeps layout, address and pads. Floating point is quantised (rule ``even``)."""
    if not isinstance(self, ShuffledMXFP4Tensor):
        assert isinstance(source, ShuffledMXFP4Tensor)  # else nobody would have called
        return self.copy_(source.dequantize())
    if source.shape != self.shape:
        raise ValueError(f"copy_ takes values of shape {list(self.shape)}, found shape {list(source.shape)}")
    _check_source(self, source)
    storage, window = self._storage, self._window
    if isinstance(source, ShuffledMXFP4Tensor):
        if source._storage is storage:
            if source._window == window:
                return self
            source = source.clone()  # they may overlap
            assert isinstance(source, ShuffledMXFP4Tensor)  # for the type checker
        with locked(source._storage, storage), source._storage.held(), self.writing():
            if source.is_new_state_of(self):
                storage.touch()
                for own, other in zip(map(self.bytes_around, PARTS), map(source.bytes_around, PARTS), strict=True):
                    own.copy_(other)
            elif lie_alike(self, source):
                storage.touch()
                for own, other in zip(bytes_of(self), bytes_of(source), strict=True):
                    own.copy_(other, non_blocking)
            elif (plain := source._storage.plain(source._window)) is not None:
                storage.write(window, *plain)
            else:
                for place, experts in storage.chunks(window.experts):
                    part = source._window._replace(experts=source._window.experts[place])
                    storage.write(window._replace(experts=experts), *source._storage.read(part))
    else:
        self._write_hp(source)
    return self


@writes(aten._foreach_copy_.default)
def foreach_copy_(tensors: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
    """``copy_``, one after the other."""
    for tensor, source in zip(tensors, sources, strict=True):
        tensor.copy_(source, non_blocking)


@writes(aten.index_copy_.default)
def index_copy_(self: ShuffledMXFP4Tensor, dim: int, index: Tensor, source: Tensor) -> ShuffledMXFP4Tensor:
    """Experts written over others, weight and scale together, in any layout."""
    _check_experts(self, dim, "index_copy_")
    if not is_real(index):
        return _index_copy_traced(self, index, source)
    experts = whole_numbers("the experts of index_copy_", index)
    chosen = [range(len(self))[expert] for expert in experts]  # counts from the end, and raises IndexError
    if len(set(chosen)) != len(chosen) or source.shape != (len(chosen), *self.shape[1:]):
        raise ValueError(
            f"index_copy_ takes different experts and values of shape {[len(chosen), *self.shape[1:]]} for them, found "
            f"experts {chosen} and shape {list(source.shape)}"
        )
    _check_source(self, source)
    if isinstance(source, ShuffledMXFP4Tensor) and source._storage is self._storage:
        source = source.clone()  # they may overlap
    sources = [source._storage] if isinstance(source, ShuffledMXFP4Tensor) else []
    every = len(chosen) == len(self._storage.experts) and self._storage.whole_rows(self._window)
    with locked(self._storage, *sources), self._storage.writing(whole=every):
        for expert, values in zip(chosen, source.unbind(0), strict=True):
            copy_(select(self, 0, expert), values)
    return self


def _index_copy_traced(self: ShuffledMXFP4Tensor, index: Tensor, source: Tensor) -> ShuffledMXFP4Tensor:
    """In a graph, where nobody knows yet which experts: all of their bytes, with what is not written as it was."""
    self.check_has_values(index)
    if source.shape != (len(index), *self.shape[1:]):
        raise ValueError(
            f"index_copy_ takes values of shape {[len(index), *self.shape[1:]]} for {len(index)} experts, found shape "
            f"{list(source.shape)}"
        )
    _, rows, columns = self._storage.whole()
    around = self._view(rows=rows, columns=columns)
    index = torch.where(index < 0, index + len(self), index)
    new = index_select(around, 0, index)
    copy_(new._view(rows=self._window.rows, columns=self._window.columns), source)
    with self._storage.writing():
        for own, data in zip(bytes_of(around), bytes_of(new), strict=True):
            own.index_copy_(0, index, data)
    return self


@writes(aten.index_put_.default)
def index_put_(
    self: ShuffledMXFP4Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> ShuffledMXFP4Tensor:
    """``w[vector] = values``: experts written over others, in any layout."""
    picked = _expert_vector(self, indices)
    if accumulate:
        raise NotImplementedError("MXFP4 codes are not accumulated into; .dequantize(), add, and copy_ back")
    if picked.dtype in (torch.bool, torch.uint8):  # torch takes either for a mask
        if not is_real(picked):
            raise NotImplementedError(
                "how many experts a mask picks is not known while a function is compiled; write w[ids] = values there, "
                "with the numbers of the experts"
            )
        if len(picked) != len(self):
            raise IndexError(f"a mask over {len(self)} experts must have as many elements, found {len(picked)}")
        picked = picked.nonzero().flatten()
    shape = len(picked), *self.shape[1:]
    if isinstance(values, ShuffledMXFP4Tensor) and values.shape != shape:  # one expert, whose bytes go to all
        values = values.view(1, *values.shape[-2:])[torch.zeros_like(picked)]
    return index_copy_(self, 0, picked, values if values.shape == shape else values.expand(shape))


@writes(aten.fill_.Scalar, aten.fill_.Tensor)
def fill_(self: ShuffledMXFP4Tensor, value: float | Tensor) -> ShuffledMXFP4Tensor:
    """One value everywhere, quantised."""
    if isinstance(value, Tensor):
        check_plain("value", value)
    scalar = torch.empty((), dtype=self.dtype, device=self.device).fill_(value)
    return copy_(self, scalar.expand(self.shape))  # type: ignore[return-value]


@writes(aten.zero_.default)
def zero_(self: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    """Zero codes and scales of 1, in any layout."""
    _, rows, columns = self._window.shape
    zeros = [
        torch.full((1, rows, columns // part.per_byte), part.pad, dtype=torch.uint8, device=self.device)
        for part in PARTS
    ]
    with self.writing():
        for expert in self._window.experts:
            self._storage.write(self._window._replace(experts=range(expert, expert + 1)), *zeros)
    return self


# --- read as plain values


def _on_values(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Computed on a plain copy of the values."""
    # Outside inference mode, because what a view operator returns must be able to have the version counter of its base.
    # Autograd is above, not here.
    with torch.inference_mode(False), torch.no_grad():
        return operator(*tree_map_only(ShuffledMXFP4Tensor, ShuffledMXFP4Tensor.dequantize, args), **kwargs)


def _rearranged(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    """A plain copy of the values, which refuses to be written: that would change nothing here."""
    values: Tensor = _on_values(operator, *args, **kwargs)
    if isinstance(values, FunctionalTensor):  # in a graph: torch refuses to write it
        torch._freeze_functional_tensor(values.elem)  # type: ignore[attr-defined]
    return values.as_subclass(Values) if is_real(values) else values


for _operator in (
    aten.equal.default,
    aten.allclose.default,
    aten.isclose.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
):
    reads(_operator)(partial(_on_values, _operator))

for _operator in (
    # what linear and matmul ask of a weight on their way to mm and bmm
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.expand.default,
):
    reads(_operator)(partial(_rearranged, _operator))


# --- plain tensors made beside ours, and facts about it


def _plain(operator: torch._ops.OpOverload, self: ShuffledMXFP4Tensor, *args: Any, **kwargs: Any) -> Any:
    """A plain tensor of the logical dtype, beside ours."""
    like = torch.empty((), dtype=self.dtype, device=self.device)
    return operator(like, *args, **kwargs)


for _operator in (
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_empty_strided.default,
):
    beside(_operator)(partial(_plain, _operator))


@beside(aten.is_pinned.default)
def is_pinned(self: ShuffledMXFP4Tensor, device: torch.device | None = None) -> bool:
    """Whether the packed bytes are in page-locked memory."""
    return all(data.is_pinned() for data in bytes_of(self))


@beside(aten.record_stream.default)
def record_stream(self: ShuffledMXFP4Tensor, stream: torch.Stream) -> None:
    """Of the packed bytes: their memory is not given away before the stream has done with it."""
    self._storage.qdata.record_stream(stream)
    self._storage.scale.record_stream(stream)


# --- helpers


def _check_source(self: ShuffledMXFP4Tensor, source: Tensor) -> None:
    """Raise for values that cannot be written, before anything is: an exception on the way leaves a weight unusable."""
    if isinstance(source, ShuffledMXFP4Tensor):
        source._storage.check_readable()
        self.check_has_values(source)
        return
    check_plain("source", source)
    if not source.is_floating_point() or source.element_size() == 1:
        raise TypeError(
            f"copy_ takes a ShuffledMXFP4Tensor or floating-point values, found {source.dtype}; packed bytes are "
            "written through .qdata_view and .scale_view, or become a ShuffledMXFP4Tensor(qdata, scale, "
            f"gate_up={self.gate_up})"
        )
    self.check_has_values(source)


def _map_bytes(
    self: ShuffledMXFP4Tensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
) -> ShuffledMXFP4Tensor:
    """The tensor with `function` applied to the codes and scales ``[E, ...]`` of its experts, which it must neither mix
    nor bring into another order."""
    storage = materialized(self) if self.is_part_of_experts else self._storage
    experts = storage.experts if self.is_part_of_experts else self._window.experts
    with storage.held():
        qdata, scale = (function(data) for data in storage.select(experts))
        copied = storage.with_bytes(qdata, scale)
    copied.place = self.parted
    return self._like(copied, dtype)


def _picked_by(self: ShuffledMXFP4Tensor, function: Callable[[Tensor], Tensor]) -> ShuffledMXFP4Tensor:
    """A copy of some experts, in any order: a whole of its own."""
    out = _map_bytes(self, function)
    out._storage.place = None
    return out


def _expert_vector(self: ShuffledMXFP4Tensor, indices: list[Tensor | None]) -> Tensor:
    _check_experts(self, 0, "index")
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        raise NotImplementedError(
            "a ShuffledMXFP4Tensor is indexed by one vector, along its experts; call .dequantize() to index "
            "rows and columns"
        )
    return indices[0]


def _check_experts(self: ShuffledMXFP4Tensor, dim: int, name: str) -> None:
    if axis_of(self, dim) != "experts":
        raise NotImplementedError(
            f"{name} along dim {dim} of a ShuffledMXFP4Tensor of shape {list(self.shape)}: it goes along "
            "experts, dim 0 "
            "of three; slice rows and columns, or call .dequantize()"
        )
