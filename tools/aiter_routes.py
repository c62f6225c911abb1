# SPDX-License-Identifier: MIT
"""``python tools/aiter_routes.py CLONE > tests/data/aiter_routes.json``: the kernels that AMD's own code chooses.

Needs pandas and a clone of aiter with its tags and pull requests (``git fetch origin 'refs/pull/*/head:refs/pull/*'``).
Not ROCm: for each revision the real ``aiter/fused_moe.py`` is imported over the revision's own tuned tables, as if on
one MI355 (gfx950, 256 compute units), with stubs for all that is compiled, and `fused_moe` runs until its first launch.

What is printed, for each revision: ``outcomes``, a list of what was chosen (see `_outcome`; what is false, zero or
empty is left out), or of what was raised; and ``calls``, a row for each kind of call: shape (a key of `SHAPES`),
activation, gate_mode, case (a key of `CASES`), bias ("yes", "no", or "any" where it changes nothing), and for each
number of tokens in `TOKENS` the outcome's index; or, for a case in which aiter cannot be imported, the error.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

__all__ = ["REVISIONS", "extract", "importable", "routes", "text"]

REVISIONS = (
    "57e74501a5", "39e2ed7e8a", "d6ede4548e", "46ecc4489d", "05567f6668", "b2dd7703df", "v0.1.14", "v0.1.15", "v0.1.16",
    "v0.1.16.post6", "v0.1.17", "v0.1.17-longctx", "v0.1.18", "v0.1.19", "v0.1.20.post1", "e4048607a5", "55f4bfeb5e",
    "2bb3bca2df",
)  # fmt: skip
TOKENS = (1, 4, 32, 64, 255, 256, 300, 4096)
# experts, hidden, intermediate, topk: in no table, gpt-oss-120b and -20b, Kimi-K2.5 (tensor parallel 4), DeepSeek-V4.
SHAPES = {
    "untuned": (8, 768, 512, 2), "gpt-oss-120b": (128, 3072, 3072, 4), "gpt-oss-20b": (32, 3072, 3072, 4),
    "kimi-k2.5": (385, 7168, 512, 9), "deepseek-v4": (256, 4096, 2048, 6),
}  # fmt: skip
# What is not as usual: the environment, whether flydsl is installed, expert_mask, the attributes of both weights.
# A case is for the first shape; one of `OWN_CASES` is for all shapes, of the revisions that read the attribute.
CASES: dict[str, dict[str, Any]] = {
    "": {},
    "AITER_FLYDSL_FORCE=0": {"environment": {"AITER_FLYDSL_FORCE": "0"}},
    "AITER_BF16_FP8_MOE_BOUND=0": {"environment": {"AITER_BF16_FP8_MOE_BOUND": "0"}},
    "no flydsl": {"flydsl": False},
    "expert_mask": {"expert_mask": True},
    "no is_shuffled": {"attributes": {}},
    "shuffle_kind=mxfp4_moe": {"attributes": {"is_shuffled": True, "shuffle_kind": "mxfp4_moe"}},
    "shuffle_kind=mxfp4_guinterleave": {"attributes": {"is_shuffled": True, "shuffle_kind": "mxfp4_guinterleave"}},
    "is_guinterleave": {"attributes": {"is_shuffled": True, "is_guinterleave": True}},
}
OWN_CASES = {
    "57e74501a5": ["shuffle_kind=mxfp4_moe"],
    "39e2ed7e8a": ["is_guinterleave"],
    "46ecc4489d": ["shuffle_kind=mxfp4_moe", "shuffle_kind=mxfp4_guinterleave"],
    "2bb3bca2df": ["is_guinterleave"],
}
ATTRIBUTES = {case for cases in OWN_CASES.values() for case in cases}

# What of a configuration only repeats the call, or changes nothing but speed.
REPEATED = {"activation", "quant_type", "dtype", "use_non_temporal_load", "prequant"}

# What runs as AMD wrote it; every other module below `aiter` and `flydsl` is a `_Stub`.
REAL = re.compile(
    r"aiter\.(fused_moe|fhmoe|utility\.(dtypes|aiter_types)|ops\.opus\.moe\w*"
    r"|ops\.flydsl\.(moe_common|mxfp4_kname|moe_kernels|kernels\.mega_moe_gfx1250\.types))|csrc\.opus_moe\.\w+"
)


def extract(clone: str, revision: str, folder: str) -> None:
    """Write the files of `revision` that are read here below `folder`."""
    wanted = ("aiter", "csrc/include/aiter_enum.h", "csrc/opus_moe")
    there = [path for path in wanted if _git(clone, "ls-tree", "--name-only", revision, path)]
    with tarfile.open(fileobj=io.BytesIO(_git(clone, "archive", revision, *there))) as archive:
        archive.extractall(folder, filter="data")


@contextlib.contextmanager
def importable(
    tree: str, launch: Callable[..., Any], *, flydsl: bool = True, environment: dict[str, str] | None = None
) -> Iterator[types.ModuleType]:
    """The ``aiter.fused_moe`` of an extracted `tree`, importable while this lasts and gone afterwards.

    ``launch(name, *arguments, **keywords)`` stands for every function that is compiled; `name` is that function's. With
    `flydsl` False nothing named flydsl can be imported. `environment` is added to ``os.environ``.
    """
    finder = _Finder(tree, launch, flydsl)
    before = set(sys.modules)
    with mock.patch.dict(os.environ, environment or {}), mock.patch.object(sys, "meta_path", [finder, *sys.meta_path]):
        try:
            yield importlib.import_module("aiter.fused_moe")
        finally:
            finder.library._destroy()
            for name in [name for name in sys.modules if _ours(name) and name not in before]:
                del sys.modules[name]


def _ours(name: str) -> bool:
    return name.partition(".")[0] in ("aiter", "csrc", "flydsl")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one tree: those that are `REAL`, and a stub for each of the others."""

    def __init__(self, tree: str, launch: Callable[..., Any], flydsl: bool):
        self.tree, self.launch, self.flydsl = pathlib.Path(tree), launch, flydsl
        self.library = torch.library.Library("aiter", "FRAGMENT")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _ours(name):
            return None
        place = self.tree.joinpath(*name.split("."))
        if REAL.fullmatch(name):
            return importlib.util.spec_from_file_location(name, place.with_suffix(".py"))
        if not self.flydsl and name.startswith("flydsl"):
            return None
        if not self.flydsl and f"{name}.".startswith("aiter.ops.flydsl."):
            # Its own files run, so that they fail where they need what is not there.
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file) if file.exists() else None
        return importlib.machinery.ModuleSpec(name, _Loader(self), is_package=True)


