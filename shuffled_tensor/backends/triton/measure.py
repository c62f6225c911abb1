# SPDX-License-Identifier: MIT
"""Plans that are faster than the table's on the GPU at hand, found by measuring, and kept where layers look first."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton import TritonError

from shuffled_tensor.backends.triton import tune
from shuffled_tensor.backends.triton.tune import Plan, Shape
from shuffled_tensor.device import real_arch
from shuffled_tensor.layouts import round_up
from shuffled_tensor.moe.op import fused_moe
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["Found", "candidates", "measure", "microseconds"]

_log = logging.getLogger("shuffled_tensor")

_ROUTINGS = (8, 2)
"""Measured together, of fewer than 64 tokens and of more: the weights of a few experts would be read from a cache."""

_WORTH = 0.98
"""Of the time of the table's plan: what takes longer may be noise, and the table knows numbers of slots in between."""

_SAME = 1e-2
"""Of a token's result: as far as sums in another order, rounded to bfloat16 twice, may lie from each other."""


class Found(NamedTuple):
    """For a number of tokens."""

    tokens: int
    table: Plan
    table_microseconds: float
    best: Plan
    """The table's where no other one is worth it."""
    best_microseconds: float


def measure(
    experts: int, hidden: int, intermediate: int, topk: int, tokens: Sequence[int], device: torch.device
) -> Iterator[Found]:
    """Plans for a layer, one number of tokens after the other; each is in the file as soon as it is here.

    Raises:
        ValueError: sizes of no layer.
    """
    if not 1 <= topk <= experts:
        raise ValueError(f"topk must be in 1..{experts}, the number of experts, found {topk}")
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Iterator[Tensor]:
        for least, most, each in ((0, 256, 2), (110, 124, 32)):
            size = (experts, rows, columns // each)
            yield torch.randint(least, most, size, dtype=torch.uint8, device=device, generator=generator)

    w13 = ShuffledMXFP4Tensor(*random(2 * intermediate, hidden), gate_up=True, row_order="contiguous")
    w2 = ShuffledMXFP4Tensor(*random(hidden, intermediate), gate_up=False)
    for weight in (w13, w2):
        weight.shuffle_("mxfp4_separated")
    columns = round_up(hidden, 256), round_up(intermediate, 256)
    shape, cdna4 = Shape(experts, hidden, columns, columns[1] == 256), real_arch(device) == "gfx950"
    for count in sorted(tokens):
        calls = []
        for _ in range(_ROUTINGS[count >= 64]):
            x = torch.randn(count, hidden, device=device, generator=generator).bfloat16() / 8
            top = torch.randn(count, experts, device=device, generator=generator).softmax(-1).topk(topk)
            calls.append(partial(fused_moe, x, w13, w2, top.values, top.indices.int(), backend="triton"))
        place, table = tune.key(count * topk, shape), tune.table(count * topk, shape, cdna4)
        launch = partial(_launch, device, place, calls)
        try:
            expected = launch(table)
            plans = [table, *candidates(table, count * topk, shape, cdna4)]
            plans = [plan for plan in plans if plan == table or _computes(plan, launch, expected)]
            times = [time / len(calls) for time in microseconds([partial(launch, plan) for plan in plans])]
        finally:
            _use(device, place, None)
        best = times.index(min(times))
        if times[best] > _WORTH * times[0]:
            best = 0
        if best > 0:
            _use(device, place, plans[best])
        _keep(device, place)
        yield Found(count, table, times[0], plans[best], times[best])


def candidates(table: Plan, slots: int, shape: Shape, cdna4: bool) -> list[Plan]:
    """The neighbours of the table's plan: each differs in one thing."""
    rows = (table.rows // 2, table.rows * 2)
    found = [table._replace(rows=each, small=table.small if table.small < each else 0) for each in rows]
    found += [table._replace(small=each) for each in (0, table.rows // 4, table.rows // 2)]
    for first, tile, tiles, columns in zip((True, False), table[2:], shape.tiles, shape.columns, strict=True):
        others = [tile._replace(stages=tile.stages + by) for by in (-1, 1)]
        others += [tile._replace(rows=64 if tile.rows == 128 else 128)]
        others += [tile._replace(columns=128 if tile.columns == 256 else 256, run=1)]
        if tile.parts > 1 or min(slots, shape.experts) * tiles < 4 * tune.TILES:  # each part has sums in memory
            parts = tune.divisors(columns // tile.columns)
            at = parts.index(tile.parts)
            others += [tile._replace(parts=each, run=1) for each in parts[max(at - 1, 0) : at + 2]]
        found += [table._replace(first=other) if first else table._replace(second=other) for other in others]
    return [plan for plan in dict.fromkeys(found) if plan != table and tune.fits(plan, shape, cdna4)]


def microseconds(contestants: Sequence[Callable[[], object]], repeats: int = 15) -> list[float]:
    """The median time of a CUDA graph of each, replayed in turns. All have run before."""
    graphs, pool = [], torch.cuda.graph_pool_handle()  # what they compute is not looked at
    for contestant in contestants:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            contestant()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats):
        for graph, own in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            own.append(start.elapsed_time(end) * 1e3)
    return list(map(statistics.median, times))


def _launch(
    device: torch.device, place: tuple[Shape, int], calls: Sequence[Callable[[], Tensor]], plan: Plan
) -> list[Tensor]:
    _use(device, place, plan)
    return [call() for call in calls]


def _computes(plan: Plan, launch: Callable[[Plan], list[Tensor]], expected: list[Tensor]) -> bool:
    """Whether it runs here, and computes the same."""
    try:
        found = launch(plan)
    except (TritonError, RuntimeError) as error:  # more shared memory than there is, or what no compiler takes
        _log.info("%s does not run: %s", plan, error)
        return False
    for own, other in zip(found, expected, strict=True):
        apart, size = (own.float() - other.float()).norm(dim=1), other.float().norm(dim=1)
        if not bool((apart <= _SAME * size).all()):  # which NaN is not either
            _log.warning("%s is left out: it computes something else than the table's plan", plan)
            return False
    return True


def _use(device: torch.device, place: tuple[Shape, int], plan: Plan | None) -> None:
    """From now on in this process; None for the table's."""
    if plan is None:
        tune.measured(device).pop(place, None)
    else:
        tune.measured(device)[place] = plan
    tune.plan.cache_clear()


def _keep(device: torch.device, place: tuple[Shape, int]) -> None:
    """In the file, beside what others have measured meanwhile."""
    path, plans = tune.path(device), {}
    with suppress(OSError, ValueError):
        plans = tune.read(path, real_arch(device) == "gfx950")
    plans.pop(place, None)
    if place in tune.measured(device):
        plans[place] = tune.measured(device)[place]
    rows = [
        {
            "shape": shape._asdict(),
            "slots": 2**power,
            "plan": plan._asdict() | {"first": plan.first._asdict(), "second": plan.second._asdict()},
        }
        for (shape, power), plan in plans.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"versions": tune.versions(), "plans": rows}, indent=1), encoding="utf-8")
    os.replace(partial, path)
