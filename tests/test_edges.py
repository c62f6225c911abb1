# SPDX-License-Identifier: MIT
"""Sharp edges: what swaps, shares, resizes, moves or rewrites a tensor behind its back is right, or refused."""

from __future__ import annotations

import copy
import ctypes
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor

from .support.bytes import LAYOUTS, addresses, marked_parts, weight_of
from .support.judges import assert_holds, dense, in_memory

SMALL = (3, 96, 160)


def module_with(weight: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    module.w13 = nn.Parameter(weight)
    return module


# --- refused: each leaves everything as it was

REFUSED: dict[str, Callable[[ShuffledMXFP4Tensor], object]] = {
    ".data = plain": lambda w: setattr(w, "data", torch.zeros(SMALL)),
    ".data = another shape": lambda w: setattr(w, "data", weight_of(marked_parts(2, 96, 160))),
    ".data = another dtype": lambda w: setattr(w, "data", w.half()),
    ".data = packed bytes": lambda w: setattr(w, "data", w.qdata),
    "set_": lambda w: w.set_(torch.zeros(SMALL)),
    "set_ to ours": lambda w: w.set_(weight_of(marked_parts(*SMALL))),
    "set_ to nothing": lambda w: w.set_(),
    "set_ to a storage": lambda w: w.set_(torch.zeros(SMALL).untyped_storage(), 0, SMALL),
    "resize_": lambda w: w.resize_(1, 96, 160),
    "resize_as_": lambda w: w.resize_as_(torch.zeros(1)),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 1)),
    "as_strided_": lambda w: w.as_strided_((2, 2), (1, 1)),
    "t_": lambda w: w[0].t_(),
    "transpose_": lambda w: w.transpose_(1, 2),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "view": lambda w: w.view(-1),
    "view as bytes": lambda w: w.view(torch.uint8),
    "its storage's address": lambda w: w.untyped_storage().data_ptr(),
    "its storage's size": lambda w: w.untyped_storage().resize_(0),
    "numpy": lambda w: w.numpy(),
    "__array__": lambda w: w.__array__(),
    "dlpack": lambda w: torch.from_dlpack(w),
    "__setstate__": lambda w: w.__setstate__((torch.zeros(9).untyped_storage(), 0, (9,), (1,), False, {})),
    "__setstate__ of old": lambda w: w.__setstate__((torch.zeros(9).untyped_storage(), 0, (9,), (1,))),
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(torch.ones(SMALL)),
    "mul_": lambda w: w.mul_(2),
    "*=": lambda w: w.__imul__(0.5),
    "sub_": lambda w: w.sub_(w),
    "div_": lambda w: w.div_(2),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "normal_": lambda w: w.normal_(),
    "init": lambda w: nn.init.kaiming_uniform_(w),
    "lerp_": lambda w: w.lerp_(w, 0.5),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(SMALL, dtype=torch.bool), 0),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), w[:1].clone()),
    "index_put_, accumulate": lambda w: w.index_put_((torch.tensor([0]),), w[:1].clone(), accumulate=True),
    "addcmul_": lambda w: w.addcmul_(w, w),
    "out=": lambda w: torch.add(torch.ones(SMALL), 1, out=w),
    "to int8": lambda w: w.to(torch.int8),
    "to fp8": lambda w: w.to(torch.float8_e4m3fn),
}  # fmt: skip


