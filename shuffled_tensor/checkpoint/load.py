# SPDX-License-Identifier: MIT
"""Reading checkpoints into parameters, expert by expert."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shuffled_tensor.checkpoint.names import FormatName, Layer, find_layers, is_shared, manifest_weights
from shuffled_tensor.checkpoint.progress import progress
from shuffled_tensor.checkpoint.source import Files
from shuffled_tensor.checkpoint.weight import BIAS, Weight
from shuffled_tensor.layouts import ROW_MAJOR
from shuffled_tensor.mxfp4 import CODES, PARTS
from shuffled_tensor.tensor.checksums import checksum
from shuffled_tensor.tensor.geometry import (
    ALIGN,
    Align,
    Geometry,
    RowOrder,
    ShardDim,
    aligns_of_layer,
    check_rank,
    shard_range,
)
from shuffled_tensor.tensor.place import Place
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

__all__ = ["Experts", "load_experts", "load_file"]

_log = logging.getLogger("shuffled_tensor")

_SHARED = 2**20
"""Bytes of an expert from which on threads share the work."""


class Experts(NamedTuple):
    """One layer's weights, as :func:`shuffled_tensor.fused_moe` takes them; plain tensors where the checkpoint holds
    them unquantised."""

    w13: Tensor
    w2: Tensor
    w13_bias: Tensor | None
    w2_bias: Tensor | None


def load_experts(
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    format: FormatName = "auto",
    row_order: RowOrder | None = None,
    device: torch.device | str = "cpu",
    rank: int | tuple[int, ...] = 0,
    world_size: int | tuple[int, ...] = 1,
    dim: ShardDim | tuple[ShardDim, ...] = "expert",
    into: nn.Module | None = None,
    align: Align | None = None,
) -> dict[str, Experts]:
    """Read the expert weights of a checkpoint, expert by expert: gpt-oss, Quark, compressed-tensors
    ``mxfp4-pack-quantized``, DeepSeek V4, or what :func:`save_file` and ``convert`` wrote.

    Args:
        path: a safetensors file, or a directory of them, with or without an index.
        prefix: what the names must begin with: ``"model.layers.3."`` reads one layer.
        format: ``"gpt-oss"``, ``"quark"``, ``"compressed-tensors"``, ``"deepseek"``, ``"shuffled_tensor"``, or
            ``"auto"`` to have it read off the names.
        row_order: of gate and up rows that are in one tensor of a format whose names do not tell, as ``gate_up_proj``
            of Quark: ``"interleaved"`` (gpt-oss) or ``"contiguous"``.
        device: where new tensors go; on ``"meta"`` they have sizes only, and only headers are read.
        rank, world_size: of how many parts which is wanted; only that part is read. With two ``dim``, one of each:
            ``rank=(1, 0), world_size=(2, 4), dim=("expert", "intermediate")`` is the second half of the experts, and of
            these the first quarter of the intermediate dimension.
        dim: ``"expert"`` for expert parallelism (shared experts are whole on every rank), or ``"intermediate"`` for
            tensor parallelism: matching gate and up rows of w13, columns of w2, parted as
            :meth:`ShuffledMXFP4Tensor.shard` does. A w2 bias is rank 0's alone there, zero for the others, since ranks'
            outputs are added.
        into: write into the parameters ``w13_weight``, ``w2_weight``, ``w13_bias`` and ``w2_bias`` of this module's
            submodules of the layers' names, in the layout and at the address that they have, instead of into new
            tensors.
        align: what new packed tensors are padded to multiples of, as :class:`ShuffledMXFP4Tensor` takes it: one number,
            or one for the hidden and one for the intermediate size. None is what the checkpoint's padded bytes have, or
            256 where they have no padding. Not to be given with ``into``.

    Returns:
        The layers by name (``"model.layers.3.mlp.experts"``): w13 ``[E, 2I, K]``, gate rows first, and w2 ``[E, K,
        I]``, either a :class:`ShuffledMXFP4Tensor` or, where the checkpoint does not quantise it, plain and in its
        dtype; biases ``[E, 2I]`` and ``[E, K]`` in theirs, or None. Shared experts in any other quantisation are left
        out, with a warning in the log. Weights with checksums have been compared with them; some experts, all of each,
        where these have their own, which files from before do not.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a damaged file, or one that does not hold what its names say.
        ValueError: arguments that do not fit each other, or parameters of other shapes.

    No parameter has changed when it raises, unless a file that was whole cannot be read to its end: then the weight
    that was being written refuses to be used.
    """
    ranks = _ranks(rank, world_size, dim)
    _check_device(device)
    aligns = (None, None) if align is None else aligns_of_layer(align)
    if into is not None and align is not None:
        raise ValueError(f"align={align!r} pads new tensors, and the parameters of into= stay padded as they are")
    start = time.perf_counter()
    with Files(path) as files:
        plan = []
        for name, layer in find_layers(files, prefix, format, row_order).items():
            cut = _cut(name, layer, ranks)
            targets = _new(layer, cut, device, aligns) if into is None else _parameters(into, name, layer, cut)
            plan.append((name, layer, cut, targets))
        if into is not None:  # before any of them changes
            for _, layer, cut, _ in plan:
                for weight in layer:
                    _verify(weight, cut)
        count = sum(not tensor.is_meta for *_, targets in plan for tensor in targets[:2])
        with progress("loading experts", count, "weights") as done:
            for _, layer, cut, targets in plan:
                for weight, tensor, bias in zip(layer, targets[:2], targets[2:], strict=True):
                    _set_place(weight, cut, tensor)
                    if tensor.is_meta:
                        continue
                    _write(weight, cut, tensor)
                    if bias is not None:
                        others = cut.span.start > 0 and not weight.gate_up  # one rank's alone, since outputs are added
                        with torch.inference_mode(bias.is_inference()), torch.no_grad():
                            for place, expert in enumerate(cut.experts):
                                bias[place] = 0 if others else weight.read(BIAS, expert, cut.span)
                    if into is None and cut.whole:
                        weight.check_whole(partial(_checksum, weight, tensor))
                    done(1)
    loaded = {name: targets for name, _, _, targets in plan}
    if count:  # on the meta device nothing was read
        _log.info(
            "loaded the experts of %d layers, %.2f GiB, from %s in %.2f s",
            len(plan),
            sum(_nbytes(tensor) for targets in loaded.values() for tensor in targets[:2]) / 2**30,
            files.path,
            time.perf_counter() - start,
        )
    return loaded


class _Cut(NamedTuple):
    """A rank's part of a layer."""

    experts: range
    span: range
    whole: bool

    def is_some_experts(self, weight: Weight) -> bool:
        """Whether it is some experts, and all of each."""
        return not self.whole and len(self.span) == weight.intermediate


