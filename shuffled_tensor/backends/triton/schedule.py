# SPDX-License-Identifier: MIT
"""Which rows of activations meet which expert: made on the device, so that no call waits for the host, and a CUDA graph
holds it for whatever routing is replayed.

A slot is one of the ``topk`` places of a token. Slots are sorted by expert, those of one expert by their number,
without atomic operations: every run gives the same order. An expert's slots are cut into blocks of ``BM1`` rows; a last
one that has at most ``BM2`` is a small block, which multiplies fewer rows that are not there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["BAD", "ELSEWHERE", "SMALL", "after_the_kernel_before", "count", "place", "schedule", "starts"]

ELSEWHERE = tl.constexpr(-1)
"""Of a slot: its expert is another rank's, or its token is padding."""
BAD = tl.constexpr(-2)
"""Of a slot: its expert does not exist. What it adds is NaN, since a kernel raises nothing."""

SMALL = tl.constexpr(0x10000)
"""Of a block: it has at most ``BM2`` rows. Below this is its expert."""


@triton.jit
def after_the_kernel_before(OVERLAP: tl.constexpr):
    """Wait for the kernel before on this stream, with a programmatic dependent launch; and have the next one start, to
    wait in its turn."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _experts(
    Ids,
    Mask,
    Tokens,
    slots,
    T,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    GLOBAL: tl.constexpr,
    GP: tl.constexpr,
):
    """The expert at hand of each slot, or ELSEWHERE, or BAD; ELSEWHERE for slots from T on."""
    inside = slots < T
    if Tokens is not None:
        tokens = tl.load(Tokens)
        inside &= slots // TOPK < tokens  # a product of wrong data could overflow
    ids = tl.load(Ids + slots, mask=inside, other=-1)
    known = (ids >= 0) & (ids < GLOBAL)
    ids = tl.where(known, ids, 0).to(tl.int32)
    if Mask is not None:
        each = tl.arange(0, GP)
        here = (tl.load(Mask + each, mask=each < GLOBAL, other=0) != 0).to(tl.int32)
        local = tl.where(here != 0, tl.cumsum(here, 0) - 1, ELSEWHERE)
        known &= tl.sum(here, 0) == E
        ids = tl.gather(local, ids, 0)
    experts = tl.where(known, ids, BAD)
    if Tokens is not None:  # how many there are is data too
        experts = tl.where((tokens < 0) | (tokens > T // TOPK), BAD, tl.where(inside, experts, ELSEWHERE))
    return tl.where(slots < T, experts, ELSEWHERE)


@triton.jit
def _ranks(experts, BT: tl.constexpr):
    """How many earlier slots of these have the same expert."""
    place = tl.arange(0, BT)
    same = (experts[:, None] == experts[None, :]) & (place[:, None] > place[None, :])
    return tl.sum(same.to(tl.int32), 1)


@triton.jit
def _write_blocks(
    counts, first, Blocks, EP: tl.constexpr, BLOCKS, BM1: tl.constexpr, BM2: tl.constexpr, STEP: tl.constexpr
):
    """Of each block: its expert, the place of its first row among the expert's, where these begin, their number."""
    experts = tl.arange(0, EP)
    blocks = (counts + BM1 - 1) // BM1
    rest = counts - (blocks - 1) * BM1
    if BM2 > 0:
        kind = tl.where(rest <= BM2, experts | SMALL, experts)
    else:
        kind = experts
    at = tl.cumsum(blocks, 0) - blocks
    for j in range(tl.max(blocks, 0)):
        own = j < blocks
        target = Blocks + 4 * (at + j)
        tl.store(target, tl.where(j == blocks - 1, kind, experts), mask=own)
        tl.store(target + 1, tl.full((EP,), 0, tl.int32) + j * BM1, mask=own)
        tl.store(target + 2, first, mask=own)
        tl.store(target + 3, counts, mask=own)
    for start in range(tl.sum(blocks, 0), BLOCKS, STEP):
        unused = start + tl.arange(0, STEP)
        tl.store(Blocks + 4 * unused, tl.full((STEP,), -1, tl.int32), mask=unused < BLOCKS)


