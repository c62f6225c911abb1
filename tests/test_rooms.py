# SPDX-License-Identifier: MIT
"""How the package is built: imports go one way, and what is to be added is one row or one class."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import shuffled_tensor
from shuffled_tensor import ShuffledMXFP4Tensor, explain, fused_moe, override_arch
from shuffled_tensor.backends import BACKENDS, Backend
from shuffled_tensor.backends.doctor import doctor
from shuffled_tensor.checkpoint.names import PART_NAMES, FormatName
from shuffled_tensor.layouts import LAYOUTS, Layout, find_layout
from shuffled_tensor.moe.activations import ACTIVATIONS, ActivationName
from shuffled_tensor.moe.call import ARGUMENTS, BackendName, MoECall, PackedWeight, pack, unpack
from shuffled_tensor.moe.op import MANY, Description, Kernels
from shuffled_tensor.mxfp4 import SCALE_RULES, ScaleRule

from .support.layer import make_layer, make_weight

PACKAGE = Path(shuffled_tensor.__file__).parent

# From the ground up: a room imports from those before it, never from those behind it.
ROOMS = (
    ("owners", "device", "operators", "drawing"),
    ("mxfp4",),
    ("layouts",),
    ("tensor",),
    ("moe",),
    ("backends",),
    ("linear", "modules", "checkpoint", "picture", "rank_picture"),
    ("updates",),
    ("distributed",),
    ("integrations",),
    ("transformers", "testing"),
    ("why",),
    ("cli",),
    ("__main__",),
)
UPWARDS = {("modules", "integrations")}
"""`quantize_experts_` asks for transformers' side when it is given transformers' modules, and not before."""
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def nodes(parent: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what only a type checker sees."""
    for node in ast.iter_child_nodes(parent):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, anywhere in it."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"a relative import in {path}"
            continue
        yield from (name for name in names if name.split(".")[0] == "shuffled_tensor")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path: Path) -> None:
    own = FLOOR[room_of(path)]
    for name in imports(path):
        parts = name.split(".")
        room = parts[1] if parts[1] in FLOOR else "mxfp4"  # `from shuffled_tensor import mxfp4`
        allowed = room == room_of(path) or FLOOR[room] < own or (room_of(path), room) in UPWARDS
        assert allowed, f"{path.name} imports {name}"


