# SPDX-License-Identifier: MIT
"""The two operators: ``shuffled_tensor::fused_moe`` takes our tensors and is what traced modules call; dispatch lowers
it to ``shuffled_tensor::fused_moe_packed``, which takes plain tensors and their layouts as arguments, so that no
compiler can lose them. Where nobody traces, the function that users call lowers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn, ParamSpec

import torch
from torch import Tensor

from shuffled_tensor.layouts import Layout
from shuffled_tensor.moe.call import (
    ARGUMENTS,
    MoECall,
    PackedWeight,
    check,
    check_names,
    check_types,
    dtype_name,
    pack,
    schema,
    unpack,
    unpack_checked,
    weight_arguments,
)
from shuffled_tensor.operators import LIBRARY, implement, passing_autograd
from shuffled_tensor.tensor import policy
from shuffled_tensor.tensor.storage import PackedStorage, reading
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["MANY", "Choice", "Description", "Kernels", "fused_moe", "install", "layouts_in_use", "plan"]

_P = ParamSpec("_P")

LIBRARY.define(f"fused_moe({schema(packed=False)}) -> Tensor")
LIBRARY.define(f"fused_moe_packed({schema(packed=True)}) -> Tensor")

_PACKED = torch.ops.shuffled_tensor.fused_moe_packed.default


MANY = 1 << 20
"""Tokens: more than a call has."""


class Kernels(NamedTuple):
    """What computes a layer for some numbers of tokens."""

    tokens: range
    name: str
    activations: str
    """What they make of what enters a GEMM."""

    def __str__(self) -> str:
        first, last = self.tokens[0], self.tokens[-1]
        tokens = f"{first} tokens or more" if last >= MANY else f"{first} to {last} tokens"
        return f"{tokens}: {self.name}, activations {self.activations}"


class Description(NamedTuple):
    """How a backend would run a call."""

    routes: tuple[Kernels, ...]
    """What computes its layer, for every number of tokens."""
    tags: Mapping[str, Any]
    """What it tells its kernels of the weights' layout."""


class Choice(NamedTuple):
    """Who takes a call."""

    backend: str
    layout: Layout | None
    """The one in which both weights are read; None where any will do."""
    passed_over: dict[str, str]
    """Why each preferred backend does not take the call."""
    candidates: tuple[str, ...]
    """This backend, and those that would take the call if it were refused after all: compiled code outlives what that
    depends on."""
    run: Callable[[MoECall[PackedWeight]], Tensor]
    describe: Callable[[MoECall[PackedWeight]], Description]
    warn: Callable[[], None]
    """Log, once a reason, that a backend is passed over on the GPU that it is for."""


Select = Callable[[MoECall[PackedWeight], Sequence[str] | None], Choice]
"""The first backend that takes a call, of all or of those named.

Raises ValueError where the caller asked for one that does not exist, or that refuses this call.
"""

_select: Select


def install(select: Select) -> None:
    """Have backends chosen by this function from now on."""
    global _select
    _select = select


def _signed_as(call: Callable[_P, MoECall[Any]]) -> Callable[[Callable[..., Tensor]], Callable[_P, Tensor]]:
    """Give a function the parameters of a call, and their documentation in place of ``{arguments}``."""

    def sign(function: Callable[..., Tensor]) -> Callable[_P, Tensor]:
        function.__signature__ = inspect.signature(call).replace(return_annotation=Tensor)  # type: ignore[attr-defined]
        arguments = inspect.getdoc(call).partition("Args:\n")[2]  # type: ignore[union-attr]
        function.__doc__ = str(inspect.getdoc(function)).replace("{arguments}", arguments)
        return function

    return sign


