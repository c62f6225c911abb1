# SPDX-License-Identifier: MIT
"""Corrupted checkpoint files, one for each seed: refused, or loaded to exactly what is on disk.

Run in a process of its own, ``python -m tests.support.fuzz_checkpoints FOLDER SEEDS``, so that a crash would be noticed. The
judge of what is on disk is the safetensors package.
"""

from __future__ import annotations

import json
import random
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from shuffled_tensor import ShuffledMXFP4Tensor
from shuffled_tensor.checkpoint import load_experts, load_file, save_file

from .checkpoints import (
    FORMATS,
    assert_unchanged,
    in_format,
    layer_name,
    make_dense,
    module_of,
    others,
    snapshot,
)
from .judges import in_memory

DENSE = make_dense(2, 64, 64)
REFUSALS = (ValueError, FileNotFoundError)
FORBIDDEN = ("pickle.find_class", "exec", "os.system", "subprocess.Popen", "os.exec", "socket.connect")


# --- ways to damage a file


def flip(raw: bytearray, rng: random.Random, start: int, stop: int) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        raw[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return raw


def flip_header(raw: bytearray, rng: random.Random) -> bytearray:
    return flip(raw, rng, 8, 8 + header_length(raw))


def flip_length(raw: bytearray, rng: random.Random) -> bytearray:
    return flip(raw, rng, 0, 8)


def flip_data(raw: bytearray, rng: random.Random) -> bytearray:
    return flip(raw, rng, 8 + header_length(raw), len(raw))


def overwrite(raw: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(raw))
    block = raw[start : start + rng.randrange(1, 512)]
    raw[start : start + len(block)] = rng.choice((bytes(len(block)), rng.randbytes(len(block))))
    return raw


def truncate(raw: bytearray, rng: random.Random) -> bytearray:
    return raw[: rng.randrange(len(raw))]


def drop(raw: bytearray, rng: random.Random) -> bytearray:
    """Some bytes in the middle."""
    start = rng.randrange(len(raw))
    del raw[start : start + rng.randrange(1, 64)]
    return raw


def swap_tensors(raw: bytearray, rng: random.Random) -> bytearray:
    """Two of one size and dtype, if there are."""

    def edit(header: dict[str, Any]) -> None:
        alike: dict[str, list[str]] = {}
        for name in tensors_of(header):
            alike.setdefault(str((header[name]["dtype"], header[name]["shape"])), []).append(name)
        a, b = rng.sample(rng.choice([names for names in alike.values() if len(names) > 1]), 2)
        header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]

    return with_header(raw, edit)


def swap_entries(raw: bytearray, rng: random.Random) -> bytearray:
    """Any two."""

    def edit(header: dict[str, Any]) -> None:
        a, b = rng.sample(tensors_of(header), 2)
        header[a], header[b] = header[b], header[a]

    return with_header(raw, edit)


def change_entry(raw: bytearray, rng: random.Random) -> bytearray:
    def edit(header: dict[str, Any]) -> None:
        entry = header[rng.choice(tensors_of(header))]
        start, end = entry["data_offsets"]
        change: Callable[[], object] = rng.choice(
            [
                lambda: entry.update(dtype=rng.choice(("U8", "I8", "F8_E8M0", "BF16", "F32", "BOOL", "F4", "X"))),
                lambda: entry.update(shape=entry["shape"][::-1]),
                lambda: entry.update(shape=[1, *entry["shape"]]),
                lambda: entry.update(shape=[end - start]),
                lambda: entry.update(shape=[rng.choice((-1, 0, 1, 2**40, 2**63, 1.5, None, "2"))]),
                lambda: entry.update(data_offsets=[start + rng.choice((-1, 1, 2**62)), end]),
                lambda: entry.update(data_offsets=[end, start]),
                entry.clear,
            ]
        )
        change()

    return with_header(raw, edit)


def rename(raw: bytearray, rng: random.Random) -> bytearray:
    def edit(header: dict[str, Any]) -> None:
        name = rng.choice(tensors_of(header))
        other = rng.choice((name[:-1], name + "x", name.replace("0", "1"), name.replace("experts", "expert"), "", "\0"))
        header[other] = header.pop(name)

    return with_header(raw, edit)


def remove_manifest(raw: bytearray, rng: random.Random) -> bytearray:
    return with_header(raw, lambda header: header.pop("__metadata__", None))


DAMAGES = (
    flip_header, flip_header, flip_header, flip_length, flip_data, flip_data, flip_data, overwrite, overwrite, truncate,
    drop, swap_tensors, swap_tensors, swap_entries, change_entry, change_entry, rename, remove_manifest,
)  # fmt: skip


def header_length(raw: bytearray) -> int:
    return int(struct.unpack("<Q", raw[:8])[0])


def tensors_of(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def with_header(raw: bytearray, edit: Callable[[dict[str, Any]], object]) -> bytearray:
    end = 8 + header_length(raw)
    header = json.loads(raw[8:end])
    edit(header)
    text = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + raw[end:])


# --- what is on disk


W1_W3_W2 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
KIMI = "language_model.model.layers.3.block_sparse_moe.experts"
OTHER_NAMES = {"Kimi-K3": ("compressed-tensors", KIMI), "MiniMax-M3": ("quark", KIMI.removeprefix("language_model."))}
"""Formats whose projections are called otherwise, in another layer."""


def name_of(kind: str) -> str:
    """Of the layer."""
    return OTHER_NAMES[kind][1] if kind in OTHER_NAMES else layer_name(kind)


