# SPDX-License-Identifier: MIT
"""What is installed, and what an sdist holds: the version, the names, the command, the files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import shuffled_tensor
from shuffled_tensor import LAYOUTS, Explanation, Finding, cli
from shuffled_tensor.mxfp4 import CODES

ROOT = Path(__file__).parents[1]

# What setuptools adds to the files of the tree
GENERATED = {
    "PKG-INFO",
    "setup.cfg",
    "shuffled_tensor.egg-info/PKG-INFO",
    "shuffled_tensor.egg-info/SOURCES.txt",
    "shuffled_tensor.egg-info/dependency_links.txt",
    "shuffled_tensor.egg-info/entry_points.txt",
    "shuffled_tensor.egg-info/requires.txt",
    "shuffled_tensor.egg-info/top_level.txt",
}


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    """What pip installed; in an unpacked sdist, the metadata beside the package. After a change to it: `make`."""
    try:
        return importlib.metadata.distribution("shuffled_tensor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("shuffled_tensor is not installed, and no metadata of it lies here")


# --- The version


def test_the_version_is_what_is_installed(distribution: importlib.metadata.Distribution) -> None:
    assert shuffled_tensor.__version__ == distribution.version


def test_the_version_is_what_is_cited() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == [shuffled_tensor.__version__]


# --- What `import shuffled_tensor` brings


def test_tables_and_reports_cannot_be_changed() -> None:
    """All weights of a process are read by the same tables."""
    for row in (LAYOUTS["mxfp4_moe"], CODES, Finding(*9 * [None]), Explanation(*10 * [None])):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(row, dataclasses.fields(row)[0].name, "another")


def test_every_public_name_is_there() -> None:
    assert [name for name in shuffled_tensor.__all__ if not hasattr(shuffled_tensor, name)] == []
    assert len(set(shuffled_tensor.__all__)) == len(shuffled_tensor.__all__)


def test_importing_it_imports_nothing_optional() -> None:
    """No aiter, and nothing of the extra `checkpoint`. Torch imports tqdm for itself, where there is one."""
    program = """if True:
        import sys
        import torch

        def optional():
            return sorted(name for name in sys.modules if name.partition(".")[0] in ("aiter", "safetensors", "tqdm"))

        for name in optional():
            del sys.modules[name]
        import shuffled_tensor
        print(optional())
    """
    command = [sys.executable, "-W", "error", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_is_typed() -> None:
    assert importlib.resources.files("shuffled_tensor").joinpath("py.typed").is_file()


# --- The command


def test_the_command_is_installed(
    distribution: importlib.metadata.Distribution, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pip's script calls it, `sys.exit(main())`."""
    (script,) = distribution.entry_points.select(group="console_scripts", name="shuffled-tensor")
    (found,) = set(importlib.metadata.entry_points(group="console_scripts", name="shuffled-tensor"))
    assert found == script
    main = found.load()
    assert main is cli.main

    def run(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/shuffled-tensor", *arguments])
        with pytest.raises(SystemExit) as exit:
            sys.exit(main())
        return exit.value.code

    assert run("show", "mxfp4_moe", "--output", "-") == 0
    assert capsys.readouterr().out.startswith("<svg")
    assert run("inspect", "nothing.safetensors") == 1
    assert capsys.readouterr().err == "error: no such file: nothing.safetensors\n"
    assert run() == 2


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("/usr/bin/shuffled-tensor", "shuffled-tensor"),
        ("/usr/lib/python3/site-packages/shuffled_tensor/__main__.py", "python -m shuffled_tensor"),
    ],
)
def test_the_usage_says_how_it_was_called(
    called: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith(f"usage: {shown} [-h] [--version] COMMAND ...\n")


# --- The sdist


def test_an_sdist_holds_the_tree(tmp_path: Path) -> None:
    """Every file that git has, and nothing that a run leaves behind; the build imports no torch."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git, or no checkout, as in an unpacked sdist")
    listed = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.rstrip("\0").split("\0"))

    tree = tmp_path / "tree"  # a copy: setuptools adds to an sdist whatever a former egg-info lists
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for leftover in ("tests/__pycache__/test.pyc", "tests/data/old.json.bak", ".venv/lib/a.py", "dist/a", "build/a.py"):
        (tree / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tree / leftover).touch()
    program = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.build_sdist('..')"
    run = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    top = f"shuffled_tensor-{shuffled_tensor.__version__}"
    with tarfile.open(tmp_path / f"{top}.tar.gz") as sdist:
        held = {member.name.removeprefix(f"{top}/"): member.mode for member in sdist if member.isfile()}
    assert set(held) - GENERATED == tracked - {".gitignore"}
    assert held[".ci/run"] & 0o100  # it is executable


# --- What runs around an import and around a call


MODES = {
    "none": "contextlib.nullcontext()",
    "meta": "torch.device('meta')",
    "meta by default": "default_device('meta')",
    "FakeTensorMode": "torch._subclasses.FakeTensorMode()",
    "inference_mode": "torch.inference_mode()",
    "no_grad": "torch.no_grad()",
    "float64": "default_dtype(torch.float64)",
    "flush": "flushed()",
    "autocast": "torch.autocast('cpu', torch.bfloat16)",
    "functionalize": "torch._subclasses.functional_tensor.FunctionalTensorMode()",
    "deterministic": "deterministic()",
    "no tensor at all": "NoTensor()",
}

AROUND = """
import contextlib, torch, torch._subclasses.functional_tensor
from torch.utils._python_dispatch import TorchDispatchMode

@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)

