# SPDX-License-Identifier: MIT
"""What shuffling costs: our out-of-place and in-place forms, against `clone` of the same bytes and against the
byte-wise permute that engines run today.

    python benchmarks/shuffle.py [--device cpu|cuda] [--experts E] [--rows N] [--k K] [--down] [--torch]

All figures of one table come from one run. Bandwidth counts the payload once read and once written, so that every row
moves "the same bytes".
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shuffled_tensor import layouts, shuffle_scale, shuffle_weight, unshuffle_scale, unshuffle_weight

KINDS = ("mxfp4_separated", "mxfp4_moe")

FUNCTIONS = {"weight": (shuffle_weight, unshuffle_weight), "scale": (shuffle_scale, unshuffle_scale)}


def bytewise(data: Tensor, kind: str, part: str, gate_up: bool) -> Tensor:
    """The permute that aiter's own functions do: the same order, moved one byte at a time."""
    experts, rows, columns = data.shape
    kind = kind if gate_up else "mxfp4_separated"
    if part == "weight" and kind == "mxfp4_separated":
        view = data.view(experts, rows // 16, 16, columns // 16, 16).permute(0, 1, 3, 2, 4)
    elif part == "weight":
        view = data.view(experts, 2, rows // 32, 16, columns // 16, 16).permute(0, 2, 1, 4, 3, 5)
    elif kind == "mxfp4_separated":
        view = data.view(experts, rows // 32, 2, 16, columns // 8, 2, 4).permute(0, 1, 4, 6, 3, 5, 2)
    else:
        view = data.view(experts, 2, rows // 32, 16, columns // 8, 2, 4).permute(0, 2, 4, 6, 3, 5, 1)
    return view.contiguous().view(data.shape)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of one run, after two to warm up."""
    times = []
    for repeat in range(repeats + 2):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # the GPU is busy while Python launches what is timed
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            run()
            elapsed = time.perf_counter() - begin
        if repeat >= 2:
            times.append(elapsed)
    return statistics.median(times)


def peak_extra_mib(run: Callable[[], object], device: str) -> float:
    """Memory that one run takes at its peak beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # else glibc serves the run from memory that it kept
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
    before = _status_kib("VmRSS")
    run()
    return max(0, _status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
    )


def table(part: str, data: Tensor, gate_up: bool, device: str, repeats: int) -> None:
    print(f"\n{part} {list(data.shape)}, {data.nbytes / 2**20:.0f} MiB, one expert {data[0].nbytes / 2**20:.1f} MiB")
    print(f"{'':36}{'ms':>9}{'GB/s':>9}{'of clone':>10}{'of byte-wise':>14}{'peak extra MiB':>16}")
    shuffle, unshuffle = FUNCTIONS[part]
    clone = seconds(data.clone, device, repeats)

    def row(name: str, run: Callable[[], object], against: float | None) -> float:
        time_ = clone if name == "clone" else seconds(run, device, repeats)
        ratio = f"{against / time_:13.2f}x" if against else f"{'':>14}"
        milliseconds, bandwidth = time_ * 1e3, 2 * data.nbytes / time_ / 1e9
        extra = peak_extra_mib(run, device)
        print(f"{name:36}{milliseconds:9.3f}{bandwidth:9.0f}{clone / time_:9.2f}x{ratio}{extra:16.1f}")
        return time_

    row("clone", data.clone, None)
    for kind in KINDS:
        shuffled = shuffle(data, kind, gate_up=gate_up)
        assert torch.equal(shuffled, bytewise(data, kind, part, gate_up))
        assert torch.equal(unshuffle(shuffled, kind, gate_up=gate_up), data)
        for function in (shuffle, unshuffle):  # in place, too, before it is timed
            given, expected = (data, shuffled) if function is shuffle else (shuffled, data)
            given = given.clone()
            function(given, kind, gate_up=gate_up, out=given)
            assert torch.equal(given, expected)
        reference = row(f"byte-wise permute, {kind}", partial(bytewise, data, kind, part, gate_up), None)
        scratch = data.clone()
        for name, function in (("shuffle", shuffle), ("unshuffle", unshuffle)):
            row(f"{name}, {kind}", partial(function, data, kind, gate_up=gate_up), reference)
            row(f"{name} in place, {kind}", partial(function, scratch, kind, gate_up=gate_up, out=scratch), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--rows", type=int, default=4096, help="N of one weight")
    parser.add_argument("--k", type=int, default=7168)
    parser.add_argument("--down", action="store_true", help="a weight without gate and up")
    parser.add_argument("--torch", action="store_true", help="without the kernels, as where there is no Triton")
    options = parser.parse_args()
    if options.torch:
        layouts.install(layouts.Mover())
    experts = options.experts or (32 if options.device == "cuda" else 4)
    repeats = 50 if options.device == "cuda" else 9
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {name}")
    generator = torch.Generator(options.device).manual_seed(0)
    for part, per_byte in (("weight", 2), ("scale", 32)):
        data = torch.randint(
            256,
            (experts, options.rows, options.k // per_byte),
            dtype=torch.uint8,
            device=options.device,
            generator=generator,
        )
        table(part, data, not options.down, options.device, repeats)


if __name__ == "__main__":
    main()
