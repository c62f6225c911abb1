# SPDX-License-Identifier: MIT
"""What every engine needs: the bytes that it has laid out for its kernels become weights, and stay where they are.

vLLM, SGLang and ATOM all call a layer's parameters `w13_weight` and `w2_weight`, each with a `_scale`: plain tensors.
How an engine has laid them out is not assumed, but found out: an expert as it came from the checkpoint is compared with
what became of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from shuffled_tensor.layouts import LAYOUTS, ROW_MAJOR, Layout
from shuffled_tensor.mxfp4 import CODES, SCALES, Part
from shuffled_tensor.tensor.geometry import Geometry, RowOrder, interleave_rows, part_rows
from shuffled_tensor.tensor.part_view import PartView
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.validity import State
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["Experts", "LeftAlone", "Loaded", "lay_out", "turned_off"]

_W13, _W2 = "w13_weight", "w2_weight"
_NAMES = {_W13: True, _W2: False}
"""Of the weights, and whether their rows are gate and up."""

_PARAMETERS: dict[str, tuple[str, Part]] = {
    name + suffix: (name, part) for name in _NAMES for part, suffix in ((CODES, ""), (SCALES, "_scale"))
}
"""By each parameter's name: that of its weight, and what of that it holds."""

_BIASES = ("w13_bias", "w13_weight_bias")
"""What engines call the bias of gate and up."""


def turned_off() -> str | None:
    """Why no engine is helped, if so."""
    return "SHUFFLED_TENSOR_PLUGIN=0" if os.environ.get("SHUFFLED_TENSOR_PLUGIN") == "0" else None


def lay_out(layer: Any, process: Callable[[], None]) -> str | None:
    """Let an engine lay out a layer, and own the bytes that it makes as ``layer.mxfp4_experts``.

    The second time it comes with other tensors, their values go into the bytes of the first; where loaders have
    written straight into these, nothing is left to do.

    Args:
        process: the engine's own function, bound.

    Returns:
        Why the layer is left to its engine; None where its bytes are owned.

    Raises:
        LeftAlone: they were owned, and what comes in their place cannot be taken over. They are as they were.
    """
    experts: Experts | None = getattr(layer, "mxfp4_experts", None)
    if experts is not None and experts.are_of(layer):
        experts.vouch()
        return None
    try:
        loaded = Loaded.of(layer)
    except LeftAlone as why:
        if experts is not None:
            raise
        process()
        return str(why)
    process()
    if experts is not None:
        experts.take_over(layer, loaded)
        return None
    try:
        layer.mxfp4_experts = Experts.adopt(layer, loaded)
    except LeftAlone as why:
        return str(why)
    return None


class LeftAlone(RuntimeError):
    """Why a layer stays as its engine made it."""


