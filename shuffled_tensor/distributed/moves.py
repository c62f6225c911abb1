# SPDX-License-Identifier: MIT
"""Experts move between ranks, as a rebalance of their load wants it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor.distributed.agreement import agree_
from shuffled_tensor.tensor.checks import check_plain, whole_numbers
from shuffled_tensor.tensor.geometry import slice_of
from shuffled_tensor.tensor.storage import locked
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["Move", "move_experts_", "plan_moves"]


class Move(NamedTuple):
    """One expert into one slot of a rank, from a slot that held it before."""

    expert: int
    src: int
    src_slot: int
    dst: int
    dst_slot: int


def plan_moves(
    old: Sequence[int], new: Sequence[int], world_size: int, ranks_per_node: int | None = None
) -> list[Move]:
    """What must move for slot ``i`` to hold expert ``new[i]`` instead of ``old[i]``; the same on every rank.

    A slot that keeps its expert is left out. An expert that a rank has comes from there; any other crosses to a rank
    once, however many of its slots it fills: from a rank on the same node where one has it, and of several from the one
    that sends least so far.

    Args:
        old, new: which expert each slot holds, before and after: rank 0's slots first, as many on each rank.
        ranks_per_node: how many ranks, from rank 0 on, are near each other; None is all of them.

    Raises:
        ValueError: slots that do not come out even, or an expert in ``new`` that nobody holds.
    """
    old, new = whole_numbers("old", old), whole_numbers("new", new)
    if len(old) != len(new) or len(old) % world_size:
        raise ValueError(
            f"old and new must name as many slots on each of {world_size} ranks, found {len(old)} and {len(new)}"
        )
    slots, near = len(old) // world_size, ranks_per_node or world_size
    held: dict[int, list[tuple[int, int]]] = {}
    for place, expert in enumerate(old):
        held.setdefault(expert, []).append(divmod(place, slots))
    lost = sorted(set(new) - set(held))
    if lost:
        raise ValueError(f"experts {lost} are in no slot of old, so nobody can send them")
    sent: Counter[int] = Counter()
    moves = []
    for dst in range(world_size):
        first = dst * slots
        has = {expert: (dst, slot) for slot, expert in reversed([*enumerate(old[first : first + slots])])}
        for slot, expert in enumerate(new[first : first + slots]):
            if expert == old[first + slot]:
                continue
            if expert not in has:
                has[expert] = min(held[expert], key=lambda at: (at[0] // near != dst // near, sent[at[0]], at))
                sent[has[expert][0]] += 1
            moves.append(Move(expert, *has[expert], dst, slot))
    return moves


def move_experts_(
    weights: Sequence[Tensor],
    old: Sequence[int],
    new: Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    ranks_per_node: int | None = None,
) -> int:
    """Rearrange the experts of one layer between ranks and their slots, in place, as :func:`plan_moves` says.

    Bytes travel as they lie, codes and scales together, so nothing is laid out anew; where ranks have not agreed on
    the layouts yet, :func:`agree_` is called first. Each rank sends every other one message, for each weight (smaller
    tensors share one); the copies on a rank are made meanwhile. Scratch is what a rank sends, receives and moves of two
    messages. A weight that knows its place knows afterwards which experts it holds.

    Collective: every rank passes its tensors in one order, and the same ``old`` and ``new``.

    Args:
        weights: what this rank holds of the layer, ``[slots, ...]`` each: weights and plain tensors, as biases.
        old, new, ranks_per_node: see :func:`plan_moves`.
        group: the ranks, whose numbers in it count; None is the default group.

    Returns:
        How many bytes this rank has received.

    Raises:
        ValueError: as :func:`plan_moves`, :func:`agree_`, and for tensors of other numbers of slots.
        TypeError: another tensor that is neither plain nor a weight.

    An exception on the way leaves the weights of this rank unusable until they are written whole. What is wrong on one
    rank alone raises there, before anything is sent, and the others wait for it until the group's timeout.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    moves, slots = plan_moves(old, new, world_size, ranks_per_node), len(old) // world_size
    own = slice(rank * slots, (rank + 1) * slots)
    _check(weights, old[own], new[own])
    if not moves:
        return 0
    ours = [weight for weight in weights if isinstance(weight, ShuffledMXFP4Tensor)]
    members = dist.get_process_group_ranks(group)
    if not all(weight._storage.agrees(members) for weight in ours):
        agree_(ours, group)
    mine, storages = _Mine.of_plan(moves, rank), [weight._storage for weight in ours]
    with ExitStack() as stack:
        stack.enter_context(locked(*storages))
        for storage in storages:
            stack.enter_context(storage.writing())
            storage.touch()
        if any(data.is_inference() for weight in weights for data in _parts(weight)):
            stack.enter_context(torch.inference_mode())  # in which they may be written
        stack.enter_context(torch.no_grad())
        before, received = None, 0
        for tensors in _messages(weights):
            message = _Message(tensors, mine, group)
            received += message.incoming.nbytes
            if before is not None:
                before.end()
            before = message
        if before is not None:
            before.end()
    for weight in ours:
        place = weight._storage.place
        if place is not None:
            experts = dict(enumerate(place.experts)) | dict(zip(weight._window.experts, new[own], strict=True))
            weight._storage.place = place._replace(experts=tuple(experts.values()))
    return received


