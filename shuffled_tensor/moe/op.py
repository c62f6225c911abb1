# SPDX-License-Identifier: MIT
"""The two operators: ``shuffled_tensor::fused_moe`` takes our tensors and is what users and traced modules call;
dispatch lowers it to ``shuffled_tensor::fused_moe_packed``, which takes plain tensors and their kinds as arguments, so
that no compiler can lose them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from shuffled_tensor import backends
from shuffled_tensor.moe.call import MoECall
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["fused_moe"]

# Not keyword-only, because register_autograd takes no keyword-only tensors. Both schemas end in the same options, which
# lowering hands on untouched.
_OPTIONS = (
    "Tensor? hidden_scale=None, str activation='silu', Tensor? w13_bias=None, Tensor? w2_bias=None, "
    "Tensor? expert_mask=None, bool doweight_stage1=False, float? swiglu_limit=None, "
    "str? activation_dtype=None, str? scale_rule=None"
)

_LIBRARY = torch.library.Library("shuffled_tensor", "DEF")
_LIBRARY.define(
    "fused_moe(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weight, Tensor topk_ids, "
    f"ScalarType? out_dtype=None, str? backend=None, {_OPTIONS}) -> Tensor"
)
_LIBRARY.define(
    "fused_moe_packed(Tensor hidden_states, Tensor w13_qdata, Tensor w13_scale, Tensor w2_qdata, Tensor w2_scale, "
    "Tensor topk_weight, Tensor topk_ids, str w13_kind, str w2_kind, int intermediate, str out_dtype, "
    f"str backend, {_OPTIONS}) -> Tensor"
)


def fused_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_mask: Tensor | None = None,
    doweight_stage1: bool = False,
    swiglu_limit: float | None = None,
    hidden_scale: Tensor | None = None,
    activation_dtype: str | None = None,
    scale_rule: str | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """A mixture-of-experts layer: ``sum over slots of topk_weight * (activation(gate) * up) @ w2.T``, with ``gate, up =
    hidden_states @ w13.T``.

    Args:
        hidden_states: bfloat16, float16 or float32 ``[tokens, K]``; with ``hidden_scale``, packed MXFP4: uint8
            ``[tokens, K/2]``.
        w13: :class:`ShuffledMXFP4Tensor` ``[E, 2I, K]`` made with ``gate_up=True``.
        w2: :class:`ShuffledMXFP4Tensor` ``[E, K, I]``.
        topk_weight: floating point ``[tokens, topk]``, applied to the second GEMM's output.
        topk_ids: int32 or int64 ``[tokens, topk]``, the experts of each token.
        activation: ``"silu"`` or ``"gelu"`` of the gate times up, or ``"swiglu"``, gpt-oss's ``gate * sigmoid(1.702 *
            gate) * (up + 1)``.
        w13_bias, w2_bias: floating point ``[E, 2I]`` (gate, then up) and ``[E, K]``.
        expert_mask: int32 ``[global experts]``, 1 where the expert is local; ``topk_ids`` are then global, and other
            ranks' experts add nothing.
        doweight_stage1: apply ``topk_weight`` to the first GEMM's output, before its bias, instead.
        swiglu_limit: clamps the gate to at most, and up to plus and minus, this; None is 7 for ``"swiglu"`` and no
            limit for the others.
        hidden_scale: uint8 e8m0 ``[tokens, K/32]``: the hidden states are MXFP4 already, and taken as they are.
        activation_dtype: None computes on activations as they come; ``"mxfp4"`` rounds what enters each GEMM to MXFP4
            first, as an a4w4 kernel does.
        scale_rule: one of :data:`shuffled_tensor.SCALE_RULES` for ``activation_dtype="mxfp4"``, by default ``"even"``.
        out_dtype: default: the dtype of ``hidden_states``, or of ``w13`` where they are packed.
        backend: ``"aiter"``, ``"reference"``, or None to have one chosen: :func:`shuffled_tensor.explain` says which.

    Returns:
        ``[tokens, K]``. There is no gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit each other or are not known; the message says what was found
            and what is accepted.
    """
    return torch.ops.shuffled_tensor.fused_moe.default(  # type: ignore[no-any-return]
        hidden_states,
        w13,
        w2,
        topk_weight,
        topk_ids,
        out_dtype,
        backend,
        hidden_scale,
        activation,
        w13_bias,
        w2_bias,
        expert_mask,
        doweight_stage1,
        swiglu_limit,
        activation_dtype,
        scale_rule,
    )


@ShuffledMXFP4Tensor.operations.implements(torch.ops.shuffled_tensor.fused_moe.default)
def _lower(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    hidden_scale: Tensor | None = None,
    *options: Any,
) -> Tensor:
    """A layer of experts, computed from the packed bytes by the backend that :func:`shuffled_tensor.explain` names."""
    arguments = (hidden_states, w13, w2, topk_weight, topk_ids, out_dtype, backend, hidden_scale, *options)
    call, choice = plan(*arguments)
    storages = [weight._storage for weight in (w13, w2) if isinstance(weight, ShuffledMXFP4Tensor)]
    kinds = backends.kinds_in_use(choice, *storages)
    if any(kind not in (None, storage.layout) for kind, storage in zip(kinds, storages, strict=True)):
        call.check()  # and the kinds, before anything is changed
        for storage in storages:
            if choice.kind is not None:
                storage.check_usable_as(choice.kind)
        for storage, kind in zip(storages, kinds, strict=True):
            if kind is not None:
                storage.convert_layout_(kind)
        call, choice = plan(*arguments)
    backends.warn_when_passed_over(choice, w13.device)
    return torch.ops.shuffled_tensor.fused_moe_packed(*vars(call).values())  # type: ignore[no-any-return]


def plan(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    out_dtype: torch.dtype | None,
    backend: str | None,
    hidden_scale: Tensor | None,
    *options: Any,
) -> tuple[MoECall, backends.Choice]:
    """The call as it would be made, and who would take it; nothing is changed or run.

    Raises:
        TypeError, ValueError: as for :func:`fused_moe`.
    """
    w13, w2 = _check_weights(w13, w2)
    w13._storage.check_readable()
    w2._storage.check_readable()
    columns = w13.shape[2] if hidden_scale is None else w13.shape[2] // 2
    if hidden_states.dim() != 2 or hidden_states.shape[1] != columns:
        raise ValueError(f"hidden_states must be [tokens, {columns}] for this w13, found {list(hidden_states.shape)}")
    if out_dtype is None:
        out_dtype = hidden_states.dtype if hidden_scale is None else w13.dtype
    call = MoECall(
        hidden_states,
        w13.qdata,
        w13.scale,
        w2.qdata,
        w2.scale,
        topk_weight,
        topk_ids,
        w13._storage.layout.name,
        w2._storage.layout.name,
        w2.shape[2],
        str(out_dtype).removeprefix("torch."),
        "",
        hidden_scale,
        *options,
    )
    choice = backends.select(call, backend)
    call.backend = choice.candidates
    return call, choice


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
    call = MoECall(*args)
    call.check()
    choice = backends.select(call, call.backend)
    backends.warn_when_passed_over(choice, call.w13_qdata.device)
    return backends.BACKENDS[choice.backend].run(call)


def _packed_fake(*args: Any) -> Tensor:
    call = MoECall(*args)
    call.check()
    return call.hidden_states.new_empty(call.hidden_states.shape[0], call.hidden, dtype=call.dtype)


def _no_gradient(*args: Any) -> NoReturn:
    raise RuntimeError(
        "fused_moe has no gradient; call it under torch.no_grad(), or compute with .dequantize() to train through it"
    )


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError("fused_moe has no vmap rule; flatten the batch into tokens, [batch * tokens, K]")


_LIBRARY.impl("fused_moe", _plain, "CompositeExplicitAutograd")
_LIBRARY.impl("fused_moe_packed", _packed, "CompositeExplicitAutograd")
torch.library.register_fake("shuffled_tensor::fused_moe_packed", _packed_fake, lib=_LIBRARY)
for _operator in ("shuffled_tensor::fused_moe", "shuffled_tensor::fused_moe_packed"):
    torch.library.register_autograd(_operator, _no_gradient, lib=_LIBRARY)
    torch.library.register_vmap(_operator, _no_vmap, lib=_LIBRARY)
