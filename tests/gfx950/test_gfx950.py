# SPDX-License-Identifier: MIT
"""On the real machine, against the real aiter: `pytest tests/gfx950`. Everywhere else these are skipped.

The judge is the reference backend with the installed aiter's rounding, which is itself judged elsewhere by float64
arithmetic and by AMD's machine code. Tolerances are those of aiter's own tests.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, arch, explain, fused_moe, linear, prepare
from shuffled_tensor.backends.aiter import gemm
from shuffled_tensor.backends.aiter import versions as backend
from shuffled_tensor.moe.call import PackedWeight

AVAILABLE = torch.cuda.is_available() and arch("cuda:0") == "gfx950" and importlib.util.find_spec("aiter") is not None
pytestmark = [pytest.mark.gfx950, pytest.mark.skipif(not AVAILABLE, reason="needs gfx950 and aiter")]

# hidden size, intermediate size of one rank, topk; experts reduced to 16
SHAPES = {"Kimi-K2.5": (7168, 512, 8), "DeepSeek": (7168, 256, 8), "padded": (2880, 2880, 4)}
EXPERTS = 16


class MoE(nn.Module):
    def __init__(self, hidden: int, intermediate: int, kind: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"shuffle_kind": kind}
        w13 = torch.randn(EXPERTS, 2 * intermediate, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
        w2 = torch.randn(EXPERTS, hidden, intermediate, device="cuda", dtype=torch.bfloat16) / intermediate**0.5
        self.w13_weight = nn.Parameter(
            ShuffledMXFP4Tensor.from_hp(w13, gate_up=True, row_order="contiguous", **options)
        )
        self.w2_weight = nn.Parameter(ShuffledMXFP4Tensor.from_hp(w2, gate_up=False, **options))

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> Tensor:
        return fused_moe(x, self.w13_weight, self.w2_weight, weight, ids, **options)


def routed(tokens: int, hidden: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    weight, ids = torch.randn(tokens, EXPERTS, device="cuda").softmax(-1).topk(topk)
    return x, weight, ids.int()


def assert_close(module: MoE, out: Tensor, arguments: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    x, *routing = arguments
    activations = explain(x, module.w13_weight, module.w2_weight, *routing, **options).activations
    rounded = {"activation_dtype": "mxfp4", "scale_rule": activations.removeprefix("mxfp4, ")}
    reference = module(
        *arguments, backend="reference", **options, **(rounded if activations.startswith("mxfp4, ") else {})
    )
    a, b = out.double(), reference.double()
    assert 1 - 2 * (a * b).sum() / (a.square() + b.square()).sum() < 0.01  # aiter's logits_diff


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 16, 300, 4096])
@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
def test_against_the_reference(shape: str, tokens: int, mode: str) -> None:
    hidden, intermediate, topk = SHAPES[shape]
    module, arguments = MoE(hidden, intermediate), routed(tokens, hidden, topk)
    if explain(arguments[0], module.w13_weight, module.w2_weight, *arguments[1:]).backend != "aiter":
        pytest.skip("needs an aiter with a kernel for this shape")
    with torch.no_grad():
        if mode == "eager":
            out = module(*arguments)
        elif mode == "compiled":
            out = torch.compile(module, fullgraph=True)(*arguments)
        else:
            prepare(module)
            module(*arguments)  # aiter builds and tunes on its first call
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = module(*arguments)
            graph.replay()
        assert module.w13_weight.is_shuffled
        assert_close(module, out, arguments)


MODELS = {"gpt-oss": {"activation": "swiglu"}, "DeepSeek V4": {"swiglu_limit": 10.0}, "Kimi K2": {}}


@pytest.mark.parametrize("kind", ["mxfp4_moe", "mxfp4_separated"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 32, 255, 256, 4096])
def test_every_model_in_both_layouts(kind: str, model: str, tokens: int) -> None:
    """Right numbers by the route that `explain` names, or a refusal."""
    hidden, intermediate, topk = SHAPES["padded"]
    module, arguments = MoE(hidden, intermediate, kind), routed(tokens, hidden, topk)
    options = dict(MODELS[model])
    if model == "gpt-oss":
        options["w13_bias"] = torch.randn(EXPERTS, 2 * intermediate, device="cuda", dtype=torch.bfloat16)
        options["w2_bias"] = torch.randn(EXPERTS, hidden, device="cuda", dtype=torch.bfloat16)
    x, *routing = arguments
    if explain(x, module.w13_weight, module.w2_weight, *routing, **options).backend == "aiter":
        assert_close(module, module(*arguments, **options), arguments, **options)
    else:
        with pytest.raises(ValueError, match="aiter cannot take this call: for "):
            module(*arguments, backend="aiter", **options)
    assert module.w13_weight.shuffle_kind == kind


@pytest.mark.parametrize("kind", ["mxfp4_moe", "mxfp4_separated"])
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("tokens", [1, 33, 4096])
def test_a_dense_layer(tokens: int, gate_up: bool, kind: str) -> None:
    """Rows and columns are padded; both layouts are read."""
    torch.manual_seed(0)
    values, order = torch.randn(2880, 2880, device="cuda", dtype=torch.bfloat16), "contiguous" if gate_up else None
    w = ShuffledMXFP4Tensor.from_hp(values, gate_up=gate_up, row_order=order, shuffle_kind=kind)
    x, bias = torch.randn(tokens, 2880, device="cuda", dtype=torch.bfloat16), torch.randn(2880, device="cuda")
    out = linear(x, w, bias, activation_dtype="mxfp4")
    assert gemm.refuse(x, PackedWeight.of(w._storage, w._storage.experts), None) is None
    # no kernel takes float32
    rule = backend.detect().version.scale_rule
    reference = linear(x.float(), w, bias, activation_dtype="mxfp4", scale_rule=rule)
    assert (out - reference).norm() < 0.01 * reference.norm()


def test_drop_in() -> None:
    import aiter.fused_moe

    hidden, intermediate, topk = SHAPES["Kimi-K2.5"]
    module, (x, weight, ids) = MoE(hidden, intermediate), routed(16, hidden, topk)
    out = aiter.fused_moe.fused_moe(
        x, module.w13_weight, module.w2_weight, weight, ids, quant_type=aiter.QuantType.per_1x32
    )
    assert_close(module, out, (x, weight, ids))