class Loaded(NamedTuple):
    """A layer's weights as they came from a checkpoint, row-major."""

    experts: int
    geometries: dict[str, Geometry]
    telling: int | None
    """An expert whose bytes come out differently in every layout; None where there are no experts."""
    sample: dict[str, Tensor]
    """Of each parameter, a copy of that expert's bytes."""
    attributes: dict[str, dict[str, Any]]
    """That the engine had put on each parameter: its loader among them."""
    under_marks: Tensor | None
    """The first expert's codes of w13, where no expert's tell anything, as those of dummy weights, and others are there
    now."""

    @classmethod
    def of(cls, layer: nn.Module) -> Loaded:
        """To be called before the engine lays them out.

        Raises:
            LeftAlone: they are no MXFP4 weights of whole blocks, or laid out already.
        """
        given: dict[str, Tensor] = {}
        for parameter in _PARAMETERS:
            data = getattr(layer, parameter, None)
            if not isinstance(data, Tensor) or data.dim() != 3 or data.element_size() != 1:
                found = f"{list(data.shape)}, {data.dtype}" if isinstance(data, Tensor) else type(data).__name__
                raise LeftAlone(f"{parameter} is not packed [experts, rows, columns], but {found}")
            if getattr(data, "is_shuffled", False):
                raise LeftAlone(f"{parameter} is tagged as shuffled already")
            if data.is_meta or not hasattr(data, "weight_loader"):
                raise LeftAlone(f"{parameter} has no memory" if data.is_meta else f"nobody loads {parameter}")
            given[parameter] = data.detach()
        geometries = {}
        for name, gate_up in _NAMES.items():
            experts, rows, width = given[name].shape
            geometry = Geometry(rows, width * CODES.per_byte, gate_up, align=(32, 32))
            scales = given[f"{name}_scale"].shape
            if geometry.padded_shape(CODES) != geometry.shape(CODES) or scales != (experts, *geometry.shape(SCALES)):
                raise LeftAlone(f"{name} is {[experts, rows, width]} bytes with scales {list(scales)}")
            geometries[name] = geometry
        codes, under_marks = given[_W13].view(torch.uint8), None
        telling = next((expert for expert in range(experts) if _tells(codes[expert], geometries[_W13])), None)
        if telling is None and experts:
            telling, under_marks = 0, codes[0].clone()
            place = torch.arange(under_marks.numel(), device=codes.device)
            codes[0].copy_((place * 2654435761 >> 16 & 255).view_as(under_marks))
        sample = {}
        if telling is not None:
            sample = {parameter: data.view(torch.uint8)[telling].clone() for parameter, data in given.items()}
        attributes = {parameter: vars(getattr(layer, parameter)).copy() for parameter in _PARAMETERS}
        return cls(experts, geometries, telling, sample, attributes, under_marks)

    def laid_out(self, layer: nn.Module) -> tuple[dict[str, Tensor], Layout, RowOrder]:
        """What the engine has made of them since: by parameter, its bytes ``[E, padded rows, padded bytes]``; and how
        they lie.

        Raises:
            LeftAlone: in no way that this package knows.
        """
        made = {parameter: self._bytes(layer, parameter) for parameter in _PARAMETERS}
        for layout, row_order in _ways():
            if all(self._became(parameter, made[parameter], layout, row_order) for parameter in self.sample):
                return made, layout, row_order
        known = ", ".join(dict.fromkeys(layout.name for layout, _ in _ways()))
        raise LeftAlone(f"its engine has laid it out in no way that is known here ({known})")

    def _bytes(self, layer: nn.Module, parameter: str) -> Tensor:
        name, part = _PARAMETERS[parameter]
        data, size = getattr(layer, parameter, None), (self.experts, *self.geometries[name].padded_shape(part))
        if not isinstance(data, Tensor) or data.element_size() != 1 or data.numel() != torch.Size(size).numel():
            found = list(data.shape) if isinstance(data, Tensor) else type(data).__name__
            raise LeftAlone(f"what became of {parameter} is not {list(size)} bytes, but {found}")
        if not data.is_contiguous() or data.data_ptr() % 16:
            raise LeftAlone(f"what became of {parameter} is not contiguous, or not at a multiple of 16 bytes")
        return data.detach().view(torch.uint8).view(size)

    def _became(self, parameter: str, made: Tensor, layout: Layout, row_order: RowOrder) -> bool:
        """Whether what was loaded into a parameter, laid out so, is what was made of it."""
        name, part = _PARAMETERS[parameter]
        geometry = self.geometries[name]
        interleaved = geometry.gate_up and row_order == "interleaved"
        expected = geometry.pad(part, self.sample[parameter].unsqueeze(0), interleaved=interleaved)
        row_major = layout.order(part, geometry.gate_up).unshuffle(made[self.telling].unsqueeze(0))
        columns = geometry.shape(part)[1]  # what stands in pads is the engine's
        return torch.equal(row_major[..., :columns], expected[..., :columns])


def _ways() -> Iterator[tuple[Layout, RowOrder]]:
    """How an engine may lay out a layer whose rows come in some order."""
    return product([layout for layout in LAYOUTS.values() if layout is not ROW_MAJOR], get_args(RowOrder))


def _tells(codes: Tensor, geometry: Geometry) -> bool:
    """Whether an expert's codes of w13, ``[N, K/2]``, come out differently in each way."""
    out = []
    for layout, row_order in _ways():
        row_major = geometry.pad(CODES, codes.unsqueeze(0), interleaved=row_order == "interleaved")
        out.append(layout.order(CODES, True).shuffle(row_major))
    return not any(torch.equal(one, other) for one, other in combinations(out, 2))


