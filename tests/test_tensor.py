# SPDX-License-Identifier: MIT
"""The tensor as a value: whatever is done to it, and in whatever layout, it holds the numbers that its bytes meant when it was made."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, quantize, shuffle_scale, shuffle_weight

from .support.bytes import coded, moderate_scales
from .support.judges import dense

KINDS = ("mxfp4_moe", "mxfp4_separated")
# (experts, rows, columns): padded in every way, and K=512, where a second shuffle would go unseen
SHAPES = [(2, 512, 512), (3, 96, 160), (1, 2, 32), (2, 514, 288)]


def parts(experts: int, rows: int, columns: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    return coded(experts, rows, columns // 2, salt=salt), moderate_scales(experts, rows, columns // 32, salt=salt + 7)


def make(
    shape: tuple[int, int, int] = (3, 96, 160), *, gate_up: bool = True, salt: int = 0, kind: str | None = None
) -> ShuffledMXFP4Tensor:
    return ShuffledMXFP4Tensor(
        *parts(*shape, salt=salt),
        gate_up=gate_up,
        row_order="contiguous" if gate_up else None,
        shuffle_kind=kind,
        dtype=torch.float32,
    )


def value(shape: tuple[int, int, int] = (3, 96, 160), salt: int = 0) -> Tensor:
    return dense(*parts(*shape, salt=salt)).float()


def module_with(weight: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    module.w13_weight = nn.Parameter(weight)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate_up", [True, False])
def test_the_value_is_the_same_in_every_layout(shape: tuple[int, int, int], gate_up: bool) -> None:
    weight = make(shape, gate_up=gate_up)
    checksum = weight.logical_checksum()
    address = weight.qdata.data_ptr(), weight.scale.data_ptr()
    for kind in (None, "mxfp4_moe", "mxfp4_separated", "mxfp4_moe", "none", "mxfp4_separated", "mxfp4_separated"):
        if kind is not None:
            assert weight.shuffle_(kind) is weight
            assert weight.is_shuffled == (kind != "none")
        assert torch.equal(weight.dequantize(), value(shape))
        assert weight.logical_checksum() == checksum
    assert weight.unshuffle_() is weight
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(*shape)))
    assert (weight.qdata.data_ptr(), weight.scale.data_ptr()) == address


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_layout(kind: str) -> None:
    qdata, scale = parts(2, 512, 512)
    weight = make((2, 512, 512)).shuffle_(kind)
    assert torch.equal(weight.qdata, shuffle_weight(qdata, kind, gate_up=True))
    assert torch.equal(weight.scale, shuffle_scale(scale, kind, gate_up=True))


def test_the_checksum_tells_values_apart() -> None:
    checksums = {
        make().logical_checksum(),
        make(salt=1).logical_checksum(),
        make((2, 96, 160)).logical_checksum(),
        make((3, 160, 96)).logical_checksum(),
        make()[1:].logical_checksum(),
    }
    assert len(checksums) == 5
    assert make()[0].logical_checksum() == make()[:1].logical_checksum()
    scale_changed = make()
    scale_changed.scale[2, 0, 0] += 1
    assert scale_changed.logical_checksum() not in checksums


def test_padding_is_defined_and_never_shows() -> None:
    weight = make((2, 96, 160))  # gate and up of 48 rows each
    qdata, scale = (part.view(2, 2, 256, -1) for part in (weight.qdata, weight.scale))
    assert weight.shape == (2, 96, 160)
    assert (qdata.shape[-1], scale.shape[-1]) == (128, 8)
    assert torch.equal(qdata[:, :, :48, :80].reshape(2, 96, 80), parts(2, 96, 160)[0])
    for part, width, fill in ((qdata, 80, 0), (scale, 5, 127)):
        assert (part[:, :, 48:] == fill).all()
        assert (part[:, :, :, width:] == fill).all()
    wide = ShuffledMXFP4Tensor(*parts(2, 160, 48 * 2), gate_up=False)
    assert (wide.qdata.shape[1], wide.qdata.shape[2] * 2) == (256, 256)  # agrees with w13 on both


def test_row_orders() -> None:
    qdata, scale = parts(2, 6, 64)
    contiguous = ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="contiguous")
    zipped = torch.tensor([0, 3, 1, 4, 2, 5])  # g0, u0, g1, ...
    interleaved = ShuffledMXFP4Tensor(qdata[:, zipped], scale[:, zipped], gate_up=True, row_order="interleaved")
    assert torch.equal(interleaved.dequantize(), contiguous.dequantize())
    assert interleaved.logical_checksum() == contiguous.logical_checksum()
    assert torch.equal(contiguous.dequantize(torch.float64), dense(qdata, scale))


def test_every_accepted_dtype_holds_the_same_bytes() -> None:
    qdata, scale = parts(2, 512, 512)
    for codes in (qdata, qdata.view(torch.int8), qdata.view(torch.float4_e2m1fn_x2)):
        for scales in (scale, scale.view(torch.float8_e8m0fnu)):
            weight = ShuffledMXFP4Tensor(codes.clone(), scales.clone(), gate_up=False)
            assert (weight.qdata.dtype, weight.scale.dtype) == (torch.uint8, torch.uint8)
            assert torch.equal(weight.dequantize(torch.float64), dense(qdata, scale))


def test_ownership_and_alignment() -> None:
    qdata, scale = parts(1, 256, 256)
    assert ShuffledMXFP4Tensor(qdata, scale, gate_up=False).qdata.data_ptr() == qdata.data_ptr()
    shifted = torch.cat([torch.zeros(8, dtype=torch.uint8), qdata.flatten()])[8:].view(1, 256, 128)  # as out of a file
    weight = ShuffledMXFP4Tensor(shifted, scale, gate_up=False).shuffle_("mxfp4_moe")
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts(1, 256, 256)))


def test_one_expert_without_its_dimension() -> None:
    qdata, scale = parts(1, 96, 160)
    weight = ShuffledMXFP4Tensor(qdata[0], scale[0], gate_up=True, row_order="contiguous", dtype=torch.float32)
    assert weight.shape == (96, 160)
    assert weight.qdata.shape == (512, 128)
    assert torch.equal(weight.shuffle_("mxfp4_moe").dequantize(), value((1, 96, 160))[0])
    assert torch.equal(copy.deepcopy(weight).dequantize(), value((1, 96, 160))[0])


def test_repr() -> None:
    weight = make(kind="mxfp4_moe")
    states = [make(), weight, make().shuffle_("mxfp4_separated"), make().half()[0]]
    lines = [repr(state) for state in states] + [repr(nn.Parameter(weight.shuffle_()))]
    assert_expected_inline(
        "\n".join(lines),
        """\
