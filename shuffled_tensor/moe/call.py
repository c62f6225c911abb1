# SPDX-License-Identifier: MIT
"""One call of a mixture-of-experts layer, and the only list of its arguments.

The schemas of both operators, the signature of :func:`shuffled_tensor.fused_moe`, its forwarding and ``explain`` are
made from the fields of :class:`MoECall`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, MISSING, Field, dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import Layout, find_layout
from shuffled_tensor.moe.activations import ACTIVATIONS, PARAMETERS, ActivationName
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES, ScaleRule
from shuffled_tensor.tensor.base import StorageTensor
from shuffled_tensor.tensor.checks import check_plain
from shuffled_tensor.tensor.geometry import Geometry
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = [
    "ARGUMENTS",
    "BackendName",
    "MoECall",
    "PackedWeight",
    "check",
    "check_names",
    "check_types",
    "dtype_name",
    "pack",
    "schema",
    "unpack",
    "unpack_checked",
    "weight_arguments",
]

BackendName = Literal["aiter", "triton", "reference"]

_HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ID_DTYPES = (torch.int32, torch.int64)

_Weight = TypeVar("_Weight")


@dataclass
class MoECall(Generic[_Weight]):
    """The arguments of :func:`shuffled_tensor.fused_moe`. Weights are tensors, or :class:`PackedWeight` as backends get
    them.

    Args:
        hidden_states: bfloat16, float16 or float32 ``[tokens, K]``; with ``hidden_scale``, packed MXFP4: uint8, int8 or
            float4_e2m1fn_x2 ``[tokens, K/2]``.
        w13: :class:`ShuffledMXFP4Tensor` ``[E, 2I, K]`` made with ``gate_up=True``.
        w2: :class:`ShuffledMXFP4Tensor` ``[E, K, I]``.
        topk_weight: floating point ``[tokens, topk]``, applied to the second GEMM's output.
        topk_ids: int32 or int64 ``[tokens, topk]``, the experts of each token.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"`` (torch's ``gelu(approximate="tanh")``) of the gate, times
            up; ``"swiglu"``, gpt-oss's ``gate * sigmoid(swiglu_alpha * gate) * (up + 1)``; or ``"situ"``, Kimi-K3's
            ``situ_beta * tanh(gate / situ_beta) * sigmoid(gate) * situ_linear_beta * tanh(up / situ_linear_beta)``.
        w13_bias, w2_bias: floating point ``[E, 2I]`` (gate, then up) and ``[E, K]``.
        expert_mask: int32 ``[global experts]``, 1 where the expert is local; ``topk_ids`` are then global, and other
            ranks' experts add nothing.
        num_local_tokens: int32, one number, ``[1]`` or of no dimension, on the device of the weights: only so many
            rows, the first ones, are tokens. The others are padding, as in the buffers of an expert-parallel dispatch:
            what they hold, their ids included, is not looked at, and what comes out in their places is not defined.
        doweight_stage1: apply ``topk_weight`` to the first GEMM's output, before its bias, instead.
        swiglu_limit: clamps the gate to at most, and up to plus and minus, this; None is 7 for ``"swiglu"`` and no
            limit (``math.inf``) for the others. Not for ``"situ"``.
        swiglu_alpha: for ``"swiglu"``; None is 1.702.
        situ_beta, situ_linear_beta: for ``"situ"``, which needs both; Kimi-K3's are 4 and 25.
        hidden_scale: e8m0, uint8 or float8_e8m0fnu, ``[tokens, K/32]``: the hidden states are MXFP4 already, and taken
            as they are.
        activation_dtype: None computes on activations as they come; ``"mxfp4"`` rounds what enters each GEMM to MXFP4
            first, as an a4w4 kernel does.
        scale_rule: one of :data:`shuffled_tensor.SCALE_RULES` for ``activation_dtype="mxfp4"``, by default ``"even"``.
        out_dtype: default: the dtype of ``hidden_states``, or of ``w13`` where they are packed.
        backend: the name of one, or None to have one chosen: :func:`shuffled_tensor.explain` says which.
    """

    hidden_states: Tensor
    w13: _Weight
    w2: _Weight
    topk_weight: Tensor
    topk_ids: Tensor
    _: KW_ONLY
    activation: ActivationName = "silu"
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_mask: Tensor | None = None
    num_local_tokens: Tensor | None = None
    doweight_stage1: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    situ_beta: float | None = None
    situ_linear_beta: float | None = None
    hidden_scale: Tensor | None = None
    activation_dtype: Literal["mxfp4"] | None = None
    scale_rule: ScaleRule | None = None
    out_dtype: torch.dtype | None = None
    backend: BackendName | None = None

    @property
    def hidden(self) -> int:
        """H, logical: the columns of w13 and the rows of w2."""
        return self.hidden_states.shape[-1] * (1 if self.hidden_scale is None else mxfp4.CODES.per_byte)

    @property
    def parameters(self) -> dict[str, float | None]:
        """What the caller names of the activation's parameters, and of others'."""
        return {name: getattr(self, name) for name in PARAMETERS}

    @property
    def intermediate_scale_rule(self) -> ScaleRule | None:
        """How what enters a GEMM is quantised: None where it stays as it comes."""
        return None if self.activation_dtype is None else self.scale_rule or "even"


class PackedWeight(NamedTuple):
    """A weight as backends get it: plain tensors, padded, and how they lie."""

    qdata: Tensor
    scale: Tensor
    layout: Layout
    geometry: Geometry
    fixed: Layout | None
    """The layout that it is in whenever somebody computes with it; None where who computes may choose."""
    owner: PackedStorage | None = None
    """Whose experts these are; None of bytes that nobody keeps a record of."""

    @classmethod
    def of(cls, storage: PackedStorage, experts: range) -> PackedWeight:
        """Some experts of a storage, as they lie now."""
        return cls(*storage.select(experts), storage.layout, storage.geometry, storage.fixed_layout, storage)

    def largest_scale(self) -> int:
        """No scale byte is larger: 255 of bytes that nobody keeps a record of."""
        return 255 if self.owner is None else self.owner.largest_scale()

    def storage(self) -> PackedStorage:
        """To be read in row-major order."""
        return PackedStorage(self.qdata, self.scale, self.geometry, self.layout)


# --- from and to the arguments of an operator


def dtype_name(dtype: torch.dtype | None) -> str | None:
    # By name: torch 2.10 and 2.11 hand an operator in an ahead-of-time compiled package another dtype than the one that
    # was exported.
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"out_dtype must be {_either(_HIDDEN_DTYPES)}, found {dtype!r}")
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float | None: "float?",
    ActivationName: "str",
    Literal["mxfp4"] | None: "str?",
    ScaleRule | None: "str?",
    BackendName | None: "str?",
    torch.dtype | None: "str?",
}
"""What a type of argument is to an operator."""

_WEIGHT = {"qdata": "Tensor", "scale": "Tensor", "layout": "str", "rows": "int", "columns": "int"}
"""What a weight is to the operator on plain tensors."""

_FIELDS: tuple[Field[Any], ...] = fields(MoECall)
_TYPES = get_type_hints(MoECall)

ARGUMENTS = tuple(field.name for field in _FIELDS)
"""The names of all arguments, in the order of the operator that takes our tensors."""

_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(literal)
    for name, type_ in _TYPES.items()
    for literal in (type_, *get_args(type_))
    if get_origin(literal) is Literal
}
"""Of an argument that is one of some words."""

_values = attrgetter(*ARGUMENTS)
_WEIGHTS = tuple(place for place, name in enumerate(ARGUMENTS) if _TYPES[name] is _Weight)
_DTYPES = tuple(place for place, name in enumerate(ARGUMENTS) if _TYPES[name] == torch.dtype | None)


def schema(*, packed: bool) -> str:
    """The arguments of an operator: of the one that takes our tensors, or of the one that takes :func:`pack`'s."""
    # Not keyword-only, because register_autograd takes no keyword-only tensors.
    arguments = []
    for place, field in enumerate(_FIELDS):
        if place not in _WEIGHTS:
            default = "" if field.default is MISSING else f"={field.default!r}"
            arguments.append(f"{_SCHEMAS[_TYPES[field.name]]} {field.name}{default}")
        elif packed:
            arguments += [f"{type_} {field.name}_{part}" for part, type_ in _WEIGHT.items()]
        else:
            arguments.append(f"Tensor {field.name}")
    return ", ".join(arguments)


