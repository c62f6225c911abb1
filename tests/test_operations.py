# SPDX-License-Identifier: MIT
"""The table of operations: whatever torch, a loader or an engine does to a parameter is right, or refused with what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.bytes import marked, marked_parts, weight_of
from .support.judges import MAGNITUDES, assert_holds, dense

SHAPE = (3, 96, 160)
INDEX = torch.tensor([2, 0])
MASK = torch.tensor([True, False, True])
# values of the format, which quantising does not change
NEW = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])[marked(*SHAPE, salt=9).long() % 16]


def test_the_page_is_what_the_registry_says() -> None:
    """`python tools/operations_page.py > docs/OPERATIONS.md` renews it."""
    committed = (Path(__file__).parents[1] / "docs" / "OPERATIONS.md").read_text()
    # in a process of its own, where nobody has added rows
    command = [sys.executable, str(Path(__file__).parents[1] / "tools" / "operations_page.py")]
    assert committed == subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_row_is_on_the_page_once() -> None:
    libraries = ("aten", "c10d", "shuffled_tensor", "aiter")
    shown = [
        row
        for group in ShuffledMXFP4Tensor.operations.groups.values()
        for row in group
        if str(row).startswith(libraries)
    ]
    assert len(shown) == len(set(shown))
    assert set(shown) == {row for row in ShuffledMXFP4Tensor.operations if str(row).startswith(libraries)}


# --- right: the same expression of our tensor and of a plain one of its values


def copied_as_a_list(weight: Tensor) -> Tensor:
    plain = torch.empty(SHAPE)
    torch._foreach_copy_([plain], [weight])
    return plain


READ: dict[str, Callable[[Tensor], Any]] = {
    "numel": lambda w: (w.numel(), w.nelement(), w.ndim, w.dim(), len(w)),
    "sizes": lambda w: (w.size(), w.size(-1), w.shape, w.stride(), w.is_contiguous(), w.storage_offset()),
    "size of a value": lambda w: (w.element_size(), w.itemsize),
    "kind of tensor": lambda w: (w.dtype, w.device, w.layout, w.is_sparse, w.is_quantized, w.is_meta, w.is_cuda),
    "kind of values": lambda w: (w.is_floating_point(), w.is_complex(), w.is_conj(), w.is_neg(), w.type()),
    "autograd": lambda w: (w.requires_grad, w.is_leaf, w.grad, w.grad_fn),
    "pinned": lambda w: w.is_pinned(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "alias": lambda w: torch.ops.aten.alias(w),
    "to_dense": lambda w: w.to_dense(),
    "contiguous": lambda w: w.contiguous(),
    "real": lambda w: w.real,
    "cpu": lambda w: w.cpu(),
    "to itself": lambda w: w.to(w.device, w.dtype),
    "double": lambda w: w.double(),
    "type": lambda w: w.type(torch.float64),
    "clone": lambda w: w.clone(memory_format=torch.preserve_format),
    "as_tensor": lambda w: torch.as_tensor(w),
    "expert": lambda w: w[1],
    "expert of a tensor": lambda w: w[torch.tensor(1)],
    "all": lambda w: w[...],
    "last experts": lambda w: w[-2:],
    "rows": lambda w: w[:, 5:50],
    "columns": lambda w: w[..., 32:96],
    "narrow": lambda w: w[1].narrow(0, 48, 48).narrow(1, 64, 32),
    "split along rows": lambda w: w.split([50, 46], 1)[1],
    "split along columns": lambda w: w.split(64, -1)[2],
    "chunk": lambda w: w.chunk(2, dim=1)[1],
    "chunk of experts": lambda w: w.chunk(2)[1],
    "tensor_split": lambda w: w.tensor_split(2)[1],
    "unbind": lambda w: w.unbind()[2],
    "unsafe_split": lambda w: torch.ops.aten.split.Tensor(w, 2)[1],
    "view as it is": lambda w: w.view(3, -1, 160),
    "view of one": lambda w: w[1:2].view(-1, 160),
    "view_as": lambda w: w.view_as(NEW),
    "reshape": lambda w: w.reshape(-1, 96, 160),
    "unflatten": lambda w: w[1].unflatten(0, (1, 96)),
    "flatten of one": lambda w: w[:1].flatten(0, 1),
    "unsqueeze": lambda w: w[0].unsqueeze(0),
    "unsqueeze from behind": lambda w: w[0].unsqueeze(-3),
    "None": lambda w: w[0][None],
    "squeeze": lambda w: w[:1].squeeze(),
    "squeeze of one": lambda w: w[:1].squeeze(0),
    "squeeze of several": lambda w: w.squeeze(0),
    "as_strided, as FSDP2 does": lambda w: w.as_strided(w.size(), w.stride(), w.storage_offset()),
    "index": lambda w: w[INDEX],
    "index_select": lambda w: w.index_select(0, INDEX),
    "mask": lambda w: w[MASK],
    "cat": lambda w: torch.cat([w, w[:1]]),
    "cat of one more": lambda w: torch.cat([w, w[0].unsqueeze(0)]),
    "stack": lambda w: torch.stack([w[2], w[0]]),
    "zeros_like": lambda w: torch.zeros_like(w),
    "new_zeros": lambda w: w.new_zeros(2, 3),
    "new_ones": lambda w: w.new_ones(2),
    "new_full": lambda w: w.new_full((2,), 0.25),
    "new_tensor": lambda w: w.new_tensor([1.0]),
    "new_empty": lambda w: w.new_empty(4, 2).shape,
    "new_empty of its shape": lambda w: (w.new_empty(SHAPE).shape, w.new_empty(SHAPE, dtype=torch.float16).dtype),
    "new_empty of an integer": lambda w: (w.new_empty(SHAPE, dtype=torch.int8).dtype, w.new_empty(2, dtype=torch.int8).dtype),
    "new_empty elsewhere": lambda w: (w.new_empty(2, device="meta").device, w.new_empty(SHAPE, device="meta").device),
    "new_empty_strided": lambda w: w.new_empty_strided((2, 3), (1, 2)).stride(),
    "empty_like": lambda w: torch.empty_like(w).shape,
    "linear": lambda w: F.linear(torch.ones(2, 160), w[1]),
    "matmul": lambda w: torch.ones(2, 160) @ w[1].t(),
    "bmm": lambda w: torch.bmm(torch.ones(3, 2, 160), w.transpose(1, 2)),
    "permute": lambda w: w.permute(0, 2, 1),
    "T": lambda w: w[0].T,
    "mT": lambda w: w.mT,
    "expand": lambda w: w[0].expand(2, 96, 160),
    "equal": lambda w: (torch.equal(w, w.clone()), torch.equal(w, w.double().float()), torch.equal(w, w[INDEX])),
    "allclose": lambda w: torch.allclose(w, w),
    "swapped types": lambda w: torch._has_compatible_shallow_copy_type(w, w.clone()),
    "into a plain tensor": lambda w: torch.empty(SHAPE).copy_(w),
    "a list of them": lambda w: copied_as_a_list(w),
    "type_as": lambda w: torch.ones(2).type_as(w),
}  # fmt: skip


@pytest.mark.parametrize("expression", READ.values(), ids=READ)
@pytest.mark.parametrize("layout", ["none", "mxfp4_moe", "mxfp4_moe, in inference mode"])
def test_read(expression: Callable[[Tensor], Any], layout: str) -> None:
    layout, *mode = layout.split(", ")
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, layout)
    with torch.inference_mode(bool(mode)):
        found, expected = expression(weight), expression(dense(*parts).float())
    if isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        found = found.dequantize() if isinstance(found, ShuffledMXFP4Tensor) else found
        assert torch.equal(found, expected)
    else:
        assert found == expected
    assert_holds(weight, parts, layout)


def write_in_place(weight: Tensor, place: Any, values: Any) -> None:
    weight[place] = values


WRITTEN: dict[str, Callable[[Tensor], Any]] = {
    "setitem of all": lambda w: write_in_place(w, ..., NEW),
    "setitem of data": lambda w: write_in_place(w.data, ..., NEW),
    "setitem of a slice": lambda w: write_in_place(w, slice(None), NEW),
    "setitem of an expert": lambda w: write_in_place(w, 1, NEW[0]),
    "setitem, one expert for all": lambda w: write_in_place(w, slice(None), NEW[0]),
    "setitem, a row for all": lambda w: write_in_place(w, 1, NEW[0, 0]),
    "setitem, a number for an expert": lambda w: write_in_place(w, 1, 0.5),
    "setitem, a number for rows": lambda w: write_in_place(w, (slice(None), slice(3, 9)), torch.tensor(-2.0)),
    "setitem of columns": lambda w: write_in_place(w, (0, slice(5, 9), slice(32, 64)), NEW[0, :4, :32]),
    "setitem of an index": lambda w: write_in_place(w, INDEX, NEW[:2]),
    "setitem, a number for an index": lambda w: write_in_place(w, INDEX, 3.0),
    "setitem of a mask": lambda w: write_in_place(w, MASK, NEW[:2]),
    "copy_": lambda w: w.copy_(NEW),
    "copy_ of an expert": lambda w: w.data[2].copy_(NEW[0]),
    "copy_ of half precision": lambda w: w.copy_(NEW.half()),
    "a list of copy_": lambda w: torch._foreach_copy_([w, w[1]], [NEW, NEW[0] / 2]),
    "fill_": lambda w: w.fill_(-1.5),
    "fill_ of a tensor": lambda w: w[0].fill_(torch.tensor(4)),
    "zero_": lambda w: w[1:].zero_(),
    "constant_": lambda w: nn.init.constant_(w, 0.5),
    "zeros_": lambda w: nn.init.zeros_(w),
    "index_copy_": lambda w: w.index_copy_(0, INDEX, NEW[:2]),
    "through squeeze": lambda w: w[1:2].squeeze(0).copy_(NEW[0]),
    "through unsqueeze": lambda w: w[1].unsqueeze(0).copy_(NEW[:1]),
    "through chunk": lambda w: w[0].chunk(2)[1].copy_(NEW[0, :48]),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("layout", ["none", "mxfp4_moe", "mxfp4_separated, in inference mode"])
def test_written(write: Callable[[Tensor], Any], layout: str) -> None:
    layout, *mode = layout.split(", ")
    parts = marked_parts(*SHAPE)
    weight, plain = weight_of(parts, layout), dense(*parts).float()
    alias = weight.detach()
    with torch.no_grad(), torch.inference_mode(bool(mode)):
        write(weight)
        write(plain)
    assert torch.equal(alias.dequantize(), plain)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")  # torch's own, and what it says is right
def test_a_mask_of_bytes_is_a_mask() -> None:
    weight, plain = weight_of(marked_parts(2, 96, 160), "mxfp4_moe"), dense(*marked_parts(2, 96, 160)).float()
    for tensor in (weight, plain):
        tensor[torch.tensor([0, 1], dtype=torch.uint8)] = NEW[:1]
    assert torch.equal(weight.dequantize(), plain)


def test_inference_mode_does_not_matter() -> None:
    """Neither to a loader nor to a weight that was made in it and is written outside."""
    parts, new = marked_parts(*SHAPE), marked_parts(*SHAPE, salt=1)
    with torch.inference_mode():
        made_inside = weight_of(parts, "mxfp4_moe")
    for weight in (weight_of(parts, "mxfp4_moe"), made_inside):
        with torch.inference_mode():
            for part, view in zip(new, (weight.qdata_view, weight.scale_view), strict=True):
                for expert in range(3):
                    for start in (0, 48):
                        view[expert].narrow(0, start, 48).copy_(part[expert].narrow(0, start, 48))
        assert_holds(weight, new, "mxfp4_moe")
        weight.refit_from_hp_(NEW)
        assert torch.equal(weight.dequantize(), NEW)
        weight.permute_experts_([1, 2, 0])
        assert torch.equal(weight.dequantize(), NEW[[1, 2, 0]])


def test_requires_grad_is_false_whatever_is_assigned() -> None:
    weight = weight_of(marked_parts(*SHAPE))
    for tensor in (weight, nn.Parameter(weight)):
        tensor.requires_grad = True
        assert not tensor.requires_grad
        assert not tensor.detach().requires_grad
        tensor.copy_(NEW)  # in grad mode, torch refuses it on a leaf that requires grad


# --- refused

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "add": (lambda w: w + 1, "dequantize"),
    "negation": (lambda w: -w, "dequantize"),
    "comparison": (lambda w: w == w, "torch.equal"),
    "isnan": (lambda w: w.isnan().any(), "dequantize"),
    "isfinite": (lambda w: w.isfinite().all(), "dequantize"),
    "abs": (lambda w: w.abs().max(), "dequantize"),
    "max": (lambda w: w.max(), "dequantize"),
    "norm": (lambda w: w.norm(), "dequantize"),
    "sum": (lambda w: w.sum(), "dequantize"),
    "std": (lambda w: w.std(), "dequantize"),
    "nan_to_num": (lambda w: w.nan_to_num(), "dequantize"),
    "where": (lambda w: torch.where(NEW > 0, w, 0.0), "dequantize"),
    "masked_fill": (lambda w: w.masked_fill(NEW > 0, 0.0), "dequantize"),
    "repeat": (lambda w: w.repeat(2, 1, 1), "pick experts with an index"),
    "scatter": (lambda w: w.scatter(0, torch.zeros(1, 1, 1).long(), 1.0), "pick experts"),
    "gather": (lambda w: w.gather(0, torch.zeros(1, 1, 1).long()), "pick experts"),
    "flip": (lambda w: w.flip(0), "pick experts"),
    "pad": (lambda w: F.pad(w, (0, 32)), "pick experts"),
    "ones_like": (lambda w: torch.ones_like(w), "dequantize"),
    "rand_like": (lambda w: torch.rand_like(w), "dequantize"),
    "grouped_mm": (lambda w: torch._grouped_mm(NEW[0], w, offs=torch.tensor([1, 2, 96], dtype=torch.int32)), "fused_moe"),
    "add_": (lambda w: w.add_(1), r"copy_ the result back"),
    "mul_": (lambda w: w.mul_(2), r"copy_ the result back"),
    "random_": (lambda w: w.random_(), r"copy_ the result back"),
    "nan_to_num_": (lambda w: w.nan_to_num_(), r"copy_ the result back"),
    "masked_fill_": (lambda w: w.masked_fill_(NEW > 0, 0.0), r"copy_ the result back"),
    "index_add_": (lambda w: w.index_add_(0, INDEX, NEW[:2]), r"copy_ the result back"),
    "scatter_": (lambda w: w.scatter_(0, torch.zeros(1, 1, 1).long(), 1.0), r"copy_ the result back"),
    "kaiming_uniform_": (lambda w: nn.init.kaiming_uniform_(w), r"copy_ the result back"),
    "flat": (lambda w: w.view(-1), r"\[46080\]: its shape is \[experts, N, K\]"),
    "parameters_to_vector": (lambda w: nn.utils.parameters_to_vector([w]), r"its shape is \[experts, N, K\]"),
    "flatten": (lambda w: w.flatten(0, 1), r"\[288, 160\]: its shape is"),
    "unsqueeze": (lambda w: w.unsqueeze(0), r"its shape is \[experts, N, K\]"),
    "as_strided": (lambda w: w.as_strided((3, 160, 96), (15360, 1, 160)), "slice it"),
    "view as bytes": (lambda w: w.view(torch.uint8), "make a new tensor"),
    "resize_": (lambda w: w.resize_(1), "make a new tensor"),
    "resize_as_": (lambda w: w.resize_as_(NEW[0]), "make a new tensor"),
    "set_": (lambda w: w.set_(NEW), "make a new tensor"),
    "data": (lambda w: setattr(w, "data", NEW), "copy_"),
    "storage": (lambda w: w.untyped_storage().data_ptr(), "storage"),
    "numpy": (lambda w: w.numpy(), "dequantize"),
    "dlpack": (lambda w: torch.from_dlpack(w), "dequantize"),
    "one row": (lambda w: w[0, 3], "slice of length 1"),
    "some rows": (lambda w: w[:, INDEX], "indexed by one vector, along its experts"),
    "part of a block": (lambda w: w[..., 5:], "multiples of 32"),
    "steps": (lambda w: w[:, ::2], "without steps"),
    "cat of plain": (lambda w: torch.cat([w, NEW]), "from_hp"),
    "cat along rows": (lambda w: torch.cat([w, w], 1), "would be gate, up, gate, up; join the gate halves"),
    "to int8": (lambda w: w.to(torch.int8), "logical dtype must be"),
    "to sparse": (lambda w: w.to_sparse(), "dequantize"),
}  # fmt: skip


@pytest.mark.parametrize(("expression", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(expression: Callable[[Tensor], Any], message: str) -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, "mxfp4_moe")
    with torch.no_grad(), pytest.raises((NotImplementedError, TypeError, ValueError, RuntimeError), match=message):
        expression(weight)
    assert_holds(weight, parts, "mxfp4_moe")


def interrupted() -> ShuffledMXFP4Tensor:
    weight = weight_of(marked_parts(*SHAPE))
    weight._storage.validity.touch("a test")
    return weight


NO_VALUES: dict[str, Callable[[], Tensor]] = {
    "integers": lambda: torch.ones(SHAPE, dtype=torch.int32),
    "packed bytes": lambda: torch.ones(SHAPE, dtype=torch.uint8),
    "float8": lambda: NEW.to(torch.float8_e4m3fn),
    "on the meta device": lambda: NEW.to("meta"),
    "ours, on the meta device": lambda: weight_of(marked_parts(*SHAPE)).to("meta"),
    "ours, not usable": interrupted,
    "of another shape": lambda: torch.ones(3, 96, 192),
}  # fmt: skip


@pytest.mark.parametrize("source", NO_VALUES.values(), ids=NO_VALUES)
@pytest.mark.parametrize(
    "write",
    [
        lambda w, new: w.copy_(new),
        lambda w, new: w[1:].copy_(new[1:]),
        lambda w, new: w.index_copy_(0, torch.arange(3), new),
        lambda w, new: w.index_put_((torch.arange(3),), new),
        lambda w, new: torch._foreach_copy_([w], [new]),
    ],
    ids=["copy_", "copy_ of some", "index_copy_", "index_put_", "foreach"],
)
def test_what_has_no_values_is_refused_before_anything_is_written(
    write: Callable[[Tensor, Tensor], Any], source: Callable[[], Tensor]
) -> None:
    """An exception in the middle of a write leaves a weight unusable: this one comes before."""
    parts, values = marked_parts(*SHAPE), source()
    weight = weight_of(parts, "mxfp4_moe")
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        write(weight, values)
    assert_holds(weight, parts, "mxfp4_moe")


def test_quantised_weights_are_not_quantised_again() -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, "mxfp4_moe")
    with pytest.raises(TypeError, match="copy_ takes it as it is"):
        weight.refit_from_hp_(weight_of(marked_parts(*SHAPE, salt=1)))
    with pytest.raises(ValueError, match="meta device"):
        weight.refit_from_hp_(NEW.to("meta"))
    assert_holds(weight, parts, "mxfp4_moe")


def test_an_operation_that_is_not_in_the_table_says_what_to_do() -> None:
    with pytest.raises(
        NotImplementedError,
        match=r"aten\.sort\.default is not defined on a ShuffledMXFP4Tensor; its bytes .*: call \.dequantize\(\) for a "
        "plain tensor of its values$",
    ):
        weight_of(marked_parts(*SHAPE)).sort()


def test_collectives_are_refused_where_ranks_have_not_agreed() -> None:
    """A rank that received the bytes would not know how they lie."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for call in (
            lambda: torch.distributed.broadcast(weight, 0),
            lambda: torch.distributed.all_gather([weight], weight),
        ):
            with pytest.raises(NotImplementedError, match=r"call shuffled_tensor\.agree_\(weights, group\)"):
                call()
        with pytest.raises(NotImplementedError, match=r"reduce \.dequantize\(\)"):
            torch.distributed.all_reduce(weight)
        with pytest.raises(NotImplementedError, match="give it .dequantize"):  # set_model_state_dict, DDP
            torch.distributed._broadcast_coalesced(torch.distributed.group.WORLD, [weight], 500, 0)
        # row-major bytes, to a rank whose weight lies otherwise
        other = weight_of(marked_parts(*SHAPE, salt=1), "mxfp4_separated")
        for own, there in ((weight.qdata_view, other.qdata_view), (weight.scale_view, other.scale_view)):
            sent = own.clone()
            torch.distributed.broadcast(sent, 0)
            there.copy_(sent)
        assert_holds(other, marked_parts(*SHAPE), "mxfp4_separated")
    finally:
        torch.distributed.destroy_process_group()
    assert_holds(weight, marked_parts(*SHAPE), "mxfp4_moe")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_record_stream() -> None:
    weight = weight_of(marked_parts(*SHAPE)).cuda()
    weight.record_stream(torch.cuda.Stream())
    weight[:, :48].record_stream(torch.cuda.Stream())
    assert_holds(weight.cpu(), marked_parts(*SHAPE), "none")
