# SPDX-License-Identifier: MIT
"""What a serving engine's forward costs with this package under its experts: the engine's own Python, its kernel
replaced by one copy, so that what is left is the way there. Runs in the environment that `make test-engines` makes:

    .engines/venv/bin/python -W ignore benchmarks/engines.py vllm|sglang

All figures come from one run; the contestants are timed in turns, and the fastest turn of each counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.engines.layers import inputs, quark

CALLS, TURNS = 300, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "sglang"))
    given, calls = inputs(), {}
    if parser.parse_args().engine == "vllm":
        from tests.engines import test_vllm as tests
        from tests.engines.vllm_layer import VERSION, vllm

        with vllm():
            _copy_instead_of_a_kernel()
            for name, owned in (("alone", False), ("with this package", True)):
                layer = tests.loaded(owned, quark(0))["experts"]
                calls[name] = lambda layer=layer: layer.forward_modular(*given)
            _report(f"vLLM {VERSION}", calls)
    else:
        from tests.engines import test_sglang as tests
        from tests.engines.sglang_layer import VERSION, forward, sglang

        with sglang():
            _copy_instead_of_a_kernel()
            for name, owned in (("alone", False), ("with this package", True)):
                layer = tests.loaded(owned, quark(0))
                calls[name] = lambda layer=layer: forward(layer, given)
            _report(f"SGLang {VERSION}", calls)


def _copy_instead_of_a_kernel() -> None:
    module: Any = sys.modules["aiter.fused_moe"]

    def copy(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states.clone()

    copy.__signature__ = module.fused_moe.__signature__  # type: ignore[attr-defined]
    module.fused_moe = copy


def _report(engine: str, calls: dict[str, Callable[[], object]]) -> None:
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(TURNS):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    print(f"torch {torch.__version__} on cpu, {torch.get_num_threads()} threads; {engine}, Quark a4w4, microseconds")
    print()
    for name, taken in best.items():
        print(f"{name:24}{taken:8.1f}{taken / best['alone']:7.2f}x")


if __name__ == "__main__":
    main()
