# SPDX-License-Identifier: MIT
"""What transposing, permuting and expanding a weight give: values to be read. A write would vanish, so it is refused."""

from __future__ import annotations

import copy
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.bytes import marked_parts, weight_of
from .support.judges import dense

# bytes move in elements of 16
pytestmark = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")

SHAPE = (2, 512, 512)

REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "expand": lambda w: w.expand(3, *w.shape),
    "swapaxes": lambda w: w.swapaxes(-1, 0),
    "broadcast_to": lambda w: torch.broadcast_to(w, (2, *w.shape)),
}

IN_PLACE: dict[str, Callable[..., Any]] = {
    "+": operator.iadd, "-": operator.isub, "*": operator.imul, "/": operator.itruediv, "//": operator.ifloordiv,
    "%": operator.imod, "**": operator.ipow, "&": operator.iand, "|": operator.ior, "^": operator.ixor,
    "<<": operator.ilshift, ">>": operator.irshift,
}  # fmt: skip

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda values: values.zero_(),
    "copy_": lambda values: values.copy_(torch.zeros(())),
    "[...] =": lambda values: values.__setitem__(..., 0),
    **{f"{sign}=": (lambda values, write=write: write(values, 1)) for sign, write in IN_PLACE.items()},
    "out=": lambda values: torch.add(torch.ones(512, 512), 1, out=values),
    "into out= of two": lambda values: torch.max(torch.ones(2, 2), 0, out=(values, torch.empty(0, dtype=torch.int64))),
    "foreach": lambda values: torch._foreach_zero_([values]),
    "init": lambda values: nn.init.zeros_(values),
    "operator": lambda values: torch.ops.aten.zero_(values),
    "overload": lambda values: torch.ops.aten.zero_.default(values),
    "a part": lambda values: values[0].zero_(),
    "a part of a part": lambda values: values.mT[..., 1:].chunk(2)[1].zero_(),
    "one of several": lambda values: torch.broadcast_tensors(values, one()[0].expand(1, 1, 512, 512))[0].zero_(),
    "detached": lambda values: values.detach().zero_(),
    "data": lambda values: values.data.zero_(),
    "data =": lambda values: setattr(values, "data", torch.zeros(2)),
    "a parameter": lambda values: nn.Parameter(values, requires_grad=False).zero_(),
}


