# SPDX-License-Identifier: MIT
"""An ``aiter`` that keeps the contract of one version, on any device.

It computes from the bytes it is given, by the index formulas of the layouts: a wrong layout, tag or gate mode gives a
wrong number or the version's own error, as in life. It validates what that version validates, and ignores what that
version ignores. What a version does is said by the fields of its row in :data:`VERSIONS`, and by nothing else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shuffled_tensor import mxfp4
from shuffled_tensor.backends.aiter import versions as backend

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
_OPERATOR = (
    "Tensor hidden_states", "Tensor w1", "Tensor w2", "Tensor topk_weight", "Tensor topk_ids", "Tensor? "
    "expert_mask=None",
    "SymInt activation=0", "SymInt quant_type=0", "bool doweight_stage1=False", "Tensor? w1_scale=None",
    "Tensor? w2_scale=None", "Tensor? a1_scale=None", "Tensor? a2_scale=None", "SymInt block_size_M=-1",
    "Tensor? num_local_tokens=None", "SymInt moe_sorting_dispatch_policy=0", "ScalarType? dtype=None",
    "SymInt hidden_pad=0", "SymInt intermediate_pad=0", "Tensor? bias1=None", "Tensor? bias2=None",
)  # fmt: skip
_GATE_MODE = 'str gate_mode="separated"'
_EARLY = (*_OPERATOR, "float swiglu_limit=0.0", _GATE_MODE)
_LATE = (*_OPERATOR, "float? swiglu_limit=None", "float? beta=None", "float? linear_beta=None", _GATE_MODE)
_SCATTER = (
    "SymInt ep_arena_handle=0", "SymInt ep_combine_input_offset=0", "SymInt ep_slot_stride_bytes=0",
    "SymInt ep_max_tokens_per_rank=0", "SymInt ep_world_size=0", "Tensor? ep_source_token_map=None",
)  # fmt: skip

# Parameters of the Python function: most are the operator's. `splitk` goes nowhere, and the rest to other operators.
_CALL = (*(parameter.split()[1].split("=")[0] for parameter in _OPERATOR), "splitk", "swiglu_limit")
_SHARED = ("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale", "shared_expert_id")
_CALL_EARLY = (*_CALL, "gate_mode")
_CALL_LATE = (*_CALL, "beta", "linear_beta", "gate_mode", *_SHARED)
_ELSEWHERE = dict.fromkeys((*_SHARED, "stage2_scatter")) | {"shared_expert_id": -1}

_CONFIG = (
    "token", "model_dim", "inter_dim", "expert", "topk", "dtype", "q_dtype_a", "q_dtype_w", "q_type", "use_g1u1",
    "activation", "doweight_stage1", "hidden_pad", "intermediate_pad", "is_shuffled", "gate_mode",
)  # fmt: skip
_CONFIG_LATE = (*_CONFIG, "is_ep", "has_stage2_bias", "opus_weights_shuffled")


# The first stages that a configuration may name; which one it is tells which byte order is read.


def _mxfp4_a4w4_stage1_fw() -> None: ...


def _flydsl_stage1_wrapper() -> None: ...


def ck_moe_stage1() -> None: ...


def cktile_moe_stage1() -> None: ...


@dataclass(frozen=True, kw_only=True)
class FakeVersion:
    """What can be seen of one version of aiter from outside."""

    name: str
    """As in `backends.aiter.versions`."""
    operator: tuple[str, ...]
    """Parameters of the operator, in the words of its schema."""
    call: tuple[str, ...]
    """Names of the parameters of the Python function fused_moe."""
    config: tuple[str, ...]
    """Names of the parameters of get_2stage_cfgs."""
    attributes: Mapping[str, str | None]
    """Names in aiter.fused_moe by which it is known, and the value of a constant; None is a function."""
    hip: bool
    """Whether it has the HIP operator of its first kernels."""
    scale_rule: mxfp4.ScaleRule
    """By which its kernels quantise activations."""
    gate_mode: str
    """Under which a shape may have a tuned kernel."""
    reads: str
    """The byte order in which tuned kernels read w13."""
    tag: str | None = None
    """The attribute of w1 that is read beside `is_shuffled`."""
    tuned_tag: str | bool | None = None
    """The value of it that leads to tuned kernels; None where nothing but the gate mode does."""
    untagged: str | bool | None = None
    """The value that a weight without it counts as."""
    mismatch: type[Exception] | None = None
    """What a tag without a tuned kernel raises, and such a kernel without a tag; None where other kernels are taken
    silently."""
    port_tag: str | None = None
    """The value of it that leads to kernels for any shape, made up where none is tuned, under either gate mode."""
    port_above: int = 0
    """The hidden size up to which those kernels are wrong; here, as if they read rows in their order."""
    expert_mask: type[Exception] | None = None
    """What tuned kernels raise for one; None where they drop it."""
    split_k: bool = False
    """Whether few tokens of a shape that is not tuned go to a kernel that reads gate-up interleaved tiles, under either
    gate mode, where FlyDSL's kernels do not take them."""
    flydsl: bool = True
    """Whether FlyDSL's kernels take such shapes, unless they are switched off."""
    interleaved: str | None = None
    """The byte order that kernels for any shape read under the gate mode "interleave"; None where that is the same
    as under the other: tiles or rows, by `is_shuffled`."""


