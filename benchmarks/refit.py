# SPDX-License-Identifier: MIT
"""What a refit of a shuffled weight costs: time against a copy of the same bytes, and memory at its peak.

    python benchmarks/refit.py [--device cpu|cuda] [--experts E] [--rows N] [--k K] [--torch]

New bytes are copied in while the refit is open, as RDMA would put them there: into bytes that keep what is not written,
or, with ``whole``, into bytes that all are. Where they are given to the weight, as row-major bytes or as a weight in
row-major order, nothing is copied before. All figures come from one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from shuffle import KINDS, peak_extra_mib, seconds
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, layouts, refit

REPEATS = 20


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
    parser.add_argument("--torch", action="store_true", help="without the kernels, as where there is no Triton")
    options = parser.parse_args()
    device, experts = options.device, options.experts or (64 if options.device == "cuda" else 4)
    shape = experts, options.rows, options.k
    old, new = random_parts(*shape, device), random_parts(*shape, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    total = sum(part.nbytes for part in new) / 2**20
    if options.torch:
        layouts.install(layouts.Mover())
    print(f"torch {torch.__version__} on {name}")
    print(f"weight {list(shape)}, {total:.0f} MiB with its scales, one expert {total / experts:.1f} MiB\n")
    print(f"{'':42}{'ms':>9}{'of copy':>9}{'peak extra MiB':>16}{'pointers':>10}")

    module = nn.Module()
    module.weight = nn.Parameter(ShuffledMXFP4Tensor(*old, gate_up=True, row_order="contiguous"))
    weight = module.weight

    def copy() -> None:
        weight.qdata.copy_(new[0])
        weight.scale.copy_(new[1])

    given = ShuffledMXFP4Tensor(*(part.clone() for part in new), gate_up=True, row_order="contiguous")

    def refitted(whole: bool) -> None:
        with refit(module, whole=whole):
            copy()

    def viewed() -> None:
        weight.qdata_view.copy_(new[0])
        weight.scale_view.copy_(new[1])

    ways: dict[str, Callable[[], object]] = {
        "refit": partial(refitted, False),
        "refit of the whole": partial(refitted, True),
        "bytes given to views": viewed,
        "a weight given to copy_": partial(weight.copy_, given),
    }
    plain = seconds(copy, device, REPEATS)
    print(f"{'copy of the bytes':42}{plain * 1e3:9.2f}{1:8.2f}x{peak_extra_mib(copy, device):16.1f}{'stable':>10}")
    expected = given[:2].logical_checksum()
    for kind in KINDS:
        for name, way in ways.items():
            weight.copy_(ShuffledMXFP4Tensor(*(part.clone() for part in old), gate_up=True, row_order="contiguous"))
            weight.shuffle_(kind)
            before = weight.qdata.data_ptr(), weight.scale.data_ptr()
            way()
            assert weight.shuffle_kind == kind
            assert weight[:2].logical_checksum() == expected
            time_, extra = seconds(way, device, REPEATS), peak_extra_mib(way, device)
            stable = (weight.qdata.data_ptr(), weight.scale.data_ptr()) == before
            print(f"{f'{name}, {kind}':42}{time_ * 1e3:9.2f}{time_ / plain:8.2f}x{extra:16.1f}", end="")
            print(f"{'stable' if stable else 'MOVED':>10}")


if __name__ == "__main__":
    main()
