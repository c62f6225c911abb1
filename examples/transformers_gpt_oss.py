# SPDX-License-Identifier: MIT
"""A gpt-oss of transformers on packed experts: loaded, generated with, given new values, saved, loaded again.

    python examples/transformers_gpt_oss.py

The model is tiny and random, and made on the spot, in the form in which OpenAI publishes gpt-oss.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.transformers import Mxfp4Config, quantize_model_

PROMPT = torch.arange(2, 18).unsqueeze(0)


def tiny(seed: int):
    """In high precision."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_local_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    return model


def generate(model) -> list[int]:
    out: list[int] = model.generate(PROMPT, max_new_tokens=8, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    return out


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        quantize_model_(tiny(0)).save_pretrained(first)

        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(first, quantization_config=Mxfp4Config(), dtype=torch.bfloat16)
        weights = [weight for weight in model.parameters() if isinstance(weight, ShuffledMXFP4Tensor)]
        size = sum(weight.nbytes for weight in weights) / 2**20
        print(f"loaded {len(weights)} packed weights, {size:.1f} MiB, in {time.perf_counter() - start:.2f} s")
        said = generate(model)
        print(f"generated {said}")

        address = weights[0].qdata.data_ptr()
        trained = quantize_model_(tiny(1))  # what a trainer would send
        model.load_state_dict(trained.state_dict())
        assert weights[0].qdata.data_ptr() == address
        again = generate(model)
        print(f"refitted in place: {again}")
        assert again == generate(trained) != said

        model.save_pretrained(second)
        reloaded = AutoModelForCausalLM.from_pretrained(second, quantization_config=Mxfp4Config(), dtype=torch.bfloat16)
        assert generate(reloaded) == again
        names = [name for name in load_file(second / "model.safetensors") if "layers.0" in name and "_proj_" in name]
        print("saved as", ", ".join(sorted(name.rpartition(".")[2] for name in names)))


if __name__ == "__main__":
    main()
