# SPDX-License-Identifier: MIT
"""Shuffles by Triton's kernels, run by its interpreter: judged by aiter's digests and by the index formulas of the
layouts. What they become on GPUs is compiled in a process without the interpreter, which needs no GPU either."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from shuffled_tensor import ShuffledMXFP4Tensor, layouts, refit, shuffle_scale, shuffle_weight, unshuffle_weight
from shuffled_tensor.layouts import LAYOUTS as TABLE
from shuffled_tensor.layouts import Order
from shuffled_tensor.mxfp4 import CODES, PARTS, SCALES

from .support.bytes import coded, marked, marked_parts, weight_of
from .support.judges import assert_holds, by_formula, in_memory
from .support.made_up import MADE_UP

moves = pytest.importorskip("shuffled_tensor.backends.triton.moves")
pytest.importorskip("triton")

GOLDEN = json.loads((Path(__file__).parent / "data" / "shuffle_digests.json").read_text())
KINDS = ("mxfp4_moe", "mxfp4_separated")
NAMES = {CODES: "weight", SCALES: "scale"}

DIGESTS = {
    "weight_separated": (CODES, "mxfp4_separated", True),
    "weight_gui_gate_up": (CODES, "mxfp4_moe", True),
    "weight_gui_plain": (CODES, "mxfp4_moe", False),
    "scale_separated": (SCALES, "mxfp4_separated", True),
    "scale_gui_gate_up": (SCALES, "mxfp4_moe", True),
    "scale_gui_plain": (SCALES, "mxfp4_moe", False),
}


def check_moves(order: Order, row_major: Tensor, laid_out: Tensor) -> None:
    """Both ways, out of place and, where the kernels can, in place, in the scratch that they ask for."""
    for source, expected, inverse in ((row_major, laid_out, False), (laid_out, row_major, True)):
        given, target = source.clone(), torch.full_like(source, 0xA5)
        moves.move(order, given, target, inverse=inverse)
        assert torch.equal(target, expected)
        assert torch.equal(given, source)
        size = moves.scratch(order, source)
        if size is not None:
            held = torch.full((size,), 0xA5, dtype=torch.uint8, device=source.device)
            moves.move(order, given, given, held, inverse=inverse)
            assert torch.equal(given, expected)


@pytest.fixture
def few_pieces() -> Iterator[None]:
    """Rounds are cut, however few and short they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "_PIECE", 2)
        patch.setattr(moves, "_PROGRAMS", 1 << 20)
        moves._pieces.cache_clear()
        yield
    moves._pieces.cache_clear()


