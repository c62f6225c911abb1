# SPDX-License-Identifier: MIT
"""What a refit of a shuffled weight costs: time against a copy of the same bytes, and memory at its peak.

    python benchmarks/refit.py [--device cpu|cuda] [--experts E] [--rows N] [--k K]

New bytes are copied in while the refit is open, as RDMA would put them there. All figures come from one run.
"""

from __future__ import annotations

import argparse

import torch
from shuffle import KINDS, peak_extra_mib, seconds
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, refit

REPEATS = 5


def random_parts(experts: int, rows: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    """Codes, and scales around 1.0."""
    codes = torch.randint(256, (experts, rows, k // 2), dtype=torch.uint8, device=device)
    return codes, torch.randint(120, 128, (experts, rows, k // 32), dtype=torch.uint8, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--rows", type=int, default=4096, help="N of one gate-up weight")
    parser.add_argument("--k", type=int, default=7168)
    options = parser.parse_args()
    device, experts = options.device, options.experts or (64 if options.device == "cuda" else 4)
    shape = experts, options.rows, options.k
    old, new = random_parts(*shape, device), random_parts(*shape, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    total = sum(part.nbytes for part in new) / 2**20
    print(f"torch {torch.__version__} on {name}")
    print(f"weight {list(shape)}, {total:.0f} MiB with its scales, one expert {total / experts:.1f} MiB\n")
    print(f"{'':24}{'ms':>9}{'of copy':>9}{'peak extra MiB':>16}{'pointers':>10}")

    module = nn.Module()
    module.weight = nn.Parameter(ShuffledMXFP4Tensor(*old, gate_up=True, row_order="contiguous"))
    weight = module.weight

    def copy() -> None:
        weight.qdata.copy_(new[0])
        weight.scale.copy_(new[1])

    def refitted() -> None:
        with refit(module):
            copy()

    plain = seconds(copy, device, REPEATS)
    print(f"{'copy of the bytes':24}{plain * 1e3:9.2f}{1:8.2f}x{peak_extra_mib(copy, device):16.1f}{'stable':>10}")
    expected = ShuffledMXFP4Tensor(*(part.clone() for part in new), gate_up=True, row_order="contiguous")
    for kind in KINDS:
        weight.shuffle_(kind)
        before = weight.qdata.data_ptr(), weight.scale.data_ptr()
        time_, extra = seconds(refitted, device, REPEATS), peak_extra_mib(refitted, device)
        stable = (weight.qdata.data_ptr(), weight.scale.data_ptr()) == before
        assert weight.shuffle_kind == kind
        assert weight[:2].logical_checksum() == expected[:2].logical_checksum()
        print(f"{'refit, ' + kind:24}{time_ * 1e3:9.2f}{time_ / plain:8.2f}x{extra:16.1f}", end="")
        print(f"{'stable' if stable else 'MOVED':>10}")


if __name__ == "__main__":
    main()