_ROWS = (
    FakeVersion(
        name="#3470, shuffle_kind",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "shuffle_kind", "is_ep"),
        attributes={"_mxfp4_moe_run": None},
        hip=True,
        scale_rule="even",
        gate_mode="separated",
        reads=GUGU,
        tag="shuffle_kind",
        tuned_tag="mxfp4_moe",
        mismatch=TypeError,
        expert_mask=NotImplementedError,
    ),
    FakeVersion(
        name="#3470, is_guinterleave",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "is_guinterleave", "is_ep"),
        attributes={"_mxfp4_moe_run": None},
        hip=True,
        scale_rule="even",
        gate_mode="separated",
        reads=GUGU,
        tag="is_guinterleave",
        tuned_tag=True,
        untagged=False,
        mismatch=TypeError,
        expert_mask=NotImplementedError,
    ),
    FakeVersion(
        name="#3470",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "is_ep"),
        attributes={"mxfp4_moe_run": None},
        hip=True,
        scale_rule="even",
        gate_mode="interleave",
        reads=GUGU,
    ),
    FakeVersion(
        name="#3788",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "is_ep", "shuffle_kind"),
        attributes={"_mxfp4_moe_run": None, "mxfp4_moe_run": None, "_MXFP4_PORT_KIND": "mxfp4_moe"},
        hip=True,
        scale_rule="even",
        gate_mode="separated",
        reads=GUGU,
        tag="shuffle_kind",
        tuned_tag="mxfp4_guinterleave",
        port_tag="mxfp4_moe",
        port_above=512,
    ),
    FakeVersion(
        name="#3827",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "is_ep"),
        attributes={"_mxfp4_a4w4_stage1_fw": None},
        hip=True,
        scale_rule="even",
        gate_mode="interleave",
        reads=GUGU,
    ),
    FakeVersion(
        name="#3832",
        operator=(*_LATE, *_SCATTER),
        call=(*_CALL_LATE, "stage2_scatter"),
        config=(*_CONFIG_LATE, "config_file"),
        attributes={"_mxfp4_a4w4_stage1_fw": None},
        hip=False,
        scale_rule="round_up",
        gate_mode="separated",
        reads=PLAIN,
        expert_mask=NotImplementedError,
        split_k=True,
        interleaved=GUGU,  # its a8w4 and a16w4 kernels
    ),
    FakeVersion(
        name="#4542",
        operator=(*_LATE, "bool? is_shuffled=None"),
        call=(*_CALL_LATE, "is_shuffled"),
        config=_CONFIG_LATE,
        attributes={"_mxfp4_a4w4_stage1_fw": None},
        hip=False,
        scale_rule="round_up",
        gate_mode="separated",
        reads=PLAIN,
        expert_mask=NotImplementedError,
        split_k=True,
        interleaved=GUGU,
    ),
    FakeVersion(
        name="before #3832",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=(*_CONFIG, "is_ep", "has_stage2_bias"),
        attributes={},
        hip=False,
        scale_rule="round_up",
        gate_mode="separated",
        reads=PLAIN,
        expert_mask=NotImplementedError,  # in life they take it; the fake has none that do
        split_k=True,
        interleaved=GUGU,
    ),
    FakeVersion(
        name="before #3832, without is_ep",
        operator=_EARLY,
        call=_CALL_EARLY,
        config=_CONFIG,
        attributes={},
        hip=False,
        scale_rule="amax4",
        gate_mode="separated",
        reads=PLAIN,
        expert_mask=NotImplementedError,
        split_k=True,
        flydsl=False,
        interleaved=GUGU,
    ),
)

VERSIONS: Mapping[str, FakeVersion] = {row.name: row for row in _ROWS}
"""By name. The row of #3832 has the signatures that its version had grown by August 2026."""


