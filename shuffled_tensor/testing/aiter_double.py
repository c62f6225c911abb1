# SPDX-License-Identifier: MIT
"""An ``aiter`` that keeps the contract of one era, on any device.

It computes from the bytes it is given, by the index formulas of the layouts: a wrong layout, tag or gate mode gives a
wrong number or the era's own error, as in life. It validates what that era validates, and ignores what that era
ignores.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.backends.aiter import versions as backend

ERAS = ("A", "B", "C", "D", "E", "F", "G")

# In which byte order a kernel reads w13; w2 is tiled in both of the first two.
GUGU, PLAIN, ROW_MAJOR = "gate-up interleaved tiles", "separated tiles", "row-major"


class ActivationType(Enum):
    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(Enum):
    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3


# The operator's parameters as aiter registers them: mutates_args="unknown" makes every tensor an alias.
_PARAMETERS = (
    "Tensor hidden_states", "Tensor w1", "Tensor w2", "Tensor topk_weight", "Tensor topk_ids", "Tensor? "
    "expert_mask=None",
    "SymInt activation=0", "SymInt quant_type=0", "bool doweight_stage1=False", "Tensor? w1_scale=None",
    "Tensor? w2_scale=None", "Tensor? a1_scale=None", "Tensor? a2_scale=None", "SymInt block_size_M=-1",
    "Tensor? num_local_tokens=None", "SymInt moe_sorting_dispatch_policy=0", "ScalarType? dtype=None",
    "SymInt hidden_pad=0", "SymInt intermediate_pad=0", "Tensor? bias1=None", "Tensor? bias2=None",
)  # fmt: skip
_GATE_MODE = 'str gate_mode="separated"'
_EARLY = (*_PARAMETERS, "float swiglu_limit=0.0", _GATE_MODE)
_LATE = (*_PARAMETERS, "float? swiglu_limit=None", "float? beta=None", "float? linear_beta=None", _GATE_MODE)
_LATEST = (
    *_LATE, "SymInt ep_arena_handle=0", "SymInt ep_combine_input_offset=0", "SymInt ep_slot_stride_bytes=0",
    "SymInt ep_max_tokens_per_rank=0", "SymInt ep_world_size=0", "Tensor? ep_source_token_map=None",
)  # fmt: skip


@dataclass(frozen=True)
class Contract:
    """What can be seen of an era from outside."""

    parameters: tuple[str, ...]
    config: tuple[str, ...]
    """Parameters of get_2stage_cfgs behind those common to all."""
    attributes: tuple[str, ...]
    """Names in aiter.fused_moe by which it is known."""
    hip: bool
    rule: str


_STAGES = ("_mxfp4_a4w4_stage1_fw",)
_LATE_CONFIG = ("is_ep", "has_stage2_bias", "opus_weights_shuffled")

CONTRACTS = {
    "A": Contract(_EARLY, ("shuffle_kind", "is_ep"), ("_mxfp4_moe_run",), True, "even"),
    "B": Contract(_EARLY, ("is_guinterleave", "is_ep"), ("_mxfp4_moe_run",), True, "even"),
    "C": Contract(_EARLY, ("is_ep",), ("mxfp4_moe_run",), True, "even"),
    "D": Contract(_EARLY, ("is_ep", "shuffle_kind"), ("_MXFP4_PORT_KIND", "mxfp4_moe_run"), True, "even"),
    "E": Contract(_EARLY, ("is_ep",), _STAGES, True, "even"),
    "F": Contract(_LATEST, _LATE_CONFIG, _STAGES, False, "round_up"),
    "G": Contract((*_LATE, "bool? is_shuffled=None"), _LATE_CONFIG, _STAGES, False, "round_up"),
}

_CONFIG = (
    "token", "model_dim", "inter_dim", "expert", "topk", "dtype", "q_dtype_a", "q_dtype_w", "q_type", "use_g1u1",
    "activation", "doweight_stage1", "hidden_pad", "intermediate_pad", "is_shuffled", "gate_mode",
)  # fmt: skip


@dataclass
class Double:
    """A handle on the double.

    Attributes:
        era: its letter.
        tuned: whether its table of tuned kernels has a row for every shape, or for none.
        reads: for each call that reached a kernel, the byte order in which that kernel read w13.
    """

    era: str
    tuned: bool
    reads: list[str] = field(default_factory=list)

    def answer(self, hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weight: Tensor, topk_ids: Tensor) -> Tensor:
        """What this era's kernels make of dense float32 weights ``[E, 2I, H]`` and ``[E, H, I]``, to the bit:
        bfloat16."""
        rule = CONTRACTS[self.era].rule
        x = _round_trip(hidden_states.float(), rule)
        slots = torch.zeros(*topk_ids.shape, w2.shape[1], dtype=torch.bfloat16, device=x.device)
        for expert in range(len(w13)):
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ w13[expert].T).chunk(2, dim=1)
            down = _round_trip(torch.nn.functional.silu(gate) * up, rule) @ w2[expert].T
            slots[token, slot] = (down * topk_weight[token, slot].unsqueeze(1)).bfloat16()
        out = torch.zeros_like(slots[:, 0])
        for column in range(slots.shape[1]):
            out += slots[:, column]  # bfloat16 adds, one after the other
        return out

    def configuration(self, **given: Any) -> SimpleNamespace:
        """`get_2stage_cfgs`: which kind of kernel a shape, a gate mode and a tag lead to."""
        row = self.tuned and given["q_dtype_w"] is torch.float4_e2m1fn_x2 and not given["doweight_stage1"]
        separated = given["gate_mode"] == "separated"
        mxfp4 = {
            "A": row and separated and given.get("shuffle_kind") == "mxfp4_moe",
            "B": row and separated and given.get("is_guinterleave") is True,
            "D": row and separated and given.get("shuffle_kind") == "mxfp4_guinterleave",
            "F": row and separated,
            "G": row and separated,
        }.get(self.era, row and not separated)
        return SimpleNamespace(pipeline=self._kernel if mxfp4 else None, mxfp4_hip=mxfp4, output_aux=mxfp4)

    def fused_moe_(self, given: dict[str, Any]) -> Tensor:
        """The operator."""
        w1, w2, hidden_states = given["w1"], given["w2"], given["hidden_states"]
        dtype = given["dtype"] or hidden_states.dtype
        assert dtype in (torch.float16, torch.bfloat16), f"Fused_moe unsupported out dtype: {dtype}"
        if given["topk_ids"].dtype is not torch.int32 or given["topk_weight"].dtype is not torch.float32:
            raise RuntimeError("expected topk_ids of int32 and topk_weight of float32")
        if given["quant_type"] != QuantType.per_1x32.value:
            raise NotImplementedError("the double has kernels for per_1x32 alone")
        reads = self._kernel(given)
        self.reads.append(reads)
        codes13, codes2 = _read_weight(w1, reads, True), _read_weight(w2, reads, False)
        scale13 = _read_scale(given["w1_scale"], w1.shape, reads, True)
        scale2 = _read_scale(given["w2_scale"], w2.shape, reads, False)
        if hidden_states.shape[1] != w2.shape[1] or not hidden_states.is_contiguous():
            raise RuntimeError("the kernel would read past the end of hidden_states")
        return self.answer(
            hidden_states,
            mxfp4.dequantize(codes13, scale13),
            mxfp4.dequantize(codes2, scale2),
            given["topk_weight"],
            given["topk_ids"],
        ).to(dtype)

    def _kernel(self, given: dict[str, Any]) -> str:
        """The byte order that the kernel behind a call reads, or the error that the era raises."""
        w1, w2 = given["w1"], given["w2"]
        tag = getattr(w1, "is_guinterleave", False) if self.era == "B" else getattr(w1, "shuffle_kind", None)
        shuffled = getattr(w1, "is_shuffled", False) or getattr(w2, "is_shuffled", False)
        if given.get("is_shuffled") is not None:
            shuffled = given["is_shuffled"]
        found = self.configuration(
            q_dtype_w=w1.dtype,
            doweight_stage1=given["doweight_stage1"],
            gate_mode=given["gate_mode"],
            shuffle_kind=tag,
            is_guinterleave=tag,
        )
        mxfp4_tag = tag is True if self.era == "B" else tag == "mxfp4_moe"
        if self.era in "AB" and mxfp4_tag != (found.pipeline is not None):
            raise TypeError(f"fused_moe: weight/CSV backend mismatch. {tag=}, csv_pipeline={found.pipeline!r}")
        if self.era == "D" and mxfp4_tag:
            if w1.dtype is not torch.float4_e2m1fn_x2:
                raise TypeError(f"fused_moe: weight/CSV backend mismatch. {tag=}, {w1.dtype=}")
            return GUGU  # its FlyDSL port, made up where no row is tuned, under either gate mode
        if found.mxfp4_hip:
            if given["expert_mask"] is not None and self.era in "ABFG":
                raise NotImplementedError("MXFP4 a4w4 does not support expert-parallel yet")
            return PLAIN if self.era in "FG" else GUGU
        if self.era in "FG" and given["gate_mode"] == "interleave":
            return GUGU  # its a8w4 and a16w4 kernels
        return PLAIN if shuffled and w1.dtype is torch.float4_e2m1fn_x2 else ROW_MAJOR


def _round_trip(values: Tensor, rule: str) -> Tensor:
    return mxfp4.dequantize(*mxfp4.quantize(values, scale_rule=rule))


def _raw(data: Tensor, experts: int) -> Tensor:
    """The bytes from a tensor's data pointer on, whatever its strides say: what a kernel sees."""
    size = data.numel() // experts
    return data.view(torch.uint8).as_strided((experts, size), (size, 1), data.storage_offset())


