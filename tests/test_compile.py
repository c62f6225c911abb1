# SPDX-License-Identifier: MIT
"""Compilers, export and captured graphs: one graph, one shuffle a weight, never stale, never twice."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, override_arch, prepare, refit
from shuffled_tensor.testing import FakeAiter, fake_aiter

from .support.judges import dense_moe
from .support.layer import EXPERTS, HIDDEN, MoE, ShuffleCount, make_layer, make_weight


class Model(nn.Module):
    """Four layers with their routers; its arithmetic leaves a compiler no other rounding than eager's."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MoE(device) for _ in range(4))
        self.routers = nn.ModuleList(nn.Linear(HIDDEN, EXPERTS, dtype=torch.bfloat16, device=device) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, router in zip(self.layers, self.routers, strict=True):
            weight, ids = router(x).float().topk(2)
            x = x + layer(x, weight, ids.int()) * 2.0**-16
        return x


def tokens(count: int, device: str = "cpu") -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).bfloat16().to(device)


def flipped(device: str = "cpu") -> dict[str, Tensor]:
    """A state dict of other values: every layer's experts in reverse order."""
    model = Model(device)
    for layer in model.layers:
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.copy_(weight[list(range(EXPERTS))[::-1]])
    return model.state_dict()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def gfx950() -> Iterator[FakeAiter]:
    with override_arch("gfx950"), fake_aiter("v0.1.18 and later") as fake:
        yield fake


@pytest.fixture
def shuffles(monkeypatch: pytest.MonkeyPatch) -> ShuffleCount:
    return ShuffleCount(monkeypatch)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("first", ["compiled", "eager", "after state_dict"])
def test_one_graph_and_one_shuffle_a_weight(
    backend: str, dynamic: bool, first: str, gfx950: FakeAiter, shuffles: ShuffleCount, device: str
) -> None:
    expected = {count: Model(device)(tokens(count, device)) for count in range(3, 13)}
    refitted = Model(device)
    refitted.load_state_dict(flipped(device))
    other_values = flipped(device)
    expected_after = refitted(tokens(5, device))
    shuffles.count = 0

    model = Model(device)
    taken_before = model.state_dict() if first == "after state_dict" else {}
    if first == "eager":
        model(tokens(4, device))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for count in range(3, 13) if dynamic else [5] * 10:
        assert torch.equal(compiled(tokens(count, device)), expected[count])
    assert (counter.frame_count, shuffles.count) == (1, 8)
    address = model.layers[0].w13_weight.qdata.data_ptr()
    model.load_state_dict(other_values)
    assert torch.equal(compiled(tokens(5, device)), expected_after)
    assert (counter.frame_count, shuffles.count) == (1, 8)
    assert model.layers[0].w13_weight.qdata.data_ptr() == address
    for name, value in taken_before.items():
        if isinstance(value, ShuffledMXFP4Tensor):
            assert value.is_shuffled, name
            assert torch.equal(value.dequantize(), other_values[name].dequantize())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_every_grad_mode(mode: Callable[[], Any], gfx950: FakeAiter, shuffles: ShuffleCount) -> None:
    expected = Model()(tokens(5))
    shuffles.count = 0
    model, counter = Model(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with mode():
        for _ in range(2):
            assert torch.equal(compiled(tokens(5)), expected)
    assert (counter.frame_count, shuffles.count) == (1, 8)


def captured_graph(model: nn.Module, *arguments: Tensor) -> str:
    """The graph that a compiler's backend gets, beneath our tensors."""
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(module.print_readable(print_output=False))
        return module

    from torch._dynamo.backends.common import aot_autograd

    torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*arguments)
    (graph,) = graphs
    graph = re.sub(r"\s+# (File|No stacktrace).*", "", graph)
    return re.sub(r"\n\s*\n", "\n", graph).strip()


