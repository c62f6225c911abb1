# SPDX-License-Identifier: MIT
"""What plain torch needs on this device: a layer by the reference backend, and quantising.

The layer is one of gpt-oss-20b: 32 experts, 4 of them a token, 2880 x 2880, SwiGLU and biases. Its yardstick is torch
on as many experts that are dense bfloat16 in memory: for each one that received tokens, two products and what is
between them.

    python benchmarks/reference.py [--device cpu|cuda]

All figures come from one run; the two contestants of a row are timed in turns, and the fastest turn of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, quantize

EXPERTS, TOPK, HIDDEN, INTERMEDIATE = 32, 4, 2880, 2880


def dense_layer(
    x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor, ids: Tensor, w13_bias: Tensor, w2_bias: Tensor
) -> Tensor:
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w13[expert].T + w13_bias[expert]).chunk(2, 1)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        down = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ w2[expert].T + w2_bias[expert]
        out.index_add_(0, token, down * weight[token, slot].to(x.dtype).unsqueeze(1))
    return out


def milliseconds(runs: list[Callable[[], object]], device: str, turns: int = 7) -> list[float]:
    best = [float("inf")] * len(runs)
    for _ in range(turns):
        for index, run in enumerate(runs):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], (time.perf_counter() - start) * 1e3)
    return best


def layers(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) / 64

    w13_bias, w2_bias = random(EXPERTS, 2 * INTERMEDIATE), random(EXPERTS, HIDDEN)
    dense = random(EXPERTS, 2 * INTERMEDIATE, HIDDEN), random(EXPERTS, HIDDEN, INTERMEDIATE)
    w13 = ShuffledMXFP4Tensor.from_hp(dense[0], gate_up=True, row_order="contiguous", shuffle_kind="mxfp4_moe")
    w2 = ShuffledMXFP4Tensor.from_hp(dense[1], gate_up=False, shuffle_kind="mxfp4_moe")
    print(f"{'milliseconds a layer':24}{'dense bf16':>12}{'reference':>12}{'ratio':>8}")
    for tokens in (1, 32):
        x = random(tokens, HIDDEN) * 64
        weight, ids = random(tokens, EXPERTS).float().softmax(-1).topk(TOPK)
        biases = {"w13_bias": w13_bias, "w2_bias": w2_bias}
        runs: list[Callable[[], object]] = [
            lambda: dense_layer(x, *dense, weight, ids, **biases),  # noqa: B023  (called before the next)
            lambda: fused_moe(x, w13, w2, weight, ids, activation="swiglu", backend="reference", **biases),  # noqa: B023
        ]
        yardstick, ours = milliseconds(runs, device)
        print(f"{f'{tokens} tokens':24}{yardstick:12.1f}{ours:12.1f}{ours / yardstick:7.1f}x")


def quantising(device: str) -> None:
    print(f"\n{'quantize [8, 4096, 4096]':24}{'ms':>12}{'millions/s':>12}")
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.randn(8, 4096, 4096, device=device, dtype=torch.bfloat16).to(dtype)
        (taken,) = milliseconds([lambda: quantize(values)], device, turns=3)  # noqa: B023
        print(f"{str(dtype).removeprefix('torch.'):24}{taken:12.1f}{values.numel() / taken / 1e3:12.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {name}\n")
    with torch.no_grad():
        layers(device)
        quantising(device)


if __name__ == "__main__":
    main()