_Ranks = dict[ShardDim, tuple[int, int]]
"""By dimension: which part, of how many."""


def _ranks(
    rank: int | tuple[int, ...], world_size: int | tuple[int, ...], dim: ShardDim | tuple[ShardDim, ...]
) -> _Ranks:
    places = rank if isinstance(rank, tuple) else (rank,)
    sizes = world_size if isinstance(world_size, tuple) else (world_size,)
    dims = dim if isinstance(dim, tuple) else (dim,)
    known = all(each in ("expert", "intermediate") for each in dims)
    if not known or len(set(dims)) != len(dims):
        raise ValueError(f"dim must be 'expert' or 'intermediate', or both, found {dim!r}")
    if not len(places) == len(sizes) == len(dims):
        raise ValueError(f"rank, world_size and dim must be one each, or as many, found {rank}, {world_size}, {dim!r}")
    for each in zip(places, sizes, strict=True):
        check_rank(*each)
    return dict(zip(dims, zip(places, sizes, strict=True), strict=True))


def _cut(name: str, layer: Layer, ranks: _Ranks) -> _Cut:
    whole: dict[ShardDim, range] = {"expert": range(layer.w13.shape[0]), "intermediate": range(layer.w2.shape[2])}
    parts = dict(whole)
    for dim, (rank, world_size) in ranks.items():
        if world_size > 1 and not (dim == "expert" and is_shared(name)):
            try:
                parts[dim] = shard_range(len(whole[dim]), rank, world_size, dim)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return _Cut(parts["expert"], parts["intermediate"], parts == whole)


def _shapes(layer: Layer, cut: _Cut) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    hidden = layer.w13.shape[2]
    return (len(cut.experts), 2 * len(cut.span), hidden), (len(cut.experts), hidden, len(cut.span))


