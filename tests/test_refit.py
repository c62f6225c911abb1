# SPDX-License-Identifier: MIT
"""New values past the tensor: inside a refit, by raw pointer, interrupted anywhere; a weight is right afterwards, or refuses."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import count
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from shuffled_tensor import ShuffledMXFP4Tensor, dequantize, fused_moe, layouts, override_arch, refit
from shuffled_tensor.tensor import storage
from shuffled_tensor.testing import fake_aiter

from .support.bytes import LAYOUTS, SHAPES, addresses, marked_parts, poke, weight_of
from .support.judges import assert_holds, dense, in_memory

Parts = tuple[Tensor, Tensor]
SMALL = (2, 96, 160)


def module_with(*weights: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    for name, weight in zip(("w13", "w2"), weights, strict=False):
        module.register_parameter(name, nn.Parameter(weight))
    return module


def poke_weight(weight: ShuffledMXFP4Tensor, parts: Parts, layout: str = "none") -> None:
    for target, values in zip(
        (weight.qdata, weight.scale), in_memory(parts, layout, gate_up=weight.gate_up), strict=True
    ):
        poke(target, values)


# --- what a refit is


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw_writes_of_everything(shape: tuple[int, int, int], gate_up: bool, layout: str) -> None:
    old, new = marked_parts(*shape), marked_parts(*shape, salt=1)
    module = module_with(weight_of(old, layout, gate_up=gate_up))
    alias, held, kept = module.w13.detach(), module.state_dict()["w13"], module.w13[1]
    address = addresses(module.w13)
    with refit(module) as opened:
        assert opened is module
        assert addresses(module.w13) == addresses(alias) == address
        for found, expected in zip(
            (module.w13.qdata, module.w13.scale), in_memory(old, "none", gate_up=gate_up), strict=True
        ):
            assert torch.equal(found, expected)  # canonical, padded
        poke_weight(module.w13, new)
    for weight in (module.w13, alias, held):
        assert_holds(weight, new, layout)
        assert addresses(weight) == address
    assert torch.equal(kept.dequantize(torch.float64), dense(*new)[1])
    with refit(module):  # nothing written
        pass
    assert_holds(alias, new, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partial_writes_by_every_means(layout: str) -> None:
    parts = qdata, scale = marked_parts(*SMALL)
    module = module_with(weight_of(parts, layout))
    other = marked_parts(*SMALL, salt=1)
    with refit(module):
        weight = module.w13
        poke(weight.qdata[1, 256 + 3, :80], other[0][1, 48 + 3])  # a row of up, by address
        weight.scale[0, 5, 2] = 99  # as a plain tensor
        weight.qdata_view[0].narrow(0, 40, 20).copy_(other[0][0, 40:60])  # as a loader does
        weight.data[1, :10].copy_(weight_of(other)[1, :10])
    qdata[1, 51], scale[0, 5, 2] = other[0][1, 51], 99
    qdata[0, 40:60] = other[0][0, 40:60]
    qdata[1, :10], scale[1, :10] = other[0][1, :10], other[1][1, :10]
    assert_holds(module.w13, parts, layout)
    with refit(module):
        module.w13.copy_(weight_of(other, "mxfp4_moe"))
        with pytest.raises(RuntimeError, match="it is being written in a refit"):  # all of it, but it is still open
            module.w13.dequantize()
    assert_holds(module.w13, other, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
def test_pads_are_rewritten(gate_up: bool, layout: str) -> None:
    """Whoever writes a whole tensor of some other loader's writes its pads too."""
    new = marked_parts(*SMALL, salt=1)
    module = module_with(weight_of(marked_parts(*SMALL), layout, gate_up=gate_up))
    with refit(module):
        for target, values in zip((module.w13.qdata, module.w13.scale), new, strict=True):
            target.fill_(0xFF)  # a scale of NaN
            halves = target.view(2, 2 if gate_up else 1, 256, -1)
            halves[:, :, : 48 if gate_up else 96, : values.shape[-1]] = values.view(
                2, halves.shape[1], -1, values.shape[-1]
            )
    assert_holds(module.w13, new, layout)