@_signed_as(MoECall)
def fused_moe(
    hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weight: Tensor, topk_ids: Tensor, **options: Any
) -> Tensor:
    """A mixture-of-experts layer: ``sum over slots of topk_weight * (activation(gate) * up) @ w2.T``, with ``gate, up =
    hidden_states @ w13.T``.

    Args:
    {arguments}

    Returns:
        ``[tokens, K]``. There is no gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit each other or are not known; the message says what was found
            and what is accepted.
    """
    check_names(options)
    check_types((*zip(ARGUMENTS, (hidden_states, w13, w2, topk_weight, topk_ids), strict=False), *options.items()))
    if options.get("out_dtype") is not None:
        options["out_dtype"] = dtype_name(options["out_dtype"])
    several = ", " in (options.get("backend") or "")  # as compiled code says them, and nobody else may
    if several or _watched():
        return torch.ops.shuffled_tensor.fused_moe.default(  # type: ignore[no-any-return]
            hidden_states, w13, w2, topk_weight, topk_ids, **options
        )
    # as `_lower` does it for a compiler, which must also be told now who may take the call
    hidden_scale = options.get("hidden_scale")
    gate_up, down = _check_layer(hidden_states, w13, w2, hidden_scale)
    if options.get("out_dtype") is None:
        options["out_dtype"] = dtype_name(hidden_states.dtype if hidden_scale is None else w13.dtype)
    with passing_autograd():
        return _PACKED(  # type: ignore[no-any-return]
            hidden_states, *_arguments(gate_up), *_arguments(down), topk_weight, topk_ids, **options
        )


def _arguments(weight: ShuffledMXFP4Tensor) -> tuple[Any, ...]:
    return weight_arguments(weight.qdata, weight.scale, weight._storage.layout, weight._storage.geometry)


def _watched() -> bool:
    """Whether a compiler or a mode is to see the operator that takes our tensors. Else it would only be lowered, behind
    all that torch does to reach a tensor subclass."""
    return bool(
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    )


@ShuffledMXFP4Tensor.operations.implements(torch.ops.shuffled_tensor.fused_moe.default)
def _lower(*arguments: Any) -> Tensor:
    """A layer of experts, computed from the packed bytes by the backend that :func:`shuffled_tensor.explain` names."""
    given = unpack(arguments, packed=False)
    call, choice = plan(given)
    if _lay_out(call, choice, {"w13": given.w13._storage, "w2": given.w2._storage}):
        call, choice = plan(given)
    choice.warn()
    call.backend = ", ".join(choice.candidates)  # type: ignore[assignment]  # several names, not one of a user's
    return _PACKED(*pack(call))  # type: ignore[no-any-return]


def _lay_out(call: MoECall[PackedWeight], choice: Choice, storages: Mapping[str, PackedStorage]) -> bool:
    """Bring weights into the layouts that a call wants, where it does not have them so."""
    wanted = dict(zip(storages, layouts_in_use(choice, *storages.values()), strict=True))
    # as the call has them: another thread may have changed them since
    if all(layout in (None, getattr(call, name).layout) for name, layout in wanted.items()):
        return False
    check(call)  # before anything is changed
    for name, layout in wanted.items():
        if layout is not None:
            storages[name].convert_layout_(layout)
    return True


def plan(given: MoECall[Tensor]) -> tuple[MoECall[PackedWeight], Choice]:
    """The call as it would be made, and who would take it; nothing is changed or run.

    Raises:
        TypeError, ValueError: as for :func:`fused_moe`.
    """
    w13, w2 = _check_layer(given.hidden_states, given.w13, given.w2, given.hidden_scale)
    out_dtype = given.out_dtype or (given.hidden_states.dtype if given.hidden_scale is None else w13.dtype)
    lowered = {"w13": _packed_weight(w13), "w2": _packed_weight(w2), "out_dtype": out_dtype, "backend": None}
    call: MoECall[PackedWeight] = MoECall(**(vars(given) | lowered))
    return call, _select(call, None if given.backend is None else [given.backend])


def layouts_in_use(choice: Choice, *storages: PackedStorage) -> list[Layout | None]:
    """The layout that each weight of a call is brought into by it; None where it stays as it is.

    This is a first use whoever computes, so that no later one changes the layout under a call that is running.
    """

    def wanted(storage: PackedStorage) -> Layout | None:
        if choice.layout is not None:
            return storage.fixed_layout or choice.layout  # in which a fixed one is read alike, or it were not chosen
        return policy.current.layout_at_first_use(storage.qdata.device, storage.fixed_layout)

    return list(map(wanted, storages))


