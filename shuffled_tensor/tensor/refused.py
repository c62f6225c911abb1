# SPDX-License-Identifier: MIT
"""The operations that a :class:`ShuffledMXFP4Tensor` refuses, and what to do instead: more rows of
``ShuffledMXFP4Tensor.operations``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch

from shuffled_tensor.tensor.base import Operator
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["REFUSED", "refuse"]

aten = torch.ops.aten

REFUSED: dict[str, tuple[tuple[Operator, ...], str]] = {
    "changes size or memory under the layout": (
        (
            aten.set_.source_Tensor,
            aten.set_.source_Storage,
            aten.set_.source_Storage_storage_offset,
            aten.set_.default,
            aten.resize_.default,
            aten.resize_as_.default,
            aten.as_strided_.default,
            aten.t_.default,
            aten.transpose_.default,
            aten.unsqueeze_.default,
            aten.squeeze_.default,
            aten.view.dtype,
        ),
        "make a new tensor, or write values with copy_",
    ),
    "computes in place": (
        (
            aten.add_.Tensor,
            aten.sub_.Tensor,
            aten.mul_.Tensor,
            aten.div_.Tensor,
            aten.lerp_.Scalar,
            aten.clamp_.default,
            aten.nan_to_num_.default,
            aten.masked_fill_.Scalar,
            aten.index_fill_.int_Scalar,
            aten.index_add_.default,
            aten.scatter_.src,
            aten.scatter_.value,
            aten.normal_.default,
            aten.uniform_.default,
            aten.random_.default,
        ),
        "compute on .dequantize(), and copy_ the result back, which quantises it",
    ),
    "computes elementwise": (
        (
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
            aten.div.Tensor,
            aten.neg.default,
            aten.abs.default,
            aten.eq.Tensor,
            aten.ne.Tensor,
            aten.isnan.default,
            aten.isinf.default,
            aten.nan_to_num.default,
            aten.clamp.default,
            aten.where.self,
            aten.masked_fill.Scalar,
        ),
        "call .dequantize() for a plain tensor; torch.equal and torch.allclose compare values",
    ),
    "reduces the values": (
        (
            aten.sum.default,
            aten.mean.default,
            aten.max.default,
            aten.min.default,
            aten.any.default,
            aten.all.default,
            aten.linalg_vector_norm.default,
            aten._foreach_norm.Scalar,
        ),
        "call .dequantize() for a plain tensor; .logical_checksum() is one string for all of them",
    ),
    "takes out a single number": (
        (aten._local_scalar_dense.default,),
        "call .dequantize() for a plain tensor",
    ),
    "arranges values anew": (
        (
            aten.repeat.default,
            aten.flip.default,
            aten.roll.default,
            aten.gather.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.unfold.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten._to_sparse.default,
        ),
        "pick experts with an index, or call .dequantize()",
    ),
    "multiplies experts by groups of tokens": (
        (aten._grouped_mm.default,),
        "call shuffled_tensor.fused_moe",
    ),
    "reduces values between ranks": (
        ("c10d::allreduce_", "c10d::reduce_", "c10d::_reduce_scatter_base_", "c10d::reduce_scatter_"),
        "packed codes are not added; reduce .dequantize(), and copy_ the result back, which quantises it",
    ),
}


def refuse(why: str, remedy: str, operator: Operator, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError: what the operator would do, and what to do instead."""
    raise NotImplementedError(
        f"{operator} {why} of a ShuffledMXFP4Tensor, whose bytes are packed MXFP4: {remedy}; .dequantize() is plain"
    )


for _why, (_operators, _remedy) in REFUSED.items():
    for _key in _operators:
        ShuffledMXFP4Tensor.operations.implements(_key, group="Refused")(partial(refuse, _why, _remedy, _key))