def test_several_weights_each_once() -> None:
    """Tied parameters and parameters that are experts of one storage are one weight; a buffer is another."""
    parts, down = marked_parts(*SMALL), marked_parts(2, 160, 64, salt=5)
    weight = weight_of(parts, "mxfp4_moe")
    module = module_with(weight, weight.detach())
    module.expert = nn.Parameter(weight[1])
    module.child = nn.Module()
    module.child.register_buffer("down", weight_of(down, "mxfp4_separated", gate_up=False))
    module.bias = nn.Parameter(torch.zeros(3))
    with refit(module):
        new, new_down = marked_parts(*SMALL, salt=1), marked_parts(2, 160, 64, salt=6)
        poke_weight(weight, new)
        poke_weight(module.child.down, new_down)
    assert_holds(module.w2, new, "mxfp4_moe")
    assert torch.equal(module.expert.dequantize(torch.float64), dense(*new)[1])
    assert_holds(module.child.down, new_down, "mxfp4_separated")


def good(weight: ShuffledMXFP4Tensor) -> ShuffledMXFP4Tensor:
    """A usable weight whose bytes lie as those of `weight`, so that a copy of bytes would do."""
    return weight_of(marked_parts(*SMALL, salt=8), "none" if not weight.is_shuffled else weight.shuffle_kind)