@pytest.mark.parametrize("edge", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("wrap", [lambda w: w, nn.Parameter], ids=["tensor", "parameter"])
def test_refused(edge: Callable[[ShuffledMXFP4Tensor], object], wrap: Callable[..., ShuffledMXFP4Tensor]) -> None:
    parts = marked_parts(*SMALL)
    weight = wrap(weight_of(parts, "mxfp4_moe"))
    with torch.no_grad(), pytest.raises((NotImplementedError, TypeError, ValueError, RuntimeError)):
        edge(weight)
    assert (type(weight), weight.shape, weight.dtype) == (ShuffledMXFP4Tensor, SMALL, torch.float32)
    assert_holds(weight, parts, "mxfp4_moe")


def test_refusals_say_what_to_do() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    for edge, remedy in {
        ".data = plain": r"copy_.*\.qdata_view",
        "set_": r"write values with copy_",
        "resize_": r"make a new tensor",
        "mul_": r"dequantize\(\).*copy_",
        "clamp_": r"dequantize\(\)",
    }.items():
        with pytest.raises((NotImplementedError, TypeError), match=remedy):
            REFUSED[edge](weight)


# --- right


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_takes_over_another_weight(layout: str) -> None:
    old, new = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    param, source = nn.Parameter(weight_of(old, "mxfp4_moe")), weight_of(new, layout)
    held = param.detach()
    param.data = source
    assert isinstance(param, nn.Parameter)
    assert_holds(param, new, layout)
    source.shuffle_("mxfp4_separated")  # one state with it from now on
    assert_holds(param, new, "mxfp4_separated")
    assert addresses(param) == addresses(source)
    held.unshuffle_()  # and with nothing else
    assert_holds(held, old, "none")
    assert_holds(param, new, "mxfp4_separated")
    param.data = weight_of(marked_parts(6, 96, 160), layout)[1::2]
    assert torch.equal(param.dequantize(torch.float64), dense(*marked_parts(6, 96, 160))[1::2])
    param.data[1].copy_(weight_of(new)[1])
    assert torch.equal(param[1].dequantize(torch.float64), dense(*new)[1])


def test_parameters_are_wrapped_and_wrapped_again() -> None:
    parts = marked_parts(*SMALL)
    module = module_with(weight_of(parts))
    first = module.w13
    module.w13 = nn.Parameter(nn.Parameter(module.w13.data).detach(), requires_grad=False)  # as replace_parameter does
    module.w13.shuffle_("mxfp4_moe")
    module.w13 = nn.Parameter(module.w13[:])
    for weight in (first, module.w13):
        assert_holds(weight, parts, "mxfp4_moe")
    assert addresses(first) == addresses(module.w13)
    assert copy.copy(module.w13).unshuffle_() is not module.w13
    assert_holds(first, parts, "none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses(layout: str) -> None:
    weight = weight_of(marked_parts(*SMALL), layout)
    address = weight.qdata.data_ptr()
    assert nn.Parameter(weight).qdata.data_ptr() == address
    assert weight[2].qdata.data_ptr() - address == 2 * weight.qdata[0].nbytes
    assert weight.clone().qdata.data_ptr() != address != 0
    assert weight.shuffle_("mxfp4_moe").unshuffle_().qdata.data_ptr() == address


def test_a_weight_has_no_address_of_its_own() -> None:
    """What reads numel() * element_size() bytes from data_ptr() would read 3.8 times too far."""
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    with torch.inference_mode():
        inside = weight[1:]
    for seen in (weight, nn.Parameter(weight), weight[1], weight[:, 8:40], weight.to("meta"), inside):
        address = seen.data_ptr()
        assert not address
        assert address == 0
        assert (address != 0) is False  # what torch's stager asks
        assert ctypes.c_void_p(address).value is None


def test_weights_without_addresses_are_not_taken_for_one() -> None:
    """By whoever keeps parameters by their addresses, as accelerate's dispatch_model those that are tied."""
    parts = [marked_parts(*SMALL, salt=salt) for salt in range(3)]
    weights = [nn.Parameter(weight_of(part)) for part in parts]
    plain = [nn.Parameter(dense(*part)) for part in parts]
    for several in (weights, plain):
        seen = [*several, several[0], several[1].detach(), several[2][:1], several[2][1], several[2][1:2]]
        groups: dict[int, list[int]] = {}
        for place, tensor in enumerate(seen):
            groups.setdefault(tensor.data_ptr(), []).append(place)
        assert list(groups.values()) == [[0, 3], [1, 4], [2, 5], [6, 7]]
        assert seen[6].data_ptr() == seen[7].data_ptr() != seen[5].data_ptr()
    columns = weights[0][..., 32:64]
    assert len({view.data_ptr() for view in (columns, columns[:, :1], columns[:, 1:], weights[0])}) == 3


def test_swap_tensors() -> None:
    small = marked_parts(2, 64, 64, salt=1)
    weight, other, plain = weight_of(marked_parts(*SMALL), "mxfp4_moe"), weight_of(small), nn.Parameter(torch.zeros(2))
    held, module = weight.detach(), module_with(other)
    torch.utils.swap_tensors(weight, module.w13)
    assert_holds(module.w13, marked_parts(*SMALL), "mxfp4_moe")
    assert_holds(weight, small, "none")
    module.w13.shuffle_("mxfp4_separated")
    assert_holds(held, marked_parts(*SMALL), "mxfp4_separated")
    with pytest.raises(RuntimeError, match="different slots"):  # torch's: a plain tensor has no place for our state
        torch.utils.swap_tensors(module.w13, plain)
    assert_holds(module.w13, marked_parts(*SMALL), "mxfp4_separated")
    assert torch.equal(plain, torch.zeros(2))


def test_what_engines_do_with_the_dict_of_a_parameter_moves_no_state() -> None:
    """vLLM copies and assigns `__dict__` of parameters, and their class; only users' attributes are in it."""
    parts, others = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    weight, other = nn.Parameter(weight_of(parts, "mxfp4_moe")), nn.Parameter(weight_of(others, "mxfp4_separated"))
    other.weight_loader = "a loader"
    address = addresses(weight)
    weight.__dict__ = other.__dict__.copy()
    assert weight.weight_loader == "a loader"
    assert_holds(weight, parts, "mxfp4_moe")
    assert addresses(weight) == address
    with pytest.raises(TypeError, match="object layout differs"):
        torch.empty(1).as_subclass(nn.Parameter).__class__ = ShuffledMXFP4Tensor
    for view in (weight.qdata_view, weight[:, :48]):
        assert set(vars(view)) <= {"_is_param"}


def test_a_reload_by_way_of_meta_tensors_is_loud() -> None:
    """As vLLM does it: a meta tensor keeps class and attributes, and then memory is made for it."""
    weight = nn.Parameter(weight_of(marked_parts(*SMALL), "mxfp4_moe"))
    weight.weight_loader = "a loader"
    meta = weight.data.to("meta")
    meta.__class__ = weight.__class__
    meta.__dict__ = weight.__dict__.copy()
    assert meta.is_meta
    assert meta.weight_loader == "a loader"
    made = torch.empty_strided(size=tuple(meta.size()), stride=tuple(meta.stride()), dtype=meta.dtype)
    with pytest.raises(TypeError, match="object layout differs"):
        made.__class__ = meta.__class__
    assert_holds(weight, marked_parts(*SMALL), "mxfp4_moe")


IN_PLAIN_TENSORS = """
import sys, torch
from shuffled_tensor import ShuffledMXFP4Tensor
weight = ShuffledMXFP4Tensor.from_hp(torch.ones(2, 64, 64), gate_up=False)
plain = torch.nn.Parameter(torch.zeros(2, 64, 64), requires_grad=False)
plain.data = weight
for call in (
    lambda: plain.zero_(),
    lambda: plain.data.copy_(torch.ones(2, 64, 64)),
    lambda: plain.data_ptr(),
    lambda: plain.numpy(),
    lambda: torch.utils.dlpack.to_dlpack(weight),
    lambda: torch.empty(0).set_(weight.untyped_storage(), 0, (4,)).zero_(),
):
    try:
        call()
    except RuntimeError as error:
        assert "Cannot access data pointer" in str(error), error
    else:
        raise AssertionError
assert weight.dequantize().eq(1).all()
"""


def test_writes_to_its_memory_in_a_plain_tensor_raise() -> None:
    run = subprocess.run([sys.executable, "-c", IN_PLAIN_TENSORS], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logical_dtypes(layout: str) -> None:
    """Codes and layout stay through a dtype that cannot hold the values, and back."""
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, layout)
    for convert, dtype in (
        (lambda w: w.half(), torch.float16),
        (lambda w: w.to(torch.float32), torch.float32),
        (lambda w: w.bfloat16(), torch.bfloat16),
        (lambda w: w.type(torch.float64), torch.float64),
        (lambda w: module_with(w).half().w13, torch.float16),
        (lambda w: module_with(w).to(torch.bfloat16).w13, torch.bfloat16),
        (lambda w: module_with(w).float().w13, torch.float32),
    ):
        weight = convert(weight)
        assert weight.dtype is dtype
        assert torch.equal(weight.dequantize(), dense(*parts).to(dtype))
        assert_holds(weight, parts, layout)
    assert weight.to(torch.float32) is weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero(layout: str) -> None:
    weight = weight_of(marked_parts(*SMALL), layout)
    weight[1].zero_()
    expected = marked_parts(*SMALL)
    expected[0][1], expected[1][1] = 0, 127
    assert_holds(weight, expected, layout)
    zeros = torch.zeros((*SMALL[:2], 80)).byte(), torch.full((*SMALL[:2], 5), 127).byte()
    assert_holds(weight.zero_(), zeros, layout)
    assert_holds(torch.zeros_like(weight_of(marked_parts(*SMALL), layout)), zeros, layout)


def test_no_gradient() -> None:
    param = nn.Parameter(weight_of(marked_parts(*SMALL)))  # requires_grad=True is its default
    assert not param.requires_grad
    assert param.requires_grad_() is param
    assert not param.requires_grad
    assert not param.clone().requires_grad
    param.copy_(weight_of(marked_parts(*SMALL, salt=1)))  # no leaf that requires grad
    assert_holds(param, marked_parts(*SMALL, salt=1), "none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offload_and_back(layout: str, device: str) -> None:
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, layout).to(device)
    offloaded = weight.to("cpu", copy=True)
    weight.unshuffle_()
    woken = offloaded.to(device, copy=True)
    offloaded.zero_()
    assert_holds(woken.cpu(), parts, layout)
    module = module_with(woken).cpu().to(device)
    assert isinstance(module.w13, nn.Parameter)
    assert_holds(module.w13.cpu(), parts, layout)
    module.to_empty(device=device)
    assert module.w13.is_shuffled == (layout != "none")
    module.load_state_dict(module_with(weight).state_dict())
    assert_holds(module.w13.cpu(), parts, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sleep_and_wake(layout: str) -> None:
    """An engine's allocator takes the memory away under the tensor, and gives it back at the same address."""
    parts, new = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    module = module_with(weight_of(parts, layout))
    address = addresses(module.w13)
    memory = module.w13.qdata, module.w13.scale
    saved = [part.clone() for part in memory]
    for part in memory:
        part.fill_(0xFF)
    for part, kept in zip(memory, saved, strict=True):  # level 1: the bytes come back as they lay
        part.copy_(kept)
    assert_holds(module.w13, parts, layout)
    for part in memory:
        part.fill_(0xFF)
    module.load_state_dict(module_with(weight_of(new, "mxfp4_moe")).state_dict())  # level 2: they are loaded anew
    assert_holds(module.w13, new, layout)
    assert addresses(module.w13) == address


@pytest.mark.parametrize("layout", LAYOUTS)
def test_share_memory(layout: str) -> None:
    parts = marked_parts(*SMALL)
    module = module_with(weight_of(parts, layout))
    module.share_memory()
    alias, reader = module.w13.detach(), (module.w13.qdata, module.w13.scale)  # what a forked process has
    assert module.w13.is_shared()
    assert all(part.is_shared() for part in reader)
    assert_holds(module.w13, parts, layout)
    alias.shuffle_("mxfp4_separated" if layout == "mxfp4_moe" else "mxfp4_moe")
    for found, expected in zip(reader, in_memory(parts, layout, gate_up=True), strict=True):
        assert torch.equal(found, expected)
    assert_holds(module.w13, parts, "mxfp4_separated" if layout == "mxfp4_moe" else "mxfp4_moe")


# --- another process


def state(weight: ShuffledMXFP4Tensor) -> tuple[Any, ...]:
    """What a process believes, the bytes it believes it of, and what it reads out of them."""
    kind = weight.shuffle_kind if weight.is_shuffled else "none"
    memory = [part.numpy().tobytes() for part in (weight.qdata, weight.scale)]
    return kind, memory, weight.dequantize(torch.float64).numpy().tobytes()


def other_process(pipe: Connection) -> None:
    module, pickled, saved = pipe.recv()
    weight = module.w13
    pipe.send((isinstance(weight, nn.Parameter), weight.weight_loader, weight.requires_grad))
    pipe.send(state(weight))
    pipe.send([state(tensor) for tensor in (pickle.loads(pickled), torch.load(saved, weights_only=True)["w"])])
    pipe.recv()  # the first process has written, in place
    pipe.send(state(weight))
    weight[1].copy_(weight_of(marked_parts(*SMALL, salt=2))[1])  # so does this one
    pipe.send(None)
    pipe.recv()
    weight.shuffle_("mxfp4_separated")  # in memory of its own from now on
    pipe.send(state(weight))
    pipe.recv()  # the first process has unshuffled what it has
    pipe.send(state(weight))
    pipe.recv()


def assert_state(found: tuple[Any, ...], parts: tuple[Tensor, Tensor], layout: str) -> None:
    kind, memory, values = found
    assert kind == layout
    assert memory == [part.numpy().tobytes() for part in in_memory(parts, layout, gate_up=True)]
    assert values == dense(*parts).numpy().tobytes()


def test_two_processes_share_a_parameter(tmp_path: Any) -> None:
    parts = marked_parts(*SMALL)
    module = module_with(weight_of(parts, "mxfp4_moe"))
    module.w13.weight_loader = "a loader"
    torch.save({"w": weight_of(parts, "mxfp4_separated")}, tmp_path / "w.pt")
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=other_process, args=(there,), daemon=True)
    process.start()
    try:

        def answer(message: object = None) -> Any:
            if message is not None:
                here.send(message)
            assert here.poll(60), "the other process does not answer"
            return here.recv()

        pickled = pickle.dumps(weight_of(parts, "mxfp4_moe"))
        assert answer((module, pickled, tmp_path / "w.pt")) == (True, "a loader", False)
        assert_state(answer(), parts, "mxfp4_moe")
        for loaded in answer():
            assert_state(loaded, parts, "none")
        held = module.w13.detach()

        new = marked_parts(*SMALL, salt=1)
        module.w13.copy_(weight_of(new))
        assert_state(answer("written"), new, "mxfp4_moe")
        assert answer() is None
        for part, values in zip(new, marked_parts(*SMALL, salt=2), strict=True):
            part[1] = values[1]
        assert_holds(held, new, "mxfp4_moe")

        assert_state(answer("shuffle"), new, "mxfp4_separated")
        assert_holds(held, new, "mxfp4_moe")
        module.w13.unshuffle_()
        assert_holds(held, new, "none")
        assert_state(answer("unshuffled"), new, "mxfp4_separated")
        here.send("end")
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


@pytest.mark.parametrize("known", [True, False], ids=["shared memory", "memory that cannot tell, as a GPU's"])
def test_what_was_sent_is_not_laid_out_anew_in_place(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = marked_parts(*SMALL)
    sender = weight_of(parts, "mxfp4_moe")
    receiver = pickle.loads(ForkingPickler.dumps(sender))
    if not known:
        monkeypatch.setattr(Tensor, "is_shared", lambda self: False)
    sent = [part for weight in (sender, receiver) for part in (weight.qdata, weight.scale)]
    sender.unshuffle_()
    receiver.shuffle_("mxfp4_separated")
    assert_holds(sender, parts, "none")
    assert_holds(receiver, parts, "mxfp4_separated")
    for found, expected in zip(sent, in_memory(parts, "mxfp4_moe", gate_up=True) * 2, strict=True):
        assert torch.equal(found, expected)


def test_attributes_travel_with_a_pickle() -> None:
    weight = weight_of(marked_parts(*SMALL), "mxfp4_moe")
    weight.weight_loader = "a loader"
    for copied in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight), copy.copy(weight)):
        assert copied.weight_loader == "a loader"
        assert torch.equal(copied.dequantize(torch.float64), dense(*marked_parts(*SMALL)))
