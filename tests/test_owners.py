# SPDX-License-Identifier: MIT
"""A byte buffer knows its owner: bytes that were handed out are never taken for something that they are not."""

import copy
import gc
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shuffled_tensor import (
    ShuffledMXFP4Tensor,
    dequantize,
    fused_moe,
    install_,
    override_arch,
    owners,
    prepare,
    refit,
    shuffle_scale,
    shuffle_weight,
    wrap_experts_,
)
from shuffled_tensor.testing import fake_aiter

from .support.bytes import marked_parts, weight_of
from .support.judges import assert_holds, dense
from .support.layer import make_layer, packed_arguments, weight_parts

LAYOUTS = ["mxfp4_moe", "mxfp4_separated"]
SHAPE = (3, 512, 512)  # in K=512, shuffling codes twice changes nothing

TAKERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the constructor": lambda q, s: ShuffledMXFP4Tensor(q, s, gate_up=True, row_order="contiguous"),
    "interleaved": lambda q, s: ShuffledMXFP4Tensor(q, s, gate_up=True, row_order="interleaved"),
    "a parameter": lambda q, s: ShuffledMXFP4Tensor(
        nn.Parameter(q, False), nn.Parameter(s, False), gate_up=True, row_order="contiguous"
    ),
    "one expert": lambda q, s: ShuffledMXFP4Tensor(q[1], s[1], gate_up=True, row_order="contiguous"),
    "some experts": lambda q, s: ShuffledMXFP4Tensor(q[::2], s[::2], gate_up=True, row_order="contiguous"),
    "dequantize": dequantize,
    "shuffle_weight": lambda q, s: shuffle_weight(q, "mxfp4_moe", gate_up=True),
    "shuffle_scale": lambda q, s: shuffle_scale(s, "mxfp4_moe", gate_up=True),
    "a view of codes": lambda q, s: weight_of(marked_parts(*SHAPE)).qdata_view.copy_(q),
    "a view of scales": lambda q, s: weight_of(marked_parts(*SHAPE)).scale_view.copy_(s),
}

SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda data: data,
    "through numpy": lambda data: torch.from_numpy(data.numpy()),
    "through dlpack": lambda data: torch.from_dlpack(data.detach()),
    "viewed": lambda data: data.view(-1).view(data.shape),
}


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shuffled_bytes_are_not_taken_for_plain_ones(
    layout: str, take: Callable[..., Any], seen: Callable[[Tensor], Tensor]
) -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts).shuffle_(layout)
    with pytest.raises(ValueError, match=f"memory of a ShuffledMXFP4Tensor whose bytes lie as '{layout}'"):
        take(seen(weight.qdata), seen(weight.scale))
    assert_holds(weight, parts, layout)
    qdata, scale = weight.qdata, weight.scale
    del weight
    gc.collect()
    with pytest.raises(ValueError, match="memory of a ShuffledMXFP4Tensor"):  # the bytes have not changed
        take(qdata, scale)
    take(qdata.clone(), scale.clone())  # and these are nobody's