def one(kind: str = "mxfp4_moe") -> tuple[ShuffledMXFP4Tensor, Tensor]:
    """An expert, and its values."""
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, kind, gate_up=False, dtype=torch.float64)[1]
    assert isinstance(weight, ShuffledMXFP4Tensor)
    return weight, dense(*parts)[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("rearranged", REARRANGED)
def test_writes_are_refused(rearranged: str, mode: Callable[[], Any]) -> None:
    weight, expected = one()
    with mode():
        values = REARRANGED[rearranged](weight)
        assert torch.equal(values, REARRANGED[rearranged](expected))
        for name, write in WRITES.items():
            with pytest.raises(RuntimeError, match="a copy of its values, so it would not reach the weight; write to"):
                write(values)
            assert torch.equal(values, REARRANGED[rearranged](expected)), name
    assert torch.equal(weight.dequantize(), expected)


def test_it_reads_as_a_plain_tensor() -> None:
    weight, expected = one()
    values, plain = weight.T, expected.T
    x = torch.ones(3, 512, dtype=torch.float64)
    for found, right in (
        (values + 1, plain + 1),
        (x @ values, x @ plain),
        (values.clone(), plain),
        (values.float(), plain.float()),
        (copy.deepcopy(values), plain),
        (pickle.loads(pickle.dumps(values)), plain),
        (torch.cat([values, values]), torch.cat([plain, plain])),
        (torch.empty(512, 512, dtype=torch.float64).copy_(values), plain),
        (torch.add(values, 0.0, out=torch.empty(512, 512, dtype=torch.float64)), plain),
        (torch.from_numpy(values.numpy()), plain),
    ):
        assert type(found) is Tensor
        assert torch.equal(found, right)
    assert (values.dtype, values.shape, values.stride()) == (plain.dtype, plain.shape, plain.stride())
    assert values.sum().item() == plain.sum().item()
    mine = values.clone()
    mine.zero_()
    assert torch.equal(weight.dequantize(), expected)


def test_it_is_read_without_the_compiler() -> None:
    """Whose import takes seconds."""
    read = (
        "import sys, torch; from shuffled_tensor import ShuffledMXFP4Tensor as Weight; "
        "w = Weight.from_hp(torch.ones(2, 256), gate_up=False); assert (w.T + 1).sum() == 1024; "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", read], check=True)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_layers_that_transpose_it(backend: str | None, mode: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    weight, expected = one()
    x = torch.randint(-2, 3, (3, 512)).double()

    def layers(x: Tensor, w: Tensor) -> list[Tensor]:
        return [nn.functional.linear(x, w), x @ w.T, x @ w.transpose(0, 1), w.mT, (w.expand(2, 512, 512) @ x.T)[1]]

    with mode():
        found = (torch.compile(layers, fullgraph=True, backend=backend) if backend else layers)(x, weight)
    for value, right in zip(found, layers(x, expected), strict=True):
        assert torch.allclose(value, right, rtol=1e-12)
    assert all(type(value) is Tensor for value in found[:3])


TORCH_REFUSES = "cannot mutate tensors with frozen storage|more than one element of the written-to tensor"
WRITES_TRACED: dict[str, Callable[[Tensor], Any]] = {
    name: WRITES[name] for name in ("zero_", "copy_", "[...] =", "+=", "foreach", "a part", "a part of a part")
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES_TRACED)
def test_writes_in_a_compiled_function_are_refused(write: str, mode: Callable[[], Any]) -> None:
    """When it is traced, since a graph has no place for them."""
    weight, expected = one()
    for rearranged, of in REARRANGED.items():
        torch._dynamo.reset()

        def writes(w: Tensor, of: Callable[[Tensor], Tensor] = of) -> Tensor:
            values = of(w)
            WRITES_TRACED[write](values)
            return values.sum()

        with mode(), pytest.raises(Exception, match=TORCH_REFUSES):
            torch.compile(writes, fullgraph=True, backend="aot_eager")(weight)
        assert torch.equal(weight.dequantize(), expected), rearranged


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_function_writes_to_copies_of_it(backend: str) -> None:
    torch._dynamo.reset()
    weight, expected = one()

    def mine(w: Tensor) -> list[Tensor]:
        copied = w.T.clone()
        copied.zero_()
        flat = w.T.flatten()
        flat += 1
        return [copied, flat, torch.ones(512, 512, dtype=torch.float64).add_(w.T), torch.cat([w.T, w.T]).neg_()]

    with torch.no_grad():
        found = torch.compile(mine, fullgraph=True, backend=backend)(weight)
    for value, right in zip(found, mine(expected), strict=True):
        assert torch.equal(value, right)
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_function_that_is_given_it(backend: str, mode: Callable[[], Any]) -> None:
    weight, expected = one()
    x = torch.randint(-2, 3, (3, 512)).double()

    def read(values: Tensor) -> list[Tensor]:
        mine = values.clone()
        mine += 1
        return [values + 1, values[3:5], x @ values, mine, torch.ones(512, 512, dtype=torch.float64).sub_(values)]

    for of in (REARRANGED["T"], REARRANGED["transpose"]):
        torch._dynamo.reset()
        with mode():
            values = of(weight)
            found = torch.compile(read, backend=backend)(values)
            torch._dynamo.reset()
            with pytest.raises(Exception, match=r"not traced from outside; make it in the compiled function, of the"):
                torch.compile(read, backend=backend, fullgraph=True)(values)
            for name, write in WRITES_TRACED.items():
                if name == "foreach":  # dynamo does not look into lists
                    continue
                with pytest.raises(RuntimeError, match="a copy of its values, so it would not reach the weight"):
                    torch.compile(write, backend=backend)(values)
                assert torch.equal(values, of(expected)), name
        for value, right in zip(found, read(of(expected)), strict=True):
            assert (value - right).abs().max() <= 1e-12 * right.abs().max()  # sums in another order
