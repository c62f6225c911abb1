# SPDX-License-Identifier: MIT
"""A dense layer with one weight ``[N, K]``, on activations as they come or rounded to MXFP4.

``shuffled_tensor::linear_mxfp4`` takes our tensor; dispatch lowers it to ``shuffled_tensor::linear_mxfp4_packed``,
which takes plain tensors and how they lie, as the operators of :mod:`shuffled_tensor.moe.op` do.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.backends.aiter import gemm, versions
from shuffled_tensor.device import arch
from shuffled_tensor.layouts import find_layout
from shuffled_tensor.moe.call import PackedWeight
from shuffled_tensor.mxfp4 import CODES, SCALE_RULES, SCALES, ScaleRule
from shuffled_tensor.operators import LIBRARY, implement
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.checks import check_plain
from shuffled_tensor.tensor.geometry import Geometry
from shuffled_tensor.tensor.storage import PackedStorage, reading
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["linear"]

_log = logging.getLogger("shuffled_tensor")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LIBRARY.define("linear_mxfp4(Tensor x, Tensor w, Tensor? bias=None, str? scale_rule=None) -> Tensor")
LIBRARY.define(
    "linear_mxfp4_packed(Tensor x, Tensor w_qdata, Tensor w_scale, str w_layout, int w_rows, int w_columns, "
    "bool w_gate_up, Tensor? bias=None, str? scale_rule=None) -> Tensor"
)


def linear(
    x: Tensor,
    w: ShuffledMXFP4Tensor,
    bias: Tensor | None = None,
    *,
    activation_dtype: Literal["mxfp4"] | None = None,
    scale_rule: ScaleRule | None = None,
) -> Tensor:
    """A dense layer, ``x @ w.T + bias``.

    Args:
        x: ``[..., K]``; with ``activation_dtype="mxfp4"`` bfloat16, float16 or float32.
        w: ``[N, K]``: a dense layer's weight, or one expert, ``w[e]``.
        bias: floating point ``[N]``; of a ``gate_up`` weight gate, then up.
        activation_dtype: None computes on activations as they come: it is ``torch.nn.functional.linear(x, w, bias)``.
            ``"mxfp4"`` rounds them to MXFP4 first, which on a gfx950 GPU makes it a call of aiter's kernels, and
            elsewhere one of plain torch with products accumulated in float32.
        scale_rule: one of :data:`shuffled_tensor.SCALE_RULES` for ``activation_dtype="mxfp4"``; by default that of the
            kernels, or ``"even"`` where there are none.

    Returns:
        ``[..., N]``, with ``activation_dtype="mxfp4"`` of the dtype of ``x``. Through MXFP4 activations there is no
        gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit each other or are not known; the message says what was found
            and what is accepted.
    """
    _check_weight(w)
    if activation_dtype not in (None, "mxfp4"):
        raise ValueError(
            f"activation_dtype must be None (activations as they come) or 'mxfp4', found {activation_dtype!r}"
        )
    if scale_rule is not None and scale_rule not in SCALE_RULES:
        raise ValueError(f"unknown scale_rule {scale_rule!r}; known rules: {', '.join(map(repr, SCALE_RULES))}")
    if activation_dtype is None:
        if scale_rule is not None:
            raise ValueError(f"scale_rule={scale_rule!r} quantises activations, so it needs activation_dtype='mxfp4'")
        return F.linear(x, w, bias)
    for name, value in (("x", x), ("bias", bias)):
        if isinstance(value, ShuffledMXFP4Tensor) or not isinstance(value, Tensor | None):
            raise TypeError(f"{name} must be a plain tensor, found {type(value).__name__}")
        if value is not None:
            check_plain(name, value)
    return torch.ops.shuffled_tensor.linear_mxfp4.default(x, w, bias, scale_rule)  # type: ignore[no-any-return]


@ShuffledMXFP4Tensor.operations.implements(torch.ops.shuffled_tensor.linear_mxfp4.default)
def _lower(x: Tensor, w: Tensor, bias: Tensor | None = None, scale_rule: ScaleRule | None = None) -> Tensor:
    """A dense layer on activations rounded to MXFP4, computed from the packed bytes by aiter's kernels, or in plain
    torch."""
    w = _check_weight(w)
    if w.is_part_of_experts:
        raise ValueError("w is a view of rows or columns, whose bytes have no place of their own in memory; clone() it")
    _check(x, w.shape, w.device, bias)
    layout = _lay_out(w._storage)
    return torch.ops.shuffled_tensor.linear_mxfp4_packed(  # type: ignore[no-any-return]
        x, w.qdata, w.scale, layout, *w.shape, w.gate_up, bias, scale_rule
    )


def _lay_out(storage: PackedStorage) -> str:
    """Bring a weight into the layout that it is to have from its first use on, whoever computes; its name.

    aiter's kernels read each of those, so that no weight is laid out anew between layers of experts and this one.
    """
    layout = policy.current.layout_at_first_use(storage.device, storage.fixed_layout)
    storage.convert_layout_(layout or storage.layout)
    return storage.layout.name


def _plain(x: Tensor, w: Tensor, bias: Tensor | None = None, scale_rule: ScaleRule | None = None) -> NoReturn:
    """What `linear_mxfp4` does when dispatch found none of our tensors among its arguments."""
    _check_weight(w)
    raise AssertionError("unreachable: a ShuffledMXFP4Tensor goes to __torch_dispatch__")


def _packed(
    x: Tensor,
    w_qdata: Tensor,
    w_scale: Tensor,
    w_layout: str,
    w_rows: int,
    w_columns: int,
    w_gate_up: bool,
    bias: Tensor | None = None,
    scale_rule: ScaleRule | None = None,
) -> Tensor:
    geometry = _geometry(w_qdata, w_scale, w_rows, w_columns, w_gate_up)
    _check(x, (w_rows, w_columns), w_qdata.device, bias)
    layout = find_layout(w_layout)
    given = PackedWeight(w_qdata.unsqueeze(0), w_scale.unsqueeze(0), layout, geometry, fixed=layout)
    found = PackedStorage.owner_of(given.qdata, given.scale, geometry)

    def as_it_lies() -> PackedWeight:
        if found is None:
            return given
        storage, expert = found  # compiled code, an exported program and other threads have said how it lay
        _lay_out(storage)
        return PackedWeight.of(storage, expert)

    with reading([] if found is None else [found[0]], as_it_lies) as w, torch.autocast(x.device.type, enabled=False):
        out = _compute(x.reshape(-1, w_columns), w, scale_rule)
    return (out if bias is None else out + bias).to(x.dtype).reshape(*x.shape[:-1], w_rows).contiguous()


def _compute(x: Tensor, w: PackedWeight, scale_rule: ScaleRule | None) -> Tensor:
    """``x @ w.T``, ``[M, N]``: bfloat16 by aiter's kernels, or float32."""
    reason = gemm.refuse(x, w, scale_rule)
    if reason is None:
        return gemm.run(x, w)
    if arch(x.device) == versions.ARCH:
        _warn_once(reason)
    storage = w.storage()
    values = mxfp4.dequantize(*mxfp4.quantize(x, scale_rule=scale_rule or "even"))
    return values @ storage.dequantize(storage.whole(), torch.float32)[0].T