@pytest.mark.parametrize("take", ["the constructor", "dequantize"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_part_that_is_shuffled_is_enough(layout: str, take: str) -> None:
    codes, scales = marked_parts(*SHAPE)
    weight = weight_of((codes, scales)).shuffle_(layout)
    with pytest.raises(ValueError, match="^qdata is memory of a ShuffledMXFP4Tensor"):
        TAKERS[take](weight.qdata, scales.clone())
    with pytest.raises(ValueError, match="^scale is memory of a ShuffledMXFP4Tensor"):
        TAKERS[take](codes.clone(), weight.scale)


def test_wrapping_finds_shuffled_bytes_before_it_changes_anything() -> None:
    module = nn.Module()
    shuffled = ShuffledMXFP4Tensor(*marked_parts(2, 256, 128), gate_up=False).shuffle_("mxfp4_moe")
    names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
    w13 = marked_parts(2, 256, 256)
    for name, data in zip(names, (*w13, shuffled.qdata, shuffled.scale), strict=True):
        module.register_buffer(name, data)
    module.w2_weight = shuffled.qdata[:, :, :64]  # padded to 256 columns
    module.w2_weight_scale = shuffled.scale[:, :, :4]
    with pytest.raises(ValueError, match="w2_weight: qdata is memory of a ShuffledMXFP4Tensor"):
        wrap_experts_(module, row_order="contiguous")
    assert all(type(getattr(module, name)) is Tensor for name in names)


def test_the_constructors_own_arguments_are_the_weights() -> None:
    qdata, scale = marked_parts(*SHAPE)
    weight = ShuffledMXFP4Tensor(qdata, scale, gate_up=False).shuffle_("mxfp4_moe")
    with pytest.raises(ValueError, match="memory of"):
        ShuffledMXFP4Tensor(qdata, scale, gate_up=False)
    weight.unshuffle_()
    again = ShuffledMXFP4Tensor(qdata, scale, gate_up=False)
    weight.shuffle_("mxfp4_moe")
    again.shuffle_("mxfp4_moe")
    assert_holds(weight, marked_parts(*SHAPE), "mxfp4_moe")
    assert_holds(again, marked_parts(*SHAPE), "mxfp4_moe")


def test_memory_that_was_freed_is_forgotten() -> None:
    for salt in range(20):  # the allocator gives the same memory again
        parts = marked_parts(*SHAPE, salt=salt)
        weight = ShuffledMXFP4Tensor(*(part.clone() for part in parts), gate_up=False).shuffle_("mxfp4_moe")
        assert_holds(weight, parts, "mxfp4_moe")
        del weight


def test_memory_that_was_resized_away_is_forgotten() -> None:
    """As FSDP does with parameters that it has gathered; another tensor may get the addresses."""
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    owner = owners.find(weight.qdata)
    assert owner is not None
    assert owner.alive()
    weight.qdata.untyped_storage().resize_(0)
    assert not owner.alive()


class Layer(nn.Module):
    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Parameter(w13, requires_grad=False), nn.Parameter(w2, requires_grad=False)

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return fused_moe(x, self.w13, self.w2, weight, ids)


def called(module: nn.Module, layer: dict[str, Any]) -> Tensor:
    out: Tensor = module(layer["hidden_states"], layer["topk_weight"], layer["topk_ids"])
    return out


@pytest.mark.parametrize("change", ["shuffle_", "refit", "first use", "load_state_dict"])
def test_an_unwrapped_module(change: str) -> None:
    """torch's export takes weights apart, and makes them anew at each access."""
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters

    layer = make_layer("cpu")
    module = Layer(layer["w13"], layer["w2"])
    expected = called(copy.deepcopy(module), layer)
    new = {name: value.clone() for name, value in module.state_dict().items()}
    unwrap_tensor_subclass_parameters(module)
    del layer["w13"], layer["w2"]
    gc.collect()
    assert isinstance(module.w13, ShuffledMXFP4Tensor)
    assert isinstance(module.w2, ShuffledMXFP4Tensor)
    if change == "shuffle_":
        module.w13.shuffle_("mxfp4_moe")
        module.w2.shuffle_("mxfp4_separated")
    elif change == "first use":
        with override_arch("gfx950"), fake_aiter("#3788"):
            prepare(module)
        assert module.w13.is_shuffled
    elif change == "refit":
        module.w13.shuffle_("mxfp4_moe")
        with refit(module):
            assert not module.w13.is_shuffled
            module.w13.qdata.copy_(new["w13"].qdata)
            module.w13.scale.copy_(new["w13"].scale)
        assert module.w13.is_shuffled
    else:
        module.w13.shuffle_("mxfp4_moe")
        module.w13.copy_(new["w13"])
    assert torch.equal(called(module, layer), expected)
    assert torch.equal(called(module, layer), expected)


def test_an_exported_program_follows_the_module() -> None:
    layer = make_layer("cpu")
    module = Layer(layer["w13"], layer["w2"])
    expected = called(module, layer)
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    program = torch.export.export(module, arguments).run_decompositions()
    for layouts in (("mxfp4_moe", "mxfp4_separated"), ("none", "mxfp4_moe")):
        for weight, layout in zip((module.w13, module.w2), layouts, strict=True):
            weight.shuffle_(layout)
        assert torch.equal(program.module()(*arguments), expected)


def test_the_packed_operator_is_told_another_layout_than_the_bytes_have() -> None:
    """As a compiled function is, when another thread lays a weight out after its guards have looked."""
    layer = make_layer("cpu")
    expected = fused_moe(**layer)
    packed = packed_arguments(layer) | {"out_dtype": "bfloat16"}
    assert packed["w13_layout"] == "none"
    layer["w13"].shuffle_("mxfp4_moe")
    layer["w2"].shuffle_("mxfp4_separated")
    assert torch.equal(torch.ops.shuffled_tensor.fused_moe_packed(**packed), expected)


def test_the_packed_operator_is_given_every_other_expert() -> None:
    layer = make_layer("cpu")
    ids = layer["topk_ids"] // 2
    expected = fused_moe(**layer | {"topk_ids": 2 * ids})  # of all experts
    layer |= {"w13": layer["w13"][::2], "w2": layer["w2"][::2], "topk_ids": ids}
    packed = packed_arguments(layer) | {"out_dtype": "bfloat16"}
    assert torch.equal(torch.ops.shuffled_tensor.fused_moe_packed(**packed), expected)
    layer["w13"].shuffle_("mxfp4_moe")
    assert torch.equal(torch.ops.shuffled_tensor.fused_moe_packed(**packed), expected)


def test_the_packed_operator_is_given_rows_that_are_not_gate_and_up() -> None:
    """Padded to the same size: only who owns them knows."""
    layer = make_layer("cpu")
    packed = packed_arguments(layer) | {"out_dtype": "bfloat16"}
    w13 = ShuffledMXFP4Tensor(*weight_parts("w13"), gate_up=False)
    assert w13.qdata.shape == layer["w13"].qdata.shape
    with pytest.raises(RuntimeError, match="a part of a weight of .*gate_up=False"):
        torch.ops.shuffled_tensor.fused_moe_packed(**packed | {"w13_qdata": w13.qdata, "w13_scale": w13.scale})


def test_memory_that_was_replaced_is_still_what_it_was() -> None:
    """A weight is put together again from it, as compilers do."""
    parts, new = marked_parts(*SHAPE), marked_parts(*SHAPE, salt=1)
    shared = (part.clone().share_memory_() for part in parts)
    weight = ShuffledMXFP4Tensor(*shared, gate_up=True, row_order="contiguous")
    kept, context = {"qdata": weight.qdata, "scale": weight.scale}, weight.__tensor_flatten__()[1]
    weight.shuffle_("mxfp4_moe")  # which replaces memory that others may read
    old = ShuffledMXFP4Tensor.__tensor_unflatten__(kept, context, weight.shape, weight.stride())
    assert_holds(old, parts, "none")
    assert old.row_order == "contiguous"
    with refit(old):
        old.qdata.copy_(new[0])
        old.scale.copy_(new[1])
    assert_holds(old, new, "none")
    assert_holds(weight, parts, "mxfp4_moe")
    with pytest.raises(ValueError, match="memory of a ShuffledMXFP4Tensor whose bytes lie as 'mxfp4_moe'"):
        TAKERS["the constructor"](weight.qdata, weight.scale)


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 17, 32, 34])
def test_memory_that_is_not_aligned_is_copied(offset: int) -> None:
    """Kernels move 16 bytes at a time; any other is taken over."""
    parts = marked_parts(1, 256, 256)
    memory = torch.empty(offset + parts[0].numel(), dtype=torch.uint8)
    codes = memory[offset:].view(parts[0].shape).copy_(parts[0])
    weight = ShuffledMXFP4Tensor(codes, parts[1].clone(), gate_up=False)
    assert (weight.qdata.data_ptr() == codes.data_ptr()) == (offset % 16 == 0)
    assert weight.qdata.data_ptr() % 16 == 0
    assert_holds(weight, parts, "none")


