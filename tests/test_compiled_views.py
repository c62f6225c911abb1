# SPDX-License-Identifier: MIT
"""Weights and parts of weights that go into and come out of compiled functions: what plain tensors do, of the values,
and the same bytes where plain tensors share memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.bytes import coded, moderate_scales

# bytes move in elements of 16
pytestmark = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")

BACKENDS = ["eager", "aot_eager", "inductor"]
EXPERTS, ROWS, COLUMNS = 4, 320, 512
IDS = torch.tensor([2, -4])
KINDS = [(False, "none"), (False, "mxfp4_moe"), (True, "mxfp4_separated")]


def weight(gate_up: bool, kind: str, salt: int = 0) -> ShuffledMXFP4Tensor:
    parts = coded(EXPERTS, ROWS, COLUMNS // 2, salt=salt), moderate_scales(EXPERTS, ROWS, COLUMNS // 32)
    order = "contiguous" if gate_up else None
    return ShuffledMXFP4Tensor(*parts, gate_up=gate_up, row_order=order, dtype=torch.float32).shuffle_(kind)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "w": lambda w: w,
    "w[1]": lambda w: w[1],
    "w[1:3]": lambda w: w[1:3],
    "w[::2]": lambda w: w[::2],
    "w[1:3, :64]": lambda w: w[1:3, :64],
    "w[:, 160:]": lambda w: w[:, 160:],
    "w[2, :, 32:96]": lambda w: w[2, :, 32:96],
}


def many_views(w: Tensor) -> list[Tensor]:
    """Views of all kinds, of [E, N, K] or [N, K]."""
    rows, columns = w[..., 32:64, :], w[..., 32:64]
    of_experts = [*w.unbind(0), w[-1], w[1:], w[::2], w[0].unsqueeze(0)] if w.dim() == 3 else [w.unsqueeze(0)]
    halves = [*w.chunk(2), *w.chunk(2, dim=-2), *w.split(32, dim=-1)]
    return [w, w.detach(), w.view(w.shape), rows, columns, rows[..., :32], *of_experts, *halves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize(("gate_up", "kind"), KINDS)
def test_views_that_are_returned(gate_up: bool, kind: str, taken: str, backend: str) -> None:
    whole = weight(gate_up, kind)
    dense = many_views(TAKEN[taken](whole.dequantize()))
    given = TAKEN[taken](whole)
    compiled = torch.compile(many_views, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            found = compiled(given)
            assert found[0] is given
            for place, (view, expected) in enumerate(zip(found, dense, strict=True)):
                assert isinstance(view, ShuffledMXFP4Tensor), place
                assert torch.equal(view.dequantize(), expected), place
                assert view.is_shuffled == (kind != "none")
        assert not [view for view in found if view.gate_up] or gate_up
        whole.zero_()
        assert not [place for place, view in enumerate(found) if view.dequantize().any()]
        whole.shuffle_("mxfp4_moe")  # one state: every view knows of it
        assert all(view.shuffle_kind == "mxfp4_moe" for view in found)


def with_copies(w: Tensor) -> list[Tensor]:
    clone = w.clone()
    picked = [w[[1, 0]], torch.cat([w, clone[:1]])] if w.dim() == 3 else [torch.stack([w, clone])]
    return [clone, clone[..., :64, :], w.to(torch.float64), *picked]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("taken", TAKEN)
def test_copies_that_are_returned(taken: str, backend: str) -> None:
    whole = weight(False, "mxfp4_moe")
    given, dense = TAKEN[taken](whole), TAKEN[taken](whole.dequantize())
    with torch.no_grad():
        found = torch.compile(with_copies, fullgraph=True, backend=backend)(given)
        expected = with_copies(dense)
        whole.zero_()
    for copied, value in zip(found, expected, strict=True):
        assert isinstance(copied, ShuffledMXFP4Tensor)
        assert copied.dtype == value.dtype
        assert torch.equal(copied.dequantize(), value)


def dense_linear(w: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w if w.dim() == 2 else w[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_graph_serves_every_expert(mode: Callable[[], Any], backend: str) -> None:
    whole, x = weight(False, "mxfp4_moe"), torch.randint(-2, 3, (5, COLUMNS)).float()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(dense_linear, fullgraph=True, backend=counter)
    with mode():
        for expert in range(EXPERTS):
            expected = dense_linear(whole.dequantize()[expert].double(), x.double())
            assert torch.allclose(compiled(whole[expert], x).double(), expected, rtol=1e-5)
    assert counter.frame_count == 1


def _set(w: Tensor, place: Any, new: Tensor | float) -> None:
    w[place] = new


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda w, v: w.copy_(v),
    "copy_ to one": lambda w, v: w[1].copy_(v[2]),
    "copy_ to a window": lambda w, v: w[1:3, 64:96, 32:].copy_(v[:2, 64:96, 32:]),
    "w[1] =": lambda w, v: _set(w, 1, v[2]),
    "w[1:, :64] =": lambda w, v: _set(w, (slice(1, None), slice(64)), v[1:, :64]),
    "w[ids] =": lambda w, v: _set(w, IDS, v[:2]),
    "w[ids] = one": lambda w, v: _set(w, IDS, v[3]),
    "window[ids] =": lambda w, v: _set(w[:, :64, 32:64], IDS, v[:2, :64, 32:64]),
    "index_copy_": lambda w, v: w.index_copy_(0, IDS % EXPERTS, v[1:3]),
    "fill_": lambda w, v: w[1:, :, 32:64].fill_(1.5),
    "zero_": lambda w, v: w[1].zero_(),
    "foreach": lambda w, v: torch._foreach_copy_([w[1], w[2]], [v[2], v[1]]),
    "then a view": lambda w, v: (w.copy_(v), w[1])[1],
    "permute_experts_": lambda w, v: (
        w.permute_experts_([2, 0, 1, 3]) if isinstance(w, ShuffledMXFP4Tensor) else w.copy_(w[[2, 0, 1, 3]])
    ),
}


@pytest.mark.parametrize("source", ["plain", "packed"])
@pytest.mark.parametrize(
    ("backend", "gate_up", "kind"),
    [
        ("eager", False, "mxfp4_moe"),
        ("aot_eager", False, "none"),
        ("aot_eager", True, "mxfp4_separated"),
        ("inductor", False, "none"),
    ],
)
def test_writes(backend: str, gate_up: bool, kind: str, source: str) -> None:
    """All in one graph, each in a weight of its own; for inductor some, because it takes its time."""
    writes = {
        name: WRITES[name]
        for name in (["w[1:, :64] =", "w[ids] =", "then a view"] if backend == "inductor" else WRITES)
    }
    packed = weight(gate_up, "none", salt=5)
    new = packed if source == "packed" else packed.dequantize()
    given = {name: weight(gate_up, kind) for name in writes}
    dense = {name: w.dequantize() for name, w in given.items()}
    for name, write in writes.items():
        write(dense[name], packed.dequantize())

    def write_all(weights: dict[str, Tensor], new: Tensor) -> dict[str, Any]:
        return {name: write(weights[name], new) for name, write in writes.items()}

    with torch.no_grad():
        view = torch.compile(write_all, fullgraph=True, backend=backend)(given, new)["then a view"]
    for name, w in given.items():
        assert w.is_shuffled == (kind != "none"), name
        assert torch.equal(w.dequantize(), dense[name]), name
    assert isinstance(view, ShuffledMXFP4Tensor)
    assert torch.equal(view.dequantize(), dense["then a view"][1])
    view.zero_()  # it is one of the weight that was written, not of what the graph made on the way
    assert not given["then a view"][1].dequantize().any()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.shuffle_("mxfp4_moe"), "the layout of a weight cannot change in a compiled function"),
        (
            lambda w: _set(w, torch.tensor([True, False, True, False]), w[:2].clone()),
            "how many experts a mask picks is not known",
        ),
        (lambda w: w.permute_experts_(torch.tensor([2, 0, 1, 3])), "permute_experts_ takes a list"),
        (lambda w: w.index_copy_(0, IDS, w[:3].clone()), r"index_copy_ takes values of shape \[2, 320, 512\]"),
    ],
)
def test_what_a_graph_cannot_do_is_said(write: Callable[[Tensor], Any], message: str) -> None:
    w = weight(False, "none")
    before = w.dequantize()
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(write, fullgraph=True, backend="aot_eager")(w)
    assert torch.equal(w.dequantize(), before)
    assert not w.is_shuffled


def test_experts_that_are_known_by_nobody_are_refused() -> None:
    w = weight(False, "none")
    with pytest.raises(ValueError, match="no values to take from a tensor on the meta device"):
        w.index_copy_(0, torch.zeros(2, dtype=torch.int64, device="meta"), w[:2].clone())
    assert torch.equal(w[:2].dequantize(), weight(False, "none").dequantize()[:2])
