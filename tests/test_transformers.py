# SPDX-License-Identifier: MIT
"""transformers' own models on packed experts, against the same models with dense ones."""

from __future__ import annotations

import json
import logging
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", reason="waits for transformers: pip install 'shuffled_tensor[transformers]'"
)

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from shuffled_tensor import SCALE_RULES, ShuffledMXFP4Tensor, convert, inspect, quantize_experts_  # noqa: E402
from shuffled_tensor.transformers import Mxfp4Config, config_for, quantize_model_, use_for_mxfp4  # noqa: E402

from .support.bytes import coded, moderate_scales  # noqa: E402
from .support.judges import dense, to_mxfp4  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # transformers' own

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_NUM = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _NUM | {"num_dense_layers": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": _ROUTED | _LATENT,
    "deepseek_v3": _ROUTED | _LATENT,
    "dots1": _ROUTED | {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
    "exaone_moe": _NUM | {"n_group": 1, "topk_group": 1},
    "flex_olmo": _NUM,
    "glm4_moe": _ROUTED,
    "glm4_moe_lite": _ROUTED | _LATENT,
    "gpt_oss": _LOCAL | {"intermediate_size": 64},
    "granitemoe": _LOCAL,
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 64},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": _NUM | {"num_dense_layers": 1, "layer_types": ["full_attention", "full_attention"]},
    "minimax": _LOCAL,
    "minimax_m2": _LOCAL | {"rotary_dim": 16},
    "mixtral": _LOCAL,
    "olmoe": _NUM,
    "phimoe": _LOCAL,
    "qwen2_moe": _NUM | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _NUM,
    "solar_open": _ROUTED | {"first_k_dense_replace": 0},
}
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers registers quantizers for the whole process, and counts bars on stderr."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    transformers.utils.logging.disable_progress_bar()
    yield
    AUTO_QUANTIZER_MAPPING.clear()
    AUTO_QUANTIZER_MAPPING.update(before)


def experts(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def plain(family: str, **options: Any) -> Any:
    """A model with random weights, in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | options))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def rounded(model: Any) -> Any:
    """The same model, whose experts' weights have been rounded to MXFP4 and back: by the judge, along K."""
    for module in experts(model).values():
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name).data
            weight = weight.transpose(1, 2) if module.is_transposed else weight
            value = to_mxfp4(weight, "even").float()
            getattr(module, name).data = value.transpose(1, 2).contiguous() if module.is_transposed else value
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS).logits
    return out


def load(path: Path, **options: Any) -> Any:
    given = {"dtype": torch.float32} | options
    if "config" not in given:
        given.setdefault("quantization_config", Mxfp4Config())
    return AutoModelForCausalLM.from_pretrained(path, **given).eval()


def again(path: Path) -> Any:
    """A model that was saved packed."""
    config = json.loads((path / "config.json").read_text())
    packed = config["quantization_config"]["quant_method"]
    assert packed == ("mxfp4" if config["model_type"] == "gpt_oss" else "compressed-tensors")
    return load(path) if packed == "mxfp4" else load(path, config=config_for(str(path)))


def packed_weights(model: nn.Module) -> list[ShuffledMXFP4Tensor]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, ShuffledMXFP4Tensor)]


def save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


# --- every family


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    """Quantised while it is loaded, and in place; saved, and loaded again."""
    path = save(plain(family), tmp_path / "plain")
    expected = logits(rounded(plain(family)))
    model = load(path)
    assert len(packed_weights(model)) == 2 * len(experts(model)) > 0
    assert model.config._experts_implementation == "shuffled_tensor"
    found = logits(model)
    if family == "gpt_oss":  # whose activation is computed in another order
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)
    in_place = quantize_model_(plain(family))
    assert torch.equal(logits(in_place), found)
    for saved in (model, in_place):
        for weight in packed_weights(saved):
            weight.shuffle_("mxfp4_moe")  # what is saved does not show it
    assert torch.equal(logits(again(save(model, tmp_path / "loaded"))), found)
    assert torch.equal(logits(again(save(in_place, tmp_path / "in place", max_shard_size="40KB"))), found)


