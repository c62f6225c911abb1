# SPDX-License-Identifier: MIT
"""Byte orders, judged by aiter's digests and by the index formulas of the layouts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from shuffled_tensor import layouts, shuffle_scale, shuffle_weight, unshuffle_scale, unshuffle_weight
from shuffled_tensor.mxfp4 import CODES, SCALES

from .support.bytes import LAYOUTS, coded
from .support.judges import by_formula

GOLDEN = json.loads((Path(__file__).parent / "data" / "shuffle_digests.json").read_text())
KINDS = LAYOUTS[1:]

# key of the golden file -> (part, kind, gate_up)
DIGESTS = {
    "weight_separated": ("weight", "mxfp4_separated", True),
    "weight_gui_gate_up": ("weight", "mxfp4_moe", True),
    "weight_gui_plain": ("weight", "mxfp4_moe", False),
    "scale_separated": ("scale", "mxfp4_separated", True),
    "scale_gui_gate_up": ("scale", "mxfp4_moe", True),
    "scale_gui_plain": ("scale", "mxfp4_moe", False),
}
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "weight": (shuffle_weight, unshuffle_weight),
    "scale": (shuffle_scale, unshuffle_scale),
}


def sha256(data: Tensor) -> str:
    return hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("case", "key"),
    [  # aiter pads or refuses some sizes: of those the golden file has no digest
        pytest.param(case, key, id=f"{case['experts']}x{case['rows']}x{case['k']}-{key}")
        for case in GOLDEN["cases"]
        for key in DIGESTS
        if key in case
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_digests_of_aiters_own_functions(case: dict[str, Any], key: str, in_place: bool) -> None:
    part, kind, gate_up = DIGESTS[key]
    columns = case["k"] // (2 if part == "weight" else 32)
    data = coded(case["experts"], case["rows"], columns, salt=0 if part == "weight" else 7)
    assert sha256(data) == case[f"{part}_in"]
    shuffle, _ = FUNCTIONS[part]
    shuffled = shuffle(data, kind, gate_up=gate_up, out=data if in_place else None)
    assert sha256(shuffled) == case[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_up", [False, True])
@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 3), tiles=st.integers(1, 6), blocks=st.integers(1, 9), data=st.data())
def test_formulas_and_inverses(kind: str, gate_up: bool, experts: int, tiles: int, blocks: int, data: Any) -> None:
    part = data.draw(st.sampled_from(sorted(FUNCTIONS)))
    shuffle, unshuffle = FUNCTIONS[part]
    order = layouts.LAYOUTS[kind].order(CODES if part == "weight" else SCALES, gate_up)
    shape = experts, tiles * order.rows, blocks * order.columns // (2 if part == "weight" else 32)
    original = coded(*shape)
    expected = by_formula(part, original, kind, gate_up)

    shuffled = shuffle(original, kind, gate_up=gate_up)
    assert torch.equal(shuffled, expected)
    assert torch.equal(original, coded(*shape))  # the out-of-place form leaves its input alone
    assert torch.equal(unshuffle(shuffled, kind, gate_up=gate_up), original)

    moved = original.clone()
    address = moved.data_ptr()
    assert shuffle(moved, kind, gate_up=gate_up, out=moved) is moved
    assert torch.equal(moved, expected)
    unshuffle(moved, kind, gate_up=gate_up, out=moved)
    assert torch.equal(moved, original)
    assert moved.data_ptr() == address


def test_the_golden_file_was_read() -> None:
    assert sum(key in case for case in GOLDEN["cases"] for key in DIGESTS) == 32


@pytest.mark.parametrize("kind", ["mxfp4_moe", "mxfp4_separated"])
def test_shuffling_twice_at_k_512_is_the_identity(kind: str) -> None:
    """Why state is recorded and never guessed: no look at these bytes could tell."""
    data = coded(1, 32, 256)
    once = shuffle_weight(data, kind, gate_up=False)
    assert not torch.equal(once, data)
    assert torch.equal(shuffle_weight(once, kind, gate_up=False), data)


@pytest.mark.parametrize("part", FUNCTIONS)
def test_one_expert_and_no_expert(part: str) -> None:
    shuffle, _ = FUNCTIONS[part]
    data = coded(2, 64, 128)
    shuffled = shuffle(data, "mxfp4_moe", gate_up=True)
    assert torch.equal(shuffle(data[1], "mxfp4_moe", gate_up=True), shuffled[1])
    assert shuffle(data[:0], "mxfp4_moe", gate_up=True).shape == (0, 64, 128)


def test_kind_none_is_a_copy() -> None:
    data = coded(1, 5, 16)  # a size that no tile fits
    same = shuffle_weight(data, "none", gate_up=True)
    assert torch.equal(same, data)
    assert same.data_ptr() != data.data_ptr()
    assert shuffle_weight(data, "none", gate_up=True, out=data) is data


def test_nan_patterns_survive_as_16_byte_elements() -> None:
    """Runs move as complex128; a copy that touched them as numbers would quieten signalling NaNs."""
    signalling = torch.tensor([0, 0, 0, 0, 0, 0, 0xF0, 0x7F, 1, 0, 0, 0, 0, 0, 0xF0, 0xFF], dtype=torch.uint8)
    data = signalling.repeat(16 * 2).view(1, 16, 32)
    assert torch.equal(shuffle_weight(data, "mxfp4_separated", gate_up=False), data)


class NewBytes(TorchDispatchMode):
    """Adds up the memory that operations allocate."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
            self.total += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("part", FUNCTIONS)