@cache
def _warn_once(reason: str) -> None:
    _log.warning("linear goes to plain torch, not to aiter: %s", reason)


def _packed_fake(
    x: Tensor,
    w_qdata: Tensor,
    w_scale: Tensor,
    w_layout: str,
    w_rows: int,
    w_columns: int,
    w_gate_up: bool,
    bias: Tensor | None = None,
    scale_rule: ScaleRule | None = None,
) -> Tensor:
    _geometry(w_qdata, w_scale, w_rows, w_columns, w_gate_up)
    _check(x, (w_rows, w_columns), w_qdata.device, bias)
    return x.new_empty(*x.shape[:-1], w_rows)


# --- what cannot be computed


def _check_weight(w: object) -> ShuffledMXFP4Tensor:
    if not isinstance(w, ShuffledMXFP4Tensor):
        raise TypeError(f"w must be a ShuffledMXFP4Tensor, found {type(w).__name__}; wrap packed bytes, or use from_hp")
    if w.dim() != 2:
        raise ValueError(f"w must be [N, K], a dense layer's or one expert, w[e]; found shape {list(w.shape)}")
    return w


def _check(x: Tensor, shape: tuple[int, ...], device: torch.device, bias: Tensor | None) -> None:
    """Look at shapes, dtypes and devices, never at data."""
    rows, columns = shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}] for w of shape {[rows, columns]}, found shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must be [{rows}] for w of shape {[rows, columns]}, found shape {list(bias.shape)}")
    for name, value in (("x", x), ("bias", bias)):
        if value is not None and value.dtype not in _DTYPES:
            raise TypeError(f"{name} must be {' or '.join(map(str, _DTYPES))}, found {value.dtype}")
        if value is not None and value.device != device:
            raise ValueError(f"all tensors must be on the device of w, {device}; found {name} on {value.device}")


def _geometry(qdata: Tensor, scale: Tensor, rows: int, columns: int, gate_up: bool) -> Geometry:
    geometry = Geometry.of_codes(rows, columns, gate_up, qdata.shape)
    if geometry is None or tuple(scale.shape) != geometry.padded_shape(SCALES):
        padded = geometry or Geometry(rows, columns, gate_up)
        expected = [list(padded.padded_shape(part)) for part in (CODES, SCALES)]
        raise ValueError(
            f"w_qdata and w_scale must be {expected[0]} and {expected[1]}, or as a smaller align= pads them, found "
            f"shapes {list(qdata.shape)} and {list(scale.shape)}"
        )
    return geometry


implement("linear_mxfp4", _plain, layer="linear with activation_dtype='mxfp4'")
implement("linear_mxfp4_packed", _packed, layer="linear with activation_dtype='mxfp4'", fake=_packed_fake)
