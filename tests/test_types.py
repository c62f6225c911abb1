# SPDX-License-Identifier: MIT
"""What a type checker tells a user before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

PROGRAM = """\
from torch import Tensor
from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, load_experts, quantize, save_file

def use(x: Tensor, qdata: Tensor, scale: Tensor, w2: ShuffledMXFP4Tensor) -> None:
    w13 = ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="interleave")
    fused_moe(x, w13, w2, x, x, activation="relu")
    fused_moe(x, w13, w2, x, x, backend="aitr")
    fused_moe(x, w13, w2, x, x, swiglu_alpha=1.0)
    quantize(x, scale_rule="ceil")
    w13.shard(0, 2, dim="experts")
    save_file({"w13": w13}, "w13.safetensors", layout="canon")
    load_experts("model", format="gptoss")
    out: Tensor = fused_moe(x, w13, w2, x, x, activation="swiglu", out_dtype=x.dtype)
"""


def test_words_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy, which `make` installs")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert_expected_inline(
        "\n".join(line for line in found.splitlines() if ": error:" in line),
        """program.py:2: error: Cannot find implementation or library stub for module named "shuffled_tensor"  [import-not-found]""",
    )
