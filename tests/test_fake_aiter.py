# SPDX-License-Identifier: MIT
"""The fake aiter itself, and the table of versions: judged by what AMD's own sources say of their signatures.

`python tools/aiter_signatures.py CLONE > tests/data/aiter_signatures.json` renews what is known of those.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import override_arch
from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.testing import VERSIONS, FakeAiter, fake_aiter

from .support.aiter import EXPECTED, OTHER, VERSION_OF, answer_of, plain_call
from .support.judges import relative_error, rounded_moe
from .support.layer import EXPERTS, make_layer

SIGNATURES = json.loads((Path(__file__).parent / "data" / "aiter_signatures.json").read_text())

# --- the signatures of the real ones

# by version: the commit whose signatures its fake has
COMMIT_OF = {
    "#3470 (shuffle_kind)": "57e74501a5",
    "#3470 (is_guinterleave)": "39e2ed7e8a",
    "#3470": "d6ede4548e",
    "#3788": "46ecc4489d",
    "#3827": "05567f6668",
    "v0.1.18 and later": "e4048607a5",
    "#4542": "55f4bfeb5e",
    "v0.1.16, v0.1.17": "v0.1.17",
    "v0.1.15": "v0.1.15",
    "v0.1.14": "v0.1.14",
}


def function_of(parameters: list[str]) -> Callable[..., None]:
    def function(*args: Any, **kwargs: Any) -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in parameters])  # type: ignore[attr-defined]
    return function


def modules_of(revision: str) -> tuple[ModuleType, ModuleType]:
    """Modules of which nothing is known but what the sources say."""
    data = SIGNATURES[revision]
    aiter, module = ModuleType("aiter"), ModuleType("aiter.fused_moe")
    for name, parameters in data["parameters"].items():
        setattr(module, name, function_of(parameters))
    for name, constant in data["attributes"].items():
        setattr(module, name, print if constant is None else constant)
    if data["hip"]:
        aiter.mxfp4_moe_gemm1_a4w4 = print  # type: ignore[attr-defined]
    return aiter, module


@pytest.mark.parametrize("revision", SIGNATURES)
def test_every_real_aiter_is_known_as_its_version(revision: str) -> None:
    version = versions.version_of(versions.Probed(*modules_of(revision)))
    assert version is not None
    assert version.name == VERSION_OF[revision]


def test_the_tables_are_of_the_same_versions() -> None:
    assert set(SIGNATURES) == set(VERSION_OF)
    assert list(VERSIONS) == list(EXPECTED) == list(COMMIT_OF)
    names = [version.name for version in versions.VERSIONS]
    assert sorted(names) == sorted(VERSIONS) == sorted(set(VERSION_OF.values()))
    for version in versions.VERSIONS:  # the commits and releases that a version names are known as it
        named = [word for word in SIGNATURES if word in version.since.replace(",", "").split()]
        assert named
        assert {VERSION_OF[word] for word in named} == {version.name}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fake_has_the_signatures_of_its_commit(version: str) -> None:
    data = SIGNATURES[COMMIT_OF[version]]
    with fake_aiter(version):
        import aiter

        module = aiter.fused_moe
        found = {
            name: list(inspect.signature(getattr(module, name)).parameters) for name in ("fused_moe", "get_2stage_cfgs")
        }
        found["fused_moe_"] = [argument.name for argument in torch.ops.aiter.fused_moe_.default._schema.arguments]
        assert found == data["parameters"]
        names = {name for names in SIGNATURES.values() for name in names["attributes"]}
        attributes = {name: getattr(module, name) for name in names if hasattr(module, name)}
        assert {name: None if callable(value) else value for name, value in attributes.items()} == data["attributes"]
        assert hasattr(aiter, "mxfp4_moe_gemm1_a4w4") == data["hip"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fake_is_known_as_its_version(version: str) -> None:
    with fake_aiter(version) as fake:
        found, own = versions.detect().version, EXPECTED[version]
        first = found.ways[0]
        assert (found.name, found.layout.name) == (version, own.layout)
        assert (first.layout.name, first.gate_mode, dict(first.tags)) == (own.layout, own.gate_mode, own.tags)
        assert (fake.silu_rule, fake.version.scale_rule) == (own.scale_rule, found.scale_rule)
        # gpt-oss goes by the gate mode in every version, and untagged
        by_gate_mode = {(way.layout.name, way.gate_mode) for way in found.ways if not way.tags}
        assert by_gate_mode == {("mxfp4_separated", "separated"), ("mxfp4_moe", "interleave")}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_signatures_are_read_from_a_clone(tmp_path: Path) -> None:
    (tmp_path / "aiter" / "ops").mkdir(parents=True)
    (tmp_path / "aiter" / "fused_moe.py").write_text(
        "import nothing_that_exists\n"
        "from nothing_that_exists import one, sort as fused_dynamic_mxfp8_quant_moe_sort\n"
        "_MXFP4_PORT_KIND = 'a kind'\n"
        "mxfp4_moe_run = nothing_that_exists.run\n"
        "@nothing_that_exists.decorated\n"
        "def fused_moe(a, b: nothing_that_exists = 1, *, c=None): ...\n"
        "def fused_moe_(a): ...\n"
        "def get_2stage_cfgs(token):\n"
        "    def _mxfp4_moe_run(): ...\n"
    )
    (tmp_path / "aiter" / "ops" / "moe.py").write_text("def mxfp4_moe_gemm1_a4w4(): ...\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"], ["tag", "v0.1.14"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    tool = Path(__file__).parents[1] / "tools" / "aiter_signatures.py"
    printed = subprocess.run(
        [sys.executable, str(tool), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    (revision,) = found = json.loads(printed)
    commit = found[revision].pop("commit")
    assert (revision, len(commit)) == ("v0.1.14", 40)
    assert found[revision] == {
        "parameters": {"fused_moe": ["a", "b", "c"], "fused_moe_": ["a"], "get_2stage_cfgs": ["token"]},
        "attributes": {
            "mxfp4_moe_run": None,
            "_MXFP4_PORT_KIND": "a kind",
            "fused_dynamic_mxfp8_quant_moe_sort": None,
        },
        "hip": True,
    }


# --- the contract itself: each mistake that a caller of aiter can make, made by hand on plain tensors

RIGHT, WRONG = "right", "wrong number"
TAGGED = ("#3470 (shuffle_kind)", "#3470 (is_guinterleave)")  # a tag must go with a tuned kernel
BY_GATE_MODE = ("#3470", "#3827")
PORT = ("#3788",)
SHARED = ("v0.1.18 and later", "#4542")  # with shared experts, and kernels of their own for SiLU
FLYDSL = ("v0.1.16, v0.1.17", "v0.1.15", "v0.1.14")  # tuned kernels are FlyDSL's
SEPARATED = (*SHARED, *FLYDSL)
# (versions, mistake, whether kernels are tuned for the shape, what happens)
MISTAKES: list[tuple[tuple[str, ...], str, bool, Any]] = [
    (tuple(VERSIONS), "none", True, RIGHT),
    ((*TAGGED, *PORT), "tag dropped", True, WRONG),
    ((*BY_GATE_MODE, *SEPARATED), "tag dropped", True, RIGHT),  # tuned kernels read no tag, and only warn
    (SEPARATED, "tag dropped", False, WRONG),
    (TAGGED, "none", False, TypeError),
    (BY_GATE_MODE, "none", False, WRONG),  # the silent fall to plain kernels
    ((*PORT, *SEPARATED), "none", False, RIGHT),
    (tuple(VERSIONS), "other kind", True, WRONG),
    ((*PORT, *SEPARATED), "other kind", False, WRONG),
    (BY_GATE_MODE, "other kind", False, RIGHT),  # which is what the plain kernels read
    (BY_GATE_MODE, "other gate mode", True, WRONG),
    (TAGGED, "other gate mode", True, TypeError),
    (PORT, "other gate mode", True, RIGHT),
    (SEPARATED, "other gate mode", True, RuntimeError),  # bfloat16 activations, for which there is no kernel
    ((*TAGGED, *PORT), "uint8 weights", True, TypeError),
    ((*BY_GATE_MODE, *SEPARATED), "uint8 weights", True, WRONG),
    (PORT, "the HIP tag", True, RIGHT),
    (PORT, "the HIP tag", False, WRONG),
    (tuple(VERSIONS), "raw bytes", True, WRONG),
    ((*TAGGED, *SHARED), "expert mask", True, NotImplementedError),
    ((*BY_GATE_MODE, *PORT), "expert mask", True, WRONG),  # dropped
    (FLYDSL, "expert mask", True, RIGHT),
    (SEPARATED, "expert mask", False, RIGHT),
]


def judged(layer: dict[str, Any], version: str) -> Tensor:
    """The layer with activations that are quantised as the plain kernels of a version quantise them."""
    weights = {name: layer[name].dequantize(torch.float32).double() for name in ("w13", "w2")}
    rule = "amax4" if version in ("v0.1.14", "v0.1.15") else "round_up"
    out = rounded_moe(f"mxfp4, {rule}", **{name: value.cpu() for name, value in (layer | weights).items()})
    return out.to(layer["hidden_states"].device)


@pytest.mark.parametrize(
    ("version", "mistake", "tuned", "outcome"),
    [
        pytest.param(version, *row, id=f"{version}-{row[0]}-{'tuned' if row[1] else 'untuned'}")
        for those, *row in MISTAKES
        for version in those
    ],
)
def test_mistakes_on_plain_tensors(version: str, mistake: str, tuned: bool, outcome: Any, device: str) -> None:
    with override_arch("gfx950"), fake_aiter(version, tuned=tuned) as fake:
        layer, own = make_layer(device), EXPECTED[version]
        kind = {"other kind": OTHER[own.layout], "raw bytes": None}.get(mistake, own.layout)
        tags = {} if mistake == "tag dropped" else {"is_shuffled": True, **own.tags}
        if mistake == "the HIP tag":
            tags["shuffle_kind"] = "mxfp4_guinterleave"
        others = {"separated": "interleave", "interleave": "separated"}
        gate_mode = others[own.gate_mode] if mistake == "other gate mode" else own.gate_mode
        dtype = torch.uint8 if mistake == "uint8 weights" else torch.float4_e2m1fn_x2
        options: dict[str, Any] = {}
        if version == "#4542" and mistake != "tag dropped":
            options["is_shuffled"] = True
        means = layer
        if mistake == "expert mask":  # global expert 0 is another rank's
            options["expert_mask"] = torch.tensor([0] + [1] * EXPERTS, dtype=torch.int32, device=device)
            here = {"topk_weight": layer["topk_weight"] * (layer["topk_ids"] > 0)}
            means = layer | here | {"topk_ids": (layer["topk_ids"] - 1).clamp(min=0)}
        if outcome in (RIGHT, WRONG):
            out = plain_call(layer, kind, gate_mode, tags=tags, dtype=dtype, **options)
            exact = tuned or version in PORT  # to the bit, with activations that are quantised once
            answer = answer_of(fake, means) if exact else judged(means, version)
            if outcome is WRONG:
                assert not relative_error(out, answer) < 0.5
            elif exact:
                assert torch.equal(out, answer)
            else:
                assert relative_error(out, answer) < 1.3e-2
        else:
            with pytest.raises(outcome, match="mismatch|does not support expert-parallel|there is no kernel"):
                plain_call(layer, kind, gate_mode, tags=tags, dtype=dtype, **options)


@pytest.mark.parametrize("version", SEPARATED)
@pytest.mark.parametrize("force", ["1", "0"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_few_tokens_of_an_untuned_shape(
    version: str, force: str, tokens: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On plain tensors, in the layout that every other call of these versions reads."""
    monkeypatch.setenv("AITER_FLYDSL_FORCE", force)
    with override_arch("gfx950"), fake_aiter(version, tuned=False):
        layer = make_layer(device, tokens)
        error = relative_error(plain_call(layer, "mxfp4_separated", "separated"), judged(layer, version))
        flydsl = force == "1" and version not in ("v0.1.14", "v0.1.15")
        if tokens * 2 <= EXPERTS and not flydsl:
            assert error > 0.5
        else:
            assert error < 1.3e-2


