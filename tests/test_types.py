# SPDX-License-Identifier: MIT
"""What a type checker tells a user before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

ROOT = Path(__file__).parents[1]

PROGRAM = """\
from torch import Tensor
from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, load_experts, quantize, save_file

def use(x: Tensor, qdata: Tensor, scale: Tensor, w2: ShuffledMXFP4Tensor) -> None:
    w13 = ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="interleave")
    fused_moe(x, w13, w2, x, x, activation="relu")
    fused_moe(x, w13, w2, x, x, backend="aitr")
    fused_moe(x, w13, w2, x, x, renormalize=True)
    quantize(x, scale_rule="ceil")
    w13.shard(0, 2, dim="experts")
    save_file({"w13": w13}, "w13.safetensors", layout="canon")
    load_experts("model", format="gptoss")
    out: Tensor = fused_moe(x, w13, w2, x, x, activation="swiglu", out_dtype=x.dtype)
"""


def test_words_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy, which `make` installs")
    (tmp_path / "program.py").write_text(PROGRAM)
    # from the root, for its configuration and for the cache that `make check` has filled
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(tmp_path / "program.py")]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    lines = (line.partition("program.py:")[2] for line in found.splitlines() if ": error:" in line)
    assert_expected_inline(
        "\n".join(lines),
        """\
5: error: Argument "row_order" to "ShuffledMXFP4Tensor" has incompatible type "Literal['interleave']"; expected "Literal['contiguous', 'interleaved'] | None"  [arg-type]
6: error: Argument "activation" to "fused_moe" has incompatible type "Literal['relu']"; expected "Literal['silu', 'gelu', 'gelu_tanh', 'swiglu', 'situ']"  [arg-type]
7: error: Argument "backend" to "fused_moe" has incompatible type "Literal['aitr']"; expected "Literal['aiter', 'triton', 'reference'] | None"  [arg-type]
8: error: Unexpected keyword argument "renormalize" for "fused_moe"  [call-arg]
9: error: Argument "scale_rule" to "quantize" has incompatible type "Literal['ceil']"; expected "Literal['floor', 'even', 'round_up', 'amax4']"  [arg-type]
10: error: Argument "dim" to "shard" of "ShuffledMXFP4Tensor" has incompatible type "Literal['experts']"; expected "Literal['expert', 'intermediate']"  [arg-type]
11: error: Argument "layout" to "save_file" has incompatible type "Literal['canon']"; expected "Literal['canonical', 'as_is']"  [arg-type]
12: error: Argument "format" to "load_experts" has incompatible type "Literal['gptoss']"; expected "Literal['auto', 'gpt-oss', 'quark', 'compressed-tensors', 'deepseek', 'shuffled_tensor']"  [arg-type]""",
    )
