# SPDX-License-Identifier: MIT
"""Experts in the slots of several ranks, for the engines' own code to move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shuffled_tensor import ShuffledMXFP4Tensor, agree_
from tests.support.bytes import coded, moderate_scales
from tests.support.judges import dense
from tests.support.ranks import Rank

EXPERTS, SLOTS = 8, 6
"""Of the model, and of each of two ranks."""
SIZES = {"w13": (256, 384), "w2": (384, 128)}
KINDS = ("mxfp4_moe", "none")
"""Of the ranks, before they agree."""

MAPS = [
    [0, 1, 2, 3, 0, 5, 4, 5, 6, 7, 0, 0],
    [7, 7, 6, 2, 1, 0, 5, 3, 4, 0, 2, 6],
    [1, 0, 3, 2, 5, 4, 7, 6, 0, 1, 4, 2],
]
"""Which expert each slot holds, one after the other; with replicas on a rank and between ranks."""


def slots_of(rank: int, experts: Sequence[int]) -> list[int]:
    return [*experts][rank * SLOTS : (rank + 1) * SLOTS]


def agreed(at: Rank) -> dict[str, ShuffledMXFP4Tensor]:
    """The weights of a rank in the first map, laid out alike on all."""
    weights = {}
    for number, (name, (rows, columns)) in enumerate(SIZES.items()):
        parts = coded(EXPERTS, rows, columns // 2, salt=number), moderate_scales(EXPERTS, rows, columns // 32)
        mine = (part[slots_of(at.rank, MAPS[0])] for part in parts)
        order = "contiguous" if name == "w13" else None
        weights[name] = ShuffledMXFP4Tensor(*mine, gate_up=name == "w13", row_order=order)  # type: ignore[arg-type]
        weights[name].shuffle_(KINDS[at.rank])
    agree_(weights.values())
    return weights


def check(at: Rank, weights: dict[str, ShuffledMXFP4Tensor], experts: Sequence[int]) -> None:
    """Each slot holds the float64 values of its expert."""
    for number, (name, (rows, columns)) in enumerate(SIZES.items()):
        values = dense(coded(EXPERTS, rows, columns // 2, salt=number), moderate_scales(EXPERTS, rows, columns // 32))
        assert torch.equal(weights[name].dequantize(torch.float64), values[slots_of(at.rank, experts)]), name
