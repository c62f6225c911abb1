# SPDX-License-Identifier: MIT
"""AMD's aiter: which version of its API is installed, and what that one reads. The only file that imports aiter.

The layout that its a4w4 kernels read, and the tags by which they are told, changed meaning several times, and release
numbers do not tell: what is installed is found by its signatures. A version has the name of the pull request of
github.com/ROCm/aiter that brought it; commits are aiter's too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import LAYOUTS, Layout
from shuffled_tensor.mxfp4 import ScaleRule

ARCH = "gfx950"


SEPARATED, MOE = LAYOUTS["mxfp4_separated"], LAYOUTS["mxfp4_moe"]


@dataclass(frozen=True, eq=False)
class Way:
    """What a call tells aiter, to be led to kernels that read a layout."""

    layout: Layout
    gate_mode: str
    tags: tuple[tuple[str, Any], ...] = ()
    """Attributes of w1 beside `is_shuffled`, which every version wants on both weights."""
    tells_configuration: bool = False
    """Whether `get_2stage_cfgs` is told them, too."""
    always_hip: bool = False
    """Whether it leads to the first HIP kernels whatever the call, so that there is nothing to ask."""
    hidden_above: int = 0
    """What the hidden size, padded, must be larger than."""

    @property
    def config(self) -> dict[str, Any]:
        """What `get_2stage_cfgs` gets beyond what all ways give it."""
        return dict(self.tags) if self.tells_configuration else {}


_NAME = re.compile(r"v[0-9][^ ]*|#[0-9]+|[0-9a-f]{10}")
"""A release, a pull request or a commit."""

_SEPARATED, _INTERLEAVE = Way(SEPARATED, "separated"), Way(MOE, "interleave")


@dataclass(frozen=True)
class Version:
    """One row: how to know an aiter, and how its MXFP4 MoE kernels are reached."""

    name: str
    """What users have: a release, or the pull request, and where it had several versions, by what this one is told."""
    since: str
    """Commits and releases that are known as it."""
    later: str = field(default="", kw_only=True)
    """Those that came after these."""
    probe: Callable[[Probed], bool]
    scale_rule: ScaleRule
    """By which it quantises activations to MXFP4; its first HIP kernels have a rule of their own."""
    ways: tuple[Way, ...]
    """In the order in which they are tried; the first one's layout is that of weights which have none."""
    inter_real: bool = False
    """Whether w2 may tell its intermediate size without padding."""
    silu_is_mxfp4: bool = False
    """Whether SiLU has MXFP4 activations under the gate mode "interleave", too."""
    mxfp8: bool = True
    """Whether it quantises to MXFP8, rather than cut activations to float8."""
    expert_mask: bool = True
    """Whether kernels that take one are given local experts' numbers to find biases by."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that it can be asked for by: its own, and those of releases, pull requests and commits."""
        listed = ", ".join((self.name, self.since, self.later)).split(", ")
        return tuple(dict.fromkeys((self.name, *(name for name in listed if _NAME.fullmatch(name)))))

    @property
    def layout(self) -> Layout:
        """The default."""
        return self.ways[0].layout


class Probed:
    """The installed aiter, and the parameters of its two entry points."""

    def __init__(self, module: ModuleType, fused_moe: ModuleType) -> None:
        self.module = module
        self.fused_moe = fused_moe
        self.call = _parameters(fused_moe, "fused_moe")
        self.config = _parameters(fused_moe, "get_2stage_cfgs")

    @property
    def modules(self) -> tuple[ModuleType, ModuleType]:
        return self.module, self.fused_moe

    def has(self, name: str) -> bool:
        return hasattr(self.fused_moe, name)

    @property
    def hip(self) -> bool:
        return hasattr(self.module, "mxfp4_moe_gemm1_a4w4") or hasattr(torch.ops.aiter, "mxfp4_moe_gemm1_a4w4")

    @property
    def before_3832(self) -> bool:
        """Closed by a parameter that came later than these releases, so that no aiter to come is taken for one."""
        return {"is_shuffled", "gate_mode"} <= self.config and "opus_weights_shuffled" not in self.config


def _parameters(module: ModuleType, name: str) -> frozenset[str]:
    function = getattr(module, name, None)
    return frozenset(inspect.signature(function).parameters) if callable(function) else frozenset()


_KIND = (("shuffle_kind", "mxfp4_moe"),)