@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)

@contextlib.contextmanager
def flushed():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)

@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

class NoTensor(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"an import runs {func}")
"""

CALLS = """
def results(around):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 128, 64, generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn(5, 64, generator=generator, dtype=torch.float32, device="cpu")
    ids = torch.tensor([[0, 2]] * 5, device="cpu")
    weight = torch.full((5, 2), 0.5, dtype=torch.float32, device="cpu")
    with around:
        qdata, scale = shuffled_tensor.quantize(values)
        moved = shuffled_tensor.shuffle_weight(qdata, "mxfp4_moe", gate_up=True)
        w13 = shuffled_tensor.ShuffledMXFP4Tensor(qdata, scale, gate_up=True, row_order="contiguous")
        w2 = shuffled_tensor.ShuffledMXFP4Tensor.from_hp(values.mT[:, :, :64].contiguous(), gate_up=False)
        w2.shuffle_("mxfp4_separated")
        out = shuffled_tensor.fused_moe(x, w13, w2, weight, ids, activation_dtype="mxfp4")
        own = w2.dequantize(), w13[1:].clone().dequantize(), w13.shard(1, 2).dequantize()
        again = shuffled_tensor.ShuffledMXFP4Tensor.from_hp(values, gate_up=False).fill_(1.5).zero_().dequantize()
        written = w2.refit_from_hp_(values.mT[:, :, 64:].contiguous()).dequantize()
        plain = shuffled_tensor.dequantize(qdata, scale)
        picture = shuffled_tensor.picture("mxfp4_moe", 64, 256)
        return [qdata, scale, moved, out, *own, again, written, plain], picture
"""


def in_forks(modes: list[str], code: str) -> None:
    """Run code, in which `{mode}` is a mode, once for each: in forks of a process that has imported torch."""
    script = f"{AROUND}{CALLS}\nimport os, traceback\nfailed = []\n"
    for name in modes:
        body = "".join(f"        {line}\n" for line in code.format(mode=MODES[name]).splitlines())
        script += f"if not (child := os.fork()):\n    try:\n{body}    except BaseException:\n"
        script += "        traceback.print_exc()\n        os._exit(1)\n    os._exit(0)\n"
        script += f"failed += [{name!r}] * (os.waitpid(child, 0)[1] != 0)\n"
    done = subprocess.run([sys.executable, "-c", f"{script}print(failed)"], check=False, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_package_imports_under_any_mode() -> None:
    code = "with {mode}:\n    import shuffled_tensor, shuffled_tensor.testing, shuffled_tensor.checkpoint\n"
    in_forks(list(MODES), f"{code}results(contextlib.nullcontext())")


def test_results_follow_their_inputs() -> None:
    """Not torch's default device or dtype."""
    code = """\
import shuffled_tensor
(expected, drawn), (found, drawn_again) = results(contextlib.nullcontext()), results({mode})
assert drawn == drawn_again
for a, b in zip(expected, found, strict=True):
    assert (a.dtype, a.device) == (b.dtype, b.device)
    assert torch.equal(a, b)
"""
    modes = set(MODES) - {"FakeTensorMode", "functionalize", "no tensor at all"}
    in_forks(sorted(modes), code)
