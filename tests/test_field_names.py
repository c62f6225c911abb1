# SPDX-License-Identifier: MIT
"""One dense layer in the exact names, dtypes and row orders of the field's checkpoints: whole, and in every rank's part,
it is the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file as save_plain
from torch import Tensor

from shuffled_tensor import CheckpointError, Experts, convert, fused_moe, inspect, load_experts

from .support.checkpoints import Dense, in_format, interleave, make_dense
from .support.judges import dense, dense_moe, relative_error

EXPERTS, HIDDEN, INTERMEDIATE = 8, 64, 480  # 15 blocks, which two, four and eight ranks share unevenly
DENSE = make_dense(EXPERTS, HIDDEN, INTERMEDIATE)
BLOCKS = {1: [15], 2: [8, 7], 4: [4, 4, 4, 3], 8: [2, 2, 2, 2, 2, 2, 2, 1]}
"""Of each rank's part of the intermediate dimension."""


class Named(NamedTuple):
    """How a checkpoint calls the layer."""

    layer: str
    projections: tuple[str, ...]
    """Gate, up and down; or gate-up and down."""
    parts: tuple[str, str, str]
    """Codes, scales, bias."""
    stacked: bool
    """Whether one tensor holds all experts."""
    rows: str | None = None
    """The order of gate and up rows in one tensor."""
    told: bool = False
    """Whether a caller has to say it."""
    shared: tuple[str, tuple[str, str, str]] | None = None
    """Shared experts in bfloat16 beside them: their name and projections."""


GATE_UP_DOWN, W1_W3_W2, FUSED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj")
OPENAI, QUARK = ("_blocks", "_scales", "_bias"), (".weight", ".weight_scale", ".bias")
PACKED, DEEPSEEK = (".weight_packed", ".weight_scale", ".bias"), (".weight", ".scale", "")
KIMI = "language_model.model.layers.3.block_sparse_moe"

FIELD = {
    "gpt-oss": Named("model.layers.3.mlp.experts", FUSED, OPENAI, True, "interleaved"),
    "Quark": Named("model.layers.3.mlp.experts", GATE_UP_DOWN, QUARK, False),
    "Quark of MiniMax-M3": Named("model.layers.3.block_sparse_moe.experts", W1_W3_W2, QUARK, False),
    "Quark, stacked": Named("model.layers.3.mlp.experts", FUSED, QUARK, True, "contiguous", told=True),
    "Quark of gpt-oss, stacked": Named("model.layers.3.mlp.experts", FUSED, QUARK, True, "interleaved", told=True),
    "Quark, w1 and w3 stacked": Named("model.layers.3.mlp.experts", W1_W3_W2, QUARK, True),
    "Quark, gate and up of an expert in one": Named("layers.3.experts", FUSED, QUARK, False, "contiguous", told=True),
    "compressed-tensors": Named("model.layers.3.mlp.experts", GATE_UP_DOWN, PACKED, False),
    "compressed-tensors, stacked": Named("model.layers.3.mlp.experts", FUSED, PACKED, True, "contiguous", told=True),
    "Kimi-K3": Named(f"{KIMI}.experts", W1_W3_W2, PACKED, False, shared=(f"{KIMI}.shared_experts", GATE_UP_DOWN)),
    "DeepSeek V4": Named("layers.3.ffn.experts", W1_W3_W2, DEEPSEEK, False),
    "DeepSeek's parts, other projections": Named("layers.3.ffn.experts", GATE_UP_DOWN, DEEPSEEK, False),
    "gpt-oss's parts, expert by expert": Named("model.layers.3.mlp.experts", W1_W3_W2, OPENAI, False),
}