class _Loader(importlib.abc.Loader):
    def __init__(self, finder: _Finder):
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name, self.finder)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(_known(module.__name__, self.finder))


class _Stub(types.ModuleType):
    """A module that has every name: a module where the tree has one, otherwise a function that is a launch."""

    def __init__(self, name: str, finder: _Finder):
        super().__init__(name)
        self.__path__: list[str] = []
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = self._finder.tree.joinpath(*self.__name__.split("."), name)
        if path.is_dir() or path.with_suffix(".py").exists():
            return importlib.import_module(f"{self.__name__}.{name}")
        return functools.partial(self._finder.launch, name)


def _known(module: str, finder: _Finder) -> dict[str, Any]:
    """What a stub of this module has besides launches."""
    if module == "aiter":
        quantize = functools.partial(finder.launch, "quantize")
        return {
            **_enums(finder.tree),
            "dtypes": importlib.import_module("aiter.utility.dtypes"),
            "logger": logging.getLogger("aiter"),
            "get_hip_quant": lambda kind: functools.partial(quantize, kind),
        }
    if module == "aiter.ops.enum":
        return _enums(finder.tree)
    if module == "aiter.jit.core":
        return {
            "AITER_CONFIGS": _configurations(finder.tree),
            "compile_ops": lambda *_, fc_name=None, **__: (
                lambda function: functools.partial(finder.launch, fc_name or function.__name__)
            ),
        }
    if module == "aiter.jit.utils.chip_info":
        return {
            "get_gfx": lambda: "gfx950",
            "get_gfx_runtime": lambda: "gfx950",
            "get_cu_num": lambda: 256,
            "gfx_from_cu_num": lambda count: {80: "gfx942", 304: "gfx942"}.get(int(count), "gfx950"),
        }
    if module == "aiter.jit.utils.torch_guard":
        return {"torch_compile_guard": functools.partial(_operator, finder.library)}
    if module in ("aiter.ops.flydsl", "aiter.ops.flydsl.utils"):
        return {"is_flydsl_available": lambda: True}
    if module == "aiter.ops.flydsl.grouped_moe_gfx1250":
        # They return None on any other architecture.
        return dict.fromkeys(("grouped_gemm_gfx1250_a8w4", "_maybe_grouped_gfx1250_a8w4_moe"), lambda *_, **__: None)
    return {}


