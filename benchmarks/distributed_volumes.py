# SPDX-License-Identifier: MIT
"""What travels between the GPUs of a large model, computed: no GPU is used, and nothing is measured.

    python benchmarks/distributed_volumes.py

A layer's experts are placed as engines do it: the experts with most load get the spare slots, and each replica goes to
the rank with least load so far. Loads are drawn from a Zipf distribution, and drift between two placements.
"""

from __future__ import annotations

import argparse

import torch

from shuffled_tensor.distributed import plan_moves
from shuffled_tensor.mxfp4 import PARTS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--layers", type=int, default=60)
parser.add_argument("--experts", type=int, default=384)
parser.add_argument("--hidden", type=int, default=7168)
parser.add_argument("--intermediate", type=int, default=2048)
parser.add_argument("--ranks", type=int, default=64)
parser.add_argument("--slots", type=int, default=7, help="of a rank")
parser.add_argument("--gpu", type=float, default=50.0, help="GB/s that a GPU receives from other nodes")
ARGS = parser.parse_args()

VALUES = 3 * ARGS.hidden * ARGS.intermediate
PACKED = sum(VALUES // part.per_byte for part in PARTS)
BF16 = 2 * VALUES
ALL = ARGS.layers * ARGS.experts


def placed(load: list[float]) -> list[int]:
    """Which expert each slot holds, rank 0's first."""
    replicas = [1] * ARGS.experts
    for _ in range(ARGS.ranks * ARGS.slots - ARGS.experts):
        replicas[max(range(ARGS.experts), key=lambda expert: load[expert] / replicas[expert])] += 1
    each = [(load[expert] / count, expert) for expert, count in enumerate(replicas) for _ in range(count)]
    held: list[list[int]] = [[] for _ in range(ARGS.ranks)]
    total = [0.0] * ARGS.ranks
    for share, expert in sorted(each, reverse=True):
        rank = min((rank for rank in range(ARGS.ranks) if len(held[rank]) < ARGS.slots), key=total.__getitem__)
        held[rank].append(expert)
        total[rank] += share
    return [expert for experts in held for expert in experts]


def kept(old: list[int], new: list[int]) -> list[int]:
    """The same sets of experts, each on the rank that holds most of it."""
    before = [set(old[first : first + ARGS.slots]) for first in range(0, len(old), ARGS.slots)]
    after = [new[first : first + ARGS.slots] for first in range(0, len(new), ARGS.slots)]
    pairs = sorted(
        (
            (len(held & set(wanted)), rank, which)
            for rank, held in enumerate(before)
            for which, wanted in enumerate(after)
        ),
        key=lambda pair: (-pair[0], *pair[1:]),
    )
    chosen: dict[int, int] = {}
    for _, rank, which in pairs:
        if rank not in chosen and which not in chosen.values():
            chosen[rank] = which
    return [expert for rank in range(ARGS.ranks) for expert in after[chosen[rank]]]


def received(old: list[int], new: list[int]) -> list[int]:
    """How many experts each rank receives."""
    moves = plan_moves(old, new, ARGS.ranks, ranks_per_node=8)
    crossings = {(move.src, move.src_slot, move.dst) for move in moves if move.src != move.dst}
    counts = [0] * ARGS.ranks
    for _, _, dst in crossings:
        counts[dst] += 1
    return counts


def line(what: str, experts: float, busiest: float) -> None:
    """Experts that travel in all, and to the busiest rank."""
    sizes = [f"{experts * size / 1e9:.0f} GB" for size in (PACKED, BF16)]
    rank = [f"{busiest * size / 1e9:.1f} GB, {busiest * size / 1e9 / ARGS.gpu:.2f} s" for size in (PACKED, BF16)]
    print(f"| {what} | {sizes[0]} | {rank[0]} | {sizes[1]} | {rank[1]} |")


def main() -> None:
    print(f"an expert: {PACKED / 2**20:.2f} MiB packed, {BF16 / 2**20:.2f} MiB in bfloat16")
    print(f"all {ALL}: {ALL * PACKED / 1e9:.0f} GB and {ALL * BF16 / 1e9:.0f} GB\n")
    print("| | packed, in all | busiest rank | bfloat16, in all | busiest rank |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    load = 1.0 / torch.arange(1, ARGS.experts + 1)[torch.randperm(ARGS.experts, generator=generator)].double()
    other = load * torch.exp(0.3 * torch.randn(ARGS.experts, generator=generator).double())
    old, new = placed(load.tolist()), placed(other.tolist())
    for what, after in (
        ("rebalance, a new placement as it comes", new),
        ("rebalance, each set on the rank that holds most of it", kept(old, new)),
    ):
        counts = received(old, after)
        line(what, ARGS.layers * sum(counts), ARGS.layers * max(counts))
    line("new weights, everything to every rank", ALL * ARGS.ranks, ALL)
    for name, ranks in (("64", 64), ("8", 8)):
        line(f"new weights, what a rank of {name} holds", ALL * ARGS.ranks / ranks, ALL / ranks)


if __name__ == "__main__":
    main()
