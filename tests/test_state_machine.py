# SPDX-License-Identifier: MIT
"""A weight's life: random sequences of everything that happens to one, against plain bytes that live the same life.

The model of a storage is two plain tensors, its logical row-major codes and scales; the model of an alias is a plain view
of them. So torch itself says which alias sees which write, and `dense` says what the bytes mean.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, override_arch, prepare, refit
from shuffled_tensor.testing import fake_aiter

from .support.aiter import EXPECTED, OTHER
from .support.bytes import LAYOUTS, marked, marked_parts, poke
from .support.judges import dense, in_memory

Parts = tuple[Tensor, Tensor]

LIVES, STEPS, AT_LEAST = 60, 50, 2000
FUZZ = int(os.environ.get("FUZZ", "0"))
"""How many lives instead, of random seeds."""

# (experts, rows, columns): gate and up of 40 rows each, padded in every way; K=512, where a second shuffle would go
# unseen; not padded at all; and one that tensor parallelism parts
SHAPES = [(3, 80, 288), (2, 512, 512), (2, 512, 256), (4, 128, 192)]
MOST_ALIASES = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def new_parts(shape: tuple[int, ...], salt: int) -> Parts:
    """Codes and scales of a shape ``[..., N, K]``. The first code of each block is 4 or 6, so that quantising their values
    gives the same bytes again."""
    experts = shape[0] if len(shape) == 3 else 1
    qdata, scale = marked_parts(experts, *shape[-2:], salt=salt)
    qdata[..., ::16] |= 6
    return qdata.view(*shape[:-1], -1), scale.view(*shape[:-1], -1)


def checksum(qdata: Tensor, scale: Tensor) -> str:
    """As the documentation of `logical_checksum` has it."""
    digest = hashlib.sha256(f"mxfp4 {qdata.shape[0]}x{qdata.shape[1]}x{qdata.shape[2] * 2}".encode())
    for expert in range(len(qdata)):
        digest.update(qdata[expert].contiguous().numpy().tobytes())
        digest.update(scale[expert].contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(eq=False, repr=False)
class Store:
    """What one storage should hold, and what should be believed of it."""

    qdata: Tensor
    scale: Tensor
    gate_up: bool
    whole: ShuffledMXFP4Tensor
    """An alias of all of it, that is only looked at."""
    kind: str = "none"
    target: str | None = None
    pinned: str | None = None
    shared: bool = False
    interrupted: str | None = None
    """The kind that a refit that an exception ended has to return to."""
    address: tuple[int, int] = (0, 0)

    def alike(self, kind: str, other: str) -> bool:
        """Whether bytes lie in two kinds alike, as those of a down weight do in both of aiter's."""
        return kind == other or (not self.gate_up and {kind, other} == {"mxfp4_moe", "mxfp4_separated"})

    def relayout(self, kind: str) -> None:
        if not self.alike(kind, self.kind) and self.shared:  # memory that another process may read is replaced
            self.shared, self.address = False, (0, 0)
        self.kind = kind

    def recover(self, kind: str | None) -> None:
        self.interrupted = None
        if kind or self.pinned:
            self.relayout(kind or self.pinned)