@pytest.mark.parametrize("version", SHARED)
def test_a_fake_refuses_what_it_has_no_kernels_for(version: str) -> None:
    with fake_aiter(version):
        import aiter

        layer = make_layer()
        arguments = (
            layer["hidden_states"],
            layer["w13"].qdata,
            layer["w2"].qdata,
            layer["topk_weight"],
            layer["topk_ids"],
        )
        with pytest.raises(NotImplementedError, match="the fake has no kernels that take shared_expert_id"):
            aiter.fused_moe.fused_moe(*arguments, shared_expert_id=0)
        with pytest.raises(NotImplementedError, match="the fake has kernels for per_1x32 alone"):
            aiter.fused_moe.fused_moe(*arguments)


def test_the_fake_leaves_no_trace() -> None:
    before = set(sys.modules)
    with fake_aiter("#3470 (shuffle_kind)") as fake:
        import aiter.fused_moe

        assert isinstance(fake, FakeAiter)
        assert callable(aiter.fused_moe.fused_moe)
        with pytest.raises(RuntimeError, match="loaded already"), fake_aiter("#3470"):
            pass
    assert {name for name in set(sys.modules) - before if "aiter" in name.split(".")[0]} == set()
    assert not hasattr(torch.ops.aiter, "fused_moe_")
    assert not any("aiter" in sys.modules[name].__name__.split(".")[0] for name in sys.modules if name == "aiter")
    known = "#3470 (shuffle_kind); #3470 (is_guinterleave); #3470; #3788; #3827; v0.1.18 and later; #4542; "
    known += "v0.1.16, v0.1.17; v0.1.15; v0.1.14"
    message = f"unknown version '#1'; known versions: {known}"
    with pytest.raises(ValueError, match=re.escape(message)), fake_aiter("#1"):
        pass
