# SPDX-License-Identifier: MIT
"""What the tensor subclass costs a call, over the packed operator with plain tensors: eager, compiled, captured.

Some engines drop all of dynamo's guards. Weights that are frozen are constants of the compiled code:
torch._inductor.config.freezing.

    python benchmarks/overhead.py [--device cpu|cuda] [--layers N]

The layer itself is replaced by one multiplication, so that nothing hides the cost of getting there. All figures come
from one run; the two contestants of a row are timed in turns, and the fastest turn of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch._inductor.config
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, backends, fused_moe
from shuffled_tensor.moe.call import MoECall
from shuffled_tensor.moe.op import MANY, Description, Kernels

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOPK = 8, 256, 256, 16, 2


class OneMultiplication(backends.Backend):
    """A backend that takes any call and reads nothing but the hidden states."""

    name = "one multiplication"

    def refuse(self, call: MoECall) -> str | None:
        return None

    def describe(self, call: MoECall) -> Description:
        return Description((Kernels(range(1, MANY + 1), "one multiplication", "as they come"),), {})

    def run(self, call: MoECall) -> Tensor:
        return call.hidden_states * 2


class Ours(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device)
        w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, device=device)
        self.w13 = nn.Parameter(ShuffledMXFP4Tensor.from_hp(w13, gate_up=True, row_order="contiguous"))
        self.w2 = nn.Parameter(ShuffledMXFP4Tensor.from_hp(w2, gate_up=False))

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return fused_moe(x, self.w13, self.w2, weight, ids, backend="one multiplication")


class Plain(nn.Module):
    """The packed operator, with the same bytes as plain tensors."""

    def __init__(self, ours: Ours) -> None:
        super().__init__()
        for name in ("w13", "w2"):
            for part in ("qdata", "scale"):
                self.register_buffer(f"{name}_{part}", getattr(getattr(ours, name), part))

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        packed = torch.ops.shuffled_tensor.fused_moe_packed.default
        weights = self.w13_qdata, self.w13_scale, self.w2_qdata, self.w2_scale
        w13_qdata, w13_scale, w2_qdata, w2_scale = weights
        return packed(
            x,
            *(w13_qdata, w13_scale, "none", 2 * INTERMEDIATE, HIDDEN),
            *(w2_qdata, w2_scale, "none", HIDDEN, INTERMEDIATE),
            weight,
            ids,
            out_dtype="bfloat16",
            backend="one multiplication",
        )


class PlainModel(nn.ModuleList):
    def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, weight, ids)
        return x


class OurModel(nn.ModuleList):
    # a function of its own: dynamo keeps what it compiled by function, and without guards takes what is there
    def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, weight, ids)
        return x


def rows(models: list[nn.Module], arguments: tuple[Tensor, ...]) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Each to be timed before the next one is asked for: what was compiled is forgotten then."""
    yield "eager", [partial(model, *arguments) for model in models]
    no_guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    for row, options, frozen in (
        ("compiled", {}, False),
        ("compiled, frozen", {}, True),
        ("compiled, no guards", no_guards, False),
    ):
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=frozen):
            yield (
                row,
                [partial(torch.compile(model, fullgraph=True, options={**options}), *arguments) for model in models],
            )
    if arguments[0].is_cuda:
        yield "graph-captured", [captured(model, arguments) for model in models]


def captured(module: nn.Module, arguments: tuple[Tensor, ...]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    module(*arguments)
    with torch.cuda.graph(graph):
        module(*arguments)
    return graph.replay


def microseconds(runs: list[Callable[[], object]], device: str, repeats: int = 200, turns: int = 15) -> list[float]:
    best = [float("inf")] * len(runs)
    for _ in range(turns):
        for index, run in enumerate(runs):
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], (time.perf_counter() - start) / repeats * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    device, layers = options.device, options.layers
    backends.BACKENDS["one multiplication"] = OneMultiplication()
    ours = [Ours(device) for _ in range(layers)]
    arguments = (
        torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16),
        torch.rand(TOKENS, TOPK, device=device),
        torch.randint(EXPERTS, (TOKENS, TOPK), device=device, dtype=torch.int32),
    )

    models = [PlainModel(Plain(layer) for layer in ours), OurModel(ours)]
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {name}; {layers} layers, microseconds a layer\n")
    print(f"{'':24}{'plain tensors':>15}{'our tensors':>13}{'added':>8}{'ratio':>8}")
    with torch.no_grad():
        for row, runs in rows(models, arguments):
            plain, subclass = (time_ / layers for time_ in microseconds(runs, device))
            print(f"{row:24}{plain:15.1f}{subclass:13.1f}{subclass - plain:8.1f}{subclass / plain:7.2f}x")


if __name__ == "__main__":
    main()