def check_names(options: Iterable[str]) -> None:
    """Raise TypeError for an option that does not exist."""
    for name in options:
        if name not in ARGUMENTS:
            raise TypeError(f"fused_moe() got an unexpected keyword argument {name!r}")


def check_types(given: Iterable[tuple[str, Any]]) -> None:
    """Raise what no operator would say as well, for arguments by their names: TypeError for a value of another type,
    ValueError for a name that is none."""
    for name, value in given:
        check_type, optional = _TYPE_CHECKS[name]
        if value is not None or not optional:
            check_type(name, value)


def _check_weight(name: str, value: Any) -> None:
    if not isinstance(value, ShuffledMXFP4Tensor):
        _check_tensor(name, value, "a ShuffledMXFP4Tensor")


def _check_tensor(name: str, value: Any, wanted: str = "a plain tensor") -> None:
    if type(value) is Tensor:
        return
    if not isinstance(value, Tensor) or isinstance(value, StorageTensor):
        raise TypeError(f"{name} must be {wanted}, found {type(value).__name__}")
    check_plain(name, value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {value!r}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number or None, found {value!r}")


def _check_word(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"unknown {name} {value!r}; known {name}s: {', '.join(map(repr, _CHOICES[name]))}")


_CHECK_OF: dict[Any, Callable[[str, Any], None]] = {
    _Weight: _check_weight,
    Tensor: _check_tensor,
    bool: _check_bool,
    float: _check_number,
    torch.dtype: lambda name, value: None,  # which `dtype_name` says
}

_TYPE_CHECKS = {
    name: (
        _check_word if name in _CHOICES else _CHECK_OF[next(iter(get_args(type_)), type_)],
        type(None) in get_args(type_),
    )
    for name, type_ in _TYPES.items()
    if name in ARGUMENTS
}
"""By the name of an argument: what checks its type, and whether it may be None."""


def weight_arguments(
    qdata: Tensor, scale: Tensor, layout: Layout, geometry: Geometry
) -> tuple[Tensor, Tensor, str, int, int]:
    """What a weight is to the operator on plain tensors: as :data:`_WEIGHT` names it."""
    return qdata, scale, layout.name, geometry.rows, geometry.columns


def pack(call: MoECall[PackedWeight]) -> list[Any]:
    """A call as the arguments of the operator on plain tensors."""
    arguments = list(_values(call))
    for place in _DTYPES:
        arguments[place] = dtype_name(arguments[place])
    for place in reversed(_WEIGHTS):
        arguments[place : place + 1] = weight_arguments(*arguments[place][:4])
    return arguments


def unpack(
    given: Iterable[Any], *, packed: bool, geometry_of: Callable[..., Geometry | None] = Geometry.of_codes
) -> MoECall[Any]:
    """The call that an operator was given; trailing arguments that have their default may be left out."""
    arguments = list(given)
    if packed:
        for place in _WEIGHTS:
            qdata, scale, layout, rows, columns = arguments[place : place + len(_WEIGHT)]
            gate_up = ARGUMENTS[place] == "w13"
            geometry = geometry_of(rows, columns, gate_up, qdata.shape[1:])
            # of other shapes `check` says what they must be
            geometry, layout = geometry or Geometry(rows, columns, gate_up), find_layout(layout)
            weight = PackedWeight(qdata, scale, layout, geometry, fixed=layout)
            arguments[place : place + len(_WEIGHT)] = [weight]
    for place in _DTYPES:
        if place < len(arguments):
            arguments[place] = _dtype_of(arguments[place])
    return MoECall(**dict(zip(ARGUMENTS, arguments, strict=False)))


_geometry_of = cache(Geometry.of_codes)

_CHECKED: set[tuple[Any, ...]] = set()
"""Of calls that could be computed, all that :func:`check` looks at."""

_MANY_CALLS = 4096
"""More than the layers of a model and the numbers of tokens that it is often called with make."""


def unpack_checked(given: Sequence[Any]) -> MoECall[PackedWeight]:
    """The call that the operator on plain tensors was given, none of them a compiler's, after :func:`check`: which
    depends on nothing else, so that it looks at calls that are alike once.

    Raises:
        TypeError, ValueError: what no backend could compute.
    """
    seen = tuple([(value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value for value in given])
    call: MoECall[PackedWeight] = unpack(given, packed=True, geometry_of=_geometry_of)
    if seen not in _CHECKED:
        check(call)
        if len(_CHECKED) >= _MANY_CALLS:
            _CHECKED.clear()
        _CHECKED.add(seen)
    return call


# --- what no backend could compute


def check(call: MoECall[PackedWeight]) -> None:
    """Look at shapes, dtypes and devices, never at data.

    Raises:
        TypeError, ValueError: what no backend could compute.
    """
    experts, hidden, intermediate = call.w13.qdata.shape[0], call.hidden, call.w2.geometry.columns
    tokens = call.hidden_states.shape[0] if call.hidden_states.dim() == 2 else None
    if tokens is None:
        raise ValueError(f"hidden_states must be [tokens, K], found shape {list(call.hidden_states.shape)}")
    if call.hidden_scale is None:
        if call.hidden_states.dtype not in _HIDDEN_DTYPES:
            raise TypeError(
                f"hidden_states must be {_either(_HIDDEN_DTYPES)} (or packed uint8 with hidden_scale), found "
                f"{call.hidden_states.dtype}"
            )
    else:
        _check_dtype("hidden_states with hidden_scale", call.hidden_states, CODES.dtypes)
        _check_dtype("hidden_scale", call.hidden_scale, SCALES.dtypes)
        _check_shape("hidden_scale", call.hidden_scale, (tokens, hidden // mxfp4.BLOCK))
    for name, weight, sizes in (("w13", call.w13, (2 * intermediate, hidden)), ("w2", call.w2, (hidden, intermediate))):
        if weight.geometry[:2] != sizes:
            raise ValueError(f"{name} must have {sizes[0]} rows and {sizes[1]} columns, found {weight.geometry[:2]}")
        for part, data in zip(PARTS, weight[:2], strict=True):
            shape = experts, *weight.geometry.padded_shape(part)
            if part is CODES and data.shape[1:] != shape[1:]:
                raise ValueError(
                    f"{name}_{part} must be {list(shape)}, or as a smaller align= pads it, found shape "
                    f"{list(data.shape)}"
                )
            _check_shape(f"{name}_{part}", data, shape)
    if call.topk_ids.dim() != 2 or call.topk_ids.shape[0] != tokens:
        raise ValueError(f"topk_ids must be [{tokens}, topk], found shape {list(call.topk_ids.shape)}")
    _check_dtype("topk_ids", call.topk_ids, _ID_DTYPES)
    _check_shape("topk_weight", call.topk_weight, tuple(call.topk_ids.shape))
    if not call.topk_weight.is_floating_point():
        raise TypeError(f"topk_weight must be floating point, found {call.topk_weight.dtype}")
    for name, bias, width in (("w13_bias", call.w13_bias, 2 * intermediate), ("w2_bias", call.w2_bias, hidden)):
        if bias is not None:
            _check_shape(name, bias, (experts, width))
            _check_dtype(name, bias, _HIDDEN_DTYPES)
    if call.expert_mask is not None:
        _check_dtype("expert_mask", call.expert_mask, (torch.int32,))
        if call.expert_mask.dim() != 1 or call.expert_mask.shape[0] < experts:
            raise ValueError(
                "expert_mask must be [global experts], 1 where local, found shape "
                f"{list(call.expert_mask.shape)} for {experts} local experts"
            )
    if call.num_local_tokens is not None:
        _check_dtype("num_local_tokens", call.num_local_tokens, (torch.int32,))
        if call.num_local_tokens.shape not in ((), (1,)):
            found = list(call.num_local_tokens.shape)
            raise ValueError(f"num_local_tokens must be one number, [1] or of no dimension, found shape {found}")
    _check_options(call)
    _check_devices(call)


def _check_options(call: MoECall[PackedWeight]) -> None:
    if call.activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {call.activation!r}; known activations: {', '.join(map(repr, ACTIVATIONS))}"
        )
    if call.activation_dtype not in (None, "mxfp4"):
        raise ValueError(
            f"activation_dtype must be None (activations as they come) or 'mxfp4', found {call.activation_dtype!r}"
        )
    if call.scale_rule is not None:
        if call.scale_rule not in mxfp4.SCALE_RULES:
            raise ValueError(
                f"unknown scale_rule {call.scale_rule!r}; known rules: {', '.join(map(repr, mxfp4.SCALE_RULES))}"
            )
        if call.activation_dtype is None:
            raise ValueError(
                f"scale_rule={call.scale_rule!r} quantises activations, so it needs activation_dtype='mxfp4'"
            )
    accepted = ACTIVATIONS[call.activation].parameters
    for name, value in call.parameters.items():
        if name not in accepted:
            if value is not None:
                raise ValueError(
                    f"activation={call.activation!r} takes no {name}; it takes {' and '.join(accepted)}, and {name} is "
                    f"for {', '.join(repr(other) for other, row in ACTIVATIONS.items() if name in row.parameters)}"
                )
        elif value is None and accepted[name] is None:
            raise ValueError(f"activation={call.activation!r} needs {name}, which has no default")
        elif value is not None and not (0 < value < math.inf or (value == math.inf and name == "swiglu_limit")):
            default = "" if accepted[name] is None else ", or None for the activation's own"
            infinite = ", or infinite" if name == "swiglu_limit" else ""
            raise ValueError(f"{name} must be positive and finite{infinite}{default}, found {value}")
    if call.out_dtype not in _HIDDEN_DTYPES:
        raise TypeError(f"out_dtype must be {_either(_HIDDEN_DTYPES)}, found {call.out_dtype!r}")


def _check_devices(call: MoECall[PackedWeight]) -> None:
    device = call.w13.qdata.device
    for name, value in vars(call).items():
        tensors = value[:2] if isinstance(value, PackedWeight) else (value,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device != device:
                raise ValueError(f"all tensors must be on the device of w13, {device}; found {name} on {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found shape {list(tensor.shape)}")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, found {tensor.dtype}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
