# SPDX-License-Identifier: MIT
"""A layer whose experts are spread over ranks: loaded, run, rebalanced, given new weights, saved, and loaded again on
another number of ranks. Each step is compared with the whole layer in one process.

    torchrun --nproc-per-node 2 examples/expert_parallel.py      # over NCCL where each rank has a GPU, else over gloo
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from shuffled_tensor import (
    ShuffledMXFP4Tensor,
    fused_moe,
    load_experts,
    move_experts_,
    save_file,
    scatter_,
    sharded,
)

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOPK = 8, 256, 128, 64, 2
NAME = "model.layers.0.mlp.experts"
GPU = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")


class Experts(nn.Module):
    """The experts of some slots. Which slots these are among those of all ranks, a mask says."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13_weight, self.w2_weight = nn.Parameter(w13), nn.Parameter(w2)

    def forward(self, x: Tensor, topk_weight: Tensor, slots: Tensor, mask: Tensor | None = None) -> Tensor:
        return fused_moe(x, self.w13_weight, self.w2_weight, topk_weight, slots, expert_mask=mask)


def values(seed: int) -> tuple[Tensor, Tensor]:
    """bfloat16, as a trainer has them: w13 ``[E, 2I, K]``, gate rows first, and w2 ``[E, K, I]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    w13, w2 = (torch.randn(shape, generator=generator).bfloat16().to(DEVICE) / 16 for shape in shapes)
    return w13, w2


def whole(seed: int) -> Experts:
    """All experts in one process, which every rank compares with."""
    w13, w2 = values(seed)
    return Experts(
        ShuffledMXFP4Tensor.from_hp(w13, gate_up=True, row_order="contiguous"),
        ShuffledMXFP4Tensor.from_hp(w2, gate_up=False),
    )


def balanced(ids: Tensor, world_size: int) -> list[int]:
    """Which expert each slot should hold, one slot more on each rank than before: the experts that most tokens want get
    another slot, and slots are dealt to ranks one by one, in the order of their load."""
    wanted = torch.bincount(ids.flatten().cpu(), minlength=EXPERTS).tolist()
    order = sorted(range(EXPERTS), key=lambda expert: -wanted[expert])
    dealt = order + order[:world_size]
    return [expert for rank in range(world_size) for expert in dealt[rank::world_size]]


def slots_of(ids: Tensor, slots: list[int]) -> Tensor:
    """For each token, a slot that holds the expert which it wants: of several, one after the other."""
    held: dict[int, list[int]] = {}
    for slot, expert in enumerate(slots):
        held.setdefault(expert, []).append(slot)
    chosen = [[held[expert][token % len(held[expert])] for expert in row] for token, row in enumerate(ids.tolist())]
    return torch.tensor(chosen, dtype=torch.int32, device=DEVICE)


def main() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(DEVICE, torch.bfloat16 if GPU else torch.float32)
    skewed = torch.rand(TOKENS, EXPERTS, generator=generator) ** torch.arange(1, EXPERTS + 1)  # some are wanted more
    topk_weight, ids = (part.to(DEVICE) for part in skewed.topk(TOPK))
    ids = ids.int()

    def check(step: str, experts: Experts, slots: list[int], expected: Experts) -> None:
        """Every rank runs its slots, and the results are added."""
        mask = torch.zeros(len(slots), dtype=torch.int32, device=DEVICE)
        own = len(slots) // world_size
        mask[rank * own : (rank + 1) * own] = 1
        out = experts(x, topk_weight, slots_of(ids, slots), mask)
        dist.all_reduce(out)
        say(step, out, expected(x, topk_weight, ids))

    def say(step: str, out: Tensor, expected: Tensor) -> None:
        error = float((out.double() - expected.double()).norm() / expected.double().norm())
        assert error < 2e-2, f"{step}: {error}"
        if rank == 0:
            print(f"{step:58s} error against one process {error:.1e}", flush=True)

    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared, 0, device=DEVICE)
    folder = Path(shared[0])
    first = whole(1)
    if rank == 0:
        save_file(
            {f"{NAME}.{name}": weight for name, weight in first.state_dict().items()}, folder / "model.safetensors"
        )
    dist.barrier()

    # Each rank reads its own experts from the file.
    loaded = load_experts(folder, rank=rank, world_size=world_size, dim="expert", device=DEVICE)[NAME]
    check("loaded, a part by each rank", Experts(loaded.w13, loaded.w2), list(range(EXPERTS)), first)

    # A slot more on each rank, for a replica; until the first rebalance it holds the rank's first expert again.
    mine = list(loaded.w13.place.experts)
    experts = Experts(*(torch.cat([weight, weight[:1]]) for weight in (loaded.w13, loaded.w2)))
    for weight, part in ((experts.w13_weight, loaded.w13), (experts.w2_weight, loaded.w2)):
        weight.place = part.place._replace(experts=(*mine, mine[0]))
    each = EXPERTS // world_size
    old = [expert for first in range(0, EXPERTS, each) for expert in (*range(first, first + each), first)]
    new = balanced(ids, world_size)
    received = move_experts_([experts.w13_weight, experts.w2_weight], old, new)
    check(f"rebalanced, {received / 2**10:.0f} KiB to rank 0", experts, new, first)

    # Rank 0 has new values in bfloat16. Every rank gets its experts, packed, into the tensors that it has.
    for weight, trained in zip((experts.w13_weight, experts.w2_weight), values(2), strict=True):
        scatter_(weight, trained if rank == 0 else None)
    second = whole(2)
    check("new values of rank 0", experts, new, second)

    # Saved from these ranks, experts as they are spread now; loaded on half of them, or one, parted otherwise.
    dcp.save(sharded(experts.state_dict()), checkpoint_id=folder / "spread")
    ranks = list(range(max(1, world_size // 2)))
    group = dist.new_group(ranks)
    if rank in ranks:
        parts = (torch.zeros_like(weight).shard(rank, len(ranks)) for weight in second.parameters())
        again = Experts(*parts)
        dcp.load(sharded(again.state_dict()), checkpoint_id=folder / "spread", process_group=group)
        out = again(x, topk_weight, ids)
        dist.all_reduce(out, group=group)
        say(
            f"saved, and loaded on {len(ranks)} of {world_size} ranks by rows and columns",
            out,
            second(x, topk_weight, ids),
        )
    dist.barrier()


if __name__ == "__main__":
    if GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if GPU else "gloo", device_id=DEVICE if GPU else None)
    main()
    dist.destroy_process_group()