ShuffledMXFP4Tensor(shape=(3, 96, 160), dtype=torch.float32, gate_up=True, shuffle_kind=None, is_shuffled=False, device='cpu')
ShuffledMXFP4Tensor(shape=(3, 96, 160), dtype=torch.float32, gate_up=True, shuffle_kind='mxfp4_moe', is_shuffled=False, device='cpu')
ShuffledMXFP4Tensor(shape=(3, 96, 160), dtype=torch.float32, gate_up=True, shuffle_kind='mxfp4_separated', is_shuffled=True, device='cpu')
ShuffledMXFP4Tensor(shape=(96, 160), dtype=torch.float16, gate_up=True, shuffle_kind=None, is_shuffled=False, device='cpu')
ShuffledMXFP4Tensor(shape=(3, 96, 160), dtype=torch.float32, gate_up=True, shuffle_kind='mxfp4_moe', is_shuffled=True, device='cpu')""",
    )


# --- one storage, many tensors

ALIASES: dict[str, Callable[[ShuffledMXFP4Tensor], Tensor]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "Parameter": lambda w: nn.Parameter(w),
    "state_dict": lambda w: module_with(w).state_dict()["w13_weight"],
    "alias": lambda w: torch.ops.aten.alias(w),
    "all experts": lambda w: w[:],
    "contiguous": lambda w: w.contiguous(),
    "inference": lambda w: _in_inference_mode(w),
}


def _in_inference_mode(weight: ShuffledMXFP4Tensor) -> Tensor:
    with torch.inference_mode():
        return nn.Parameter(weight).detach()


@pytest.mark.parametrize("make_alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("through", ["original", "alias"])
def test_a_shuffle_through_one_is_seen_by_all(
    make_alias: Callable[[ShuffledMXFP4Tensor], Tensor], through: str
) -> None:
    weight = make((2, 512, 512))
    alias = make_alias(weight)
    assert isinstance(alias, ShuffledMXFP4Tensor)
    first = weight if through == "original" else alias
    first.shuffle_("mxfp4_moe")
    for seen in (weight, alias):
        assert (seen.is_shuffled, seen.shuffle_kind) == (True, "mxfp4_moe")
        assert torch.equal(seen.dequantize(), value((2, 512, 512)))
    weight.shuffle_("mxfp4_moe")  # not a second time
    assert torch.equal(alias.dequantize(), value((2, 512, 512)))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_experts_are_views(kind: str | None) -> None:
    weight = make((5, 96, 160))
    views = {
        "one": weight[3],
        "last": weight[-1],
        "some": weight[1:4],
        "every other": weight[::2],
        "of a view": weight[1:][::2][1],
    }
    if kind is not None:
        weight[2:3].shuffle_(kind)  # shuffling through a view shuffles the storage
    expected = value((5, 96, 160))
    assert torch.equal(views["one"].dequantize(), expected[3])
    assert torch.equal(views["last"].dequantize(), expected[-1])
    assert torch.equal(views["some"].dequantize(), expected[1:4])
    assert torch.equal(views["every other"].dequantize(), expected[::2])
    assert torch.equal(views["of a view"].dequantize(), expected[1:][::2][1])
    views["some"].copy_(make((3, 96, 160), salt=50))
    assert torch.equal(weight.dequantize()[1:4], value((3, 96, 160), salt=50))
    assert torch.equal(weight.dequantize()[4], expected[4])


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_indexed_experts_are_copies(kind: str | None) -> None:
    weight = make((4, 96, 160))
    if kind is not None:
        weight.shuffle_(kind)
    expected = value((4, 96, 160))
    order = torch.tensor([2, 0, 2])
    for picked, rows in (
        (weight[order], order),
        (weight[[3, 1]], torch.tensor([3, 1])),
        (weight[torch.tensor([True, False, False, True])], torch.tensor([0, 3])),
        (weight.index_select(0, order), order),
        (weight[1:].index_select(0, order), order + 1),
    ):
        assert isinstance(picked, ShuffledMXFP4Tensor)
        assert picked.is_shuffled == (kind is not None)
        assert torch.equal(picked.dequantize(), expected[rows])
        picked.copy_(make((len(rows), 96, 160), salt=9))
    assert torch.equal(weight.dequantize(), expected)


COPIES: dict[str, Callable[[ShuffledMXFP4Tensor], Tensor]] = {
    "clone": lambda w: w.clone(),
    "to, copy": lambda w: w.to(torch.float32, copy=True),
    "deepcopy": lambda w: copy.deepcopy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": lambda w: _saved_and_loaded(w),
}


def _saved_and_loaded(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)["weight"]
    return loaded


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("window", [slice(None), slice(1, 3)], ids=str)
def test_copies_have_bytes_of_their_own(
    make_copy: Callable[[ShuffledMXFP4Tensor], Tensor], kind: str | None, window: slice
) -> None:
    weight = make((3, 512, 512), kind=kind)
    if kind is not None:
        weight.shuffle_()
    copied = make_copy(weight[window])
    assert isinstance(copied, ShuffledMXFP4Tensor)
    expected = value((3, 512, 512))[window]
    assert torch.equal(copied.dequantize(), expected)
    assert copied.shuffle_kind == kind
    copied.shuffle_("mxfp4_separated" if kind == "mxfp4_moe" else "mxfp4_moe")
    copied.copy_(torch.zeros_like(expected))
    assert torch.equal(weight[window].dequantize(), expected)
    assert weight.shuffle_kind == kind


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_keep_a_fixed_kind(make_copy: Callable[[ShuffledMXFP4Tensor], Tensor]) -> None:
    copied = make_copy(make(kind="mxfp4_moe"))
    assert isinstance(copied, ShuffledMXFP4Tensor)
    assert (copied.shuffle_kind, copied.is_shuffled) == ("mxfp4_moe", False)


def test_memory_shared_with_another_process_is_replaced() -> None:
    qdata, scale = parts(2, 512, 512)
    qdata.share_memory_()
    weight = ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="contiguous", dtype=torch.float32)
    alias = weight.detach()
    weight.shuffle_("mxfp4_moe")
    assert torch.equal(qdata, parts(2, 512, 512)[0])  # the other process may be reading it
    assert torch.equal(alias.dequantize(), value((2, 512, 512)))


def test_what_is_pickled_is_canonical_and_aliases_stay_aliases() -> None:
    weight = make((2, 512, 512)).shuffle_("mxfp4_moe")
    first, second = pickle.loads(pickle.dumps([weight, weight.detach()]))
    assert not first.is_shuffled
    first.shuffle_("mxfp4_separated")
    assert second.is_shuffled
    first, second = copy.deepcopy([weight, nn.Parameter(weight)])
    first.unshuffle_()
    assert not second.is_shuffled
    assert isinstance(second, nn.Parameter)
    assert weight.is_shuffled


def test_a_file_loads_in_a_new_process_that_only_imports_the_package(tmp_path: object) -> None:
    path = f"{tmp_path}/weight.pt"
    torch.save(make().shuffle_("mxfp4_moe"), path)
    program = f"import torch, shuffled_tensor; print(torch.load({path!r}, weights_only=True).logical_checksum())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == make().logical_checksum()


# --- in a module


def test_parameters_of_a_module() -> None:
    module = module_with(make())
    assert isinstance(module.w13_weight, nn.Parameter)
    assert isinstance(module.w13_weight, ShuffledMXFP4Tensor)
    assert list(dict(module.named_parameters())) == ["w13_weight"]
    assert not module.requires_grad_(True).w13_weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_module_to_dtype_keeps_the_bytes(dtype: torch.dtype) -> None:
    module = module_with(make().shuffle_("mxfp4_moe"))
    module.w13_weight.weight_loader = "a loader"
    module.to(dtype)
    assert module.w13_weight.dtype is dtype
    assert module.w13_weight.is_shuffled
    assert torch.equal(module.w13_weight.dequantize(), dense(*parts(3, 96, 160)).to(dtype))
    assert module.w13_weight.logical_checksum() == make().logical_checksum()
    assert isinstance(module.w13_weight, nn.Parameter)
    assert module.w13_weight.weight_loader == "a loader"  # a plain Parameter keeps it, so ours does
    assert not hasattr(module.state_dict()["w13_weight"], "weight_loader")


def test_module_to_meta() -> None:
    module = module_with(make()).to("meta")
    assert module.w13_weight.device.type == "meta"
    assert module.w13_weight.shape == (3, 96, 160)


def test_to_what_is_no_logical_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="the logical dtype must be torch.bfloat16, .* found torch.int8"):
        make().to(torch.int8)


def test_a_state_dict_taken_before_a_shuffle_stays_true() -> None:
    module = module_with(make((2, 512, 512)))
    before = module.state_dict()
    module.w13_weight.shuffle_("mxfp4_moe")
    assert before["w13_weight"].is_shuffled
    assert torch.equal(before["w13_weight"].dequantize(), value((2, 512, 512)))
    other = module_with(make((2, 512, 512), salt=4))
    other.load_state_dict(before)
    assert torch.equal(other.w13_weight.dequantize(), value((2, 512, 512)))


@pytest.mark.parametrize("mine", [None, *KINDS])
@pytest.mark.parametrize("theirs", [None, *KINDS])
@pytest.mark.parametrize("shape", [(2, 512, 512), (3, 96, 160)], ids=str)
def test_load_state_dict_keeps_layout_and_address(
    mine: str | None, theirs: str | None, shape: tuple[int, int, int]
) -> None:
    module, source = module_with(make(shape)), module_with(make(shape, salt=11))
    for holder, kind in ((module, mine), (source, theirs)):
        if kind is not None:
            holder.w13_weight.shuffle_(kind)
    address = module.w13_weight.qdata.data_ptr(), module.w13_weight.scale.data_ptr()
    module.load_state_dict(source.state_dict())
    assert (module.w13_weight.shuffle_kind, module.w13_weight.is_shuffled) == (mine, mine is not None)
    assert (module.w13_weight.qdata.data_ptr(), module.w13_weight.scale.data_ptr()) == address
    assert torch.equal(module.w13_weight.dequantize(), value(shape, salt=11))
    assert module.w13_weight.unshuffle_().logical_checksum() == make(shape, salt=11).logical_checksum()


def test_load_state_dict_assign_takes_the_storage() -> None:
    module, source = module_with(make()), module_with(make(salt=11).shuffle_("mxfp4_moe"))
    module.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(module.w13_weight, nn.Parameter)
    source.w13_weight.unshuffle_()
    assert not module.w13_weight.is_shuffled
    assert torch.equal(module.w13_weight.dequantize(), value(salt=11))


# --- copy_


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_quantises_floating_point_values(kind: str | None, dtype: torch.dtype) -> None:
    weight = make()
    if kind is not None:
        weight.shuffle_(kind)
    values = torch.randn(3, 96, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight.copy_(values)
    assert torch.equal(weight.dequantize(torch.float64), dense(*quantize(values)))
    weight[1].copy_(values[0])
    assert torch.equal(weight[1].dequantize(torch.float64), dense(*quantize(values[0])))


def test_copy_between_a_gate_up_weight_and_another() -> None:
    gate_up, down = make().shuffle_("mxfp4_moe"), make(gate_up=False, salt=3).shuffle_("mxfp4_separated")
    gate_up.copy_(down)
    assert torch.equal(gate_up.dequantize(), value(salt=3))
    padding = gate_up.unshuffle_().scale.view(3, 2, 256, 8)
    assert (padding[:, :, 48:] == 127).all()


def test_copy_into_a_plain_tensor() -> None:
    plain = torch.empty(3, 96, 160, dtype=torch.float64)
    assert plain.copy_(make().shuffle_("mxfp4_moe")) is plain
    assert torch.equal(plain, dense(*parts(3, 96, 160)))


@pytest.mark.parametrize("kind", [None, "mxfp4_moe"])
def test_copy_refuses_what_it_cannot_mean(kind: str | None) -> None:
    weight = make()
    if kind is not None:
        weight.shuffle_(kind)
    with pytest.raises(TypeError, match="found torch.uint8; packed bytes are written through .qdata_view"):
        weight.copy_(torch.zeros(3, 96, 160, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"values of shape \[3, 96, 160\], found shape \[96, 160\]"):
        weight.copy_(make()[0])
    assert torch.equal(weight.dequantize(), value())


# --- read as values


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_linear_and_matmul(kind: str | None, mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    weight, plain = make(), value()
    if kind is not None:
        weight.shuffle_(kind)
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(5, 160, generator=generator), torch.randn(96, generator=generator)
    batch = torch.randn(3, 5, 160, generator=generator)
    with mode():
        for found, expected in (
            (F.linear(x, weight[1]), F.linear(x, plain[1])),
            (F.linear(batch, weight[1], bias), F.linear(batch, plain[1], bias)),
            (x @ weight[0].T, x @ plain[0].T),
            (weight[0] @ x.T, plain[0] @ x.T),
            (weight[0] @ x[0], plain[0] @ x[0]),
            (torch.matmul(batch, weight.transpose(1, 2)), torch.matmul(batch, plain.transpose(1, 2))),
            (torch.matmul(weight, batch.mT), torch.matmul(plain, batch.mT)),
            (torch.bmm(batch, weight.mT), torch.bmm(batch, plain.mT)),
        ):
            assert type(found) is Tensor
            torch.testing.assert_close(found, expected)


def test_linear_has_a_gradient_for_its_input() -> None:
    x = torch.randn(5, 160, requires_grad=True)
    F.linear(x, make()[0]).sum().backward()
    torch.testing.assert_close(x.grad, value()[0].sum(0).expand(5, 160))


def test_equal_and_allclose_compare_values() -> None:
    weight, other = make(), make(salt=1)
    shuffled = make().shuffle_("mxfp4_moe")
    assert torch.equal(weight, shuffled)
    assert torch.equal(shuffled, value())
    assert torch.allclose(shuffled, weight)
    assert not torch.equal(weight, other)
    assert not torch.allclose(weight, other)


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w + 1,
        lambda w: w.add_(1),
        lambda w: w == w,
        lambda w: w.view(-1),
        lambda w: w.sum(),
        lambda w: w[..., 0],
        lambda w: w.normal_(),
    ],
)
def test_any_other_operation_is_refused(operation: Callable[[Tensor], object]) -> None:
    weight = make().shuffle_("mxfp4_moe")
    with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
        operation(weight)
    assert torch.equal(weight.dequantize(), value())


# --- kinds


def test_a_fixed_kind_is_kept() -> None:
    weight = make(kind="mxfp4_moe")
    assert (weight.shuffle_kind, weight.is_shuffled) == ("mxfp4_moe", False)
    assert weight.shuffle_().is_shuffled
    assert weight.unshuffle_().shuffle_kind == "mxfp4_moe"
    assert weight.shuffle_("mxfp4_separated").unshuffle_().shuffle_kind == "mxfp4_separated"
    assert make().shuffle_("mxfp4_moe").unshuffle_().shuffle_kind is None


def test_bad_input() -> None:
    qdata, scale = parts(2, 64, 64)
    cases: dict[str, Callable[[], object]] = {
        "float weights": lambda: ShuffledMXFP4Tensor(torch.zeros(2, 64, 64), scale, gate_up=False),
        "float scales": lambda: ShuffledMXFP4Tensor(qdata, scale.float(), gate_up=False),
        "rank": lambda: ShuffledMXFP4Tensor(qdata.view(2, 64, 2, 16), scale, gate_up=False),
        "K": lambda: ShuffledMXFP4Tensor(qdata[..., :24], scale, gate_up=False),
        "no K": lambda: ShuffledMXFP4Tensor(qdata[..., :0], scale[..., :0], gate_up=False),
        "scale shape": lambda: ShuffledMXFP4Tensor(qdata, scale[:, :32], gate_up=False),
        "scale rank": lambda: ShuffledMXFP4Tensor(qdata, scale[0], gate_up=False),
        "devices": lambda: ShuffledMXFP4Tensor(qdata, scale.to("meta"), gate_up=False),
        "no row order": lambda: ShuffledMXFP4Tensor(qdata, scale, gate_up=True),
        "row order": lambda: ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="zipped"),
        "row order of w2": lambda: ShuffledMXFP4Tensor(qdata, scale, gate_up=False, row_order="interleaved"),
        "odd rows": lambda: ShuffledMXFP4Tensor(qdata[:, :63], scale[:, :63], gate_up=True, row_order="contiguous"),
        "kind": lambda: ShuffledMXFP4Tensor(qdata, scale, gate_up=False, shuffle_kind="gguu"),
        "dtype": lambda: ShuffledMXFP4Tensor(qdata, scale, gate_up=False, dtype=torch.uint8),
        "from_hp of bytes": lambda: ShuffledMXFP4Tensor.from_hp(qdata, gate_up=False),
        "from_hp rank": lambda: ShuffledMXFP4Tensor.from_hp(torch.zeros(64), gate_up=False),
        "shuffle_ without a kind": lambda: make().shuffle_(),
        "shuffle_ kind": lambda: make().shuffle_("moe"),
        "select": lambda: make()[3],
        "rows": lambda: make()[:, 3],
        "rows in steps": lambda: make()[:, ::2],
        "columns": lambda: make()[..., 16:48],
        "index of a row": lambda: make()[0][torch.tensor([1])],
        "two indices": lambda: make()[torch.tensor([1]), torch.tensor([1])],
    }
    lines = []
    for name, call in cases.items():
        with pytest.raises((TypeError, ValueError, IndexError, NotImplementedError)) as error:
            call()
        lines.append(f"{name}: {error.type.__name__}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
float weights: TypeError: qdata must be torch.uint8 or torch.int8 or torch.float4_e2m1fn_x2, found torch.float32; quantise float weights with ShuffledMXFP4Tensor.from_hp
float scales: TypeError: scale must be torch.uint8 or torch.float8_e8m0fnu, found torch.float32; e8m0 scales are exponent bytes, not factors
rank: ValueError: qdata must be [experts, N, K/2] or [N, K/2], found shape [2, 64, 2, 16]; blocks [..., K/32, 16] become it with .flatten(-2)
K: ValueError: K must be a multiple of 32, found K=48 (qdata of shape [2, 64, 24] holds two columns a byte)
no K: ValueError: K must be a multiple of 32, found K=0 (qdata of shape [2, 64, 0] holds two columns a byte)
scale shape: ValueError: scale must be [2, 64, 2], one for 32 columns of qdata [2, 64, 32], found shape [2, 32, 2]
scale rank: ValueError: scale must be [2, 64, 2], one for 32 columns of qdata [2, 64, 32], found shape [64, 2]
devices: ValueError: qdata and scale must be on one device, found cpu and meta
no row order: ValueError: gate_up=True needs row_order='contiguous' (all gate rows, then all up rows: Quark, compressed-tensors, DeepSeek) or 'interleaved' (g0, u0, g1, u1, ...: gpt-oss), found None
row order: ValueError: gate_up=True needs row_order='contiguous' (all gate rows, then all up rows: Quark, compressed-tensors, DeepSeek) or 'interleaved' (g0, u0, g1, u1, ...: gpt-oss), found 'zipped'
row order of w2: ValueError: row_order='interleaved' needs gate_up=True; a weight without gate and up rows takes None or 'contiguous'
odd rows: ValueError: gate_up=True needs an even number of rows, half gate and half up, found N=63
kind: ValueError: unknown shuffle_kind 'gguu'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
dtype: TypeError: the logical dtype must be torch.bfloat16, torch.float16, torch.float32, torch.float64, found torch.uint8
from_hp of bytes: TypeError: the logical dtype must be torch.bfloat16, torch.float16, torch.float32, torch.float64, found torch.uint8
from_hp rank: ValueError: weight must be [experts, N, K] or [N, K], found shape [64]
shuffle_ without a kind: ValueError: this tensor was made without a shuffle_kind, so shuffle_() must be told: shuffle_('mxfp4_moe') or shuffle_('mxfp4_separated')
shuffle_ kind: ValueError: unknown shuffle_kind 'moe'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'
select: IndexError: index 3 is out of bounds for dimension 0 with size 3
rows: NotImplementedError: select along dim 1 of a ShuffledMXFP4Tensor of shape [3, 96, 160]: a single row or column is no weight; take a slice of length 1, or call .dequantize()
rows in steps: NotImplementedError: rows of a ShuffledMXFP4Tensor are sliced without steps; call .dequantize()
columns: ValueError: columns 16..48 cut through a block of 32 that shares a scale; slice at multiples of 32, or call .dequantize()
index of a row: NotImplementedError: index along dim 0 of a ShuffledMXFP4Tensor of shape [96, 160]: it goes along experts, dim 0 of three; slice rows and columns, or call .dequantize()
two indices: NotImplementedError: a ShuffledMXFP4Tensor is indexed by one vector, along its experts; call .dequantize() to index rows and columns""",
    )