# --- checkpoints that are packed


def _packed(rows: int, columns: int, experts: int, salt: int) -> tuple[Tensor, Tensor]:
    return coded(experts, rows, columns // 2, salt=salt), moderate_scales(
        experts, rows, columns // 32, salt=salt + 7
    ) - 4


def gpt_oss_checkpoint(path: Path) -> dict[str, Tensor]:
    """As OpenAI's: what it holds."""
    model = plain("gpt_oss")
    state = {name: value for name, value in model.state_dict().items() if "gate_up_proj" not in name or "bias" in name}
    state = {name: value.bfloat16() for name, value in state.items() if "down_proj" not in name or "bias" in name}
    for layer in range(2):
        for projection, rows in (("gate_up_proj", 128), ("down_proj", 64)):
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            codes, scales = _packed(rows, 64, 4, 100 * layer + rows)
            state |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
    model.config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return state


def test_gpt_oss(tmp_path: Path) -> None:
    (tmp_path / "openai").mkdir()
    state = gpt_oss_checkpoint(tmp_path / "openai")
    judge = plain("gpt_oss")
    for name, value in state.items():
        if name.endswith("_blocks"):
            values = dense(value.flatten(-2), state[name.replace("blocks", "scales")])
            judge.get_parameter(name.removesuffix("_blocks")).data = values.transpose(1, 2).float().contiguous()
        elif not name.endswith("_scales"):
            judge.get_parameter(name).data = value.float()
    model = load(tmp_path / "openai")
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)
    generated = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, judge.generate(IDS, max_new_tokens=8, do_sample=False))

    packed_weights(model)[0].shuffle_("mxfp4_separated")
    saved = load_file(save(load(tmp_path / "openai", dtype=torch.bfloat16), tmp_path / "saved") / "model.safetensors")
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(saved[name], value), name
    theirs = transformers.Mxfp4Config(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=theirs, dtype=torch.float32)
    torch.testing.assert_close(logits(read.float().eval()), logits(judge), atol=1e-5, rtol=1e-5)