@pytest.mark.parametrize(("limit", "experts_at_once"), [(1, 1), (3 * 64 * 128, 3)])
def test_in_place_scratch_is_bounded(
    part: str, limit: int, experts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_IN_PLACE_SCRATCH", {"cpu": limit})
    shuffle, unshuffle = FUNCTIONS[part]
    data = coded(7, 64, 128)
    expected = by_formula(part, data, "mxfp4_moe", True)
    for function, result in ((shuffle, expected), (unshuffle, data.clone())):
        with NewBytes() as allocated:
            function(data, "mxfp4_moe", gate_up=True, out=data)
        assert torch.equal(data, result)
        assert allocated.total == experts_at_once * 64 * 128


def test_scratch_is_at_most_64_mib() -> None:
    assert max(layouts.MAX_SCRATCH, *layouts._IN_PLACE_SCRATCH.values()) <= 64 * 2**20


def test_bad_input() -> None:
    uint8 = torch.uint8
    cases: dict[str, Callable[[], object]] = {
        "unknown kind": lambda: shuffle_weight(coded(1, 16, 16), "mxfp4", gate_up=True),
        "dtype": lambda: shuffle_weight(torch.zeros(1, 16, 16), "mxfp4_moe", gate_up=True),
        "rank": lambda: shuffle_scale(coded(2, 1, 16, 16), "mxfp4_moe", gate_up=True),
        "strides": lambda: shuffle_weight(coded(1, 16, 16).mT, "mxfp4_moe", gate_up=True),
        "alignment": lambda: shuffle_weight(coded(257)[1:].view(1, 16, 16), "mxfp4_separated", gate_up=False),
        "weight rows": lambda: shuffle_weight(coded(1, 24, 16), "mxfp4_separated", gate_up=False),
        "weight rows, gate-up": lambda: shuffle_weight(coded(1, 48, 16), "mxfp4_moe", gate_up=True),
        "weight columns": lambda: shuffle_weight(coded(1, 16, 24), "mxfp4_moe", gate_up=False),
        "scale rows": lambda: shuffle_scale(coded(1, 16, 8), "mxfp4_separated", gate_up=False),
        "scale rows, gate-up": lambda: shuffle_scale(coded(1, 80, 8), "mxfp4_moe", gate_up=True),
        "scale columns": lambda: shuffle_scale(coded(1, 64, 90), "mxfp4_moe", gate_up=True),
        "out shape": lambda: shuffle_weight(
            coded(1, 16, 16), "mxfp4_moe", gate_up=False, out=torch.empty(1, 16, 32, dtype=uint8)
        ),
        "out dtype": lambda: shuffle_weight(coded(1, 16, 16), "mxfp4_moe", gate_up=False, out=torch.empty(1, 16, 16)),
    }
    lines = []
    for name, call in cases.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
    assert_expected_inline(
        "\n".join(lines).replace(", 'made_up'", ""),
        """\
unknown kind: ValueError: unknown shuffle_kind 'mxfp4'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
dtype: TypeError: qdata must be a uint8 tensor, found torch.float32; packed fp4 codes and e8m0 scales are viewed with .view(torch.uint8)
rank: ValueError: scale must be [experts, rows, bytes] or [rows, bytes], found shape [2, 1, 16, 16]
strides: ValueError: qdata must be contiguous, found strides (256, 1, 16); call .contiguous()
alignment: ValueError: qdata must start on a multiple of 16 bytes, found storage offset 1; call .clone()
weight rows: ValueError: N=24 rows are not a multiple of 16, which qdata in 'mxfp4_separated' needs: pad to 32 rows, with bytes of 0
weight rows, gate-up: ValueError: N=48 rows are not a multiple of 32, which qdata in 'mxfp4_moe' needs: pad gate and up from 24 to 32 rows each, with bytes of 0
weight columns: ValueError: K=48 columns are not a multiple of 32, which qdata in 'mxfp4_moe' needs: pad to K=64, with bytes of 0
scale rows: ValueError: N=16 rows are not a multiple of 32, which scale in 'mxfp4_separated' needs: pad to 32 rows, with bytes of 127
scale rows, gate-up: ValueError: N=80 rows are not a multiple of 32, which scale in 'mxfp4_moe' needs: pad gate and up from 40 to 48 rows each, with bytes of 127
scale columns: ValueError: K=2880 columns are not a multiple of 256, which scale in 'mxfp4_moe' needs: pad to K=3072, with bytes of 127
out shape: ValueError: out must be [1, 16, 16] on cpu, found [1, 16, 32] on cpu
out dtype: TypeError: out must be a uint8 tensor, found torch.float32; packed fp4 codes and e8m0 scales are viewed with .view(torch.uint8)""",
    )


def test_nothing_is_written_when_sizes_do_not_tile() -> None:
    data = coded(2, 24, 16)
    with pytest.raises(ValueError, match="N=24"):
        shuffle_weight(data, "mxfp4_moe", gate_up=False, out=data)
    assert torch.equal(data, coded(2, 24, 16))


@pytest.mark.parametrize(
    "pattern",
    [
        "e (n r) c -> e n c",  # an axis is lost
        "e (n r) c -> e n c r q",  # one is new
        "e (r h) c -> e r h c",  # rows without n
        "e (n r) (t q) -> e n t q r",  # columns without c
        "e (n g r) c -> e n g c r",  # gate and up inside the tiles
        "e n c",
    ],
)
def test_a_pattern_that_is_none_is_found_when_its_row_is_made(pattern: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {pattern!r}")):
        layouts.Layout("bad", down=(pattern, "e n c -> e n c"), gate_up=("e n c -> e n c",) * 2)


@pytest.mark.parametrize("part", FUNCTIONS)
@pytest.mark.parametrize("experts", [1, 3])
def test_an_alias_of_the_input_is_the_input(part: str, experts: int) -> None:
    """Whatever object it is, and in scratch of one expert."""
    aliases: dict[str, Callable[[Tensor], Tensor]] = {
        "data": lambda data: data.data,
        "view": lambda data: data.view(-1).view(data.shape),
        "slice": lambda data: data[:],
        "as_strided": lambda data: data.as_strided(data.shape, data.stride()),
        "parameter": lambda data: torch.nn.Parameter(data, requires_grad=False),
        "another storage": lambda data: torch.from_numpy(data.numpy()),
    }
    shuffle, unshuffle = FUNCTIONS[part]
    original = coded(experts, 64, 512)  # K = 1024, or scales alike
    expected = by_formula(part, original, "mxfp4_moe", True)
    for name, alias in aliases.items():
        data = original.clone()
        out = alias(data)
        assert shuffle(data, "mxfp4_moe", gate_up=True, out=out) is out
        assert torch.equal(data, expected), name
        unshuffle(data, "mxfp4_moe", gate_up=True, out=out)
        assert torch.equal(data, original), name
    one = original[0].clone()
    shuffle(one, "mxfp4_moe", gate_up=True, out=one.view_as(one))
    assert torch.equal(one, expected[0])


@pytest.mark.parametrize("part", FUNCTIONS)
@pytest.mark.parametrize("kind", ["none", "mxfp4_moe"])
def test_out_must_not_share_a_part_of_the_input(part: str, kind: str) -> None:
    shuffle, unshuffle = FUNCTIONS[part]
    memory = coded(3, 64, 128)
    alias = torch.from_numpy(memory.numpy())
    for function in (shuffle, unshuffle):
        for data, out in ((memory[:2], memory[1:]), (memory[1:], memory[:2]), (memory[:2], alias[1:])):
            with pytest.raises(ValueError, match="out shares a part of the memory of (qdata|scale)"):
                function(data, kind, gate_up=True, out=out)
        shifted = memory.view(-1)[4096:-4096].view(2, 64, 128)
        with pytest.raises(ValueError, match="out shares a part"):
            function(memory[:2], kind, gate_up=True, out=shifted)
    assert torch.equal(memory, coded(3, 64, 128))
    shuffle(memory[0], "mxfp4_moe", gate_up=True, out=memory[1])  # beside each other is apart
    assert torch.equal(memory[1:2], by_formula(part, coded(3, 64, 128)[:1], "mxfp4_moe", True))


@pytest.mark.parametrize("gate_up", [None, 1, 0, "no", "yes", torch.tensor(True)])
def test_gate_up_is_true_or_false(gate_up: Any) -> None:
    for shuffle, unshuffle in FUNCTIONS.values():
        for function in (shuffle, unshuffle):
            for kind in LAYOUTS:
                data = coded(1, 64, 128)
                with pytest.raises(TypeError, match="gate_up must be True .* or False .*, found"):
                    function(data, kind, gate_up=gate_up, out=data)
                assert torch.equal(data, coded(1, 64, 128))


@pytest.mark.parametrize("nbytes", [1, 7, 100, 2**20, 24 * 2**20, 64 * 2**20, 65 * 2**20])
@pytest.mark.parametrize("limit", [layouts.MAX_SCRATCH, *layouts._IN_PLACE_SCRATCH.values()])
def test_chunks_of_experts_fit_their_limit(nbytes: int, limit: int) -> None:
    chunks = list(layouts.expert_chunks(1000, nbytes, limit))
    assert [expert for some in chunks for expert in range(some.start, some.stop)] == list(range(1000))
    sizes = [some.stop - some.start for some in chunks]
    assert all(size == 1 or size * nbytes <= limit for size in sizes)
    assert len(chunks) == 1 or (sizes[0] + 1) * nbytes > limit  # and there is room for no other
    assert next(iter(layouts.expert_chunks(10, nbytes))).stop * nbytes <= max(nbytes, 64 * 2**20)


@pytest.mark.parametrize("part", FUNCTIONS)
def test_in_place_in_a_graph(part: str) -> None:
    """Where tensors have no address when it is made."""
    shuffle, _ = FUNCTIONS[part]
    original = coded(2, 64, 512)

    def in_place(data: Tensor) -> Tensor:
        return shuffle(data, "mxfp4_moe", gate_up=True, out=data)

    data = original.clone()
    make_fx(in_place, tracing_mode="fake")(torch.zeros_like(original))(data)
    assert torch.equal(data, by_formula(part, original, "mxfp4_moe", True))
