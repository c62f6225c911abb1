# SPDX-License-Identifier: MIT
"""What torch.distributed does to weights: more rows of ``ShuffledMXFP4Tensor.operations``.

Two ways: as the bytes lie, between ranks that have agreed; or row-major and without pads, and laid out by whoever
receives it. Rows are named, because a torch without torch.distributed does not have these operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from shuffled_tensor.distributed.agreement import check_agreed
from shuffled_tensor.mxfp4 import PARTS, Part
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["COLLECTIVES"]

_C: Any = torch._C._distributed_c10d  # not all of it has types

between = partial(ShuffledMXFP4Tensor.operations.implements, group="Between ranks")


class _Collective(NamedTuple):
    """Where an operator of c10d takes what, and how it is called past the dispatcher, which takes ten times as long."""

    received: int | None
    """The argument that it writes, if it does."""
    group: int
    in_one: bool
    """Whether codes and scales go in one launch of NCCL. Not where NCCL copies what has come, which it would do before
    the launch; nor between two ranks, for whom one launch takes a communicator of the whole group, which all of it
    must have begun."""
    start: Callable[..., Any]
    """With the group, and the operator's other arguments."""


def _options(options: Any, async_op: bool = True, timeout: int = -1, **others: int) -> Any:
    """Options of a collective, with an operator's last arguments, which come only where they are not as by default."""
    options.asyncOp = async_op
    if timeout >= 0:  # in milliseconds; else the group's own
        options.timeout = timedelta(milliseconds=timeout)
    for name, value in others.items():
        setattr(options, name, value)
    return options


def _broadcast(group: Any, tensors: Any, root: int, root_tensor: int, *rest: Any) -> Any:
    options = _options(_C.BroadcastOptions(), *rest, rootRank=root, rootTensor=root_tensor)
    return group.broadcast(tensors, options)


def _gather(name: str, group: Any, out: Any, own: Any, *rest: Any) -> Any:
    return getattr(group, name)(out, own, _options(_C.AllgatherOptions(), *rest))


def _exchange(group: Any, out: Any, own: Any, *rest: Any) -> Any:
    return group.alltoall(out, own, _options(_C.AllToAllOptions(), *rest))


def _exchange_in_one(group: Any, out: Any, own: Any, out_sizes: Any, sizes: Any, *rest: Any) -> Any:
    return group.alltoall_base(out, own, out_sizes, sizes, _options(_C.AllToAllOptions(), *rest))


COLLECTIVES = {
    "send": _Collective(None, 1, False, lambda group, *args: group.send(*args)),
    "recv_": _Collective(0, 1, False, lambda group, *args: group.recv(*args)),
    "broadcast_": _Collective(0, 1, True, _broadcast),
    "allgather_": _Collective(0, 2, False, partial(_gather, "allgather")),
    "_allgather_base_": _Collective(0, 2, True, partial(_gather, "_allgather_base")),
    "alltoall_": _Collective(0, 2, True, _exchange),
    "alltoall_base_": _Collective(0, 2, True, _exchange_in_one),
}
"""By the names of c10d's operators: those that move bytes as they lie."""


def _moved(name: str, *args: Any) -> Any:
    """Moves codes and scales as they lie, between ranks that called ``agree_`` for the weights; others are refused
    before anything travels, and so is a weight beside a plain tensor."""
    collective = COLLECTIVES[name]
    tensors, place = args[: collective.group], collective.group
    what, group = f"torch.distributed's {name.strip('_')}", dist.ProcessGroup.unbox(args[place])
    weights = _weights_in(what, tensors)
    for weight in weights:
        check_agreed(weight, group, what)
    if len(weights) > 1 and len({(weight._storage.layout, weight._storage.geometry) for weight in weights}) > 1:
        raise ValueError(f"{what} takes weights of one layout and one size and padding of expert")
    into = [] if collective.received is None else _weights_in(what, args[collective.received])
    if name == "broadcast_" and group.rank() == args[2]:
        into = []
    with _receiving(into):
        work = _started(collective, group, tensors, args[place + 1 :], weights[0].device, into)
    # as the operator's schema has it
    return work if name in ("send", "recv_", "alltoall_base_") else (args[0], work)


for _name in COLLECTIVES:
    between(f"c10d::{_name}")(partial(_moved, _name))


