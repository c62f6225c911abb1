# SPDX-License-Identifier: MIT
"""What benchmarks/distributed.py runs on every rank."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_rows import (
    AFTER,
    ALL,
    BEFORE,
    DEVICE,
    EXPERTS,
    GPU,
    HIDDEN,
    INTERMEDIATE,
    KINDS,
    MINE,
    OWN_KIND,
    RANK,
    WORLD,
    busiest,
    empty,
    flat,
    holds,
    make,
    nbytes,
    row,
    same,
    say,
    seconds,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shuffled_tensor import (
    ShuffledMXFP4Tensor,
    agree_,
    broadcast_,
    fused_moe,
    move_experts_,
    mxfp4,
    scatter_,
    sharded,
)

LAYERS = 4
"""That a trainer sends in one call."""


def agreement() -> None:
    weight = make("w2", MINE[:1], OWN_KIND)
    accepted = 0
    for call in (lambda: dist.broadcast(weight, 0), lambda: dist.all_reduce(weight)):
        with suppress(NotImplementedError):
            call()
            accepted += 1
    row("refused before agree_: broadcast, all_reduce", not accepted)
    weight = make("w13", MINE, OWN_KIND)
    pointer = weight.qdata.data_ptr()
    start = time.perf_counter()
    agree_([weight])
    took, kinds = (time.perf_counter() - start) * 1e3, [None] * WORLD
    dist.all_gather_object(kinds, weight.shuffle_kind)
    right = len(set(kinds)) == 1 and holds(weight, "w13", MINE) and weight.qdata.data_ptr() == pointer
    again = seconds(lambda: agree_([weight])) * 1e3
    row(f"agree_ from layouts that differ ({took:.1f} ms; again {again:.2f} ms)", right)
    try:
        agree_([make("w2" if RANK else "w13", MINE[:1])])
        row("agree_ refuses other sizes on every rank", False)
    except ValueError:
        row("agree_ refuses other sizes on every rank", True)


def exchange(sent: Tensor, received: Tensor) -> None:
    operations = [dist.P2POp(dist.isend, sent, AFTER), dist.P2POp(dist.irecv, received, BEFORE)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def collectives() -> None:
    own, into, whole = make("w13", MINE, salt=1), empty("w13", len(MINE)), empty("w13", EXPERTS)
    agree_([own, into, whole])
    plain, plain_into, plain_whole = flat(nbytes(own)), flat(nbytes(own)), flat(nbytes(own) * WORLD)
    dist.all_gather_into_tensor(whole, own)
    row(
        "all_gather_into_tensor",
        holds(whole, "w13", ALL, 1),
        nbytes(own) * (WORLD - 1),
        seconds(lambda: dist.all_gather_into_tensor(whole, own)),
        seconds(lambda: dist.all_gather_into_tensor(plain_whole, plain)),
    )
    exchange(own, into)
    theirs = [(number - EXPERTS // WORLD) % EXPERTS for number in MINE]
    row(
        "batch_isend_irecv, all experts to the next rank",
        holds(into, "w13", theirs, 1),
        nbytes(own),
        seconds(lambda: exchange(own, into)),
        seconds(lambda: exchange(plain, plain_into)),
    )
    exchange(own[0], into[1])
    right = holds(into[1:2], "w13", theirs[:1], 1) and holds(into[:1], "w13", theirs[:1], 1)
    row("batch_isend_irecv, one expert into another slot", right)
    cut = len(MINE) // WORLD
    if cut * WORLD == len(MINE):
        dist.all_to_all_single(into, own)
        row(
            "all_to_all_single",
            holds(
                into, "w13", [rank * len(MINE) + RANK * cut + index for rank in range(WORLD) for index in range(cut)], 1
            ),
            nbytes(own) * (WORLD - 1) // WORLD,
            seconds(lambda: dist.all_to_all_single(into, own)),
            seconds(lambda: dist.all_to_all_single(plain_into, plain)),
        )
    work = dist.broadcast(own, WORLD - 1, async_op=True)
    work.wait()
    row(
        "broadcast, async_op",
        holds(own, "w13", list(range((WORLD - 1) * EXPERTS // WORLD, EXPERTS)), 1),
        nbytes(own),
        seconds(lambda: dist.broadcast(own, 0)),
        seconds(lambda: dist.broadcast(plain, 0)),
    )
    if GPU:  # on a stream of its own, then used on this one
        own.copy_(make("w13", MINE, salt=2))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            dist.broadcast(own, 0)
        torch.cuda.current_stream().wait_stream(side)
        row("broadcast on a side stream", holds(own, "w13", list(range(len(MINE))), 2))


def dtensors() -> None:
    mesh = init_device_mesh(DEVICE.type, (WORLD,))
    whole = make("w13", ALL, OWN_KIND)
    parted = distribute_tensor(whole, mesh, [Shard(0)])
    row("distribute_tensor Shard(0) from layouts that differ", holds(parted.to_local(), "w13", MINE))
    plain, plain_whole, moved = flat(nbytes(whole) // WORLD), flat(nbytes(whole)), nbytes(whole) // WORLD * (WORLD - 1)
    alone = seconds(lambda: dist.all_gather_into_tensor(plain_whole, plain))
    right = holds(parted.full_tensor(), "w13", ALL)
    row("DTensor.full_tensor, row-major on the way", right, moved, seconds(parted.full_tensor), alone)
    agree_([parted])
    right = holds(parted.full_tensor(), "w13", ALL)
    row("DTensor.full_tensor, agreed: as they lie", right, moved, seconds(parted.full_tensor), alone)
    again = parted.redistribute(mesh, [Replicate()]).redistribute(mesh, [Shard(0)])
    row("redistribute Shard(0), Replicate, Shard(0)", holds(again.to_local(), "w13", MINE))
    columns = distribute_tensor(make("w2", ALL[:2]), mesh, [Shard(2)])
    row("distribute_tensor Shard(2) of w2, and full_tensor", holds(columns.full_tensor(), "w2", ALL[:2]))


def checkpoints() -> None:
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(folder, 0, device=DEVICE)
    few = list(range(2 * WORLD))
    saved = make("w13", few, OWN_KIND).shard(RANK, WORLD, dim="expert")
    dcp.save(sharded({"w": saved}), checkpoint_id=f"{folder[0]}/experts")
    loaded = empty("w13", len(few), KINDS[(RANK + 1) % 3]).shard(RANK, WORLD)
    dcp.load(sharded({"w": loaded}), checkpoint_id=f"{folder[0]}/experts")
    row("DCP: saved by experts, loaded by rows of each half", same(loaded, make("w13", few).shard(RANK, WORLD)))
    dcp.save(sharded({"w": loaded}), checkpoint_id=f"{folder[0]}/rows")
    whole = empty("w13", len(few), OWN_KIND)
    dcp.load({"w": whole}, checkpoint_id=f"{folder[0]}/rows")
    row("DCP: saved by rows of each half, loaded whole", holds(whole, "w13", few))


class Layer(nn.Module):
    def __init__(self, experts: list[int], kind: str) -> None:
        super().__init__()
        self.w13 = nn.Parameter(make("w13", experts, kind), requires_grad=False)
        self.w2 = nn.Parameter(make("w2", experts, kind), requires_grad=False)

    def forward(self, *routed: Tensor) -> Tensor:
        return fused_moe(routed[0], self.w13, self.w2, *routed[1:], backend="reference")


class PlainLayer(nn.Module):
    """The same bytes as bfloat16, because FSDP2 shards nothing else that is plain."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        for name in ("w13", "w2"):
            weight = make(name, [0])
            for part in ("qdata", "scale"):
                data = getattr(weight, part).repeat(experts, 1, 1).view(torch.bfloat16)
                self.register_parameter(f"{name}_{part}", nn.Parameter(data, requires_grad=False))


