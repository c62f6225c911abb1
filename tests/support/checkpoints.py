# SPDX-License-Identifier: MIT
"""Checkpoints in the names, dtypes and row orders of the field, all of one dense model, written by safetensors alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from shuffled_tensor import LAYOUTS, ShuffledMXFP4Tensor

from .bytes import marked, weight_of

FORMATS = ("gpt-oss", "quark", "compressed-tensors", "deepseek")
# padded in both dims, with halves for two ranks; and K=512, where a second shuffle would go unseen
SIZES = {"padded": (4, 288, 320), "512": (2, 512, 512)}


class Dense(NamedTuple):
    """One layer, row-major, gate rows first: codes and scales, and biases."""

    w13: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]
    w13_bias: Tensor
    w2_bias: Tensor


@cache
def make_dense(experts: int, hidden: int, intermediate: int, salt: int = 0) -> Dense:
    """Position-coded, with scales around 1.0 so that outputs stay finite; the same tensors every time."""

    def parts(rows: int, columns: int, salt: int) -> tuple[Tensor, Tensor]:
        codes = marked(experts, rows, columns // 2, salt=salt)
        return codes, 120 + marked(experts, rows, columns // 32, salt=salt + 50) % 8

    def bias(rows: int, salt: int) -> Tensor:
        return marked(experts, rows, salt=salt).bfloat16() / 16

    return Dense(
        parts(2 * intermediate, hidden, salt),
        parts(hidden, intermediate, salt + 3),
        bias(2 * intermediate, salt + 7),
        bias(hidden, salt + 9),
    )


def layer_name(format: str, layer: int = 3) -> str:
    return f"layers.{layer}.ffn.experts" if format == "deepseek" else f"model.layers.{layer}.mlp.experts"


def interleave(rows: Tensor) -> Tensor:
    """``[E, 2I, ...]``, gate rows first, as g0, u0, g1, u1, ..."""
    gate, up = rows.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def in_format(format: str, dense: Dense, name: str, *, bias: bool | None = None) -> dict[str, Tensor]:
    """The tensors of one layer. ``name`` without experts' numbers (shared experts) where there is one expert."""
    if format == "gpt-oss":
        tensors = {}
        for projection, (codes, scale), rows in (
            ("gate_up_proj", dense.w13, dense.w13_bias),
            ("down_proj", dense.w2, dense.w2_bias),
        ):
            order = interleave if projection == "gate_up_proj" else Tensor.clone
            tensors[f"{name}.{projection}_blocks"] = order(codes).unflatten(-1, (-1, 16))
            tensors[f"{name}.{projection}_scales"] = order(scale)
            if bias is not False:
                tensors[f"{name}.{projection}_bias"] = order(rows)
        return tensors
    names, parts = {
        "quark": (("gate_proj", "up_proj", "down_proj"), ("weight", "weight_scale")),
        "compressed-tensors": (("gate_proj", "up_proj", "down_proj"), ("weight_packed", "weight_scale")),
        "deepseek": (("w1", "w3", "w2"), ("weight", "scale")),
    }[format]
    dtypes = (torch.int8, torch.float8_e8m0fnu) if format == "deepseek" else (torch.uint8, torch.uint8)
    tensors = {}
    for expert in range(len(dense.w2_bias)):
        owner = name if "shared" in name else f"{name}.{expert}"
        for part, dtype, w13, w2 in zip(parts, dtypes, dense.w13, dense.w2, strict=True):
            for projection, rows in zip(names, (*w13[expert].chunk(2), w2[expert]), strict=True):
                tensors[f"{owner}.{projection}.{part}"] = rows.clone().view(dtype)
        if bias:
            rows = (*dense.w13_bias[expert].chunk(2), dense.w2_bias[expert])
            tensors |= {f"{owner}.{projection}.bias": row for projection, row in zip(names, rows, strict=True)}
    return tensors


def others(layer: int = 3) -> dict[str, Tensor]:
    """What else a model is made of, some of it with names that look alike."""
    base = f"layers.{layer}"
    names = (
        f"model.{base}.self_attn.q_proj.weight",
        f"model.{base}.mlp.router.weight",
        f"model.{base}.mlp.gate.weight",
        f"model.{base}.mlp.gate_proj.weight",
        f"model.{base}.input_layernorm.weight",
        f"{base}.attn.wq_a.weight",
        f"{base}.ffn.gate.weight",
        f"{base}.ffn.gate.bias",
        "mtp.0.e_proj.weight",
        "mtp.0.enorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    return {name: torch.full((3, 5), index, dtype=torch.bfloat16) for index, name in enumerate(names)}


def write_sharded(tensors: dict[str, Tensor], folder: Path, shards: int, *, index: bool) -> None:
    """Tensors dealt out one by one, so that codes and scales of one expert are often in two files."""
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = dict(list(tensors.items())[shard::shards])
        safetensors.torch.save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


def store(tensors: dict[str, Tensor], path: Path, how: str) -> Path:
    """``how`` a model is stored: in one ``"file"``, a ``"folder"`` of one, or shards ``"with index"`` or ``"without"``."""
    if how == "file":
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path / "model.safetensors"
    folder = path / "model"
    write_sharded(tensors, folder, 1 if how == "folder" else 3, index=how == "with index")
    return folder


STORED = ("file", "folder", "with index", "without")


def in_halves(dense: Dense, dim: str, rank: int) -> Dense:
    """One of two ranks' parts; a down bias only once."""
    if dim == "expert":
        part = slice(rank * len(dense.w2_bias) // 2, (rank + 1) * len(dense.w2_bias) // 2)
        return Dense(*(tuple(x[part] for x in pair) for pair in dense[:2]), *(bias[part] for bias in dense[2:]))  # type: ignore[arg-type]

    def rows(data: Tensor) -> Tensor:
        return torch.cat([half.chunk(2, 1)[rank] for half in data.chunk(2, 1)], 1)

    return Dense(
        (rows(dense.w13[0]), rows(dense.w13[1])),
        (dense.w2[0].chunk(2, 2)[rank], dense.w2[1].chunk(2, 2)[rank]),
        rows(dense.w13_bias),
        dense.w2_bias * (rank == 0),
    )


def module_of(layers: dict[str, Dense], layout: str = "none", *, bias: bool = True) -> nn.Module:
    """A model whose experts have other values than these, laid out as `layout`."""
    model = nn.Module()
    for name, dense in layers.items():
        owner = model
        for step in name.split("."):
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        for which, parts, rows in (("w13", dense.w13, dense.w13_bias), ("w2", dense.w2, dense.w2_bias)):
            other = parts[0] ^ 0x5A, parts[1] ^ 1
            weight = weight_of(other, layout, gate_up=which == "w13")
            owner.register_parameter(f"{which}_weight", nn.Parameter(weight))
            if bias:
                owner.register_parameter(f"{which}_bias", nn.Parameter(torch.full_like(rows, 77.0)))
    return model


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Every byte of every parameter, how it lies and where."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in model.named_parameters():
        if isinstance(tensor, ShuffledMXFP4Tensor):
            kind = list(LAYOUTS).index(tensor.shuffle_kind or "none")
            found[name] = tensor.qdata.clone(), tensor.scale.clone(), torch.tensor([kind, tensor.qdata.data_ptr()])
        else:
            found[name] = tensor.detach().clone(), torch.tensor([tensor.data_ptr()])
    return found


def assert_unchanged(model: nn.Module, before: dict[str, tuple[Tensor, ...]]) -> None:
    for name, parts in snapshot(model).items():
        assert all(map(torch.equal, parts, before[name])), name
