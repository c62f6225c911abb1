# SPDX-License-Identifier: MIT
"""Which tensors of a checkpoint are experts' weights, and what belongs to them that no format knows."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor

from shuffled_tensor import CheckpointError, convert, inspect, load_experts, load_file, save_file
from shuffled_tensor.checkpoint.inspection import Finding
from shuffled_tensor.cli import main

from .support.bytes import coded, weight_of
from .support.checkpoints import FORMATS, SIZES, in_format, layer_name, make_dense
from .support.judges import dense

DENSE = make_dense(2, 96, 64)
KIMI = "language_model.model.layers.3.block_sparse_moe"
RENAMED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """w1, w3 and w2 for the three projections."""
    return {re.sub("|".join(RENAMED), lambda found: RENAMED[found[0]], name): data for name, data in tensors.items()}


def assert_refused_everywhere(folder: Path, tensors: dict[str, Tensor], message: str, layer: str) -> None:
    path = folder / "model.safetensors"
    save_plain(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load_experts(path)
    with pytest.raises(CheckpointError, match=message):
        convert(path, folder / "converted.safetensors")
    assert list(folder.iterdir()) == [path]
    assert main(["convert", str(path), str(folder / "converted.safetensors")]) == 1
    problems = [(finding.name, problem) for finding in inspect(path, read=True) for problem in finding.problems]
    assert any(name == layer and re.match(message, problem) for name, problem in problems)
    assert main(["verify", str(path)]) == 1


# --- what is beside the parts that are known


COMPANIONS = {
    "gpt-oss": ("gate_up_proj_global_scale", "down_proj_input_scale", "gate_up_proj_blocks_g_idx", "act_order"),
    "quark": ("0.gate_proj.weight_scale_2", "1.down_proj.input_scale", "0.up_proj.weight_zero_point", "extra"),
    "compressed-tensors": (
        "0.gate_proj.weight_global_scale",
        "1.up_proj.weight_g_idx",
        "0.down_proj.input_global_scale",
        "1.down_proj.weight_shape",
        "2.down_proj.qweight",
    ),
    "deepseek": ("0.w1.weight_scale_2", "1.w2.bias", "0.w3.smooth", "0.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_companion_that_no_format_knows(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for index, companion in enumerate(COMPANIONS[format]):
        folder, name = tmp_path / str(index), layer_name(format)
        folder.mkdir()
        tensors = in_format(format, DENSE, name) | {f"{name}.{companion}": torch.full((1,), 2.0).to(dtype)}
        message = rf"{re.escape(f'{name}.{companion}')} in .*model.safetensors is named as in no format"
        assert_refused_everywhere(folder, tensors, message, name)


def test_scales_beside_a_plain_weight(tmp_path: Path) -> None:
    name, path = layer_name("quark"), tmp_path / "model.safetensors"
    shared = f"{name.removesuffix('experts')}shared_experts"
    tensors = in_format("quark", DENSE, name)
    for projection, shape in (("gate_proj", (64, 96)), ("up_proj", (64, 96)), ("down_proj", (96, 64))):
        tensors[f"{shared}.{projection}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    save_plain(tensors, path)
    assert load_experts(path).keys() == {name, shared}
    save_plain(tensors | {f"{shared}.up_proj.weight_scale": torch.ones(1)}, path)
    for read in (load_experts, lambda path: convert(path, tmp_path / "converted")):
        with pytest.raises(
            CheckpointError, match=r"shared_experts.*, but has scales beside it: .*up_proj.weight_scale$"
        ):
            read(path)


@pytest.mark.parametrize("companion", ["w13_weight_scale_2", "w2_weight.global_scale", "w13_g_idx"])
def test_a_companion_of_our_own_weights(companion: str, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    for layer in ("model.experts.", ""):
        weights = {f"{layer}w13_weight": weight_of(DENSE.w13), f"{layer}w2_weight": weight_of(DENSE.w2, gate_up=False)}
        others = {f"{layer}expert_map": torch.arange(4), f"{layer}e_score_correction_bias": torch.ones(4)}
        save_file(weights | others, path)
        assert load_experts(path).keys() == {layer.removesuffix(".")}
        assert load_file(path).keys() == weights.keys() | others.keys()
        save_file(weights | others | {f"{layer}{companion}": torch.ones(1)}, path)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(layer + companion)} in .* named as in no format"):
            load_experts(path)


def test_weights_of_any_name_beside_buffers_of_their_module(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file({"a.experts.up": weight_of(DENSE.w13), "a.experts.expert_map": torch.arange(4)}, path)
    assert [finding.problems for finding in inspect(path, read=True)] == [()]
    assert main(["verify", str(path)]) == 0


def test_what_inspect_says_of_a_companion(tmp_path: Path) -> None:
    name, path = layer_name("quark"), tmp_path / "model.safetensors"
    save_plain(in_format("quark", DENSE, name) | {f"{name}.0.norm.weight": torch.ones(1)}, path)
    (found,) = (finding for finding in inspect(path, read=True) if finding.problems)
    (problem,) = found.problems
    assert problem.startswith(f"{name}.0.norm.weight in {path} is named as in no format that is known")
    assert found == Finding(name, "unknown", (), "", 0, "", "", False, (problem,))


def test_names_are_kept_to_the_letter(tmp_path: Path) -> None:
    for number, layer in enumerate(("X.experts", "experts", "XX.X.experts")):
        path, converted = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.converted"
        save_plain(in_format("quark", DENSE, layer), path)
        convert(path, converted)
        names = {f"{layer}.{which}_weight" for which in ("w13", "w2")}
        assert {finding.name for finding in inspect(path)} == load_file(converted).keys() == names


# --- whole layers that no format knows


def unknown(layer: str) -> dict[str, dict[str, Tensor]]:
    """Packed experts by other names."""
    codes, scales = coded(2, 64, 48), coded(2, 64, 3)
    return {
        "other projections": {f"{layer}.experts.0.fc1.weight_packed": codes[0], f"{layer}.experts.0.fc1.weight_scale": scales[0]},
        "other parts": {f"{layer}.experts.0.gate_proj.packed": codes[0], f"{layer}.experts.0.gate_proj.exponents": scales[0]},
        "stacked": {f"{layer}.experts.gate_up_proj.codes": codes, f"{layer}.experts.gate_up_proj.weight_scale": scales},
        "another word": {f"{layer}.routed_experts.0.fc1.weight": codes[0]},
        "gptq": {f"{layer}.experts.0.gate_proj.qweight": codes[0].view(torch.int32), f"{layer}.experts.0.gate_proj.scales": scales[0].half()},
        "fp8": {f"{layer}.experts.0.fc1.weight": codes[0].view(torch.float8_e4m3fn)},
        "shared": {f"{layer}.shared_experts.fc1.weight": codes[0], f"{layer}.shared_experts.fc1.weight_scale": scales[0]},
    }  # fmt: skip


@pytest.mark.parametrize("which", unknown(""))
def test_a_layer_that_no_format_knows(which: str, tmp_path: Path) -> None:
    name = layer_name("quark")
    others = unknown("model.layers.4.mlp")[which]
    first = min(others)
    message = (
        rf"{re.escape(first)} in .*model.safetensors(| and 1 more tensors of .* are| is) (is )?named as in no format"
    )
    layer = re.match(r".*?experts", first)[0]  # type: ignore[index]
    assert_refused_everywhere(tmp_path, in_format("quark", DENSE, name) | others, message, layer)
    found = load_experts(tmp_path / "model.safetensors", prefix="model.layers.3.")[name]
    assert torch.equal(found.w13.dequantize(torch.float64), dense(*DENSE.w13))


def test_plain_layers_that_no_format_knows_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And come along in a conversion, as every other tensor that is not packed."""
    name, path = layer_name("quark"), tmp_path / "model.safetensors"
    plain = {"mtp.0.experts.0.fc1.weight": torch.ones(3, 4), "mtp.0.experts.0.fc1.bias": torch.ones(3)}
    save_plain(in_format("quark", DENSE, name) | plain, path)
    with caplog.at_level(logging.WARNING, "shuffled_tensor"):
        assert load_experts(path).keys() == {name}
    assert [record.getMessage() for record in caplog.records] == [
        f"left out mtp.0.experts of {path}: its names are not those of the format"
    ]
    convert(path, tmp_path / "converted.safetensors")
    written = load_plain(tmp_path / "converted.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.items())
    assert load_experts(tmp_path / "converted.safetensors").keys() == {name}


# --- names of the field


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", ["quark", "compressed-tensors"])
def test_w1_w3_w2(format: str, size: str, tmp_path: Path) -> None:
    """Kimi-K3's compressed-tensors, and Quark of MiniMax and Mixtral; shared experts by other names beside them."""
    both = make_dense(*SIZES[size])
    hidden, intermediate = both.w13[0].shape[2] * 2, both.w2[0].shape[2] * 2
    shared = {
        f"{KIMI}.shared_experts.{projection}.weight": torch.full(shape, 1.5, dtype=torch.bfloat16)
        for projection, shape in (
            ("gate_proj", (intermediate, hidden)),
            ("up_proj", (intermediate, hidden)),
            ("down_proj", (hidden, intermediate)),
        )
    }
    tensors = renamed(in_format(format, both, f"{KIMI}.experts", bias=True)) | shared
    source, converted = tmp_path / "model.safetensors", tmp_path / "converted.safetensors"
    save_plain(tensors | {f"{KIMI}.gate.e_score_correction_bias": torch.ones(4)}, source)
    assert all(f"{KIMI}.experts.0.w{index}.weight_scale" in tensors for index in (1, 2, 3))
    convert(source, converted, layout="mxfp4_moe")
    for path in (source, converted):
        found = load_experts(path)
        assert found.keys() == {f"{KIMI}.experts", f"{KIMI}.shared_experts"}
        experts = found[f"{KIMI}.experts"]
        assert torch.equal(experts.w13.dequantize(torch.float64), dense(*both.w13))
        assert torch.equal(experts.w2.dequantize(torch.float64), dense(*both.w2))
        assert torch.equal(experts.w13_bias, both.w13_bias)
        assert torch.equal(experts.w2_bias, both.w2_bias)
        assert found[f"{KIMI}.shared_experts"].w13.dtype == torch.bfloat16
    assert {finding.format for finding in inspect(source)} == {format}


def test_formats_that_call_codes_alike(tmp_path: Path) -> None:
    """`w1.weight` is Quark's and DeepSeek's: the name of the scales tells."""
    path = tmp_path / "model.safetensors"
    quark = renamed(in_format("quark", DENSE, "model.layers.3.experts"))
    deepseek = in_format("deepseek", DENSE, "layers.3.ffn.experts")
    save_plain(quark, path)
    assert {finding.format for finding in inspect(path)} == {"quark"}
    save_plain(deepseek, path)
    assert {finding.format for finding in inspect(path)} == {"deepseek"}
    save_plain(quark | deepseek, path)
    with pytest.raises(
        CheckpointError, match=r"weight as in 'quark' and .*weight as in 'deepseek'; say which with format="
    ):
        load_experts(path)
    del quark["model.layers.3.experts.1.w3.weight_scale"]
    save_plain(quark, path)
    with pytest.raises(CheckpointError, match="has no scale of expert 1"):
        load_experts(path)


# --- experts in other forms

OTHERS = {
    "NVFP4": (
        {".weight": (32, torch.uint8), ".weight_scale": (4, torch.float8_e4m3fn), ".weight_scale_2": (1, torch.float32)},
        r"down_proj\.weight_scale_2 is of experts in NVFP4 \(blocks of 16, with an outer scale\): dequantise it",
    ),
    "NVFP4 of compressed-tensors": (
        {".weight_packed": (32, torch.uint8), ".weight_scale": (4, torch.float8_e4m3fn), ".weight_global_scale": (1, torch.float32)},
        r"weight_global_scale is of experts in NVFP4",
    ),
    "FP8 in blocks": (
        {".weight": (64, torch.float8_e4m3fn), ".weight_scale_inv": (1, torch.float32)},
        r"weight_scale_inv is of experts in FP8 with scales of blocks: dequantise it",
    ),
    "FP8": (
        {".weight": (64, torch.float8_e4m3fn), ".weight_scale": (1, torch.float32)},
        r"down_proj\.weight is of experts in FP8: dequantise it",
    ),
    "AWQ": ({".qweight": (8, torch.int32), ".scales": (2, torch.float16)}, r"qweight is of experts in AWQ's or GPTQ's"),
    "int4": (
        {".weight_packed": (8, torch.int32), ".weight_scale": (2, torch.bfloat16), ".weight_shape": (2, torch.int64)},
        r"is of experts in compressed-tensors' packed integers: dequantise it",
    ),
    "bfloat16": ({".weight": (64, torch.bfloat16)}, r"is of experts in high precision: quantise it with quantize_experts_"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "said"), OTHERS.values(), ids=OTHERS)
def test_experts_in_other_forms_are_called_by_their_names(
    parts: dict[str, tuple[int, torch.dtype]], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.{projection}{suffix}": torch.zeros(64, width, dtype=torch.uint8).to(dtype)
        for expert in range(2)
        for projection in ("gate_proj", "up_proj", "down_proj")
        for suffix, (width, dtype) in parts.items()
    }
    save_plain(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        load_experts(path)


def test_stacked_experts_in_high_precision(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_plain({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 64, 64, dtype=torch.bfloat16)}, path)
    with pytest.raises(CheckpointError, match=r"gate_up_proj is of experts in high precision: quantise it"):
        load_experts(path)
