# SPDX-License-Identifier: MIT
"""``python -m shuffled_tensor``: what each command prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file as save_plain
from torch import Tensor

import shuffled_tensor
from shuffled_tensor import ShuffledMXFP4Tensor, inspect, picture, save_file
from shuffled_tensor.checkpoint.weight import Weight
from shuffled_tensor.cli import main
from shuffled_tensor.drawing import png
from shuffled_tensor.rank_picture import rank_picture

from .support.damage import flip
from .support.layer import make_weight, weight_parts

LAYER = "model.layers.0.mlp.experts"


def deepseek() -> dict[str, Tensor]:
    tensors = {}
    for which, names in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        for part, data in zip(("weight", "scale"), weight_parts(which), strict=True):
            for expert, rows in enumerate(data):
                for name, own in zip(names, rows.chunk(len(names)), strict=True):
                    own = own.clone()
                    view = own.view(torch.int8) if part == "weight" else own.view(torch.float8_e8m0fnu)
                    tensors[f"layers.0.ffn.experts.{expert}.{name}.{part}"] = view
    return tensors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_plain(deepseek(), tmp_path / "deepseek.safetensors")
    save_file({f"{LAYER}.w13_weight": make_weight("w13"), f"{LAYER}.w2_weight": make_weight("w2")}, "ours.safetensors")
    return tmp_path


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "deepseek.safetensors", "--read"]) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\
tensor                           format    shape      layout     size       scales     checksum      problems
layers.0.ffn.experts.w13_weight  deepseek  4x320x544  canonical  361.2 KiB  2^-7..2^0  c2fe5135997e  none (no checksum in the file)
layers.0.ffn.experts.w2_weight   deepseek  4x544x160  canonical  180.6 KiB  2^-7..2^0  455994b40b8e  none (no checksum in the file)
weights: 2, layers: 1, size: 541.9 KiB
""",
    )
    assert main(["inspect", "ours.safetensors", "--read"]) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\
tensor                                 format           shape      layout     size       scales     checksum      problems
model.layers.0.mlp.experts.w13_weight  shuffled_tensor  4x320x544  canonical  361.2 KiB  2^-7..2^0  c2fe5135997e  none
model.layers.0.mlp.experts.w2_weight   shuffled_tensor  4x544x160  canonical  180.6 KiB  2^-7..2^0  455994b40b8e  none
weights: 2, layers: 1, size: 541.9 KiB
""",
    )


def test_checksums_are_those_of_the_tensors(folder: Path) -> None:
    found = {
        finding.name.rpartition(".")[2]: finding.checksum for finding in inspect("deepseek.safetensors", read=True)
    }
    assert found == {f"{which}_weight": make_weight(which).logical_checksum() for which in ("w13", "w2")}


def test_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / "ours.safetensors", f"{LAYER}.w2_weight.qdata")
    flip(folder / "deepseek.safetensors", "layers.0.ffn.experts.2.w3.scale", 255)
    assert main(["inspect", "ours.safetensors", "--read"]) == 1
    assert main(["verify", "ours.safetensors"]) == 1
    assert main(["inspect", "deepseek.safetensors", "--read"]) == 1
    tensors = deepseek()
    del tensors["layers.0.ffn.experts.1.w2.scale"]
    save_plain(tensors, folder / "incomplete.safetensors")
    assert main(["inspect", "incomplete.safetensors", "--read"]) == 1
    assert_expected_inline(
        capsys.readouterr().out,
        """\
