# SPDX-License-Identifier: MIT
"""A layer of experts by the triton backend, against `triton_kernels` (OpenAI's, as vLLM carries it) on the same shapes,
the bytes that it has to read, and bfloat16 grouped GEMMs.

    PYTHONPATH=.../vllm/third_party python benchmarks/moe.py [--layout mxfp4_separated|mxfp4_moe] [--tokens M ...]

Each contestant is a CUDA graph over several routings, and all of them are replayed in turns in one run. Ours has its
schedule and its reduction in it; the peer's routing is made beforehand. Without a `triton_kernels` that Python can
import, its column stays empty.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe

SHAPES = {"gpt-oss-120b": (128, 3072, 3072, 4), "DeepSeek-V3, TP 8": (256, 7168, 256, 8)}
"""Experts, hidden, intermediate, topk."""

TOKENS = tuple(2**power for power in range(14))


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int = 15) -> list[float]:
    """Median time of a replay of each, in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats):
        for graph, own in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            own.append(start.elapsed_time(end) * 1e3)
    return list(map(statistics.median, times))


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of copies of 512 MiB."""
    source = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(15):  # not in a graph, where a copy is another engine's
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the GPU is busy while Python launches what is timed
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * source.numel() / statistics.median(times)


def random_weight(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    qdata = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
    return qdata, torch.randint(110, 124, (experts, rows, columns // 32), dtype=torch.uint8, device="cuda")


def peer(w13: tuple[Tensor, Tensor], w2: tuple[Tensor, Tensor], topk: int) -> Callable[..., Callable[[], object]]:
    """What makes a call of `triton_kernels` from hidden states and a routing's scores."""
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.numerics import InFlexData
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    opt_flags.update_opt_flags_constraints({"split_k": 1})  # as vLLM does on Hopper

    def load(qdata: Tensor, scale: Tensor) -> tuple[object, PrecisionConfig]:
        by, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale_by, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        weight = convert_layout(wrap_torch_tensor(qdata.transpose(-2, -1), dtype=FP4), by, **options)
        scales = convert_layout(wrap_torch_tensor(scale.transpose(-2, -1)), scale_by, **scale_options)
        return weight, PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=InFlexData()))

    (first, first_precision), (second, second_precision) = load(*w13), load(*w2)
    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2)

    def call(x: Tensor, scores: Tensor) -> Callable[[], object]:
        data, gather, scatter = routing(scores, topk)

        def run() -> object:
            between = matmul_ogs(
                x, first, None, data, gather_indx=gather, precision_config=first_precision, fused_activation=activation
            )
            return matmul_ogs(
                between,
                second,
                None,
                data,
                scatter_indx=scatter,
                precision_config=second_precision,
                gammas=data.gate_scal,
            )

        return run

    return call


def ours(*arguments: Tensor) -> Callable[[], object]:
    return lambda: fused_moe(*arguments, activation="swiglu", backend="triton")


def grouped(experts: int, hidden: int, intermediate: int, tokens: int, topk: int) -> Callable[[], object]:
    """Both GEMMs of a layer in bfloat16, with as many rows for each expert."""
    w13, w2 = (
        torch.randn(experts, rows, columns, device="cuda", dtype=torch.bfloat16)
        for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    rows = tokens * topk
    ends = torch.linspace(0, rows, experts + 1, device="cuda")[1:].int()
    x, between = (torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in (hidden, intermediate))

    def run() -> object:
        torch._grouped_mm(x, w13.transpose(1, 2), ends)
        return torch._grouped_mm(between, w2.transpose(1, 2), ends)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="mxfp4_separated", choices=("mxfp4_separated", "mxfp4_moe"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}; {options.layout}, microseconds a layer")
    print(f"copies of 512 MiB: {bandwidth / 1e6:.2f} TB/s")
    for name, (experts, hidden, intermediate, topk) in SHAPES.items():
        packed = random_weight(experts, 2 * intermediate, hidden), random_weight(experts, hidden, intermediate)
        others = peer(*packed, topk) if find_spec("triton_kernels") else None
        w13 = ShuffledMXFP4Tensor(*packed[0], gate_up=True, row_order="contiguous").shuffle_(options.layout)
        w2 = ShuffledMXFP4Tensor(*packed[1], gate_up=False).shuffle_(options.layout)
        each = sum(data[:1].nbytes for part in packed for data in part)
        print(f"\n{name}: {experts} experts, hidden {hidden}, intermediate {intermediate}, top {topk}")
        columns = f"{'ours':>9}{'peer':>9}{'faster':>9}{'bytes':>9}{'of limit':>10}{'bf16':>9}{'of its FLOP/s':>15}"
        print(f"{'tokens':>6}{columns}")
        for tokens in options.tokens:
            scores = [
                torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
                for _ in range(8 if tokens < 64 else 2)
            ]
            x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) / 8
            chosen = [score.float().softmax(-1).topk(topk) for score in scores]
            contestants = [[ours(x, w13, w2, top.values, top.indices.int()) for top in chosen]]
            if others is not None:
                contestants.append([others(x, score) for score in scores])
            if tokens >= 4096:
                contestants.append([grouped(experts, hidden, intermediate, tokens, topk)] * len(scores))
            times = [time / len(scores) for time in microseconds([graph_of(calls) for calls in contestants])]
            limit = statistics.mean(len(top.indices.unique()) for top in chosen) * each / bandwidth
            row = f"{tokens:6}{times[0]:9.1f}"
            row += f"{times[1]:9.1f}{times[1] / times[0]:8.2f}x" if others is not None else " " * 18
            row += f"{limit:9.1f}{limit / times[0]:10.2f}"
            row += f"{times[-1]:9.1f}{times[-1] / times[0]:14.2f}x" if tokens >= 4096 else ""
            print(row, flush=True)


if __name__ == "__main__":
    main()
