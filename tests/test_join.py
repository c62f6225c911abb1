# SPDX-License-Identifier: MIT
"""Parts of weights joined along rows and columns: the values that plain tensors give, and gate-up only where that is
sure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe

from .support.bytes import LAYOUTS, marked_parts, weight_of
from .support.judges import assert_holds, dense

SHAPES = [(2, 512, 512), (3, 96, 160)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_chunks_joined_again_are_the_weight(dim: int, shape: tuple[int, int, int], gate_up: bool, layout: str) -> None:
    parts = marked_parts(*shape)
    weight = weight_of(parts, layout, gate_up=gate_up)
    of_five = weight.split([32, weight.shape[dim] - 64, 32], dim=dim) if dim else weight.split([1, shape[0] - 1])
    for pieces in (weight.chunk(2, dim=dim) if weight.shape[dim] % 64 == 0 or not dim else of_five, of_five):
        assert_holds(torch.cat(list(pieces), dim), parts, layout)
    assert_holds(weight, parts, layout)
    one = torch.cat(list(weight[1].chunk(2, dim=0)), 0)
    assert isinstance(one, ShuffledMXFP4Tensor)
    assert one.gate_up == gate_up
    assert torch.equal(one.dequantize(torch.float64), dense(*parts)[1])


JOINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "columns": lambda a, b: torch.cat([a, b], 2),
    "columns of windows": lambda a, b: torch.cat([a[..., :64], b[..., 96:], a[..., 32:64]], -1),
    "columns of one": lambda a, b: torch.cat([a[1], b[0]], 1),
    "rows of windows": lambda a, b: torch.cat([a[:, 5:60], b[:, :31]], 1),
    "rows of one": lambda a, b: torch.cat([a[1, :40], b[0, 40:], b[1, 8:16]], 0),
    "windows of both": lambda a, b: torch.cat([a[::2, 5:60, :64], b[:1, :31, 32:96]], -2),
    "experts of windows": lambda a, b: torch.cat([a[:, 8:40, 32:96], b[:1, 8:40, 32:96]]),
    "a stack of windows": lambda a, b: torch.stack([a[1, :24, 32:], b[0, :24, 32:]]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("gate_up", [False, True])
def test_values_are_those_of_plain_tensors(gate_up: bool, joined: str, compiled: bool) -> None:
    torch._dynamo.reset()
    a_parts, b_parts = marked_parts(2, 96, 512), marked_parts(2, 96, 512, salt=1)
    a = weight_of(a_parts, "mxfp4_moe", gate_up=gate_up, dtype=torch.float64)
    b = weight_of(b_parts, "mxfp4_separated", gate_up=gate_up, dtype=torch.float64)
    function = JOINED[joined]
    call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.no_grad():
        found = call(a, b)
    assert isinstance(found, ShuffledMXFP4Tensor)
    assert torch.equal(found.dequantize(), function(dense(*a_parts), dense(*b_parts)))
    assert found.shuffle_kind == "mxfp4_moe"  # the first's
    assert found.gate_up == (gate_up and joined.startswith("columns"))


def test_rows_are_gate_and_up_where_that_is_sure() -> None:
    parts, other_parts = marked_parts(2, 512, 512), marked_parts(2, 512, 512, salt=1)
    a, b = weight_of(parts, "mxfp4_separated"), weight_of(other_parts)
    half = 256
    merged = torch.cat([a[:, :half], b[:, :half], a[:, half:], b[:, half:]], 1)  # of two ranks
    assert isinstance(merged, ShuffledMXFP4Tensor)
    expected = tuple(
        torch.cat([x[:, :half], y[:, :half], x[:, half:], y[:, half:]], 1)
        for x, y in zip(parts, other_parts, strict=True)
    )
    assert_holds(merged, expected, "mxfp4_separated")
    assert merged.gate_up
    apart = torch.cat([a[:, :32], a[:, 32:half], a[:, half:320], a[:, 320:384], a[:, 384:]], 1)
    assert isinstance(apart, ShuffledMXFP4Tensor)
    assert apart.gate_up
    assert_holds(apart, parts, "mxfp4_separated")
    for pieces in (
        [a[:, :32], a[:, 32:64], a[:, half + 32 : half + 64]],
        [a[:, half:], a[:, :half]],  # up, then gate
        [a[:, :half], b[:, half:]],  # of two layers
        [a[:, :half], a[:, :half]],
        [a[:, :half], a[:, half:-32]],
        [a[:, :half], b[:, :half], b[:, half:], a[:, half:]],
        [a[:1, :half], a[1:, half:]],  # of two experts
    ):
        found = torch.cat(pieces, 1)
        assert isinstance(found, ShuffledMXFP4Tensor)
        assert not found.gate_up
        dense_pieces = [piece.dequantize() for piece in pieces]
        assert torch.equal(found.dequantize(), torch.cat(dense_pieces, 1))
    w2 = weight_of(marked_parts(2, 512, 256), gate_up=False)
    x, ids = torch.zeros(1, 512), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="w13 must be made with gate_up=True"):  # so it is not silent
        fused_moe(x, torch.cat([a[:, half:], a[:, :half]], 1), w2, torch.ones(1, 1), ids)


def test_what_does_not_fit_is_refused() -> None:
    a = weight_of(marked_parts(2, 96, 160))
    down = weight_of(marked_parts(2, 96, 160), gate_up=False)
    with pytest.raises(ValueError, match="would be gate, up, gate, up; join the gate halves"):
        torch.cat([a, a], 1)
    with pytest.raises(ValueError, match="gate_up and dtype, found .*'experts': 2, 'columns': 160"):
        torch.cat([down, down[..., :64]], 1)
    with pytest.raises(ValueError, match="gate_up and dtype"):
        torch.cat([a, down], 2)
    with pytest.raises(ValueError, match="gate_up and dtype"):
        torch.cat([down, down[:1]], 2)
    with pytest.raises(ValueError, match="gate_up and dtype"):
        torch.cat([down, down.half()], 2)
    with pytest.raises(ValueError, match=r"found \(2, {'rows': 96}, .* and \(2, {'rows': 64}"):
        torch.cat([down[0], down[1, :64]], 1)
    for pieces in ([down, down.dequantize(torch.float64)], [down.dequantize(torch.float64), down]):
        with pytest.raises(TypeError, match="found a plain tensor of torch.float64"):
            torch.cat(pieces, 2)
