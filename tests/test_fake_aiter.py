# SPDX-License-Identifier: MIT
"""The fake aiter itself, and the table of versions: judged by what AMD's own sources say of their signatures.

`python tools/aiter_signatures.py CLONE > tests/data/aiter_signatures.json` renews what is known of those.
"""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor import override_arch, shuffle_scale, shuffle_weight
from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.testing import VERSIONS, FakeAiter, fake_aiter
from shuffled_tensor.testing.fake_aiter import ck_moe_stage1

from .support.aiter import EXPECTED, OTHER, answer_of
from .support.judges import relative_error
from .support.layer import EXPERTS, HIDDEN, PADDED_HIDDEN, make_layer

SIGNATURES = json.loads((Path(__file__).parent / "data" / "aiter_signatures.json").read_text())

# --- the signatures of the real ones

# by commit or release: the version that it must be known as
VERSION_OF = {
    "57e74501a5": "#3470, shuffle_kind",
    "39e2ed7e8a": "#3470, is_guinterleave",
    "d6ede4548e": "#3470",
    "46ecc4489d": "#3788",
    "05567f6668": "#3827",
    "b2dd7703df": "#3832",
    "de07f3885e": "#3832",
    "e4048607a5": "#3832",  # main, 2026-08-22
    "55f4bfeb5e": "#4542",
    # The open pull request #4398 has the signatures of #3832, and that is what it must be known as: it reads w1 as
    # gate-up interleaved only if that has a true attribute `is_guinterleave`, which weights passed as #3832 never get.
    "2bb3bca2df": "#3832",
    "v0.1.14": "before #3832, without is_ep",
    "v0.1.15": "before #3832, without is_ep",
    "v0.1.16": "before #3832",
    "v0.1.17": "before #3832",
    "v0.1.16.post4": "#3832",
    "v0.1.18": "#3832",
    "v0.1.20.post1": "#3832",
}
# by version: the commit whose signatures its fake has
COMMIT_OF = {
    "#3470, shuffle_kind": "57e74501a5",
    "#3470, is_guinterleave": "39e2ed7e8a",
    "#3470": "d6ede4548e",
    "#3788": "46ecc4489d",
    "#3827": "05567f6668",
    "#3832": "e4048607a5",
    "#4542": "55f4bfeb5e",
    "before #3832": "v0.1.17",
    "before #3832, without is_ep": "v0.1.14",
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
        found = versions.detect().version
        assert (found.name, found.layout.name, found.scale_rule, found.gate_mode, dict(found.w13_tags)) == (
            version,
            EXPECTED[version].layout,
            EXPECTED[version].scale_rule,
            EXPECTED[version].gate_mode,
            EXPECTED[version].tags,
        )
        untuned = SimpleNamespace(pipeline=None, mxfp4_hip=False, stage1=ck_moe_stage1)
        reads = found.other_kernel is None or found.other_kernel(untuned) is None
        assert reads == EXPECTED[version].any_shape
        assert fake.version.scale_rule == EXPECTED[version].scale_rule


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_signatures_are_read_from_a_clone(tmp_path: Path) -> None:
    (tmp_path / "aiter" / "ops").mkdir(parents=True)
    (tmp_path / "aiter" / "fused_moe.py").write_text(
        "import nothing_that_exists\n"
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
        "attributes": {"mxfp4_moe_run": None, "_MXFP4_PORT_KIND": "a kind"},
        "hip": True,
    }


# --- the contract itself: each mistake that a caller of aiter can make, made by hand on plain tensors

RIGHT, WRONG = "right", "wrong number"
TAGGED = ("#3470, shuffle_kind", "#3470, is_guinterleave")  # a tag must go with a tuned kernel
BY_GATE_MODE = ("#3470", "#3827")
PORT = ("#3788",)
SHARED = ("#3832", "#4542")  # with shared experts
SEPARATED = (*SHARED, "before #3832", "before #3832, without is_ep")
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
    ((*BY_GATE_MODE, *SEPARATED), "other gate mode", True, WRONG),
    (TAGGED, "other gate mode", True, TypeError),
    (PORT, "other gate mode", True, RIGHT),
    ((*TAGGED, *PORT), "uint8 weights", True, TypeError),
    ((*BY_GATE_MODE, *SEPARATED), "uint8 weights", True, WRONG),
    (PORT, "the HIP tag", True, RIGHT),
    (PORT, "the HIP tag", False, WRONG),
    (tuple(VERSIONS), "raw bytes", True, WRONG),
    ((*TAGGED, *SEPARATED), "expert mask", True, NotImplementedError),
    ((*BY_GATE_MODE, *PORT), "expert mask", True, WRONG),  # dropped
]


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
        import aiter

        layer = make_layer(device)
        answer = answer_of(fake, layer)
        own = EXPECTED[version]
        kind = OTHER[own.layout] if mistake == "other kind" else own.layout
        operands = {}
        for name, ours in (("w1", "w13"), ("w2", "w2")):
            qdata, scale, gate_up = layer[ours].qdata.clone(), layer[ours].scale.clone(), ours == "w13"
            if mistake != "raw bytes":
                qdata = shuffle_weight(qdata, kind, gate_up=gate_up)
                scale = shuffle_scale(scale, kind, gate_up=gate_up)
            if mistake != "uint8 weights":
                qdata = qdata.view(torch.float4_e2m1fn_x2)
            if mistake != "tag dropped":
                qdata.is_shuffled = True
                for tag, value in own.tags.items() if gate_up else ():
                    setattr(qdata, tag, "mxfp4_guinterleave" if mistake == "the HIP tag" else value)
            operands |= {name: qdata, f"{name}_scale": scale}
        others = {"separated": "interleave", "interleave": "separated"}
        options: dict[str, Any] = {
            "gate_mode": others[own.gate_mode] if mistake == "other gate mode" else own.gate_mode
        }
        if version == "#4542" and mistake != "tag dropped":
            options["is_shuffled"] = True
        if mistake == "expert mask":  # global expert 0 is another rank's
            options["expert_mask"] = torch.tensor([0] + [1] * EXPERTS, dtype=torch.int32, device=device)
            local = layer["topk_ids"] > 0
            rest = {"topk_ids": (layer["topk_ids"] - 1).clamp(min=0), "topk_weight": layer["topk_weight"] * local}
            answer = answer_of(fake, layer | rest)
        padded = torch.nn.functional.pad(layer["hidden_states"], (0, PADDED_HIDDEN - HIDDEN))

        def call() -> Tensor:
            out: Tensor = aiter.fused_moe.fused_moe(
                padded,
                topk_weight=layer["topk_weight"],
                topk_ids=layer["topk_ids"],
                quant_type=aiter.QuantType.per_1x32,
                **operands,
                **options,
            )
            return out[:, :HIDDEN]

        if outcome is RIGHT:
            assert torch.equal(call(), answer)
        elif outcome is WRONG:
            assert not relative_error(call(), answer) < 0.5
        else:
            with pytest.raises(outcome, match="mismatch|does not support expert-parallel"):
                call()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("flydsl", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_few_tokens_of_an_untuned_shape(version: str, flydsl: bool, tokens: int, device: str) -> None:
    """On plain tensors, in the layout that every other call of these versions reads."""
    if version not in SEPARATED:
        pytest.skip("its untuned shapes are wrong for any number of tokens")
    with override_arch("gfx950"), fake_aiter(version, tuned=False, flydsl=flydsl) as fake:
        import aiter

        layer = make_layer(device, tokens)
        operands = [layer[name].shuffle_("mxfp4_separated").as_kernel_operands() for name in ("w13", "w2")]
        options: dict[str, Any] = {"is_shuffled": True} if version == "#4542" else {}
        out = aiter.fused_moe.fused_moe(
            torch.nn.functional.pad(layer["hidden_states"], (0, PADDED_HIDDEN - HIDDEN)),
            *(operand.weight for operand in operands),
            layer["topk_weight"],
            layer["topk_ids"],
            quant_type=aiter.QuantType.per_1x32,
            w1_scale=operands[0].scale,
            w2_scale=operands[1].scale,
            **options,
        )[:, :HIDDEN]
        few = tokens * 2 <= EXPERTS and not (flydsl and version != "before #3832, without is_ep")
        if few:
            assert relative_error(out, answer_of(fake, layer)) > 0.5
        else:
            assert torch.equal(out, answer_of(fake, layer))


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
    with fake_aiter("#3470, shuffle_kind") as fake:
        import aiter.fused_moe

        assert isinstance(fake, FakeAiter)
        assert callable(aiter.fused_moe.fused_moe)
        with pytest.raises(RuntimeError, match="loaded already"), fake_aiter("#3470"):
            pass
    assert {name for name in set(sys.modules) - before if "aiter" in name.split(".")[0]} == set()
    assert not hasattr(torch.ops.aiter, "fused_moe_")
    assert not any("aiter" in sys.modules[name].__name__.split(".")[0] for name in sys.modules if name == "aiter")
    known = "#3470, shuffle_kind; #3470, is_guinterleave; #3470; #3788; #3827; #3832; #4542; before #3832; "
    known += "before #3832, without is_ep"
    with pytest.raises(ValueError, match=f"unknown version '#1'; known versions: {known}"), fake_aiter("#1"):
        pass