tensor                                 format           shape      layout     size       scales     checksum      problems
model.layers.0.mlp.experts.w13_weight  shuffled_tensor  4x320x544  canonical  361.2 KiB  2^-7..2^0  c2fe5135997e  none
model.layers.0.mlp.experts.w2_weight   shuffled_tensor  4x544x160  canonical  180.6 KiB  2^-7..2^0  0eb0d3687249  damaged in experts 0: it was written with checksum 455994b40b8e
weights: 2, layers: 1, size: 541.9 KiB
model.layers.0.mlp.experts.w2_weight: damaged in experts 0: it was written with checksum 455994b40b8e
2 weights read, 2 compared with a checksum, 1 with problems
tensor                           format    shape      layout     size       scales     checksum      problems
layers.0.ffn.experts.w13_weight  deepseek  4x320x544  canonical  361.2 KiB  2^-7..2^0  172902432679  1 scales are NaN (255)
layers.0.ffn.experts.w2_weight   deepseek  4x544x160  canonical  180.6 KiB  2^-7..2^0  455994b40b8e  none (no checksum in the file)
weights: 2, layers: 1, size: 541.9 KiB
tensor                format    problems
layers.0.ffn.experts  deepseek  layers.0.ffn.experts.0.w2.weight in incomplete.safetensors has no scale of expert 1 beside it
weights: 1, layers: 1, size: 0.0 KiB
""",
    )


def test_inspect_reads_headers_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weight, "read", lambda *_: pytest.fail("it has read bytes"))
    flip(folder / "ours.safetensors", f"{LAYER}.w2_weight.qdata")  # which nobody sees
    assert main(["inspect", "."]) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\
tensor                                 format           shape      layout     size       checksum      problems
layers.0.ffn.experts.w13_weight        deepseek         4x320x544  canonical  361.2 KiB                none (no checksum in the file)
layers.0.ffn.experts.w2_weight         deepseek         4x544x160  canonical  180.6 KiB                none (no checksum in the file)
model.layers.0.mlp.experts.w13_weight  shuffled_tensor  4x320x544  canonical  361.2 KiB  c2fe5135997e  none
model.layers.0.mlp.experts.w2_weight   shuffled_tensor  4x544x160  canonical  180.6 KiB  455994b40b8e  none
weights: 4, layers: 2, size: 1.1 MiB
""",
    )


def test_what_ranks_would_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "deepseek.safetensors", "--ranks", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [  # 541.9 KiB; 160 in 96 and 64
        "2 ranks by expert: 270.9 KiB each",
        "2 ranks by intermediate: 216.8 KiB to 325.1 KiB each",
    ]
    assert main(["inspect", "deepseek.safetensors", "--ranks", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "3 ranks by expert: layers.0.ffn.experts.w13_weight: 4 (expert) cannot be parted into 3 equal parts",
        "3 ranks by intermediate: 108.4 KiB to 216.8 KiB each",
    ]


def test_ranks_of_weights_under_other_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = make_weight("w2")
    save_file({"gate_and_up": make_weight("w13"), "down": down, "one": down[0].clone()}, "named.safetensors")
    assert main(["inspect", "named.safetensors", "--ranks", "5"]) == 0
    w13, w2 = (sum(part.nbytes for part in weight_parts(name)) / 5 / 1024 for name in ("w13", "w2"))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "5 ranks by expert: gate_and_up: 4 (expert) cannot be parted into 5 equal parts",
        f"5 ranks by intermediate: {w13 + w2 * 5 / 4:.1f} KiB each",
    ]


def test_inspect_for_other_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", ".", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["weights"]
    assert [(row["name"], tuple(row["shape"]), row["problems"]) for row in rows] == [
        (finding.name, finding.shape, []) for finding in inspect(".")
    ]
    assert sum(row["nbytes"] for row in rows) == sum(data.nbytes for data in deepseek().values()) + sum(
        make_weight(name).numel() // 2 + make_weight(name).numel() // 32 for name in ("w13", "w2")
    )