@pytest.mark.parametrize("expert", [1, slice(0, 2), slice(None, None, 2)])
def test_data_of_a_view(expert: Any) -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, "mxfp4_moe")
    view = weight[expert]
    before = view.qdata.clone()
    other = weight_of(marked_parts(*SHAPE, salt=1), "mxfp4_moe")[expert]
    view.data = other
    assert torch.equal(view.qdata, other.qdata)
    assert view.qdata.data_ptr() == other.qdata.data_ptr()
    assert torch.equal(weight[expert].qdata, before)


def test_data_of_a_view_of_the_same_weight() -> None:
    parts = marked_parts(*SHAPE)
    weight = weight_of(parts, "mxfp4_moe")
    view = weight[1]
    assert torch.equal(view.qdata, weight.qdata[1])
    view.data = weight[2]
    assert torch.equal(view.qdata, weight.qdata[2])
    assert torch.equal(view.scale, weight.scale[2])
    assert torch.equal(view.dequantize(torch.float64), dense(*parts)[2])


def test_data_takes_the_same_gate_up() -> None:
    down, gate_up = (
        ShuffledMXFP4Tensor(*marked_parts(*SHAPE), gate_up=gate_up, row_order="contiguous") for gate_up in (False, True)
    )
    with pytest.raises(TypeError, match="with gate_up=False, found .* with gate_up=True"):
        down.data = gate_up


# --- finding weights


def places() -> dict[str, Callable[[nn.Module, ShuffledMXFP4Tensor], object]]:
    def dtensor(module: nn.Module, weight: ShuffledMXFP4Tensor) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        module.w = nn.Parameter(
            DTensor.from_local(weight, init_device_mesh("cpu", (1,)), [Shard(0)]), requires_grad=False
        )

    return {
        "a parameter": lambda module, weight: setattr(module, "w", nn.Parameter(weight, requires_grad=False)),
        "a buffer": lambda module, weight: module.register_buffer("w", weight),
        "an attribute": lambda module, weight: setattr(module, "w", weight),
        "a list": lambda module, weight: setattr(module, "w", [None, (weight,)]),
        "a dict": lambda module, weight: setattr(module, "w", {"w": {"w": weight}}),
        "a module in a list": lambda module, weight: setattr(module, "w", [holder(weight)]),
        "a DTensor": dtensor,
    }


