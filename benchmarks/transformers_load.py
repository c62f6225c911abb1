# SPDX-License-Identifier: MIT
"""A gpt-oss checkpoint through transformers' ``from_pretrained``: into packed experts, and as transformers itself loads
it where its kernels are not there, dequantised to bfloat16.

    python benchmarks/transformers_load.py

The checkpoint is made on the spot: 4 layers of gpt-oss-120b's sizes with 8 experts each, random. Every contestant loads
it in a process of its own, with the file in the page cache; both run in turns, and the fastest load of each counts. The
peak is of anonymous memory, which leaves out the file's own pages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

TURNS = 3


def make(folder: Path) -> float:
    """Returns MiB."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    experts, hidden, layers = 8, 2880, 4
    config = AutoConfig.for_model(
        "gpt_oss", num_hidden_layers=layers, num_local_experts=experts, vocab_size=4096, pad_token_id=0, eos_token_id=1
    )
    with torch.device("meta"):
        names = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    state = {}
    for name, shape in names.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = 2 * hidden if name.endswith("gate_up_proj") else hidden
            state[f"{name}_blocks"] = torch.randint(256, (experts, rows, hidden // 32, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.randint(110, 124, (experts, rows, hidden // 32), dtype=torch.uint8)
        else:
            state[name] = torch.randn(shape, dtype=torch.bfloat16) / 64
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return (folder / "model.safetensors").stat().st_size / 2**20


def anonymous() -> float:
    """MiB of this process's memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def load(folder: str, packed: bool, results: multiprocessing.Queue[tuple[float, float, float]]) -> None:
    import transformers
    from transformers import AutoModelForCausalLM

    from shuffled_tensor.transformers import Mxfp4Config

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = Mxfp4Config() if packed else transformers.Mxfp4Config(dequantize=True)
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    done.set()
    watcher.join()
    del model
    cpu = after.ru_utime - usage.ru_utime + after.ru_stime - usage.ru_stime
    results.put((taken, cpu, peak[0] - before))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    context = multiprocessing.get_context("spawn")
    best: dict[bool, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder))
        for _ in range(TURNS):
            for packed in (False, True):
                results = context.Queue()
                process = context.Process(target=load, args=(folder, packed, results))
                process.start()
                found = results.get()
                process.join()
                best[packed] = min(best.get(packed, found), found)
    print(f"torch {torch.__version__} on cpu, {torch.get_num_threads()} threads; a file of {size:.0f} MiB")
    print()
    print(f"{'':24}{'s':>8}{'CPU s':>8}{'peak MiB':>10}{'faster':>9}{'of memory':>11}")
    for packed, name in ((False, "dequantised to bfloat16"), (True, "packed")):
        taken, cpu, peak = best[packed]
        ratios = f"{best[False][0] / taken:8.1f}x{peak / best[False][2]:11.2f}" if packed else ""
        print(f"{name:24}{taken:8.2f}{cpu:8.2f}{peak:10.0f}{ratios}")


if __name__ == "__main__":
    sys.exit(main())