def _physical_row(row: Tensor, rows: int, reads: str, gate_up: bool) -> Tensor:
    if reads != GUGU or not gate_up:
        return row
    half, i = row // (rows // 2), row % (rows // 2)
    return 32 * (i // 16) + 16 * half + i % 16


def _read_weight(weight: Tensor, reads: str, gate_up: bool) -> Tensor:
    experts, rows, width = weight.shape
    n = _physical_row(torch.arange(rows, device=weight.device).unsqueeze(1), rows, reads, gate_up)
    b = torch.arange(width, device=weight.device)
    offset = (n // 16) * 16 * width + (b // 16) * 256 + (n % 16) * 16 + b % 16
    if reads == ROW_MAJOR:
        offset = n * width + b
    return _raw(weight, experts)[:, offset]


def _read_scale(scale: Tensor, shape: torch.Size, reads: str, gate_up: bool) -> Tensor:
    experts, rows, width = shape[0], shape[1], shape[2] // 16
    n = _physical_row(torch.arange(rows, device=scale.device).unsqueeze(1), rows, reads, gate_up)
    k = torch.arange(width, device=scale.device)
    offset = (n // 32) * 32 * width + (k // 8) * 256 + (k % 4) * 64 + (n % 16) * 4 + (k % 8 // 4) * 2 + (n % 32) // 16
    if reads == ROW_MAJOR:
        offset = n * width + k
    return _raw(scale, experts)[:, offset]


def _padded_tokens(tokens: int) -> int:
    """`get_padded_M`: the number of tokens that tuned kernels are looked up by."""
    return 1 << (tokens - 1).bit_length() if tokens < 32768 else 32768 if tokens < 131072 else 131072


@contextmanager
def aiter_double(era: str, *, tuned: bool = True) -> Iterator[Double]:
    """Inside, ``import aiter`` gives a double of one era, and ``torch.ops.aiter.fused_moe_`` is its operator.

    Args:
        era: one of :data:`ERAS`.
        tuned: whether its table of tuned kernels has a row for the shapes it is called with.

    Raises:
        ValueError: an unknown era.
        RuntimeError: an aiter is loaded already.
    """
    if era not in CONTRACTS:
        raise ValueError(f"unknown era {era!r}; known eras: {', '.join(ERAS)}")
    if "aiter" in sys.modules or hasattr(torch.ops.aiter, "fused_moe_"):
        raise RuntimeError("an aiter is loaded already, and a double beside it would be neither")
    double, contract = Double(era, tuned), CONTRACTS[era]
    library = torch.library.Library("aiter", "FRAGMENT")
    modules = _modules(double, contract, library)
    sys.modules.update(modules)
    try:
        yield double
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "aiter"]:
            del sys.modules[name]
        backend.forget(modules["aiter.fused_moe"])
        library._destroy()


def _modules(double: Double, contract: Contract, library: torch.library.Library) -> dict[str, ModuleType]:
    aliased = [
        parameter.replace("Tensor", f"Tensor(a{index}!)", 1) for index, parameter in enumerate(contract.parameters)
    ]
    library.define(f"fused_moe_({', '.join(aliased)}) -> Tensor")
    operator = torch.ops.aiter.fused_moe_.default
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return defaults | {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return double.fused_moe_(named(args, kwargs))

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        given = named(args, kwargs)
        dtype = given["dtype"] or given["hidden_states"].dtype
        return torch.empty(len(given["topk_ids"]), given["w2"].shape[1], dtype=dtype, device=given["topk_ids"].device)

    library.impl("fused_moe_", kernel, "CPU")
    library.impl("fused_moe_", kernel, "CUDA")
    library._register_fake("fused_moe_", fake)

    # the Python entry point: enums instead of their values, None for no block size, and a `splitk` that goes nowhere
    python_defaults = defaults | {"activation": ActivationType.Silu, "quant_type": QuantType.No, "block_size_M": None}
    names = [argument.name for argument in arguments]
    names.insert(names.index("bias2") + 1, "splitk")
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=(python_defaults | {"splitk": 0}).get(name, inspect.Parameter.empty),
            )
            for name in names
        ]
    )

    def fused_moe(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["splitk"]
        given["activation"] = given["activation"].value
        given["quant_type"] = given["quant_type"].value
        given["block_size_M"] = given["block_size_M"] or -1
        out: Tensor = torch.ops.aiter.fused_moe_(**given)
        return out

    fused_moe.__signature__ = signature  # type: ignore[attr-defined]
    config_names = (*_CONFIG, *contract.config)
    config_defaults = {"is_shuffled": True, "gate_mode": "separated", **dict.fromkeys(contract.config)}
    config_signature = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=config_defaults.get(name, inspect.Parameter.empty),
            )
            for name in config_names
        ]
    )

    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> SimpleNamespace:
        bound = config_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return double.configuration(**bound.arguments)

    get_2stage_cfgs.__signature__ = config_signature  # type: ignore[attr-defined]

    aiter, module = ModuleType("aiter"), ModuleType("aiter.fused_moe")
    aiter.__path__ = []
    aiter.ActivationType, aiter.QuantType, aiter.fused_moe = ActivationType, QuantType, module  # type: ignore[attr-defined]
    module.fused_moe, module.fused_moe_ = fused_moe, torch.ops.aiter.fused_moe_  # type: ignore[attr-defined]
    module.get_2stage_cfgs, module.get_padded_M = get_2stage_cfgs, _padded_tokens  # type: ignore[attr-defined]
    for name in contract.attributes:
        setattr(module, name, "mxfp4_moe" if name == "_MXFP4_PORT_KIND" else kernel)
    if contract.hip:
        aiter.mxfp4_moe_gemm1_a4w4 = kernel  # type: ignore[attr-defined]
    return {"aiter": aiter, "aiter.fused_moe": module}
