# SPDX-License-Identifier: MIT
"""Weights whose bytes tell which expert they are, and the rows of benchmarks/distributed.py, which runs this on every
rank."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.layouts import ROW_MAJOR
from shuffled_tensor.tensor.storage import PackedStorage

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--small", action="store_true", help="a few MiB")
parser.add_argument("--repeat", type=int, default=7)
OPTIONS = parser.parse_known_args()[0]

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
KINDS = ("mxfp4_moe", "none", "mxfp4_separated")
OWN_KIND = KINDS[RANK % 3]
GPU = torch.cuda.device_count() > 1
DEVICE = torch.device("cuda", RANK) if GPU else torch.device("cpu")
EXPERTS, HIDDEN, INTERMEDIATE = (8, 384, 128) if OPTIONS.small or not GPU else (32, 7168, 2048)
MINE = list(range(RANK * EXPERTS // WORLD, (RANK + 1) * EXPERTS // WORLD))
ALL = list(range(EXPERTS))
AFTER, BEFORE = (RANK + 1) % WORLD, (RANK - 1) % WORLD


def expert(name: str, number: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Row-major codes and scales of one."""
    rows, columns = (2 * INTERMEDIATE, HIDDEN) if name == "w13" else (HIDDEN, INTERMEDIATE)
    count = rows * columns // 2
    index = torch.arange(count, device=DEVICE) + (number * 7919 + salt * 104729 + len(name)) * count
    mixed = index * 2654435761 % 2**32
    codes = (mixed >> 24).to(torch.uint8).view(rows, -1)
    scales = 120 + ((mixed[: rows * columns // 32] >> 13) % 8).to(torch.uint8).view(rows, -1)
    return codes, scales


def make(name: str, experts: list[int], kind: str = "mxfp4_moe", salt: int = 0) -> ShuffledMXFP4Tensor:
    codes, scales = map(torch.stack, zip(*(expert(name, number, salt) for number in experts), strict=True))
    order: Any = "contiguous" if name == "w13" else None
    return ShuffledMXFP4Tensor(codes, scales, gate_up=name == "w13", row_order=order).shuffle_(kind)


def empty(name: str, experts: int, kind: str = "mxfp4_moe") -> ShuffledMXFP4Tensor:
    like = make(name, [0], "none")
    storage = PackedStorage.empty(experts, like._storage.geometry, DEVICE, ROW_MAJOR)
    return like._like(storage).zero_().shuffle_(kind)  # type: ignore[return-value]


def holds(weight: Tensor, name: str, experts: list[int], salt: int = 0) -> bool:
    """Whether these are the experts, to the byte of their codes and scales."""
    if not isinstance(weight, ShuffledMXFP4Tensor) or len(weight) != len(experts):
        return False
    window = weight._window
    for slot, number in enumerate(experts):
        found = weight._storage.read(window._replace(experts=window.experts[slot : slot + 1]))
        if not all(torch.equal(got[0], want) for got, want in zip(found, expert(name, number, salt), strict=True)):
            return False
    return True


def same(weight: ShuffledMXFP4Tensor, expected: ShuffledMXFP4Tensor) -> bool:
    pairs = zip(*(tensor._storage.read(tensor._window) for tensor in (weight, expected)), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def nbytes(*weights: ShuffledMXFP4Tensor) -> int:
    return sum(weight.nbytes for weight in weights)


def flat(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=DEVICE)


WRONG: list[str] = []


def row(
    name: str, right: bool, moved: int | None = None, ours: float | None = None, plain: float | None = None
) -> None:
    flag = torch.tensor([int(right)], device=DEVICE)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    if not flag.item():
        WRONG.append(name)
    if RANK == 0:
        say(name, bool(flag.item()), moved, ours, plain)


def say(
    name: str, right: bool, moved: int | None = None, ours: float | None = None, plain: float | None = None
) -> None:
    columns = [f"{name:64s}", f"{'yes' if right else 'WRONG':6s}"]
    if moved is not None and ours is not None:
        columns += [f"{moved / 2**20:9.2f}", f"{ours * 1e3:9.3f}", f"{moved / ours / 1e9:8.2f}"]
        if plain is not None:
            columns += [f"{moved / plain / 1e9:8.2f}", f"{plain / ours:7.2f}x"]
    print(" ".join(columns), flush=True)


IN_A_ROW = 4
"""Calls between two waits for the GPU: weights travel one after the other, and the host works while the wire does."""


def seconds(run: Callable[[], Any]) -> float:
    """Of one call: the slowest rank's median, after a warm-up."""
    times = []
    for _ in range(OPTIONS.repeat + 1):
        dist.barrier()
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            run()
        if GPU:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / IN_A_ROW)
    median = torch.tensor([sorted(times[1:])[len(times[1:]) // 2]], device=DEVICE)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median.item())


def busiest(received: int) -> int:
    most = torch.tensor([received], device=DEVICE)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())
