# SPDX-License-Identifier: MIT
"""A trainer in bfloat16, and a server in MXFP4 that gets the trainer's weights after each step: packed on the wire, and
in place, so that the graph which the server captured once goes on with the new values.

    torchrun --nproc-per-node 2 examples/rl_rollout.py      # over NCCL where each rank has a GPU, else over gloo

Rank 0 trains, the others serve. What they answer after each step is what the trainer's weights, quantised by itself,
give.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, broadcast_, fused_moe

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, STEPS = 4, 256, 128, 32, 5
GPU = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """The same on every rank: hidden states, and two experts of each token with their weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    topk_weight, ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2)
    return x.to(DEVICE), topk_weight.to(DEVICE), ids.int().to(DEVICE)


def packed(w13: Tensor, w2: Tensor) -> tuple[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor]:
    return (
        ShuffledMXFP4Tensor.from_hp(w13, gate_up=True, row_order="contiguous"),
        ShuffledMXFP4Tensor.from_hp(w2, gate_up=False),
    )


def forward(x: Tensor, w13: Tensor, w2: Tensor, topk_weight: Tensor, ids: Tensor) -> Tensor:
    """The layer as a trainer computes it, with a gradient."""
    gate, up = torch.einsum("tk,enk->ten", x, w13).chunk(2, -1)
    every = torch.einsum("tei,eki->tek", F.silu(gate) * up, w2)
    chosen = every.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, HIDDEN))
    return (chosen * topk_weight.unsqueeze(-1).to(x.dtype)).sum(1)


def train() -> None:
    x, topk_weight, ids = prompts()
    generator = torch.Generator(DEVICE).manual_seed(1)
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    w13, w2 = (
        torch.randn(shape, generator=generator, device=DEVICE).mul_(0.05).bfloat16().requires_grad_()
        for shape in shapes
    )
    wanted = x.flip(-1)
    optimizer = torch.optim.Adam([w13, w2], lr=2e-3)
    losses = []
    for step in range(STEPS):
        loss = (forward(x, w13, w2, topk_weight, ids).float() - wanted.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        broadcast_([None, None], [w13, w2], row_order=["contiguous", None])
        answer = torch.empty_like(x)
        dist.broadcast(answer, src=1)
        expected = fused_moe(x, *packed(w13.detach(), w2.detach()), topk_weight, ids)
        error = ((answer.float() - expected.float()).norm() / expected.float().norm()).item()
        assert error < 1e-2, f"step {step}: the server answers something else, {error}"
        print(f"step {step}: loss {losses[-1]:.4f}, the server's answer differs by {error:.1e}", flush=True)
    assert losses[-1] < losses[0]


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """On a GPU, a graph that is replayed; on a CPU, the call itself."""
    if not GPU:
        return run
    run()  # lays the weights out and compiles, which no graph may do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def serve() -> None:
    x, topk_weight, ids = prompts()
    w13, w2 = packed(
        torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16, device=DEVICE),
    )
    w13.shuffle_("mxfp4_moe")
    w2.shuffle_("mxfp4_moe")
    answer = captured(lambda: fused_moe(x, w13, w2, topk_weight, ids))
    addresses = [weight.qdata.data_ptr() for weight in (w13, w2)]
    for _ in range(STEPS):
        broadcast_([w13, w2])
        assert addresses == [weight.qdata.data_ptr() for weight in (w13, w2)]
        dist.broadcast(answer().contiguous(), src=1)


if __name__ == "__main__":
    if GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if GPU else "gloo", device_id=DEVICE if GPU else None)
    if dist.get_rank() == 0:
        train()
    else:
        serve()
    dist.destroy_process_group()