def _leaves(given: Sequence[Any]) -> Iterator[Tensor]:
    """Of lists of lists; ten times as fast as torch's pytree."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        else:
            yield from _leaves(each)


def _weights_in(what: str, given: Any) -> list[ShuffledMXFP4Tensor]:
    tensors = list(_leaves([given]))
    weights = [tensor for tensor in tensors if isinstance(tensor, ShuffledMXFP4Tensor)]
    if len(weights) < len(tensors):
        raise TypeError(
            f"{what} of a ShuffledMXFP4Tensor and a plain tensor: their bytes are not alike; make the other one with "
            "torch.empty_like(weight), or pass .dequantize() of this one"
        )
    return weights


@contextmanager
def _receiving(weights: Sequence[ShuffledMXFP4Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for storage in {id(weight._storage): weight._storage for weight in weights}.values():
            stack.enter_context(storage.receiving())
        yield


def _started(
    collective: _Collective,
    group: dist.ProcessGroup,
    tensors: tuple[Any, ...],
    rest: tuple[Any, ...],
    device: torch.device,
    into: Sequence[ShuffledMXFP4Tensor],
) -> Any:
    """Start it for codes and for scales; one piece of work to wait for."""
    # torch's own coalescing, as batch_isend_irecv does it, takes both
    among_others = group in distributed_c10d._world.pg_coalesce_state
    coalesced = collective.in_one and not among_others and group._get_backend(device).supports_coalescing
    if coalesced:
        group._start_coalescing(device)
    try:
        started = [collective.start(group, *(_bytes_in(given, part) for given in tensors), *rest) for part in PARTS]
    finally:
        ended = group._end_coalescing(device) if coalesced else None
    # there is no work where everything is on the current stream
    works: list[Any] = [work for work in ([ended] if coalesced else started) if work is not None]
    if len(works) == 2 and not among_others:
        return _Both(works, into).boxed()
    return works[-1].boxed() if works else _NOTHING.boxed()


def _bytes_in(given: Any, part: Part) -> Any:
    if isinstance(given, list):
        return [_bytes_in(each, part) for each in given]
    return given.bytes_around(part)


class _Both(distributed_c10d.Work):
    """Work on codes and work on scales as one."""

    _pending: ClassVar[set[_Both]] = set()
    """Those that nobody has waited for: torch keeps only the C++ half of an object, which knows nothing."""

    def __init__(self, works: Sequence[Any], into: Sequence[ShuffledMXFP4Tensor]) -> None:
        super().__init__()
        self.works = works
        self.into = [weight._storage for weight in into]
        for work in [work for work in self._pending if work.is_completed()]:  # for which nobody has waited
            self._pending.discard(work)
        self._pending.add(self)

    def wait(self, *timeout: Any) -> bool:
        self._pending.discard(self)
        try:
            done = [work.wait(*timeout) for work in self.works]  # for all of them
        except BaseException:
            for storage in self.into:
                storage.validity.touch("receiving bytes of another rank")
            raise
        for storage in self.into:
            storage.validity.largest_scale = None  # somebody may have looked too early
        return all(done)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


_NOTHING = _Both((), ())
"""To wait for."""


# --- row-major on the way


def _logical(weight: ShuffledMXFP4Tensor) -> list[Tensor]:
    """Codes and scales of a tensor, row-major and without pads, in memory of their own."""
    return [data.contiguous() for data in weight._storage.read(weight._window)]


@between("_c10d_functional::all_gather_into_tensor")
def all_gather_into_tensor(self: ShuffledMXFP4Tensor, group_size: int, group_name: Any) -> ShuffledMXFP4Tensor:
    """Experts of all ranks behind each other: as they lie where ``agree_`` was called, else row-major on the way and
    laid out at the next use. Its bytes are waited for at once."""
    if self.dim() != 3:
        raise NotImplementedError(
            "experts are gathered along dim 0 of three; view a single one [N, K] as [1, N, K], or gather .dequantize()"
        )
    storage, functional = self._storage, torch.ops._c10d_functional
    as_they_lie = not self.is_part_of_experts and storage.agrees(dist.get_process_group_ranks(_group_of(group_name)))
    given = [self.bytes_around(part) for part in PARTS] if as_they_lie else _logical(self)
    with storage.held():
        some = functional.all_gather_into_tensor_coalesced(
            [data.contiguous() for data in given], group_size, group_name
        )
        qdata, scale = (functional.wait_tensor(data) for data in some)
    if as_they_lie:
        return self._like(
            PackedStorage(qdata, scale, storage.geometry, storage.layout, storage.requested_layout, storage.row_order)
        )
    packed = PackedStorage.pack(
        qdata,
        scale,
        gate_up=self.gate_up,
        align=storage.geometry.align,
        requested_layout=storage.requested_layout,
    )
    packed.validity.row_order = self.row_order or "contiguous"
    return self._like(packed)


@between("_dtensor::shard_dim_alltoall")
def shard_dim_alltoall(
    self: ShuffledMXFP4Tensor, gather_dim: int, shard_dim: int, group_name: Any
) -> ShuffledMXFP4Tensor:
    """What DTensor parts along another dimension: everything is gathered, as ``all_gather_into_tensor`` does it, and
    each rank copies its part."""
    group = _group_of(group_name)
    whole = torch.cat(all_gather_into_tensor(self, group.size(), group_name).chunk(group.size()), gather_dim)
    return whole.chunk(group.size(), shard_dim)[group.rank()].clone()  # type: ignore[return-value]


def _group_of(group: Any) -> dist.ProcessGroup:
    """torch names groups here, or from 2.13 on may hand them over."""
    if isinstance(group, str):
        group = distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    return group  # type: ignore[no-any-return]


@between("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
def wait_tensor(self: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    """The tensor as it is: nothing that a functional collective returned is still on its way."""
    return self._view()


@between("c10d::scatter_")
def scatter_(outputs: list[Any], inputs: list[list[Any]], group: Any, root: int, *rest: Any) -> Any:
    """Row-major on the way, codes and scales in one message, and laid out as the tensor that receives it."""
    what = "torch.distributed's scatter"
    (out,) = _weights_in(what, outputs)
    sizes = [out.numel() // part.per_byte for part in PARTS]
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=out.device)
    sent = []
    for weight in _weights_in(what, inputs):
        if weight.shape != out.shape or weight.gate_up != out.gate_up:
            raise ValueError(
                f"scatter takes weights of one shape, found {list(weight.shape)}, gate_up={weight.gate_up}, for "
                f"{list(out.shape)}, gate_up={out.gate_up}"
            )
        sent.append(torch.cat([data.flatten() for data in _logical(weight)]))
    _, boxed = torch.ops.c10d.scatter_([received], [sent] if sent else [], group, root, *rest)
    work = distributed_c10d.Work.unbox(boxed)
    if work is not None:  # else it is on the current stream
        work.wait()
    experts, rows, columns = out._window.shape
    parts = (
        data.view(experts, rows, columns // part.per_byte)
        for part, data in zip(PARTS, received.split(sizes), strict=True)
    )
    with out.writing():
        out._storage.write(out._window, *parts)
    return outputs, boxed
