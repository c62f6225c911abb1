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
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from shuffled_tensor.device import arch
from shuffled_tensor.layouts import LAYOUTS, Layout
from shuffled_tensor.mxfp4 import ScaleRule

ARCH = "gfx950"


@dataclass(frozen=True)
class Version:
    """One row: how to know an aiter, what its MXFP4 MoE kernels read, and how they are told."""

    name: str
    """The pull request, and where it had several versions, by what this one is told."""
    since: str
    """The commit, and the releases that have it."""
    probe: Callable[[Probed], bool]
    layout: Layout
    gate_mode: str
    scale_rule: ScaleRule
    """By which its kernels quantise activations."""
    w13_tags: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of w1 beside `is_shuffled`, which every version wants on both weights."""
    inter_real: bool = False
    """Whether w2 may tell its intermediate size without padding."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What `get_2stage_cfgs` gets beyond the arguments common to all versions."""
    hidden_above: int = 0
    """What the hidden size, padded, must be larger than."""
    other_kernel: Callable[[Any], str | None] | None = None
    """What does not read the layout, of the configuration that aiter has found for a call, or None where its kernels
    do. None where every configuration reads it."""


class Probed:
    """The installed aiter, and the parameters of its two entry points."""

    def __init__(self, module: ModuleType, fused_moe: ModuleType) -> None:
        self.module = module
        self.fused_moe = fused_moe
        self.call = _parameters(fused_moe, "fused_moe")
        self.config = _parameters(fused_moe, "get_2stage_cfgs")

    def has(self, name: str) -> bool:
        return hasattr(self.fused_moe, name)

    @property
    def hip(self) -> bool:
        return hasattr(self.module, "mxfp4_moe_gemm1_a4w4") or hasattr(torch.ops.aiter, "mxfp4_moe_gemm1_a4w4")


def _parameters(module: ModuleType, name: str) -> frozenset[str]:
    function = getattr(module, name, None)
    return frozenset(inspect.signature(function).parameters) if callable(function) else frozenset()


def _untuned(tuned: Callable[[Any], bool]) -> Callable[[Any], str | None]:
    return lambda found: None if tuned(found) else "no tuned kernel"


def _not_separated(found: Any) -> str | None:
    """Which first stage it is, is all that tells. Where FlyDSL's kernels do not take an untuned shape (before v0.1.16,
    with AITER_FLYDSL_FORCE=0, without flydsl) and tokens are few, it is one that reads gate-up interleaved rows."""
    name = str(getattr(getattr(found.stage1, "func", found.stage1), "__name__", found.stage1))
    kernel = str(getattr(found.stage1, "keywords", {}).get("kernelName"))
    reads = name in _READS_SEPARATED and "_gui" not in kernel
    return None if reads else f"{name}, which aiter would take, is not one that"


_READS_SEPARATED = ("_flydsl_stage1_wrapper", "_mxfp4_a4w4_stage1_fw", "ck_moe_stage1", "fused_moe_1stage")

# No version's MXFP4 kernels take bias, swiglu_limit, another activation than SiLU, doweight_stage1, activations
# quantised already, or float16; nor expert_mask, which some of them refuse and the others drop.
# The first row that fits is taken: #3788 has all that the first one of #3470 is known by, and #4542 all of #3832.
# The last two rows must not take an aiter to come for an old one, which would be silent: they are closed by a parameter
# that came later than their last release.
VERSIONS = (
    Version(
        "#3788", "46ecc4489d", lambda p: "shuffle_kind" in p.config and p.has("_MXFP4_PORT_KIND"),
        LAYOUTS["mxfp4_moe"], "separated", "even",
        # its other tag, mxfp4_guinterleave, falls silently to plain kernels for an untuned shape; this one never does
        w13_tags={"shuffle_kind": "mxfp4_moe"}, inter_real=True,
        hidden_above=512,  # its loop over K runs one step ahead of two
    ),
    Version(
        "#3470, shuffle_kind", "57e74501a5", lambda p: "shuffle_kind" in p.config,
        LAYOUTS["mxfp4_moe"], "separated", "even",
        w13_tags={"shuffle_kind": "mxfp4_moe"},
        config={"shuffle_kind": "mxfp4_moe"}, other_kernel=_untuned(lambda found: found.pipeline is not None),
    ),
    Version(
        "#3470, is_guinterleave", "39e2ed7e8a", lambda p: "is_guinterleave" in p.config,
        LAYOUTS["mxfp4_moe"], "separated", "even",
        w13_tags={"is_guinterleave": True},
        config={"is_guinterleave": True}, other_kernel=_untuned(lambda found: found.pipeline is not None),
    ),
    Version(
        "#3470", "d6ede4548e, as merged", lambda p: p.hip and p.has("mxfp4_moe_run"),
        LAYOUTS["mxfp4_moe"], "interleave", "even",
        other_kernel=_untuned(lambda found: bool(found.mxfp4_hip)),
    ),
    Version(
        "#3827", "05567f6668", lambda p: p.hip and p.has("_mxfp4_a4w4_stage1_fw"),
        LAYOUTS["mxfp4_moe"], "interleave", "even",
        other_kernel=_untuned(lambda found: bool(found.mxfp4_hip)),
    ),
    Version(
        "#4542", "55f4bfeb5e", lambda p: p.has("_mxfp4_a4w4_stage1_fw") and "is_shuffled" in p.call,
        LAYOUTS["mxfp4_separated"], "separated", "round_up",
        inter_real=True, other_kernel=_not_separated,
    ),
    Version(
        "#3832", "b2dd7703df, v0.1.16.post4, v0.1.18 and later", lambda p: p.has("_mxfp4_a4w4_stage1_fw"),
        LAYOUTS["mxfp4_separated"], "separated", "round_up",
        inter_real=True, other_kernel=_not_separated,
    ),
    Version(
        "before #3832", "v0.1.16, v0.1.17",
        lambda p: {"is_shuffled", "gate_mode", "is_ep"} <= p.config and "opus_weights_shuffled" not in p.config,
        LAYOUTS["mxfp4_separated"], "separated", "round_up",
        other_kernel=_not_separated,
    ),
    Version(
        "before #3832, without is_ep", "v0.1.14, v0.1.15",
        lambda p: {"is_shuffled", "gate_mode"} <= p.config and not {"is_ep", "opus_weights_shuffled"} & p.config,
        LAYOUTS["mxfp4_separated"], "separated", "amax4",
        other_kernel=_not_separated,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    version: Version
    release: str
    probed: Probed


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
        here = found if found == device.type else f"{device}, which is {found}"
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
    return f"{found.release}, API {found.version.name} ({found.version.since})"
