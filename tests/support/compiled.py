# SPDX-License-Identifier: MIT
"""Compile a kernel for a GPU that is not here, in a process of its own: ``python -m tests.support.compiled gfx950 16``.

Triton chooses between its interpreter and its compilers when it is imported, and the tests' own process interprets.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shuffled_tensor.backends.triton import numbers
from shuffled_tensor.backends.triton.stage import stage

TARGETS = {"gfx950": ("hip", "gfx950", 64), "gfx942": ("hip", "gfx942", 64), "sm_90": ("cuda", 90, 32)}
TARGET_OF = {"gfx950": numbers.CDNA4, "gfx942": numbers.PLAIN, "sm_90": numbers.PTX}


def compiled_stage(arch: str, rows: int, halves: int, stages: int = 4, wide: bool = False, run: int = 1) -> Any:
    """A stage of gpt-oss's shape, for blocks of so many rows; with a ``run`` of tiles, one of 256 columns."""
    columns = 3072 if run == 1 else 256
    pointers = {"X": "*bf16", "W": "*u8", "S": "*u8", "Y": "*bf16", "Slot": "*i32", "Blocks": "*i32"}
    signature = dict.fromkeys(stage.arg_names, "constexpr") | pointers | {"p0": "fp32", "p1": "fp32"}
    constants = {"Bias": None, "Weight": None, "Partial": None, "Arrived": None, "K": columns, "COLUMNS": columns}
    constants |= {"STRIPS": 384 if halves else 192, "ROWS": 3072, "OUT": 3072, "TILES": 48 if halves else 24, "TOPK": 4}
    constants |= {
        "BM1": rows,
        "BM2": 0,
        "BN": 128,
        "BK": 256 if arch == "gfx950" else 128,
        "PARTS": 1,
        "RUN": run,
        "STAGES": stages,
        "RULE": None,
        "HALVES": halves,
    }
    constants |= {"ACTIVATION": "swiglu" if halves else None, "TARGET": TARGET_OF[arch].value, "WIDE": wide}
    constants |= {"OVERLAP": arch == "sm_90"}
    attributes = {(stage.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=stage, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "num_stages": stages} | ({"launch_pdl": True} if arch == "sm_90" else {})
    return triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)


def amdgcn_loop(kernel: Any) -> list[str]:
    """The instructions of the longest loop: its columns'."""
    lines = [line.split(";")[0].strip() for line in kernel.asm["amdgcn"].splitlines()]
    labels = {line[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\.LBB\d+_\d+:", line)}
    loops = []
    for place, line in enumerate(lines):
        jump = re.match(r"s_c?branch\S*\s+(\S+)", line)
        if jump and labels.get(jump[1], place) < place:
            loops.append(lines[labels[jump[1]] : place + 1])
    body = max(loops, key=len)
    return [line.split()[0] for line in body if line and not line.endswith(":") and not line.startswith(".")]


def main(arch: str, rows: str, halves: str, stages: str, wide: str, run: str) -> None:
    kernel = compiled_stage(arch, int(rows), int(halves), int(stages), wide == "wide", int(run))
    if arch == "sm_90":
        ptx = kernel.asm["ptx"]
        counts = {name: len(re.findall(pattern, ptx)) for name, pattern in {
            "16-byte copies": r"cp\.async\.cg\.shared\.global.* 0x10", "copies": r"cp\.async\.c[ag]\.shared",
            "wgmma": r"wgmma\.mma_async", "byte loads": r"ld\.shared\.[bu]8", "local": r"ld\.local|st\.local"}.items()}  # fmt: skip
    else:
        counts = {}
        for name in amdgcn_loop(kernel):
            counts[name] = counts.get(name, 0) + 1
        text = kernel.asm["amdgcn"]
        counts["spills"] = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s+(\d+)", text))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
