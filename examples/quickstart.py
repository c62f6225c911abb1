# SPDX-License-Identifier: MIT
"""From checkpoint files to a mixture-of-experts layer, in every layout, against what AMD machine code computed.

    make demo        (or: python examples/quickstart.py)

The layer is small (4 experts, hidden size 512, intermediate size 256), and real: its bytes, its tokens and its
expected output come from AMD's shipped fused MXFP4 MoE kernel for gfx950, executed on a functional simulator.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shuffled_tensor import dequantize, fused_moe, load_experts

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "fmoe_silu_gfx950.safetensors"
PREFIX = "model.layers.0.mlp.experts"
LAYOUTS = ("none", "mxfp4_moe", "mxfp4_separated")


class Experts(nn.Module):
    """An ordinary module: its parameters happen to be MXFP4, and know in which order their bytes lie."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(w13)
        self.w2_weight = nn.Parameter(w2)

    def forward(self, hidden_states: Tensor, topk_weight: Tensor, topk_ids: Tensor, **options: object) -> Tensor:
        return fused_moe(hidden_states, self.w13_weight, self.w2_weight, topk_weight, topk_ids, **options)


# --- Two checkpoints of the same layer, as two formats in the wild have them


def write_gpt_oss(layer: dict[str, Tensor], path: Path) -> None:
    """gpt-oss: blocks of 16 bytes, and gate and up rows interleaved (g0, u0, g1, u1, ...)."""
    zipped = torch.arange(512).view(2, 256).T.flatten()
    save_file(
        {
            f"{PREFIX}.gate_up_proj_blocks": layer["w13"][:, zipped].unflatten(-1, (-1, 16)).contiguous(),
            f"{PREFIX}.gate_up_proj_scales": layer["w13_scale"][:, zipped].contiguous(),
            f"{PREFIX}.gate_up_proj_bias": torch.zeros(4, 512, dtype=torch.bfloat16),
            f"{PREFIX}.down_proj_blocks": layer["w2"].unflatten(-1, (-1, 16)).contiguous(),
            f"{PREFIX}.down_proj_scales": layer["w2_scale"],
            f"{PREFIX}.down_proj_bias": torch.zeros(4, 512, dtype=torch.bfloat16),
        },
        path,
    )


def write_quark(layer: dict[str, Tensor], path: Path) -> None:
    """Quark (amd/*-MXFP4): gate, up and down projections of every expert are tensors of their own."""
    tensors = {}
    for expert in range(4):
        for name, part, rows in (
            ("gate_proj", "w13", slice(0, 256)),
            ("up_proj", "w13", slice(256, 512)),
            ("down_proj", "w2", slice(None)),
        ):
            tensors[f"{PREFIX}.{expert}.{name}.weight"] = layer[part][expert, rows].contiguous()
            tensors[f"{PREFIX}.{expert}.{name}.weight_scale"] = layer[f"{part}_scale"][expert, rows].contiguous()
    save_file(tensors, path)


# --- What to compare with


def dense_float64(layer: dict[str, Tensor]) -> Tensor:
    """The layer in plain float64 arithmetic, from the bytes as they are in the golden file."""
    x, w13, w2 = (dequantize(layer[name], layer[f"{name}_scale"], torch.float64) for name in ("x", "w13", "w2"))
    gate, up = torch.einsum("tk,enk->ten", x, w13).chunk(2, dim=-1)
    every_expert = torch.einsum("tei,eki->tek", F.silu(gate) * up, w2)
    chosen = every_expert.gather(1, layer["topk_ids"].long().unsqueeze(-1).expand(-1, -1, 512))
    return (chosen * layer["topk_weight"].double().unsqueeze(-1)).sum(1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cosine(found: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0))


def with_a_tag_instead(experts: Experts, layer: dict[str, Tensor]) -> tuple[bool, Tensor]:
    """The same shuffled bytes in plain tensors, with the layout as an attribute. What does the kernel get to see?"""
    plain = experts.w13_weight.qdata.clone()
    plain.is_shuffled = True
    parameter = nn.Parameter(plain, requires_grad=False)  # what every engine does next
    tag = getattr(parameter, "is_shuffled", False)
    w13, w2 = experts.w13_weight, experts.w2_weight
    out = torch.ops.shuffled_tensor.fused_moe_packed(
        layer["x"],
        w13_qdata=parameter,
        w13_scale=w13.scale,
        w13_layout="mxfp4_moe" if tag else "none",  # decided by the tag
        w13_rows=512,
        w13_columns=512,
        w2_qdata=w2.qdata,
        w2_scale=w2.scale,
        w2_layout="mxfp4_moe",
        w2_rows=512,
        w2_columns=256,
        topk_weight=layer["topk_weight"],
        topk_ids=layer["topk_ids"],
        out_dtype="bfloat16",
        backend="reference",
        hidden_scale=layer["x_scale"],
        activation_dtype="mxfp4",
        scale_rule="amax4",
    )
    return tag, out


def main() -> None:
    layer = load_file(GOLDEN)
    expected = dense_float64(layer)
    modules = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("gpt-oss", write_gpt_oss), ("Quark", write_quark)):
            path = Path(folder, f"{name}.safetensors")
            write(layer, path)
            loaded = load_experts(path)[PREFIX]  # names, dtypes and row orders of the format are read off the file
            modules[name] = Experts(loaded.w13, loaded.w2)
    experts = modules["gpt-oss"]

    print("One layer from two checkpoint files, as parameters of an ordinary module:\n")
    for name, module in modules.items():
        print(f"  {name:8} w13_weight checksum {module.w13_weight.logical_checksum()[:16]}")
    print(f"\n  {experts.w13_weight}")
    print("\n  experts.w13_weight.shuffle_('mxfp4_moe')   # on a gfx950 GPU this happens by itself, on first use\n")
    print(f"  {experts.w13_weight.shuffle_('mxfp4_moe')}")

    print("\nThe layer, run from every layout:\n")
    print(f"  {'checkpoint':12}{'bytes lie as':18}{'error vs float64':>18}{'cosine with AMD machine code':>31}")
    tokens = {"topk_weight": layer["topk_weight"], "topk_ids": layer["topk_ids"]}
    for name, module in modules.items():
        for kind in LAYOUTS:
            module.w13_weight.shuffle_(kind)
            module.w2_weight.shuffle_(kind)
            x = dequantize(layer["x"], layer["x_scale"])
            error = relative_error(module(x, **tokens), expected)
            out = module(
                layer["x"], **tokens, hidden_scale=layer["x_scale"], activation_dtype="mxfp4", scale_rule="amax4"
            )
            print(f"  {name:12}{kind:18}{error:18.1e}{cosine(out, layer['out']):31.6f}")

    packed = sum(part.nbytes for weight in experts.parameters() for part in (weight.qdata, weight.scale))
    bf16 = sum(2 * weight.numel() for weight in experts.parameters())
    print(f"\n  memory: {packed / 2**20:.2f} MiB packed, {bf16 / 2**20:.2f} MiB as bfloat16 ({bf16 / packed:.2f}x)")

    for weight in experts.parameters():
        weight.shuffle_("mxfp4_moe")
    tag, out = with_a_tag_instead(experts, layer)
    print("\nThe same shuffled bytes in plain tensors, tagged with an attribute, wrapped in nn.Parameter:\n")
    print(f"  is_shuffled after nn.Parameter: {tag}")
    print(f"  cosine with AMD machine code:   {cosine(out, layer['out']):.6f}   (nothing failed)")


if __name__ == "__main__":
    main()