def test_a_converted_directory(tmp_path: Path) -> None:
    """Whoever read the source reads it: transformers alone, and with our configuration."""
    for name in ("openai", "kimi"):
        (tmp_path / name).mkdir()
    gpt_oss_checkpoint(tmp_path / "openai")
    by_expert_checkpoint(tmp_path / "kimi", "mixtral", "compressed-tensors", {0, 1})
    theirs, found = transformers.Mxfp4Config(dequantize=True), []
    for source in (tmp_path / "openai", tmp_path / "kimi"):
        converted = source.with_name(f"{source.name}-converted")
        convert(source, converted)
        checksums = [[finding.checksum for finding in inspect(path, read=True)] for path in (source, converted)]
        assert checksums[0] == checksums[1] != []
        for path in (source, converted):
            found.append(logits(load(path, config=config_for(str(path)))))
            if source.name == "openai":
                options = {"quantization_config": theirs, "dtype": torch.float32}
                found.append(logits(AutoModelForCausalLM.from_pretrained(path, **options).float().eval()))
    openai, kimi = found[:4], found[4:]
    assert torch.equal(openai[0], openai[2])
    assert torch.equal(openai[1], openai[3])
    torch.testing.assert_close(openai[0], openai[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(*kimi)


def test_everybodys_from_pretrained(tmp_path: Path) -> None:
    (tmp_path / "openai").mkdir()
    gpt_oss_checkpoint(tmp_path / "openai")
    use_for_mxfp4()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "openai", dtype=torch.float32).eval()
    assert len(packed_weights(model)) == 4
    assert torch.equal(logits(model), logits(load(tmp_path / "openai")))


FORMS = {
    "Quark": ({"quant_method": "quark", "exclude": ["lm_head"]}, ".weight", ".weight_scale"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"]}, ".weight_packed", ".weight_scale"),
    "DeepSeek": ({"quant_method": "fp8"}, ".weight", ".scale"),
}  # fmt: skip
BY_EXPERT = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "deepseek_v3": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def by_expert_checkpoint(path: Path, family: str, form: str, packed_layers: set[int]) -> Any:
    """A checkpoint whose experts are packed in some layers; and the model that it is, dense."""
    config, codes_end, scales_end = FORMS[form]
    where, gate, up, down = BY_EXPERT[family]
    model = plain(family)
    save(model, path)
    state = load_file(path / "model.safetensors")
    for name, module in experts(model).items():
        layer = int(name.split(".")[2])
        if layer not in packed_layers:
            continue
        hidden, inner, count = 64, module.down_proj.shape[2], module.gate_up_proj.shape[0]
        values = {}
        for projection, rows, columns in ((gate, inner, hidden), (up, inner, hidden), (down, hidden, inner)):
            codes, scales = _packed(rows, columns, count, 11 * layer + len(values))
            values[projection] = dense(codes, scales).float()
            for expert in range(count):
                tensor = f"model.layers.{layer}.{where}.{expert}.{projection}"
                del state[f"{tensor}.weight"]
                state |= {f"{tensor}{codes_end}": codes[expert], f"{tensor}{scales_end}": scales[expert]}
        module.gate_up_proj.data = torch.cat([values[gate], values[up]], 1)
        module.down_proj.data = values[down]
    save_file(state, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    written["quantization_config"] = config
    (path / "config.json").write_text(json.dumps(written))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", BY_EXPERT)
def test_packed_expert_by_expert(family: str, form: str, tmp_path: Path) -> None:
    judge = by_expert_checkpoint(tmp_path, family, form, {0, 1})
    model = load(tmp_path, config=config_for(str(tmp_path)))
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(again(save(model, tmp_path / "saved"))), logits(model))


def test_a_layer_that_the_checkpoint_has_not_packed(tmp_path: Path) -> None:
    judge = by_expert_checkpoint(tmp_path, "qwen3_moe", "Quark", {1})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["exclude"] = ["model.layers.0.mlp.experts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, config=config_for(str(tmp_path)))
    assert len(packed_weights(model)) == 2
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_modules_that_are_left(family: str, tmp_path: Path) -> None:
    path = save(plain(family), tmp_path / "plain")
    model = load(path, quantization_config=Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]))
    judge = rounded(plain(family))
    for name in ("gate_up_proj", "down_proj"):
        setattr(judge.model.layers[0].mlp.experts, name, getattr(plain(family).model.layers[0].mlp.experts, name))
    assert len(packed_weights(model)) == 2
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)


# --- what is wrong is said


def _with(path: Path, change: Any) -> Any:
    """The Quark checkpoint with other tensors, loaded."""
    by_expert_checkpoint(path, "qwen3_moe", "Quark", {0, 1})
    state = load_file(path / "model.safetensors")
    changed = {}
    for name, data in state.items():
        changed |= change(name, data)
    save_file(changed, path / "model.safetensors", {"format": "pt"})
    return load(path, config=config_for(str(path)))


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    damaged = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    with pytest.raises(RuntimeError, match=r"automatic conversion of the weights"):
        _with(tmp_path, lambda name, data: {name: data[:, :1].clone() if name == damaged else data})


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    missing = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"automatic conversion of the weights"):
        _with(tmp_path, lambda name, data: {} if name == missing else {name: data})


def test_a_layer_whose_experts_are_missing(tmp_path: Path) -> None:
    """transformers alone would make random ones."""
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is in no file of the checkpoint"):
        _with(tmp_path, lambda name, data: {} if "layers.1.mlp.experts" in name else {name: data})