def routed(experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(6)]).int()
    return states.to(DEVICE), torch.rand(6, 2, generator=generator).to(DEVICE), ids.to(DEVICE)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected.double()).norm() / expected.double().norm()) < 1e-4


@torch.no_grad()
def fsdp() -> None:
    experts, tokens = ALL[: 4 * WORLD], routed(min(EXPERTS, 4 * WORLD))
    expected = Layer(experts, "mxfp4_moe")(*tokens)
    layer, plain = Layer(experts, "mxfp4_moe" if RANK else "none"), PlainLayer(len(experts)).to(DEVICE)
    moved = nbytes(layer.w13.data, layer.w2.data) // WORLD * (WORLD - 1)  # type: ignore[arg-type]
    for module in (layer, plain):
        fully_shard(module, mesh=init_device_mesh(DEVICE.type, (WORLD,)), reshard_after_forward=True)
    right = all(close(layer(*tokens), expected) for _ in range(3))

    def gather(module: Any) -> None:
        module.unshard()
        module.reshard()

    row(
        "FSDP2: three forwards of packed shards; a gather",
        right,
        moved,
        seconds(lambda: gather(layer)),
        seconds(lambda: gather(plain)),
    )


@torch.no_grad()
def layers() -> None:
    experts, tokens = ALL[: 4 * WORLD], routed(min(EXPERTS, 4 * WORLD))
    whole = Layer(experts, "none")
    expected = whole(*tokens)
    for how, dim in (("expert", "expert"), ("tensor", "intermediate")):
        parts = [weight.data.clone().shuffle_(OWN_KIND).shard(RANK, WORLD, dim=dim) for weight in (whole.w13, whole.w2)]
        mask = torch.zeros(len(experts), dtype=torch.int32, device=DEVICE)
        mask[list(parts[0].place.experts)] = 1
        out = fused_moe(tokens[0], *parts, *tokens[1:], expert_mask=mask, backend="reference")
        dist.all_reduce(out)
        row(f"a layer, {how} parallel, against one GPU", close(out, expected))