# The first row that fits is taken: #3788 has all that the first one of #3470 is known by, and #4542 all of #3832.
VERSIONS = (
    Version(
        "#3788", "46ecc4489d",
        lambda p: "shuffle_kind" in p.config and p.has("_MXFP4_PORT_KIND"),
        "round_up",
        # its other tag, mxfp4_guinterleave, falls silently to plain kernels for an untuned shape; this one never does,
        # but its loop over K runs one step ahead of two
        (Way(MOE, "separated", _KIND, always_hip=True, hidden_above=512), _INTERLEAVE, _SEPARATED),
        inter_real=True, silu_is_mxfp4=True,
    ),
    Version(
        "#3470 (shuffle_kind)", "57e74501a5",
        lambda p: "shuffle_kind" in p.config,
        "round_up",
        (Way(MOE, "separated", _KIND, tells_configuration=True), _INTERLEAVE, _SEPARATED),
    ),
    Version(
        "#3470 (is_guinterleave)", "39e2ed7e8a",
        lambda p: "is_guinterleave" in p.config,
        "round_up",
        (Way(MOE, "separated", (("is_guinterleave", True),), tells_configuration=True), _INTERLEAVE, _SEPARATED),
    ),
    Version(
        "#3470", "d6ede4548e, as merged",
        lambda p: p.hip and p.has("mxfp4_moe_run"),
        "round_up", (_INTERLEAVE, _SEPARATED), silu_is_mxfp4=True,
    ),
    Version(
        "#3827", "05567f6668",
        lambda p: p.hip and p.has("_mxfp4_a4w4_stage1_fw"),
        "round_up", (_INTERLEAVE, _SEPARATED), silu_is_mxfp4=True,
    ),
    Version(
        "#4542", "55f4bfeb5e",
        lambda p: p.has("_mxfp4_a4w4_stage1_fw") and "is_shuffled" in p.call,
        "round_up", (_SEPARATED, _INTERLEAVE), inter_real=True,
    ),
    Version(
        "v0.1.18 and later", "#3832, b2dd7703df, v0.1.16.post4, v0.1.17-longctx, v0.1.18",
        lambda p: p.has("_mxfp4_a4w4_stage1_fw"),
        "round_up", (_SEPARATED, _INTERLEAVE), inter_real=True,
        later="v0.1.16.post6, v0.1.19, v0.1.20, v0.1.20.post1, de07f3885e, e4048607a5, #4398, 2bb3bca2df",
    ),
    Version(
        "v0.1.16, v0.1.17", "v0.1.16, v0.1.17",
        lambda p: p.before_3832 and "is_ep" in p.config,
        "round_up", (_SEPARATED, _INTERLEAVE),
    ),
    Version(
        "v0.1.15", "v0.1.15",
        lambda p: p.before_3832 and p.has("fused_dynamic_mxfp8_quant_moe_sort"),
        "amax4", (_SEPARATED, _INTERLEAVE),
    ),
    Version(
        "v0.1.14", "v0.1.14",
        lambda p: p.before_3832,
        "amax4", (_SEPARATED, _INTERLEAVE), mxfp8=False, expert_mask=False,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    version: Version
    release: str
    probed: Probed
    routes: dict[Any, Any] = field(default_factory=dict)
    """What was found out about layers: see `routes.py`."""
    prepared: dict[Any, Any] = field(default_factory=dict)
    """What was found out about calls: see `call.py`."""


class Unusable(Exception):
    """Why there is no aiter to call."""


_FOUND: dict[ModuleType | None, Installed] = {}
_IMPORT_FAILURE: list[str] = []


def detect() -> Installed:
    """The installed aiter and its version, imported on first use.

    Raises:
        Unusable: there is none, it does not import, or no version fits it.
    """
    found = _FOUND.get(sys.modules.get("aiter.fused_moe"))
    if found is None:
        probed = Probed(*_import())
        version = version_of(probed)
        if version is None:
            raise Unusable(
                f"aiter {release()} is of no version known here: looked for fused_moe.get_2stage_cfgs with a parameter "
                "shuffle_kind, is_guinterleave or is_shuffled, and for mxfp4_moe_gemm1_a4w4, mxfp4_moe_run and "
                f"_mxfp4_a4w4_stage1_fw; get_2stage_cfgs has {sorted(probed.config) or 'no parameters or is missing'}"
            )
        found = _FOUND[probed.fused_moe] = Installed(version, release(), probed)
    return found


def version_of(probed: Probed) -> Version | None:
    """The first row of the table that fits."""
    return next((version for version in VERSIONS if version.probe(probed)), None)


def version_named(name: str) -> Version:
    """The row that a release (with or without its "v"), a pull request or a commit is known as.

    Raises:
        ValueError: there is none; the message lists what is known.
    """
    for version in sorted(VERSIONS, key=lambda version: version.name != name):  # some have a pull request in common
        if name in version.names or f"v{name}" in version.names:
            return version
    names = {each for version in VERSIONS for each in version.names if _NAME.fullmatch(each)}
    known = sorted(names, key=lambda each: ("v#".find(each[0]) % 3, each))
    raise ValueError(f"unknown version of aiter {name!r}; known are {', '.join(known)}")


def forget(module: ModuleType) -> None:
    """Drop what was found about an aiter that is no longer loaded."""
    _FOUND.pop(module, None)


def release() -> str:
    """The number of the installed distribution; a source tree may have none."""
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown release"


def _import() -> tuple[ModuleType, ModuleType]:
    if not _IMPORT_FAILURE or "aiter.fused_moe" in sys.modules:
        try:
            # Imported although it may be there: another thread may be half through, and half an aiter looks like an
            # older one. The package first, because its module can be complete before it is.
            return importlib.import_module("aiter"), importlib.import_module("aiter.fused_moe")
        except Exception as error:  # without ROCm it fails in many ways, not with ImportError alone
            installed = importlib.util.find_spec("aiter") is not None
            _IMPORT_FAILURE.append(
                f"aiter does not import ({type(error).__name__}: {error})"
                if installed
                else "aiter is not installed (its distribution is amd-aiter; PyPI's aiter is another package), or was "
                "not when this process first looked for it"
            )
    raise Unusable(_IMPORT_FAILURE[0])


def unusable(device: torch.device) -> str | None:
    """Why aiter cannot run anything on this device, or None."""
    if arch(device) != ARCH:
        found = arch(device)
        here = found if device.type in (found, "meta") else f"{device}, which is {found}"
        return f"aiter's MXFP4 kernels run on {ARCH}, not on {here}"
    try:
        detect()
    except Unusable as error:
        return str(error)
    return None


def installed() -> str:
    """The installed aiter and its version, or why none can be used."""
    try:
        found = detect()
    except Unusable as error:
        return str(error)
    name, since = found.version.name, found.version.since
    return f"{found.release}, API {name if name == since else f'{name} ({since})'}"
