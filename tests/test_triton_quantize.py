# SPDX-License-Identifier: MIT
"""Quantising by Triton's kernel, run by its interpreter, gives the bytes that torch's operations give. What it becomes
on GPUs is compiled in a process without the interpreter, which needs no GPU either."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import SCALE_RULES, ShuffledMXFP4Tensor, mxfp4
from shuffled_tensor.mxfp4 import BLOCK, Quantizer, ScaleRule

quantizer = pytest.importorskip("shuffled_tensor.backends.triton.quantizer")
pytest.importorskip("triton")


def by_torch(values: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    return mxfp4._by_torch(values, rule)


def every_bfloat16() -> Tensor:
    """In blocks of neighbours, and so that every block has one of every binade."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return torch.cat([bits, bits.view(-1, 2048).T.reshape(-1)]).view(torch.bfloat16).view(-1, 64)


def float32s() -> Tensor:
    """Of random bits, around the smallest normal number, and within a few binades."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3, 64, BLOCK), generator=generator).int()
    bits[1] &= -0x7F000001  # exponents 0 and 1
    bits[2] = bits[2] & -0x7E000001 | 100 << 23
    return bits.view(torch.float32).view(-1, 2 * BLOCK)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("values", [every_bfloat16(), float32s()], ids=["bfloat16", "float32"])
def test_the_kernel_gives_the_same_bytes(values: Tensor, rule: ScaleRule, device: str) -> None:
    values = values.to(device)
    qdata, scale = (
        values.new_full((len(values), 64 // part.per_byte), 0xA5, dtype=torch.uint8) for part in mxfp4.PARTS
    )
    quantizer.launch(values, qdata, scale, rule)
    for found, expected in zip((qdata, scale), by_torch(values, rule), strict=True):
        assert torch.equal(found, expected)


def test_blocks_that_fill_no_program_and_values_that_lie_anywhere(device: str) -> None:
    whole = every_bfloat16()[:200].repeat(1, 2).to(device)
    for values in (whole[:3, :BLOCK], whole[1:, 32:64], whole.view(-1)[1:641].view(5, 128)):
        pair = [
            whole.new_full((len(values) + 1, values.shape[1] // part.per_byte), 7, dtype=torch.uint8)
            for part in mxfp4.PARTS
        ]
        quantizer.launch(values, *(data[:-1] for data in pair), "even")
        for found, expected in zip(pair, by_torch(values, "even"), strict=True):
            assert torch.equal(found[:-1], expected)
            assert (found[-1] == 7).all()


@pytest.mark.parametrize("largest", range(2, 8))
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_subnormal_numbers_beside_larger_ones(rule: ScaleRule, largest: int, device: str) -> None:
    """A whole program of blocks in which they are as near to a scale as can be, and one step nearer than that."""
    bits = torch.linspace(0, (1 << 23) + 4, BLOCK * 128, dtype=torch.float64).int().view(128, BLOCK)
    bits[:, 0] = (largest << 23) + torch.arange(128, dtype=torch.int32) * (1 << 15)
    values = bits.view(torch.float32).view(64, 2 * BLOCK).to(device)
    qdata, scale = (values.new_empty(64, 64 // part.per_byte, dtype=torch.uint8) for part in mxfp4.PARTS)
    quantizer.launch(values, qdata, scale, rule)
    for found, expected in zip((qdata, scale), by_torch(values, rule), strict=True):
        assert torch.equal(found, expected)


class Noted(quantizer.TritonQuantizer):  # type: ignore[misc,name-defined]
    """As on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def quantize(self, values: Tensor, qdata: Tensor, scale: Tensor, scale_rule: ScaleRule) -> bool:
        self.shapes.append(list(values.shape))
        done: bool = super().quantize(values, qdata, scale, scale_rule)
        return done


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[Noted]:
    if device != "cpu":
        pytest.skip("only the interpreter quantises values of a CPU")
    monkeypatch.setattr(quantizer, "unusable", lambda device: None)
    before: Quantizer = mxfp4._quantizer
    mxfp4.install(Noted())
    yield mxfp4._quantizer  # type: ignore[misc]
    mxfp4.install(before)


def test_weights_are_quantised_by_it(noted: Noted) -> None:
    values = every_bfloat16()[:96].view(3, 32, 64)
    weight = ShuffledMXFP4Tensor.from_hp(values, gate_up=False)
    weight.refit_from_hp_(values.flip(0))
    assert noted.shapes == [[3, 32, 64]] * 2
    codes, scale = by_torch(values.flip(0), "even")
    assert torch.equal(weight.qdata_view.clone(), codes)
    assert torch.equal(weight.scale_view.clone(), scale)


def test_what_it_does_not_know_is_quantised_without_it(noted: Noted) -> None:
    values = torch.randn(4, 64)
    for other in (values.double(), values.half()):
        assert torch.equal(mxfp4.quantize(other)[0], by_torch(other, "even")[0])
    with suppress(RuntimeError):  # older versions of torch cannot map it
        torch.func.vmap(lambda x: mxfp4.quantize(x)[0])(values)
    torch.compile(lambda x: mxfp4.quantize(x)[0], backend="aot_eager", fullgraph=True)(values)
    assert not noted.shapes


def test_a_kernel_that_fails_is_said_once(
    noted: Noted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(quantizer, "launch", fail)
    caplog.set_level(logging.WARNING, "shuffled_tensor")
    values = every_bfloat16()[:4]
    for _ in range(2):
        for found, expected in zip(mxfp4.quantize(values), by_torch(values, "even"), strict=True):
            assert torch.equal(found, expected)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["values are quantised without Triton, which failed: Failed to find C compiler"]


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shuffled_tensor.backends.triton.quantize import quantize
from shuffled_tensor.mxfp4 import BOUNDARIES

cuda = {target!r}[0] == "cuda"
pointers = dict(Values={words!r}, Codes="*u8", Scales="*u8")
fixed = dict(RULE="even", BOUNDARIES=BOUNDARIES, BLOCKS=128)
types = {{name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in quantize.arg_names}}
aligned = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(quantize.arg_names) if name in pointers}}
made = triton.compile(ASTSource(quantize, types, fixed, aligned), target=GPUTarget(*{target!r}))
asm = made.asm["ptx" if cuda else "amdgcn"]
loads = re.findall(r"ld\\.global\\.\\S+" if cuda else r"(?:global|buffer)_load_\\w+", asm)
spilled = 0 if cuda else sum(map(int, re.findall(r"_spill_count:\\s+(\\d+)", asm)))
print(*sorted(set(loads)), spilled)
"""


@pytest.mark.parametrize(
    ("target", "words", "expected"),
    [
        (("cuda", 90, 32), "*i32", "ld.global.v4.b32 0"),
        (("cuda", 90, 32), "*i64", "ld.global.v2.b64 0"),
        (("hip", "gfx950", 64), "*i32", "global_load_dwordx4 0"),
    ],
)
def test_the_compiled_kernel_reads_16_bytes_at_a_time(
    target: tuple[str, Any, int], words: str, expected: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE.format(target=target, words=words)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == expected
