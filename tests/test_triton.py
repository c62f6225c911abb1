# SPDX-License-Identifier: MIT
"""The layer by Triton's kernels: on a GPU, or small cases in Triton's interpreter."""

from __future__ import annotations

import importlib.metadata
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="no Triton is installed here")
tl = triton.language

from shuffled_tensor import SCALE_RULES, ShuffledMXFP4Tensor, explain, fused_moe, quantize  # noqa: E402
from shuffled_tensor.backends.triton import Triton, layer, numbers, tune  # noqa: E402
from shuffled_tensor.backends.triton.rows import begin  # noqa: E402
from shuffled_tensor.backends.triton.schedule import BAD, ELSEWHERE, SMALL, place, starts  # noqa: E402

from .support.gfx950 import as_on_gfx950  # noqa: E402
from .support.judges import dense, dense_moe, to_mxfp4  # noqa: E402

KINDS = ("mxfp4_separated", "mxfp4_moe")


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    if device == "cpu":
        monkeypatch.setattr(Triton, "available", lambda self, device: None)
    tune.plan.cache_clear()
    yield
    tune.plan.cache_clear()  # some of these tests change the table


@pytest.fixture
def bound(device: str) -> float:
    """Of the relative error: the interpreter cuts bfloat16 off where GPUs round."""
    return 1.3e-2 if device == "cpu" else 5e-3


def weights(device: str, experts: int, hidden: int, intermediate: int, align: int = 256) -> list[ShuffledMXFP4Tensor]:
    generator = torch.Generator().manual_seed(hidden + intermediate)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / math.sqrt(hidden)
    w2 = torch.randn(experts, hidden, intermediate, generator=generator) / math.sqrt(intermediate)
    return [
        ShuffledMXFP4Tensor.from_hp(w13.to(device), gate_up=True, row_order="contiguous", align=align),
        ShuffledMXFP4Tensor.from_hp(w2.to(device), gate_up=False, align=align),
    ]


def routing(device: str, tokens: int, experts: int, topk: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk).indices.int()
    return torch.rand(tokens, topk, generator=generator).to(device), ids.to(device)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def on_cpu(values: dict[str, object]) -> dict[str, object]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "intermediate", "align", "options"),
    [
        (1, 4, 512, 256, 256, {}),
        (3, 3, 256, 512, 256, {"activation": "gelu", "swiglu_limit": 0.5}),
        (5, 3, 288, 96, 32, {"activation": "swiglu"}),
        (5, 3, 352, 160, 64, {"activation": "gelu_tanh", "doweight_stage1": True}),
        (40, 2, 512, 64, 128, {"activation": "situ", "situ_beta": 4.0, "situ_linear_beta": 25.0}),
        (30, 2, 160, 224, 32, {"activation": "silu", "swiglu_limit": 0.1}),
    ],
)
@pytest.mark.parametrize(("biases", "full"), [(False, False), (True, True)])
def test_a_layer_is_what_float64_says(
    device: str,
    bound: float,
    full: bool,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tokens: int,
    experts: int,
    hidden: int,
    intermediate: int,
    align: int,
    options: dict[str, object],
    biases: bool,
) -> None:
    if full:
        monkeypatch.setattr(tune, "TILES", 1)  # as if there were tiles enough for the GPU
    w13, w2 = weights(device, experts, hidden, intermediate, align)
    x = torch.randn(tokens, hidden).bfloat16().to(device)
    weight, ids = routing(device, tokens, experts, 2)
    if biases:
        options = options | {
            "w13_bias": torch.randn(experts, 2 * intermediate, device=device).bfloat16(),
            "w2_bias": torch.randn(experts, hidden, device=device),
        }
    dense13, dense2 = (w.dequantize(torch.float64).cpu() for w in (w13, w2))
    expected = dense_moe(x.cpu(), dense13, dense2, weight.cpu(), ids.cpu(), **on_cpu(options))
    for w in (w13, w2):
        w.shuffle_(kind)
    found = fused_moe(x, w13, w2, weight, ids, backend="triton", **options)
    assert found.dtype is torch.bfloat16
    assert error(found, expected) < bound
    assert torch.equal(found, fused_moe(x, w13, w2, weight, ids, backend="triton", **options))