def test_ranks_and_damage_for_other_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "deepseek.safetensors", "--json", "--ranks", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = sum(data.nbytes for data in deepseek().values())
    assert found["ranks"] == {"expert": [total // 2] * 2, "intermediate": [total * 3 // 5, total * 2 // 5]}
    assert main(["verify", "deepseek.safetensors", "--json"]) == 3
    assert [row["recorded"] for row in json.loads(capsys.readouterr().out)["weights"]] == [False, False]
    flip(folder / "ours.safetensors", f"{LAYER}.w2_weight.qdata")
    assert main(["verify", "ours.safetensors", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["weights"]
    assert [bool(row["problems"]) for row in rows] == [False, True]
    assert main(["inspect", "deepseek.safetensors", "--json", "--ranks", "3"]) == 0
    assert "cannot be parted into 3" in json.loads(capsys.readouterr().out)["ranks"]["expert"]


def test_layers_come_in_the_order_of_their_numbers(folder: Path) -> None:
    layers = {f"layers.{layer}.w2_weight": make_weight("w2") for layer in (10, 9, 100)}
    layers |= {f"layers.{layer}.w13_weight": make_weight("w13") for layer in (10, 9, 100)}
    save_file(layers, "many.safetensors")
    names = [finding.name.split(".")[1:] for finding in inspect("many.safetensors")]
    assert names == [[layer, which] for layer in ("9", "10", "100") for which in ("w13_weight", "w2_weight")]


def test_an_interrupt_is_a_line_and_a_status(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Weight, "read", interrupt)
    assert main(["verify", "ours.safetensors"]) == 130
    printed = capsys.readouterr()
    assert (printed.out, printed.err.splitlines()[-1]) == ("", "stopped")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"shuffled_tensor {shuffled_tensor.__version__}\n"


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "ours.safetensors"]) == 0
    assert main(["verify", "deepseek.safetensors"]) == 3  # it has nothing to be compared with
    assert_expected_inline(
        capsys.readouterr().out,
        """\
2 weights read, 2 compared with a checksum, 0 with problems
2 weights read, 0 compared with a checksum, 0 with problems
no file has a checksum to compare with; convert writes one for every weight
""",
    )


@pytest.mark.parametrize("layout", ["canonical", "mxfp4_moe", "mxfp4_separated"])
def test_convert_and_verify(layout: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "deepseek.safetensors", "converted.safetensors", "--layout", layout]) == 0
    assert main(["verify", "converted.safetensors"]) == 0
    assert capsys.readouterr().out == "2 weights read, 2 compared with a checksum, 0 with problems\n"
    assert {finding.layout for finding in inspect("converted.safetensors")} == {layout}


def test_errors_are_a_line_and_a_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plain({"a": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "ours.safetensors").read_bytes()[:-1])
    for command in (
        ["inspect", "nothing.safetensors"],
        ["inspect", "other.safetensors"],
        ["verify", "cut.safetensors"],
        ["convert", "ours.safetensors", "deepseek.safetensors"],
        ["show", "mxfp4_moe", "--rows", "40"],
    ):
        assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_expected_inline(
        printed.err,
        """\
error: no such file: nothing.safetensors
error: no tensor of other.safetensors is named as MXFP4 experts are in 'gpt-oss', 'quark', 'compressed-tensors', 'deepseek', 'shuffled_tensor'
error: cut.safetensors is no whole safetensors file: Error while deserializing header: incomplete metadata, file not fully covered
error: deepseek.safetensors exists; remove it, or give another name
error: N=40 rows are not a multiple of 32, which qdata in 'mxfp4_moe' needs: pad gate and up from 20 to 32 rows each, with bytes of 0
""",
    )


def shown(name: str) -> str:
    return Path(name).read_text(encoding="utf-8")


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is named after what it shows, or as one likes."""
    for options, name, svg in (
        (["mxfp4_moe"], "mxfp4_moe.svg", picture("mxfp4_moe", 64, 256)),
        (["none", "--rows", "6", "--k", "32"], "none.svg", picture("none", 6, 32)),
        (["mxfp4_moe", "--scale"], "mxfp4_moe_scale.svg", picture("mxfp4_moe", 64, 256, part="scale")),
        (["mxfp4_separated", "--down"], "mxfp4_separated_down.svg", picture("mxfp4_separated", 64, 256, gate_up=False)),
        (["--ranks", "3"], "ranks_intermediate.svg", rank_picture(3, 512, 256)),
        (
            ["--ranks", "2", "--dim", "expert", "--experts", "6", "--down", "--rows", "64"],
            "ranks_expert_down.svg",
            rank_picture(2, 64, 256, gate_up=False, dim="expert", experts=6),
        ),
        (
            ["mxfp4_moe", "--scale", "--logical", "40", "160", "--output", "padded.SVG"],
            "padded.SVG",
            picture("mxfp4_moe", 64, 256, part="scale", logical=(40, 160)),
        ),
    ):
        assert main(["show", *options]) == 0
        assert capsys.readouterr().out == f"{name}\n"
        assert shown(name) == svg
    assert main(["show", "mxfp4_moe", "--rows", "32"]) == 0  # written anew
    assert shown("mxfp4_moe.svg") == picture("mxfp4_moe", 32, 256)


def test_show_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(["show", "mxfp4_separated", "--rows", "32", "--k", "64", "--down", "--output", "-"]) == 0
    assert capsys.readouterr().out == picture("mxfp4_separated", 32, 64, gate_up=False)
    assert sorted(folder.iterdir()) == before


def test_show_what_cannot_be_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    before = sorted(folder.iterdir())
    assert main(["show", "mxfp4_moe", "--output", "picture.png"]) == 1
    assert main(["show", "mxfp4_moe", "--output", "picture.pdf"]) == 1
    assert main(["show", "--ranks", "5", "--output", "picture.svg"]) == 1
    assert_expected_inline(
        capsys.readouterr().err,
        """\
error: vl_convert is missing: pip install 'shuffled_tensor[png]'
error: a picture is written as .svg or .png, found picture.pdf
error: 256 (intermediate) cannot be parted into 5 parts of whole blocks of 32
""",
    )
    for options, message in (
        ([], "one of the arguments LAYOUT --ranks is required"),
        (["mxfp4_moe", "--ranks", "2"], "not allowed with argument"),
        (["--ranks", "2", "--scale"], "--scale says nothing with --ranks"),
        (["--ranks", "2", "--logical", "40", "160"], "--logical says nothing with --ranks"),
        (["mxfp4_moe", "--dim", "expert"], "--dim says nothing without --ranks"),
        (["mxfp4_moe", "--experts", "4"], "--experts says nothing without --ranks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["show", *options])
        assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_show_a_png(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert", reason="the extra png is not installed")
    assert main(["show", "mxfp4_moe", "--rows", "32", "--k", "32", "--output", "picture.PNG"]) == 0
    assert capsys.readouterr().out == "picture.PNG\n"
    assert (folder / "picture.PNG").read_bytes() == png(picture("mxfp4_moe", 32, 32))


def test_as_a_process(folder: Path) -> None:
    """Nothing but the table is on standard output, and no progress bar where nobody looks."""
    command = [sys.executable, "-W", "error", "-m", "shuffled_tensor", "inspect", "ours.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
    assert done.stderr == ""


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("shuffled_tensor.checkpoint")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["verify", "ours.safetensors"]) == 1
    assert capsys.readouterr().err == "error: safetensors is missing: pip install 'shuffled_tensor[checkpoint]'\n"
    monkeypatch.delattr(shuffled_tensor, "checkpoint", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"load_experts needs safetensors: pip install"):
        _ = shuffled_tensor.load_experts
    assert isinstance(make_weight("w2"), ShuffledMXFP4Tensor)  # the rest works


def test_every_weight_of_a_mixed_folder_is_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / "deepseek.safetensors", "layers.0.ffn.experts.2.w3.scale", 255)
    assert main(["inspect", ".", "--read"]) == 1
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(names[1:-1]) == [
        *(f"{layer}.{which}" for layer in ("layers.0.ffn.experts", LAYER) for which in ("w13_weight", "w2_weight"))
    ]
