# SPDX-License-Identifier: MIT
"""What loading and converting a checkpoint costs: time against a plain read of the same bytes, and memory at its peak;
how much longer many small tensors take; and how much of a file a rank of eight reads.

    python benchmarks/load.py [--experts E] [--hidden H] [--intermediate I] [--folder DIR]

`safetensors.torch.load_file` maps a file and reads nothing yet, so what loading is compared with is it and one copy of
every tensor into memory of its own: what any loader must do. All figures come from one run; each is the median of
several, in a process of its own. Memory is anonymous memory beyond the tensors that were loaded: pages of the file
that are mapped are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, convert, load_experts

PREFIX = "model.layers.0.mlp.experts"
REPEATS = 5
MANY = 50_000
RANKS = 8


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def write_quark(path: Path, experts: int, hidden: int, intermediate: int) -> None:
    tensors = {}
    for expert in range(experts):
        for name, rows, columns in (
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ):
            tensors[f"{PREFIX}.{expert}.{name}.weight"] = random_bytes(rows, columns // 2)
            tensors[f"{PREFIX}.{expert}.{name}.weight_scale"] = random_bytes(rows, columns // 32)
    save_file(tensors, path)


def write_gpt_oss(path: Path, experts: int, hidden: int, intermediate: int) -> None:
    tensors = {}
    for name, rows, columns in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
        tensors[f"{PREFIX}.{name}_blocks"] = random_bytes(experts, rows, columns // 32, 16)
        tensors[f"{PREFIX}.{name}_scales"] = random_bytes(experts, rows, columns // 32)
    save_file(tensors, path)


def write_many(path: Path, experts: int, hidden: int, intermediate: int) -> None:
    """As Kimi-K3 calls its 497,220 tensors, small ones, so that what a name costs is seen."""
    tensors = {}
    for layer in range(-(-MANY // (6 * experts))):
        for expert, name in itertools.product(range(experts), ("w1", "w3", "w2")):
            base = f"language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{base}.weight_packed"] = random_bytes(hidden, intermediate // 2)
            tensors[f"{base}.weight_scale"] = random_bytes(hidden, intermediate // 32)
    save_file(tensors, path)


def plain(path: Path) -> list[Tensor]:
    return [tensor.clone() for tensor in load_file(path).values()]


def loaded(path: Path, **options: Any) -> list[Tensor]:
    weights = [weight for layer in load_experts(path, **options).values() for weight in (layer.w13, layer.w2)]
    return [part for w in weights if isinstance(w, ShuffledMXFP4Tensor) for part in (w.qdata, w.scale)]


def loaded_unpadded(path: Path) -> list[Tensor]:
    return loaded(path, align=32)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def shares(path: Path, results: Any) -> None:
    """How much of the file a rank reads, by what ranks share."""
    for dim in ("expert", "intermediate"):
        before = bytes_read()
        loaded(path, rank=RANKS - 1, world_size=RANKS, dim=dim)
        results.put((dim, (bytes_read() - before) / path.stat().st_size * RANKS))


def converted(path: Path) -> list[Tensor]:
    destination = path.with_suffix(".converted.safetensors")
    destination.unlink(missing_ok=True)
    convert(path, destination, layout="mxfp4_moe")
    return []


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("RssAnon"))


def measure(run: Callable[[Path], list[Tensor]], small: Path, path: Path, results: Any) -> None:
    """Seconds of a first run, in memory that nobody has used before, and the peak of anonymous memory beyond what its
    result holds."""
    run(small)  # imports, and what torch sets up once
    before, peak, done = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    held = run(path)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    results.put((seconds, max(0.0, peak - before - sum(tensor.nbytes for tensor in held) / 2**20)))


LABELS = {plain: "load_file and a copy", converted: "convert"}


def compare(name: str, small: Path, path: Path, ways: tuple[Callable[[Path], list[Tensor]], ...]) -> None:
    """A line for each way, all in turns, so that what else the machine does troubles all."""
    context = multiprocessing.get_context("spawn")
    results, runs = context.Queue(), {run: [] for run in ways}
    for run in ways * REPEATS:
        process = context.Process(target=measure, args=(run, small, path, results))
        process.start()
        process.join()
        runs[run].append(results.get())
    base = statistics.median(seconds for seconds, _ in runs[ways[0]])
    for run, measured in runs.items():
        seconds, extra = statistics.median(each[0] for each in measured), max(each[1] for each in measured)
        label = f"{name}, {LABELS.get(run, 'load_experts')}"
        print(f"{label:36}{seconds:8.2f}{seconds / base:9.2f}x{extra:16.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: a temporary folder)")
    options = parser.parse_args()
    sizes = options.experts, options.hidden, options.intermediate
    expert = 3 * options.hidden * options.intermediate * 17 / 32 / 2**20
    print(f"torch {torch.__version__} on cpu, {torch.get_num_threads()} threads")
    print(f"{options.experts} experts, hidden {options.hidden}, intermediate {options.intermediate}: ", end="")
    print(f"{options.experts * expert:.0f} MiB, one expert {expert:.1f} MiB")
    print(f"memory allowed: two experts and 256 MiB = {2 * expert + 256:.0f} MiB\n")
    print(f"{'':36}{'s':>8}{'of plain':>10}{'peak extra MiB':>16}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for write in (write_quark, write_gpt_oss):
            name = write.__name__.removeprefix("write_")
            path, small = Path(folder, f"{name}.safetensors"), Path(folder, f"{name}-small.safetensors")
            write(path, *sizes)
            write(small, 1, 256, 256)
            compare(name, small, path, (plain, loaded, converted))
            results = context.Queue()
            process = context.Process(target=shares, args=(path, results))
            process.start()
            process.join()
            for _ in range(2):
                dim, share = results.get()
                print(f"{name}, a rank of {RANKS} by {dim} reads {share:.3f} of an eighth")
            for file in Path(folder).iterdir():
                file.unlink()
        path, small = Path(folder, "many.safetensors"), Path(folder, "many-small.safetensors")
        write_many(path, 128, 256, 256)
        write_gpt_oss(small, 1, 256, 256)
        compare(f"{MANY} tensors", small, path, (plain, loaded_unpadded))


if __name__ == "__main__":
    main()