def holder(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.w = weight
    return module


@pytest.fixture
def no_group() -> Any:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("put", places().values(), ids=places())
def test_weights_are_found_wherever_they_are(put: Callable[[nn.Module, ShuffledMXFP4Tensor], object]) -> None:
    parts, new = marked_parts(*SHAPE), marked_parts(*SHAPE, salt=1)
    weight = weight_of(parts, "mxfp4_moe")
    module = nn.Module()
    put(module, weight)
    with refit(nn.Sequential(module)):
        assert not weight.is_shuffled
        weight.qdata.copy_(new[0])
        weight.scale.copy_(new[1])
    assert_holds(weight, new, "mxfp4_moe")


@pytest.mark.parametrize("walk", [prepare, lambda module: refit(module).__enter__()], ids=["prepare", "refit"])
@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Module(), None, 3], ids=str)
def test_where_there_is_none_it_is_said(walk: Callable[[Any], object], module: Any) -> None:
    with pytest.raises(ValueError, match="no ShuffledMXFP4Tensor was found"):
        walk(module)


def test_refit_of_a_tensor() -> None:
    new = marked_parts(*SHAPE, salt=1)
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    with refit(weight):
        weight.qdata.copy_(new[0])
        weight.scale.copy_(new[1])
    assert_holds(weight, new, "mxfp4_moe")


# --- install_


def test_install_in_the_place_of_a_plain_parameter() -> None:
    module = nn.Module()
    module.a, module.b = nn.Module(), nn.Module()
    plain = nn.Parameter(torch.zeros(SHAPE), requires_grad=False)
    plain.weight_loader = "theirs"  # type: ignore[attr-defined]
    module.a.w = module.b.v = plain
    weight = weight_of(marked_parts(*SHAPE), "mxfp4_moe")
    there = install_(module, "a.w", weight)
    assert module.a.w is module.b.v is there
    assert there.weight_loader == "theirs"  # type: ignore[attr-defined]
    assert dict(module.named_parameters()) == {"a.w": there}
    assert_holds(there, marked_parts(*SHAPE), "mxfp4_moe")  # type: ignore[arg-type]
    assert plain.numel() == 0  # who has it still must notice


def test_install_in_the_place_of_one_of_ours() -> None:
    module = holder(nn.Parameter(weight_of(marked_parts(*SHAPE)), requires_grad=False))
    held = module.w
    weight = weight_of(marked_parts(*SHAPE, salt=1), "mxfp4_moe")
    assert install_(module, "w", weight) is held is module.w
    assert_holds(held, marked_parts(*SHAPE, salt=1), "mxfp4_moe")  # type: ignore[arg-type]


def test_install_where_nothing_is() -> None:
    module = nn.Module()
    module.register_parameter("w", None)
    for name in ("w", "v"):
        assert install_(module, name, weight_of(marked_parts(*SHAPE))) is getattr(module, name)
    assert [name for name, _ in module.named_parameters()] == ["w", "v"]


def test_install_refuses() -> None:
    module = nn.Module()
    module.w, module.v = nn.Parameter(torch.zeros(2)), "text"
    with pytest.raises(TypeError, match="takes a ShuffledMXFP4Tensor, found Tensor"):
        install_(module, "w", torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="v is a str"):
        install_(module, "v", weight_of(marked_parts(*SHAPE)))
    assert module.w.numel() == 2


@pytest.mark.parametrize("move", [lambda w: w.share_memory_(), ForkingPickler.dumps], ids=["share_memory_", "sent"])
def test_memory_that_was_moved_to_other_processes_is_known(move: Callable[[ShuffledMXFP4Tensor], object]) -> None:
    parts = marked_parts(2, 512, 512)
    weight = ShuffledMXFP4Tensor(*parts, gate_up=True, row_order="interleaved").shuffle_("mxfp4_moe")
    move(weight)
    with pytest.raises(ValueError, match="qdata is memory of a ShuffledMXFP4Tensor whose bytes lie as 'mxfp4_moe'"):
        ShuffledMXFP4Tensor(weight.qdata, weight.scale, gate_up=True, row_order="contiguous")
    with pytest.raises(ValueError, match="scale is memory of a ShuffledMXFP4Tensor"):
        dequantize(parts[0], weight.scale)
    replaced = weight.qdata
    weight.unshuffle_()
    record = owners.find(replaced).record  # type: ignore[union-attr]
    assert (record.layout.name, record.row_order) == ("mxfp4_moe", "interleaved")
