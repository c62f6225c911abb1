# SPDX-License-Identifier: MIT
"""Checkpoints that are damaged: on the disk, or in memory on their way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shuffled_tensor.checkpoint.source import Files


def flip(path: Path, tensor: str, value: int | None = None) -> None:
    """Change the first byte of a tensor, in a file or in whichever file of a folder holds it."""
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        data = bytearray(file.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        if tensor in header or not path.is_dir():
            start = end + header[tensor]["data_offsets"][0]
            data[start] = data[start] ^ 1 if value is None else value
            file.write_bytes(data)


def flip_when_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the first byte of a tensor in memory, once, when it is read for the first time."""
    fill, flipped = Files._fill, []

    def flipping(self: Files, data: Tensor, tensor: str, start: int) -> None:
        fill(self, data, tensor, start)
        if tensor == name and not flipped:
            flipped.append(tensor)
            data.view(torch.uint8).view(-1)[0] ^= 1

    monkeypatch.setattr(Files, "_fill", flipping)
