# SPDX-License-Identifier: MIT
"""What a checkpoint holds, and whether it is what it says: ``python -m shuffled_tensor inspect`` and ``verify``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from shuffled_tensor.checkpoint.names import (
    FormatName,
    check_layer,
    detect,
    formats_in,
    group_layers,
    is_shared,
    manifest_weights,
    unknown_tensors,
)
from shuffled_tensor.checkpoint.progress import progress
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.layouts import ROW_MAJOR
from shuffled_tensor.tensor.checksums import checksums
from shuffled_tensor.tensor.geometry import RowOrder, ShardDim, shard_range

__all__ = ["Finding", "in_words", "inspect", "shares", "shares_in_words", "table"]


@dataclass(frozen=True)
class Finding:
    """What was found of one weight, or of a layer whose tensors do not fit each other."""

    name: str
    format: str
    shape: tuple[int, ...]
    """Logical."""
    layout: str
    nbytes: int
    """Of its tensors in the files, its bias among them."""
    scales: str
    """The least and the greatest, as powers of two; empty where nothing was read."""
    checksum: str
    """Of the logical value: as it was read, or what the file says where nothing was."""
    recorded: bool
    """Whether the file has a checksum to compare with."""
    problems: tuple[str, ...]
    intermediate: int = 0
    """Of the layer, that ranks part; 0 where nothing was made out."""


def inspect(
    path: str | os.PathLike[str],
    *,
    format: FormatName = "auto",
    row_order: RowOrder | None = None,
    read: bool = False,
) -> list[Finding]:
    """Look at every MXFP4 weight of a checkpoint, layers in the order of their numbers.

    Args:
        path, format, row_order: as :func:`load_experts` takes them; weights that a manifest describes are found
            whatever they are called.
        read: read them too, expert by expert, and compare them with what the files say of them. Else only headers are
            read, which takes seconds for terabytes.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: the files or their names cannot be made sense of.
    """
    with Files(path) as files:
        weights = {name: ("shuffled_tensor", weight) for name, weight in manifest_weights(files).items()}
        findings = []
        formats: list[str] = list(formats_in(files)) if format == "auto" else [format]
        if not formats and not weights:
            detect(files)  # says what it looked for
        grouped = {found: group_layers(files, "", found, row_order) for found in formats}
        together = [layer for layers in grouped.values() for layer in layers.items()]
        for name, problem in unknown_tensors(files, together, "", format).items():
            findings.append(Finding(name, "unknown", (), "", 0, "", "", False, (problem,)))
        for found, layers in grouped.items():
            for name, parts in layers.items():
                try:
                    layer = check_layer(name, parts)
                except CheckpointError as error:
                    findings.append(Finding(name, found, (), "", 0, "", "", False, (str(error),)))
                else:
                    weights = {weight.name: (found, weight) for weight in layer} | weights
        if not read:
            findings += [_finding(format, weight) for format, weight in weights.values()]
        else:
            total = sum(weight.shape[0] for _, weight in weights.values())
            with progress("reading experts", total, "experts") as done:
                findings += [_read(format, weight, done) for format, weight in weights.values()]
        return sorted(findings, key=lambda finding: _in_order(finding.name.rpartition(".")[0]))


def _in_order(name: str) -> list[tuple[bool, str | int]]:
    """Numbers in a name as numbers: layer 9 comes before layer 10."""
    return [(piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in re.split(r"(\d+)", name)]


def _finding(format: str, weight: Weight) -> Finding:
    """By what headers say."""
    entry = weight.entry
    return Finding(
        weight.name,
        format,
        weight.shape if entry is None else entry.shape,
        _layout(weight),
        sum(weight.files.stored(name)[2] for name in weight.names()),
        "",
        "" if weight.recorded is None else weight.recorded.whole,
        weight.recorded is not None,
        (),
        weight.intermediate,
    )


def _read(format: str, weight: Weight, done: Callable[[int], object]) -> Finding:
    counts = torch.zeros(256, dtype=torch.int64, device="cpu")  # of scale bytes

    def experts() -> Iterator[list[Tensor]]:
        for expert in range(weight.shape[0]):
            parts = weight.expert(expert)
            if weight.quantized:
                counts.add_(torch.bincount(parts[1].flatten(), minlength=256))
            yield parts
            done(1)

    found, said = checksums(weight.shape, experts()), weight.recorded
    exponents = (counts[:255].nonzero().flatten() - 127).tolist()
    problems = []
    if counts[255]:
        problems.append(f"{counts[255]} scales are NaN (255)")
    if said is not None and (said.whole != found.whole or said.experts not in (None, found.experts)):
        pairs = enumerate(zip(said.experts or (), found.experts or (), strict=False))
        damaged = ", ".join(str(expert) for expert, (noted, own) in pairs if noted != own)
        which = f" in experts {damaged}" if damaged else ""
        problems.append(f"damaged{which}: it was written with checksum {said.whole[:12]}")
    scales = f"2^{exponents[0]}..2^{exponents[-1]}" if exponents else ""
    return replace(_finding(format, weight), scales=scales, checksum=found.whole, problems=tuple(problems))


def _layout(weight: Weight) -> str:
    if not weight.quantized:
        return f"plain {str(weight.dtype).removeprefix('torch.')}"
    if weight.entry is None or weight.entry.layout is ROW_MAJOR:
        return "canonical"
    return weight.entry.layout.name


def table(findings: list[Finding]) -> str:
    """The findings as lines of text, a weight each, and one for all; columns in which nothing is said are left out."""
    rows = [("tensor", "format", "shape", "layout", "size", "scales", "checksum", "problems")]
    for finding in findings:
        nothing = "none" if finding.recorded else "none (no checksum in the file)"
        rows.append(
            (
                finding.name,
                finding.format,
                "x".join(map(str, finding.shape)),
                finding.layout,
                in_words(finding.nbytes) if finding.nbytes else "",
                finding.scales,
                finding.checksum[:12],
                "; ".join(finding.problems) or nothing,
            )
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    layers = len({finding.name.rpartition(".")[0] for finding in findings})
    total = in_words(sum(finding.nbytes for finding in findings))
    return "\n".join([*lines, f"weights: {len(findings)}, layers: {layers}, size: {total}"])


def shares(findings: list[Finding], ranks: int) -> dict[ShardDim, list[int] | str]:
    """How many bytes of these each of so many ranks would hold, by the dimension that they share, or why that cannot
    be."""
    found: dict[ShardDim, list[int] | str] = {}
    for dim in get_args(ShardDim):
        held = [0.0] * ranks
        try:
            for finding in (finding for finding in findings if finding.shape):
                size = math.prod(finding.shape[:-2]) if dim == "expert" else finding.intermediate
                whole = is_shared(finding.name.rpartition(".")[0]) and dim == "expert"
                for rank in range(ranks):
                    part = size if whole else len(shard_range(size, rank, ranks, dim))
                    held[rank] += finding.nbytes * part / size
        except ValueError as error:
            found[dim] = f"{finding.name}: {error}"
        else:
            found[dim] = list(map(int, held))
    return found


def shares_in_words(shares: dict[ShardDim, list[int] | str], ranks: int) -> str:
    """The same as text, a line for each dimension."""
    lines = []
    for dim, held in shares.items():
        if isinstance(held, str):
            said = held
        elif min(held) < max(held):
            said = f"{in_words(min(held))} to {in_words(max(held))} each"
        else:
            said = f"{in_words(held[0])} each"
        lines.append(f"{ranks} ranks by {dim}: {said}")
    return "\n".join(lines)


def in_words(nbytes: int) -> str:
    """A number of bytes, as people say it."""
    unit, name = next((each for each in ((2**30, "GiB"), (2**20, "MiB")) if nbytes >= each[0]), (2**10, "KiB"))
    return f"{nbytes / unit:.1f} {name}"
