# SPDX-License-Identifier: MIT
"""What the kernels of a layer become on GPUs that are not here: the loop over a weight's columns, instruction by
instruction."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

pytest.importorskip("triton", reason="no Triton is installed here to compile with")


@cache
def loop(arch: str, rows: int, halves: int, stages: int, wide: str = "narrow", run: int = 1) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "tests.support.compiled",
        arch,
        str(rows),
        str(halves),
        str(stages),
        wide,
        str(run),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("halves", [0, 1, 2])
@pytest.mark.parametrize("rows", [16, 64])
def test_gfx950_converts_codes_by_its_own_instruction(rows: int, halves: int) -> None:
    found = loop("gfx950", rows, halves, 1)
    assert found["v_cvt_scalef32_pk_bf16_fp4"] == 64  # two codes each: 128 rows of 256 columns over 256 lanes
    assert sum(count for name, count in found.items() if name.startswith("v_mfma_f32_")) >= 16
    assert found["global_load_dwordx4"] == (6 if rows == 16 else 12)  # four of the weight, the others of activations
    assert found["spills"] == 0
    assert not [name for name in found if "ubyte" in name or "sbyte" in name]
    assert sum(found.values()) < (200 if rows == 16 else 320)


def test_gfx942_multiplies_on_matrix_cores_from_wide_loads() -> None:
    found = loop("gfx942", 16, 1, 2)
    assert found["v_mfma_f32_16x16x16_bf16"] == 16
    assert found["global_load_dwordx4"] == 3
    assert found["spills"] == 0
    assert not [name for name in found if "ubyte" in name or "sbyte" in name]


@pytest.mark.parametrize(("halves", "run"), [(1, 1), (0, 4)])
@pytest.mark.parametrize("wide", ["narrow", "wide"])
def test_sm_90_copies_16_bytes_at_a_time_and_multiplies_from_registers(wide: str, halves: int, run: int) -> None:
    found = loop("sm_90", 16, halves, 4, wide, run)
    assert found["wgmma"] >= 8
    assert found["16-byte copies"] >= 0.8 * found["copies"]
    assert found["local"] == 0