def test_the_captured_graph(gfx950: FakeAiter) -> None:
    layer = make_layer()
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    with torch.no_grad():
        graph = captured_graph(MoE(), *arguments)
        assert captured_graph(prepare(MoE()), *arguments) == graph  # the same with weights shuffled before
        model = captured_graph(Model(), tokens(5))
    assert_expected_inline(
        graph,
        """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "u8[4, 512, 384]", arg1_1: "u8[4, 512, 24]", arg2_1: "u8[4, 768, 128]", arg3_1: "u8[4, 768, 8]", arg4_1: "bf16[5, 544]", arg5_1: "f32[5, 2]", arg6_1: "i32[5, 2]"):
        fused_moe_packed: "bf16[5, 544]" = torch.ops.shuffled_tensor.fused_moe_packed.default(arg4_1, arg0_1, arg1_1, 'mxfp4_separated', 320, 544, arg2_1, arg3_1, 'mxfp4_separated', 544, 160, arg5_1, arg6_1, 'silu', None, None, None, None, False, None, None, None, None, None, None, None, 'bfloat16', 'aiter, triton, reference');  arg4_1 = arg0_1 = arg1_1 = arg2_1 = arg3_1 = arg5_1 = arg6_1 = None
        return (fused_moe_packed,)""",
    )
    packed = re.findall(r"fused_moe_packed\.default\((.*?)\)", model)
    assert len(packed) == 4
    assert all("'mxfp4_separated', 320, 544, " in call and ", 'mxfp4_separated', 544, 160, " in call for call in packed)
    assert all(call.endswith("'bfloat16', 'aiter, triton, reference'") for call in packed)
    body = (line for line in model.splitlines() if "fused_moe_packed.default" not in line)
    weights = re.findall(r'(\w+): "u8', model)
    assert len(weights) == 16  # those that come in, and no other: none is copied or permuted
    assert not [line for line in body if "def forward" not in line and any(name in line.split() for name in weights)]


def test_an_explicit_change_of_kind_recompiles_once() -> None:
    layer = make_layer()
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    model, counter = MoE(), CompileCounterWithBackend("aot_eager")
    expected = model(*arguments)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for change in (
        lambda w: None,
        lambda w: w.shuffle_("mxfp4_moe"),
        lambda w: w.shuffle_("mxfp4_moe"),
        lambda w: w.unshuffle_(),
    ):
        change(model.w13_weight)
        for _ in range(2):
            assert torch.equal(compiled(*arguments), expected)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


def test_a_weight_as_an_argument(gfx950: FakeAiter, shuffles: ShuffleCount) -> None:
    expected = fused_moe(**make_layer())
    shuffles.count = 0
    layer, counter = make_layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_moe, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(compiled(*layer.values()), expected)
    assert (counter.frame_count, shuffles.count) == (1, 2)


def test_engine_code_that_calls_aiter_itself_compiles(gfx950: FakeAiter, shuffles: ShuffleCount) -> None:
    expected = fused_moe(**make_layer())
    module, layer = MoE(), make_layer()
    operator = torch.ops.aiter.fused_moe_

    def call(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return operator(x, module.w13_weight, module.w2_weight, weight, ids, quant_type=3)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]), expected)


