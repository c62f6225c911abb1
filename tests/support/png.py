# SPDX-License-Identifier: MIT
"""PNG files, read back."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

_PREDICTED: list[Callable[[int, int, int], int]] = [  # from the bytes to the left, above, and above to the left
    lambda a, b, c: 0,
    lambda a, b, c: a,
    lambda a, b, c: b,
    lambda a, b, c: (a + b) // 2,
    lambda a, b, c: min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2],
]


def pixels(png: bytes) -> list[list[tuple[int, int, int]]]:
    """Lines of red, green and blue, from 0 to 255, of a file with eight bits each and opacity."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, start = [], 8
    while start < len(png):
        (size,) = struct.unpack(">I", png[start : start + 4])
        name, data = png[start + 4 : start + 8], png[start + 8 : start + 8 + size]
        assert struct.unpack(">I", png[start + 8 + size : start + 12 + size]) == (zlib.crc32(name + data),)
        chunks.append((name, data))
        start += 12 + size
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    assert kind == [8, 6, 0, 0, 0]
    packed = zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT"))
    stride, found = 4 * width, []
    above = bytes(stride + 4)  # a pixel of nothing to the left
    for line in range(height):
        predict, *filtered = packed[line * (stride + 1) : (line + 1) * (stride + 1)]
        own = bytearray(4)
        for i, byte in enumerate(filtered):
            own.append((byte + _PREDICTED[predict](own[i], above[i + 4], above[i])) % 256)
        above = bytes(own)
        found.append([(own[i], own[i + 1], own[i + 2]) for i in range(4, stride + 4, 4)])
    return found
