# SPDX-License-Identifier: MIT
"""How large the tiles of a call are: as was measured on this machine, or by a table, which was measured on an H200."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from shuffled_tensor.device import real_arch
from shuffled_tensor.layouts import round_up

__all__ = [
    "TILES",
    "Plan",
    "Shape",
    "Tile",
    "divisors",
    "fits",
    "key",
    "measured",
    "path",
    "plan",
    "read",
    "table",
    "versions",
]

_log = logging.getLogger("shuffled_tensor")


class Tile(NamedTuple):
    """Of one stage's programs."""

    rows: int
    """Of the weight."""
    columns: int
    """A step: 128 or 256."""
    warps: int
    stages: int
    parts: int = 1
    """Programs that share the columns, where there are too few tiles for the GPU."""
    run: int = 1
    """Tiles of a program, of a weight of 256 columns."""


class Plan(NamedTuple):
    """Of a call."""

    rows: int
    """Of a block."""
    small: int
    """At most, of a small block; 0 where there are none."""
    first: Tile
    second: Tile


class Shape(NamedTuple):
    """Of a layer, as far as its plans depend on it."""

    experts: int
    """At hand."""
    hidden: int
    """Logical."""
    columns: tuple[int, int]
    """Padded, of either weight."""
    narrow: bool
    """The second weight has 256 columns of codes."""

    @property
    def tiles(self) -> tuple[int, int]:
        """Of 128 rows, of either weight."""
        return self.columns[1] // 64, -(-self.hidden // 128)


@lru_cache(4096)
def plan(device: torch.device, slots: int, shape: Shape, cdna4: bool) -> Plan:
    """For so many slots of experts at hand."""
    return measured(device).get(key(slots, shape)) or table(slots, shape, cdna4)


# --- the table


_ROWS = ((10, 16, 0, 4), (20, 32, 16, 4), (48, 64, 32, 4), (96, 128, 64, 3), (1 << 30, 128, 32, 3))
"""Up to so many slots an expert: a block's rows, a small one's, and stages."""

TILES = 264
"""That fill a GPU: two for each of 132 processors."""


def table(slots: int, shape: Shape, cdna4: bool) -> Plan:
    """For so many slots of experts at hand, as it was measured on an H200."""
    _, rows, small, stages = next(row for row in _ROWS if slots <= row[0] * shape.experts)
    active = min(slots, shape.experts)

    def tile(count: int, width: int, runs: bool) -> Tile:
        if active * count < TILES:  # too few, even where each has several programs: twice as many, of half the rows
            parts = divisors(width // 256)
            enough = (each for each in parts if 2 * active * count * each >= 1.5 * TILES)
            return Tile(64, 256, 4, 1 if cdna4 else 3, next(enough, parts[-1]))
        if cdna4:
            return Tile(128, 256, 4, 1)
        if runs:
            enough = (each for each in (14, 7, 8, 4, 2) if count % each == 0)
            run = next((each for each in enough if active * count >= 2 * TILES * each), 1)
            return Tile(128, 128, 4, 3 if run > 1 else stages, 1, run)
        return Tile(128, 128, 4, stages)

    tiles, columns = shape.tiles, shape.columns
    return Plan(rows, small, tile(tiles[0], columns[0], False), tile(tiles[1], columns[1], shape.narrow))


def divisors(steps: int) -> list[int]:
    """As how many parts of equal size so many steps can be taken."""
    return [each for each in range(1, 9) if steps % each == 0]


# --- what was measured


def key(slots: int, shape: Shape) -> tuple[Shape, int]:
    """A plan is for all numbers of slots from a power of two down to the next one, which is not among them."""
    return shape, (slots - 1).bit_length()


def fits(plan: Plan, shape: Shape, cdna4: bool) -> bool:
    """Whether the kernels compute all of a layer of this shape by such a plan, and nothing else."""
    if not all(type(value) is int for value in (plan.rows, plan.small, *plan.first, *plan.second)):
        return False
    if plan.rows not in (16, 32, 64, 128) or plan.small not in (0, 16, 32, 64) or plan.small >= plan.rows:
        return False
    for tile, columns in zip((plan.first, plan.second), shape.columns, strict=True):
        if tile.rows not in (64, 128) or tile.columns not in ((256,) if cdna4 else (128, 256)):
            return False
        if tile.warps not in (4, 8) or tile.stages not in range(1, 6):
            return False
        if tile.parts not in divisors(columns // tile.columns):
            return False
    second, tiles = plan.second, round_up(shape.hidden, 128) // plan.second.rows
    runs = shape.narrow and not cdna4 and second.columns == 128 and second.parts == 1
    return plan.first.run == 1 and (
        second.run == 1 or (runs and second.run in range(2, 15) and tiles % second.run == 0)
    )


def versions() -> dict[str, str]:
    """Under which plans are measured: under others, kernels are others."""
    from shuffled_tensor import __version__  # which imports this

    return {"shuffled_tensor": __version__, "triton": triton.__version__}


def path(device: torch.device) -> Path:
    """Of the file of plans for all devices like this one. It need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("SHUFFLED_TENSOR_CACHE") or os.path.join(home, "shuffled_tensor")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return Path(folder) / (re.sub(r"[^\w.]+", "-", f"triton {real_arch(device)} {name}") + ".json")


def read(path: Path, cdna4: bool) -> dict[tuple[Shape, int], Plan]:
    """The plans of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, is of other versions, or has a plan that does not fit.
    """
    found = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["versions"] != versions():
            raise ValueError(f"it is of {content['versions']}, and here are {versions()}")
        for row in content["plans"]:
            shape = Shape(**row["shape"] | {"columns": tuple(row["shape"]["columns"])})
            tiles: dict[str, Any] = {which: Tile(**row["plan"][which]) for which in ("first", "second")}
            plan = Plan(**row["plan"] | tiles)
            if not fits(plan, shape, cdna4):
                raise ValueError(f"{plan} does not fit {shape}")
            found[key(row["slots"], shape)] = plan
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not as `tune` writes it: {error!r}") from error
    return found


@cache
def measured(device: torch.device) -> dict[tuple[Shape, int], Plan]:
    """The plans for a device: of its file, which is read once in a process, and since then of :mod:`measure`."""
    return _of_file(path(device), real_arch(device) == "gfx950")


@cache
def _of_file(path: Path, cdna4: bool) -> dict[tuple[Shape, int], Plan]:
    try:
        return read(path, cdna4)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("%s is ignored: %s; `python -m shuffled_tensor tune` writes it anew", path, error)
    return {}
