# SPDX-License-Identifier: MIT
"""What is done to a module: its own weights become ours, all are laid out at a time of the caller's choosing, and one
is put in a parameter's place."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import layout_or_none
from shuffled_tensor.mxfp4 import ScaleRule
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.checks import check_high_precision, check_logical_dtype, check_parts, check_row_order
from shuffled_tensor.tensor.geometry import ALIGN, Align, RowOrder, aligns_of_layer
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["install_", "prepare", "quantize_experts_", "weights_of", "wrap_experts_"]

_log = logging.getLogger("shuffled_tensor")

_Module = TypeVar("_Module", bound=nn.Module)

_TAGS = ("is_shuffled", "shuffle_kind", "is_guinterleave")
"""Attributes by which engines say that bytes are shuffled already."""


def wrap_experts_(
    module: _Module,
    *,
    row_order: RowOrder,
    w13: str = "w13_weight",
    w2: str = "w2_weight",
    w13_scale: str = "w13_weight_scale",
    w2_scale: str = "w2_weight_scale",
    shuffle_kind: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    align: Align = ALIGN,
) -> _Module:
    """Make every pair of packed codes and scales in a module one :class:`ShuffledMXFP4Tensor` parameter, in place.

    Every submodule that holds all four names is wrapped. Attributes that others set on a weight (``weight_loader``)
    stay on it. The name of a scale stays, and is None: the weight carries its scales, and ``weight.scale_view`` takes
    new ones. Codes that are padded already are taken for logical ones.

    Args:
        module: holds packed, row-major parameters or buffers as :class:`ShuffledMXFP4Tensor` takes them. It is owned:
            the bytes are taken over, one weight after the other.
        row_order: of the gate and up rows of ``w13``: ``"contiguous"`` or ``"interleaved"``.
        w13, w2, w13_scale, w2_scale: what the tensors are called.
        shuffle_kind: fixes the layout to be shuffled into; None leaves that to the backend that first uses the weights.
        dtype: the logical dtype.
        align: what sizes are padded to multiples of, as :class:`ShuffledMXFP4Tensor` takes it: one number, or one for
            the hidden and one for the intermediate size.

    Returns:
        ``module``.

    Raises:
        ValueError: nothing is called so, a weight is tagged as shuffled already, or its sizes do not fit; the message
            names the parameter. Or another ``align``. Nothing has changed then.
        TypeError: a dtype that is not one of packed codes and scales. Nothing has changed then.
    """
    owners = _owners(module, w13, w2, w13_scale, w2_scale)
    gate_up, down = {"gate_up": True, "row_order": row_order}, {"gate_up": False, "row_order": None}
    w13_align, w2_align = aligns_of_layer(align)
    weights = [
        (owner, prefix, _place(getattr(owner, names[0])), *names)
        for owner, prefix in owners
        for names in ((w13, w13_scale, gate_up, w13_align), (w2, w2_scale, down, w2_align))
    ]
    check_logical_dtype(dtype)
    layout_or_none(shuffle_kind)  # an unknown one is found before anything changes
    scales: dict[object, object] = {}
    for owner, prefix, tied, name, scale, order, _ in weights:
        with _naming(f"{prefix}{name}"):
            codes: Tensor = getattr(owner, name)
            tags = [tag for tag in _TAGS for part in (codes, getattr(owner, scale)) if getattr(part, tag, False)]
            if tags:
                raise ValueError(
                    f"it is tagged {tags[0]}, so its bytes are not row-major; wrap weights before an engine shuffles "
                    "them (before process_weights_after_loading), or delete a tag that is stale"
                )
            check_parts(codes, getattr(owner, scale))
            check_row_order(**order, rows=codes.shape[-2])
            own = _place(getattr(owner, scale))
            if scales.setdefault(tied, own) != own:
                raise ValueError(
                    "its codes are also another weight's, whose scales are others; clone() the codes of one"
                )
    for owner, prefix in owners:
        rows, half = (getattr(owner, name).shape for name in (w13, w2))
        _check_pair(prefix, w13, (*rows[:-1], 2 * rows[-1]), w2, (*half[:-1], 2 * half[-1]))
    made: dict[object, nn.Parameter] = {}  # a weight that two modules share stays shared
    for owner, _, tied, name, scale, order, pads in weights:
        if tied not in made:
            codes = getattr(owner, name)
            packed = ShuffledMXFP4Tensor(
                codes, getattr(owner, scale), **order, shuffle_kind=shuffle_kind, dtype=dtype, align=pads
            )
            made[tied] = _parameter(codes, packed)
        _set(owner, name, made[tied])
        _set(owner, scale, None)
    return module


def quantize_experts_(
    module: _Module,
    *,
    row_order: RowOrder | None = None,
    w13: str = "w13_weight",
    w2: str = "w2_weight",
    shuffle_kind: str | None = None,
    scale_rule: ScaleRule = "even",
    align: Align = ALIGN,
) -> _Module:
    """Make every pair of high-precision expert weights in a module :class:`ShuffledMXFP4Tensor` parameters, in place.

    Every submodule that holds both names is quantised, one weight after the other, so that one at a time exists twice.
    Attributes that others set on a weight stay on it.

    A model of transformers needs no names and no order: its experts modules say both. They are then computed by
    :func:`shuffled_tensor.fused_moe`, and the model is saved as :mod:`shuffled_tensor.transformers` has it.

    Args:
        module: holds floating-point parameters or buffers, ``w13`` ``[E, 2I, K]`` and ``w2`` ``[E, K, I]``; their dtype
            becomes the logical dtype.
        row_order: of the gate and up rows of ``w13``: ``"contiguous"`` or ``"interleaved"``; None for transformers'.
        w13, w2: what the tensors are called: ``"gate_up_proj"`` and ``"down_proj"`` in transformers.
        shuffle_kind: fixes the layout to be shuffled into; None leaves that to the backend that first uses the weights.
        scale_rule: one of :data:`shuffled_tensor.SCALE_RULES`.
        align: what sizes are padded to multiples of, as :class:`ShuffledMXFP4Tensor` takes it: one number, or one for
            the hidden and one for the intermediate size.

    Returns:
        ``module``.

    Raises:
        ValueError: nothing is called so, no order is given, an unknown rule, or a size that does not fit; the message
            names the parameter. Or another ``align``. Nothing has changed then.
        TypeError: a weight that is not bfloat16, float16, float32 or float64. Nothing has changed then.
    """
    if row_order is None:
        if not any(hasattr(each, "is_concatenated") for each in module.modules()):
            raise ValueError(
                "row_order must be 'contiguous' or 'interleaved': in which order the gate and up rows of w13 come is "
                "said by transformers' experts modules alone, and there are none here"
            )
        if (w13, w2, align) != ("w13_weight", "w2_weight", ALIGN):
            raise ValueError("without row_order, names are transformers' own, and there is no align")
        from shuffled_tensor.integrations.transformers import Mxfp4Config, quantize_model_

        return quantize_model_(module, Mxfp4Config(scale_rule=scale_rule, shuffle_kind=shuffle_kind))
    owners = _owners(module, w13, w2)
    gate_up, down = {"gate_up": True, "row_order": row_order}, {"gate_up": False, "row_order": None}
    w13_align, w2_align = aligns_of_layer(align)
    weights = [
        (owner, prefix, _place(getattr(owner, names[0])), *names)
        for owner, prefix in owners
        for names in ((w13, gate_up, w13_align), (w2, down, w2_align))
    ]
    layout_or_none(shuffle_kind)  # an unknown one is found before anything changes
    for owner, prefix, _, name, order, _ in weights:
        with _naming(f"{prefix}{name}"):
            values: Tensor = getattr(owner, name)
            if isinstance(values, ShuffledMXFP4Tensor) or values.dim() != 3:
                raise ValueError(
                    "expert weights to quantise are plain and [experts, N, K], found "
                    f"{type(values).__name__} of shape {list(values.shape)}"
                )
            check_high_precision(values)
            mxfp4.check_quantizable(values, scale_rule)
            check_row_order(**order, rows=values.shape[-2])
    for owner, prefix in owners:
        _check_pair(prefix, w13, getattr(owner, w13).shape, w2, getattr(owner, w2).shape)
    made: dict[object, nn.Parameter] = {}  # a weight that two modules share stays shared
    for owner, _, tied, name, order, pads in weights:
        if tied not in made:
            values = getattr(owner, name)
            packed = ShuffledMXFP4Tensor.from_hp(
                values, **order, shuffle_kind=shuffle_kind, scale_rule=scale_rule, align=pads
            )
            made[tied] = _parameter(values, packed)
        _set(owner, name, made[tied])
    return module


def weights_of(root: object) -> list[PackedStorage]:
    """The storages of the weights in a module, each once: of parameters, buffers and other attributes of it and its
    submodules, in lists, tuples and dicts of such, in DTensors, and of weights that torch has unwrapped into
    parametrizations.

    Raises:
        ValueError: there are none.
    """
    found: dict[int, PackedStorage] = {}
    seen: set[int] = set()

    def walk(value: object) -> None:
        if isinstance(value, ShuffledMXFP4Tensor):
            found[id(value._storage)] = value._storage
        elif isinstance(value, nn.Module | list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            for inner in _inside(value):
                walk(inner)
        elif isinstance(value, Tensor) and hasattr(value, "_local_tensor"):
            walk(value._local_tensor)

    walk(root)
    if not found:
        raise ValueError(
            f"no ShuffledMXFP4Tensor was found in {type(root).__name__}; wrap_experts_ and quantize_experts_ make a "
            "module's own weights such, install_ puts one in a parameter's place"
        )
    return list(found.values())


def _inside(holder: nn.Module | list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterator[object]:
    """What a container holds; of a module, also what its parametrizations make when they are asked."""
    if isinstance(holder, nn.Module):
        yield from vars(holder).values()  # parameters, buffers and submodules are dicts in there
        if parametrize.is_parametrized(holder):
            yield from (getattr(holder, name) for name in holder.parametrizations)  # type: ignore[union-attr]
    else:
        yield from holder.values() if isinstance(holder, dict) else holder


def prepare(module: nn.Module, *, progress: bool = False) -> nn.Module:
    """Lay out every :class:`ShuffledMXFP4Tensor` of a module as its first use would, and log one line about it.

    Call it before a CUDA graph is captured and before the first request. On a device whose backend reads any layout,
    nothing changes.

    Args:
        module: every weight in it is prepared, in place: of parameters, buffers, other attributes, lists and dicts.
        progress: show a tqdm progress bar (the extra ``checkpoint`` installs tqdm).

    Returns:
        ``module``.

    Raises:
        ValueError: there is no :class:`ShuffledMXFP4Tensor` in it.
    """
    storages = steps = weights_of(module)
    if progress:
        from tqdm import tqdm

        steps = tqdm(storages, desc="shuffling MXFP4 weights", unit="weight")
    start, moved, layouts = time.perf_counter(), 0, Counter[str]()
    for storage in steps:
        layout = policy.current.layout_at_first_use(storage.qdata.device, storage.fixed_layout)
        if layout is not None and layout is not storage.layout:
            storage.convert_layout_(layout)
            moved += storage.qdata.nbytes + storage.scale.nbytes
        layouts[storage.layout.name] += 1
    _log.info(
        "prepared %d MXFP4 weights (%s): shuffled %.2f GiB in %.2f s",
        len(storages),
        ", ".join(f"{count} {layout}" for layout, count in sorted(layouts.items())),
        moved / 2**30,
        time.perf_counter() - start,
    )
    return module


def install_(module: nn.Module, name: str, weight: ShuffledMXFP4Tensor) -> nn.Parameter:
    """Put a weight where a module has a parameter, or nothing yet: the one way to do so after a module was built.

    Where the parameter is a :class:`ShuffledMXFP4Tensor` of the same shape, it stays the object that it is and shows
    the new weight, so that optimizers and engines that hold it see that, too. A plain one is replaced, wherever in
    ``module`` it is tied to; it is emptied, so that whoever still holds it meets a wrong shape and not stale values.
    Attributes that others have set on it (``weight_loader``) go with the new one.

    Args:
        module: the root of what may share the parameter.
        name: of the parameter, buffer or place in ``module``, with dots: ``"layers.3.mlp.experts.w13_weight"``.
        weight: what comes there.

    Returns:
        The parameter that is there now.

    Raises:
        TypeError: ``weight`` is no ShuffledMXFP4Tensor.
        AttributeError: ``module`` has no such submodule, or something that is neither a tensor nor None is called so.
        RuntimeError: the bytes of the weight that is there were handed out.
    """
    if not isinstance(weight, ShuffledMXFP4Tensor):
        raise TypeError(
            f"install_ takes a ShuffledMXFP4Tensor, found {type(weight).__name__}; from_hp quantises plain values"
        )
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, own, None)
    if old is not None and not isinstance(old, Tensor):
        raise AttributeError(f"{name} is a {type(old).__name__}, not a tensor")
    if isinstance(old, ShuffledMXFP4Tensor) and isinstance(old, nn.Parameter):
        same = (old.shape, old.dtype, old.device, old.gate_up)
        if same == (weight.shape, weight.dtype, weight.device, weight.gate_up):
            old.data = weight
            return old
    parameter = nn.Parameter(weight, requires_grad=False)
    if old is None:
        if hasattr(owner, own):
            delattr(owner, own)
        owner.register_parameter(own, parameter)
        return parameter
    _carry(old, parameter)
    for place in module.modules():
        for called, held in [*place._parameters.items(), *place._buffers.items()]:
            if held is old:
                _set(place, called, parameter)
    if getattr(owner, own) is old:  # neither parameter nor buffer
        _set(owner, own, parameter)
    if not isinstance(old, ShuffledMXFP4Tensor):
        old.data = old.data.new_empty(0)
    return parameter


def _owners(module: nn.Module, *names: str) -> list[tuple[nn.Module, str]]:
    """The submodules that hold tensors of all these names, with what their names begin with."""
    found = [
        (owner, f"{path}." if path else "")
        for path, owner in module.named_modules()
        if all(isinstance(getattr(owner, name, None), Tensor) for name in names)
    ]
    if not found:
        raise ValueError(f"no submodule of {type(module).__name__} holds {', '.join(names)}; say what they are called")
    return found


def _place(data: Tensor) -> object:
    """What tells tensors apart by their memory, however often it was wrapped in a Parameter."""
    if data.is_meta:
        return id(data)
    return data.data_ptr(), data.shape, data.stride()


def _check_pair(prefix: str, w13: str, rows: tuple[int, ...], w2: str, half: tuple[int, ...]) -> None:
    """Raise ValueError where two logical shapes are not those of one layer."""
    expected = (*rows[:-2], rows[-1], rows[-2] // 2)
    if tuple(half) != expected:
        raise ValueError(
            f"{prefix}{w2}: for {w13} of shape {list(rows)}, [..., 2I, K], it must be [..., K, I] = {list(expected)}, "
            f"found {list(half)}; weights held transposed, as some of transformers' are, must be transposed first"
        )


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """Errors inside name the parameter."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{parameter}: {error}") from error


def _parameter(old: Tensor, packed: ShuffledMXFP4Tensor) -> nn.Parameter:
    """What stands in for `old`, with the attributes that others set on it."""
    parameter = nn.Parameter(packed, requires_grad=False)
    _carry(old, parameter)
    return parameter


def _carry(old: Tensor, parameter: nn.Parameter) -> None:
    """Give a parameter what others set on the one before it."""
    parameter.__dict__.update({name: value for name, value in vars(old).items() if name not in _TAGS})
    if hasattr(old, "weight_loader"):  # of vLLM's own classes it is a property
        parameter.weight_loader = old.weight_loader  # type: ignore[attr-defined]


def _set(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    delattr(owner, name)  # it may have been a buffer
    owner.register_parameter(name, parameter)
