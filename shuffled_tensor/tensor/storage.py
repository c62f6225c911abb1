# SPDX-License-Identifier: MIT
"""The one mutable state: packed bytes, and the layout they are in, shared by every alias of those bytes."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import (
    LAYOUTS,
    ShuffleKind,
    expert_chunks,
    round_up,
    rows_as_they_lie,
    shuffle_scale,
    shuffle_weight,
    unshuffle_scale,
    unshuffle_weight,
)
from shuffled_tensor.tensor.geometry import PAD, PER_BYTE, Geometry, Window, slice_of

__all__ = ["PackedStorage"]

_TILE_ROWS = 32

_REFIT_OPEN = "it is being written in a refit"


class PackedStorage:
    """Padded codes and scales of E experts, and the kind their bytes are in.

    Attributes:
        qdata: uint8 ``[E, padded_rows, padded_columns / 2]``.
        scale: uint8 ``[E, padded_rows, padded_columns / 32]``.
        geometry: logical and padded sizes.
        kind: the layout that the bytes are in now.
        target: the kind that the caller fixed, or None where the backend decides at first use.
        pinned: the kind in which somebody outside holds the bytes, so that it must stay; or None.
        sent: whether the memory was sent to another process.
        trouble: why the bytes must not be read as a weight now, or None.
    """

    __slots__ = (
        "__weakref__",
        "_lock",
        "geometry",
        "kind",
        "pinned",
        "qdata",
        "refit_kind",
        "scale",
        "sent",
        "target",
        "trouble",
    )

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
        self.pinned: ShuffleKind | None = None
        self.sent = False
        self.trouble: str | None = None
        self.refit_kind: ShuffleKind | None = None  # while a refit is open or was abandoned: what to return to
        self._lock = threading.RLock()  # held wherever bytes and kind must agree

    @classmethod
    def pack(
        cls, qdata: Tensor, scale: Tensor, *, gate_up: bool, interleaved: bool, target: ShuffleKind | None
    ) -> PackedStorage:
        """From logical row-major uint8 ``[E, N, K/2]`` and ``[E, N, K/32]``. Takes the tensors over where nothing needs
        padding or reordering."""
        geometry = Geometry(qdata.shape[1], qdata.shape[2] * 2, gate_up)
        if interleaved or geometry.padded:
            return cls(
                geometry.pad(qdata, 0, interleaved=interleaved),
                geometry.pad(scale, PAD["scale"], interleaved=interleaved),
                geometry,
                target=target,
            )
        # kernels and 16-byte moves need aligned, contiguous bytes; a tensor out of a safetensors file is often neither
        qdata, scale = (
            data.contiguous() if data.storage_offset() % 16 == 0 else data.clone(memory_format=torch.contiguous_format)
            for data in (qdata, scale)
        )
        return cls(qdata, scale, geometry, target=target)

    @classmethod
    def empty(cls, experts: int, geometry: Geometry, device: torch.device, kind: ShuffleKind) -> PackedStorage:
        """Bytes that are to be written whole; none has a value yet but the pads of row-major ones."""
        shape = experts, geometry.padded_rows
        qdata, scale = (
            torch.empty(*shape, geometry.padded_columns // per_byte, dtype=torch.uint8, device=device)
            for per_byte in PER_BYTE.values()
        )
        storage = cls(qdata, scale, geometry, kind)
        if kind is ShuffleKind.NONE:  # in any other layout they are written with the rest
            storage._rewrite_pads()
        return storage

    def with_bytes(self, qdata: Tensor, scale: Tensor) -> PackedStorage:
        """Other bytes in the same layout: a copy, another device, some of the experts."""
        return PackedStorage(qdata, scale, self.geometry, self.kind, self.target)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedStorage:
        with self.held():
            copied = memo[id(self)] = self.with_bytes(self.qdata.clone(), self.scale.clone())
        return copied

    def relayout_(self, kind: ShuffleKind) -> None:
        """Bring the bytes into ``kind``, in place, once, whatever number of threads ask.

        Raises:
            RuntimeError: the layout is pinned, or a CUDA graph is being captured, which would replay the change.
        """
        with self._lock:
            self.check_readable()
            if kind is self.kind:
                return
            if self.pinned not in (None, kind):
                raise RuntimeError(
                    f"the bytes were handed out by as_kernel_operands() laid out as {self.pinned.value!r}, so "
                    "they cannot "
                    f"be brought into {kind.value!r} under their holder; clone() the tensor"
                )
            gate_up = self.geometry.gate_up
            if LAYOUTS.get((self.kind, gate_up)) is LAYOUTS.get((kind, gate_up)):
                self.kind = kind
            else:
                self._permute_(kind)

    def _permute_(self, kind: ShuffleKind) -> None:
        on_gpu = is_real(self.qdata) and self.qdata.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a weight would be laid out anew ({self.kind.value!r} to {kind.value!r}) while a CUDA graph is being "
                "captured, and again at every replay; call shuffled_tensor.prepare(module) before the capture"
            )
        gate_up = self.geometry.gate_up
        self.trouble = f"changing its layout from {self.kind.value!r} to {kind.value!r} was interrupted"
        # A weight made inside a traced function is laid out anew in its graph, which the tracer must see.
        outside_modes = _disable_current_modes() if is_real(self.qdata) else nullcontext()
        with outside_modes, torch.no_grad(), torch.inference_mode(self.qdata.is_inference()):
            if on_gpu:  # kernels of other streams may still be reading the bytes
                torch.cuda.synchronize(self.qdata.device)
            # what another process may be reading is left as it is, and replaced
            replace = self.is_shared()
            qdata, scale = (torch.empty_like(data) if replace else data for data in (self.qdata, self.scale))
            unshuffle_weight(self.qdata, self.kind, gate_up=gate_up, out=qdata)
            unshuffle_scale(self.scale, self.kind, gate_up=gate_up, out=scale)
            self.qdata = shuffle_weight(qdata, kind, gate_up=gate_up, out=qdata)
            self.scale = shuffle_scale(scale, kind, gate_up=gate_up, out=scale)
            if on_gpu:  # and others will read them as soon as this returns
                torch.cuda.synchronize(self.qdata.device)
        self.kind, self.sent = kind, False
        self.trouble = None

    def is_shared(self) -> bool:
        """Whether another process may hold this memory, so that a change of layout must replace it."""
        return self.sent or any(data.device.type == "cpu" and data.is_shared() for data in (self.qdata, self.scale))

    def check_refit(self) -> None:
        """Raise RuntimeError where :meth:`open_refit` could not open one."""
        if self.trouble == _REFIT_OPEN:
            raise RuntimeError("a refit of this weight is open already")
        if self.refit_kind is None:
            self.check_readable()
            if self.is_shared() and self.kind is not ShuffleKind.NONE:
                raise RuntimeError(
                    "another process may hold these bytes as they lie, so they cannot be refitted in place; write "
                    "them with copy_ or load_state_dict"
                )

    def open_refit(self) -> None:
        """Make the bytes row-major, where they are, for others to write; until the refit ends they are no weight."""
        with self._lock:
            self.check_refit()
            if self.refit_kind is None:
                before = self.kind
                if before is not ShuffleKind.NONE:
                    self._permute_(ShuffleKind.NONE)
                self.refit_kind = before
            self.trouble = _REFIT_OPEN

    def close_refit(self) -> None:
        """Take the row-major bytes for the new values, with their pads, and lay them out as they were before."""
        with self._lock:
            self._recover()

    def abandon_refit(self, error: BaseException) -> None:
        """Leave the bytes row-major and unusable: some may be new and some old."""
        self.trouble = f"a refit ended early ({type(error).__name__}), and its bytes may be partly old and partly new"

    def assume(self, kind: ShuffleKind) -> None:
        """Believe the caller that the bytes are a weight laid out as ``kind``."""
        with self._lock:
            if self.trouble == _REFIT_OPEN:
                raise RuntimeError("a refit is open, and says what the bytes are when it ends")
            self.kind = kind
            if kind is not ShuffleKind.NONE:
                self.refit_kind = None
            self._recover()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else lays the bytes out anew or writes them meanwhile."""
        with self._lock:
            self.check_readable()
            yield

    @contextmanager
    def writing(self, whole: bool = False) -> Iterator[None]:
        """Hold the bytes for a write; ``whole`` says that it leaves nothing as it was, so that what was wrong before is
        over. An exception inside leaves them unusable."""
        # bytes made in inference mode are written in it, wherever the writer is
        with self._lock, torch.no_grad(), torch.inference_mode(self.qdata.is_inference()):
            before, self.trouble = self.trouble, self.trouble or "writing to it was interrupted"
            yield
            self.trouble = before
            if whole and before not in (None, _REFIT_OPEN):
                self._recover()

    def _recover(self) -> None:
        """The bytes are a weight in `kind` again; bring them into the kind that they should have."""
        if self.kind is ShuffleKind.NONE:
            self._rewrite_pads()
        self.trouble = None
        kind = self.refit_kind or self.pinned
        if kind is not None:
            self.relayout_(kind)
        self.refit_kind = None

    def check_readable(self) -> None:
        """Raise RuntimeError where the bytes are not a weight: while a refit writes them, and after one failed."""
        if self.trouble is not None:
            with self._lock:  # another thread may just be changing the layout
                trouble = self.trouble
            if trouble is not None:
                raise RuntimeError(
                    f"this weight cannot be used: {trouble}; "
                    + (
                        "wait until that ends"
                        if trouble == _REFIT_OPEN
                        else "write it whole, with load_state_dict, copy_ or another refit, or say what its bytes are "
                        "with mark_canonical_() or mark_shuffled_(kind)"
                    )
                )

    def check_usable_as(self, kind: ShuffleKind) -> None:
        """Raise ValueError where a reader of ``kind`` meets a weight that was made for another one."""
        if self.target not in (None, kind):
            raise ValueError(
                f"the weight was made for shuffle_kind={self.target.value!r}, but what is installed here reads "
                f"{kind.value!r}; make it without a shuffle_kind, call shuffle_({kind.value!r}), or ask for "
                "backend='reference'"
            )

    def select(self, experts: range) -> tuple[Tensor, Tensor]:
        """Codes and scales of some experts, as they lie: views."""
        if len(experts) == self.qdata.shape[0]:
            return self.qdata, self.scale
        window = slice(experts.start, experts.stop, experts.step)
        return self.qdata[window], self.scale[window]

    def canonical(self, experts: range) -> tuple[Tensor, Tensor]:
        """Row-major logical codes ``[len, N, K/2]`` and scales ``[len, N, K/32]`` of some experts, in memory of their
        own."""
        qdata, scale = self.halves(experts, range(self.geometry.rows // self.geometry.halves))
        return qdata.flatten(1, 2), scale.flatten(1, 2)

    def halves(self, experts: range, rows: range) -> tuple[Tensor, Tensor]:
        """The same rows of each half of some experts: row-major logical codes ``[len, halves, rows, K/2]`` and scales,
        in memory of their own. Only the tiles that hold them are unshuffled."""
        gate_up, halves = self.geometry.gate_up, self.geometry.halves
        tiles = range(rows.start // _TILE_ROWS * _TILE_ROWS, round_up(rows.stop, _TILE_ROWS))
        with self.held():
            qdata, scale = (
                rows_as_they_lie(data, self.kind, gate_up=gate_up, rows=tiles).contiguous()
                for data in self.select(experts)
            )
            qdata = unshuffle_weight(qdata, self.kind, gate_up=gate_up)
            scale = unshuffle_scale(scale, self.kind, gate_up=gate_up)
        own = slice(rows.start - tiles.start, rows.stop - tiles.start)
        qdata, scale = (
            data.unflatten(1, (halves, len(tiles)))[:, :, own, : self.geometry.columns // per_byte]
            for data, per_byte in zip((qdata, scale), PER_BYTE.values(), strict=True)
        )
        return qdata, scale

    def whole_rows(self, window: Window) -> bool:
        """Whether a window takes experts alone apart, not their rows and columns."""
        return window.shape[1:] == (self.geometry.rows, self.geometry.columns)

    def whole(self, experts: range) -> Window:
        """The window of all rows and columns of some experts."""
        return Window(experts, range(self.geometry.rows), range(self.geometry.columns))

    def read(self, window: Window) -> tuple[Tensor, Tensor]:
        """Row-major logical codes ``[len, rows, columns / 2]`` and scales ``[len, rows, columns / 32]`` of a window."""
        each = self.geometry.rows // self.geometry.halves
        half = min(window.rows.start // each, self.geometry.halves - 1)
        first, last = window.rows.start - half * each, window.rows.stop - half * each
        if last <= each:
            parts = (data[:, half] for data in self.halves(window.experts, range(first, last)))
        else:
            parts = (data[:, slice_of(window.rows)] for data in self.canonical(window.experts))
        qdata, scale = (
            data[..., slice_of(window.columns, per_byte)]
            for data, per_byte in zip(parts, PER_BYTE.values(), strict=True)
        )
        return qdata, scale

    def write(self, window: Window, qdata: Tensor | None, scale: Tensor | None) -> None:
        """Write logical row-major codes, scales or both over a window, in whatever layout it lies, with its pads."""
        with self.writing():
            self._write_part(window, self.qdata, qdata, 0, PER_BYTE["qdata"], shuffle_weight, unshuffle_weight)
            self._write_part(window, self.scale, scale, PAD["scale"], PER_BYTE["scale"], shuffle_scale, unshuffle_scale)

    def _write_part(
        self,
        window: Window,
        own: Tensor,
        values: Tensor | None,
        fill: int,
        per_byte: int,
        shuffle: Callable[..., Tensor],
        unshuffle: Callable[..., Tensor],
    ) -> None:
        if values is None:
            return
        values = values.to(own.device)
        columns = slice_of(window.columns, per_byte)
        layout: dict[str, Any] = {"kind": self.kind, "gate_up": self.geometry.gate_up}
        for place, experts in self.chunks(window.experts):
            target = own[slice_of(experts)]
            if self.kind is ShuffleKind.NONE and not (self.whole_rows(window) and self.geometry.padded):
                self.geometry.put(target, values[place], window.rows, columns)
            elif self.whole_rows(window):
                target.copy_(shuffle(self.geometry.pad(values[place], fill), **layout))
            else:  # what is not written stays
                around = unshuffle(target.contiguous(), **layout)
                self.geometry.put(around, values[place], window.rows, columns)
                target.copy_(shuffle(around, **layout))

    def _rewrite_pads(self) -> None:
        """Give the pads of canonical bytes, which somebody else wrote, the values they are defined to have."""
        with torch.no_grad(), torch.inference_mode(self.qdata.is_inference()):
            for data, fill in ((self.qdata, 0), (self.scale, PAD["scale"])):
                rows, logical_bytes = self.geometry.halves_of(data).shape[2:]
                halves = data.unflatten(1, (self.geometry.halves, -1))
                halves[:, :, rows:] = fill
                halves[..., logical_bytes:] = fill

    def chunks(self, experts: range) -> Iterator[tuple[slice, range]]:
        """Parts of a window small enough that a float32 copy of one is bounded scratch: the part's place in the window,
        and its experts."""
        for place in expert_chunks(len(experts), 4 * self.geometry.rows * self.geometry.columns):
            yield place, experts[place]

    def dequantize(self, window: Window, dtype: torch.dtype) -> Tensor:
        """Logical values ``[len, rows, columns]``."""
        out = torch.empty(window.shape, dtype=dtype, device=self.qdata.device)
        for place, experts in self.chunks(window.experts):
            out[place] = mxfp4.dequantize(*self.read(window._replace(experts=experts)), dtype)
        return out

    def checksum(self, window: Window) -> str:
        """SHA-256, in hex, over the logical sizes and, expert by expert, the row-major logical codes and scales."""
        experts = (window._replace(experts=range(expert, expert + 1)) for expert in window.experts)
        return checksum(window.shape, (data for expert in experts for data in self.read(expert)))


def checksum(shape: tuple[int, ...], parts: Iterable[Tensor]) -> str:
    """SHA-256, in hex, of logical sizes and, expert by expert, row-major logical codes and scales."""
    digest = hashlib.sha256(f"mxfp4 {'x'.join(map(str, shape))}".encode())
    for data in parts:
        data = data.contiguous().cpu()
        digest.update(ctypes.string_at(data.data_ptr(), data.nbytes))
    return digest.hexdigest()


@contextmanager
def locked(*storages: PackedStorage) -> Iterator[None]:
    """Take several locks, in one order, so that no two threads wait for each other."""
    with ExitStack() as stack:
        for storage in sorted(storages, key=id):
            stack.enter_context(storage._lock)
        yield


def is_real(data: Tensor) -> bool:
    """Whether there are bytes behind a tensor: not where a compiler traces with fake ones, nor on the meta device."""
    return type(data) is Tensor and data.device.type != "meta"
