# SPDX-License-Identifier: MIT
"""What files name is a format: the paths of two functions and the keys they are called with, and files that were written."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from expecttest import assert_expected_inline
from torch import Tensor, nn

import shuffled_tensor
from shuffled_tensor import LAYOUTS, ShuffledMXFP4Tensor

from .support.bytes import coded, moderate_scales
from .support.judges import dense

SAVED = Path(__file__).parent / "data" / "saved_weights_1.pt"
"""Written once, by ``torch.save(weights(), SAVED)`` at the commit that froze the format, and never again."""


def w13_parts() -> tuple[Tensor, Tensor]:
    return coded(2, 96, 80), moderate_scales(2, 96, 5)


def w2_parts() -> tuple[Tensor, Tensor]:
    return coded(2, 160, 32, salt=5), moderate_scales(2, 160, 2, salt=9)


def weights() -> dict[str, Any]:
    w13 = ShuffledMXFP4Tensor(*w13_parts(), gate_up=True, row_order="contiguous", shuffle_kind="mxfp4_moe")
    w2 = nn.Parameter(ShuffledMXFP4Tensor(*w2_parts(), gate_up=False, dtype=torch.float32))
    w2.tied_to = "a name"
    return {"w13": w13, "expert": w13[1], "gate": w13[:, :48], "w2": w2}


def assert_are_the_weights(found: dict[str, Any]) -> None:
    values = dense(*w13_parts())
    assert torch.equal(found["w13"].dequantize(torch.float64), values)
    assert torch.equal(found["expert"].dequantize(torch.float64), values[1])
    assert torch.equal(found["gate"].dequantize(torch.float64), values[:, :48])
    assert torch.equal(found["w2"].dequantize(torch.float64), dense(*w2_parts()))
    w13, w2 = found["w13"], found["w2"]
    assert (w13.gate_up, w13.shuffle_kind, w13.is_shuffled, w13.dtype) == (True, "mxfp4_moe", False, torch.bfloat16)
    assert (w2.gate_up, w2.shuffle_kind, w2.dtype, w2.tied_to) == (False, None, torch.float32, "a name")
    assert isinstance(w2, nn.Parameter)
    w13.zero_()  # they were saved together, and are still one memory
    assert not found["expert"].dequantize().any()
    assert not found["gate"].dequantize().any()


def test_files_written_when_the_format_was_frozen_are_read() -> None:
    assert_are_the_weights(torch.load(SAVED, weights_only=True))


def pickles(tmp_path: Path) -> dict[str, bytes]:
    """The pickles inside every kind of file."""
    buffer = io.BytesIO()
    torch.save(weights(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        saved = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    dcp.save({"w13": weights()["w13"]}, checkpoint_id=tmp_path, no_dist=True)
    with zipfile.ZipFile(io.BytesIO((tmp_path / "__0_0.distcp").read_bytes())) as archive:
        distributed = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return {"pickle": pickle.dumps(weights()), "torch.save": saved, "torch.distributed.checkpoint": distributed}


def names_in(data: bytes) -> set[str]:
    """The functions and classes that a pickle calls, by its opcodes."""
    names, strings, memo, last = set(), [], [], None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo.append(last)
            continue
        last = memo[argument] if opcode.name in ("BINGET", "LONG_BINGET") and memo else argument
        if isinstance(last, str):
            strings.append(last)
    return names


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.10, of itself
def test_what_files_name_of_this_package(tmp_path: Path) -> None:
    for kind, data in pickles(tmp_path).items():
        ours = {name for name in names_in(data) if "shuffled" in name}
        assert ours == {"shuffled_tensor.rebuild_storage", "shuffled_tensor.rebuild_weight"}, kind
    for name in ("rebuild_storage", "rebuild_weight"):
        assert name in shuffled_tensor.__all__


def test_what_files_say_of_a_weight() -> None:
    """A key that goes, or changes its meaning, makes old files unreadable; a new one must have a meaning for them."""
    said = {}
    for name in ("rebuild_storage", "rebuild_weight"):
        original = getattr(shuffled_tensor, name)

        def watching(*args: Any, original: Callable[..., Any] = original, name: str = name) -> Any:
            said.setdefault(name, args[-1])
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            data = pickle.dumps(weights())
            patch.setattr(shuffled_tensor, name, watching)
            pickle.loads(data)
    assert_expected_inline(
        "\n".join(f"{name}: {state}" for name, state in sorted(said.items())),
        """\
rebuild_storage: {'gate_up': True, 'shuffle_kind': 'mxfp4_moe'}
rebuild_weight: {'experts': (0, 2, 1), 'rows': (0, 96, 1), 'columns': (0, 160, 1), 'dim': 3, 'dtype': torch.bfloat16, 'attributes': {}}""",
    )


def test_a_file_of_a_later_version_is_refused() -> None:
    storage = weights()["w13"]._storage
    state = {"gate_up": True, "shuffle_kind": None, "rotation": 3}
    with pytest.raises(ValueError, match="later version of shuffled_tensor, which says rotation of a weight"):
        shuffled_tensor.rebuild_storage(*w13_parts(), state)
    with pytest.raises(ValueError, match="later version of shuffled_tensor, which says rotation of a weight"):
        shuffled_tensor.rebuild_weight(storage, {"rotation": 3})


class Named(ShuffledMXFP4Tensor):
    """A user's own."""