def in_names(named: Named, layer: Dense = DENSE) -> dict[str, Tensor]:
    """The layer's tensors, for safetensors to write."""
    deepseek = named.parts is DEEPSEEK
    dtypes = (torch.int8, torch.float8_e8m0fnu) if deepseek else (torch.uint8, torch.uint8)
    tensors: dict[str, Tensor] = {}
    for suffix, dtype, w13, w2 in zip(
        named.parts,
        (*dtypes, torch.bfloat16),
        (*layer.w13, layer.w13_bias),
        (*layer.w2, layer.w2_bias),
        strict=True,
    ):
        if suffix == "":
            continue
        if named.rows is None:
            gate_and_up = w13.chunk(2, 1)
        else:
            gate_and_up = (interleave(w13) if named.rows == "interleaved" else w13,)
        for projection, rows in zip(named.projections, (*gate_and_up, w2), strict=True):
            if suffix == "_blocks":
                rows = rows.unflatten(-1, (-1, 16))
            if named.stacked:
                tensors[f"{named.layer}.{projection}{suffix}"] = rows.clone().view(dtype)
            else:
                for expert, own in enumerate(rows):
                    tensors[f"{named.layer}.{expert}.{projection}{suffix}"] = own.clone().view(dtype)
    if named.shared is not None:
        shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        for projection, shape in zip(named.shared[1], shapes, strict=True):
            tensors[f"{named.shared[0]}.{projection}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    return tensors


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each."""
    folder = tmp_path_factory.mktemp("field")
    for number, named in enumerate(FIELD.values()):
        save_plain(in_names(named), folder / f"{number}.safetensors")
    return {name: folder / f"{number}.safetensors" for number, name in enumerate(FIELD)}


def options(named: Named) -> dict[str, Any]:
    return {"row_order": named.rows} if named.told else {}


def assert_is_part(found: Experts, experts: slice, columns: slice, bias: bool) -> None:
    w13, w2 = dense(*DENSE.w13)[experts], dense(*DENSE.w2)[experts]
    gate_and_up = torch.cat([half[:, columns] for half in w13.chunk(2, 1)], 1)
    assert torch.equal(found.w13.dequantize(torch.float64), gate_and_up)
    assert torch.equal(found.w2.dequantize(torch.float64), w2[..., columns])
    assert (found.w13_bias is not None) == (found.w2_bias is not None) == bias
    if found.w13_bias is not None and found.w2_bias is not None:
        of_rows = torch.cat([half[experts, columns] for half in DENSE.w13_bias.chunk(2, 1)], 1)
        assert torch.equal(found.w13_bias, of_rows)
        assert torch.equal(found.w2_bias, DENSE.w2_bias[experts] * (columns.start == 0))


def spans(ranks: int) -> list[slice]:
    ends = [32 * blocks for blocks in itertools.accumulate(BLOCKS[ranks], initial=0)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", FIELD)
def test_whole(name: str, stored: dict[str, Path]) -> None:
    named = FIELD[name]
    found = load_experts(stored[name], **options(named))
    assert set(found) == {named.layer} | ({named.shared[0]} if named.shared else set())
    assert_is_part(found[named.layer], slice(None), slice(0, None), bias=named.parts[2] != "")
    (first,) = {finding.checksum for finding in inspect(stored["Quark"], read=True) if "w13" in finding.name}
    own = [f for f in inspect(stored[name], read=True, **options(named)) if f.name == f"{named.layer}.w13_weight"]
    assert [finding.checksum for finding in own] == [first]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", FIELD)
def test_parts(name: str, ranks: int, stored: dict[str, Path]) -> None:
    named, path = FIELD[name], stored[name]
    bias, more = named.parts[2] != "", options(named)
    each = EXPERTS // ranks
    for rank, columns in enumerate(spans(ranks)):
        experts = slice(each * rank, each * (rank + 1))
        found = load_experts(path, rank=rank, world_size=ranks, **more)[named.layer]
        assert_is_part(found, experts, slice(0, None), bias)
        found = load_experts(path, rank=rank, world_size=ranks, dim="intermediate", **more)[named.layer]
        assert_is_part(found, slice(None), columns, bias)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (4, 2), (8, 8)])
@pytest.mark.parametrize("name", FIELD)
def test_parts_of_both(name: str, sizes: tuple[int, int], stored: dict[str, Path]) -> None:
    named, path = FIELD[name], stored[name]
    each = EXPERTS // sizes[0]
    for (row, first), (column, span) in itertools.product(
        enumerate(range(0, EXPERTS, each)), enumerate(spans(sizes[1]))
    ):
        if sizes == (8, 8) and row != column:
            continue
        dims: Any = {"rank": (row, column), "world_size": sizes, "dim": ("expert", "intermediate")}
        found = load_experts(path, **dims, **options(named))[named.layer]
        assert_is_part(found, slice(first, first + each), span, bias=named.parts[2] != "")


@pytest.mark.parametrize("name", FIELD)
def test_the_layer(name: str, stored: dict[str, Path]) -> None:
    """Four ranks' outputs together are the dense layer's."""
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(4, HIDDEN, generator=generator) / 8,
        "topk_weight": torch.rand(4, 2, generator=generator),
        "topk_ids": torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(4)]).int(),
    }
    named, path = FIELD[name], stored[name]
    biases = {"w13_bias": DENSE.w13_bias, "w2_bias": DENSE.w2_bias} if named.parts[2] else {}
    expected = dense_moe(**call, w13=dense(*DENSE.w13), w2=dense(*DENSE.w2), activation="silu", **biases)
    total = torch.zeros_like(expected)
    for rank in range(4):
        loaded = load_experts(path, rank=rank, world_size=4, dim="intermediate", **options(named))[named.layer]
        total += fused_moe(**call, **loaded._asdict(), activation="silu")
    assert relative_error(total, expected) <= 1e-5


@pytest.mark.parametrize("name", [name for name, named in FIELD.items() if named.told])
def test_an_order_of_rows_that_nobody_has_told(name: str, stored: dict[str, Path], tmp_path: Path) -> None:
    message = r"gate_up_proj\.\w+ in .* its name does not tell in which order: say row_order='interleaved'"
    with pytest.raises(CheckpointError, match=message):
        load_experts(stored[name])
    with pytest.raises(CheckpointError, match=message):
        convert(stored[name], tmp_path / "converted.safetensors")
    (problem,) = (problem for finding in inspect(stored[name]) for problem in finding.problems)
    assert "say row_order=" in problem
    convert(stored[name], tmp_path / "converted.safetensors", row_order=FIELD[name].rows)  # type: ignore[arg-type]
    assert_is_part(
        load_experts(tmp_path / "converted.safetensors")[FIELD[name].layer], slice(None), slice(0, None), True
    )


def test_orders_of_rows_that_are_not(stored: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="rows of format 'gpt-oss' are interleaved, not contiguous"):
        load_experts(stored["gpt-oss"], row_order="contiguous")
    with pytest.raises(ValueError, match="found 'mixed'"):
        load_experts(stored["Quark, stacked"], row_order="mixed")  # type: ignore[arg-type]


def test_the_fixtures_of_other_tests_are_the_same(stored: dict[str, Path]) -> None:
    for name, format in (("gpt-oss", "gpt-oss"), ("Quark", "quark"), ("DeepSeek V4", "deepseek")):
        expected = in_format(format, DENSE, FIELD[name].layer, bias=FIELD[name].parts[2] != "")
        found = in_names(FIELD[name])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], data) and found[key].dtype == data.dtype for key, data in expected.items())