def _enums(tree: pathlib.Path) -> dict[str, type[enum.Enum]]:
    """The enumerations of the C++ header, one class for each, the same for all who ask about this tree."""
    return _enums_of((tree / "csrc/include/aiter_enum.h").read_text())


@functools.cache
def _enums_of(header: str) -> dict[str, type[enum.Enum]]:
    found: dict[str, Any] = {}
    for name, body in re.findall(r"enum class (\w+)\s*:\s*int\s*\{(.*?)\}", header, re.DOTALL):
        value, members = -1, {}
        for member, given in re.findall(r"(\w+)(?:\s*=\s*(-?\d+))?\s*,", body):
            members[member] = value = int(given) if given else value + 1
        found[name] = enum.Enum(name, members)
    return found


def _configurations(tree: pathlib.Path) -> Any:
    """``AITER_CONFIGS`` of the tree's ``jit/core.py``, of which nothing else is executed."""
    source = (tree / "aiter/jit/core.py").read_text()
    # All trees would write the same file, in a folder of the system's.
    source = re.sub(r"\"[^\"]*/aiter_configs/\"", repr(str(tree / "merged")), source)
    # Of two rows for one shape the first counts, in the order in which the file system lists the tables.
    module = ast.parse(re.sub(r"in (\w+\.glob\(.*\))\n", r"in sorted(\1)\n", source))
    wanted: list[ast.stmt] = [
        statement
        for statement in module.body
        if (isinstance(statement, ast.ClassDef) and statement.name == "AITER_CONFIG")
        or (isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("AITER_CONFIG"))
    ]
    names: dict[str, Any] = {
        "AITER_ROOT_DIR": str(tree), "functools": functools, "logger": logging.getLogger("aiter"),
        "mp_lock": lambda path, write: write(), "os": os, "re": re,
    }  # fmt: skip
    exec(compile(ast.Module(wanted, []), "core.py", "exec"), names)
    return names["AITER_CONFIGS"]