@dataclass(eq=False, repr=False)
class Alias:
    weight: ShuffledMXFP4Tensor
    store: Store
    qdata: Tensor
    scale: Tensor
    dtype: torch.dtype

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{self.weight!r} over {id(self.store):#x}")  # in hypothesis' reports

    @property
    def parts(self) -> Parts:
        """With an expert dimension."""
        return self.qdata.view(-1, *self.qdata.shape[-2:]), self.scale.view(-1, *self.scale.shape[-2:])

    @property
    def whole_experts(self) -> bool:
        return self.qdata.shape[-2:] == self.store.qdata.shape[-2:]

    @property
    def gate_up(self) -> bool:
        return self.store.gate_up and self.qdata.shape[-2] == self.store.qdata.shape[-2]

    def write(self, parts: Parts) -> None:
        self.qdata.copy_(parts[0].view(self.qdata.shape))
        self.scale.copy_(parts[1].view(self.scale.shape))

    def is_all(self) -> bool:
        return self.qdata.numel() == self.store.qdata.numel()


def windowed(parts: Parts, window: tuple[Any, ...]) -> Parts:
    """The window of codes and scales that a window ``[..., rows, columns]`` of values is."""
    *others, columns = window
    start, stop = columns.start, columns.stop
    return parts[0][(*others, slice(start // 2, stop // 2))], parts[1][(*others, slice(start // 32, stop // 32))]


class Life(RuleBasedStateMachine):
    seen = 0
    """How often everything was checked, in all lives: once when one begins, and after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.aliases: list[Alias] = []
        self.salt = 0

    # --- the machinery

    def fresh(self, shape: tuple[int, ...]) -> Parts:
        self.salt += 1
        return new_parts(shape, self.salt)

    def hold(self, alias: Alias) -> None:
        self.aliases.append(alias)
        del self.aliases[:-MOST_ALIASES]

    def hold_view(self, of: Alias, weight: Any, parts: Parts) -> None:
        assert isinstance(weight, ShuffledMXFP4Tensor)
        self.hold(Alias(weight, of.store, *parts, of.dtype))

    def hold_copy(
        self,
        weight: Any,
        parts: Parts,
        *,
        gate_up: bool,
        kind: str,
        target: str | None,
        dtype: torch.dtype,
    ) -> Alias:
        """A weight with a storage of its own."""
        assert isinstance(weight, ShuffledMXFP4Tensor)
        qdata, scale = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        all_qdata, all_scale = (part.view(-1, *part.shape[-2:]) for part in (qdata, scale))
        whole = weight.detach() if weight.dim() == 3 else weight.view(1, *weight.shape)
        store = Store(all_qdata, all_scale, gate_up, whole, kind, target)
        self.hold(Alias(weight, store, qdata, scale, dtype))
        return self.aliases[-1]

    def pick(self, data: st.DataObject, condition: Callable[[Alias], bool] = lambda alias: True) -> Alias:
        able = [alias for alias in self.aliases if alias.store.interrupted is None and condition(alias)]
        return data.draw(st.sampled_from(able)) if able else self.begin_another(data)

    def begin_another(self, data: st.DataObject) -> Alias:
        shape = data.draw(st.sampled_from(SHAPES))
        gate_up, target = data.draw(st.booleans()), data.draw(st.sampled_from([None, None, *LAYOUTS[1:]]))
        dtype = data.draw(st.sampled_from(DTYPES))
        parts = self.fresh(shape)
        weight = ShuffledMXFP4Tensor(
            *(part.clone() for part in parts),
            gate_up=gate_up,
            row_order="contiguous" if gate_up else None,
            shuffle_kind=target,
            dtype=dtype,
        )
        return self.hold_copy(weight, parts, gate_up=gate_up, kind="none", target=target, dtype=dtype)

    def source(self, data: st.DataObject, alias: Alias, parts: Parts) -> Tensor:
        """Values for an alias: plain, or packed in any layout."""
        form = data.draw(st.sampled_from(["values", "bfloat16", "packed", "packed gate-up"]))
        if form in ("values", "bfloat16"):
            return dense(*parts).to(torch.bfloat16 if form == "bfloat16" else torch.float32)
        gate_up = form == "packed gate-up"
        if gate_up and parts[0].shape[-2] % 2:
            gate_up = False
        packed = ShuffledMXFP4Tensor(
            *(part.clone() for part in parts),
            gate_up=gate_up,
            row_order="contiguous" if gate_up else None,
            dtype=alias.dtype,
        )
        return packed.shuffle_(data.draw(st.sampled_from(LAYOUTS)))

    # --- layouts

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.begin_another(data)

    @rule(data=st.data())
    def begin_again(self, data: st.DataObject) -> None:
        self.begin_another(data)

    @rule(data=st.data(), kind=st.sampled_from(LAYOUTS))
    def change_kind(self, data: st.DataObject, kind: str) -> None:
        alias = self.pick(data)
        store = alias.store
        if store.pinned and not store.alike(kind, store.pinned) and kind != store.kind:
            with pytest.raises(RuntimeError, match="handed out by as_kernel_operands"):
                alias.weight.shuffle_(kind)
            return
        if kind == "none" and data.draw(st.booleans()):
            assert alias.weight.unshuffle_() is alias.weight
        else:
            assert alias.weight.shuffle_(kind) is alias.weight
            store.target = kind if store.target else None
        store.relayout(kind)

    @rule(data=st.data(), version=st.sampled_from(["#3470 (shuffle_kind)", "v0.1.18 and later"]))
    def first_use(self, data: st.DataObject, version: str) -> None:
        alias = self.pick(data, lambda alias: alias.whole_experts and alias.store.pinned is None)
        store, kind = alias.store, EXPECTED[version].layout
        way = data.draw(st.sampled_from(["flatten", "prepare", "operands"]))
        with override_arch("gfx950"), fake_aiter(version):
            if way == "operands":
                if store.target not in (None, *OTHER):
                    with pytest.raises(RuntimeError, match="does not read the layout that the weight is fixed to"):
                        alias.weight.as_kernel_operands()
                    return
                if not alias.weight.qdata.is_contiguous():
                    with pytest.raises(ValueError, match="not contiguous"):
                        alias.weight.as_kernel_operands()
                    return
                kind = store.target or kind
                operands = alias.weight.as_kernel_operands()
                assert operands.weight.data_ptr() == alias.weight.qdata.data_ptr()
                store.pinned = kind
            else:
                kind = store.target or kind
                if way == "flatten":
                    alias.weight.__tensor_flatten__()
                else:
                    prepare(module_with(alias.weight))
        store.relayout(kind)

    # --- other tensors over the same bytes

    @rule(
        data=st.data(), way=st.sampled_from(["detach", "data", "Parameter", "view", "copy", "state_dict", "inference"])
    )
    def alias(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data)
        weight = alias.weight
        with torch.inference_mode(way == "inference"):
            found = {
                "detach": lambda: weight.detach(),
                "data": lambda: weight.data,
                "Parameter": lambda: nn.Parameter(weight),
                "view": lambda: weight.view(weight.shape),
                "copy": lambda: copy.copy(weight),
                "state_dict": lambda: module_with(weight).state_dict()["w"],
                "inference": lambda: nn.Parameter(weight.detach()),
            }[way]()
        self.hold_view(alias, found, (alias.qdata, alias.scale))

    @rule(data=st.data())
    def window(self, data: st.DataObject) -> None:
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3 and len(alias.qdata) > 0)
        experts, rows, columns = alias.weight.shape

        def part(size: int, unit: int = 1) -> slice:
            size //= unit
            if data.draw(st.booleans()):
                return slice(0, size * unit)
            start = data.draw(st.integers(0, size - 1))
            return slice(start * unit, data.draw(st.integers(start + 1, size)) * unit)

        expert = data.draw(st.one_of(st.integers(-experts, experts - 1), st.just(slice(None)), st.just(slice(None, None, 2)), st.just(slice(1, None))))  # fmt: skip
        if expert == slice(1, None) and experts == 1:
            expert = slice(None)
        window = (expert, part(rows), part(columns, 32))
        self.hold_view(alias, alias.weight[window], windowed((alias.qdata, alias.scale), window))

    @rule(data=st.data(), way=st.sampled_from(["split", "split sizes", "chunk", "unbind", "narrow", "gate and up"]))
    def parted(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3 and len(alias.qdata) > 0)
        experts, rows = len(alias.qdata), alias.qdata.shape[1]
        if way == "gate and up" and rows % 2:
            return
        cut: Callable[[Tensor], Any] = {
            "split": lambda t: t.split(2),
            "split sizes": lambda t: torch.split(t, [1, experts - 1]),
            "chunk": lambda t: t.chunk(2),
            "unbind": lambda t: t.unbind(),
            "narrow": lambda t: [t.narrow(0, experts - 1, 1)],
            "gate and up": lambda t: t.chunk(2, 1),
        }[way]
        found = list(zip(cut(alias.weight), cut(alias.qdata), cut(alias.scale), strict=True))
        weight, *parts = data.draw(st.sampled_from(found))
        if parts[0].numel():
            self.hold_view(alias, weight, (parts[0], parts[1]))

    # --- other bytes

    @rule(data=st.data(), way=st.sampled_from(["clone", "dtype", "copy"]))
    def copied(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data)
        weight, dtype, store = alias.weight, alias.dtype, alias.store
        if way == "dtype":
            dtype = data.draw(st.sampled_from([other for other in DTYPES if other is not alias.dtype]))
        found = {
            "clone": lambda: weight.clone(),
            "dtype": lambda: weight.to(dtype),
            "copy": lambda: weight.to("cpu", copy=True),
        }[way]()
        self.hold_copy(
            found, (alias.qdata, alias.scale), gate_up=alias.gate_up, kind=store.kind, target=store.target, dtype=dtype
        )

    @rule(data=st.data(), way=st.sampled_from(["deepcopy", "pickle"]))
    def copied_with_its_storage(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data)
        store = alias.store
        pair = [alias.weight, store.whole]
        weight, whole = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        all_qdata, all_scale, qdata, scale = copy.deepcopy([store.qdata, store.scale, alias.qdata, alias.scale])
        kind = store.kind if way == "deepcopy" else "none"
        twin = Store(all_qdata, all_scale, store.gate_up, whole, kind, store.target)
        self.hold(Alias(weight, twin, qdata, scale, alias.dtype))

    @rule(data=st.data(), way=st.sampled_from(["index_select", "index", "mask"]))
    def picked(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3 and len(alias.qdata) > 0)
        experts, store = len(alias.qdata), alias.store
        if way == "mask":
            index = torch.tensor(data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
            if not index.any():
                return
        else:
            lowest = 0 if way == "index_select" else -experts
            index = torch.tensor(data.draw(st.lists(st.integers(lowest, experts - 1), min_size=1, max_size=4)))
        take: Callable[[Tensor], Tensor] = (
            (lambda t: t.index_select(0, index)) if way == "index_select" else lambda t: t[index]
        )
        self.hold_copy(
            take(alias.weight),
            (take(alias.qdata), take(alias.scale)),
            gate_up=alias.gate_up,
            kind=store.kind,
            target=store.target,
            dtype=alias.dtype,
        )

    @rule(data=st.data())
    def joined(self, data: st.DataObject) -> None:
        first = self.pick(data)
        alike = (first.qdata.dim(), first.qdata.shape[-2:], first.gate_up, first.dtype)
        rest = [
            self.pick(
                data, lambda alias: (alias.qdata.dim(), alias.qdata.shape[-2:], alias.gate_up, alias.dtype) == alike
            )
            for _ in range(data.draw(st.integers(0, 2)))
        ]
        tensors = [first, *rest]
        if sum(len(alias.parts[0]) for alias in tensors) > 6:
            return
        join = torch.cat if first.qdata.dim() == 3 else torch.stack
        self.hold_copy(
            join([alias.weight for alias in tensors]),
            (join([alias.qdata for alias in tensors]), join([alias.scale for alias in tensors])),
            gate_up=first.gate_up,
            kind=first.store.kind,
            target=first.store.target,
            dtype=first.dtype,
        )

    @rule(data=st.data(), dim=st.sampled_from(["expert", "intermediate"]), world_size=st.integers(1, 3))
    def shard(self, data: st.DataObject, dim: str, world_size: int) -> None:
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3)
        qdata, scale = alias.qdata, alias.scale
        rank = data.draw(st.integers(0, world_size - 1))
        size = len(qdata) if dim == "expert" else qdata.shape[1] // 2 if alias.gate_up else qdata.shape[2] * 2
        unit = 32 if dim == "intermediate" else 1
        each = unit * math.ceil(size / unit / world_size)
        if size % unit or (world_size - 1) * each >= size or (dim == "expert" and size % world_size):
            with pytest.raises(ValueError, match="cannot be parted"):
                alias.weight.shard(rank, world_size, dim=dim)
            return
        if dim == "expert":
            parts = qdata.chunk(world_size)[rank], scale.chunk(world_size)[rank]
        elif alias.gate_up:
            own = slice(rank * each, (rank + 1) * each)
            parts = tuple(torch.cat([half[:, own] for half in part.chunk(2, 1)], 1) for part in (qdata, scale))
        else:
            parts = qdata.split(each // 2, 2)[rank], scale.split(each // 32, 2)[rank]
        self.hold_copy(
            alias.weight.shard(rank, world_size, dim=dim),
            parts,
            gate_up=alias.gate_up,
            kind=alias.store.kind,
            target=alias.store.target,
            dtype=alias.dtype,
        )

    # --- writes

    @rule(data=st.data(), way=st.sampled_from(["copy_", "data", "setitem", "refit_from_hp_", "load_state_dict"]))
    def write(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data)
        parts = self.fresh(tuple(alias.weight.shape))
        source = self.source(data, alias, parts)
        if way == "refit_from_hp_":
            alias.weight.refit_from_hp_(dense(*parts).float())
        elif way == "load_state_dict":
            module_with(alias.weight).load_state_dict({"w": source})
        elif way == "setitem":
            alias.weight[...] = source
        else:
            (alias.weight.data if way == "data" else alias.weight).copy_(source)
        alias.write(parts)

    @rule(data=st.data())
    def write_of_another(self, data: st.DataObject) -> None:
        """From one alias into another, perhaps of the same bytes."""
        alias = self.pick(data)
        source = self.pick(data, lambda other: other.qdata.shape == alias.qdata.shape)
        if source.qdata.shape != alias.qdata.shape:
            return
        alias.weight.copy_(source.weight)
        alias.write((source.qdata.clone(), source.scale.clone()))

    @rule(data=st.data(), part=st.sampled_from(["qdata", "scale"]))
    def write_packed(self, data: st.DataObject, part: str) -> None:
        """As engines' weight loaders do it: one expert, some rows, codes or scales alone."""
        alias = self.pick(data)
        view, own = getattr(alias.weight, f"{part}_view"), getattr(alias, part)
        if own.dim() == 3:
            expert = data.draw(st.integers(0, len(own) - 1))
            view, own = view[expert], own[expert]
        for dim in (0, 1):
            start = data.draw(st.integers(0, own.shape[dim] - 1))
            length = data.draw(st.integers(1, own.shape[dim] - start))
            view, own = view.narrow(dim, start, length), own.narrow(dim, start, length)
        self.salt += 1
        new = marked(*own.shape, salt=self.salt)
        if part == "scale":
            new = 27 + new % 200
        view.copy_(new)
        own.copy_(new)

    @rule(data=st.data())
    def write_zeros(self, data: st.DataObject) -> None:
        alias = self.pick(data)
        alias.weight.zero_()
        alias.qdata.zero_()
        alias.scale.fill_(127)

    @rule(data=st.data(), way=st.sampled_from(["index_copy_", "index_put_", "setitem", "mask"]))
    def write_experts(self, data: st.DataObject, way: str) -> None:
        # of a source, torch strips leading dimensions of size 1: of a single row, all of them
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3 and alias.qdata.shape[1] > 1)
        chosen = data.draw(st.lists(st.integers(0, len(alias.qdata) - 1), min_size=1, unique=True))
        if way == "mask":
            chosen.sort()
        index, weight = torch.tensor(chosen), alias.weight
        parts = self.fresh((len(chosen), *weight.shape[1:]))
        source = self.source(data, alias, parts)
        if way == "index_copy_":
            weight.index_copy_(0, index, source)
        elif way == "index_put_":
            weight.index_put_((index,), source)
        elif way == "setitem":
            weight[index] = source
        else:
            weight[torch.zeros(len(weight), dtype=torch.bool).index_fill_(0, index, True)] = source
        alias.qdata[index], alias.scale[index] = parts

    @rule(data=st.data())
    def permute_experts(self, data: st.DataObject) -> None:
        alias = self.pick(data, lambda alias: alias.qdata.dim() == 3 and alias.whole_experts)
        order = data.draw(st.permutations(range(len(alias.qdata))))
        assert alias.weight.permute_experts_(order) is alias.weight
        alias.write((alias.qdata[order].clone(), alias.scale[order].clone()))

    @rule(data=st.data(), assign=st.booleans())
    def state_dict_round_trip(self, data: st.DataObject, assign: bool) -> None:
        """One weight loaded from another's state_dict: into its bytes, or in their place."""
        alias = self.pick(data)
        source = self.pick(data, lambda other: other.qdata.shape == alias.qdata.shape)
        if source.qdata.shape != alias.qdata.shape:
            return
        module, state = module_with(alias.weight), module_with(source.weight).state_dict()
        module.load_state_dict(state, assign=assign)
        assert isinstance(module.w, nn.Parameter)
        if assign:
            self.hold_view(source, module.w, (source.qdata, source.scale))
        else:
            alias.write((source.qdata.clone(), source.scale.clone()))

    @rule(data=st.data())
    def assign_data(self, data: st.DataObject) -> None:
        """``param.data = other``: this tensor is a view of the other's bytes from now on; its aliases are not."""
        alias = self.pick(data)

        def alike(other: Alias) -> bool:
            return (other.qdata.shape, other.dtype, other.weight.gate_up) == (
                alias.qdata.shape,
                alias.dtype,
                alias.weight.gate_up,
            )

        source = self.pick(data, alike)
        if not alike(source):
            with pytest.raises((TypeError, RuntimeError), match=r"\.data takes|handed out"):
                alias.weight.data = source.weight
            return
        if alias.store.pinned:
            with pytest.raises(RuntimeError, match="handed out by as_kernel_operands"):
                alias.weight.data = source.weight
            return
        alias.weight.data = source.weight
        alias.store, alias.qdata, alias.scale = source.store, source.qdata, source.scale

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        alias = self.pick(data)
        alias.weight.share_memory_()
        if not alias.store.shared:
            alias.store.shared, alias.store.address = True, (0, 0)

    # --- past the tensor

    def write_raw(self, store: Store, kind: str = "none") -> None:
        """New bytes by address, all of them."""
        parts = self.fresh(tuple(store.whole.shape))
        store.qdata.copy_(parts[0])
        store.scale.copy_(parts[1])
        memory = in_memory(parts, kind, gate_up=store.gate_up)
        poke(store.whole.qdata, memory[0])
        poke(store.whole.scale, memory[1])
        if kind == "none":
            self.scribble_on_pads(store)

    def scribble_on_pads(self, store: Store) -> None:
        """As a writer of row-major bytes may: they are rewritten when it says that it is done."""
        halves, rows = 2 if store.gate_up else 1, store.qdata.shape[1]
        for part, own in ((store.whole.qdata, store.qdata), (store.whole.scale, store.scale)):
            split = part.unflatten(1, (halves, -1))
            split[:, :, rows // halves :] = 0xFF
            split[..., own.shape[2] :] = 0xFF

    def refit_is_refused(self, store: Store) -> bool:
        return store.shared and store.kind != "none" and store.interrupted is None

    @rule(data=st.data(), way=st.sampled_from(["all", "a row", "through views", "nothing"]))
    def refitted(self, data: st.DataObject, way: str) -> None:
        alias = self.pick(data)
        store = alias.store
        module = module_with(alias.weight)
        if self.refit_is_refused(store):
            with pytest.raises(RuntimeError, match="another process may hold"), refit(module):
                pass
            return
        with refit(module):
            self.scribble_on_pads(store)
            if way == "all":
                self.write_raw(store)
            elif way == "a row":
                expert, row = data.draw(st.integers(0, len(store.qdata) - 1)), 0
                new, _ = self.fresh((1, 1, store.qdata.shape[2] * 2))
                poke(store.whole.qdata[expert, row, : store.qdata.shape[2]], new[0, 0])
                store.qdata[expert, row] = new[0, 0]
            elif way == "through views":
                parts = self.fresh(tuple(alias.weight.shape))
                alias.weight.qdata_view.copy_(parts[0])
                alias.weight.scale_view.copy_(parts[1])
                alias.write(parts)
            with pytest.raises(RuntimeError, match="it is being written in a refit"):
                alias.weight.dequantize()

    @rule(data=st.data())
    def refit_interrupted(self, data: st.DataObject) -> None:
        alias = self.pick(data)
        store = alias.store
        if self.refit_is_refused(store):
            return
        with suppress(KeyError), refit(module_with(alias.weight)):
            if data.draw(st.booleans()):
                store.whole.qdata.fill_(0xFF)
            raise KeyError("connection lost")
        store.interrupted, store.kind = store.kind, "none"

    @precondition(lambda self: any(alias.store.interrupted for alias in self.aliases))
    @rule(data=st.data(), way=st.sampled_from(["refit", "copy_", "load_state_dict", "refit_from_hp_", "canonical", "shuffled"]))  # fmt: skip
    def recovered(self, data: st.DataObject, way: str) -> None:
        store = data.draw(st.sampled_from([alias.store for alias in self.aliases if alias.store.interrupted]))
        if way == "refit":
            with refit(module_with(store.whole)):
                self.write_raw(store)
        elif way in ("canonical", "shuffled"):
            kind = "none" if way == "canonical" else data.draw(st.sampled_from(LAYOUTS[1:]))
            self.write_raw(store, kind)
            if way == "canonical":
                store.whole.mark_canonical_()
            else:
                store.whole.mark_shuffled_(kind)
                store.kind, store.interrupted = kind, None
        else:
            all_of_it = Alias(store.whole, store, store.qdata, store.scale, store.whole.dtype)
            parts = self.fresh(tuple(store.whole.shape))
            if way == "refit_from_hp_":
                store.whole.refit_from_hp_(dense(*parts).float())
            elif way == "copy_":
                store.whole.copy_(self.source(data, all_of_it, parts))
            else:
                module_with(store.whole).load_state_dict({"w": self.source(data, all_of_it, parts)})
            all_of_it.write(parts)
        store.recover(store.interrupted)

    @rule(data=st.data(), kind=st.sampled_from(LAYOUTS))
    def vouched_for(self, data: st.DataObject, kind: str) -> None:
        """Somebody writes all bytes in some layout, and says which."""
        alias = self.pick(data)
        store = alias.store
        self.write_raw(store, kind)
        if kind == "none":
            alias.weight.mark_canonical_()
        else:
            alias.weight.mark_shuffled_(kind)
        store.kind = kind
        store.recover(None)

    @precondition(lambda self: any(alias.store.interrupted for alias in self.aliases))
    @rule(data=st.data(), way=st.sampled_from(["copy_", "index_copy_", "cat", "setitem"]))
    def read_of_an_interrupted_one(self, data: st.DataObject, way: str) -> None:
        """It is refused, and what was to take its values is as it was."""
        bad = data.draw(st.sampled_from([alias.store for alias in self.aliases if alias.store.interrupted])).whole
        alias = self.pick(data, lambda alias: alias.weight.shape == bad.shape)
        if alias.weight.shape != bad.shape:
            return
        read: Callable[[], object] = {
            "copy_": lambda: alias.weight.copy_(bad),
            "index_copy_": lambda: alias.weight.index_copy_(0, torch.arange(len(bad)), bad),
            "cat": lambda: torch.cat([alias.weight, bad]),
            "setitem": lambda: alias.weight.__setitem__(..., bad),
        }[way]
        with pytest.raises((RuntimeError, ValueError), match="cannot be used|must agree"):
            read()

    # --- what must hold

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        Life.seen += 1
        for store in {id(alias.store): alias.store for alias in self.aliases}.values():
            memory = store.whole.qdata, store.whole.scale
            if store.interrupted is None:
                for found, expected in zip(
                    memory, in_memory((store.qdata, store.scale), store.kind, gate_up=store.gate_up), strict=True
                ):
                    assert torch.equal(found, expected)  # pads too
            address = memory[0].data_ptr(), memory[1].data_ptr()
            assert store.address in ((0, 0), address)
            store.address = address
        for alias in self.aliases:
            weight, store = alias.weight, alias.store
            assert weight.shape == (*alias.qdata.shape[:-1], alias.qdata.shape[-1] * 2)
            assert (weight.dtype, weight.gate_up) == (alias.dtype, alias.gate_up)
            assert weight.is_shuffled == (store.kind != "none")
            assert weight.shuffle_kind == (store.kind if weight.is_shuffled else store.target)
            if store.interrupted is not None:
                for read in (weight.dequantize, weight.logical_checksum, weight.clone):
                    with pytest.raises(RuntimeError, match="this weight cannot be used: a refit ended early"):
                        read()
                continue
            assert torch.equal(weight.dequantize(torch.float64), dense(alias.qdata, alias.scale))
            assert weight.logical_checksum() == checksum(*alias.parts)


def module_with(weight: ShuffledMXFP4Tensor) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(weight)
    return module


@pytest.mark.usefixtures("one_thread")
@pytest.mark.usefixtures("no_triton")
def test_a_weights_life() -> None:
    """At least 2,000 steps, always the same; `make fuzz` goes further, from another seed each time."""
    seen, lives = Life.seen, 0

    class Counted(Life):
        def __init__(self) -> None:
            nonlocal lives
            lives += 1
            super().__init__()

    run_state_machine_as_test(
        Counted,
        settings=settings(
            max_examples=FUZZ or LIVES,
            stateful_step_count=STEPS,
            derandomize=not FUZZ,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # a failing life is printed as it is: to find a shorter one takes minutes
            phases=list(Phase) if FUZZ else [Phase.generate],
        ),
    )
    assert Life.seen - seen - lives >= (0 if FUZZ else AT_LEAST)
