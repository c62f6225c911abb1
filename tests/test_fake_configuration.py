# SPDX-License-Identifier: MIT
"""How the fake aiter chooses kernels, judged by what AMD's own code chose in 18 revisions for the same calls.

`python tools/aiter_routes.py CLONE > tests/data/aiter_routes.json` renews the record of that; what its words mean is
said there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor.testing import VERSIONS, FakeAiter, fake_aiter

from .support.aiter import VERSION_OF

RECORD = json.loads((Path(__file__).parent / "data" / "aiter_routes.json").read_text())
TOKENS, REVISIONS = RECORD["tokens"], RECORD["revisions"]

# Fields in which a revision is not as the row of its version.
FIELDS: dict[str, dict[str, Any]] = {
    "v0.1.16": {"swiglu_in_parts": False},
    "v0.1.16.post6": {"swiglu_in_parts": False},
    "v0.1.17-longctx": {"tuned_bias2": False},
    "v0.1.18": {"tuned_bias2": False},
    "v0.1.19": {"tuned_bias2": False},
}

# Kernels of a table are told by names that no call of a shape in no table leads to. These rows name others, or none:
# ones that FlyDSL would be given anyway for SwiGLU, and ones that only say that K is not to be split.
_AS_SWIGLU = frozenset(("gpt-oss-120b", "Silu", "separated", tokens) for tokens in (300, 4096))
_NOT_SPLIT = frozenset(("gpt-oss-120b", "Swiglu", gate_mode, 1) for gate_mode in ("separated", "interleave"))
WITH_ONE_TOKEN = ("v0.1.17-longctx", "v0.1.18", "v0.1.19", "v0.1.20.post1", "e4048607a5", "55f4bfeb5e", "2bb3bca2df")
UNNAMED = dict.fromkeys(("v0.1.14", "v0.1.15"), _AS_SWIGLU) | dict.fromkeys(WITH_ONE_TOKEN, _NOT_SPLIT)

# Of the open pull request #4398: weights with its attribute, which we never give them, are as under "interleave".
NOT_OURS = ("2bb3bca2df", "is_guinterleave")


class Reached(BaseException):
    """The first kernel; no ``except Exception`` catches it."""


def calls(revision: str, wanted: str | None = None) -> Iterator[tuple[str, str, str, str, bool, int, dict[str, Any]]]:
    """Shape, activation, gate mode, case, whether with biases, number of tokens, and what was chosen."""
    record = REVISIONS[revision]
    for shape, activation, gate_mode, case, bias, indices in record["calls"]:
        if wanted is None or case == wanted:
            for tokens, index in zip(TOKENS, indices, strict=True):
                for with_bias in {"any": (False, True), "no": (False,), "yes": (True,)}[bias]:
                    yield shape, activation, gate_mode, case, with_bias, tokens, record["outcomes"][index]


def stages(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    return [outcome.get(stage, {}) for stage in ("stage1", "stage2")]


def described(outcome: dict[str, Any]) -> dict[str, Any]:
    """What of an outcome the fake must have, too."""
    if "raised" in outcome:
        return {"raised": outcome["raised"].split(". ")[0]}
    own = next((name for name in ("pipeline", "mxfp4_hip", "output_aux") if outcome.get(name)), None)
    if own == "pipeline" or (own and not outcome.get("stage2")):  # then nothing else is asked for
        return {"own kernels": own}
    first, second = stages(outcome)
    parts = first.get("split_k", 1)
    kernels = [str(stage.get("kernelName", "")) for stage in (first, second)]
    return {
        "own kernels": own,
        "q_dtype_a": outcome["q_dtype_a"],
        "functions": (first["function"], second["function"]),
        "kernels": [[part for part in ("_afp4_", "_afp8_", "_gui") if part in name] for name in kernels],
        "split_k": parts,
        "post_activation_layout": first.get("post_activation_layout") if parts > 1 else None,
        "interleave": bool(first.get("interleave")),
        "biases": (bool(outcome.get("has_bias")), bool(outcome.get("stage2_has_bias"))),
        "K in parts": outcome.get("ksplit", 0) > 1,
    }


def chosen(fake: FakeAiter, shape: str, activation: str, gate_mode: str, case: str, bias: bool, tokens: int) -> Any:
    """What the fake chooses, in the words of the record. No byte is read, and every tensor is one."""
    import aiter

    def tensor(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(1, dtype=dtype).expand(size)

    experts, hidden, intermediate, topk = RECORD["shapes"][shape]
    seen: dict[str, Any] = {}
    choose = fake.configuration

    def configuration(**given: Any) -> Any:
        found = choose(**given)
        seen["q_dtype_a"] = str(given["q_dtype_a"]).removeprefix("torch.")
        seen.update(vars(found))
        for stage in ("stage1", "stage2"):
            if isinstance(seen[stage], partial):
                seen[stage] = {"function": seen[stage].func.__name__, **seen[stage].keywords}
        return found

    def run(*_: Any) -> Tensor:
        raise Reached

    masked = case == "expert_mask"
    attributes = {} if case == "no is_shuffled" else {"is_shuffled": True}
    name, _, value = case.partition("=")
    if name in ("shuffle_kind", "is_guinterleave"):
        attributes[name] = value or True
    w1, w2 = (
        tensor(experts, rows, columns // 2).view(torch.float4_e2m1fn_x2)
        for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    for weight in (w1, w2):
        vars(weight).update(attributes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "configuration", configuration)
        patch.setattr(fake, "_run", run)
        try:
            aiter.fused_moe.fused_moe(
                tensor(tokens, hidden, dtype=torch.bfloat16),
                w1,
                w2,
                tensor(tokens, topk + masked, dtype=torch.float32),
                tensor(tokens, topk + masked, dtype=torch.int32),
                expert_mask=tensor(experts + 1, dtype=torch.int32) if masked else None,
                activation=aiter.ActivationType[activation],
                quant_type=aiter.QuantType.per_1x32,
                w1_scale=tensor(experts, 2 * intermediate, hidden // 32),
                w2_scale=tensor(experts, hidden, intermediate // 32),
                bias1=tensor(experts, 2 * intermediate, dtype=torch.float32) if bias else None,
                bias2=tensor(experts, hidden, dtype=torch.float32) if bias else None,
                gate_mode=gate_mode,
            )
        except Reached:
            return seen or {"pipeline": True}  # kernels that a tag leads to, without a look at the configuration
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}
    raise AssertionError("no kernel was reached")


@pytest.fixture
def version(revision: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a revision's version, whose row is as the revision is."""
    name = VERSION_OF[revision]
    monkeypatch.setitem(VERSIONS, name, replace(VERSIONS[name], **FIELDS.get(revision, {})))  # type: ignore[arg-type]
    return name


