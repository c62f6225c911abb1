# SPDX-License-Identifier: MIT
"""SGLang's own expert layers on a CPU: its schemes, loaders, dispatcher and runner, as on a gfx950 GPU. What a server
fills at its start (arguments, ranks) is made up: one process, nothing parallel."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shuffled_tensor import override_arch
from shuffled_tensor.testing import FakeAiter, fake_aiter

from .layers import EXPERTS, HIDDEN, INTERMEDIATE, Inputs
from .stand_ins import ENGINES, SERVING, Anything, StandIns, extend_aiter

VERSION = "0.5.23"

_ABSENT = SERVING | {
    *("aiter", "apache_tvm_ffi", "datasets", "decord", "fla", "grpc", "hf_transfer", "interegular", "IPython"),
    *("kernels", "modelscope", "mori", "msgpack", "nvtx", "outlines", "py_spy", "sgl_kernel", "smg_grpc_proto"),
    *("soundfile", "tilelang", "torch_memory_saver", "torchao", "torchvision", "triton"),
}


class _Unset(SimpleNamespace):
    """Has every attribute: None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __bool__(self) -> bool:
        return False


def make_importable() -> None:
    """Once a process."""
    os.environ |= {"SGLANG_USE_AITER": "1", "SGLANG_ROCM_SMALLM_MOE": "0"}
    sys.path.insert(0, str(ENGINES / f"sglang-{VERSION}"))
    # transformers looks whether torchvision is installed, before a stand-in seems to be
    import transformers.models.auto.image_processing_auto  # noqa: F401

    sys.meta_path.append(StandIns(_ABSENT))
    torch.version.hip = "7.2.0"
    gpu = SimpleNamespace(
        name="MI355X", gcnArchName="gfx950", multi_processor_count=256, total_memory=1 << 38, major=9, minor=5
    )
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 5),
        "get_device_properties": gpu,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.compile = lambda function=None, **_: function if function else lambda decorated: decorated


@contextmanager
def sglang(version: str = "v0.1.18 and later", *, tuned: bool = True) -> Iterator[FakeAiter]:
    """SGLang as it finds itself on a gfx950 GPU with the fake aiter."""
    with fake_aiter(version, tuned=tuned) as fake, override_arch("gfx950"):
        extend_aiter()
        aiter: Any = sys.modules["aiter"]
        aiter.__getattr__ = _anything
        aiter.fused_moe.fused_topk = Anything("fused_topk")
        aiter.get_hip_quant = Anything("get_hip_quant")  # asked for other formats
        import sglang.srt.layers.moe.fused_moe_triton.layer
        import sglang.srt.layers.moe.moe_runner.aiter
        import sglang.srt.layers.quantization.mxfp4
        import sglang.srt.layers.quantization.quark.quark  # noqa: F401
        from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend

        small_sort: Any = ModuleType("moe_sorting_small")
        small_sort.apply_aiter_small_moe_sort_patch = lambda: None
        sys.modules.setdefault("sglang.kernels.ops.moe.moe_sorting_small", small_sort)
        one = dict.fromkeys(("moe_ep_size", "moe_tp_size", "tp_size", "attn_dp_size"), 1)
        made_up = {
            "get_parallel": _Unset(**one, moe_ep_rank=0, moe_tp_rank=0, tp_rank=0),
            "get_exec": _Unset(moe=_Unset(ep_join_mode="none", enable_paged_experts=False)),
            "get_flags": _Unset(moe=_Unset(in_speculative_scope=False)),
            "get_server_args": _Unset(),
            "get_lora": _Unset(),
            "get_moe_a2a_backend": MoeA2ABackend.NONE,
            "get_moe_runner_backend": MoeRunnerBackend.AUTO,
            "use_symmetric_memory": contextlib.nullcontext(),
            "should_use_flashinfer_cutlass_moe_fp4_allgather": False,
            "is_in_tc_piecewise_cuda_graph": False,
            "is_allocation_symmetric": False,
            "create_kt_config_from_server_args": None,
            "get_global_expert_location_metadata": None,
            "_validate_hpc_ops_quant_method": None,
            "_validate_deepep_v2_quant_method": None,
        }
        for module in [module for name, module in sys.modules.items() if name.startswith("sglang.srt")]:
            for name, value in made_up.items():
                if name in vars(module):
                    setattr(module, name, lambda *_, value=value, **__: value)
        yield fake


def _anything(name: str) -> Any:
    if name.startswith(("__", "mxfp4")):
        raise AttributeError(name)
    return Anything(f"aiter.{name}")


def make_layer(config: Any, **options: Any) -> nn.Module:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": 2}
    where = {"layer_id": 0, "prefix": "model.layers.0.mlp.experts", "params_dtype": torch.bfloat16}
    layer = FusedMoE(quant_config=config, **(sizes | where | options))
    return layer.requires_grad_(False)


def load_quark(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """As `models/deepseek_v2.py` does it."""
    mapping = type(layer).make_expert_params_mapping("gate_proj", "down_proj", "up_proj", num_experts=EXPERTS)
    parameters = {f"experts.{name}": parameter for name, parameter in layer.named_parameters()}
    for name, data in tensors.items():
        full = f"experts.{name}"
        for parameter_name, weight_name, expert, shard in mapping:
            if weight_name in full:
                into = full.replace(weight_name, parameter_name)
                parameters[into].weight_loader(parameters[into], data, into, shard_id=shard, expert_id=expert)
                break
        else:
            raise AssertionError(f"nothing takes {name}")


def load_gpt_oss(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """As `models/gpt_oss.py` does it."""
    for name, data in tensors.items():
        parameter = getattr(layer, name.replace("_bias", "_weight_bias"))
        parameter.weight_loader(parameter, data, weight_name=name, shard_id=None, expert_id=None)


def forward(layer: nn.Module, given: Inputs) -> Tensor:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    return layer.forward(given.hidden_states, StandardTopKOutput(given.topk_weight, given.topk_ids, None))