def test_no_package_imports_itself_in_a_circle() -> None:
    """Within a room, too."""
    names = {path: ".".join(("shuffled_tensor", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    modules = set(names.values())

    def direct(path: Path) -> set[str]:
        found = set()
        for name in imports(path):
            while name not in modules and name:
                name = name.rpartition(".")[0]
            found |= {name} - {names[path], ""}
        return found

    graph = {name: direct(path) for path, name in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' < '.join((*above, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_below_the_backends_nobody_knows_one() -> None:
    for path in FILES:
        if room_of(path) in ("mxfp4", "device", "layouts", "tensor"):
            for name in BACKENDS:
                assert name not in path.read_text().replace("backend='reference'", ""), f"{path} names {name}"


# --- closed sets: what a type checker knows is what there is


def test_literal_types_name_what_the_tables_hold() -> None:
    assert set(get_args(ActivationName)) == set(ACTIVATIONS)
    assert get_args(ScaleRule) == SCALE_RULES
    assert set(get_args(FormatName)) == {"auto", *PART_NAMES}
    assert set(get_args(BackendName)) == set(BACKENDS)


# --- one list of arguments


def test_the_signature_is_the_list() -> None:
    parameters = inspect.signature(fused_moe).parameters
    assert tuple(parameters) == ARGUMENTS
    keywords = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert keywords == list(ARGUMENTS[5:])
    for name in ARGUMENTS:
        assert (
            f"{name}:" in str(fused_moe.__doc__)
            or f"{name}, " in str(fused_moe.__doc__)
            or f", {name}" in str(fused_moe.__doc__)
        )


def test_a_call_survives_the_operator_with_every_argument_in_its_place() -> None:
    """Each argument is another object, so that no two can change places."""
    layer = make_layer()
    packed = {
        name: PackedWeight.of(weight._storage, weight._storage.experts)._replace(
            fixed=weight._storage.layout, owner=None
        )
        for name, weight in layer.items()
        if isinstance(weight, ShuffledMXFP4Tensor)
    }
    call: MoECall[Any] = MoECall(
        **(layer | packed),
        activation="gelu",
        w13_bias=torch.zeros(1),
        w2_bias=torch.zeros(2),
        expert_mask=torch.zeros(3),
        doweight_stage1=True,
        num_local_tokens=torch.zeros(5),
        swiglu_limit=1.5,
        swiglu_alpha=2.5,
        situ_beta=3.5,
        situ_linear_beta=4.5,
        hidden_scale=torch.zeros(4),
        activation_dtype="mxfp4",
        scale_rule="floor",
        out_dtype=torch.float16,
        backend="reference",
    )
    again = unpack(pack(call), packed=True)
    for name in ARGUMENTS:
        before, after = getattr(call, name), getattr(again, name)
        if isinstance(before, PackedWeight):
            assert all(a is b or a == b for a, b in zip(before[2:], after[2:], strict=True))
            assert all(a is b for a, b in zip(before[:2], after[:2], strict=True))
        else:
            assert before is after or before == after
    arguments = torch.ops.shuffled_tensor.fused_moe_packed.default._schema.arguments
    assert len(pack(call)) == len(arguments)
    for argument, value in zip(arguments, pack(call), strict=True):
        if argument.name in ARGUMENTS:
            given = getattr(call, argument.name)
            assert value is given or value == given or value == str(given).removeprefix("torch.")
        else:
            name, _, part = argument.name.partition("_")
            weight = packed[name]
            assert (
                value
                is {
                    "qdata": weight.qdata,
                    "scale": weight.scale,
                    "layout": weight.layout.name,
                    "rows": weight.geometry.rows,
                    "columns": weight.geometry.columns,
                }[part]
            )


def test_an_argument_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'swiglu_beta'"):
        fused_moe(**make_layer(), swiglu_beta=1.0)
    with pytest.raises(TypeError, match=r"fused_moe\(\) got an unexpected keyword argument 'swiglu_beta'"):
        explain(**make_layer(), swiglu_beta=1.0)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "foo", 7])
def test_an_out_dtype_that_is_none_is_a_type_error(out_dtype: Any) -> None:
    for function in (fused_moe, explain):
        with pytest.raises(TypeError, match=rf"out_dtype must be torch.bfloat16 or .*, found {out_dtype!r}"):
            function(**make_layer(), out_dtype=out_dtype)


# --- a backend is a class


class MadeUp(Backend):
    """For an architecture of its own; it reads one layout, and takes everything but biases."""

    name = "made up"
    arch = "mu100"

    def __init__(self) -> None:
        self.ran: list[str] = []

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        return (find_layout("mxfp4_separated"),)

    def refuse(self, call: MoECall[PackedWeight]) -> str | None:
        return None if call.w13_bias is None else "it has no biases"

    def run(self, call: MoECall[PackedWeight]) -> Tensor:
        self.ran = [call.w13.layout.name, call.w2.layout.name]
        return BACKENDS["reference"].run(call)

    def describe(self, call: MoECall[PackedWeight]) -> Description:
        return Description((Kernels(range(1, MANY), "paint", "made up"),), {"colour": "red"})

    def fingerprint(self) -> str:
        return "1.0"


@pytest.fixture
def made_up() -> Iterator[MadeUp]:
    """Before all others; afterwards their order, which is that of preference, is as it was."""
    backend, others = MadeUp(), dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({backend.name: backend, **others})
    with override_arch("mu100"):
        yield backend
    BACKENDS.clear()
    BACKENDS.update(others)


def test_a_made_up_backend_is_selected_and_gets_its_layout(made_up: MadeUp) -> None:
    layer = make_layer()
    expected = fused_moe(**layer, backend="reference", out_dtype=torch.float32)
    assert not made_up.ran
    layer = make_layer()
    out = fused_moe(**layer, out_dtype=torch.float32)
    assert made_up.ran == ["mxfp4_separated", "mxfp4_separated"]
    torch.testing.assert_close(out, expected)
    assert layer["w13"].shuffle_kind == "mxfp4_separated"
    with pytest.raises(ValueError, match="w13 is fixed to 'mxfp4_moe', and it reads 'mxfp4_separated'; make both"):
        fused_moe(**make_layer(kind="mxfp4_moe"), backend="made up")


def test_a_made_up_backend_is_explained(made_up: MadeUp) -> None:
    report = explain(**make_layer())
    assert (report.backend, report.layout, report.activations) == ("made up", "mxfp4_separated", "made up")
    assert report.shuffles == {"w13": "mxfp4_separated", "w2": "mxfp4_separated"}
    assert report.tags == {"colour": "red"}
    assert report.installed["made up"] == "1.0"
    bias = torch.zeros(4, 320)
    refused = explain(**make_layer(), w13_bias=bias)
    assert refused.backend == "reference"
    assert refused.passed_over["made up"] == "it has no biases"
    with pytest.raises(ValueError, match="made up cannot take this call: it has no biases"):
        fused_moe(**make_layer(), w13_bias=bias, backend="made up")


def test_a_made_up_backend_is_in_doctor_and_in_compiled_codes_key(made_up: MadeUp) -> None:
    lines = doctor().splitlines()
    assert "made up       1.0" in lines
    assert "  made up     yes, reads 'mxfp4_separated'" in lines
    key = make_weight("w13")._stable_hash_for_caching()
    BACKENDS.pop("made up")
    assert make_weight("w13")._stable_hash_for_caching() != key


def test_layouts_are_found_by_name() -> None:
    assert find_layout("none") is LAYOUTS["none"]
    with pytest.raises(ValueError, match="unknown shuffle_kind 'gguu'; known: 'none', 'mxfp4_moe', 'mxfp4_separated'"):
        find_layout("gguu")