@pytest.mark.parametrize("registered", ["property", "parameter", "another"])
def test_engine_code_that_passes_scales_compiles(registered: str, gfx950: FakeAiter) -> None:
    expected = fused_moe(**make_layer())
    module, layer = MoE(), make_layer()
    w13_scale, w2_scale = module.w13_weight.scale, module.w2_weight.scale
    if registered == "another":
        w13_scale = w13_scale.clone()
    module.w13_weight_scale = nn.Parameter(w13_scale.view(torch.float8_e8m0fnu), requires_grad=False)
    module.w2_weight_scale = nn.Parameter(w2_scale.flatten(0, 1), requires_grad=False)

    def call(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        scales = (
            {"w1_scale": module.w13_weight.scale, "w2_scale": module.w2_weight.scale}
            if registered == "property"
            else {"w1_scale": module.w13_weight_scale, "w2_scale": module.w2_weight_scale}
        )
        return torch.ops.aiter.fused_moe_(x, module.w13_weight, module.w2_weight, weight, ids, quant_type=3, **scales)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    if registered == "another":
        with pytest.raises(RuntimeError, match=r"w1_scale must be None or w1\.scale itself"):
            compiled(*arguments)
    else:
        for _ in range(2):
            assert torch.equal(compiled(*arguments), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("taken", ["inside", "outside"])
def test_some_of_the_experts(taken: str, backend: str, gfx950: FakeAiter, shuffles: ShuffleCount) -> None:
    layer = make_layer() | {"topk_ids": make_layer()["topk_ids"] % 2}
    parts = {"w13": layer["w13"][1:3], "w2": layer["w2"][1:3]}
    expected = fused_moe(**(layer | parts))
    shuffles.count = 0
    layer |= {"w13": make_weight("w13"), "w2": make_weight("w2")}
    views = [layer["w13"][1:3], layer["w2"][1:3]] if taken == "outside" else [layer["w13"], layer["w2"]]

    def call(x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        if taken == "inside":
            w13, w2 = w13[1:3], w2[1:3]
        return fused_moe(x, w13, w2, weight, ids)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer["w13"][:2].qdata) is Tensor  # as all of them are there, and for good
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(compiled(layer["hidden_states"], *views, layer["topk_weight"], layer["topk_ids"]), expected)
    assert (counter.frame_count, shuffles.count) == (1, 2)
    assert gfx950.reads == ["separated tiles"] * 3


def test_a_weight_made_inside(gfx950: FakeAiter) -> None:
    """Its first use is in the graph, on every call."""
    values = [make_weight(name).dequantize() for name in ("w13", "w2")]

    def call(x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        packed = ShuffledMXFP4Tensor.from_hp(w13, gate_up=True, row_order="contiguous")
        return fused_moe(x, packed, ShuffledMXFP4Tensor.from_hp(w2, gate_up=False), weight, ids)

    layer = make_layer()
    arguments = layer["hidden_states"], *values, layer["topk_weight"], layer["topk_ids"]
    expected = call(*arguments)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(*arguments), expected)
    assert gfx950.reads == ["separated tiles"] * 3


@pytest.mark.parametrize("version", ["v0.1.18 and later", "#4542", "v0.1.16, v0.1.17"])
def test_a_call_is_rerouted_when_it_runs(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph outlives what aiter's choice depends on."""
    with override_arch("gfx950"), fake_aiter(version, tuned=False) as fake:
        module, layer = MoE(), make_layer()
        arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
        expected, reference = fused_moe(**layer), fused_moe(**layer, backend="reference")
        assert not torch.equal(expected, reference)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        pinned = torch.compile(partial(fused_moe, backend="aiter"), fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), expected)
        assert torch.equal(pinned(*layer.values()), expected)
        monkeypatch.setenv("AITER_FLYDSL_FORCE", "0")
        assert torch.equal(compiled(*arguments), reference)
        with pytest.raises(ValueError, match="aiter cannot take this call: for 1 token, CK-Tile a16w4, K in parts"):
            pinned(*layer.values())
        assert counter.frame_count == 1
        assert len(fake.reads) == 3


@pytest.mark.parametrize("dropped", ["guard_filter_fn", "skip_guard_eval_unsafe"])
def test_without_guards_a_refit_by_copy_is_right(dropped: str, gfx950: FakeAiter) -> None:
    """As vLLM runs compiled models."""
    refitted = Model()
    refitted.load_state_dict(flipped())
    expected, x = refitted(tokens(5)), tokens(5)
    model = Model()
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)} if dropped == "guard_filter_fn" else {}
    compiled = torch.compile(model, fullgraph=True, backend="inductor", options=options)
    compiled(x)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=dropped == "skip_guard_eval_unsafe"):
        model.load_state_dict(flipped())
        assert torch.equal(compiled(x), expected)


PROGRAM = """
import sys, torch
from shuffled_tensor import fused_moe, override_arch
from shuffled_tensor.testing import fake_aiter
from tests.support.layer import MoE, make_layer
layer = make_layer()
arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
for version in sys.argv[1:]:
    torch._dynamo.reset()
    with override_arch("gfx950"), fake_aiter(version), torch.no_grad():
        expected = fused_moe(**make_layer())
        out = torch.compile(MoE(), fullgraph=True)(*arguments)
        assert torch.equal(out, expected), version
for kind in ("mxfp4_moe", "mxfp4_separated", "none"):
    torch._dynamo.reset()
    module = MoE()
    for weight in module.parameters():
        weight.shuffle_(kind)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(*arguments), fused_moe(**make_layer())), kind
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_a_warm_cache_in_a_second_process(tmp_path: Any) -> None:
    """No artefact of one kind, or of one aiter, is served to another."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    hits = []
    for versions in (["#3470 (shuffle_kind)"], ["v0.1.18 and later", "#3470 (shuffle_kind)"]):
        command = [sys.executable, "-c", PROGRAM, *versions]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        hits.append(int(run.stdout))
    assert hits == [0, 4]  # the version that was there before, and the three kinds