def a_map(seed: int, slots: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(EXPERTS, (WORLD * slots - EXPERTS,), generator=generator).tolist()
    order = torch.randperm(EXPERTS, generator=generator).tolist() + more
    return [order[index] for index in torch.randperm(len(order), generator=generator).tolist()]


def kept(now: list[int], new: list[int], slots: int) -> list[int]:
    """The same experts on each rank, those that it has already where they are."""
    out: list[int] = []
    for first in range(0, len(now), slots):
        left, placed = new[first : first + slots], {}
        for slot, number in enumerate(now[first : first + slots]):
            if number in left:
                left.remove(number)
                placed[slot] = number
        out += [placed[slot] if slot in placed else left.pop() for slot in range(slots)]
    return out


def moves() -> None:
    slots = EXPERTS // WORLD + 2
    own = slice(RANK * slots, (RANK + 1) * slots)
    for label, kinds, keep in (
        ("layouts alike", ("mxfp4_moe",), False),
        ("layouts differed", KINDS, False),
        ("what a rank keeps stays in its slot", ("mxfp4_moe",), True),
    ):
        now, received, right = a_map(1, slots), 0, True
        held = [make(name, now[own], kinds[RANK % len(kinds)]) for name in ("w13", "w2")]
        bias = torch.tensor([[float(number)] for number in now[own]], device=DEVICE)
        pointers = [weight.qdata.data_ptr() for weight in held]

        def after(now: list[int], seed: int, keep: bool = keep) -> list[int]:
            return kept(now, a_map(seed, slots), slots) if keep else a_map(seed, slots)

        for seed in (2, 3):
            new = after(now, seed)
            received = move_experts_([*held, bias], now, new)
            now = new
            right &= all(holds(weight, name, now[own]) for weight, name in zip(held, ("w13", "w2"), strict=True))
            right &= bias[:, 0].tolist() == [float(number) for number in now[own]]
        right &= pointers == [weight.qdata.data_ptr() for weight in held]
        state, most = [now, after(now, 4)], 0

        def move(state: list[Any] = state, held: list[Any] = held) -> None:
            """There and back, so that every time is of as many bytes."""
            nonlocal received
            received = move_experts_(held, *state)
            state.reverse()

        move()
        there = busiest(received)
        move()
        most = max(there, busiest(received))
        sent, into = flat(most), flat(most)
        row(
            f"move_experts_ with replicas, {label}",
            right,
            most,
            seconds(move),
            seconds(lambda sent=sent, into=into: exchange(sent, into)),  # type: ignore[misc]
        )


def pushes_of_layers() -> None:
    """Several layers in one call, as a trainer sends a model."""
    names, values, held = ["w13", "w2"] * LAYERS, [], []
    for index, name in enumerate(names):
        shape = (EXPERTS, 2 * INTERMEDIATE, HIDDEN) if name == "w13" else (EXPERTS, HIDDEN, INTERMEDIATE)
        generator = torch.Generator(DEVICE).manual_seed(index)
        values.append(torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16))
        held.append(empty(name, EXPERTS, OWN_KIND))
    orders: Any = [("contiguous" if name == "w13" else None) for name in names]
    want = [
        ShuffledMXFP4Tensor.from_hp(each, gate_up=order is not None, row_order=order)
        for each, order in zip(values, orders, strict=True)
    ]
    packed = sum(each.numel() // part.per_byte for each in want for part in mxfp4.PARTS)
    given = {"values": values, "row_order": orders} if RANK == 0 else {}

    def bf16() -> None:
        for each in values:
            dist.broadcast(each, 0)

    def engines() -> None:
        for each, weight in zip(values, held, strict=True):
            dist.broadcast(each, 0)
            if RANK:
                weight.refit_from_hp_(each)

    alone, with_quantising = seconds(bf16), seconds(engines)
    plain = flat(packed)
    as_bytes = seconds(lambda: dist.broadcast(plain, 0))
    broadcast_(held, **given)
    for weight in held:
        weight.zero_()
    broadcast_(held, **given)
    right = all(map(same, held, want))
    took = seconds(lambda: broadcast_(held, **given))
    ratios = f"{took / alone:.2f} of bf16's time, {took / with_quantising:.2f} with quantising"
    row(f"broadcast_ of {LAYERS} layers from bf16 ({ratios})", right, packed, took, as_bytes)
    if RANK == 0:
        say("    their plain broadcast in bfloat16", True, sum(each.nbytes for each in values), alone)


def pushes() -> None:
    for name in ("w13", "w2"):
        shape = (EXPERTS, 2 * INTERMEDIATE, HIDDEN) if name == "w13" else (EXPERTS, HIDDEN, INTERMEDIATE)
        generator = torch.Generator(DEVICE).manual_seed(5)
        values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        order: Any = "contiguous" if name == "w13" else None
        want = ShuffledMXFP4Tensor.from_hp(values, gate_up=name == "w13", row_order=order)
        packed = sum(want.numel() // part.per_byte for part in mxfp4.PARTS)
        source, held = values if RANK == 0 else None, empty(name, EXPERTS, OWN_KIND)
        pointer, received = held.qdata.data_ptr(), torch.empty_like(values) if RANK else values

        def bf16(values: Tensor = received) -> None:
            dist.broadcast(values, 0)

        def bf16_and_quantise(values: Tensor = received, held: ShuffledMXFP4Tensor = held) -> None:
            """What engines do today."""
            dist.broadcast(values, 0)
            if RANK:
                held.refit_from_hp_(values)

        alone, engines = seconds(bf16), seconds(bf16_and_quantise)
        plain = flat(packed)
        as_bytes = seconds(lambda plain=plain: dist.broadcast(plain, 0))  # type: ignore[misc]
        codes, scales = (
            torch.empty(*shape[:2], shape[2] // part.per_byte, dtype=torch.uint8, device=DEVICE) for part in mxfp4.PARTS
        )
        quantised = seconds(lambda values=values, pair=(codes, scales): mxfp4.quantize_into(values, *pair))  # type: ignore[misc]
        row(f"{name} in bfloat16: quantised, nothing sent", True, values.nbytes, quantised)
        row(f"{name} in bfloat16: a plain broadcast", True, values.nbytes, alone)
        row(f"{name} in bfloat16: broadcast, and quantised where it arrives", True, values.nbytes, engines)
        for send, moved, into in (
            (broadcast_, packed, held),
            (scatter_, packed // WORLD, empty(name, EXPERTS, OWN_KIND).shard(RANK, WORLD, dim="expert")),
        ):
            scratch = 0.0
            expected = want if send is broadcast_ else want.shard(RANK, WORLD, dim="expert")
            send(into, source)  # compiles the kernels
            into.zero_()
            if GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            send(into, source)
            if GPU:
                scratch = (torch.cuda.max_memory_allocated() - before) / 2**20
            right = same(into, expected) and held.qdata.data_ptr() == pointer and into._storage.layout.name == OWN_KIND
            took = seconds(lambda send=send, into=into, source=source: send(into, source))  # type: ignore[misc]
            ratios = f"{took / alone:.2f} of bf16's time, {took / engines:.2f} with quantising"
            row(f"{send.__name__} {name} from bf16 ({ratios})", right, moved, took, as_bytes * moved / packed)
            if RANK == 0 and GPU:
                print(
                    f"    scratch {scratch:.0f} MiB; an expert has {values[0].nbytes / 2**20:.0f} MiB in bf16",
                    flush=True,
                )
        part, sent = empty(name, EXPERTS, OWN_KIND).shard(RANK, WORLD, dim="expert"), want if RANK == 0 else None
        broadcast_(part, sent)
        right = same(part, want.shard(RANK, WORLD, dim="expert"))
        took = seconds(lambda part=part, sent=sent: broadcast_(part, sent))  # type: ignore[misc]
        row(f"broadcast_ {name} packed, into experts of each rank", right, packed, took, as_bytes)


SECTIONS = {
    section.__name__: section
    for section in (agreement, moves, pushes, pushes_of_layers, collectives, dtensors, checkpoints, fsdp, layers)
}
