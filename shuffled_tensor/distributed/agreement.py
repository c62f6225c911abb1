# SPDX-License-Identifier: MIT
"""Ranks agree on how their weights lie, so that bytes may travel between them as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from shuffled_tensor.layouts import Layout, find_layout, name_or_none
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["agree_", "check_agreed", "gathered"]


def agree_(weights: nn.Module | Tensor | Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Lay weights out alike on every rank of a group, and keep them so: their bytes may then travel as they lie.

    Collective: every rank names its own weights, as many and in the same order. The numbers of experts may differ. The
    layout is the one that a rank has fixed or locked, else the one that a rank's backend reads, else the one that most
    ranks have. It is locked from then on, on every rank, for as long as the weight lives. To agree again, also with
    other ranks, costs one exchange of names.

    Args:
        weights: a module, of which every parameter and buffer that is a weight is meant, by its name; or a weight, or
            several. A DTensor stands for this rank's part. Other tensors are left out.
        group: which ranks; None is the default group.

    Raises:
        ValueError: names, sizes or ``align`` differ, layouts are fixed to different ones, a weight is unusable, or is a
            view of rows or columns. It is the same on every rank, and nothing has changed.
        RuntimeError: a rank could not bring a weight into the layout. Every rank raises, and none has agreed.
    """
    named = list(_named(weights))
    ranks: list[list[_Known]] = gathered([_Known.of(name, weight) for name, weight in named], group)
    layouts = _common(ranks)
    if any(known.layout != layout.name for rank in ranks for known, layout in zip(rank, layouts, strict=True)):
        _convert([weight._storage for _, weight in named], layouts, group)
    members = frozenset(dist.get_process_group_ranks(group))
    for _, weight in named:
        weight._storage.agree(members)


def check_agreed(weight: ShuffledMXFP4Tensor, group: dist.ProcessGroup | None, what: str) -> None:
    """Raise NotImplementedError, which names :func:`agree_`, where a weight's bytes mean nothing to the other ranks of
    a group: ``what`` is what would send them."""
    weight._storage.check_readable()
    if weight.is_part_of_experts:
        raise NotImplementedError(
            f"{what} sends packed bytes as they lie, and those of a view of rows or columns lie nowhere: send whole "
            "experts, or clone() it first"
        )
    if not weight._storage.agrees(dist.get_process_group_ranks(group)):
        raise NotImplementedError(
            f"{what} sends packed bytes as they lie, and other ranks may hold theirs in another layout or padding: "
            "call shuffled_tensor.agree_(weights, group) on every rank first; or send .dequantize(), which is plain"
        )


def gathered(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank of a group gives, by rank."""
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, own, group=group)
    return ranks


class _Known(NamedTuple):
    """What ranks tell each other of a weight."""

    name: str
    sizes: tuple[int, int, bool, int, int]
    layout: str
    fixed: str | None
    preferred: str | None
    trouble: str | None

    @classmethod
    def of(cls, name: str, weight: ShuffledMXFP4Tensor) -> _Known:
        storage = weight._storage
        preferred = policy.current.layout_at_first_use(storage.device, None)
        return cls(
            name,
            storage.geometry.sizes,
            storage.layout.name,
            name_or_none(storage.fixed_layout),
            name_or_none(preferred),
            "it is a view of rows or columns" if weight.is_part_of_experts else storage.validity.invalid_reason,
        )


def _named(weights: nn.Module | Tensor | Iterable[Tensor]) -> Iterator[tuple[str, ShuffledMXFP4Tensor]]:
    """The weights, each storage once."""
    found: Iterable[tuple[str, Tensor]]
    if isinstance(weights, nn.Module):
        found = *weights.named_parameters(), *weights.named_buffers()
    else:
        several = [weights] if isinstance(weights, Tensor) else weights
        found = ((f"weight {place}", weight) for place, weight in enumerate(several))
    seen: set[int] = set()
    for name, tensor in found:
        weight = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if isinstance(weight, ShuffledMXFP4Tensor) and id(weight._storage) not in seen:
            seen.add(id(weight._storage))
            yield name, weight


def _common(ranks: list[list[_Known]]) -> list[Layout]:
    """The layout of each weight. Raises ValueError, on every rank alike."""
    if len({len(rank) for rank in ranks}) > 1:
        raise ValueError(f"every rank must name as many weights, found {_by_rank([len(rank) for rank in ranks])}")
    weights = [*zip(*ranks, strict=True)]
    alike: dict[Any, Counter[str]] = {}
    for same in weights:
        alike.setdefault(same[0].sizes, Counter()).update(known.layout for known in same)
    return [_layout_of(same, alike[same[0].sizes]) for same in weights]


def _layout_of(same: Sequence[_Known], counts: Counter[str]) -> Layout:
    """Of one weight, as each rank knows it, and how often each layout is among all of its sizes: engines receive every
    layer into one buffer, made of the first."""
    name = same[0].name
    if len({known.name for known in same}) > 1:
        raise ValueError(f"ranks must name the same weights in one order, found {_by_rank([k.name for k in same])}")
    if any(known.trouble for known in same):
        raise ValueError(f"{name} cannot be used on every rank, {_by_rank([known.trouble for known in same])}")
    if len({known.sizes for known in same}) > 1:
        sizes = [
            f"{rows} rows (padded {padded_rows}), {columns} columns (padded {padded_columns}), gate_up={gate_up}"
            for rows, columns, gate_up, padded_rows, padded_columns in (known.sizes for known in same)
        ]
        raise ValueError(
            f"{name} must have the same rows, columns, gate_up and align on every rank, {_by_rank(sizes)}; make it "
            "alike everywhere"
        )
    fixed = [find_layout(known.fixed) for known in same if known.fixed is not None]
    if not all(layout.same_bytes(fixed[0], same[0].sizes[2]) for layout in fixed):
        raise ValueError(
            f"{name} is fixed to different layouts, {_by_rank([known.fixed for known in same])}; make it with one "
            "shuffle_kind everywhere, or release() the operands that hold it"
        )
    preferred = {known.preferred for known in same} - {None}
    if fixed:
        return fixed[0]
    if len(preferred) == 1:
        return find_layout(preferred.pop())  # type: ignore[arg-type]
    # of several as common, a shuffled one, and the same on every rank
    return find_layout(min(counts, key=lambda layout: (-counts[layout], layout == "none", layout)))


def _convert(storages: list[PackedStorage], layouts: list[Layout], group: dist.ProcessGroup | None) -> None:
    """Bring weights into their layouts, on every rank or with an error on every rank."""
    error: Exception | None = None
    try:
        for storage, layout in zip(storages, layouts, strict=True):
            storage.convert_layout_(layout)
    except Exception as caught:
        error = caught
    failures = gathered(error and f"{type(error).__name__}: {error}", group)
    if any(failures):
        raise RuntimeError(f"not every rank could lay its weights out, {_by_rank(failures)}") from error


def _by_rank(found: Sequence[Any]) -> str:
    return "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