NAMED_OTHERWISE = {
    "fp8 by blocks": lambda name, data: {name.replace("weight_scale", "weight_scale_inv"): data},
    "GPTQ": lambda name, data: {name.replace(".weight", ".qweight") if "experts" in name else name: data},
    "attention that is packed": lambda name, data: {name: data} | ({name + "_scale": torch.zeros(2, 2, dtype=torch.uint8)} if "q_proj" in name else {}),
    "a shared expert that is packed": lambda name, data: {name: data, "model.layers.0.mlp.shared_experts.up_proj.weight_scale": torch.zeros(2, 2, dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("change", NAMED_OTHERWISE.values(), ids=NAMED_OTHERWISE)
def test_checkpoints_in_other_forms(change: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load such a checkpoint with the quantisation that it names"):
        _with(tmp_path, change)


OF_OTHER_DTYPES = {
    "int4 in int32": lambda name, data: {name: data.view(torch.int32) if "experts" in name and name.endswith("weight") else data},
    "float32 scales": lambda name, data: {name: data.float() if name.endswith("_scale") else data},
    "e4m3 scales": lambda name, data: {name: data.view(torch.float8_e4m3fn) if name.endswith("_scale") else data},
    "fp8 codes without scales": lambda name, data: {} if name.endswith("_scale") else {name: data.view(torch.float8_e4m3fn) if "experts" in name else data},
}  # fmt: skip


@pytest.mark.parametrize("change", OF_OTHER_DTYPES.values(), ids=OF_OTHER_DTYPES)
def test_bytes_of_other_kinds(change: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        _with(tmp_path, change)


def test_what_a_checkpoint_has_packed_stays_packed(tmp_path: Path) -> None:
    gpt_oss_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="what it has packed stays packed"):
        load(tmp_path, quantization_config=Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]))
    with pytest.raises(ValueError, match="pass transformers' own Mxfp4Config"):
        Mxfp4Config(dequantize=True)
    use_for_mxfp4()
    with pytest.raises(ValueError, match="dequantize=True was asked for"):
        load(tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True))


def test_a_plain_layer_of_gpt_oss_that_the_config_does_not_name(tmp_path: Path) -> None:
    state, judge = gpt_oss_checkpoint(tmp_path), plain("gpt_oss")
    for name, value in list(state.items()):
        if name.endswith("_blocks"):
            values = dense(value.flatten(-2), state[name.replace("blocks", "scales")]).transpose(1, 2).contiguous()
            judge.get_parameter(name.removesuffix("_blocks")).data = values.float()
            if "layers.1" in name:
                state[name.removesuffix("_blocks")] = values.bfloat16()
                del state[name], state[name.replace("blocks", "scales")]
        elif not name.endswith("_scales"):
            judge.get_parameter(name).data = value.float()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert len(packed_weights(model)) == 2
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)
    assert "model.layers.1.mlp.experts" in model.hf_quantizer.quantization_config.to_dict()["modules_to_not_convert"]
    torch.testing.assert_close(logits(model.dequantize()), logits(judge), atol=1e-5, rtol=1e-5)


def test_globs_and_expressions_of_what_is_not_packed(tmp_path: Path) -> None:
    judge = by_expert_checkpoint(tmp_path, "qwen3_moe", "Quark", {1})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["exclude"] = ["*layers.0.mlp.experts*", "*mlp.shared_experts*", r"re:.*lm_head$"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, config=config_for(str(tmp_path)))
    assert len(packed_weights(model)) == 2
    torch.testing.assert_close(logits(model), logits(judge), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_is_not_quantised(tmp_path: Path) -> None:
    save(plain("qwen3_moe"), tmp_path)
    with pytest.raises(ValueError, match=r"pass quantization_config=Mxfp4Config\(\) to from_pretrained"):
        config_for(str(tmp_path))


def test_models_that_are_quantised_already_or_in_part() -> None:
    model = quantize_model_(plain("qwen3_moe"))
    with pytest.raises(ValueError, match="has no experts that MXFP4 weights could replace"):
        quantize_model_(model)
    with pytest.raises(ValueError, match="give the whole model"):
        quantize_experts_(plain("qwen3_moe").model.layers[0].mlp)
    with pytest.raises(ValueError, match="there is no align"):
        quantize_experts_(plain("qwen3_moe"), align=64)
    foreign = plain("qwen3_moe")
    foreign.hf_quantizer = object()
    with pytest.raises(ValueError, match="is quantised already, by object"):
        quantize_model_(foreign)


def test_one_after_the_other_by_one_config(tmp_path: Path) -> None:
    config = Mxfp4Config()
    models = [quantize_model_(plain(family), config) for family in ("qwen3_moe", "gpt_oss")]
    for index, model in enumerate(models):
        assert torch.equal(logits(again(save(model, tmp_path / str(index)))), logits(model))


def test_quantised_in_two_steps(tmp_path: Path) -> None:
    model = quantize_model_(plain("qwen3_moe"), Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]))
    quantize_model_(model)
    assert len(packed_weights(model)) == 4
    assert torch.equal(logits(again(save(model, tmp_path))), logits(model))


