# SPDX-License-Identifier: MIT
"""The examples of many ranks run on two, over gloo, and say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PRINTED = {
    "expert_parallel": [
        r"loaded, a part by each rank +error against one process \d\.\de[-+]\d\d",
        r"rebalanced, [1-9]\d* KiB to rank 0 +error against one process \d\.\de[-+]\d\d",
        r"new values of rank 0 +error against one process \d\.\de[-+]\d\d",
        r"saved, and loaded on 1 of 2 ranks by rows and columns +error against one process \d\.\de[-+]\d\d",
    ],
    "rl_rollout": [rf"step {step}: loss \d\.\d+, the server's answer differs by \d\.\de[-+]\d\d" for step in range(5)],
}
"""Each has compared what it prints."""


@pytest.mark.parametrize("example", PRINTED)
def test_an_example_runs_on_two_ranks(example: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / f"{example}.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(PRINTED[example])
    for line, pattern in zip(lines, PRINTED[example], strict=True):
        assert re.fullmatch(pattern, line), line
