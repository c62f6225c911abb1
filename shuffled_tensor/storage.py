# SPDX-License-Identifier: MIT
"""The one mutable state: packed bytes, and the layout they are in, shared by every alias of those bytes."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import (
    LAYOUTS,
    ShuffleKind,
    expert_chunks,
    round_up,
    shuffle_scale,
    shuffle_weight,
    unshuffle_scale,
    unshuffle_weight,
)

__all__ = ["Geometry", "PackedStorage"]

PADDING = 256
"""Rows (of each gate and up half) and columns are padded to multiples of this, as ATOM does, so that the w13 and w2 of
one layer agree on both."""

_PAD_SCALE = 127  # 1.0; the codes of a pad are zero

_PINNED = (
    "the bytes were handed out by as_kernel_operands() laid out as {!r}, so they cannot be brought into {!r} "
    "under their "
    "holder; clone() the tensor"
)


class Geometry(NamedTuple):
    """Logical and padded sizes of one expert: ``rows`` is N and ``columns`` K, both logical."""

    rows: int
    columns: int
    gate_up: bool

    @property
    def halves(self) -> int:
        return 2 if self.gate_up else 1

    @property
    def padded_rows(self) -> int:
        return self.halves * round_up(self.rows // self.halves, PADDING)

    @property
    def padded_columns(self) -> int:
        return round_up(self.columns, PADDING)

    def halves_of(self, packed: Tensor) -> Tensor:
        """The logical part of row-major padded codes or scales ``[E, padded_rows, bytes]``: a view ``[E, halves, rows /
        halves, logical bytes]``."""
        logical_bytes = self.columns * packed.shape[-1] // self.padded_columns
        halves: Tensor = packed.unflatten(1, (self.halves, -1))
        return halves[:, :, : self.rows // self.halves, :logical_bytes]

    def pad(self, logical: Tensor, fill: int, *, interleaved: bool = False) -> Tensor:
        """Codes or scales ``[E, rows, bytes]`` in a new, row-major ``[E, padded_rows, padded bytes]``; ``interleaved``
        rows (g0, u0, g1, ...) are parted."""
        padded_bytes = logical.shape[-1] * self.padded_columns // self.columns
        padded = logical.new_full((len(logical), self.padded_rows, padded_bytes), fill)
        halves = (
            logical.unflatten(1, (-1, 2)).transpose(1, 2) if interleaved else logical.unflatten(1, (self.halves, -1))
        )
        self.halves_of(padded).copy_(halves)
        return padded


class PackedStorage:
    """Padded codes and scales of E experts, and the kind their bytes are in.

    Attributes:
        qdata: uint8 ``[E, padded_rows, padded_columns / 2]``.
        scale: uint8 ``[E, padded_rows, padded_columns / 32]``.
        geometry: logical and padded sizes.
        kind: the layout that the bytes are in now.
        target: the kind that the caller fixed, or None where the backend decides at first use.
        pinned: whether somebody outside holds the bytes as they lie, so that their layout must stay.
    """

    __slots__ = ("__weakref__", "geometry", "kind", "pinned", "qdata", "scale", "target")

    # One lock for all: a change of layout is rare and saturates the memory system by itself.
    _lock = threading.RLock()

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        geometry: Geometry,
        kind: ShuffleKind = ShuffleKind.NONE,
        target: ShuffleKind | None = None,
    ) -> None:
        self.qdata = qdata
        self.scale = scale
        self.geometry = geometry
        self.kind = kind
        self.target = target
        self.pinned = False

    @classmethod
    def pack(
        cls, qdata: Tensor, scale: Tensor, *, gate_up: bool, interleaved: bool, target: ShuffleKind | None
    ) -> PackedStorage:
        """From logical row-major uint8 ``[E, N, K/2]`` and ``[E, N, K/32]``. Takes the tensors over where nothing needs
        padding or reordering."""
        geometry = Geometry(qdata.shape[1], qdata.shape[2] * 2, gate_up)
        if interleaved or (geometry.padded_rows, geometry.padded_columns) != (geometry.rows, geometry.columns):
            return cls(
                geometry.pad(qdata, 0, interleaved=interleaved),
                geometry.pad(scale, _PAD_SCALE, interleaved=interleaved),
                geometry,
                target=target,
            )
        # kernels and 16-byte moves need aligned, contiguous bytes; a tensor out of a safetensors file is often neither
        qdata, scale = (
            data.contiguous() if data.storage_offset() % 16 == 0 else data.clone(memory_format=torch.contiguous_format)
            for data in (qdata, scale)
        )
        return cls(qdata, scale, geometry, target=target)

    def with_bytes(self, qdata: Tensor, scale: Tensor) -> PackedStorage:
        """Other bytes in the same layout: a copy, another device, some of the experts."""
        return PackedStorage(qdata, scale, self.geometry, self.kind, self.target)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedStorage:
        copied = memo[id(self)] = self.with_bytes(self.qdata.clone(), self.scale.clone())
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # What is written is canonical and without padding, whatever the layout in memory: a file does not depend on a
        # GPU or on a version of aiter.
        qdata, scale = self.canonical(range(len(self.qdata)))
        return _unpickle, (qdata, scale, self.geometry.gate_up, None if self.target is None else self.target.value)

    def relayout_(self, kind: ShuffleKind) -> None:
        """Bring the bytes into ``kind``, in place, once, whatever number of threads ask.

        Raises:
            RuntimeError: the layout is pinned, or a CUDA graph is being captured, which would replay the change.
        """
        with self._lock:
            if kind is self.kind:
                return
            gate_up = self.geometry.gate_up
            if LAYOUTS.get((self.kind, gate_up)) is not LAYOUTS.get((kind, gate_up)):
                self._permute_(kind)
            elif self.pinned:
                raise RuntimeError(_PINNED.format(self.kind.value, kind.value))
            self.kind = kind

    def _permute_(self, kind: ShuffleKind) -> None:
        if self.pinned:
            raise RuntimeError(_PINNED.format(self.kind.value, kind.value))
        on_gpu = is_real(self.qdata) and self.qdata.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a weight would be laid out anew ({self.kind.value!r} to {kind.value!r}) while a CUDA graph is being "
                "captured, and again at every replay; call shuffled_tensor.prepare(module) before the capture"
            )
        gate_up = self.geometry.gate_up
        with _disable_current_modes(), torch.no_grad(), torch.inference_mode(self.qdata.is_inference()):
            if on_gpu:  # kernels of other streams may still be reading the bytes
                torch.cuda.synchronize(self.qdata.device)
            qdata, scale = self._owned(self.qdata), self._owned(self.scale)
            unshuffle_weight(self.qdata, self.kind, gate_up=gate_up, out=qdata)
            unshuffle_scale(self.scale, self.kind, gate_up=gate_up, out=scale)
            self.qdata = shuffle_weight(qdata, kind, gate_up=gate_up, out=qdata)
            self.scale = shuffle_scale(scale, kind, gate_up=gate_up, out=scale)
            if on_gpu:  # and others will read them as soon as this returns
                torch.cuda.synchronize(self.qdata.device)

    def check_usable_as(self, kind: ShuffleKind) -> None:
        """Raise ValueError where a reader of ``kind`` meets a weight that was made for another one."""
        if self.target not in (None, kind):
            raise ValueError(
                f"the weight was made for shuffle_kind={self.target.value!r}, but what is installed here reads "
                f"{kind.value!r}; make it without a shuffle_kind, call shuffle_({kind.value!r}), or ask for "
                "backend='reference'"
            )

    @staticmethod
    def _owned(data: Tensor) -> Tensor:
        # Another process may be reading shared memory: it is left as it is, and replaced.
        return torch.empty_like(data) if data.device.type == "cpu" and data.is_shared() else data

    def select(self, experts: range) -> tuple[Tensor, Tensor]:
        """Codes and scales of some experts, as they lie: views."""
        if len(experts) == self.qdata.shape[0]:
            return self.qdata, self.scale
        window = slice(experts.start, experts.stop, experts.step)
        return self.qdata[window], self.scale[window]

    def canonical(self, experts: range) -> tuple[Tensor, Tensor]:
        """Row-major logical codes ``[len, N, K/2]`` and scales ``[len, N, K/32]`` of some experts, in memory of their
        own."""
        gate_up = self.geometry.gate_up
        qdata, scale = (data.contiguous() for data in self.select(experts))
        qdata = unshuffle_weight(qdata, self.kind, gate_up=gate_up)
        scale = unshuffle_scale(scale, self.kind, gate_up=gate_up)
        return self.geometry.halves_of(qdata).flatten(1, 2), self.geometry.halves_of(scale).flatten(1, 2)

    def write(self, experts: range, qdata: Tensor, scale: Tensor) -> None:
        """Write logical row-major codes and scales over some experts, in whatever layout they lie; pads are written
        too."""
        gate_up = self.geometry.gate_up
        own_qdata, own_scale = self.select(experts)
        own_qdata.copy_(shuffle_weight(self.geometry.pad(qdata, 0), self.kind, gate_up=gate_up))
        own_scale.copy_(shuffle_scale(self.geometry.pad(scale, _PAD_SCALE), self.kind, gate_up=gate_up))

    def chunks(self, experts: range) -> Iterator[tuple[slice, range]]:
        """Parts of a window small enough that a float32 copy of one is bounded scratch: the part's place in the window,
        and its experts."""
        for place in expert_chunks(len(experts), 4 * self.geometry.rows * self.geometry.columns):
            yield place, experts[place]

    def dequantize(self, experts: range, dtype: torch.dtype) -> Tensor:
        """Logical values ``[len, N, K]``."""
        out = torch.empty(
            len(experts), self.geometry.rows, self.geometry.columns, dtype=dtype, device=self.qdata.device
        )
        for place, part in self.chunks(experts):
            out[place] = mxfp4.dequantize(*self.canonical(part), dtype)
        return out

    def checksum(self, experts: range) -> str:
        """SHA-256, in hex, over the logical sizes and, expert by expert, the row-major logical codes and scales."""
        digest = hashlib.sha256(f"mxfp4 {len(experts)}x{self.geometry.rows}x{self.geometry.columns}".encode())
        for expert in experts:
            for data in self.canonical(range(expert, expert + 1)):
                data = data.contiguous().cpu()
                digest.update(ctypes.string_at(data.data_ptr(), data.nbytes))
        return digest.hexdigest()


def _unpickle(qdata: Tensor, scale: Tensor, gate_up: bool, target: str | None) -> PackedStorage:
    return PackedStorage.pack(
        qdata, scale, gate_up=gate_up, interleaved=False, target=None if target is None else ShuffleKind(target)
    )


torch.serialization.add_safe_globals([_unpickle])


def is_real(data: Tensor) -> bool:
    """Whether there are bytes behind a tensor: not where a compiler traces with fake ones, nor on the meta device."""
    return type(data) is Tensor and data.device.type != "meta"