# --- options of a layer


OPTIONS: dict[str, dict[str, Any]] = {
    "gelu_tanh": {"activation": "gelu_tanh", "swiglu_limit": 3.0},
    "swiglu": {"activation": "swiglu", "swiglu_alpha": 0.5},
    "situ": {"activation": "situ", "situ_beta": 4.0, "situ_linear_beta": 25.0},
}


class Dispatched(MoE):
    """A layer whose tokens come in a buffer, with how many there are on the device."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        return fused_moe(x, self.w13_weight, self.w2_weight, weight, ids, num_local_tokens=count, **self.options)


@pytest.mark.parametrize("how", ["compiled", "compiled dynamic", "exported"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_operator(options: dict[str, Any], how: str) -> None:
    """Judged in float64; another number of tokens in the buffer does not recompile."""
    layer, module = make_layer(), Dispatched(**options)
    buffer = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    judged = layer | {name: layer[name].dequantize(torch.float64) for name in ("w13", "w2")}
    counts = [torch.tensor([count], dtype=torch.int32) for count in (5, 2, 0)]
    if how == "exported":
        call = torch.export.export(module, (*buffer, counts[0])).module()
    else:
        call = torch.compile(module, fullgraph=True, dynamic=how == "compiled dynamic", backend="aot_eager")
        call(*buffer, counts[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in counts:
            expected = dense_moe(**judged, num_local_tokens=count, **options)
            torch.testing.assert_close(call(*buffer, count).double(), expected, rtol=1e-2, atol=1e-2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = module(*(mode.from_tensor(tensor) for tensor in (*buffer, counts[0])))
    assert (type(out), out.shape, out.dtype) == (FakeTensor, (5, HIDDEN), torch.bfloat16)


# --- export


@pytest.mark.parametrize("kind", [None, "mxfp4_moe"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_save_load_run(kind: str | None, strict: bool) -> None:
    layer, module = make_layer(), MoE()
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    expected = fused_moe(**layer)
    for weight in module.parameters():
        weight.shuffle_(kind or "none")
    count = torch.export.Dim("tokens")
    program = torch.export.export(module, arguments, dynamic_shapes=[{0: count}] * 3, strict=strict)
    assert torch.equal(program.module()(*arguments), expected)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.equal(loaded.module()(*arguments), expected)
    assert loaded.module()(*(argument[:2] for argument in arguments)).shape == (2, HIDDEN)


PLAIN_PACKAGE = """
import sys, torch

class Plain(torch.nn.Module):
    def forward(self, x):
        return x @ x

x = torch.ones(8, 8, device=sys.argv[1])
program = torch.export.export(Plain(), (x,))
package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
torch._inductor.aoti_load_package(package)(x)
"""


@pytest.fixture(scope="module")
def torch_loads_packages(device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own: torch 2.11 dies of it on some CUDA machines, without any operator or tensor of ours."""
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    if device != "cpu" and subprocess.run([sys.executable, "-c", PLAIN_PACKAGE, device, path], check=False).returncode:
        pytest.skip(f"waits for a torch that loads a package of its own on this machine: {torch.__version__} dies")


@pytest.mark.usefixtures("torch_loads_packages")
@pytest.mark.parametrize("kind", ["none", "mxfp4_moe"])
def test_ahead_of_time_inductor(kind: str, tmp_path: Any) -> None:
    layer, module = make_layer(), MoE()
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    for weight in module.parameters():
        weight.shuffle_(kind)
    program = torch.export.export(module, arguments)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(package)(*arguments), fused_moe(**layer))


# --- other modes


def test_functional_call(gfx950: FakeAiter) -> None:
    layer = make_layer()
    weights = {"w13_weight": layer["w13"], "w2_weight": layer["w2"]}
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    assert torch.equal(torch.func.functional_call(MoE("meta"), weights, arguments), fused_moe(**layer))
    assert layer["w13"].is_shuffled


def test_vmap_is_refused() -> None:
    layer = make_layer()
    x = layer.pop("hidden_states")
    with pytest.raises(NotImplementedError, match="no vmap rule; flatten the batch into tokens"):
        torch.vmap(lambda row: fused_moe(row, **layer))(x.unsqueeze(0))


