# SPDX-License-Identifier: MIT
"""An ``aiter`` that keeps the contract of one version, on any device.

It computes from the bytes it is given, by the index formulas of the layouts: a wrong layout, tag, gate mode or route
gives a wrong number or the version's own error, as in life. It validates what that version validates, and ignores what
that version ignores. What a version does is said by the fields of its row in :data:`VERSIONS`, and by nothing else.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
from shuffled_tensor.testing import fake_kernels as kernels
from shuffled_tensor.testing.fake_configuration import configuration, q_dtype_a
from shuffled_tensor.testing.fake_gemm import gemm_a4w4, get_hip_quant
from shuffled_tensor.testing.fake_kernels import GUGU, PLAIN, ROW_MAJOR, Launch, mxfp8, round_trip
from shuffled_tensor.testing.fake_versions import CONFIG_REQUIRED, ELSEWHERE, VERSIONS, FakeVersion, same

__all__ = ["GUGU", "PLAIN", "ROW_MAJOR", "VERSIONS", "FakeAiter", "FakeVersion", "fake_aiter"]

_BF16, _FP4, _FP8 = torch.bfloat16, torch.float4_e2m1fn_x2, torch.float8_e4m3fn


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


@dataclass
class FakeAiter:
    """A handle on the fake.

    Attributes:
        version: its row.
        tuned: whether its table of tuned kernels has a row for every shape, or for none.
        flydsl: whether flydsl is installed.
        bound: GPTOSS_SWIGLU_MXFP4_BF16_BOUND, as it was when the fake was made.
        reads: for each call that reached a kernel, the byte order in which that kernel read w13.
    """

    version: FakeVersion
    tuned: bool
    flydsl: bool
    bound: int
    reads: list[str] = field(default_factory=list)

    @property
    def silu_rule(self) -> mxfp4.ScaleRule:
        """By which kernels that are tuned for SiLU quantise."""
        return "even" if self.version.hip else self.version.scale_rule

    def answer(self, hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weight: Tensor, topk_ids: Tensor) -> Tensor:
        """What those kernels make of dense float32 weights ``[E, 2I, H]`` and ``[E, H, I]``, to the bit: bfloat16."""
        rule = self.silu_rule
        x = round_trip(hidden_states.float(), rule)
        slots = torch.zeros(*topk_ids.shape, w2.shape[1], dtype=torch.bfloat16, device=x.device)
        for expert in range(len(w13)):
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ w13[expert].T).chunk(2, dim=1)
            down = round_trip(torch.nn.functional.silu(gate) * up, rule) @ w2[expert].T
            slots[token, slot] = (down * topk_weight[token, slot].unsqueeze(1)).bfloat16()
        out = torch.zeros_like(slots[:, 0])
        for column in range(slots.shape[1]):
            out += slots[:, column]  # bfloat16 adds, one after the other
        return out

    def configuration(self, **given: Any) -> SimpleNamespace:
        """`get_2stage_cfgs`."""
        return configuration(self.version, self.tuned, self.flydsl, given)

    def fused_moe_(self, given: dict[str, Any]) -> Tensor:
        """The operator."""
        version, w1, w2, hidden_states = self.version, given["w1"], given["w2"], given["hidden_states"]
        dtype = given["dtype"] or hidden_states.dtype
        assert dtype in (torch.float16, torch.bfloat16), f"Fused_moe unsupported out dtype: {dtype}"
        if given["topk_ids"].dtype is not torch.int32 or given["topk_weight"].dtype is not torch.float32:
            raise RuntimeError("expected topk_ids of int32 and topk_weight of float32")
        if given["quant_type"] != QuantType.per_1x32.value:
            raise NotImplementedError("the fake has kernels for per_1x32 alone")
        if hidden_states.shape[1] != w2.shape[1] // (2 if hidden_states.dtype is _FP4 else 1):
            raise RuntimeError("the kernel would read past the end of hidden_states")
        activation = ActivationType(given["activation"])
        swiglu = activation is ActivationType.Swiglu
        dtype_a = q_dtype_a(version, len(hidden_states), swiglu, given["gate_mode"], self.bound)
        launch = Launch(given, activation.name.lower())
        tag = getattr(w1, version.tag, version.untagged) if version.tag else None
        if version.port_tag is not None and same(tag, version.port_tag):
            if w1.dtype is not _FP4:
                raise TypeError(f"fused_moe: weight/CSV backend mismatch. {tag=}, {w1.dtype=}")
            return self._a4w4(launch, version.reads if w2.shape[1] > version.port_above else ROW_MAJOR).to(dtype)
        late = {"is_ep": given["expert_mask"] is not None, "has_stage2_bias": given["bias2"] is not None}
        told = {name: value for name, value in late.items() if name in version.config}
        found = self.configuration(
            token=_padded_tokens(len(given["topk_ids"])),
            topk=given["topk_ids"].shape[1],
            expert=len(w1),
            model_dim=w2.shape[1],
            inter_dim=w2.shape[2] * 2,
            q_dtype_a=dtype_a,
            q_dtype_w=w1.dtype,
            activation=activation,
            doweight_stage1=given["doweight_stage1"],
            hidden_pad=given["hidden_pad"],
            intermediate_pad=given["intermediate_pad"],
            is_shuffled=launch.shuffled,
            gate_mode=given["gate_mode"],
            **told,
            **({version.tag: tag} if version.tag else {}),
        )
        if version.mismatch and same(tag, version.tuned_tag) != (found.pipeline is not None):
            raise version.mismatch(f"fused_moe: weight/CSV backend mismatch. {tag=}, csv_pipeline={found.pipeline!r}")
        if found.pipeline is not None or found.mxfp4_hip or found.output_aux:
            if given["expert_mask"] is not None and version.expert_mask:
                raise version.expert_mask("MXFP4 a4w4 does not support expert-parallel yet")
            return self._a4w4(launch, version.reads).to(dtype)
        launch.biases, launch.global_ids = (found.has_bias, found.stage2_has_bias), version.global_ids
        self._quantize(launch, found, dtype_a)
        return self._run(launch, found.stage1, found.stage2).to(dtype)

    def _a4w4(self, launch: Launch, reads: str) -> Tensor:
        """The HIP kernels and those that came after them: they take nothing but SiLU, and drop all else."""
        launch.drop("expert_mask", "num_local_tokens", "bias1", "bias2", "swiglu_limit", "doweight_stage1")
        launch.quantize = launch.requantize = partial(round_trip, rule=self.silu_rule)
        return self._run(launch, partial(kernels.a4w4_stage1, reads=reads), partial(kernels.a4w4_stage2, reads=reads))

    def _quantize(self, launch: Launch, found: SimpleNamespace, dtype_a: torch.dtype) -> None:
        """What is done to activations before each GEMM."""
        version, swiglu = self.version, launch.activation == "swiglu"
        to_mxfp4: Callable[[Tensor], Tensor] = partial(round_trip, rule=version.scale_rule)
        to_mxfp8 = kernels.cut_to_float8 if version.mxfp8 is None else partial(mxfp8, rule=version.mxfp8)
        parts = found.ksplit > 1 and launch.shuffled
        if dtype_a is _FP8:
            launch.quantize = to_mxfp8
        elif (dtype_a is _FP4 and not parts) or (dtype_a is _BF16 and version.parts_of_mxfp4 and not swiglu):
            launch.quantize = to_mxfp4
        if not ((dtype_a is _BF16 and swiglu) or parts):
            launch.requantize = to_mxfp8 if dtype_a is _FP8 else to_mxfp4
        leaves = str(found.stage1.keywords.get("kernelName")).split("_t")[-1]
        if "_fp4" not in leaves and "_fp8" not in leaves:  # else it quantises what it leaves
            launch.requantize = partial(_after_bfloat16, launch.requantize)
        launch.takes = dtype_a if dtype_a is not _FP4 or not parts else _BF16

    def _run(self, launch: Launch, stage1: Callable[..., Tensor], stage2: Callable[..., Tensor]) -> Tensor:
        out = launch.run(stage1, stage2)
        self.reads.append(launch.reads)
        return out


def _after_bfloat16(quantize: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return quantize(values.bfloat16().float())


def _padded_tokens(tokens: int) -> int:
    """`get_padded_M`: the number of tokens that tuned kernels are looked up by."""
    return 1 << (tokens - 1).bit_length() if tokens < 32768 else 32768 if tokens < 131072 else 131072


@contextmanager
def fake_aiter(version: str, *, tuned: bool = True, flydsl: bool = True) -> Iterator[FakeAiter]:
    """Inside, ``import aiter`` gives a fake of one version, and ``torch.ops.aiter.fused_moe_`` is its operator.

    Args:
        version: the name of one of :data:`VERSIONS`.
        tuned: whether its table of tuned kernels has a row for the shapes it is called with.
        flydsl: whether flydsl is installed.

    Raises:
        ValueError: an unknown version.
        RuntimeError: an aiter is loaded already.
    """
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}; known versions: {'; '.join(VERSIONS)}")
    if "aiter" in sys.modules or hasattr(torch.ops.aiter, "fused_moe_"):
        raise RuntimeError("an aiter is loaded already, and a fake beside it would be neither")
    fake = FakeAiter(VERSIONS[version], tuned, flydsl, int(os.environ.get("GPTOSS_SWIGLU_MXFP4_BF16_BOUND", "256")))
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
    call_defaults = defaults | ELSEWHERE | {"activation": ActivationType.Silu, "quant_type": QuantType.No}
    call_signature = _signature(version.call, call_defaults | {"block_size_M": None, "splitk": 0})

    def fused_moe(*args: Any, **kwargs: Any) -> Tensor:
        bound = call_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name in ELSEWHERE.keys() & given.keys():
            if given.pop(name) != ELSEWHERE[name]:
                raise NotImplementedError(f"the fake has no kernels that take {name}")
        del given["splitk"]
        given["activation"] = given["activation"].value
        given["quant_type"] = given["quant_type"].value
        given["block_size_M"] = given["block_size_M"] or -1
        out: Tensor = torch.ops.aiter.fused_moe_(**given)
        return out

    fused_moe.__signature__ = call_signature  # type: ignore[attr-defined]
    config_defaults = dict.fromkeys(version.config[CONFIG_REQUIRED:]) | {"is_shuffled": True, "gate_mode": "separated"}
    config_signature = _signature(version.config, config_defaults)

    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> SimpleNamespace:
        bound = config_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fake.configuration(**bound.arguments)

    get_2stage_cfgs.__signature__ = config_signature  # type: ignore[attr-defined]

    aiter, module = ModuleType("aiter"), ModuleType("aiter.fused_moe")
    aiter.__path__ = []
    aiter.ActivationType, aiter.QuantType, aiter.fused_moe = ActivationType, QuantType, module  # type: ignore[attr-defined]
    aiter.gemm_a4w4, aiter.get_hip_quant = gemm_a4w4, get_hip_quant(version.scale_rule)  # type: ignore[attr-defined]
    module.fused_moe, module.fused_moe_ = fused_moe, torch.ops.aiter.fused_moe_  # type: ignore[attr-defined]
    module.get_2stage_cfgs, module.get_padded_M = get_2stage_cfgs, _padded_tokens  # type: ignore[attr-defined]
    module._SWIGLU_MXFP4_BF16_BOUND = fake.bound  # type: ignore[attr-defined]
    for name, value in version.attributes.items():
        setattr(module, name, kernel if value is None else value)
    if version.hip:
        aiter.mxfp4_moe_gemm1_a4w4 = kernel  # type: ignore[attr-defined]
    return {"aiter": aiter, "aiter.fused_moe": module}


def _signature(names: tuple[str, ...], defaults: Mapping[str, Any]) -> inspect.Signature:
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature([inspect.Parameter(name, kind, default=defaults.get(name, required)) for name in names])