def test_what_a_saved_model_says_is_not_packed() -> None:
    """As engines read it: all but the experts, whatever it is called; and experts that stay."""
    model = quantize_model_(plain("deepseek_v3"))
    (pattern,) = model.hf_quantizer.quantization_config.to_dict()["ignore"]
    ignored = [name for name, _ in model.named_modules() if re.match(pattern.removeprefix("re:"), name)]
    assert "model.layers.1.mlp.experts" not in ignored
    assert {
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.shared_experts.up_proj",
        "model.layers.0.mlp.up_proj",
    } <= set(ignored)
    assert not re.match(pattern.removeprefix("re:"), "model.layers.1.mlp.experts.3.up_proj")
    model = quantize_model_(plain("qwen3_moe"), Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]))
    patterns = [each.removeprefix("re:") for each in model.hf_quantizer.quantization_config.to_dict()["ignore"]]
    for layer in (0, 1):
        for name in (f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.mlp.experts.3.up_proj"):
            assert any(re.match(each, name) for each in patterns) == (layer == 0)


def test_a_model_without_experts(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3", **COMMON)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts that MXFP4 weights could replace"):
        quantize_model_(AutoModelForCausalLM.from_config(config))


def test_offloading_to_disk(tmp_path: Path) -> None:
    path = save(plain("qwen3_moe"), tmp_path / "plain")
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(path, device_map={"": "disk"})


# --- the rest of transformers


def test_an_activation_that_no_kernel_knows(caplog: pytest.LogCaptureFixture) -> None:
    models = [plain("qwen3_moe", hidden_act="relu") for _ in range(2)]
    caplog.set_level(logging.INFO, "shuffled_tensor")
    quantize_model_(models[0])
    said = [record.getMessage() for record in caplog.records]
    assert (
        "model.layers.0.mlp.experts: its activation is none that kernels know, so it runs one expert at a time" in said
    )
    torch.testing.assert_close(logits(models[0]), logits(rounded(models[1])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["xielu", "prelu"])
def test_an_activation_with_parameters(activation: str, tmp_path: Path) -> None:
    path = save(plain("qwen3_moe", hidden_act=activation), tmp_path)
    judge = rounded(plain("qwen3_moe", hidden_act=activation))
    torch.testing.assert_close(logits(load(path)), logits(judge), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_activations_that_kernels_know(activation: str) -> None:
    model = quantize_model_(plain("qwen3_moe", hidden_act=activation))
    expected = {"activation": {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)}
    assert experts(model)["model.layers.0.mlp.experts"].packed_gate == expected


def test_parameters_of_an_activation() -> None:
    """Limits beyond the usual, where a clamp would go unseen on a small grid."""
    model = plain("gpt_oss")
    for module in experts(model).values():
        module.limit, module.alpha = 15.0, 1.25
    quantize_model_(model)
    assert experts(model)["model.layers.0.mlp.experts"].packed_gate == {
        "activation": "swiglu", "swiglu_limit": 15.0, "swiglu_alpha": 1.25
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_gradients_of_what_surrounds_the_experts(family: str, checkpointing: bool) -> None:
    model, judge = quantize_model_(plain(family)), rounded(plain(family))
    for each in (model, judge):
        each.train()
        if checkpointing:
            each.gradient_checkpointing_enable()
        each(IDS, labels=IDS).loss.backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), judge.named_parameters(), strict=True):
        if isinstance(found, ShuffledMXFP4Tensor):
            assert found.grad is None
        elif "experts.gate_up_proj_bias" not in name:  # whose rows have another order
            torch.testing.assert_close(
                found.grad, expected.grad, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_slots_of_another_ranks_experts(activation: str) -> None:
    """Under expert parallelism transformers gives them the id behind the last one, and the weight 0."""
    model = quantize_model_(plain("qwen3_moe", hidden_act=activation))
    layer = experts(model)["model.layers.0.mlp.experts"]
    layer._is_expert_parallel = True
    x, weight = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 7], [2, 5]])
    weight[ids == 8] = 0
    with torch.no_grad():
        found = layer(x, ids, weight)
        judge = rounded(plain("qwen3_moe", hidden_act=activation)).model.layers[0].mlp.experts
        judge.config._experts_implementation = "eager"
        expected = judge(x, ids.clamp(max=7), weight)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_biases_alone() -> None:
    model, judge = quantize_model_(plain("gpt_oss")), rounded(plain("gpt_oss"))
    for each in (model, judge):
        each.requires_grad_(False)
        biases = [value.requires_grad_(True) for name, value in each.named_parameters() if "down_proj_bias" in name]
        each(IDS, labels=IDS).loss.backward()
        each.found = [bias.grad for bias in biases]
    for found, expected in zip(model.found, judge.found, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_compiled() -> None:
    model = quantize_model_(plain("qwen3_moe"))
    eager = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), eager, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_device_map(family: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="waits for accelerate")
    path = save(plain(family), tmp_path / "plain")
    expected = logits(load(path))
    assert torch.equal(logits(load(path, device_map={"": "cpu"})), expected)