@pytest.mark.parametrize("key", DIGESTS)
def test_digests_of_aiters_own_functions(key: str, device: str) -> None:
    part, kind, gate_up = DIGESTS[key]
    order, cases = TABLE[kind].order(part, gate_up), 0
    for case in GOLDEN["cases"]:
        if key in case and case["experts"] < 8:
            data = coded(case["experts"], case["rows"], case["k"] // part.per_byte, salt=0 if part is CODES else 7)
            target = torch.empty_like(data, device=device)
            moves.move(order, data.to(device), target, inverse=False)
            assert hashlib.sha256(target.cpu().numpy().tobytes()).hexdigest() == case[key]
            cases += 1
    assert cases >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("experts", "tiles", "columns"),
    [(1, 1, 256), (3, 2, 512), (1, 3, 256), (3, 5, 512), (1, 3, 2880), (1, 1, 7168), (2, 2, 32), (0, 1, 256)],
)
def test_formulas(kind: str, gate_up: bool, part: Any, experts: int, tiles: int, columns: int, device: str) -> None:
    """K=512, where a second shuffle would undo the first; 2880 columns, of which no power of two is a multiple."""
    order = TABLE[kind].order(part, gate_up)
    columns = -(-columns // order.columns) * order.columns
    data = marked(experts, tiles * order.rows, columns // part.per_byte)
    expected = by_formula(NAMES[part], data, kind, gate_up)
    check_moves(order, data.to(device), expected.to(device))


@pytest.mark.parametrize("cut", [False, True])
def test_rounds_of_interleaved_strips(cut: bool, device: str, request: pytest.FixtureRequest) -> None:
    """Of one strip, of all of them, and of everything between: numbers of strips differ in how they go round."""
    if cut:
        request.getfixturevalue("few_pieces")
    order = TABLE["mxfp4_moe"].order(CODES, True)
    taken = set()
    for pairs in (1, 2, 3, 4, 5, 7, 8, 11, 12, 14, 16, 21):
        data = marked(3 if pairs < 8 else 1, 32 * pairs, 32)
        check_moves(order, data.to(device), by_formula("weight", data, "mxfp4_moe", True).to(device))
        taken.add(moves.scratch(order, data) > 0)
    assert True in taken
    assert (False in taken) or cut


@pytest.mark.parametrize("experts", [1, 8, 32, 128, 256])
def test_scratch_is_bounded(experts: int) -> None:
    """Also where rounds are longest: as many strips as there are, but two."""
    order, bound = TABLE["mxfp4_moe"].order(CODES, True), layouts.MAX_SCRATCH
    with torch.device("meta"):
        for rows, columns in ((5888, 3072), (4096, 7168), (512, 7168), (11776, 8192)):
            data = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
            assert moves._pieces.__wrapped__(rows // 16, experts, 10, False, data.device).starts.device.type == "meta"
            assert moves.scratch(order, data) <= bound
            assert moves.scratch(TABLE["mxfp4_separated"].order(CODES, True), data) == 0
        whole_rows = torch.empty(1, 32, 32768 // 2, dtype=torch.uint8)
        for kind in KINDS:  # more than registers hold
            assert moves.scratch(TABLE[kind].order(CODES, True), whole_rows) is None
    moves._pieces.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_wide_rows_go_in_parts(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = TABLE[kind].order(CODES, True)
    for columns in (1440, 32 * 33):
        data = marked(2, 64, columns // 2)
        monkeypatch.setattr(moves, "_COLUMNS", 16)
        check_moves(order, data.to(device), by_formula("weight", data, kind, True).to(device))
    monkeypatch.setattr(moves, "_HELD", 16)
    assert moves.scratch(order, data) is None


def test_many_narrow_strips_of_scales_share_a_program(device: str) -> None:
    """More than a program has, and of the last one only some are there."""
    for gate_up in (True, False):
        order = TABLE["mxfp4_moe"].order(SCALES, gate_up)
        data = marked(2, 33 * order.rows, 8)
        check_moves(order, data.to(device), by_formula("scale", data, "mxfp4_moe", gate_up).to(device))


def test_orders_that_the_kernels_do_not_know() -> None:
    for gate_up in (True, False):
        for part in PARTS:
            assert moves.strips_of(MADE_UP.order(part, gate_up)) is None
            assert moves.strips_of(TABLE["none"].order(part, gate_up)) is None
            for kind in KINDS:
                found = moves.strips_of(TABLE[kind].order(part, gate_up))
                assert found == (16, gate_up and kind == "mxfp4_moe")


# --- behind the layouts


class Moved:
    """Which bytes the kernels moved, on whatever device they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, bool, bool]] = []
        self.sources: list[int] = []
        self.mover, move = moves.TritonMover(), moves.move

        def noted(order: Order, source: Tensor, target: Tensor, held: Tensor | None = None, *, inverse: bool) -> None:
            move(order, source, target, held, inverse=inverse)
            self.done.append((order.part.name, held is not None, inverse))
            self.sources.append(source.data_ptr())

        patch.setattr(moves, "move", noted)
        patch.setattr(moves, "unusable", lambda device: None)
        patch.setattr(layouts, "_mover", self.mover)

    def since(self) -> list[tuple[str, bool, bool]]:
        """Codes or scales, whether in place, and whether back to row-major."""
        done, self.done, self.sources = self.done, [], []
        return done


@pytest.fixture
def moved(device: str, monkeypatch: pytest.MonkeyPatch) -> Moved:
    if device != "cpu":
        pytest.skip("only the interpreter moves bytes of a CPU")
    return Moved(monkeypatch)


PARTS_OF = {"mxfp4_moe": [("qdata", True), ("scale", False)], "mxfp4_separated": [("qdata", True), ("scale", True)]}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_and_weights_are_moved_by_kernels(kind: str, moved: Moved) -> None:
    data = marked(2, 64, 256)
    expected = by_formula("weight", data, kind, True)
    out = shuffle_weight(data, kind, gate_up=True)
    assert torch.equal(out, expected)
    assert unshuffle_weight(out, kind, gate_up=True, out=out) is out
    assert torch.equal(out, data)
    assert moved.since() == [("qdata", False, False), ("qdata", True, True)]
    parts = marked_parts(3, 96, 160)
    weight = weight_of(parts, kind)
    assert moved.since() == [(part, in_place, False) for part, in_place in PARTS_OF[kind]]
    assert_holds(weight, parts, kind)
    moved.since()
    weight.unshuffle_()
    assert moved.since() == [(part, in_place, True) for part, in_place in PARTS_OF[kind]]
    assert_holds(weight, parts, "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [slice(None), slice(1, 3), slice(0, 3, 2)])
def test_bytes_that_are_given_are_laid_out_where_they_belong(kind: str, experts: slice, moved: Moved) -> None:
    """One move a part, from the tensor that is given, where there is no padding."""
    old, new = marked_parts(3, 512, 512), marked_parts(3, 512, 512, salt=1)
    weight = weight_of(old, kind)
    moved.since()
    given = [part[experts].contiguous() for part in new]
    weight[experts].qdata_view.copy_(given[0])
    weight[experts].scale_view.copy_(given[1])
    if experts.step is None:
        assert moved.sources == [part.data_ptr() for part in given]
    assert moved.since() == [("qdata", False, False), ("scale", False, False)]
    for before, after in zip(old, new, strict=True):
        before[experts] = after[experts]
    assert_holds(weight, old, kind)
    other = marked_parts(3, 512, 512, salt=2)
    source = weight_of(other)
    moved.since()
    weight.copy_(source)
    assert moved.sources == [source.qdata.data_ptr(), source.scale.data_ptr()]
    assert moved.since() == [("qdata", False, False), ("scale", False, False)]
    assert_holds(weight, other, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_of_everything_moves_bytes_once(kind: str, moved: Moved) -> None:
    new = marked_parts(2, 512, 512, salt=1)
    module = nn.Module()
    module.w13 = nn.Parameter(weight_of(marked_parts(2, 512, 512), kind))
    moved.since()
    with refit(module, whole=True):
        assert moved.since() == []
        module.w13.qdata.copy_(new[0])
        module.w13.scale.copy_(new[1])
    assert [(part, inverse) for part, _, inverse in moved.since()] == [("qdata", False), ("scale", False)]
    assert_holds(module.w13, new, kind)


class Watching(TorchDispatchMode):
    """As one that records or meters what torch does, to which a kernel would be nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_the_kernels_do_not_know_is_moved_without_them(moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, MADE_UP.name, MADE_UP)
    data = marked(2, 64, 256)
    assert torch.equal(shuffle_weight(data, "made_up", gate_up=True), by_formula("weight", data, "made_up", True))
    held = marked(2 * 64 * 32 + 1)[1:].view(2, 64, 32)  # at no multiple of 16 bytes
    expected = by_formula("scale", held, "mxfp4_moe", True)
    assert torch.equal(shuffle_scale(held, "mxfp4_moe", gate_up=True), expected)
    with FakeTensorMode():
        shuffle_weight(torch.empty(2, 64, 256, dtype=torch.uint8), "mxfp4_moe", gate_up=True)
    with Watching():
        shuffle_weight(data, "mxfp4_moe", gate_up=True)
    traced = make_fx(lambda x: shuffle_weight(x, "mxfp4_moe", gate_up=True))(data)
    assert not moved.done
    assert not moved.mover._failed
    other = marked(2, 64, 256, salt=1)
    assert torch.equal(traced(other), by_formula("weight", other, "mxfp4_moe", True))


def test_a_kernel_that_fails_is_said_once_and_does_without(
    moved: Moved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(moves, "move", fail)
    caplog.set_level(logging.WARNING, "shuffled_tensor")
    data = marked(2, 64, 256)
    expected = by_formula("weight", data, "mxfp4_separated", True)
    for _ in range(2):
        taken = data.clone()
        shuffle_weight(taken, "mxfp4_separated", gate_up=True, out=taken)
        assert torch.equal(taken, expected)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # in place, and by way of scratch
    assert set(said) == {"qdata are shuffled without Triton, which failed: Failed to find C compiler"}


# --- on GPUs


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_shuffles_what_is_there_when_it_is_replayed(kind: str, device: str) -> None:
    """On the stream that is current; in place it goes by way of scratch, without rounds."""
    if device == "cpu":
        pytest.skip("there are no graphs on a CPU")
    data = [marked(2, 512, 256, salt=salt).to(device) for salt in range(2)]
    given, out = data[0].clone(), torch.empty_like(data[0])
    in_place = data[0].clone()

    def run() -> None:
        shuffle_weight(given, kind, gate_up=True, out=out)
        shuffle_weight(in_place, kind, gate_up=True, out=in_place)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for values in data:
        given.copy_(values)
        in_place.copy_(values)
        graph.replay()
        expected = by_formula("weight", values.cpu(), kind, True).to(device)
        assert torch.equal(out, expected)
        assert torch.equal(in_place, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_lives_of_weights_on_a_gpu(kind: str, device: str) -> None:
    """Through whatever moves bytes on this device: first use, refits, bytes given, and back."""
    parts = [tuple(part.to(device) for part in marked_parts(5, 768, 2880, salt=salt)) for salt in range(4)]
    weight = ShuffledMXFP4Tensor(*(part.clone() for part in parts[0]), gate_up=True, row_order="contiguous", align=32)
    module = nn.Module()
    module.w13 = nn.Parameter(weight.shuffle_(kind))

    def check(expected: tuple[Tensor, ...]) -> None:
        assert module.w13.shuffle_kind == kind
        for view, part in zip((module.w13.qdata_view, module.w13.scale_view), expected, strict=True):
            assert torch.equal(view.clone(), part)

    check(parts[0])
    for whole in (False, True):
        with refit(module, whole=whole):
            module.w13.qdata[:, :, :1440].copy_(parts[1 + whole][0])
            module.w13.scale[:, :768, :90].copy_(parts[1 + whole][1])
        check(parts[1 + whole])
    module.w13.qdata_view.copy_(parts[3][0])
    module.w13.scale_view.copy_(parts[3][1])
    check(parts[3])
    codes, scale = (part.cpu() for part in parts[3])
    placed = in_memory((codes, scale), kind, gate_up=True, align=(32, 32))
    for found, expected in zip((module.w13.qdata, module.w13.scale), placed, strict=True):
        assert torch.equal(found.cpu(), expected)
    module.w13.unshuffle_()
    assert torch.equal(module.w13.qdata_view.clone(), parts[3][0])


COMPILE = '''
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shuffled_tensor.backends.triton import shuffle

target, cuda = GPUTarget(*{target!r}), {target!r}[0] == "cuda"
COUNTED = (
    dict(load=r"ld\\.global\\.\\S*v4\\.b32", store=r"st\\.global\\.\\S*v4\\.b32", other=r"(?:ld|st)\\.global\\.\\S*b(?:8|16)\\b")
    if cuda
    else dict(load=r"(?:global|buffer)_load_dwordx4", store=r"(?:global|buffer)_store_dwordx4",
              other=r"(?:global|buffer)_(?:load|store)_(?:u?byte|u?short|sbyte)")
)
CODES = dict(TILE=16, WIDTH=896, UNITS=256)
for name, fixed in (
    ("move_codes", dict(**CODES, INTERLEAVED=True, INVERSE=False)),
    ("move_codes", dict(**CODES, INTERLEAVED=True, INVERSE=True)),
    ("move_codes", dict(TILE=16, WIDTH=360, UNITS=128, INTERLEAVED=False, INVERSE=False)),
    ("move_pieces", dict(**CODES, INVERSE=False)),
    ("move_pieces", dict(**CODES, INVERSE=True)),
    ("put_aside", CODES),
    ("move_scales", dict(TILE=16, WIDTH=56, UNITS=32, STRIPS=1, INTERLEAVED=False, INVERSE=False)),
    ("move_scales", dict(TILE=16, WIDTH=56, UNITS=32, STRIPS=1, INTERLEAVED=True, INVERSE=True)),
):
    kernel = getattr(shuffle, name)
    pointers = ("Source", "Target", "Data", "Scratch", "Starts", "Lengths")
    types = {{n: "constexpr" if n in fixed else "*i32" if n in pointers else "i32" for n in kernel.arg_names}}
    aligned = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers}}
    threads = min(512, max(128, fixed["TILE"] * fixed["UNITS"] // 8))
    made = triton.compile(
        ASTSource(kernel, types, fixed, aligned), target=target, options=dict(num_warps=threads // target.warp_size)
    )
    asm = made.asm["ptx" if cuda else "amdgcn"]
    spilled = 0 if cuda else sum(map(int, re.findall(r"_spill_count:\\s+(\\d+)", asm)))
    print(name, *(len(re.findall(pattern, asm)) for pattern in COUNTED.values()), spilled, made.metadata.shared)
'''  # fmt: skip


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx950", 64)], ids=lambda target: target[0])
def test_compiled_kernels_move_16_bytes_at_a_time(target: tuple[str, Any, int], tmp_path: Path) -> None:
    """As many loads of 16 bytes as stores; none of less than a word, no spilled registers, 64 KiB of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE.format(target=target)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 8
    for name, *numbers in lines:
        loads, stores, others, spilled, shared = map(int, numbers)
        assert loads >= 4, name
        assert loads == stores, name
        assert (others, spilled) == (0, 0), name
        assert shared <= 65536, name
