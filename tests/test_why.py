# SPDX-License-Identifier: MIT
"""``python -m shuffled_tensor why``: where the layers of a checkpoint go, on machines that are not this one."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file as save_plain
from torch import Tensor

from shuffled_tensor import explain, load_experts, override_arch, save_file
from shuffled_tensor.backends import triton
from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.cli import main
from shuffled_tensor.device import arch, meta_as
from shuffled_tensor.moe.models import MODELS, Model, explain_model, layer_in
from shuffled_tensor.testing import VERSIONS, fake_aiter
from shuffled_tensor.why import ARCHITECTURES, why

from .support.aiter import VERSION_OF
from .support.checkpoints import in_format, make_dense, write_sharded
from .support.layer import make_weight

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "tests/data/aiter_routes.json").read_text())

GPT_OSS = {"model_type": "gpt_oss", "hidden_act": "silu", "num_experts_per_tok": 4, "swiglu_limit": 7.0}
DEEPSEEK = {"model_type": "deepseek_v4", "hidden_act": "silu", "swiglu_limit": 10.0, "num_experts_per_tok": 2}
KIMI_K3 = {
    "model_type": "kimi_k3",
    "text_config": {
        "model_type": "kimi_linear",
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "num_experts_per_token": 2,
    },
}
LAYERS = {
    "gpt-oss": ("gpt-oss", "model.layers.{}.mlp.experts", range(3), GPT_OSS),
    "kimi": ("compressed-tensors", "language_model.model.layers.{}.block_sparse_moe.experts", (1, 2, 3, 5), KIMI_K3),
    "deepseek": ("deepseek", "layers.{}.ffn.experts", (9, 10), DEEPSEEK),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small checkpoints, of which no byte beyond the headers may be read."""
    monkeypatch.chdir(tmp_path)
    for name, (format, layer, numbers, config) in LAYERS.items():
        tensors = {}
        for number in numbers:
            tensors |= in_format(format, make_dense(4, 288, 320), layer.format(number))
        write_sharded(tensors, tmp_path / name, 2, index=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Weight, "read", lambda *_: pytest.fail("it has read bytes"))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["why", *command]) == 0
    return capsys.readouterr().out


def test_gpt_oss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    releases = ("v0.1.20", "0.1.14", "#3788")
    reports = [printed(capsys, "gpt-oss", "--arch", "gfx950", "--aiter", each) for each in releases]
    assert_expected_inline(
        "\n".join(reports),
        """\
machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         v0.1.20, which is not installed here: derived from what is known of its API (v0.1.18 and later), with flydsl and without aiter's tuned tables
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend  layout           tokens       kernels                    activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  aiter    mxfp4_separated  1 to 255     CK-Tile a16w4, K in parts  bfloat16
                                                                                        256 or more  FlyDSL a4w4                mxfp4, round_up
layers: 3, memory with padding: 4.8 MiB

machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         0.1.14, which is not installed here: derived from what is known of its API (v0.1.14), with flydsl and without aiter's tuned tables
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend  layout           tokens       kernels                    activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  aiter    mxfp4_separated  1 to 255     CK-Tile a16w4, K in parts  bfloat16
                                                                                        256 or more  FlyDSL a4w4                mxfp4, amax4
layers: 3, memory with padding: 4.8 MiB

machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         #3788, which is not installed here: derived from what is known of its API (#3788), with flydsl and without aiter's tuned tables
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend  layout     tokens       kernels        activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  aiter    mxfp4_moe  1 to 255     CK-Tile a16w4  bfloat16
                                                                                  256 or more  CK-Tile a8w4   mxfp8
layers: 3, memory with padding: 4.8 MiB
""",
    )


