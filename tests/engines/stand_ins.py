# SPDX-License-Identifier: MIT
"""What an engine imports on its way to its mixture of experts, and what is not there on a CPU: compiled extensions, and
packages that serve requests. Nothing of these is ever called; everything of the engine itself is as in its wheel."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.judges import by_formula

ENGINES = Path(__file__).parents[2] / ".engines"
"""Where `make test-engines` unpacks the wheels, a folder each."""

SERVING = {
    *("amdsmi", "anthropic", "cutlass", "depyf", "diskcache", "fastapi", "flashinfer", "ijson", "lark", "llguidance"),
    *("lmformatenforcer", "mcp", "model_hosting_container_standards", "openai_harmony", "opentelemetry"),
    *("orjson", "oss_harmony", "outlines_core", "partial_json_parser", "prometheus_fastapi_instrumentator", "quack"),
    *("ray", "starlette", "tvm_ffi", "uvicorn", "uvloop", "watchfiles", "xgrammar"),
}
"""Packages that serve requests, or compile for other GPUs."""


class Anything:
    """Has every attribute; called with a class or a function, it is a decorator; pydantic takes it for a type."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else Anything(f"{self._name}()")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()

    def __getitem__(self, index: Any) -> Anything:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, other: Any) -> Anything:
        return self

    __ror__ = __or__

    def __enter__(self) -> Anything:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"

    def __get_pydantic_core_schema__(self, *args: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not there."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name in self.names or name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def module(name: str, **attributes: Any) -> ModuleType:
    """A module of the fake aiter, that engines import beside `aiter.fused_moe`."""
    made = ModuleType(name)
    made.__path__, made.__spec__ = [], importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(made).update(attributes)
    sys.modules[name] = made
    parent, _, leaf = name.rpartition(".")
    setattr(sys.modules[parent], leaf, made)
    return made


class GateMode(Enum):
    SEPARATED = "separated"
    INTERLEAVE = "interleave"


def _shuffled(part: str, data: Tensor, layout: str, gate_up: bool) -> Tensor:
    return by_formula(part, data.view(torch.uint8), layout, gate_up).view(data.dtype)


def _shuffle_weight(
    weight: Tensor, layout: Sequence[int] = (16, 16), *, is_guinterleave: bool = False, gate_up: bool = False
) -> Tensor:
    assert tuple(layout) == (16, 16)
    return _shuffled("weight", weight.data, "mxfp4_moe" if is_guinterleave else "mxfp4_separated", gate_up)


def _shuffle_scale(scale: Tensor, experts: int = 1, is_guinterleave: bool = False, gate_up: bool = False) -> Tensor:
    """Two-dimensional, and padded to whole tiles."""
    rows, columns = scale.shape
    padded = torch.zeros(-(-rows // 256) * 256, -(-columns // 8) * 8, dtype=torch.uint8)
    padded[:rows, :columns] = scale.view(torch.uint8)
    layout = "mxfp4_moe" if is_guinterleave else "mxfp4_separated"
    return _shuffled("scale", padded.unflatten(0, (experts, -1)), layout, gate_up).flatten(0, 1).view(scale.dtype)


def extend_aiter() -> None:
    """Beside the fake's kernels, what engines import: shuffles by formula, and names. Inside `fake_aiter()`."""
    aiter: Any = sys.modules["aiter"]
    aiter.__spec__ = importlib.machinery.ModuleSpec("aiter", None, is_package=True)
    for name, more in {"ActivationType": {"Situv2": 3}, "QuantType": {"per_1x128": 4, "per_128x128": 5}}.items():
        # aiter's own, of pybind11, are numbers
        members = {member.name: member.value for member in getattr(aiter, name)}
        setattr(aiter, name, IntEnum(name, members | more))  # type: ignore[misc]
    for name in ("jit", "jit.utils", "ops", "ops.flydsl", "utility"):
        module(f"aiter.{name}")
    module("aiter.jit.utils.chip_info", get_gfx=lambda: "gfx950", get_cu_num=lambda: 256)
    module(
        "aiter.ops.shuffle",
        shuffle_weight=_shuffle_weight,
        shuffle_scale=_shuffle_scale,
        shuffle_weight_a16w4=lambda weight, _, gate_up: _shuffle_weight(weight, is_guinterleave=True, gate_up=gate_up),
        shuffle_scale_a16w4=lambda scale, experts, gate_up: _shuffle_scale(scale, experts, True, gate_up),
    )
    module("aiter.ops.flydsl.moe_common", GateMode=GateMode)
    module("aiter.utility.fp4_utils", e8m0_shuffle=_shuffle_scale)
    module(
        "aiter.dtypes",
        fp4x2=torch.float4_e2m1fn_x2,
        fp8=torch.float8_e4m3fn,
        bf16=torch.bfloat16,
        fp32=torch.float32,
        i32=torch.int32,
        u8=torch.uint8,
        fp8_e8m0=torch.float8_e8m0fnu,
    )