def _new(
    layer: Layer, cut: _Cut, device: torch.device | str, aligns: tuple[tuple[int, int] | None, tuple[int, int] | None]
) -> Experts:
    tensors, biases = [], []
    for weight, shape, align in zip(layer, _shapes(layer, cut), aligns, strict=True):
        tensors.append(_empty(weight, shape, device, align))
        named = next(iter(weight.tensors[BIAS].values()), None)
        dtype = None if named is None else weight.files.dtype(named)
        biases.append(None if dtype is None else torch.zeros(shape[:2], dtype=dtype, device=device))
    return Experts(*tensors, *biases)


def _empty(
    weight: Weight, shape: tuple[int, int, int], device: torch.device | str, align: tuple[int, int] | None = None
) -> Tensor:
    if not weight.quantized:
        return torch.empty(shape, dtype=weight.dtype, device=device)
    layout = ROW_MAJOR if weight.entry is None else weight.entry.layout
    own = ALIGN if weight.entry is None else weight.entry.align
    geometry = Geometry(shape[1], shape[2], weight.gate_up, align or own)
    storage = PackedStorage.empty(shape[0], geometry, torch.device(device), layout)
    storage.requested_layout = None if weight.entry is None else weight.entry.requested_layout
    if weight.row_order == "interleaved":
        storage.validity.row_order = "interleaved"  # as who loads the same tensors again will bring them
    return ShuffledMXFP4Tensor._wrap(storage, storage.whole(), 3, weight.dtype)


def _set_place(weight: Weight, cut: _Cut, tensor: Tensor) -> None:
    """Say which part of the checkpoint's weight a packed tensor holds, unless it is a view of something else."""
    if isinstance(tensor, ShuffledMXFP4Tensor) and tensor._window == tensor._storage.whole():
        whole = Place.whole(weight.shape, 2 if weight.gate_up else 1)
        part = whole._replace(experts=cut.experts)
        tensor.place = part._replace(rows=cut.span) if weight.gate_up else part._replace(columns=cut.span)


