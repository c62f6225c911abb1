# SPDX-License-Identifier: MIT
"""One of the two weights of a layer, as its tensors lie in the files of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.source import CheckpointError, Files
from shuffled_tensor.layouts import ROW_MAJOR
from shuffled_tensor.mxfp4 import CODES, PARTS, Part
from shuffled_tensor.tensor.checksums import DIGITS, Checksums, checksum, checksums
from shuffled_tensor.tensor.geometry import RowOrder, slice_of

__all__ = ["BIAS", "Weight"]

BIAS = "bias"
"""Stands where a part of the weight would for the bias that comes with it."""

_CACHED = 2**20
"""Bytes of interleaved rows that are read at a time: parting them costs little while they are in a CPU's cache."""


@dataclass
class Weight:
    """One of the two weights of a layer, as its tensors lie in the files."""

    files: Files
    name: str
    gate_up: bool
    row_order: RowOrder | Literal["apart"] | None
    """Of gate and up rows: in one tensor, or apart in two; None where nobody has said."""
    told_order: RowOrder | None = None
    """The same, where it was said by somebody, and not by the tensors' names."""
    tensors: dict[Part | str, dict[tuple[int | None, int], str]] = field(default_factory=lambda: defaultdict(dict))
    """Names, by part, and by expert (None: one tensor holds them all) and half."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """Logical, ``[E, N, K]``."""
    dtype: torch.dtype = torch.bfloat16
    quantized: bool = True
    """Else its values are plain, of `dtype`."""
    entry: manifest.Entry | None = None
    """What the file's manifest says of it."""
    beside: Checksums | None = None
    """What the record beside the files says of it."""

    @property
    def intermediate(self) -> int:
        return self.shape[1] // 2 if self.gate_up else self.shape[2]

    @property
    def own(self) -> bool:
        """Whether its tensors are called as in our own files."""
        return any(name.removesuffix(".qdata") == self.name for name in self.tensors[CODES].values())

    def names(self) -> Iterator[str]:
        """Of all its tensors."""
        for named in self.tensors.values():
            yield from named.values()

    def read(self, part: Part | str, expert: int, span: range) -> Tensor:
        """One expert's codes (plain values where not quantised), scales or bias, row-major and gate rows first: uint8
        ``[N, K/2]`` and ``[N, K/32]``, and ``[N]``.

        ``span`` is of the intermediate dimension: rows of both halves of a w13, columns of a w2 (cut from whole rows,
        which are shorter than what a disk reads at once).

        Raises:
            CheckpointError: the bytes cannot be read.
        """
        halves, rows = (2, len(span)) if self.gate_up else (1, self.shape[1])
        columns = self.shape[2] if self.gate_up else len(span)
        shape = (halves, rows) if part == BIAS else (halves, rows, columns // self._per_byte(part))
        dtype = torch.uint8 if self._packed(part) else self.files.dtype(next(iter(self.tensors[part].values())))
        out = torch.empty(shape, dtype=dtype, device="cpu")
        self.read_into(out, part, expert, span)
        return out.flatten(0, 1)

    def read_into(self, out: Tensor, part: Part | str, expert: int, span: range) -> None:
        """:meth:`read`, with the rows of each half to be written to ``out[half]``, on the CPU."""
        if not self.gate_up:
            if part == BIAS or len(span) == self.intermediate:
                self._rows(part, expert, out=out[0])
            else:
                columns = slice_of(span, self._packed(part))
                out[0].copy_(self._rows(part, expert)[:, columns])
        elif self.row_order == "interleaved" and self._packed(part) is not None:
            stacked, row = (None, 0) in self.tensors[part], out.shape[-1]
            start = 2 * row * (span.start + (self.intermediate * expert if stacked else 0))
            name = self.tensors[part][None if stacked else expert, 0]
            self.files.read_rows(name, start, out.transpose(0, 1))
        elif self.row_order == "interleaved":
            step = max(1, _CACHED // out[:, :1].nbytes)
            for start in range(0, len(span), step):
                of = span[start : start + step]
                rows = self._rows(part, expert, rows=slice(2 * of.start, 2 * of.stop))
                out[:, start : start + step].copy_(rows.unflatten(0, (-1, 2)).transpose(0, 1))
        elif self.row_order == "apart":
            for half in (0, 1):
                self._rows(part, expert, half, slice_of(span), out=out[half])
        else:
            for half, start in enumerate((span.start, self.intermediate + span.start)):
                self._rows(part, expert, rows=slice(start, start + len(span)), out=out[half])

    @property
    def recorded(self) -> Checksums | None:
        """What its values are to be compared with."""
        return self.beside or (None if self.entry is None else self.entry.checksums)

    def expert(self, expert: int) -> list[Tensor]:
        """One expert's codes and scales, or its plain values, as :meth:`read` returns them."""
        parts = PARTS if self.quantized else PARTS[:1]
        return [self.read(part, expert, range(self.intermediate)) for part in parts]

    def checksum(self) -> str:
        """Of the logical value as it is stored."""
        return checksum(self.shape, (part for expert in range(self.shape[0]) for part in self.expert(expert)))

    def checksums(self) -> Checksums:
        """The same, and each expert's."""
        return checksums(self.shape, map(self.expert, range(self.shape[0])))

    @property
    def expected(self) -> str:
        """The checksum that a copy of it must have: the one that was noted, or that of what is stored."""
        return self.checksum() if self.recorded is None else self.recorded.whole

    def check(self, expert: int, parts: Iterable[Tensor]) -> None:
        """Raise CheckpointError where one expert's values are not those that its checksum was noted of, if it was."""
        if self.recorded is not None and self.recorded.experts is not None:
            found = checksum((1, *self.shape[1:]), parts)[:DIGITS]
            if found != self.recorded.experts[expert]:
                raise self._damaged(f"expert {expert} has", found, self.recorded.experts[expert])

    def check_whole(self, checksum: Callable[[], str]) -> None:
        """Raise CheckpointError where all values have another checksum than was noted, if it was."""
        if self.recorded is not None:
            found = checksum()
            if found != self.recorded.whole:
                raise self._damaged("its values have", found, self.recorded.whole)

    def _damaged(self, what: str, found: str, said: str) -> CheckpointError:
        where = "the manifest" if self.beside is None else manifest.BESIDE
        return CheckpointError(
            f"{self.name} in {self.files.path} is damaged: {what} checksum {found[:12]}..., {where} says {said[:12]}..."
        )

    def _packed(self, part: Part | str) -> Part | None:
        """The part as bytes, where it is quantised."""
        return part if self.quantized and isinstance(part, Part) else None

    def _per_byte(self, part: Part | str) -> int:
        packed = self._packed(part)
        return 1 if packed is None else packed.per_byte

    def _rows(
        self, part: Part | str, expert: int, half: int = 0, rows: slice = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """Rows of one tensor as plain values, or as bytes; in ``out``, where one is given."""
        stacked = (None, 0) in self.tensors[part]
        name = self.tensors[part][None if stacked else expert, half]
        index = (expert, rows) if stacked else (rows,)
        packed = self._packed(part)
        if self.entry is None or self.entry.layout is ROW_MAJOR or packed is None:
            data = self.files.read(name, *index, out=out)
            return data if data is out or packed is None else data.view(torch.uint8).flatten(1)  # blocks are 3D
        data = self.files.read(name, *index[:-1]).view(torch.uint8).unsqueeze(0)
        data = self.entry.layout.order(packed, self.gate_up).unshuffle(data)
        data = self.entry.geometry.halves_of(packed, data).flatten(0, 2)[rows]
        return data if out is None else out.copy_(data)