def _operator(library: torch.library.Library, mutates_args: Any = "unknown", gen_fake: Any = None, **_: Any) -> Any:
    """``torch_compile_guard`` for functions whose first argument is a tensor."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        library.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        library.impl(name, function, "CPU")
        library._register_fake(name, gen_fake)
        return lambda *arguments, **keywords: getattr(torch.ops.aiter, name)(*arguments, **keywords)

    return decorate


class _Launched(BaseException):
    """The first launch was reached; no ``except Exception`` catches it."""


def routes(clone: str, revisions: Sequence[str] = REVISIONS) -> dict[str, Any]:
    """What each revision chooses for each call."""
    found = {}
    for revision in revisions:
        with tempfile.TemporaryDirectory() as tree:
            extract(clone, revision, tree)
            found[revision] = {
                "commit": _git(clone, "rev-parse", f"{revision}^{{commit}}").decode().strip(),
                **_routes_of(tree, OWN_CASES.get(revision, [])),
            }
    return {"tokens": TOKENS, "shapes": SHAPES, "revisions": found}


def text(found: dict[str, Any]) -> str:
    """JSON with each outcome and each call on one line."""
    block = re.compile(r"^(   +)[\[{]\n(?:\1 .*\n)+\1[\]}]", re.MULTILINE)
    indented = json.dumps(found, indent=1)
    return block.sub(lambda match: match[1] + json.dumps(json.loads(match[0])), indented)


def _routes_of(tree: str, own: list[str]) -> dict[str, Any]:
    outcomes: list[dict[str, Any]] = []
    found: dict[str, Any] = {"outcomes": outcomes, "calls": []}
    with importable(tree, _stop) as module:
        try:
            _ = module.AITER_CONFIGS.AITER_CONFIG_FMOE_FILE
        except RuntimeError as error:
            # It found the same shape twice in its tables, and has rewritten them: it works from the second call on.
            found["first_call"] = _first_sentence(error)

    def row(*call: Any) -> list[int]:
        indices = []
        for tokens in TOKENS:
            outcome = _outcome(module, tokens, *call)
            if outcome not in outcomes:
                outcomes.append(outcome)
            indices.append(outcomes.index(outcome))
        return indices

    for case, options in CASES.items():
        if case in ATTRIBUTES and case not in own:
            continue
        shapes = list(SHAPES) if not case or case in own else ["untuned"]
        try:
            with importable(
                tree, _stop, flydsl=options.get("flydsl", True), environment=options.get("environment")
            ) as module:
                for kind in itertools.product(shapes, ("Silu", "Swiglu"), ("separated", "interleave")):
                    without, with_bias = row(*kind, False, options), row(*kind, True, options)
                    rows = {"any": without} if without == with_bias else {"no": without, "yes": with_bias}
                    found["calls"] += [[*kind, case, bias, indices] for bias, indices in rows.items()]
        except ImportError as error:
            found["calls"].append([*[""] * 3, case, "any", _first_sentence(error)])
    return found


def _outcome(
    module: Any, tokens: int, shape: str, activation: str, gate_mode: str, bias: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """What `fused_moe` of this module chooses for one call, of which no number is read.

    The type of the activations, and of the metadata that it acts on: each stage's function and arguments, and the
    fields that have a value. Or what it raised before the first launch.
    """
    experts, hidden, intermediate, topk = SHAPES[shape]
    seen: dict[str, Any] = {}
    fresh, configurations = module.MOEMetadata, module.get_2stage_cfgs

    def metadata(*arguments: Any, **keywords: Any) -> Any:
        seen["metadata"] = fresh(*arguments, **keywords)
        return seen["metadata"]

    def get_2stage_cfgs(*arguments: Any, **keywords: Any) -> Any:
        seen["q_dtype_a"] = inspect.signature(configurations).bind(*arguments, **keywords).arguments["q_dtype_a"]
        seen["metadata"] = configurations(*arguments, **keywords)
        return seen["metadata"]

    # expert_mask comes with one more slot, that of an expert that no rank has.
    masked = bool(options.get("expert_mask"))
    slots = topk + masked
    w1, w2 = (
        torch.empty(experts, rows, columns // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    for weight, (name, value) in itertools.product((w1, w2), options.get("attributes", {"is_shuffled": True}).items()):
        setattr(weight, name, value)
    raised = None
    with (
        mock.patch.object(module, "MOEMetadata", metadata),
        mock.patch.object(module, "get_2stage_cfgs", get_2stage_cfgs),
    ):
        try:
            module.fused_moe(
                torch.empty(tokens, hidden, dtype=torch.bfloat16),
                w1,
                w2,
                torch.empty(tokens, slots),
                torch.empty(tokens, slots, dtype=torch.int32),
                expert_mask=torch.ones(experts + 1, dtype=torch.int32) if masked else None,
                activation=module.ActivationType[activation],
                quant_type=module.QuantType.per_1x32,
                w1_scale=torch.empty(experts, 2 * intermediate, hidden // 32, dtype=torch.uint8),
                w2_scale=torch.empty(experts, hidden, intermediate // 32, dtype=torch.uint8),
                bias1=torch.empty(experts, 2 * intermediate) if bias else None,
                bias2=torch.empty(experts, hidden) if bias else None,
                gate_mode=gate_mode,
            )
        except _Launched:
            pass
        except Exception as error:
            raised = _first_sentence(error)
    found = {"q_dtype_a": str(seen["q_dtype_a"]).removeprefix("torch.")} if "q_dtype_a" in seen else {}
    if raised:
        return {**found, "raised": raised}
    return {**found, **_described(seen["metadata"])}


def _described(metadata: Any) -> dict[str, Any]:
    """The fields of the metadata that have a value, as JSON has them, without those that only repeat the call."""
    found = {}
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if isinstance(value, functools.partial):
            keywords = {name: _plain(given) for name, given in value.keywords.items() if given and name not in REPEATED}
            found[field.name] = {"function": _name(value), **keywords}
        elif value and field.name not in REPEATED:
            found[field.name] = _plain(value)
    return found


def _name(function: Any) -> str:
    """The function's name; for a launch, the name of what is launched."""
    while isinstance(function, functools.partial):
        if function.func is _stop:
            return str(function.args[0])
        function = function.func
    return str(function.__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        return value
    # Of the tables come numbers of numpy.
    return int(value) if hasattr(value, "__int__") else str(value).removeprefix("torch.")


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: " + re.split(r"\. |\n", str(error))[0]


def _stop(name: str, *_: Any, **__: Any) -> None:
    raise _Launched


def _git(clone: str, *command: str) -> bytes:
    return subprocess.run(["git", "-C", clone, *command], capture_output=True, check=True).stdout


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # each call tells what it found
    print(text(routes(sys.argv[1], sys.argv[2:] or REVISIONS)))