def test_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="waits for accelerate")
    model = quantize_model_(plain("qwen3_moe"))
    expected = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scale_rules_and_layouts(rule: Any, tmp_path: Path) -> None:
    path = save(plain("mixtral"), tmp_path / "plain")
    model = load(path, quantization_config=Mxfp4Config(scale_rule=rule, shuffle_kind="mxfp4_separated"))
    weight, values = model.model.layers[0].mlp.experts.down_proj, plain("mixtral").model.layers[0].mlp.experts.down_proj
    assert (weight.shuffle_kind, weight.is_shuffled) == ("mxfp4_separated", False)  # the first use shuffles
    with pytest.raises(ValueError, match="made for shuffle_kind='mxfp4_separated'"):
        weight.detach().as_kernel_operands(layout="none")
    assert torch.equal(weight.dequantize(torch.float64), to_mxfp4(values.data, rule))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_dequantised_again(family: str, tmp_path: Path) -> None:
    model = quantize_model_(plain(family))
    save(model, tmp_path)  # after which its config's dtype is a word
    model = model.dequantize()
    assert not packed_weights(model)
    torch.testing.assert_close(logits(model), logits(rounded(plain(family))), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_quantize_experts_reads_names_and_order_off_the_modules(family: str) -> None:
    model = plain(family)
    assert quantize_experts_(model) is model
    torch.testing.assert_close(logits(model), logits(rounded(plain(family))), atol=1e-5, rtol=1e-5)


def test_torchaos_own_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/TRANSFORMERS.md."""
    pytest.importorskip("torchao", reason="waits for torchao")
    page = (Path(__file__).parents[1] / "docs" / "TRANSFORMERS.md").read_text(encoding="utf-8")
    recipe = page[page.index("```text torchao\n") :].split("```")[1].removeprefix("text torchao\n")
    model = plain("qwen3_moe")
    exec(recipe, {"model": model})
    assert len(packed_weights(model)) == 4
    torch.testing.assert_close(logits(model), logits(rounded(plain("qwen3_moe"))), atol=1e-5, rtol=1e-5)


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "transformers_gpt_oss.py"), run_name="__main__")
    assert "saved as down_proj_bias, down_proj_blocks, down_proj_scales" in capsys.readouterr().out


def test_the_saved_config_is_one_of_compressed_tensors() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="waits for compressed-tensors")
    config = quantize_model_(plain("qwen3_moe")).hf_quantizer.quantization_config.to_dict()
    group = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert (group.weights.num_bits, group.weights.group_size, group.format) == (4, 32, "mxfp4-pack-quantized")
