# SPDX-License-Identifier: MIT
"""One call of a mixture-of-experts layer as the packed operator gets it: plain tensors, their layouts, and what is
asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.layouts import find_layout
from shuffled_tensor.tensor.geometry import Geometry
from shuffled_tensor.tensor.storage import PackedStorage

__all__ = ["ACTIVATIONS", "MoECall"]

ACTIVATIONS = ("silu", "gelu", "swiglu")
SWIGLU_LIMIT = 7.0
"""The limit that `swiglu` has when the caller names none: gpt-oss's."""

_HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ID_DTYPES = (torch.int32, torch.int64)


@dataclass
class MoECall:
    """Arguments of ``shuffled_tensor::fused_moe_packed``; shapes are those of :func:`shuffled_tensor.fused_moe`,
    weights padded and in their kinds."""

    hidden_states: Tensor
    w13_qdata: Tensor
    w13_scale: Tensor
    w2_qdata: Tensor
    w2_scale: Tensor
    topk_weight: Tensor
    topk_ids: Tensor
    w13_kind: str
    w2_kind: str
    intermediate: int
    """I, logical: w13 has 2I rows and w2 I columns."""
    out_dtype: str
    """By name, ``"bfloat16"``: torch 2.10 and 2.11 hand an operator in an ahead-of-time compiled package another dtype
    than the one exported."""
    backend: str
    """By name; or several in the order of preference, ``"aiter, reference"``: the first that takes the call runs it.
    Which one that is may depend on how many tokens come, and a compiler traces with any number of them."""
    hidden_scale: Tensor | None = None
    activation: str = "silu"
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_mask: Tensor | None = None
    doweight_stage1: bool = False
    swiglu_limit: float | None = None
    activation_dtype: str | None = None
    scale_rule: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What `out_dtype` names."""
        return getattr(torch, self.out_dtype)  # type: ignore[no-any-return]

    @property
    def hidden(self) -> int:
        """H, logical: the columns of w13 and the rows of w2."""
        return self.hidden_states.shape[-1] * (1 if self.hidden_scale is None else 2)

    @property
    def w13(self) -> PackedStorage:
        return PackedStorage(
            self.w13_qdata,
            self.w13_scale,
            Geometry(2 * self.intermediate, self.hidden, gate_up=True),
            find_layout(self.w13_kind),
        )

    @property
    def w2(self) -> PackedStorage:
        return PackedStorage(
            self.w2_qdata,
            self.w2_scale,
            Geometry(self.hidden, self.intermediate, gate_up=False),
            find_layout(self.w2_kind),
        )

    @property
    def intermediate_scale_rule(self) -> str | None:
        """How what enters a GEMM is quantised: None where it stays as it comes."""
        return None if self.activation_dtype is None else self.scale_rule or "even"

    def check(self) -> None:
        """Raise ValueError or TypeError for what no backend could compute; looks at shapes, dtypes and devices only,
        never at data."""
        experts, hidden, intermediate = self.w13_qdata.shape[0], self.hidden, self.intermediate
        tokens = self.hidden_states.shape[0] if self.hidden_states.dim() == 2 else None
        if tokens is None:
            raise ValueError(f"hidden_states must be [tokens, K], found shape {list(self.hidden_states.shape)}")
        if self.hidden_scale is None:
            if self.hidden_states.dtype not in _HIDDEN_DTYPES:
                raise TypeError(
                    f"hidden_states must be {_either(_HIDDEN_DTYPES)} (or packed uint8 with hidden_scale), found "
                    f"{self.hidden_states.dtype}"
                )
        else:
            _check_dtype("hidden_states with hidden_scale", self.hidden_states, (torch.uint8,))
            _check_dtype("hidden_scale", self.hidden_scale, (torch.uint8,))
            _check_shape("hidden_scale", self.hidden_scale, (tokens, hidden // mxfp4.BLOCK))
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            geometry = weight.geometry
            _check_shape(f"{name}_qdata", weight.qdata, (experts, geometry.padded_rows, geometry.padded_columns // 2))
            _check_shape(
                f"{name}_scale", weight.scale, (experts, geometry.padded_rows, geometry.padded_columns // mxfp4.BLOCK)
            )
        if self.topk_ids.dim() != 2 or self.topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids must be [{tokens}, topk], found shape {list(self.topk_ids.shape)}")
        _check_dtype("topk_ids", self.topk_ids, _ID_DTYPES)
        _check_shape("topk_weight", self.topk_weight, tuple(self.topk_ids.shape))
        if not self.topk_weight.is_floating_point():
            raise TypeError(f"topk_weight must be floating point, found {self.topk_weight.dtype}")
        for name, bias, width in (("w13_bias", self.w13_bias, 2 * intermediate), ("w2_bias", self.w2_bias, hidden)):
            if bias is not None:
                _check_shape(name, bias, (experts, width))
                _check_dtype(name, bias, _HIDDEN_DTYPES)
        if self.expert_mask is not None:
            _check_dtype("expert_mask", self.expert_mask, (torch.int32,))
            if self.expert_mask.dim() != 1 or self.expert_mask.shape[0] < experts:
                raise ValueError(
                    "expert_mask must be [global experts], 1 where local, found shape "
                    f"{list(self.expert_mask.shape)} for {experts} local experts"
                )
        self._check_options()
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor) and tensor.device != self.w13_qdata.device:
                raise ValueError(
                    f"all tensors must be on the device of w13, {self.w13_qdata.device}; found {name} on "
                    f"{tensor.device}"
                )

    def _check_options(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; known activations: {', '.join(map(repr, ACTIVATIONS))}"
            )
        if self.activation_dtype not in (None, "mxfp4"):
            raise ValueError(
                f"activation_dtype must be None (activations as they come) or 'mxfp4', found {self.activation_dtype!r}"
            )
        if self.scale_rule is not None:
            if self.scale_rule not in mxfp4.SCALE_RULES:
                raise ValueError(
                    f"unknown scale_rule {self.scale_rule!r}; known rules: {', '.join(map(repr, mxfp4.SCALE_RULES))}"
                )
            if self.activation_dtype is None:
                raise ValueError(
                    f"scale_rule={self.scale_rule!r} quantises activations, so it needs activation_dtype='mxfp4'"
                )
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise ValueError(
                f"swiglu_limit must be positive, or None for the activation's own, found {self.swiglu_limit}"
            )
        if self.dtype not in _HIDDEN_DTYPES:
            raise TypeError(f"out_dtype must be {_either(_HIDDEN_DTYPES)}, found {self.dtype}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found shape {list(tensor.shape)}")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, found {tensor.dtype}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
