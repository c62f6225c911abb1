# SPDX-License-Identifier: MIT
"""vLLM's own expert layers on a CPU: its configurations, methods, loaders and kernels' callers, as on a gfx950 GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shuffled_tensor import override_arch
from shuffled_tensor.testing import FakeAiter, fake_aiter

from .stand_ins import ENGINES, SERVING, StandIns, extend_aiter

VERSION = "0.33.0"

_ABSENT = SERVING | {"vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._rocm_C"}


def make_importable() -> None:
    """Once a process."""
    os.environ |= {"VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_USE_AITER_MOE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.path.insert(0, str(ENGINES / f"vllm-{VERSION}"))
    sys.meta_path.append(StandIns(_ABSENT))


@contextmanager
def vllm(version: str = "v0.1.18 and later", *, tuned: bool = True) -> Iterator[FakeAiter]:
    """vLLM as it finds itself on a gfx950 GPU with the fake aiter."""
    # vLLM sets variables that aiter reads
    with fake_aiter(version, tuned=tuned) as fake, override_arch("gfx950"), patch.dict(os.environ):
        extend_aiter()
        _be_rocm()
        import vllm.config.vllm as configuration
        from vllm._aiter_ops import rocm_aiter_ops
        from vllm.v1.worker.workspace import init_workspace_manager

        assert rocm_aiter_ops.is_fused_moe_enabled()
        init_workspace_manager(torch.device("cpu"))
        config = configuration.VllmConfig()
        config.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(model_type="deepseek_v3"), quantization_config=None, quantization="quark",
            dtype=torch.bfloat16,
        )  # fmt: skip
        before, configuration._current_vllm_config = configuration._current_vllm_config, config
        try:
            yield fake
        finally:
            configuration._current_vllm_config = before


def _be_rocm() -> None:
    import amdsmi

    amdsmi.amdsmi_get_processor_handles = lambda: [0]
    amdsmi.amdsmi_get_gpu_asic_info = lambda handle: {"target_graphics_version": "gfx950"}
    amdsmi.AmdSmiException = Exception
    import vllm.platforms
    import vllm.platforms.rocm as rocm

    class OnCPU(rocm.RocmPlatform):
        device_type, dispatch_key = "cpu", "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return rocm.DeviceCapability(9, 5)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "AMD_Instinct_MI355_OAM"

        @classmethod
        def is_cuda_alike(cls) -> bool:
            return True

    vllm.platforms._current_platform = OnCPU()
    torch.accelerator.empty_cache = lambda: None
    assert rocm.on_gfx950()


def make_layer(config: Any, sizes: tuple[int, int, int], *, topk: int = 2, **options: Any) -> nn.Module:
    """A `RoutedExperts` of (experts, hidden, intermediate)."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    experts, hidden, intermediate = sizes
    ranks, rank = options.pop("expert_parallel", (1, 0))
    parallel = FusedMoEParallelConfig(
        tp_size=1, pcp_size=1, dp_size=1, ep_size=ranks, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=rank, sp_size=1,
        use_ep=ranks > 1, all2all_backend="", enable_eplb=False,
    )  # fmt: skip
    manager = ExpertMapManager(
        max_num_batched_tokens=1024, top_k=topk, global_num_experts=experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
        rocm_aiter_enabled=True,
    )  # fmt: skip
    activation = getattr(MoEActivation, options.pop("activation", "SILU"))
    moe = FusedMoEConfig(
        num_experts=experts, experts_per_token=topk, hidden_dim=hidden, intermediate_size=intermediate,
        num_local_experts=manager.local_num_experts, num_logical_experts=experts, activation=activation, device="cpu",
        routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, in_dtype=torch.bfloat16, **options,
    )  # fmt: skip
    layer = RoutedExperts("model.layers.0.mlp.experts", torch.bfloat16, moe, config, manager)
    return layer.requires_grad_(False)


def load_quark(layer: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    """As every model's `load_weights` does it."""
    loaded = set(layer.load_weights(checkpoint.items()))
    assert loaded == {"w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"}, loaded


def load_gpt_oss(layer: nn.Module, checkpoint: dict[str, Tensor]) -> None:
    """As `models/gpt_oss.py` does it."""
    for name, data in checkpoint.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, data, weight_name=name, shard_id=None, expert_id=None)
