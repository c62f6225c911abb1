# SPDX-License-Identifier: MIT
"""What the fake's kernels get wrong, as the real ones do: made by hand on plain tensors of shapes that no table has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffled_tensor.testing import FakeAiter, fake_aiter

from .support.aiter import OTHER, READS, plain_call
from .support.judges import relative_error, rounded_moe
from .support.layer import EXPERTS, HIDDEN, INTERMEDIATE, make_layer

MOE, SEPARATED = "mxfp4_moe", "mxfp4_separated"
LATE, V15, V14 = ("v0.1.18 and later", "#4542", "v0.1.16, v0.1.17"), "v0.1.15", "v0.1.14"
TOLERANCE = 1.3e-2


@contextmanager
def untuned(version: str) -> Iterator[FakeAiter]:
    with fake_aiter(version, tuned=False) as fake:
        yield fake


def small_layer(tokens: int, **options: Any) -> dict[str, Any]:
    """Of gates of around 1."""
    layer = make_layer(tokens=tokens)
    return layer | {"hidden_states": layer["hidden_states"] / 32} | options


def biases(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "w13_bias": torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator).to(dtype),
        "w2_bias": (10 * torch.randn(EXPERTS, HIDDEN, generator=generator)).to(dtype),
    }


def judged(layer: dict[str, Any], numerics: str = "bfloat16", mxfp8_rule: str = "round_up") -> Tensor:
    weights = {name: layer[name].dequantize(torch.float32).double() for name in ("w13", "w2")}
    return rounded_moe(numerics, **layer | weights, mxfp8_rule=mxfp8_rule)


# By family: version, number of tokens, activation, gate mode, what it reads, and what it makes of activations.
FAMILIES = {
    "FlyDSL a4w4": (LATE[0], 4, "silu", "separated", SEPARATED, "mxfp4, round_up"),
    "FlyDSL a8w4": (LATE[0], 300, "silu", "interleave", MOE, "mxfp8"),
    "CK-Tile a16w4": (LATE[0], 4, "swiglu", "interleave", MOE, "bfloat16"),
    "CK-Tile a8w4": (LATE[0], 300, "swiglu", "interleave", MOE, "mxfp8"),
    "CK-Tile, K in parts": (LATE[0], 4, "swiglu", "separated", SEPARATED, "bfloat16"),
    "CK-Tile, K in parts, of interleaved rows": (LATE[0], 1, "silu", "interleave", MOE, "bfloat16"),
    "the same, of early versions": (V14, 1, "silu", "separated", MOE, "bfloat16"),
    "CK a4w4": (V14, 5, "silu", "separated", SEPARATED, "mxfp4, amax4"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_one_layout(family: str) -> None:
    version, tokens, activation, gate_mode, layout, numerics = FAMILIES[family]
    layer = small_layer(tokens, activation=activation, **(biases() if activation == "swiglu" else {}))
    right = judged(layer, numerics)
    with untuned(version) as fake:
        assert relative_error(plain_call(layer, layout, gate_mode), right) < TOLERANCE
        assert fake.reads == [READS[layout]]
        for other in (OTHER[layout], None):
            assert relative_error(plain_call(layer, other, gate_mode), right) > 0.3


def test_a_bias_is_looked_up_by_global_numbers() -> None:
    """In v0.1.14, where K is in parts: another expert's, or what lies behind the last one's."""
    mask = torch.tensor([0] + [1] * EXPERTS, dtype=torch.int32)
    layer = small_layer(4, activation="swiglu", **biases(), expert_mask=mask)
    beyond = layer | {"topk_ids": torch.full_like(layer["topk_ids"], EXPERTS)}
    for version in (*LATE, V15):
        with untuned(version):
            for call in (layer, beyond):
                assert relative_error(plain_call(call, SEPARATED, "separated"), judged(call)) < TOLERANCE
    with untuned(V14):
        assert relative_error(plain_call(layer, SEPARATED, "separated"), judged(layer)) > 0.1
        with pytest.raises(IndexError):
            plain_call(beyond, SEPARATED, "separated")
        assert relative_error(plain_call(layer, MOE, "interleave"), judged(layer)) < TOLERANCE  # with all of K


@pytest.mark.parametrize("version", [*LATE, V15, V14])
def test_weights_of_routing_before_the_activation(version: str) -> None:
    """CK's kernels take them. CK-Tile's leave them out, which is not the only thing that is wrong there."""
    rule = "amax4" if version in (V15, V14) else "round_up"
    for tokens in (1, 5):
        layer = small_layer(tokens)
        layer |= {"topk_ids": layer["topk_ids"][:, :1].contiguous(), "topk_weight": torch.full((tokens, 1), 0.5)}
        halved = {"hidden_states": layer["hidden_states"] / 2, "topk_weight": torch.ones(tokens, 1)}
        with untuned(version):
            found = plain_call(layer, SEPARATED, "separated", doweight_stage1=True)
            if tokens == 5:
                assert relative_error(found, judged(layer | halved, f"mxfp4, {rule}")) < TOLERANCE
                with pytest.raises(RuntimeError, match="there is no kernel"):
                    plain_call(layer, MOE, "interleave", doweight_stage1=True)
            else:
                assert relative_error(found, judged(layer | halved)) > 0.3
                of_interleaved = plain_call(layer, MOE, "separated", doweight_stage1=True)
                unweighted = judged(layer | {"topk_weight": torch.ones(1, 1)})
                assert relative_error(of_interleaved, unweighted) < TOLERANCE


@pytest.mark.parametrize("version", [*LATE, V15, V14])
def test_gelu(version: str) -> None:
    """FlyDSL computes SiLU; CK, GELU."""
    layer = small_layer(5, activation="gelu")
    numerics = "mxfp4, round_up" if version in LATE else "mxfp4, amax4"
    right, silu = judged(layer, numerics), judged(layer | {"activation": "silu"}, numerics)
    with untuned(version):
        found = plain_call(layer, SEPARATED, "separated")
    computed, other = (silu, right) if version in LATE else (right, silu)
    assert relative_error(found, computed) < TOLERANCE
    assert relative_error(found, other) > 0.1


@pytest.mark.parametrize("version", [*LATE, V15, V14])
@pytest.mark.parametrize("which", ["w13_bias", "w2_bias"])
def test_a_bias_that_is_not_float32(version: str, which: str) -> None:
    with untuned(version):
        for activation, kind, gate_mode, tokens in (
            ("swiglu", SEPARATED, "separated", 4),
            ("swiglu", SEPARATED, "separated", 300),
            ("swiglu", MOE, "interleave", 4),
            ("silu", SEPARATED, "separated", 5),
        ):
            given = biases() | {which: biases(torch.bfloat16)[which]}
            layer = small_layer(tokens, activation=activation, **given)
            if activation == "silu" and version in (V15, V14):  # CK's kernels look at none
                plain_call(layer, kind, gate_mode)
            else:
                with pytest.raises(TypeError, match=r"MoE bias must be fp32, got torch\.bfloat16"):
                    plain_call(layer, kind, gate_mode)


@pytest.mark.parametrize("version", [V15, V14])
def test_ck_ignores_biases_and_limits(version: str) -> None:
    with untuned(version):
        without = plain_call(small_layer(5), SEPARATED, "separated")
        for ignored in (biases(), {"swiglu_limit": 0.1}):
            layer = small_layer(5, **ignored)
            assert torch.equal(plain_call(layer, SEPARATED, "separated"), without)
            assert relative_error(without, judged(layer, "mxfp4, amax4")) > 0.1


@pytest.mark.parametrize("version", [*LATE, V15, V14])
def test_activations_that_are_cut_to_float8(version: str) -> None:
    """In v0.1.14, without scales: small ones vanish, and large ones are no numbers."""
    zeros = {name: torch.zeros_like(bias) for name, bias in biases().items()}
    rule = "amax4" if version == V15 else "round_up"
    with untuned(version):
        for factor in (1, 2**-12, 2**10):
            layer = make_layer(tokens=300) | {"activation": "swiglu", **zeros}
            layer["hidden_states"] *= factor
            error = relative_error(plain_call(layer, MOE, "interleave"), judged(layer, "mxfp8", rule))
            assert error < TOLERANCE if version != V14 else error < 0.1 if factor == 1 else not error < 0.1


@pytest.mark.parametrize("version", [*LATE, V15, V14])
def test_swiglu_without_biases_is_zero_where_a_kernel_is_empty(version: str) -> None:
    with untuned(version):
        layer = small_layer(4, activation="swiglu")
        assert not plain_call(layer, MOE, "interleave").any()
        assert relative_error(plain_call(layer, SEPARATED, "separated"), judged(layer)) < TOLERANCE


@pytest.mark.parametrize("version", [*LATE, V15, V14])
def test_swiglu_of_weights_without_a_tag(version: str) -> None:
    """From v0.1.17 on it goes to CK-Tile, which reads interleaved rows then, whatever the gate mode, and has no bias for
    them."""
    layer = small_layer(4, activation="swiglu")
    with untuned(version):
        if version in LATE:
            assert relative_error(plain_call(layer, MOE, "separated", tags={}), judged(layer)) < TOLERANCE
            with pytest.raises(ValueError, match="interleaved split-k bias is not supported"):
                plain_call(layer | biases(), MOE, "separated", tags={})
        else:
            with pytest.raises(RuntimeError, match="there is no kernel"):
                plain_call(layer, MOE, "separated", tags={})