@dataclass
class FakeAiter:
    """A handle on the fake.

    Attributes:
        version: its row.
        tuned: whether its table of tuned kernels has a row for every shape, or for none.
        flydsl: whether FlyDSL's kernels take the shapes that it has none for, where the version can: else it is as with
            AITER_FLYDSL_FORCE=0.
        reads: for each call that reached a kernel, the byte order in which that kernel read w13.
    """

    version: FakeVersion
    tuned: bool
    flydsl: bool = True
    reads: list[str] = field(default_factory=list)

    def answer(self, hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weight: Tensor, topk_ids: Tensor) -> Tensor:
        """What this version's kernels make of dense float32 weights ``[E, 2I, H]`` and ``[E, H, I]``, to the bit:
        bfloat16."""
        rule = self.version.scale_rule
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
        """`get_2stage_cfgs`: whether a shape, a gate mode and a tag lead to a tuned kernel."""
        version = self.version
        row = self.tuned and given["q_dtype_w"] is torch.float4_e2m1fn_x2 and not given["doweight_stage1"]
        tagged = version.tuned_tag is None or _same(given.get(version.tag or ""), version.tuned_tag)
        mxfp4 = row and given["gate_mode"] == version.gate_mode and tagged
        if mxfp4:
            stage1 = _mxfp4_a4w4_stage1_fw if "_mxfp4_a4w4_stage1_fw" in version.attributes else _flydsl_stage1_wrapper
        elif self.flydsl and version.flydsl:
            stage1 = _flydsl_stage1_wrapper
        elif version.split_k and given["token"] * given["topk"] <= given["expert"] and given["model_dim"] >= 512:
            stage1 = cktile_moe_stage1
        else:
            stage1 = ck_moe_stage1
        pipeline = self._kernel if mxfp4 else None
        return SimpleNamespace(pipeline=pipeline, mxfp4_hip=mxfp4, output_aux=mxfp4, stage1=partial(stage1))

    def fused_moe_(self, given: dict[str, Any]) -> Tensor:
        """The operator."""
        w1, w2, hidden_states = given["w1"], given["w2"], given["hidden_states"]
        dtype = given["dtype"] or hidden_states.dtype
        assert dtype in (torch.float16, torch.bfloat16), f"Fused_moe unsupported out dtype: {dtype}"
        if given["topk_ids"].dtype is not torch.int32 or given["topk_weight"].dtype is not torch.float32:
            raise RuntimeError("expected topk_ids of int32 and topk_weight of float32")
        if given["quant_type"] != QuantType.per_1x32.value:
            raise NotImplementedError("the fake has kernels for per_1x32 alone")
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
        """The byte order that the kernel behind a call reads, or the error that the version raises."""
        version, w1, w2 = self.version, given["w1"], given["w2"]
        tag = getattr(w1, version.tag, version.untagged) if version.tag else None
        shuffled = getattr(w1, "is_shuffled", False) or getattr(w2, "is_shuffled", False)
        if given.get("is_shuffled") is not None:
            shuffled = given["is_shuffled"]
        if version.port_tag is not None and _same(tag, version.port_tag):
            if w1.dtype is not torch.float4_e2m1fn_x2:
                raise TypeError(f"fused_moe: weight/CSV backend mismatch. {tag=}, {w1.dtype=}")
            return version.reads if w2.shape[1] > version.port_above else ROW_MAJOR
        found = self.configuration(
            token=_padded_tokens(len(given["topk_ids"])),
            topk=given["topk_ids"].shape[1],
            expert=len(w1),
            model_dim=w2.shape[1],
            q_dtype_w=w1.dtype,
            doweight_stage1=given["doweight_stage1"],
            gate_mode=given["gate_mode"],
            **({version.tag: tag} if version.tag else {}),
        )
        if version.mismatch and _same(tag, version.tuned_tag) != (found.pipeline is not None):
            raise version.mismatch(f"fused_moe: weight/CSV backend mismatch. {tag=}, csv_pipeline={found.pipeline!r}")
        if found.mxfp4_hip:
            if given["expert_mask"] is not None and version.expert_mask:
                raise version.expert_mask("MXFP4 a4w4 does not support expert-parallel yet")
            return version.reads
        if version.interleaved and given["gate_mode"] == "interleave":
            return version.interleaved
        if not shuffled or w1.dtype is not torch.float4_e2m1fn_x2:
            return ROW_MAJOR
        return GUGU if found.stage1.func is cktile_moe_stage1 else PLAIN


def _same(tag: Any, value: str | bool | None) -> bool:
    """Whether a tag has a value; 1 is not True."""
    return type(tag) is type(value) and bool(tag == value)