def test_a_subclass_and_a_pickler_with_a_table_of_its_own() -> None:
    class Pickler(pickle.Pickler):
        dispatch_table: ClassVar[dict[type, Any]] = {}

    values = dense(*w13_parts())
    mine = Named(*w13_parts(), gate_up=True, row_order="contiguous").shuffle_("mxfp4_moe")
    buffer = io.BytesIO()
    Pickler(buffer).dump(mine)
    for data in (pickle.dumps(mine), buffer.getvalue()):
        assert torch.equal(pickle.loads(data).dequantize(torch.float64), values)


def test_layouts_are_themselves_after_a_copy() -> None:
    for layout in LAYOUTS.values():
        assert copy.deepcopy(layout) is layout
        assert pickle.loads(pickle.dumps(layout)) is layout


# --- the format before zip files, whose tensors torch fills last


def in_the_old_format(saved: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(saved, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    return buffer


OLD = Path(__file__).parent / "data" / "saved_weights_1_old_format.pt"
"""As SAVED, by ``torch.save(weights(), OLD, _use_new_zipfile_serialization=False)`` at commit 1d11dfc."""


def test_files_in_the_old_format_that_exist_are_read() -> None:
    for weights_only in (True, False):
        assert_are_the_weights(torch.load(OLD, weights_only=weights_only))


@pytest.mark.parametrize("weights_only", [True, False])
def test_the_old_format(weights_only: bool) -> None:
    for _ in range(3):  # what is in the memory of an unfilled tensor is chance
        assert_are_the_weights(torch.load(in_the_old_format(weights()), weights_only=weights_only))


USES: dict[str, Callable[[ShuffledMXFP4Tensor], ShuffledMXFP4Tensor]] = {
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": lambda weight: weight.clone(),  # type: ignore[dict-item, return-value]
    "a part": lambda weight: weight[:],  # type: ignore[dict-item, return-value]
    "shuffle_": lambda weight: weight.shuffle_("mxfp4_separated"),
    "parameter": lambda weight: nn.Parameter(weight),  # type: ignore[dict-item, return-value]
    "again": lambda weight: torch.load(in_the_old_format(weight)),
    "moved": lambda weight: weight.to(torch.float64),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("rows", [96, 512])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_first_use_of_a_weight_out_of_an_old_file(
    use: Callable[[ShuffledMXFP4Tensor], ShuffledMXFP4Tensor], rows: int
) -> None:
    parts = coded(2, rows, 256), moderate_scales(2, rows, 16)
    expected = dense(*parts)
    saved = ShuffledMXFP4Tensor(*parts, gate_up=True, row_order="contiguous").shuffle_("mxfp4_moe")
    loaded = torch.load(in_the_old_format(saved))
    assert loaded.shape == (2, rows, 512)
    assert loaded.device.type == "cpu"
    assert torch.equal(use(loaded).dequantize(torch.float64), expected)


def test_the_bytes_of_a_weight_out_of_an_old_file_are_known_as_its() -> None:
    loaded = torch.load(in_the_old_format(weights()))["w13"].shuffle_()
    with pytest.raises(ValueError, match="qdata .*mxfp4_moe"):
        ShuffledMXFP4Tensor(loaded.qdata, loaded.scale, gate_up=True, row_order="contiguous")


def test_an_old_file_on_another_device() -> None:
    loaded = torch.load(in_the_old_format(weights()), map_location="meta")
    assert loaded["w13"].is_meta
    assert loaded["w13"].shape == (2, 96, 160)
    assert loaded["w13"].qdata.is_meta


def test_threads_use_a_weight_out_of_a_file_at_once() -> None:
    for _ in range(20):
        loaded = torch.load(in_the_old_format(weights()))["w13"]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda weight: weight.qdata.data_ptr(), [loaded] * 8))
        assert len(set(found)) == 1
        assert torch.equal(loaded.dequantize(torch.float64), dense(*w13_parts()))


# --- how long files are


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up", [True, False])
def test_files_hold_logical_bytes_only(layout: str, gate_up: bool, tmp_path: Path) -> None:
    for experts, rows, columns in ((3, 512, 384), (1, 640, 512), (1, 288, 512), (2, 288, 96), (2, 512, 512)):
        order = "contiguous" if gate_up else None
        parts = coded(experts, rows, columns // 2), moderate_scales(experts, rows, columns // 32)
        nbytes = sum(part.nbytes for part in parts)
        weight = ShuffledMXFP4Tensor(*parts, gate_up=gate_up, row_order=order).shuffle_(layout)
        old, new = tmp_path / "old", tmp_path / "new"
        torch.save(weight, old, _use_new_zipfile_serialization=False)
        torch.save(weight, new)
        folder = tmp_path / f"{experts} {rows} {columns}"
        dcp.save({"w": weight}, checkpoint_id=folder, no_dist=True)
        (tmp_path / "pickle").write_bytes(pickle.dumps(weight))
        for file in (old, new, folder / "__0_0.distcp", tmp_path / "pickle"):
            assert nbytes < file.stat().st_size < nbytes + 6000, (file.name, experts, rows, columns)
