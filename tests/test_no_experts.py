# SPDX-License-Identifier: MIT
"""A weight of no experts, as a rank may have: it does what torch does to an empty tensor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, install_, prepare, refit, save_file

from .support.bytes import marked_parts, weight_of

SHAPE = (0, 128, 512)
NOTHING = torch.zeros(SHAPE)
NO_IDS = torch.zeros(0, dtype=torch.int64)


def direct(kind: str) -> Tensor:
    qdata, scale = (torch.empty(0, 128, 512 // per_byte, dtype=torch.uint8) for per_byte in (2, 32))
    order: dict[str, Any] = {"gate_up": True, "row_order": "interleaved"}
    return ShuffledMXFP4Tensor(qdata, scale, dtype=torch.float32, **order).shuffle_(kind)


MADE: dict[str, Callable[[str], Tensor]] = {
    "constructor": direct,
    "from_hp": lambda kind: ShuffledMXFP4Tensor.from_hp(NOTHING, gate_up=False).shuffle_(kind),
    "a slice": lambda kind: weight_of(marked_parts(3, 128, 512), kind)[1:1],
    "the end": lambda kind: weight_of(marked_parts(3, 128, 512), kind)[3:],
    "a picked copy": lambda kind: weight_of(marked_parts(3, 128, 512), kind)[NO_IDS],
}


def written(values: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    with torch.no_grad():
        write(values)
    return values


def through_a_file(w: Tensor, **options: Any) -> Tensor:
    file = io.BytesIO()
    torch.save({"w": w}, file, **options)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)["w"]
    return loaded


def compiled(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def call(w: Tensor) -> Any:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(function, backend="aot_eager", fullgraph=True)(w)

    return call


def in_a_module(w: Tensor) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(w, requires_grad=False)
    return module


def loaded_into(w: Tensor) -> Tensor:
    module = in_a_module(w)
    module.load_state_dict({"w": NOTHING})
    return module.w


def installed(w: Tensor) -> Tensor:
    module = in_a_module(NOTHING.clone())
    if isinstance(w, ShuffledMXFP4Tensor):
        install_(module, "w", w)
    return module.w


SAME: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda w: w,
    "sizes": lambda w: (w.shape, w.numel(), len(w), w.stride(), w.is_contiguous(), w.dtype),
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "to": lambda w: w.to(torch.float64),
    "to meta": lambda w: w.to("meta").shape,
    "again": lambda w: w[0:0],
    "all": lambda w: w[:],
    "rows": lambda w: w[:, 3:70],
    "columns": lambda w: w[..., 32:64].clone(),
    "list": lambda w: (list(w), list(w.unbind(0))),
    "split": lambda w: [part.shape for part in w.split(2)],
    "chunk": lambda w: [part.shape for part in w.chunk(3)],
    "split of columns": lambda w: w.split(128, -1)[1],
    "view": lambda w: w.view(0, 128, 512),
    "squeeze": lambda w: w.squeeze(0),
    "cat": lambda w: torch.cat([w, w]),
    "cat of columns": lambda w: torch.cat([w, w], 2),
    "index": lambda w: w[NO_IDS],
    "mask": lambda w: w[torch.zeros(0, dtype=torch.bool)],
    "index_select": lambda w: w.index_select(0, NO_IDS),
    "zeros_like": lambda w: torch.zeros_like(w),
    "empty_like": lambda w: torch.empty_like(w),
    "new_empty": lambda w: w.new_empty(SHAPE),
    "equal": lambda w: (torch.equal(w, w.clone()), torch.equal(w, NOTHING), torch.allclose(w, w)),
    "mT": lambda w: w.mT,
    "expand": lambda w: w.expand(SHAPE),
    "bmm": lambda w: torch.bmm(torch.zeros(0, 2, 512), w.mT),
    "copy_": lambda w: written(w, lambda w: w.copy_(NOTHING)),
    "copy_ of ours": lambda w: written(w, lambda w: w.copy_(w.clone())),
    "into plain": lambda w: torch.ones(SHAPE).copy_(w),
    "fill_": lambda w: written(w, lambda w: w.fill_(2)),
    "zero_": lambda w: written(w, lambda w: w.zero_()),
    "index_copy_": lambda w: written(w, lambda w: w.index_copy_(0, NO_IDS, NOTHING)),
    "setitem": lambda w: written(w, lambda w: w.__setitem__(slice(None), 0.5)),
    "setitem of an index": lambda w: written(w, lambda w: w.__setitem__(NO_IDS, 0.5)),
    "deepcopy": lambda w: copy.deepcopy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": through_a_file,
    "torch.save in the old format": lambda w: through_a_file(w, _use_new_zipfile_serialization=False),
    "share_memory_": lambda w: w.clone().share_memory_(),
    "module": lambda w: in_a_module(w).half().w.float(),
    "load_state_dict": loaded_into,
    "install_": installed,
    "compiled": compiled(lambda w: [w, w.clone(), w[0:0], w[:, :64], w.mT + 1]),
    "compiled writes": compiled(lambda w: w.copy_(torch.zeros(SHAPE))),
    "data =": lambda w: setattr(w, "data", w.clone()),
}


def plain(found: Any) -> Any:
    if isinstance(found, (list, tuple)):
        return [plain(each) for each in found]
    found = found.dequantize() if isinstance(found, ShuffledMXFP4Tensor) else found
    return (found.shape, found.dtype, found.tolist()) if isinstance(found, Tensor) else found


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("expression", SAME.values(), ids=SAME)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("kind", ["none", "mxfp4_moe", "mxfp4_separated"])
def test_as_a_plain_tensor(kind: str, made: Callable[[str], Tensor], expression: Callable[[Tensor], Any]) -> None:
    assert plain(expression(made(kind))) == plain(expression(torch.zeros(SHAPE)))


@pytest.mark.parametrize("kind", ["none", "mxfp4_moe"])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_what_plain_tensors_do_not_have(made: Callable[[str], Tensor], kind: str) -> None:
    weight = made(kind)
    assert isinstance(weight, ShuffledMXFP4Tensor)
    assert weight.dequantize().shape == SHAPE
    assert weight.nbytes == 0
    assert weight.data_ptr() == 0
    assert "(0, 128, 512)" in repr(weight)
    assert weight.logical_checksum() == MADE["constructor"]("none").logical_checksum()  # type: ignore[attr-defined]
    for part, per_byte in ((weight.qdata_view, 2), (weight.scale_view, 32)):
        assert part.copy_(torch.zeros(0, 128, 512 // per_byte, dtype=torch.uint8)).clone().shape[0] == 0
    assert weight.refit_from_hp_(NOTHING) is weight
    assert weight.permute_experts_([]) is weight
    assert weight.shard(1, 2, dim="expert").shape == SHAPE
    assert weight.shard(1, 2).numel() == 0
    for layout in ("mxfp4_separated", "mxfp4_moe", "none"):
        assert weight.shuffle_(layout)._storage.layout.name == layout
    module = in_a_module(weight)
    prepare(module)
    with refit(module):
        pass
    joined = torch.cat([weight.clone(), weight_of(marked_parts(3, 128, 512), gate_up=weight.gate_up)])
    assert joined.shape == (3, 128, 512)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_checkpoints(tmp_path: Path) -> None:
    weight = direct("mxfp4_moe")
    dcp.save({"w": weight}, checkpoint_id=tmp_path / "now", no_dist=True)
    dcp.async_save({"w": weight}, checkpoint_id=tmp_path / "later", no_dist=True).result()
    for folder in ("now", "later"):
        dcp.load({"w": weight}, checkpoint_id=tmp_path / folder, no_dist=True)
    with pytest.raises(ValueError, match="'w' has no experts or rows, found shape"):
        save_file({"w": weight}, tmp_path / "w.safetensors")


def test_layers() -> None:
    w13 = direct("mxfp4_moe").bfloat16()
    w2 = ShuffledMXFP4Tensor.from_hp(torch.zeros(0, 512, 64).bfloat16(), gate_up=False)
    for tokens, ids, mask in (
        (0, torch.zeros(0, 2, dtype=torch.int32), None),
        (3, torch.zeros(3, 0, dtype=torch.int32), None),
        (3, torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)),  # all of other ranks
    ):
        x, factors = torch.ones(tokens, 512).bfloat16(), torch.ones(ids.shape)
        out = fused_moe(x, w13, w2, factors, ids, expert_mask=mask)
        assert torch.equal(out, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"topk_ids must be of no tokens, as there are no experts, found 0\.\.1"):
        fused_moe(x, w13, w2, factors, ids)