USES: dict[str, Callable[[ShuffledMXFP4Tensor], object]] = {
    "dequantize": lambda w: w.dequantize(),
    "an expert": lambda w: w[0].dequantize(),
    "rows": lambda w: w[:, :48].clone(),
    "checksum": lambda w: w.logical_checksum(),
    "equal": lambda w: torch.equal(w, w),
    "linear": lambda w: torch.nn.functional.linear(torch.ones(1, 160), w[0]),
    "fused_moe": lambda w: fused_moe(
        torch.ones(1, 160), w, weight_of(marked_parts(2, 160, 64), gate_up=False)[..., :32].clone(), torch.ones(1, 1), torch.zeros(1, 1).int()
    ),
    "codes": lambda w: w.qdata_view.clone(),
    "shuffle_": lambda w: w.shuffle_("mxfp4_separated"),
    "clone": lambda w: w.clone(),
    "to": lambda w: w.half(),
    "pickle": lambda w: pickle.dumps(w),
    "share": lambda w: ForkingPickler.dumps(w),
    "compile": lambda w: w.__tensor_flatten__(),
    "index": lambda w: w[torch.tensor([1])],
    "index_select": lambda w: w.index_select(0, torch.tensor([1])),
    "shard": lambda w: w.shard(0, 2, dim="expert"),
    "copied from": lambda w: good(w).copy_(w),
    "an expert copied from": lambda w: good(w)[1].copy_(w[1]),
    "rows copied from": lambda w: good(w)[:, :9].copy_(w[:, :9]),
    "loaded from": lambda w: module_with(good(w)).load_state_dict({"w13": w}),
    "index_copied from": lambda w: good(w).index_copy_(0, torch.tensor([0]), w[:1]),
    "index_put from": lambda w: good(w).__setitem__(torch.tensor([0]), w[:1]),
    "cat": lambda w: torch.cat([w, good(w)]),
    "cat behind another": lambda w: torch.cat([good(w), w]),
    "stack": lambda w: torch.stack([good(w)[0], w[0]]),
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("interrupted", [False, True], ids=["open", "interrupted"])
@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_every_use_of_a_half_written_weight_is_refused(
    use: Callable[[ShuffledMXFP4Tensor], object], interrupted: bool, layout: str
) -> None:
    module = module_with(
        weight_of(marked_parts(2, 64, 160) if use is USES["fused_moe"] else marked_parts(*SMALL), layout)
    )
    if interrupted:
        with pytest.raises(KeyError), refit(module):
            raise KeyError
    with nullcontext() if interrupted else refit(module):
        why = (
            r"a refit ended early \(KeyError\), .*; write it whole, with load_state_dict, copy_ or another refit, or say"
            if interrupted
            else "it is being written in a refit; wait until that ends"
        )
        with pytest.raises(RuntimeError, match=f"this weight cannot be used: {why}"):
            use(module.w13)


@pytest.mark.parametrize("source", ["same layout", "other layout"])
def test_what_is_copied_from_a_half_written_weight_is_nowhere(source: str) -> None:
    """It is refused before the first byte of the other one is gone."""
    kind = "mxfp4_moe" if source == "same layout" else "none"
    module, parts = module_with(weight_of(marked_parts(*SMALL), kind)), marked_parts(*SMALL, salt=8)
    for write in (
        lambda w, bad: w.copy_(bad),
        lambda w, bad: w.index_copy_(0, torch.tensor([1, 0]), bad),
        lambda w, bad: w.index_copy_(0, torch.tensor([], dtype=torch.int64), bad[:0]),
        lambda w, bad: w[:, :9].copy_(bad[:, :9]),
    ):
        other = weight_of(parts, "mxfp4_moe")
        with refit(module), pytest.raises(RuntimeError, match="this weight cannot be used"):
            write(other, module.w13)
        assert_holds(other, parts, "mxfp4_moe")


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_only_all_of_its_experts_make_a_weight_good_again(layout: str) -> None:
    parts = marked_parts(*SMALL, salt=1)
    module, new = module_with(weight_of(marked_parts(*SMALL), layout)), weight_of(parts)
    with pytest.raises(KeyError), refit(module):
        raise KeyError
    weight = module.w13
    weight.index_copy_(0, torch.tensor([1]), new[1:])
    weight[:, :48].index_copy_(0, torch.tensor([1, 0]), new[:, :48][[1, 0]])
    with pytest.raises(RuntimeError, match="this weight cannot be used"):
        weight.dequantize()
    weight.index_copy_(0, torch.tensor([1, 0]), new[[1, 0]])
    assert torch.equal(weight.dequantize(torch.float64), dense(*parts))


def test_bytes_of_a_half_written_weight_are_not_taken_for_plain_ones() -> None:
    weight = weight_of(marked_parts(1, 256, 256))
    with suppress(KeyError), refit(weight):
        raise KeyError
    for take in (lambda q, s: ShuffledMXFP4Tensor(q, s, gate_up=False), dequantize):
        with pytest.raises(
            ValueError, match=r"a ShuffledMXFP4Tensor that is unusable \(a refit ended early \(KeyError"
        ):
            take(weight.qdata, weight.scale[..., :8])


def test_a_refit_inside_a_refit_is_refused() -> None:
    new = marked_parts(*SMALL, salt=1)
    module = module_with(weight_of(marked_parts(*SMALL), "mxfp4_moe"))
    with refit(module):
        poke_weight(module.w13, new)
        for call in (
            lambda: refit(module).__enter__(),
            module.w13.mark_canonical_,
            partial(module.w13.mark_shuffled_, "mxfp4_moe"),
        ):
            with pytest.raises(RuntimeError, match="refit"):
                call()
    assert_holds(module.w13, new, "mxfp4_moe")


@pytest.mark.parametrize(
    ("version", "layout"), [("#3470 (shuffle_kind)", "mxfp4_moe"), ("v0.1.18 and later", "mxfp4_separated")]
)
def test_operands_handed_out_see_new_values_in_their_layout(version: str, layout: str) -> None:
    new = [marked_parts(*SMALL, salt=salt) for salt in range(1, 5)]
    with override_arch("gfx950"), fake_aiter(version):
        module = module_with(weight_of(marked_parts(*SMALL)))
        operands = module.w13.as_kernel_operands()

        def assert_operands_hold(parts: Parts) -> None:
            assert_holds(module.w13, parts, layout)
            memory = in_memory(parts, layout, gate_up=True)
            for operand, bytes_ in zip((operands.weight, operands.scale), memory, strict=True):
                assert torch.equal(operand.view(torch.uint8), bytes_)

        address = addresses(module.w13)
        with refit(module):
            poke_weight(module.w13, new[0])
        assert_operands_hold(new[0])
        poke_weight(module.w13, new[1])
        module.w13.mark_canonical_()
        assert_operands_hold(new[1])
        other = LAYOUTS[3 - LAYOUTS.index(layout)]
        poke_weight(module.w13, new[2], other)
        module.w13.mark_shuffled_(other)
        assert_operands_hold(new[2])
        with suppress(KeyError), refit(module):
            raise KeyError
        module.w13.copy_(weight_of(new[3], other))
        assert_operands_hold(new[3])
        with pytest.raises(RuntimeError, match="handed out by as_kernel_operands"):
            module.w13.unshuffle_()
        with pytest.raises(RuntimeError, match="handed out by as_kernel_operands.* copy_"):
            module.w13.data = weight_of(new[0], layout)
        assert addresses(module.w13) == address == [operand.data_ptr() for operand in (operands.weight, operands.scale)]


@pytest.mark.parametrize("share", [ForkingPickler.dumps, lambda w: w.share_memory_()], ids=["sent", "share_memory_"])
def test_memory_that_another_process_reads(share: Callable[[ShuffledMXFP4Tensor], object]) -> None:
    """It cannot be rearranged under the reader, nor replaced under the writer: refused, and nothing is left open."""
    parts, new = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    module = module_with(weight_of(parts), weight_of(parts, "mxfp4_moe"))
    share(module.w2)
    with pytest.raises(RuntimeError, match="another process .* copy_ or load_state_dict"):
        refit(module).__enter__()
    assert_holds(module.w13, parts, "none")
    address = addresses(module.w2)
    module.w2.copy_(weight_of(new))
    assert_holds(module.w2, new, "mxfp4_moe")
    assert addresses(module.w2) == address
    share(module.w13)  # canonical already: nothing is rearranged
    address = addresses(module.w13)
    del module.w2
    with refit(module):
        poke_weight(module.w13, new)
    assert_holds(module.w13, new, "none")
    assert addresses(module.w13) == address


@pytest.mark.parametrize("share", [ForkingPickler.dumps, lambda w: w.share_memory_()], ids=["sent", "share_memory_"])
def test_memory_that_took_its_place_is_nobody_elses(share: Callable[[ShuffledMXFP4Tensor], object]) -> None:
    """So it is laid out anew where it is."""
    weight = weight_of(marked_parts(*SMALL))
    share(weight)
    shared = addresses(weight)
    replaced = addresses(weight.shuffle_("mxfp4_moe"))
    assert replaced != shared
    assert addresses(weight.unshuffle_()) == replaced
    with refit(nn.ParameterList([weight.shuffle_("mxfp4_separated")])):
        poke_weight(weight, marked_parts(*SMALL, salt=1))
    assert addresses(weight) == replaced


# --- interrupted


def again(module: nn.Module, parts: list[Parts]) -> None:
    with refit(module):
        for weight, values in zip(module.parameters(), parts, strict=True):
            poke_weight(weight, values)


def loaded(module: nn.Module, parts: list[Parts]) -> None:
    weights = (
        weight_of(p, "mxfp4_separated", gate_up=w.gate_up) for p, w in zip(parts, module.parameters(), strict=True)
    )
    module.load_state_dict(module_with(*weights).state_dict())


def copied(module: nn.Module, parts: list[Parts]) -> None:
    for weight, values in zip(module.parameters(), parts, strict=True):
        weight.copy_(weight_of(values, gate_up=weight.gate_up))


def marked_canonical(module: nn.Module, parts: list[Parts]) -> None:
    for weight, values in zip(module.parameters(), parts, strict=True):
        poke_weight(weight, values)
        weight.mark_canonical_()


def marked_shuffled(module: nn.Module, parts: list[Parts]) -> None:
    for weight, values in zip(module.parameters(), parts, strict=True):
        poke_weight(weight, values, "mxfp4_moe")
        weight.mark_shuffled_("mxfp4_moe")


RECOVERIES = [again, loaded, copied, marked_canonical, marked_shuffled]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writes", range(5))
@pytest.mark.parametrize("recover", RECOVERIES)
def test_an_exception_between_writes(recover: Callable[..., None], writes: int, layout: str) -> None:
    shapes = SMALL, (2, 160, 64)
    old, new, last = ([marked_parts(*shape, salt=salt) for shape in shapes] for salt in (0, 1, 2))
    module = module_with(*(weight_of(p, layout, gate_up=g) for p, g in zip(old, (True, False), strict=True)))
    address = addresses(*module.parameters())
    values = [
        part for p, w in zip(new, module.parameters(), strict=True) for part in in_memory(p, "none", gate_up=w.gate_up)
    ]
    with suppress(KeyError), refit(module):
        targets = [part for weight in module.parameters() for part in (weight.qdata, weight.scale)]
        for target, source in zip(targets[:writes], values, strict=False):
            poke(target, source)
        raise KeyError("connection lost")
    for weight in module.parameters():
        weight[1].copy_(weight_of(marked_parts(1, *weight.shape[1:]), gate_up=weight.gate_up)[0])  # not all of it
        weight.qdata_view.copy_(marked_parts(*weight.shape)[0])
        with pytest.raises(RuntimeError, match=r"cannot be used: a refit ended early \(KeyError\)"):
            weight.dequantize()
    recover(module, last)
    for weight, parts in zip(module.parameters(), last, strict=True):
        assert_holds(weight, parts, "mxfp4_moe" if recover is marked_shuffled else layout)
    assert addresses(*module.parameters()) == address


def test_quantising_over_an_interrupted_refit() -> None:
    module = module_with(weight_of(marked_parts(*SMALL), "mxfp4_moe"))
    with suppress(KeyError), refit(module):
        module.w13.qdata.fill_(0xFF)
        raise KeyError
    values = dense(*marked_parts(*SMALL, salt=1))
    module.w13.refit_from_hp_(values.float())
    assert module.w13.is_shuffled
    assert torch.equal(module.w13.dequantize(torch.float64), values)


class Cut(BaseException):
    """As KeyboardInterrupt, from anywhere."""


class CutAt:
    """Ends the n-th of all calls that write bytes, copies after half of it."""

    def __init__(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, copy_, setitem = count(), Tensor.copy_, Tensor.__setitem__

        def cut_copy(target: Tensor, source: Tensor, *args: Any) -> Tensor:
            if type(target) is not Tensor or next(calls) != n:
                return copy_(target, source, *args)
            half = len(target) // 2
            copy_(target[:half], source[:half])
            raise Cut

        def cut_setitem(target: Tensor, place: Any, value: Any) -> None:
            if type(target) is Tensor and next(calls) == n:
                raise Cut
            setitem(target, place, value)

        monkeypatch.setattr(Tensor, "copy_", cut_copy)
        monkeypatch.setattr(Tensor, "__setitem__", cut_setitem)


@pytest.mark.parametrize("recover", RECOVERIES)
def test_cut_at_every_write_of_ours(recover: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and closing move bytes too: a cut there leaves the old weight, the new one, or one that refuses."""
    monkeypatch.setattr(layouts, "_IN_PLACE_SCRATCH", {"cpu": 1})  # expert by expert
    shapes = SMALL, (2, 160, 64)
    old, new, last = ([marked_parts(*shape, salt=salt) for shape in shapes] for salt in (0, 1, 2))
    for n in count():
        module = module_with(*(weight_of(p, "mxfp4_moe", gate_up=g) for p, g in zip(old, (True, False), strict=True)))
        with monkeypatch.context() as patch:
            CutAt(n, patch)
            try:
                again(module, new)
            except Cut:
                pass
            else:
                break
        for place, weight in enumerate(module.parameters()):
            try:
                found = weight.dequantize(torch.float64)
            except RuntimeError as error:
                if "this weight cannot be used" not in str(error):
                    raise
            else:
                assert any(torch.equal(found, dense(*parts[place])) for parts in (old, new)), f"garbage, cut at {n}"
        try:
            recover(module, last)
        except RuntimeError as error:
            if recover is not again or "this weight cannot be used" not in str(error):
                raise
            copied(module, last)  # bytes that were cut on the way to the refit are not row-major: it refuses them
        for weight, parts in zip(module.parameters(), last, strict=True):
            assert_holds(weight, parts, weight.shuffle_kind if weight.is_shuffled else "none")
    assert n > 50


WRITES: dict[str, Callable[[ShuffledMXFP4Tensor], object]] = {
    "copy_": lambda w: w.copy_(weight_of(marked_parts(*SMALL, salt=1), w.shuffle_kind or "none")),
    "copy_ from another layout": lambda w: w.copy_(weight_of(marked_parts(*SMALL, salt=1), "mxfp4_separated")),
    "refit_from_hp_": lambda w: w.refit_from_hp_(dense(*marked_parts(*SMALL, salt=1)).float()),
    "rows": lambda w: w[:, :48].copy_(weight_of(marked_parts(*SMALL, salt=1))[:, :48]),
    "codes": lambda w: w.qdata_view.copy_(marked_parts(*SMALL, salt=1)[0]),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([1]), weight_of(marked_parts(*SMALL, salt=1))[1:]),
    "permute_experts_": lambda w: w.permute_experts_([1, 0]),
    "shuffle_": lambda w: w.shuffle_("mxfp4_separated"),
    "unshuffle_": lambda w: w.unshuffle_(),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_cut_while_a_weight_is_written(
    write: Callable[[ShuffledMXFP4Tensor], object], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what it was, or what it was to be, or it refuses: half of each is garbage that runs."""
    monkeypatch.setattr(layouts, "_IN_PLACE_SCRATCH", {"cpu": 1})
    old, last = marked_parts(*SMALL), marked_parts(*SMALL, salt=2)
    whole = weight_of(old, layout)
    write(whole)
    for n in count():
        weight = weight_of(old, layout)
        with monkeypatch.context() as patch:
            CutAt(n, patch)
            try:
                write(weight)
            except Cut:
                pass
            else:
                break
        try:
            found = weight.dequantize(torch.float64)
        except RuntimeError as error:
            if "this weight cannot be used" not in str(error):
                raise
        else:
            assert any(torch.equal(found, values) for values in (dense(*old), whole.dequantize(torch.float64))), n
        weight.copy_(weight_of(last))
        assert_holds(weight, last, weight.shuffle_kind if weight.is_shuffled else "none")


class LiveBytes(TorchDispatchMode):
    """The most memory that new tensors hold at one time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.held: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is Tensor and out.untyped_storage()._cdata not in self.known:
            self.held.append((StorageWeakRef(out.untyped_storage()), out.untyped_storage().nbytes()))
        self.held = [(ref, size) for ref, size in self.held if not ref.expired()]
        self.peak = max(self.peak, sum({ref.cdata: size for ref, size in self.held}.values()))
        return out


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
def test_scratch_is_bounded(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of one byte everything goes expert by expert; a copy of the whole would be sixteen."""
    monkeypatch.setattr(layouts, "_IN_PLACE_SCRATCH", {"cpu": 1})
    monkeypatch.setattr(storage, "expert_chunks", partial(layouts.expert_chunks, limit=1))
    monkeypatch.setattr(storage, "_disable_current_modes", nullcontext)  # which would hide from the meter
    module = module_with(weight_of(marked_parts(16, 96, 160), layout))
    with LiveBytes(module.w13.qdata, module.w13.scale) as meter, refit(module):
        pass
    expert = module.w13[0].qdata.nbytes + module.w13[0].scale.nbytes
    assert meter.peak <= 2 * expert
    assert (meter.peak > expert // 2) == (layout != "none")  # it does measure


# --- bytes that somebody vouches for


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
def test_marks_are_believed(before: str, after: str, gate_up: bool) -> None:
    new = marked_parts(*SMALL, salt=1)
    weight = weight_of(marked_parts(*SMALL), before, gate_up=gate_up)
    alias = weight.detach()
    poke_weight(weight, new, after)
    if after == "none":
        pads = weight.scale.view(2, 2 if gate_up else 1, 256, 8)[:, :, 96:]
        pads.fill_(0xFF)  # scribbled on by the writer
        weight.qdata[:, 10, 80:] = 3
        assert weight.mark_canonical_() is weight
    else:
        assert weight.mark_shuffled_(after) is weight
    assert_holds(alias, new, after)
    alias.shuffle_("mxfp4_moe")
    assert_holds(weight, new, "mxfp4_moe")
    with pytest.raises(ValueError, match="unknown shuffle_kind 'moe'"):
        weight.mark_shuffled_("moe")
    assert_holds(weight, new, "mxfp4_moe")


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = module_with(weight_of(marked_parts(*SMALL), "mxfp4_moe"))
    for salt, write in ((1, again), (2, marked_canonical)):
        new = marked_parts(*SMALL, salt=salt)
        write(module, [new])
        assert torch.equal(module.w13.dequantize(torch.float64), dense(*new))


# --- values quantised in place


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refit_from_high_precision(dtype: torch.dtype, gate_up: bool, layout: str) -> None:
    weight = weight_of(marked_parts(*SMALL), layout, gate_up=gate_up)
    address = addresses(weight)
    values = dense(*marked_parts(*SMALL, salt=1))  # of the format, so quantising them changes none
    assert weight.refit_from_hp_(values.to(dtype)) is weight
    assert torch.equal(weight.dequantize(torch.float64), values)
    values[1] = dense(*marked_parts(1, 96, 160, salt=2))[0]
    weight[1].refit_from_hp_(values[1].to(dtype))
    values[:, 48:] = dense(*marked_parts(2, 48, 160, salt=3))
    weight[:, 48:].refit_from_hp_(values[:, 48:].to(dtype))
    assert torch.equal(weight.dequantize(torch.float64), values)
    assert addresses(weight) == address
    assert weight.is_shuffled == (layout != "none")


def test_refit_from_high_precision_obeys_the_rule_and_refuses() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    sevens = torch.full(SMALL, 7.0)
    assert (weight.refit_from_hp_(sevens, scale_rule="floor").dequantize() == 6).all()  # 4 * 1.75 saturates
    assert (weight.refit_from_hp_(sevens).dequantize() == 8).all()  # the next binade: 3.5 rounds to 4, times 2
    with pytest.raises(ValueError, match=r"values of shape \[2, 96, 160\], found \[2, 160, 96\]"):
        weight.refit_from_hp_(torch.zeros(2, 160, 96))
    with pytest.raises(TypeError, match="floating-point values, found torch.uint8"):
        weight.refit_from_hp_(torch.zeros(SMALL, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown scale_rule"):
        weight.refit_from_hp_(sevens, scale_rule="odd")
    assert (weight.dequantize() == 8).all()


def test_a_refit_that_could_not_be_closed_is_taken_up_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, say: the layout to return to is not forgotten."""
    module = module_with(weight_of(marked_parts(*SMALL), "mxfp4_moe"))
    new = marked_parts(*SMALL, salt=1)
    with monkeypatch.context() as patch, pytest.raises(MemoryError), refit(module):
        patch.setattr(storage.PackedStorage, "_move", lambda *move: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(RuntimeError, match=r"a refit ended early \(MemoryError\)"):
        module.w13.dequantize()
    with refit(module):
        poke_weight(module.w13, new)
    assert_holds(module.w13, new, "mxfp4_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_given_from_any_memory(layout: str) -> None:
    """Of which no padding has to be made: at an odd address, transposed, and as they are."""
    odd, turned, plain = (marked_parts(2, 512, 512, salt=salt) for salt in (1, 2, 3))
    weight = weight_of(marked_parts(2, 512, 512), layout)
    for parts, shown in (
        (odd, lambda part: torch.cat([part.new_zeros(1), part.flatten()])[1:].view(part.shape)),
        (turned, lambda part: part.mT.contiguous().mT),
        (plain, Tensor.clone),
    ):
        for view, part in zip((weight.qdata_view, weight.scale_view), parts, strict=True):
            view.copy_(shown(part))
        assert_holds(weight, parts, layout)


# --- a refit of everything


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_order", ["contiguous", "interleaved"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 512, 2048), (2, 544, 32)], ids=str)
def test_a_refit_of_everything(shape: tuple[int, int, int], row_order: str, layout: str) -> None:
    """Whatever has been left, it says so, and the weight can be used when another has written all of it."""
    new = marked_parts(*shape, salt=1)
    weight = weight_of(marked_parts(*shape), layout)
    rows, columns, each = shape[1], shape[2], weight.qdata.shape[1] // 2
    at = torch.arange(rows)  # of each row that is brought
    gates, ups = at[: rows // 2], at[rows // 2 :]
    brought = torch.stack([gates, ups], 1).flatten() if row_order == "interleaved" else at
    place = at if row_order == "interleaved" else torch.cat([gates, gates + each])

    def write(left_out: tuple[int, Any]) -> None:
        with refit(module_with(weight), whole=True, row_order=row_order):
            for part, (own, values) in enumerate(zip((weight.qdata, weight.scale), new, strict=True)):
                before = own.clone()
                own[:, place, : values.shape[-1]] = values[:, brought]
                if left_out[0] == part:
                    own[left_out[1]] = before[left_out[1]]

    write((2, ...))
    assert_holds(weight, new, layout)
    some = slice(0, min(61, rows // 2))
    left: list[tuple[int, Any]] = [
        (0, (-1,)),  # an expert
        (0, (0, place[-1], slice(0, columns // 2))),  # the last row
        (0, (0, some, slice(columns // 2 - 16, columns // 2))),  # the last columns of some rows
        (0, (0, place[1], slice(0, 61 * 16))),  # the beginning of a row
        (1, (0, place[-1], columns // 32 - 1)),  # one scale
    ]
    for part, chosen in left:
        with pytest.raises(RuntimeError, match=f"written all of it: {('qdata', 'scale')[part]} of expert"):
            write((part, chosen))
        with pytest.raises(RuntimeError, match="this weight cannot be used"):
            weight.dequantize()
    write((2, ...))
    assert_holds(weight, new, layout)


# --- opened by one call, ended by another


def test_begin_and_end() -> None:
    old, new = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    weights = [weight_of(old, "mxfp4_moe"), weight_of(old, "mxfp4_separated", gate_up=False)]
    update = refit({"layer": weights}).begin()
    for weight in weights:
        with pytest.raises(RuntimeError, match="it is being written in a refit"):
            weight.dequantize()
        poke_weight(weight, new)
    update.end()
    for weight, layout in zip(weights, ("mxfp4_moe", "mxfp4_separated"), strict=True):
        assert_holds(weight, new, layout)


def test_abandoned_between_the_calls() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    update = refit(weight).begin()
    update.abandon(TimeoutError())
    with pytest.raises(RuntimeError, match=r"a refit ended early \(TimeoutError\)"):
        weight.dequantize()


def test_forgotten_between_the_calls() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    update = refit(weight).begin()
    del update
    with pytest.raises(RuntimeError, match="a refit ended early"):
        weight.dequantize()


def test_one_that_was_never_opened_leaves_others_alone() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    with refit(weight):
        del (other := [refit(weight)])[0]
        assert not other
    assert_holds(weight, marked_parts(*SMALL), "mxfp4_moe")