def test_kimi_k3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_expected_inline(
        printed(capsys, "kimi", "--arch", "gfx950", "--aiter", "v0.1.20"),
        """\
machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         v0.1.20, which is not installed here: derived from what is known of its API (v0.1.18 and later), with flydsl and without aiter's tuned tables
activation    situ, situ_beta=4, situ_linear_beta=25: config.json of kimi_k3
topk          2: config.json of kimi_k3

layers                                                      E x I x K      a layer  backend  layout           tokens  kernels       activations
language_model.model.layers.1-3,5.block_sparse_moe.experts  4 x 320 x 288  1.6 MiB  triton   mxfp4_separated  any     triton w4a16  bfloat16
layers: 4, memory with padding: 6.4 MiB
passed over   aiter: no kernel known here computes activation='situ'; they compute 'silu' and 'swiglu'
""",
    )


def test_deepseek(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    releases = ("v0.1.17", "v0.1.15", "57e74501a5")
    reports = [printed(capsys, "deepseek", "--arch", "gfx950", "--aiter", each) for each in releases]
    assert_expected_inline(
        "\n".join(reports),
        """\
machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         v0.1.17, which is not installed here: derived from what is known of its API (v0.1.16, v0.1.17), with flydsl and without aiter's tuned tables
activation    silu, swiglu_limit=10: config.json of deepseek_v4
topk          2: config.json of deepseek_v4

layers                   E x I x K      a layer  backend  layout           tokens  kernels      activations
layers.9-10.ffn.experts  4 x 320 x 288  1.6 MiB  aiter    mxfp4_separated  any     FlyDSL a4w4  mxfp4, round_up
layers: 2, memory with padding: 3.2 MiB

machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         v0.1.15, which is not installed here: derived from what is known of its API (v0.1.15), with flydsl and without aiter's tuned tables
activation    silu, swiglu_limit=10: config.json of deepseek_v4
topk          2: config.json of deepseek_v4

layers                   E x I x K      a layer  backend  layout           tokens  kernels       activations
layers.9-10.ffn.experts  4 x 320 x 288  1.6 MiB  triton   mxfp4_separated  any     triton w4a16  bfloat16
layers: 2, memory with padding: 3.2 MiB
passed over   aiter: for 1 token, CK-Tile a16w4, K in parts, of interleaved rows in aiter v0.1.15 reads 'mxfp4_moe', not 'mxfp4_separated'

machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         57e74501a5, which is not installed here: derived from what is known of its API (#3470 (shuffle_kind)), with flydsl and without aiter's tuned tables
activation    silu, swiglu_limit=10: config.json of deepseek_v4
topk          2: config.json of deepseek_v4

layers                   E x I x K      a layer  backend  layout           tokens  kernels       activations
layers.9-10.ffn.experts  4 x 320 x 288  1.6 MiB  triton   mxfp4_separated  any     triton w4a16  bfloat16
layers: 2, memory with padding: 3.2 MiB
passed over   aiter: for 1 token, FlyDSL a4w4 in aiter #3470 (shuffle_kind) reads 'mxfp4_separated', not 'mxfp4_moe'; it would take weights made with shuffle_kind='mxfp4_separated'
""",
    )


def test_other_machines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = [printed(capsys, "gpt-oss", "--arch", each) for each in ("sm_90", "sm_75", "gfx942", "cpu")]
    assert_expected_inline(
        "\n".join(reports),
        """\
machine       sm_90 (H100, H200), with PyTorch and Triton for it
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend  layout           tokens  kernels       activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  triton   mxfp4_separated  any     triton w4a16  bfloat16
layers: 3, memory with padding: 4.8 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on sm_90

machine       sm_75 (T4), with PyTorch and Triton for it
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend    layout  tokens  kernels      activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  reference  any     any     plain torch  as they come
layers: 3, memory with padding: 4.8 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on sm_75
passed over   triton: it needs compute capability 8.0 or later, found 7.5

machine       gfx942 (MI300X, MI325X), with PyTorch and Triton for it
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend  layout           tokens  kernels       activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  triton   mxfp4_separated  any     triton w4a16  bfloat16
layers: 3, memory with padding: 4.8 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on gfx942

machine       cpu (no GPU)
activation    swiglu, swiglu_limit=7, swiglu_alpha=1.702: config.json of gpt_oss
topk          4: config.json of gpt_oss

layers                        E x I x K              a layer  backend    layout  tokens  kernels      activations
model.layers.0-2.mlp.experts  4 x 320 x 288, biases  1.6 MiB  reference  any     any     plain torch  as they come
layers: 3, memory with padding: 4.8 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on cpu
passed over   triton: it compiles for GPUs, found cpu
""",
    )


def test_a_machine_with_no_aiter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_IMPORT_FAILURE", ["aiter is missing"])
    found = why("deepseek", arch="gfx950")
    assert found.aiter == "none that can be used here; --aiter VERSION derives the answer for one that is not installed"
    assert [(each.backend, each.passed_over) for each in found.answers] == [
        ("triton", (("aiter", "aiter is missing"),))
    ]


@pytest.mark.parametrize("named", ["0.1.18", "v0.1.18", None])
def test_an_aiter_that_is_installed_answers_for_itself(
    named: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its tuned tables, whose rows compute SiLU whatever is asked for."""
    monkeypatch.setattr(versions, "release", lambda: "0.1.18")
    with fake_aiter("v0.1.18 and later", tuned=True):
        found = why("gpt-oss", arch="gfx950", aiter=named)
    assert not found.derived
    assert found.aiter is not None
    assert found.aiter.startswith("0.1.18, API v0.1.18 and later")
    assert [each.backend for each in found.answers] == ["triton"]
    assert "for 256 tokens, mxmoe a4w4" in dict(found.answers[0].passed_over)["aiter"]
    assert why("gpt-oss", arch="gfx950", aiter="v0.1.17").derived


def test_this_machine(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `explain` sees it: a GPU that there is has no Triton unless it is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = printed(capsys, "deepseek")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    monkeypatch.setattr(triton, "_too_old", lambda device: None)
    monkeypatch.setattr(triton, "_installed", lambda: False)
    with override_arch("sm_90", "cuda:1"):
        on_gpu = printed(capsys, "deepseek")
    assert_expected_inline(
        f"{on_cpu}\n{on_gpu}",
        """\
machine       this one: cpu
activation    silu, swiglu_limit=10: config.json of deepseek_v4
topk          2: config.json of deepseek_v4

layers                   E x I x K      a layer  backend    layout  tokens  kernels      activations
layers.9-10.ffn.experts  4 x 320 x 288  1.6 MiB  reference  any     any     plain torch  as they come
layers: 2, memory with padding: 3.2 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on cpu
passed over   triton: it compiles for GPUs, found cpu

machine       this one: cuda:1, a GPU at cuda:1, sm_90
activation    silu, swiglu_limit=10: config.json of deepseek_v4
topk          2: config.json of deepseek_v4

layers                   E x I x K      a layer  backend    layout  tokens  kernels      activations
layers.9-10.ffn.experts  4 x 320 x 288  1.6 MiB  reference  any     any     plain torch  as they come
layers: 2, memory with padding: 3.2 MiB
passed over   aiter: aiter's MXFP4 kernels run on gfx950, not on cuda:1, which is sm_90
passed over   triton: no triton is installed
""",
    )


def test_numbers_of_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("gpt-oss", "--arch", "gfx950", "--aiter", "v0.1.20", "--tokens")
    lines = [line[88:].split("  ")[:1] for line in printed(capsys, *asked, "300", "1", "255", "256").splitlines()[5:8]]
    assert [words[0].strip() for words in lines] == ["tokens", "1, 255", "256, 300"]
    assert len(printed(capsys, *asked, "64").splitlines()) == 8  # the other route is of no interest
    with pytest.raises(ValueError, match="numbers of tokens must be from 1 to 1048576, found 2000000"):
        why("gpt-oss", tokens=[2000000])


def test_for_other_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--arch", "gfx950", "--aiter", "v0.1.20", "--json")
    found = json.loads(printed(capsys, "gpt-oss", *asked, "--tokens", "300"))
    assert (found["arch"], found["derived"], found["activation"], found["topk"]) == ("gfx950", True, "swiglu", 4)
    assert found["parameters"] == {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    (answer,) = found["answers"]
    assert (answer["layers"], answer["count"]) == ("model.layers.0-2.mlp.experts", 3)
    assert (answer["experts"], answer["intermediate"], answer["hidden"], answer["bias"]) == (4, 320, 288, True)
    # both weights padded to multiples of 256: 512 rows of gate, of up and of w2, and 512 columns
    assert answer["nbytes"] == 4 * 3 * 512 * 512 * (1 / 2 + 1 / 32)
    assert answer["routes"] == [
        {"first": 256, "last": None, "tokens": [300], "kernels": "FlyDSL a4w4", "activations": "mxfp4, round_up"}
    ]
    (other,) = json.loads(printed(capsys, "kimi", *asked))["answers"]
    assert (other["backend"], list(other["passed_over"])) == ("triton", ["aiter"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_what_explain_says_of_the_loaded_layers(name: str, version: str, tmp_path: Path) -> None:
    """With their bytes, on a device."""
    format, layer, _, config = LAYERS[name]
    save_plain(in_format(format, make_dense(4, 288, 320), layer.format(0)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {
        "gpt-oss": {"activation": "swiglu"},
        "kimi": {"activation": "situ", "situ_beta": 4.0, "situ_linear_beta": 25.0},
        "deepseek": {"swiglu_limit": 10.0},
    }[name]
    (experts,) = load_experts(tmp_path).values()
    with override_arch("gfx950"), fake_aiter(version, tuned=False):
        report = explain(
            torch.zeros(3, 288).bfloat16(),
            experts.w13,
            experts.w2,
            torch.zeros(3, 4),
            torch.zeros(3, 4, dtype=torch.int32),
            w13_bias=experts.w13_bias,
            w2_bias=experts.w2_bias,
            **options,
        )
    (found,) = why(tmp_path, arch="gfx950", aiter=version, topk=4).answers
    assert dict(found.passed_over).get("aiter") == report.passed_over.get("aiter")
    if report.backend == "aiter":
        assert (found.backend, found.layout, found.routes) == ("aiter", report.layout, report.routes)
    else:  # a CPU has no Triton
        assert (found.backend, report.backend) == ("triton", "reference")


# --- judged by what AMD's own code chose


def headers_alone(path: Path, experts: int, hidden: int, intermediate: int, bias: bool) -> None:
    """A gpt-oss checkpoint of one layer: its header, and a hole where the bytes would be."""
    header: dict[str, Any] = {}
    end = 0
    for name, rows, columns in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
        parts: dict[str, tuple[str, list[int], int]] = {
            "blocks": ("U8", [experts, rows, columns // 32, 16], 1),
            "scales": ("U8", [experts, rows, columns // 32], 1),
        }
        if bias:
            parts["bias"] = ("BF16", [experts, rows], 2)
        for part, (dtype, shape, nbytes) in parts.items():
            start, end = end, end + torch.Size(shape).numel() * nbytes
            said = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            header[f"model.layers.0.mlp.experts.{name}_{part}"] = said
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def kernels_of(outcome: dict[str, Any]) -> str:
    """What AMD's code chose, in our words, said here anew."""
    if "pipeline" in outcome or "mxfp4_hip" in outcome:
        return "HIP a4w4"
    first, kernel = outcome["stage1"]["function"], outcome["stage1"].get("kernelName", "")
    if first == "_mxfp4_a4w4_stage1_fw":
        return "mxmoe a4w4"
    if first == "_flydsl_stage1_wrapper":
        return "FlyDSL a8w4" if "_afp8_" in kernel else "FlyDSL a4w4"
    if first == "cktile_moe_stage1" and outcome["stage1"].get("split_k", 1) == 1:
        return "CK-Tile a16w4" if outcome["q_dtype_a"] == "bfloat16" else "CK-Tile a8w4"
    if first == "cktile_moe_stage1":
        standard = outcome["stage1"].get("post_activation_layout") == "standard"
        return "CK-Tile a16w4, K in parts" + ("" if standard else ", of interleaved rows")
    assert first == "ck_moe_stage1", first
    return "CK a4w4"


HIP = ("57e74501a5", "39e2ed7e8a", "d6ede4548e", "46ecc4489d", "05567f6668")
MODEL_OF = {"gpt-oss-120b": GPT_OSS, "gpt-oss-20b": GPT_OSS, "deepseek-v4": DEEPSEEK}


def test_what_it_derives_is_what_aiter_chose(tmp_path: Path) -> None:
    """For each revision and shape of the record, in the layout that the revision reads by default. It has no tuned
    tables, so all differences are of shapes in them."""
    different: dict[str, list[str]] = {}
    compared = 0
    for shape, (experts, hidden, intermediate, topk) in RECORD["shapes"].items():
        config = {"hidden_act": "silu", **MODEL_OF.get(shape, {}), "num_experts_per_tok": topk}
        swiglu = config.get("model_type") == "gpt_oss"
        (tmp_path / shape).mkdir()
        headers_alone(tmp_path / shape / "model.safetensors", experts, hidden, intermediate, swiglu)
        (tmp_path / shape / "config.json").write_text(json.dumps(config))
        for revision, record in RECORD["revisions"].items():
            (answer,) = why(tmp_path / shape, arch="gfx950", aiter=revision, tokens=RECORD["tokens"]).answers
            assert answer.backend in ("aiter", "triton")
            if revision in HIP and not swiglu:
                assert answer.backend == ("aiter" if revision == "46ecc4489d" and shape != "deepseek-v4" else "triton")
                continue  # where tags lead to kernels, or away from them: tests/test_routes.py
            wanted = (shape, "Swiglu" if swiglu else "Silu", "interleave" if revision in HIP else "separated", "")
            (indices,) = (
                call[5]
                for call in record["calls"]
                if tuple(call[:4]) == wanted and call[4] in ("any", "yes" if swiglu else "no")
            )
            others: dict[str, list[str]] = {}
            for tokens, index in zip(RECORD["tokens"], indices, strict=True):
                chosen, compared = kernels_of(record["outcomes"][index]), compared + 1
                found = next((route.name for route in answer.routes if tokens in route.tokens), "")
                if answer.backend == "triton":  # refused for all, because of the kernels for some
                    reason = re.match(r"for (\d+) tokens?, (.*) in aiter", dict(answer.passed_over)["aiter"])
                    assert reason is not None
                    if tokens != int(reason[1]):
                        continue
                    found = reason[2]
                if found != chosen:
                    others.setdefault(f"{found}; with tables, {chosen}", []).append(str(tokens))
            for what, numbers in others.items():
                different.setdefault(f"{shape}, {' '.join(numbers)} tokens: {what}", []).append(revision)
    assert compared > 500
    lines = (f"{what}: {', '.join(revisions)}" for what, revisions in different.items())
    assert_expected_inline(
        "\n".join(lines),
        """\
gpt-oss-120b, 300 4096 tokens: CK-Tile a8w4; with tables, FlyDSL a8w4: 57e74501a5, 39e2ed7e8a
kimi-k2.5, 1 4 32 64 255 256 300 4096 tokens: FlyDSL a4w4; with tables, mxmoe a4w4: b2dd7703df, v0.1.16.post6, v0.1.17-longctx, v0.1.18, v0.1.19, v0.1.20.post1, e4048607a5, 55f4bfeb5e, 2bb3bca2df
kimi-k2.5, 1 tokens: CK-Tile a16w4, K in parts, of interleaved rows; with tables, FlyDSL a4w4: v0.1.14, v0.1.15""",
    )


# --- names of versions and machines


def test_every_known_name_leads_to_its_version() -> None:
    for name, version in VERSION_OF.items():
        assert versions.version_named(name).name == version
        assert versions.version_named(name.removeprefix("v")).name == version
    for version in VERSIONS:
        assert versions.version_named(version).name == version
    assert versions.version_named("#3470").name == "#3470"
    assert versions.version_named("#3832").name == "v0.1.18 and later"


def test_errors_list_what_is_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "deepseek" / "config.json").write_text('{"hidden_act": "relu2"}')
    (folder / "kimi" / "config.json").write_text('{"hidden_act": ')
    for command in (
        ["gpt-oss", "--arch", "MI355X"],
        ["gpt-oss", "--aiter", "v0.1.13"],
        ["nothing"],
        ["deepseek"],
        ["kimi"],
    ):
        assert main(["why", *command]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert_expected_inline(
        found.err,
        """\
error: unknown architecture 'MI355X'; known are cpu, gfx950, gfx942, gfx90a, sm_70, sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_103, sm_120
error: unknown version of aiter 'v0.1.13'; known are v0.1.14, v0.1.15, v0.1.16, v0.1.16.post4, v0.1.16.post6, v0.1.17, v0.1.17-longctx, v0.1.18, v0.1.19, v0.1.20, v0.1.20.post1, #3470, #3788, #3827, #3832, #4398, #4542, 05567f6668, 2bb3bca2df, 39e2ed7e8a, 46ecc4489d, 55f4bfeb5e, 57e74501a5, b2dd7703df, d6ede4548e, de07f3885e, e4048607a5
error: no such file: nothing
error: deepseek/config.json: hidden_act='relu2' is no activation of fused_moe; known are silu, swish, gelu, gelu_new, gelu_pytorch_tanh, swigluoai, situ; --activation says what the layers have
error: kimi/config.json is no JSON: Expecting value: line 1 column 16 (char 15)
""",
    )
    with pytest.raises(SystemExit, match="2"):
        main(["why", "gpt-oss", "--activation", "relu2"])


def test_every_machine_has_an_answer(folder: Path) -> None:
    found = {name: why("gpt-oss", arch=name).answers[0].backend for name in ARCHITECTURES}
    assert found == {name: "reference" if name in ("cpu", "sm_70", "sm_75") else "triton" for name in ARCHITECTURES}


# --- what the checkpoint says


@pytest.mark.parametrize(
    ("config", "activation", "parameters", "topk"),
    [
        (GPT_OSS, "swiglu", {"swiglu_limit": 7.0}, 4),
        (KIMI_K3, "situ", {"situ_beta": 4.0, "situ_linear_beta": 25.0}, 2),
        ({"model_type": "kimi_k3", "text_config": {"hidden_act": "situ"}}, "situ", {"situ_beta": 4.0, "situ_linear_beta": 25.0}, None),
        ({"model_type": "kimi_linear", "hidden_act": "silu", "num_experts_per_token": 8}, "silu", {}, 8),
        (DEEPSEEK, "silu", {"swiglu_limit": 10.0}, 2),
        ({"model_type": "deepseek_v4"}, "silu", {"swiglu_limit": 10.0}, None),
        ({"model_type": "deepseek_v3", "hidden_act": "silu", "num_experts_per_tok": 8}, "silu", {}, 8),
        (
            {"model_type": "minimax_m3_vl", "text_config": {"model_type": "minimax_m3_vl_text", "hidden_act": "silu"}},
            "swiglu", {}, None,
        ),
        ({"model_type": "minimax_m3", "text_config": {"hidden_act": "silu"}}, "swiglu", {}, None),
        ({"model_type": "another", "hidden_act": "swigluoai", "swiglu_limit": 3.0}, "swiglu", {"swiglu_limit": 3.0}, None),
        ({"model_type": "another", "hidden_act": "silu", "swiglu_alpha": 1.5}, "swiglu", {"swiglu_alpha": 1.5}, None),
        ({"model_type": "another", "hidden_act": "gelu_pytorch_tanh", "swiglu_limit": None}, "gelu_tanh", {}, None),
        ({"experts_per_token": 3}, "silu", {}, 3),
    ],
)  # fmt: skip
def test_what_config_json_says(
    config: dict[str, Any], activation: str, parameters: dict[str, float], topk: int | None
) -> None:
    found = layer_in(config)
    assert (found.activation, found.parameters, found.topk) == (activation, parameters, topk)


def test_without_config_json(folder: Path) -> None:
    for name, activation in (("gpt-oss", "swiglu"), ("deepseek", "silu")):
        (folder / name / "config.json").unlink()
        found = why(name, arch="gfx950", aiter="v0.1.20")
        assert (found.activation, found.topk) == (activation, 8)
        assert all(said.startswith("assumed, since no config.json") for said in found.sources.values())
        assert ("biases" in found.sources["activation"]) is (name == "gpt-oss")
        assert [each.backend for each in found.answers] == ["aiter"]
    found = why("deepseek", arch="gfx950", aiter="v0.1.20", activation="situ", topk=2)
    assert found.sources == {"activation": "--activation", "topk": "--topk"}
    assert (found.parameters, found.topk) == ({"situ_beta": 4.0, "situ_linear_beta": 25.0}, 2)
    assert [each.backend for each in found.answers] == ["triton"]


def test_flags_come_before_config_json(folder: Path) -> None:
    found = why("gpt-oss", arch="gfx950", aiter="v0.1.20", activation="silu")
    assert (found.activation, found.parameters["swiglu_limit"], found.topk) == ("silu", float("inf"), 4)
    assert [route.name for route in found.answers[0].routes] == ["FlyDSL a4w4"]
    found = why("gpt-oss", arch="gfx950", aiter="#3788", activation="silu")
    assert "HIP a4w4 in aiter #3788 would ignore a bias" in dict(found.answers[0].passed_over)["aiter"]


def test_layers_of_a_kind_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other sizes, in bfloat16, shared, and with the rows of gate and up in an order that no name tells."""
    tensors = {}
    for number in (0, 1, 10, 2, 3):
        dense = make_dense(4, 288, 320 if number < 3 else 64)
        tensors |= in_format("quark", dense, f"model.layers.{number}.mlp.experts")
    tensors |= in_format("quark", make_dense(1, 288, 320), "model.layers.3.mlp.shared_experts")
    for projection, size in (("gate", (320, 288)), ("up", (320, 288)), ("down", (288, 320))):
        name = f"model.layers.4.mlp.experts.0.{projection}_proj.weight"
        tensors[name] = torch.zeros(size, dtype=torch.bfloat16)
    save_plain(tensors, folder / "mixed.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts_per_tok": 2}))
    assert_expected_inline(
        printed(capsys, "mixed.safetensors", "--arch", "gfx950", "--aiter", "v0.1.16"),
        """\
machine       gfx950 (MI350X, MI355X), with PyTorch and Triton for it
aiter         v0.1.16, which is not installed here: derived from what is known of its API (v0.1.16, v0.1.17), with flydsl and without aiter's tuned tables
activation    silu: config.json of qwen3_moe
topk          2: config.json of qwen3_moe

layers                             E x I x K      a layer    backend  layout           tokens  kernels                                   activations
model.layers.0-2.mlp.experts       4 x 320 x 288  1.6 MiB    aiter    mxfp4_separated  any     FlyDSL a4w4                               mxfp4, round_up
model.layers.3,10.mlp.experts      4 x 64 x 288   816.0 KiB  aiter    mxfp4_separated  any     FlyDSL a4w4                               mxfp4, round_up
model.layers.3.mlp.shared_experts  1 x 320 x 288  408.0 KiB  aiter    mxfp4_separated  any     FlyDSL a4w4                               mxfp4, round_up
model.layers.4.mlp.experts         1 x 320 x 288  540.0 KiB  none                      any     none of ours: bfloat16 in the checkpoint
layers: 7, memory with padding: 7.3 MiB
""",
    )
    # a shared expert is one of one, and not one of so many that K would not go in parts
    shared = why("mixed.safetensors", arch="gfx950", aiter="v0.1.15", topk=8).answers[2]
    assert shared.layers == "model.layers.3.mlp.shared_experts"
    assert dict(shared.passed_over)["aiter"].startswith("for 1 token, CK-Tile a16w4, K in parts")
    stacked: dict[str, Tensor] = {}
    for name, (codes, scale) in (("gate_up_proj", dense.w13), ("down_proj", dense.w2)):
        stacked |= {f"layers.0.experts.{name}.weight": codes, f"layers.0.experts.{name}.weight_scale": scale}
    save_plain(stacked, folder / "stacked.safetensors")
    (found,) = why("stacked.safetensors", arch="sm_90").answers
    assert (found.experts, found.intermediate, found.hidden, found.backend) == (4, 64, 288, "triton")
    save_file({"w13_weight": make_weight("w13"), "w2_weight": make_weight("w2")}, "nameless.safetensors")
    (found,) = why("nameless.safetensors", arch="sm_90").answers
    assert (found.layers, found.count, found.experts) == ("w13_weight, w2_weight", 1, 4)


# --- the table of families, and README's


def table() -> list[list[str]]:
    """The rows of README's table: hardware, layer, and what computes it by our function."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| hardware")))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 7]]
    return rows


def test_readme_names_the_families() -> None:
    named = [(model, row) for row in table() for model in MODELS if model.name in row[1]]
    assert [model for model, _ in named] == list(MODELS)
    words = " ".join(row[1] for row in table())
    for model in MODELS:
        words = words.replace(model.name, "")
    rest = set(re.findall(r"\b[A-Z][\w-]*[a-z\d][\w-]*", re.sub(r"`.*?`|\(.*?\)", "", words)))
    assert rest == {"SiLU", "SwiGLU"}  # and no other model


def backend_of(model: Model, gpu: str, aiter: str | None) -> str:
    if aiter is None:
        with override_arch(gpu, "meta"):
            return explain_model(model).backend
    with override_arch(gpu, "meta"), fake_aiter(versions.version_named(aiter).name, tuned=False):
        return explain_model(model).backend


def test_readme_says_who_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_IMPORT_FAILURE", ["aiter is missing"])
    silu, swiglu, rest, other, slow = table()
    assert [row[2] for row in (silu, swiglu, rest, other, slow)] == [
        "aiter's kernels", "aiter's kernels", "our Triton kernels", "our Triton kernels", "**the slow reference**",
    ]  # fmt: skip
    for model in MODELS:
        (own,) = (row for row in (silu, swiglu, rest) if model.name in row[1])
        since = {id(silu): "v0.1.16", id(swiglu): "v0.1.14", id(rest): None}[id(own)]
        assert since is None or f"{since} or later" in own[0] + own[1]
        found = {
            release: backend_of(model, "gfx950", release) for release in ("v0.1.14", "v0.1.15", "v0.1.16", "v0.1.20")
        }
        assert found == {release: "aiter" if since is not None and release >= since else "triton" for release in found}
        for gpu in ("gfx950", "gfx942", "sm_80", "sm_90"):
            assert backend_of(model, gpu, None) == "triton"
        assert backend_of(model, "cpu", None) == "reference"


def test_what_the_meta_device_stands_for() -> None:
    with override_arch("gfx950", "cuda:1"):
        with meta_as(torch.device("cuda:1")):
            assert (arch("meta"), arch("cpu")) == ("gfx950", "cpu")
            with meta_as(torch.device("cpu")):
                assert arch("meta") == "cpu"
        assert arch("meta") == "meta"