@triton.jit
def schedule(
    Ids,
    Mask,
    Tokens,
    Kind,
    Slot,
    Blocks,
    T,
    BLOCKS,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOPK: tl.constexpr,
    GLOBAL: tl.constexpr,
    GP: tl.constexpr,
    BM1: tl.constexpr,
    BM2: tl.constexpr,
    BT: tl.constexpr,
):
    """All of it by one program, for few slots."""
    counts = tl.zeros((EP,), tl.int32)
    for start in range(0, T, BT):
        slots = start + tl.arange(0, BT)
        experts = _experts(Ids, Mask, Tokens, slots, T, E, TOPK, GLOBAL, GP)
        tl.store(Kind + slots, experts, mask=slots < T)
        counts += tl.histogram(tl.maximum(experts, 0), EP, mask=experts >= 0)
    first = tl.cumsum(counts, 0) - counts
    _write_blocks(counts, first, Blocks, EP, BLOCKS, BM1, BM2, BT)
    for start in range(0, T, BT):
        slots = start + tl.arange(0, BT)
        experts = _experts(Ids, Mask, Tokens, slots, T, E, TOPK, GLOBAL, GP)
        own = tl.maximum(experts, 0)
        tl.store(Slot + tl.gather(first, own, 0) + _ranks(experts, BT), slots, mask=experts >= 0)
        first += tl.histogram(own, EP, mask=experts >= 0)


@triton.jit
def count(
    Ids,
    Mask,
    Tokens,
    Kind,
    Counts,
    chunk,
    T,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOPK: tl.constexpr,
    GLOBAL: tl.constexpr,
    GP: tl.constexpr,
    BT: tl.constexpr,
):
    """For many slots, in three steps. The first: how many of a chunk of slots each expert has."""
    slots = chunk * BT + tl.arange(0, BT)
    experts = _experts(Ids, Mask, Tokens, slots, T, E, TOPK, GLOBAL, GP)
    tl.store(Kind + slots, experts, mask=slots < T)
    tl.store(Counts + chunk * EP + tl.arange(0, EP), tl.histogram(tl.maximum(experts, 0), EP, mask=experts >= 0))


@triton.jit(do_not_specialize=["CHUNKS", "BLOCKS"])
def starts(
    Counts,
    Blocks,
    CHUNKS,
    BLOCKS,
    EP: tl.constexpr,
    BM1: tl.constexpr,
    BM2: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The second, by one program: where each chunk's slots of each expert begin, in place of how many they are."""
    after_the_kernel_before(OVERLAP)
    experts = tl.arange(0, EP)
    counts = tl.zeros((EP,), tl.int32)
    for start in range(0, CHUNKS, STEP):
        chunks = start + tl.arange(0, STEP)
        place = Counts + chunks[:, None] * EP + experts[None, :]
        counts += tl.sum(tl.load(place, mask=(chunks < CHUNKS)[:, None], other=0), 0)
    first = tl.cumsum(counts, 0) - counts
    _write_blocks(counts, first, Blocks, EP, BLOCKS, BM1, BM2, 256)
    for start in range(0, CHUNKS, STEP):
        chunks = start + tl.arange(0, STEP)
        place = Counts + chunks[:, None] * EP + experts[None, :]
        here = tl.load(place, mask=(chunks < CHUNKS)[:, None], other=0)
        tl.debug_barrier()  # nobody overwrites what another warp has still to read
        tl.store(place, first[None, :] + tl.cumsum(here, 0) - here, mask=(chunks < CHUNKS)[:, None])
        first += tl.sum(here, 0)


@triton.jit(do_not_specialize=["T"])
def place(Kind, Counts, Slot, T, EP: tl.constexpr, BT: tl.constexpr, OVERLAP: tl.constexpr):
    """The third: every slot goes to its place."""
    after_the_kernel_before(OVERLAP)
    chunk = tl.program_id(0)
    slots = chunk * BT + tl.arange(0, BT)
    experts = tl.load(Kind + slots, mask=slots < T, other=ELSEWHERE)
    begin = tl.load(Counts + chunk * EP + tl.maximum(experts, 0), mask=experts >= 0, other=0)
    tl.store(Slot + begin + _ranks(experts, BT), slots, mask=experts >= 0)