def test_autocast_changes_nothing() -> None:
    layer = make_layer()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(fused_moe(**layer), fused_moe(**make_layer()))


def test_fake_tensors(gfx950: FakeAiter, shuffles: ShuffleCount) -> None:
    module, layer = MoE(), make_layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = (mode.from_tensor(layer[name]) for name in ("hidden_states", "topk_weight", "topk_ids"))
        out = module(*fakes)
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == ((5, HIDDEN), torch.bfloat16)
    with FakeTensorMode():
        weight = make_weight("w13")
        assert isinstance(weight.qdata, FakeTensor)
        assert weight.clone().shape == (EXPERTS, 320, HIDDEN)
    assert torch.equal(
        module(*(layer[name] for name in ("hidden_states", "topk_weight", "topk_ids"))), fused_moe(**layer)
    )


def test_meta_construction_and_materialisation() -> None:
    layer = make_layer()
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    with torch.device("meta"):
        modules = [MoE("meta"), MoE("meta")]
    assert modules[0](*(argument.to("meta") for argument in arguments)).shape == (5, HIDDEN)
    modules[0].load_state_dict(MoE().state_dict(), assign=True)
    modules[1].to_empty(device="cpu")
    assert not modules[1].w13_weight.dequantize().any()
    assert (modules[1].w13_weight.scale == 127).all()  # pads are defined before anything is written
    modules[1].load_state_dict(MoE().state_dict())
    for module in modules:
        assert isinstance(module.w13_weight, nn.Parameter)
        assert torch.equal(module(*arguments), fused_moe(**layer))


@pytest.mark.parametrize("kind", ["none", "mxfp4_moe", "mxfp4_separated"])
def test_zeros_like_keeps_the_layout(kind: str) -> None:
    weight = make_weight("w13").shuffle_(kind)
    for zeros in (torch.zeros_like(weight), torch.empty_like(weight[1:])):
        assert isinstance(zeros, ShuffledMXFP4Tensor)
        assert zeros.is_shuffled == (kind != "none")
        assert not zeros.dequantize().any()
        zeros.copy_(weight[: len(zeros)])
        assert torch.equal(zeros, weight[: len(zeros)])


# --- CUDA graphs


@pytest.mark.parametrize("mode", ["captured", "reduce-overhead"])
def test_cuda_graphs(mode: str, gfx950: FakeAiter, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")

    def kernel(given: dict[str, Any]) -> Tensor:
        """A stand-in that reads the weights on the device and nothing back: the fake's own looks at its ids."""
        weight, scale = (given[name].view(torch.uint8).float().mean() for name in ("w1", "w1_scale"))
        return given["hidden_states"] * (weight + scale).bfloat16()

    monkeypatch.setattr(gfx950, "fused_moe_", kernel)
    layer, module = make_layer(device), prepare(MoE(device))
    arguments = layer["hidden_states"], layer["topk_weight"], layer["topk_ids"]
    addresses = [part.data_ptr() for weight in module.parameters() for part in (weight.qdata, weight.scale)]
    other = MoE(device)
    other.w13_weight.copy_(torch.full(other.w13_weight.shape, 6.0))
    with torch.no_grad():
        if mode == "captured":
            graph = torch.cuda.CUDAGraph()
            module(*arguments)
            with torch.cuda.graph(graph):
                out = module(*arguments)
            replay = lambda: (graph.replay(), out.clone())[1]  # noqa: E731
        else:
            compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                compiled(*arguments)
            replay = lambda: compiled(*arguments).clone()  # noqa: E731
        assert torch.equal(replay(), module(*arguments))
        seen = [replay()]
        module.load_state_dict(other.state_dict())
        seen.append(replay())
        assert torch.equal(seen[-1], module(*arguments))
        with refit(module):
            module.w13_weight.qdata.copy_(layer["w13"].unshuffle_().qdata)
            module.w13_weight.scale.copy_(layer["w13"].scale)
        seen.append(replay())
        assert torch.equal(seen[-1], module(*arguments))
        assert not torch.equal(seen[1], seen[0])
        assert torch.equal(seen[2], seen[0])
    assert [part.data_ptr() for weight in module.parameters() for part in (weight.qdata, weight.scale)] == addresses