class Experts(NamedTuple):
    """The two weights of a layer, over the bytes of its parameters. Their layout is locked: the engine's kernels read
    it. As a tuple in a module, they are found by `prepare` and `refit`."""

    w13: ShuffledMXFP4Tensor
    w2: ShuffledMXFP4Tensor

    @classmethod
    def adopt(cls, layer: nn.Module, loaded: Loaded) -> Experts:
        """Of what the engine has laid out. From now on, the loaders that it has put on the layer's parameters write
        where bytes belong: loading again is a refit in place.

        Raises:
            LeftAlone: it cannot be; the layer is as it was.
        """
        made, layout, row_order = loaded.laid_out(layer)
        weights = []
        for name, geometry in loaded.geometries.items():
            order = row_order if geometry.gate_up else "contiguous"
            storage = PackedStorage(made[name], made[f"{name}_scale"], geometry, layout, row_order=order)
            storage.lock_layout()
            weights.append(ShuffledMXFP4Tensor._wrap(storage, storage.whole(), 3, torch.bfloat16))
        experts = cls(*weights)
        experts._load_through_views(layer, loaded)
        experts._unmark(loaded)
        return experts

    def _load_through_views(self, layer: nn.Module, loaded: Loaded) -> None:
        for parameter, attributes in loaded.attributes.items():
            there = getattr(layer, parameter)  # perhaps a new one, on which nobody has put anything
            vars(there).update(attributes | vars(there))
            there.weight_loader = self._through_view(attributes["weight_loader"], parameter)
        for name in _BIASES:
            loader = getattr(getattr(layer, name, None), "weight_loader", None)
            if loader is not None and not hasattr(loader, "in_row_order"):
                getattr(layer, name).weight_loader = self._in_row_order(loader, layer, name)

    def _unmark(self, loaded: Loaded) -> None:
        if loaded.under_marks is not None:
            self.w13.qdata_view[0].copy_(loaded.under_marks)

    @property
    def summary(self) -> str:
        """Layout and size, in words."""
        return f"{self.w13.shuffle_kind}, {(self.w13.nbytes + self.w2.nbytes) / 2**30:.2f} GiB"

    def weight(self, name: str) -> ShuffledMXFP4Tensor:
        """By the name of the engine's parameter."""
        return dict(zip(_NAMES, self, strict=True))[name]

    def operand(self, parameter: str) -> Tensor:
        """A parameter's bytes as they lie: uint8."""
        name, part = _PARAMETERS[parameter]
        return self.weight(name)._storage.bytes_of(part)

    def view(self, parameter: str) -> PartView:
        """A parameter's bytes as loaders know them, row-major."""
        name, part = _PARAMETERS[parameter]
        return self.weight(name).qdata_view if part is CODES else self.weight(name).scale_view

    def are_of(self, layer: nn.Module) -> bool:
        """Whether the layer's parameters are these bytes."""
        return all(getattr(layer, name).data_ptr() == self.operand(name).data_ptr() for name in _PARAMETERS)

    def vouch(self) -> None:
        """Their engine says that these bytes are weights, where they were none."""
        for weight in self:
            if weight._storage.validity.state is State.INVALID:
                weight._storage.assume(weight._storage.layout)

    def give_up(self) -> None:
        """Hold no memory, because the engine frees what its parameters have."""
        for weight in self:
            weight._storage.give_up()

    def take(self, layer: nn.Module) -> None:
        """What the engine has allocated for its parameters since. The weights are unusable until it lays them out, or
        finds them laid out by its loaders."""
        for name in _NAMES:
            storage = self.weight(name)._storage
            given = [getattr(layer, parameter).detach().view(torch.uint8) for parameter in (name, f"{name}_scale")]
            for data, pad in zip(given, (CODES.pad, SCALES.pad), strict=True):
                data.fill_(pad)  # which loaders leave where an engine pads
            storage.take(given[0].view(storage.qdata.shape), given[1].view(storage.scale.shape))

    def take_over(self, layer: nn.Module, loaded: Loaded) -> None:
        """The engine has laid out other values, in memory of its own: they go into these bytes, and these into the
        layer's parameters.

        Raises:
            LeftAlone: they cannot; these bytes are as they were.
        """
        made, layout, row_order = loaded.laid_out(layer)
        known = [tuple(one.shape) for one in self], self.w13.shuffle_kind, self.w13.row_order
        sizes = [(loaded.experts, geometry.rows, geometry.columns) for geometry in loaded.geometries.values()]
        if loaded.experts and (sizes, layout.name, row_order) != known:
            raise LeftAlone(f"weights of {sizes}, {layout.name}, rows {row_order}, came in the place of {known}")
        for name in _NAMES:
            storage = self.weight(name)._storage
            with storage.writing(whole=True):
                storage.touch()
                storage.qdata.copy_(made[name])
                storage.scale.copy_(made[f"{name}_scale"])
        self._unmark(loaded)
        for parameter in _PARAMETERS:
            there = getattr(layer, parameter)
            there.data = self.operand(parameter).view(there.dtype).view(there.shape)
        self._load_through_views(layer, loaded)

    def _through_view(self, loader: Callable[..., Any], parameter: str) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(param: Tensor, *args: Any, **kwargs: Any) -> Any:
            if param.data_ptr() != self.operand(parameter).data_ptr():  # one from which it will be laid out anew
                return loader(param, *args, **kwargs)
            view = self.view(parameter)
            vars(view).update(vars(param))
            return loader(view, *args, **kwargs)

        return load

    def _in_row_order(self, loader: Callable[..., Any], layer: nn.Module, name: str) -> Callable[..., Any]:
        """Of the bias of w13, whose rows the engine has parted as those of the weight."""

        @functools.wraps(loader)
        def load(param: Tensor, *args: Any, **kwargs: Any) -> Any:
            if param.data_ptr() != getattr(layer, name).data_ptr() or self.w13.row_order != "interleaved":
                return loader(param, *args, **kwargs)
            with self.w13._storage.lock:  # others may load other experts' meanwhile
                as_loaded = nn.Parameter(interleave_rows(param.data), requires_grad=False)
                vars(as_loaded).update(vars(param))
                result = loader(as_loaded, *args, **kwargs)
                param.data.copy_(part_rows(as_loaded.data))
            return result

        load.in_row_order = True  # type: ignore[attr-defined]
        return load