def stored(kind: str) -> dict[str, Tensor]:
    if kind not in OTHER_NAMES:
        return in_format(kind, DENSE, layer_name(kind))
    tensors = in_format(OTHER_NAMES[kind][0], DENSE, name_of(kind))
    return {re.sub("|".join(W1_W3_W2), lambda old: W1_W3_W2[old[0]], name): data for name, data in tensors.items()}


def from_format(kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Codes, scales and biases by the field's names: what `stored` does, undone."""
    name, bytes_ = name_of(kind), {k: v.view(torch.uint8) for k, v in tensors.items() if v.element_size() == 1}
    if kind == "gpt-oss":

        def parted(rows: Tensor) -> Tensor:
            return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)

        up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        biases = tensors.get(f"{up}_bias"), tensors.get(f"{down}_bias")
        return {
            "w13": (parted(bytes_[f"{up}_blocks"].flatten(2)), parted(bytes_[f"{up}_scales"])),
            "w2": (bytes_[f"{down}_blocks"].flatten(2), bytes_[f"{down}_scales"]),
            "w13_bias": None if biases[0] is None else parted(biases[0]),
            "w2_bias": biases[1],
        }
    like = list(stored(kind))
    stacks = [  # codes of gate, up and down, then scales
        torch.stack([bytes_[key] for key in (like[index], like[len(like) // 2 + index])]) for index in range(6)
    ]
    gate, up, down, gate_scale, up_scale, down_scale = stacks
    return {
        "w13": (torch.cat([gate, up], 1), torch.cat([gate_scale, up_scale], 1)),
        "w2": (down, down_scale),
        "w13_bias": None,
        "w2_bias": None,
    }


def assert_is(weight: Tensor, parts: tuple[Tensor, Tensor], layout: str) -> None:
    """The padded bytes, by the index formulas: values may be NaN."""
    assert isinstance(weight, ShuffledMXFP4Tensor)
    for found, expected in zip(
        (weight.qdata, weight.scale), in_memory(parts, layout, gate_up=weight.gate_up), strict=True
    ):
        assert torch.equal(found, expected)


def assert_bias_is(found: Tensor | None, expected: Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# --- one case


def attempt(load: Callable[[], Any]) -> tuple[Any, str | None]:
    """What is loaded, or why not."""
    try:
        return load(), None
    except REFUSALS as error:
        return None, str(error)


def judge(kind: str, path: Path) -> bool:
    """Whether the file was loaded."""
    own = kind in ("canonical", "as_is")
    name = name_of("quark" if own else kind)
    loaded, refusal = attempt(lambda: load_experts(path))
    bias = loaded is not None and name in loaded and loaded[name].w13_bias is not None
    model = module_of({name: DENSE}, "mxfp4_moe", bias=bias)
    before = snapshot(model)
    again, second_refusal = attempt(lambda: load_experts(path, into=model))
    if again is None:
        assert_unchanged(model, before)
    if loaded is None:
        assert refusal
        assert second_refusal
    whole, _ = attempt(lambda: load_file(path)) if own else (None, None)
    if loaded is None and whole is None:
        return False
    on_disk = safetensors.torch.load_file(path)  # which refuses whatever is structurally wrong
    if own:
        expected: Any = DENSE._asdict() | {
            f"{which}_bias": on_disk.get(f"{name}.{which}_bias") for which in ("w13", "w2")
        }
    elif loaded is not None:
        expected = from_format(kind, on_disk)
    layout = "mxfp4_moe" if kind == "as_is" else "none"
    for experts, lies in ((loaded, layout), (again, "mxfp4_moe")):
        if experts is not None and name in experts:
            for which in ("w13", "w2"):
                assert_is(getattr(experts[name], which), expected[which], lies)
                bias_name = f"{which}_bias"
                if lies == layout:
                    assert_bias_is(getattr(experts[name], bias_name), expected[bias_name])
    if whole is not None:
        for which in ("w13", "w2"):
            if f"{name}.{which}_weight" in whole:
                assert_is(whole[f"{name}.{which}_weight"], expected[which], layout)
        plain = {key: part for key, part in whole.items() if not isinstance(part, ShuffledMXFP4Tensor)}
        for key, part in plain.items():
            assert torch.equal(part.view(torch.uint8), on_disk[key].view(torch.uint8)), key
    return True


def main(folder: Path, seeds: int) -> None:
    torch.set_num_threads(1)
    originals = {}
    for kind in (*FORMATS, *OTHER_NAMES, "canonical", "as_is"):
        path = folder / f"{kind}.safetensors"
        if kind not in ("canonical", "as_is"):
            safetensors.torch.save_file(stored(kind) | others(), path)
        else:
            model = module_of({layer_name("quark"): DENSE}, "mxfp4_moe")
            load_experts(folder / "gpt-oss.safetensors", into=model)
            save_file(model.state_dict() | others(), path, layout=kind)
        originals[kind] = path.read_bytes()
        assert judge(kind, path)

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        assert event not in FORBIDDEN, (event, arguments)

    sys.addaudithook(forbid)  # all that is imported is imported by now
    outcome: Counter[str] = Counter()
    for seed in range(seeds):
        rng = random.Random(seed)
        kind = list(originals)[seed % len(originals)]
        damage = rng.choice(DAMAGES)
        path = folder / "damaged.safetensors"
        path.write_bytes(damage(bytearray(originals[kind]), rng))
        try:
            loaded = judge(kind, path)
        except BaseException:
            print(f"seed {seed}: {damage.__name__} of {kind}", file=sys.stderr)
            raise
        outcome["loaded" if loaded else "refused"] += 1
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