def _check(weights: Sequence[Tensor], old: Sequence[int], new: Sequence[int]) -> None:
    """``old`` and ``new`` are this rank's."""
    storages = [weight._storage for weight in weights if isinstance(weight, ShuffledMXFP4Tensor)]
    if len({*map(id, storages)}) < len(storages):
        raise ValueError("two of the weights are the same memory, which would move twice")
    for index, weight in enumerate(weights):
        if len(weight) != len(old):
            raise ValueError(f"weights[{index}] has {len(weight)} slots, and old names {len(old)} of each rank")
        if not isinstance(weight, ShuffledMXFP4Tensor):
            check_plain(f"weights[{index}]", weight)
            if not weight.is_contiguous():
                raise ValueError(f"weights[{index}] is not contiguous, found strides {weight.stride()}")
            continue
        weight._storage.check_readable()
        if weight.dim() != 3 or weight.is_part_of_experts:
            raise ValueError(f"weights[{index}] must be whole experts [slots, N, K], found a view {list(weight.shape)}")
        parted = weight.parted
        if parted is None:
            continue
        if list(parted.experts) != list(old):
            raise ValueError(
                f"weights[{index}] holds the experts {list(parted.experts)} of its whole, and old says {list(old)}"
            )
        if min(new) < 0 or max(new) >= parted.shape[0]:
            raise ValueError(f"weights[{index}] is of a whole of {parted.shape[0]} experts, and new says {list(new)}")


class _Mine(NamedTuple):
    """What a plan means to one rank: slots, by their numbers here, and experts that come, by the order in which they
    do."""

    sent: list[int]
    """The slots of which others get the expert; those for one rank stand together."""
    to: dict[int, range]
    """Which of these go to a rank."""
    come: int
    """How many do."""
    of: dict[int, range]
    """Which of these are from a rank."""
    filled: list[tuple[int, int]]
    """One that has come, and a slot that it fills."""
    local: list[tuple[int, int]]
    """From slot to slot."""

    @classmethod
    def of_plan(cls, moves: Sequence[Move], rank: int) -> _Mine:
        crossings = dict.fromkeys((move.src, move.src_slot, move.dst) for move in moves if move.src != move.dst)
        sent = [crossing for crossing in crossings if crossing[0] == rank]  # a plan is in the order of receivers
        come = sorted((crossing for crossing in crossings if crossing[2] == rank), key=lambda crossing: crossing[0])
        number = {crossing: index for index, crossing in enumerate(come)}
        mine = [move for move in moves if move.dst == rank]
        return cls(
            [slot for _, slot, _ in sent],
            _stretches([dst for _, _, dst in sent]),
            len(come),
            _stretches([src for src, _, _ in come]),
            [(number[move.src, move.src_slot, rank], move.dst_slot) for move in mine if move.src != rank],
            [(move.src_slot, move.dst_slot) for move in mine if move.src == rank],
        )


def _stretches(peers: list[int]) -> dict[int, range]:
    """Where each is, of peers that stand together."""
    return {peer: range(peers.index(peer), peers.index(peer) + count) for peer, count in Counter(peers).items()}


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``[slots, ...]`` of what moves."""
    if isinstance(weight, ShuffledMXFP4Tensor):
        return weight._storage.select(weight._window.experts)
    return (weight.detach(),)


def _messages(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that go together: as many as have no more bytes an expert than the largest has alone."""
    sizes = [sum(data[:1].nbytes for data in _parts(weight)) for weight in weights]
    together: list[Tensor] = []
    room = max(sizes, default=0)
    for weight, size in zip(weights, sizes, strict=True):
        if size > room:
            yield together
            together, room = [], max(sizes)
        together.append(weight)
        room -= size
    if together:
        yield together


_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class _Message:
    """The experts of some tensors, on their way: each one's codes, scales and biases behind each other."""

    def __init__(self, tensors: Sequence[Tensor], mine: _Mine, group: dist.ProcessGroup | None) -> None:
        parts = [data.view(len(data), -1).view(torch.uint8) for tensor in tensors for data in _parts(tensor)]
        # few long words, which a GPU copies faster
        word = math.gcd(8, *(number for data in parts for number in (data.shape[1], data.data_ptr())))
        rows = [data.view(_WORDS[word]) for data in parts]
        self._slots, self._widths = [data.unbind() for data in rows], [data.shape[1] for data in rows]
        outgoing, self.incoming, spare = (
            rows[0].new_empty(experts, sum(self._widths)) for experts in (len(mine.sent), mine.come, len(mine.local))
        )
        # Packed, so that each rank gets one message, and slots may be written while it is on the wire.
        self._copy(self._of_slots(mine.sent), self._of_rows(outgoing))
        operations = [
            dist.P2POp(operation, buffer.view(torch.uint8)[slice_of(experts)], group=group, group_peer=peer)
            for operation, buffer, peers in ((dist.isend, outgoing, mine.to), (dist.irecv, self.incoming, mine.of))
            for peer, experts in peers.items()
        ]
        self._kept, self._works = outgoing, dist.batch_isend_irecv(operations) if operations else []
        # All that is left is done while the wire is busy, but for the last copies, which are ready to be made.
        held, come = self._of_rows(spare), self._of_rows(self.incoming)
        self._copy(self._of_slots(src for src, _ in mine.local), held)
        self._copy(held, self._of_slots(dst for _, dst in mine.local))
        fields = range(len(self._widths))
        self._arrived = [come[row * len(fields) + field] for row, _ in mine.filled for field in fields]
        self._filled = self._of_slots(slot for _, slot in mine.filled)

    def end(self) -> None:
        """Wait for what comes, and put it into its slots."""
        for work in self._works:
            work.wait()
        self._copy(self._arrived, self._filled)

    def _of_slots(self, slots: Iterable[int]) -> list[Tensor]:
        return [field[slot] for slot in slots for field in self._slots]

    def _of_rows(self, buffer: Tensor) -> list[Tensor]:
        return [*buffer.view(-1).split(self._widths * len(buffer))] if len(buffer) else []

    def _copy(self, source: list[Tensor], target: list[Tensor]) -> None:
        if source:
            torch._foreach_copy_(target, source)  # in a few launches