def _check_device(device: torch.device | str | int) -> None:
    """Raise ValueError for a device that is none, or not here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _parameters(module: nn.Module, name: str, layer: Layer, cut: _Cut) -> Experts:
    """The parameters that a layer goes into, after a look at every one of them."""
    try:
        owner = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the module has no submodule {name!r} to load into") from error
    found = []
    for weight, shape, which in zip(layer, _shapes(layer, cut), ("w13", "w2"), strict=True):
        tensor, bias = getattr(owner, f"{which}_weight", None), getattr(owner, f"{which}_bias", None)
        packed = isinstance(tensor, ShuffledMXFP4Tensor)
        if tensor is None or tensor.shape != shape or packed != weight.quantized:
            wanted = f"a {'ShuffledMXFP4Tensor' if weight.quantized else 'plain tensor'} of shape {list(shape)}"
            what = "nothing" if tensor is None else f"a {type(tensor).__name__} of shape {list(tensor.shape)}"
            raise ValueError(f"{name}.{which}_weight must be {wanted} for what {weight.files.path} holds, found {what}")
        if isinstance(tensor, ShuffledMXFP4Tensor) and tensor.gate_up != weight.gate_up:
            raise ValueError(f"{name}.{which}_weight must have gate_up={weight.gate_up}, found {tensor.gate_up}")
        for part, own in (("weight", tensor), ("bias", bias)):
            if own is not None and own.device.type == "meta":
                raise ValueError(
                    f"{name}.{which}_{part} is on the meta device, where nothing can be loaded; see to_empty()"
                )
            if own is not None and not own.is_floating_point():
                raise ValueError(f"{name}.{which}_{part} must be floating point, found {own.dtype}")
        if bool(weight.tensors[BIAS]) != (bias is not None) or (bias is not None and bias.shape != shape[:2]):
            what = "none" if bias is None else f"shape {list(bias.shape)}"
            wanted = f"of shape {list(shape[:2])}" if weight.tensors[BIAS] else "absent"
            raise ValueError(f"{name}.{which}_bias must be {wanted} for what {weight.files.path} holds, found {what}")
        found.append((tensor, bias))
    return Experts(found[0][0], found[1][0], found[0][1], found[1][1])


def _write(weight: Weight, cut: _Cut, tensor: Tensor) -> None:
    """Read a rank's part of a weight into a tensor, expert by expert. If that ends early, a packed one refuses to be
    used."""
    if not isinstance(tensor, ShuffledMXFP4Tensor):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            for place, expert in enumerate(cut.experts):
                values = weight.read(CODES, expert, cut.span)
                if cut.is_some_experts(weight):
                    weight.check(expert, [values])
                tensor[place].copy_(values)
        return
    storage, experts = tensor._storage, tensor._window.experts
    with tensor.writing():
        if storage.layout is ROW_MAJOR and storage.qdata.device.type == "cpu" and not tensor.is_part_of_experts:
            storage.touch()
            _read_into(weight, cut, storage, experts)
            return
        for own, expert in zip(experts, cut.experts, strict=True):
            codes, scale = (weight.read(part, expert, cut.span) for part in PARTS)
            if cut.is_some_experts(weight):
                weight.check(expert, (codes, scale))
            storage.write(tensor._window._replace(experts=range(own, own + 1)), codes[None], scale[None])


def _read_into(weight: Weight, cut: _Cut, storage: PackedStorage, experts: range) -> None:
    """Read the file's bytes to where they belong, in several threads: a new tensor's pages are made while they are
    written. Small experts are read by one, since threads would mostly wait for each other."""
    pairs = list(zip(experts, cut.experts, strict=True))
    threads = torch.get_num_threads() if storage.qdata[:1].nbytes >= _SHARED else 1

    def read(some: list[tuple[int, int]]) -> None:
        with torch.inference_mode(storage.qdata.is_inference()), torch.no_grad():
            for own, expert in some:
                parts = zip(PARTS, storage.select(range(own, own + 1)), strict=True)
                rows = [storage.geometry.halves_of(part, data)[0] for part, data in parts]
                for part, out in zip(PARTS, rows, strict=True):
                    weight.read_into(out, part, expert, cut.span)
                if cut.is_some_experts(weight):
                    weight.check(expert, rows)

    if threads == 1:
        read(pairs)
        return
    each = -(-len(pairs) // (4 * threads))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, [pairs[first : first + each] for first in range(0, len(pairs), each)]):
            pass


def _verify(weight: Weight, cut: _Cut) -> None:
    """Raise CheckpointError where the values of a part do not have the checksums that were noted of them."""
    if cut.whole:
        weight.check_whole(weight.checksum)
    elif cut.is_some_experts(weight):
        for expert in cut.experts:
            weight.check(expert, weight.expert(expert))


def _checksum(weight: Weight, tensor: Tensor) -> str:
    return tensor.logical_checksum() if isinstance(tensor, ShuffledMXFP4Tensor) else checksum(weight.shape, tensor)


def _nbytes(tensor: Tensor) -> int:
    if isinstance(tensor, ShuffledMXFP4Tensor):
        return sum(tensor.numel() // part.per_byte for part in PARTS)
    return tensor.nbytes


def load_file(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_file` wrote, as ``safetensors.torch.load_file`` does: weights come back in the layout that
    they were saved in. On the device ``"meta"`` tensors have sizes only, and only the header is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a device that is none, or not here.
        CheckpointError: a damaged file, a manifest that is missing, unknown or does not fit, or a weight whose checksum
            is another.
    """
    _check_device(device)
    loaded: dict[str, Tensor] = {}
    with Files(path) as files:
        weights = manifest_weights(files)
        for name, weight in weights.items():
            experts, intermediate = range(weight.shape[0]), range(weight.intermediate)
            tensor = _empty(weight, weight.shape, device)
            assert weight.entry is not None
            assert isinstance(tensor, ShuffledMXFP4Tensor)
            if not tensor.is_meta:
                _write(weight, _Cut(experts, intermediate, True), tensor)
                weight.check_whole(tensor.logical_checksum)
            loaded[name] = tensor if len(weight.entry.shape) == 3 else tensor[0]
        parts = {f"{name}.{part}" for name in weights for part in PARTS}
        for name in files:
            if name not in parts:
                dtype, shape = files.dtype(name), files.shape(name)
                meta = torch.device(device).type == "meta"
                loaded[name] = torch.empty(shape, dtype=dtype, device=device) if meta else files.read(name).to(device)
    return loaded