def _round_trip(values: Tensor, rule: mxfp4.ScaleRule) -> Tensor:
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
def fake_aiter(version: str, *, tuned: bool = True, flydsl: bool = True) -> Iterator[FakeAiter]:
    """Inside, ``import aiter`` gives a fake of one version, and ``torch.ops.aiter.fused_moe_`` is its operator.

    Args:
        version: the name of one of :data:`VERSIONS`.
        tuned: whether its table of tuned kernels has a row for the shapes it is called with.
        flydsl: whether FlyDSL's kernels take the shapes that it has none for, where the version can: else it is as with
            AITER_FLYDSL_FORCE=0.

    Raises:
        ValueError: an unknown version.
        RuntimeError: an aiter is loaded already.
    """
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}; known versions: {'; '.join(VERSIONS)}")
    if "aiter" in sys.modules or hasattr(torch.ops.aiter, "fused_moe_"):
        raise RuntimeError("an aiter is loaded already, and a fake beside it would be neither")
    fake = FakeAiter(VERSIONS[version], tuned, flydsl)
    library = torch.library.Library("aiter", "FRAGMENT")
    modules = _modules(fake, library)
    sys.modules.update(modules)
    try:
        yield fake
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "aiter"]:
            del sys.modules[name]
        backend.forget(modules["aiter.fused_moe"])
        library._destroy()


def _modules(fake: FakeAiter, library: torch.library.Library) -> dict[str, ModuleType]:
    version = fake.version
    aliased = [parameter.replace("Tensor", f"Tensor(a{index}!)", 1) for index, parameter in enumerate(version.operator)]
    library.define(f"fused_moe_({', '.join(aliased)}) -> Tensor")
    operator = torch.ops.aiter.fused_moe_.default
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return defaults | {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return fake.fused_moe_(named(args, kwargs))

    def meta(*args: Any, **kwargs: Any) -> Tensor:
        given = named(args, kwargs)
        dtype = given["dtype"] or given["hidden_states"].dtype
        return torch.empty(len(given["topk_ids"]), given["w2"].shape[1], dtype=dtype, device=given["topk_ids"].device)

    library.impl("fused_moe_", kernel, "CPU")
    library.impl("fused_moe_", kernel, "CUDA")
    library._register_fake("fused_moe_", meta)

    # the Python entry point: enums instead of their values, and None for no block size
    call_defaults = defaults | _ELSEWHERE | {"activation": ActivationType.Silu, "quant_type": QuantType.No}
    call_signature = _signature(version.call, call_defaults | {"block_size_M": None, "splitk": 0})

    def fused_moe(*args: Any, **kwargs: Any) -> Tensor:
        bound = call_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name in _ELSEWHERE.keys() & given.keys():
            if given.pop(name) != _ELSEWHERE[name]:
                raise NotImplementedError(f"the fake has no kernels that take {name}")
        del given["splitk"]
        given["activation"] = given["activation"].value
        given["quant_type"] = given["quant_type"].value
        given["block_size_M"] = given["block_size_M"] or -1
        out: Tensor = torch.ops.aiter.fused_moe_(**given)
        return out

    fused_moe.__signature__ = call_signature  # type: ignore[attr-defined]
    config_defaults = dict.fromkeys(version.config[len(_CONFIG) :]) | {"is_shuffled": True, "gate_mode": "separated"}
    config_signature = _signature(version.config, config_defaults)

    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> SimpleNamespace:
        bound = config_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fake.configuration(**bound.arguments)

    get_2stage_cfgs.__signature__ = config_signature  # type: ignore[attr-defined]

    aiter, module = ModuleType("aiter"), ModuleType("aiter.fused_moe")
    aiter.__path__ = []
    aiter.ActivationType, aiter.QuantType, aiter.fused_moe = ActivationType, QuantType, module  # type: ignore[attr-defined]
    module.fused_moe, module.fused_moe_ = fused_moe, torch.ops.aiter.fused_moe_  # type: ignore[attr-defined]
    module.get_2stage_cfgs, module.get_padded_M = get_2stage_cfgs, _padded_tokens  # type: ignore[attr-defined]
    for name, value in version.attributes.items():
        setattr(module, name, kernel if value is None else value)
    if version.hip:
        aiter.mxfp4_moe_gemm1_a4w4 = kernel  # type: ignore[attr-defined]
    return {"aiter": aiter, "aiter.fused_moe": module}


def _signature(names: tuple[str, ...], defaults: Mapping[str, Any]) -> inspect.Signature:
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature([inspect.Parameter(name, kind, default=defaults.get(name, required)) for name in names])
