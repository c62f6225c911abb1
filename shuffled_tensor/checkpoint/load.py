# SPDX-License-Identifier: MIT
"""Reading checkpoints into parameters, expert by expert, and saving tensors so that they can be trusted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shuffled_tensor.checkpoint import manifest
from shuffled_tensor.checkpoint.files import DTYPES, CheckpointError, Files, Part, write_file
from shuffled_tensor.checkpoint.formats import Layer, Weight, find_layers, manifest_weights
from shuffled_tensor.geometry import Geometry
from shuffled_tensor.layouts import ShuffleKind
from shuffled_tensor.mxfp4 import BLOCK
from shuffled_tensor.storage import PackedStorage
from shuffled_tensor.tensor import ShuffledMXFP4Tensor

__all__ = ["Experts", "load_experts", "load_file", "save_file"]

_log = logging.getLogger("shuffled_tensor")


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
    format: str = "auto",
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    dim: str = "expert",
    into: nn.Module | None = None,
) -> dict[str, Experts]:
    """Read the expert weights of a checkpoint, expert by expert: gpt-oss, Quark, compressed-tensors
    ``mxfp4-pack-quantized``, DeepSeek V4, or what :func:`save_file` and ``convert`` wrote.

    Args:
        path: a safetensors file, or a directory of them, with or without an index.
        prefix: what the names must begin with: ``"model.layers.3."`` reads one layer.
        format: ``"gpt-oss"``, ``"quark"``, ``"compressed-tensors"``, ``"deepseek"``, ``"shuffled_tensor"``, or
            ``"auto"`` to have it read off the names.
        device: where new tensors go.
        rank, world_size: of how many parts which is wanted; only that part is read.
        dim: ``"expert"`` for expert parallelism (shared experts are whole on every rank), or ``"intermediate"`` for
            tensor parallelism: matching gate and up rows of w13, columns of w2. A w2 bias is rank 0's alone there,
            zero for the others, since ranks' outputs are added.
        into: write into the parameters ``w13_weight``, ``w2_weight``, ``w13_bias`` and ``w2_bias`` of this module's
            submodules of the layers' names, in the layout and at the address that they have, instead of into new
            tensors.

    Returns:
        The layers by name (``"model.layers.3.mlp.experts"``). A weight with a checksum has been checked against it,
        where it was read whole.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a damaged file, or one that does not hold what its names say; no parameter has changed.
        ValueError: arguments that do not fit each other, or parameters of other shapes; no parameter has changed.
    """
    if dim not in ("expert", "intermediate"):
        raise ValueError(f"dim must be 'expert' or 'intermediate', found {dim!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, found {rank}")
    start = time.perf_counter()
    files = Files(path)
    plan = []
    for name, layer in find_layers(files, prefix, format).items():
        cut = _cut(name, layer, rank, world_size, dim)
        plan.append(
            (name, layer, cut, _new(layer, cut, device) if into is None else _parameters(into, name, layer, cut))
        )
    if into is not None:
        for _, layer, _, _ in plan:
            for weight in layer:
                _verify(weight)
    total = sum(2 * len(cut.experts) for _, _, cut, _ in plan)
    with tqdm(total=total, desc="loading experts", unit="weight", disable=None) as progress:
        for _, layer, cut, targets in plan:
            for weight, tensor, bias in zip(layer, targets[:2], targets[2:], strict=True):
                for place, expert in enumerate(cut.experts):
                    _write(weight, expert, cut.span, tensor, place)
                    if bias is not None and (rank == 0 or dim == "expert" or weight.gate_up):
                        bias.data[place].copy_(weight.read("bias", expert, cut.span))
                    progress.update()
                if into is None and cut.whole and isinstance(tensor, ShuffledMXFP4Tensor):
                    _verify(weight, tensor.logical_checksum())
    loaded = {name: targets for name, _, _, targets in plan}
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


def _cut(name: str, layer: Layer, rank: int, world_size: int, dim: str) -> _Cut:
    experts, intermediate = range(layer.w13.shape[0]), range(layer.w2.shape[2])
    if dim == "expert" and name.rpartition(".")[2].startswith("shared_"):
        return _Cut(experts, intermediate, True)
    size = len(experts) if dim == "expert" else len(intermediate)
    unit = 1 if dim == "expert" else BLOCK
    if size % (world_size * unit):
        raise ValueError(
            f"{name}: {size} ({dim}) cannot be parted into {world_size} equal parts of multiples of {unit}"
        )
    part = range(rank * size // world_size, (rank + 1) * size // world_size)
    return _Cut(*((part, intermediate) if dim == "expert" else (experts, part)), world_size == 1)


def _shapes(layer: Layer, cut: _Cut) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    hidden = layer.w13.shape[2]
    return (len(cut.experts), 2 * len(cut.span), hidden), (len(cut.experts), hidden, len(cut.span))


def _new(layer: Layer, cut: _Cut, device: torch.device | str) -> Experts:
    tensors, biases = [], []
    for weight, shape in zip(layer, _shapes(layer, cut), strict=True):
        tensors.append(_empty(weight, shape, device))
        named = next(iter(weight.tensors["bias"].values()), None)
        dtype = None if named is None else weight.files.dtype(named)
        biases.append(None if dtype is None else torch.zeros(shape[:2], dtype=dtype, device=device))
    return Experts(*tensors, *biases)


def _empty(weight: Weight, shape: tuple[int, int, int], device: torch.device | str) -> Tensor:
    if not weight.quantized:
        return torch.empty(shape, dtype=weight.dtype, device=device)
    kind = ShuffleKind.NONE if weight.entry is None else weight.entry.kind
    geometry = Geometry(shape[1], shape[2], weight.gate_up)
    storage = PackedStorage.zeros(shape[0], geometry, torch.device(device), kind)
    storage.target = None if weight.entry is None else weight.entry.shuffle_kind
    return ShuffledMXFP4Tensor._wrap(storage, storage.whole(range(shape[0])), 3, weight.dtype)


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
            raise ValueError(f"{name}.{which}_weight was made with gate_up={tensor.gate_up}")
        if bool(weight.tensors["bias"]) != (bias is not None) or (bias is not None and bias.shape != shape[:2]):
            what = "none" if bias is None else f"shape {list(bias.shape)}"
            wanted = f"of shape {list(shape[:2])}" if weight.tensors["bias"] else "absent"
            raise ValueError(f"{name}.{which}_bias must be {wanted} for what {weight.files.path} holds, found {what}")
        found.append((tensor, bias))
    return Experts(found[0][0], found[1][0], found[0][1], found[1][1])


def _write(weight: Weight, expert: int, span: range, tensor: Tensor, place: int) -> None:
    codes = weight.read("qdata", expert, span)
    if isinstance(tensor, ShuffledMXFP4Tensor):
        window = tensor[place : place + 1]._window  # type: ignore[attr-defined]
        tensor._storage.write(window, codes.unsqueeze(0), weight.read("scale", expert, span).unsqueeze(0))
    else:
        tensor.data[place].copy_(codes)


def _verify(weight: Weight, found: str | None = None) -> None:
    """Raise CheckpointError where values (as stored, or of this checksum) are not what the manifest says."""
    if weight.entry is not None:
        found = found or weight.checksum()
        if found != weight.entry.checksum:
            raise CheckpointError(
                f"{weight.name} in {weight.files.path} is damaged: its values have checksum {found[:12]}..., the "
                f"manifest says {weight.entry.checksum[:12]}..."
            )


def _nbytes(tensor: Tensor) -> int:
    if isinstance(tensor, ShuffledMXFP4Tensor):
        return tensor.qdata.nbytes + tensor.scale.nbytes
    return tensor.nbytes


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    layout: str = "canonical",
) -> None:
    """Write tensors to a safetensors file, as ``safetensors.torch.save_file`` does, among them
    :class:`ShuffledMXFP4Tensor`.

    One of those becomes two uint8 tensors ``<name>.qdata`` and ``<name>.scale``, which any tool can read, and an entry
    of a manifest in the header's metadata: kind, gate_up, logical and padded sizes, dtype, checksum of the logical
    value. The file appears when it is whole.

    Args:
        layout: ``"canonical"`` writes logical row-major bytes, whatever the layout in memory; ``"as_is"`` the padded
            bytes as they lie.

    Raises:
        ValueError: an unknown layout, or names that clash.
        OSError: the file cannot be written; what was written of it is removed.
    """
    if layout not in ("canonical", "as_is"):
        raise ValueError(f"layout must be 'canonical' or 'as_is', found {layout!r}")
    parts: dict[str, Part] = {}
    entries = {}
    for name, tensor in tensors.items():
        new = {name: _plain_part(tensor)} if not isinstance(tensor, ShuffledMXFP4Tensor) else {}
        if isinstance(tensor, ShuffledMXFP4Tensor):
            tensor = tensor.clone() if tensor.is_part_of_experts else tensor
            assert isinstance(tensor, ShuffledMXFP4Tensor)
            entries[name] = _entry(tensor, layout)
            new = {
                f"{name}.qdata": _packed_part(tensor, entries[name], 0),
                f"{name}.scale": _packed_part(tensor, entries[name], 1),
            }
        for part in new:
            if part in parts:
                raise ValueError(f"two tensors would be called {part!r}")
        parts |= new
    path = Path(path)
    try:
        write_file(path, parts, {**(metadata or {}), **(manifest.dump(entries) if entries else {})}, resume=False)
    except BaseException:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise


def _entry(tensor: ShuffledMXFP4Tensor, layout: str) -> manifest.Entry:
    storage = tensor._storage
    return manifest.Entry(
        storage.kind if layout == "as_is" else ShuffleKind.NONE,
        tensor.gate_up,
        tuple(tensor.shape),
        tensor.dtype,
        storage.target,
        tensor.logical_checksum(),
    )


def _packed_part(tensor: ShuffledMXFP4Tensor, entry: manifest.Entry, which: int) -> Part:
    storage, window = tensor._storage, tensor._window

    def read(index: int) -> Tensor:
        expert = window.experts[index]
        experts = range(expert, expert + 1)
        found = (
            storage.read(window._replace(experts=experts))
            if entry.kind is ShuffleKind.NONE
            else storage.select(experts)
        )
        return found[which].cpu()

    return Part.along_experts(entry.stored_shapes()[which], window.shape[0], read)


def _plain_part(tensor: Tensor) -> Part:
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"safetensors files hold no {tensor.dtype}; found in tensors to be saved")
    return Part(tensor.dtype, tuple(tensor.shape), 1, tensor.nbytes, lambda index: tensor.detach().cpu())


def load_file(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_file` wrote, as ``safetensors.torch.load_file`` does: weights come back in the layout that
    they were saved in.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a damaged file, a manifest that is missing, unknown or does not fit, or a weight whose checksum
            is another.
    """
    files = Files(path)
    weights = manifest_weights(files)
    loaded: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensor = _empty(weight, weight.shape, device)
        for expert in range(weight.shape[0]):
            _write(weight, expert, range(weight.intermediate), tensor, expert)
        assert isinstance(tensor, ShuffledMXFP4Tensor)
        _verify(weight, tensor.logical_checksum())
        assert weight.entry is not None
        loaded[name] = tensor if len(weight.entry.shape) == 3 else tensor[0]
    parts = {part for weight in weights.values() for named in weight.tensors.values() for part in named.values()}
    for name in files:
        if name not in parts:
            loaded[name] = files.read(name).to(device, copy=True)
    return loaded