@pytest.mark.parametrize("biases", [False, True])
def test_tiles_of_few_columns_one_after_the_other(
    device: str, bound: float, biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TILES", 1)  # as if the GPU were full
    w13, w2 = weights(device, 2, 448, 256)
    x, (weight, ids) = torch.randn(20, 448).bfloat16().to(device), routing(device, 20, 2, 2)
    bias = {"w2_bias": torch.randn(2, 448, device=device)} if biases else {}
    dense13, dense2 = (w.dequantize(torch.float64).cpu() for w in (w13, w2))
    expected = dense_moe(x.cpu(), dense13, dense2, weight.cpu(), ids.cpu(), **on_cpu(bias))
    assert tune.table(40, tune.Shape(2, 448, (512, 256), True), False).second.run == 4
    assert error(fused_moe(x, w13, w2, weight, ids, backend="triton", **bias), expected) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("hidden", "intermediate", "align"), [(512, 256, 256), (352, 160, 32)])
def test_the_form_for_gfx950_reads_the_same_bytes(
    device: str,
    bound: float,
    kind: str,
    full: bool,
    hidden: int,
    intermediate: int,
    align: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its order of columns and of rows, with arithmetic in place of its instruction."""
    if device == "cuda":
        pytest.skip("waits for --device cpu: another GPU does not run this form")
    as_on_gfx950(monkeypatch)
    if full:
        monkeypatch.setattr(tune, "TILES", 1)
    w13, w2 = weights(device, 3, hidden, intermediate, align)
    x, (weight, ids) = torch.randn(7, hidden).bfloat16(), routing(device, 7, 3, 2)
    dense13, dense2 = (w.dequantize(torch.float64) for w in (w13, w2))
    expected = dense_moe(x, dense13, dense2, weight, ids)
    for w in (w13, w2):
        w.shuffle_(kind)
    assert error(fused_moe(x, w13, w2, weight, ids, backend="triton"), expected) < bound


def test_a_weight_of_no_layout_is_laid_out_and_a_fixed_one_stays(device: str) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    x, (weight, ids) = torch.randn(2, 256, device=device).half(), routing(device, 2, 2, 1)
    fixed = ShuffledMXFP4Tensor(
        *map(torch.clone, (w13.qdata, w13.scale)), gate_up=True, row_order="contiguous", shuffle_kind="mxfp4_moe"
    )
    by_fixed = fused_moe(x, fixed, w2, weight, ids, backend="triton")
    by_free = fused_moe(x, w13, w2, weight, ids, backend="triton")
    assert (fixed.shuffle_kind, w13.shuffle_kind) == ("mxfp4_moe", "mxfp4_separated")
    assert by_fixed.dtype is torch.float16
    assert torch.equal(by_fixed, by_free)


def test_the_default_dtype_is_not_that_of_sums(device: str) -> None:
    w13, w2 = weights(device, 2, 512, 512)
    arguments = torch.randn(3, 512, device=device).bfloat16(), w13, w2, *routing(device, 3, 2, 2)
    found = fused_moe(*arguments, backend="triton")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fused_moe(*arguments, backend="triton"), found)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_it_does_not_take_is_said(device: str) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    x, (weight, ids) = torch.randn(2, 256, device=device), routing(device, 2, 2, 1)
    with pytest.raises(ValueError, match="it multiplies bfloat16, and hidden_states are float32"):
        fused_moe(x, w13, w2, weight, ids, backend="triton")
    assert explain(x, w13, w2, weight, ids).backend == "reference"
    assert explain(x.bfloat16(), w13, w2, weight, ids).backend == "triton"
    assert fused_moe(x[:0].bfloat16(), w13, w2, weight[:0], ids[:0], backend="triton").shape == (0, 256)


def test_some_of_the_experts(device: str, bound: float) -> None:
    """Neighbours are read where they are; others, with gaps between them, go to the reference."""
    w13, w2 = weights(device, 4, 256, 256)
    x, (weight, ids) = torch.randn(6, 256, device=device).bfloat16(), routing(device, 6, 2, 2)
    for taken, backend in ((slice(1, 3), "triton"), (slice(None, None, 2), "reference")):
        some = w13[taken], w2[taken]
        dense13, dense2 = (w.dequantize(torch.float64)[taken].cpu() for w in (w13, w2))
        expected = dense_moe(x.cpu(), dense13, dense2, weight.cpu(), ids.cpu())
        assert explain(x, *some, weight, ids).backend == backend
        assert error(fused_moe(x, *some, weight, ids), expected) < bound
    for name, apart in (("w13", (some[0], w2[:2])), ("w2", (w13[:2], some[1]))):
        with pytest.raises(ValueError, match=f"the experts of {name} are not contiguous in memory; .clone"):
            fused_moe(x, *apart, weight, ids, backend="triton")


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_activations_are_rounded_to_mxfp4(device: str, bound: float, rule: str) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    x, (weight, ids) = torch.randn(4, 256), routing(device, 4, 2, 2)
    dense13, dense2 = (w.dequantize(torch.float64).cpu() for w in (w13, w2))
    expected = dense_moe(to_mxfp4(x, rule), dense13, dense2, weight.cpu(), ids.cpu())
    options = {"activation_dtype": "mxfp4", "scale_rule": rule, "backend": "triton"}
    found = fused_moe(x.to(device), w13, w2, weight, ids, **options)
    exact = fused_moe(x.to(device), w13, w2, weight, ids, **(options | {"backend": "reference"}))
    assert error(found, expected) < 0.2  # the intermediate is rounded too
    assert error(found, exact.double().cpu()) < 3 * bound  # now and then to the neighbouring code

    qdata, scale = quantize(x, scale_rule=rule)
    packed = fused_moe(qdata.to(device), w13, w2, weight, ids, hidden_scale=scale.to(device), backend="triton")
    assert error(packed, expected) < bound


@pytest.mark.parametrize("scale", [0, 1, 60, 127, 128, 129, 200, 240])
def test_weights_are_exact_under_every_scale(device: str, bound: float, scale: int) -> None:
    if device == "cpu" and scale < 2:
        pytest.skip("waits for --device cuda: the interpreter has no subnormal bfloat16")
    generator = torch.Generator().manual_seed(scale)
    codes = [torch.randint(256, shape, generator=generator).byte() for shape in ((2, 512, 128), (2, 256, 128))]
    scales = [torch.full((2, 512, 8), scale).byte(), torch.full((2, 256, 8), 120).byte()]
    x = (torch.randn(3, 256, generator=generator) * 2.0 ** max(min(120 - scale, 120), -120)).bfloat16()
    weight, ids = routing(device, 3, 2, 2)
    w13, w2 = (
        ShuffledMXFP4Tensor(c.to(device), s.to(device), gate_up=gate_up, row_order="contiguous" if gate_up else None)
        for c, s, gate_up in zip(codes, scales, (True, False), strict=True)
    )
    expected = dense_moe(x, *map(dense, codes, scales), weight.cpu(), ids.cpu())
    assert error(fused_moe(x.to(device), w13, w2, weight, ids, backend="triton"), expected) < bound


def test_a_scale_of_nan_is_nan_wherever_it_counts_and_nowhere_else(device: str) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    scale = w2.scale_view.clone()
    scale[1, 7, 3] = 255
    w2.scale_view.copy_(scale)
    x, weight, ids = torch.randn(3, 256, device=device).bfloat16(), torch.ones(3, 1), torch.tensor([[0], [1], [0]])
    found = fused_moe(x, w13, w2, weight.to(device), ids.to(device), backend="triton").isnan().cpu()
    expected = torch.zeros(3, 256, dtype=torch.bool)
    expected[1, 7] = True
    assert torch.equal(found, expected)


@triton.jit
def upcast(Words, Scale, Out, TARGET: tl.constexpr, WIDE: tl.constexpr):
    row = tl.arange(0, 256)[:, None]
    words = tl.load(Words + row * 4 + tl.arange(0, 4)[None, :])
    values = numbers.bf16_of_words(words, tl.load(Scale + row), TARGET, WIDE)
    tl.store(Out + row * 32 + tl.arange(0, 32)[None, :], values.to(tl.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("wide", [True, False])
def test_every_code_under_every_scale(device: str, wide: bool) -> None:
    codes = torch.arange(16).repeat(256, 1).byte()  # two codes a byte: each with itself
    codes = codes | (codes.flip(1) << 4)
    scale = torch.arange(256).byte().unsqueeze(1)
    target, _ = layer._target(torch.device(device, 0) if device == "cuda" else torch.device(device))
    out = torch.empty(256, 32, device=device)
    upcast[(1,)](codes.to(device).view(torch.int32), scale.to(device), out, TARGET=target, WIDE=wide)
    expected = dense(codes, scale).float().view(256, 8, 4).transpose(1, 2).reshape(256, 32)
    known = 256 if wide or device == "cpu" else numbers.FULL_RANGE.value + 1
    first = 2 if device == "cpu" else 0  # the interpreter has no subnormal bfloat16
    assert torch.equal(out[first:known].cpu().nan_to_num(nan=7), expected[first:known].nan_to_num(nan=7))
    assert not out[known:].isfinite().logical_and(out[known:] != 0).any()  # never a number that looks right


# --- the schedule


def schedule(
    device: str, ids: Tensor, experts: int, rows: int, small: int, mask: Tensor | None = None, tokens: int | None = None
) -> tuple[list[int], list[int], list[list[int]]]:
    """Kinds, slots and blocks that are used."""
    slots, (count, topk) = ids.numel(), ids.shape
    few = slots <= layer._FEW
    chunks = 1 if few else -(-slots // layer._CHUNK)
    known = experts if mask is None else len(mask)
    padded = max(64, triton.next_power_of_2(experts))
    blocks = min(slots, experts + slots // rows)
    kind, slot, counts = (
        torch.full((n,), -7, dtype=torch.int32, device=device) for n in (slots, slots, chunks * padded)
    )
    block = torch.full((blocks, 4), -7, dtype=torch.int32, device=device)
    x = torch.zeros(count, 256, device=device)
    begin[(chunks + count,)](
        x, None, x.bfloat16(), ids.to(device), None if mask is None else mask.to(device),
        None if tokens is None else torch.tensor([tokens], device=device), kind, slot, block, None if few else counts,
        None, count, slots, chunks, blocks, 0, H=256, COLUMNS=256, RULE=None, PAIRED=True, RB=1, BH=256, E=experts,
        TOPK=topk, GLOBAL=known, GP=triton.next_power_of_2(known), EP=padded, BM1=rows, BM2=small, BT=256 if slots > 64 else 64,
        OVERLAP=False,
    )  # fmt: skip
    if not few:
        starts[(1,)](counts, block, chunks, blocks, EP=padded, BM1=rows, BM2=small, STEP=16, OVERLAP=False)
        place[(chunks,)](kind, counts, slot, slots, EP=padded, BT=layer._CHUNK, OVERLAP=False)
    used = [row for row in block.tolist() if row[0] >= 0]
    assert block.tolist() == used + [[-1, -7, -7, -7]] * (blocks - len(used))
    return kind.tolist(), slot.tolist(), used


@pytest.mark.parametrize(("tokens", "topk", "experts"), [(1, 1, 1), (7, 3, 5), (100, 4, 70), (700, 2, 33)])
@pytest.mark.parametrize(("rows", "small"), [(16, 0), (64, 32)])
def test_slots_are_sorted_by_expert_and_cut_into_blocks(
    device: str, tokens: int, topk: int, experts: int, rows: int, small: int
) -> None:
    ids = torch.rand(tokens, experts).topk(topk).indices
    kind, slot, blocks = schedule(device, ids, experts, rows, small)
    assert kind == ids.flatten().tolist()
    by_expert = defaultdict(list)
    for number, expert in enumerate(ids.flatten().tolist()):
        by_expert[expert].append(number)
    expected, order = [], []
    for expert in sorted(by_expert):
        count = len(by_expert[expert])
        for start in range(0, count, rows):
            few = start + rows >= count and count - start <= small
            expected.append([expert + SMALL.value * few, start, len(order), count])
        order += by_expert[expert]
    assert slot == order
    assert sorted(blocks, key=lambda block: (block[2], block[1])) == expected


@pytest.mark.parametrize("count", [20, 600])
def test_slots_of_other_ranks_and_of_padding_and_bad_ones_are_left_out(device: str, count: int) -> None:
    mask = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.int32)
    local = {1: 0, 2: 1, 5: 2}
    ids = torch.randint(6, (count, 2))
    ids[3, 1], ids[4, 0], ids[count - 1, 0] = 6, -1, 99  # the last one is padding
    kind, slot, blocks = schedule(device, ids, 3, 16, 0, mask, tokens=count - 1)
    expected = [local.get(e, ELSEWHERE.value) if 0 <= e < 6 else BAD.value for e in ids[:-1].flatten().tolist()]
    assert kind == [*expected, ELSEWHERE.value, ELSEWHERE.value]
    order = sorted((n for n, e in enumerate(expected) if e >= 0), key=lambda n: expected[n])
    assert slot == order + [-7] * (2 * count - len(order))
    assert {block[0] for block in blocks} <= {0, 1, 2}


def test_wrong_data_gives_nan_for_its_token_and_for_no_other(device: str, bound: float) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    x, (weight, ids) = torch.randn(4, 256, device=device).bfloat16(), routing(device, 4, 2, 1)
    right = fused_moe(x, w13, w2, weight, ids, backend="triton")
    ids[2] = 2
    found = fused_moe(x, w13, w2, weight, ids, backend="triton")
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], right[[0, 1, 3]])
    three = torch.tensor([1, 1, 1], dtype=torch.int32, device=device)  # experts, where there are two
    assert fused_moe(x, w13, w2, weight, ids, expert_mask=three, backend="triton").isnan().all()
    for tokens in (5, -1, 1 << 30):
        count = torch.tensor([tokens], dtype=torch.int32, device=device)
        two = weight.repeat(1, 4), ids.clamp(max=1).repeat(1, 4)
        assert fused_moe(x, w13, w2, *two, num_local_tokens=count, backend="triton").isnan().all()


def test_experts_of_other_ranks_add_nothing(device: str, bound: float) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    masks = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.int32, device=device)
    mask = masks[:, 1]  # a rank's column, with another's between its numbers
    x, (weight, ids) = torch.randn(6, 256, device=device).bfloat16(), routing(device, 6, 4, 3)
    count = torch.tensor(4, dtype=torch.int32, device=device)
    dense13, dense2 = (w.dequantize(torch.float64).cpu() for w in (w13, w2))
    expected = dense_moe(
        x.cpu(), dense13, dense2, weight.cpu(), ids.cpu(), expert_mask=mask.cpu(), num_local_tokens=count
    )
    found = fused_moe(x, w13, w2, weight, ids, expert_mask=mask, num_local_tokens=count, backend="triton")
    assert error(found[:4], expected[:4]) < bound


# --- who is asked


def test_the_environment_restricts_backends(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w13, w2 = weights(device, 2, 256, 256)
    arguments = torch.randn(2, 256, device=device).bfloat16(), w13, w2, *routing(device, 2, 2, 1)
    monkeypatch.setenv("SHUFFLED_TENSOR_BACKENDS", "aiter, reference")
    found = explain(*arguments)
    assert found.backend == "reference"
    assert found.passed_over["triton"] == "SHUFFLED_TENSOR_BACKENDS=aiter, reference leaves it out"
    with pytest.raises(ValueError, match="leaves it out"):
        fused_moe(*arguments, backend="triton")
    monkeypatch.setenv("SHUFFLED_TENSOR_BACKENDS", "trition")
    with pytest.raises(
        ValueError, match="SHUFFLED_TENSOR_BACKENDS names 'trition'; known backends: 'aiter', 'triton', "
    ):
        fused_moe(*arguments)


def test_a_write_of_larger_scales_is_seen(device: str, bound: float) -> None:
    """The kernel is chosen by the largest scale, which is read once after each write."""
    w13, w2 = weights(device, 2, 256, 256)
    x, (weight, ids) = torch.randn(3, 256, device=device).bfloat16(), routing(device, 3, 2, 2)
    fused_moe(x, w13, w2, weight, ids, backend="triton")
    assert w2._storage.validity.largest_scale == int(w2._storage.scale.max()) < 129
    w2.scale_view.copy_(w2.scale_view.clone() + 20)
    dense13, dense2 = (w.dequantize(torch.float64).cpu() for w in (w13, w2))
    expected = dense_moe(x.cpu(), dense13, dense2, weight.cpu(), ids.cpu())
    assert error(fused_moe(x, w13, w2, weight, ids, backend="triton"), expected) < bound
    assert w2._storage.validity.largest_scale >= 129


def test_a_graph_is_captured_and_replayed_for_another_routing(device: str, bound: float) -> None:
    if device == "cpu":
        pytest.skip("waits for --device cuda: there are no graphs on a CPU")
    w13, w2 = weights(device, 8, 512, 256)
    x, (weight, ids) = torch.randn(400, 512, device=device).bfloat16(), routing(device, 400, 8, 3)
    fused_moe(x, w13, w2, weight, ids, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(x, w13, w2, weight, ids, backend="triton")
    for seed in (1, 2):
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.rand(400, 8, device=device).topk(3).indices if seed == 1 else torch.zeros_like(ids))
        graph.replay()
        assert torch.equal(out, fused_moe(x, w13, w2, weight, ids, backend="triton"))


def test_its_version_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch for ROCm its distribution is called `pytorch-triton-rocm`."""

    def unknown(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", unknown)
    assert Triton().fingerprint() == importlib.import_module("triton").__version__


def test_scales_that_others_may_write_are_taken_for_the_largest() -> None:
    """Who holds operands writes past this package, as a rebalance does."""
    qdata, scale = (torch.full((2, 64, each), value, dtype=torch.uint8) for each, value in ((128, 0x22), (8, 127)))
    storage = (weight := ShuffledMXFP4Tensor(qdata, scale, gate_up=False))._storage
    assert storage.largest_scale() == 127
    operands = weight.as_kernel_operands(layout="mxfp4_separated")
    operands.scale.fill_(200)
    assert storage.largest_scale() == 255
    operands.release()
    assert storage.largest_scale() == 200