@pytest.mark.parametrize("revision", REVISIONS)
def test_shapes_in_no_table(revision: str, version: str) -> None:
    untuned = [outcome for shape, *_, outcome in calls(revision) if shape == "untuned"]
    known = {stage.get("kernelName") for outcome in untuned for stage in stages(outcome)}
    different, compared = set(), 0
    for case in dict.fromkeys(row[3] for row in REVISIONS[revision]["calls"]):
        if (revision, case) == NOT_OURS:
            continue
        with (
            pytest.MonkeyPatch.context() as patch,
            fake_aiter(version, tuned=False, flydsl=case != "no flydsl") as fake,
        ):
            if case.startswith("AITER_"):
                patch.setenv(*case.split("="))
            for shape, *call, tokens, outcome in calls(revision, case):
                named = {stage.get("kernelName") for stage in stages(outcome)} - known
                own = any(outcome.get(name) for name in ("pipeline", "mxfp4_hip", "output_aux"))
                if shape == "untuned" or not (named or own):
                    compared += 1
                    if described(chosen(fake, shape, *call, tokens)) != described(outcome):
                        different.add((shape, call[0], call[1], tokens))
    assert compared > 500
    assert different == UNNAMED.get(revision, set())


# Where kernels are tuned for Kimi K2.5: the case and the gate mode that lead to them.
TUNED = {
    "57e74501a5": ("shuffle_kind=mxfp4_moe", "separated"),
    "39e2ed7e8a": ("is_guinterleave", "separated"),
    "d6ede4548e": ("", "interleave"),
    "46ecc4489d": ("shuffle_kind=mxfp4_guinterleave", "separated"),
    "05567f6668": ("", "interleave"),
}
# Numbers of tokens for which a table names others than the fake does.
OTHERWISE: dict[str, tuple[int, ...]] = {
    # a second stage of CK's, which takes no bias
    **dict.fromkeys(("v0.1.14", "v0.1.15", "v0.1.16", "v0.1.17"), (1,)),
    # its tables have two rows for the shape, and the one that counts depends on the order in which files are read
    "d6ede4548e": tuple(TOKENS),
}


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_tuned_shape(revision: str, version: str) -> None:
    wanted, own_gate_mode = TUNED.get(revision, ("", "separated"))
    different = set()
    with fake_aiter(version) as fake:
        for *call, tokens, outcome in calls(revision, wanted):
            if call[:3] != ["kimi-k2.5", "Silu", own_gate_mode]:
                continue
            if described(chosen(fake, *call, tokens)) != described(outcome):
                different.add(tokens)
    assert different == set(OTHERWISE.get(revision, ()))


@pytest.mark.parametrize(
    "revision", ["v0.1.17-longctx", "v0.1.18", "v0.1.19", "v0.1.20.post1", "e4048607a5", "55f4bfeb5e"]
)
def test_gpt_oss_120b_for_256_tokens(revision: str, version: str) -> None:
    """A first stage of FlyDSL's and a second one of CK-Tile's, which is not given its bias in three releases."""
    with fake_aiter(version) as fake:
        outcomes = [
            (described(chosen(fake, *call)), described(outcome))
            for *call, outcome in calls(revision, "")
            if call[:3] == ["gpt-oss-120b", "Swiglu", "interleave"] and call[-1] == 256
        ]
        assert len(outcomes) == 2
        for found, expected in outcomes:
            assert found == expected
            assert found["biases"] == (True, FIELDS.get(revision, {}).get("tuned_bias2", True))