def _packed_weight(weight: ShuffledMXFP4Tensor) -> PackedWeight:
    storage = weight._storage
    storage.check_readable()
    return PackedWeight(weight.qdata, weight.scale, storage.layout, storage.geometry, storage.fixed_layout)


def _check_layer(
    hidden_states: Tensor, w13: Tensor, w2: Tensor, hidden_scale: Tensor | None
) -> tuple[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor]:
    weights = _check_weights(w13, w2)
    columns = w13.shape[2] if hidden_scale is None else w13.shape[2] // 2
    if hidden_states.dim() != 2 or hidden_states.shape[1] != columns:
        raise ValueError(f"hidden_states must be [tokens, {columns}] for this w13, found {list(hidden_states.shape)}")
    return weights


def _check_weights(w13: Tensor, w2: Tensor) -> tuple[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor]:
    for name, weight in (("w13", w13), ("w2", w2)):
        if not isinstance(weight, ShuffledMXFP4Tensor):
            raise TypeError(
                f"{name} must be a ShuffledMXFP4Tensor, found {type(weight).__name__} of {weight.dtype}; wrap "
                "packed bytes, or use from_hp"
            )
        if weight.dim() != 3:
            raise ValueError(f"{name} must be [experts, N, K], found shape {list(weight.shape)}")
    assert isinstance(w13, ShuffledMXFP4Tensor)  # for the type checker
    assert isinstance(w2, ShuffledMXFP4Tensor)
    if not w13.gate_up or w2.gate_up:
        raise ValueError(
            f"w13 must be made with gate_up=True and w2 with gate_up=False, found {w13.gate_up} and {w2.gate_up}"
        )
    (experts, rows, hidden), found = w13.shape, list(w2.shape)
    if found != [experts, hidden, rows // 2]:
        raise ValueError(
            f"for w13 of shape {list(w13.shape)}, w2 must be [experts, K, I] = {[experts, hidden, rows // 2]}, "
            f"found shape {found}"
        )
    return w13, w2


def _plain(hidden_states: Tensor, w13: Tensor, w2: Tensor, *args: Any) -> NoReturn:
    """What `fused_moe` does when dispatch found none of our tensors among its arguments."""
    _check_weights(w13, w2)
    raise AssertionError("unreachable: a ShuffledMXFP4Tensor goes to __torch_dispatch__")


def _packed(*args: Any) -> Tensor:
    call = unpack_checked(args)
    found = {
        name: PackedStorage.owner_of(weight.qdata, weight.scale, weight.geometry)
        for name, weight in (("w13", call.w13), ("w2", call.w2))
    }
    owned = {name: owner for name, owner in found.items() if owner is not None}
    storages = [storage for storage, _ in owned.values()]
    device = call.w13.qdata.device.type
    # a program that calls this operator itself, such as an exported one, may run where matmuls are cast
    cast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with reading(storages, partial(_begin, call, owned)) as choice, cast:
        choice.warn()
        return choice.run(call)


def _begin(call: MoECall[PackedWeight], owned: dict[str, tuple[PackedStorage, range]]) -> Choice:
    """Who takes a call, after it is told how weights that have an owner lie now: compiled code, an exported program and
    the caller in another thread have said how they lay."""

    def choose() -> Choice:
        for name, (storage, experts) in owned.items():
            storage.check_readable()
            setattr(call, name, PackedWeight.of(storage, experts))
        return _select(call, None if call.backend is None else call.backend.split(", "))

    choice = choose()
    if _lay_out(call, choice, {name: storage for name, (storage, _) in owned.items()}):
        choice = choose()
    return choice


def _packed_fake(*args: Any) -> Tensor:
    call = unpack(args, packed=True)
    check(call)
    return call.hidden_states.new_empty(call.hidden_states.shape[0], call.hidden, dtype=call.out_dtype)


implement("fused_moe", _plain, layer="fused_moe")
implement("fused_moe_packed", _packed, layer="fused_moe", fake=_packed_fake)
