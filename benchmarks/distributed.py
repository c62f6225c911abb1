# SPDX-License-Identifier: MIT
"""Weights between GPUs: whether each operation is right on every rank, and how fast it is beside plain tensors of as
many bytes.

    python benchmarks/distributed.py              # a rank on each GPU, over NCCL; without two GPUs, small, over gloo
    python benchmarks/distributed.py --only moves pushes

Bytes are compared where they are, with a formula. MiB are what the busiest rank receives, ms the slowest rank's median.
A section that dies, or that does not end, is a row that is WRONG, and the next one is run by new processes. Exit status
1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import distributed_rows as rows
import torch
import torch.distributed as dist
from distributed_rows import DEVICE, EXPERTS, GPU, HIDDEN, INTERMEDIATE, RANK, WORLD, WRONG, say
from distributed_sections import SECTIONS

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[rows.parser]
)
parser.add_argument("--ranks", type=int, help="a GPU each; by default all of them, or 2 over gloo")
parser.add_argument("--limit", type=float, default=60.0, help="seconds for a section")
parser.add_argument("--only", nargs="*", help="sections")
parser.add_argument("--progress", help=argparse.SUPPRESS)
ARGS = parser.parse_args()


def rank(sections: list[str]) -> None:
    """Run sections until one dies."""
    warnings.simplefilter("ignore")
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), WORLD, RANK == 0, timeout=timedelta(seconds=60))
    if GPU:
        torch.cuda.set_device(DEVICE)
        dist.init_process_group("nccl", store=store, rank=RANK, world_size=WORLD, device_id=DEVICE)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
    for name in sections:
        said = ""
        try:
            SECTIONS[name]()
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        store.set(f"{name} {RANK}", said or "-")
        try:
            store.wait([f"{name} {rank}" for rank in range(WORLD)], timedelta(seconds=20 if said else ARGS.limit))
        except dist.DistError:
            os._exit(2)
        ends = [store.get(f"{name} {rank}").decode() for rank in range(WORLD)]
        died = [f"rank {rank}: {end}" for rank, end in enumerate(ends) if end != "-"]
        if RANK == 0:
            if died:
                say(f"{name} died: {'; '.join(died)}", False)
            with Path(ARGS.progress).open("a") as progress:
                progress.write(f"{name} {len(WRONG) + bool(died)} {'died' if died else 'ended'}\n")
        if died:  # ranks may be out of step
            os._exit(3)
        WRONG.clear()
        if GPU:
            torch.cuda.empty_cache()
    sys.stdout.flush()
    if RANK == 0:
        time.sleep(0.5)  # it has the store
    os._exit(0)  # gloo aborts at an ordinary exit now and then, with plain tensors too


@contextmanager
def started(ranks: int, sections: list[str], progress: Path) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1"} if not GPU else {}
    options = [f"--repeat={ARGS.repeat}", f"--limit={ARGS.limit}", f"--progress={progress}", *["--small"] * ARGS.small]
    command = [sys.executable, __file__, *options, "--only", *sections]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(number), "LOCAL_RANK": str(number)})
        for number in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def main() -> int:
    ranks = ARGS.ranks or (torch.cuda.device_count() if GPU else 2)
    where = f"{torch.cuda.get_device_name(0)}, {ranks} ranks over NCCL" if GPU else f"cpu, {ranks} ranks over gloo"
    print(f"torch {torch.__version__} on {where}; w13 [{EXPERTS}, {2 * INTERMEDIATE}, {HIDDEN}]")
    print(f"{'operation':64s} right        MiB        ms     GB/s    plain of plain", flush=True)
    left, wrong = ARGS.only or list(SECTIONS), 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while left:
            progress.write_text("")
            with started(ranks, left, progress) as processes:
                done: list[list[str]] = []
                since = time.monotonic()
                while any(process.poll() is None for process in processes):
                    time.sleep(0.1)
                    found = [line.split() for line in progress.read_text().splitlines()]
                    if len(found) > len(done):
                        done, since = found, time.monotonic()
                    if time.monotonic() - since > ARGS.limit + 30 or any(process.poll() for process in processes):
                        break
            done = [line.split() for line in progress.read_text().splitlines()]
            wrong += sum(int(count) for _, count, _ in done)
            left = left[len(done) :]
            if left and (not done or done[-1][2] != "died"):  # the processes are gone, and it has not said why
                say(f"{left.pop(0)}: a rank died or did not end", False)
                wrong += 1
    print("all right" if not wrong else f"{wrong} WRONG")
    return int(wrong > 0)


if __name__ == "__main__":
    if "RANK" in os.environ and ARGS.progress:
        rank(ARGS.only)
    sys.exit(main())
