# SPDX-License-Identifier: MIT
"""The kernels of the fake aiter: what each family computes from the bytes it is handed, by the index formulas of the
layouts, and what each ignores.

A kernel knows nothing of how bytes were meant: it reads them in the order that it is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffled_tensor import mxfp4

__all__ = ["GUGU", "PLAIN", "ROW_MAJOR", "Launch", "cut_to_float8", "mxfp8", "round_trip"]

# In which byte order a kernel reads w13; w2 is tiled in both of the first two.
GUGU, PLAIN, ROW_MAJOR = "gate-up interleaved tiles", "separated tiles", "row-major"


def round_trip(values: Tensor, rule: mxfp4.ScaleRule) -> Tensor:
    """To MXFP4 and back."""
    return mxfp4.dequantize(*mxfp4.quantize(values, scale_rule=rule))


def _as_bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def cut_to_float8(values: Tensor) -> Tensor:
    """Without scales."""
    return values.to(torch.float8_e4m3fn).float()


def mxfp8(values: Tensor, rule: str) -> Tensor:
    """To MXFP8 (e4m3) and back: a block's scale is the power of two at or above amax / 448 ("round_up"), or amax / 256
    rounded to a power of two, upwards from a mantissa of 1.5 ("amax4")."""
    blocks = values.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    if rule == "amax4":
        scale = torch.exp2(torch.floor(torch.log2(amax / 1.5)) + 1 - 8)
    else:
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    rounded: Tensor = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)


def silu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    return F.silu(gate if limit is None else gate.clamp(max=limit)) * (up if limit is None else up.clamp(-limit, limit))


def gelu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """Whatever the limit."""
    return F.gelu(gate) * up


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """gpt-oss's; the factor is compiled in everywhere, and 7 is what no limit means."""
    limit = limit or 7.0
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


_ACTIVATIONS = {"silu": silu, "gelu": gelu, "swiglu": swiglu}


@dataclass
class Launch:
    """What the kernels of one call are handed.

    Attributes:
        given: the operator's arguments.
        activation: "silu", "gelu" or "swiglu".
        takes: the dtype in which the first GEMM has activations.
        quantize: what is done to them before the first GEMM, and back.
        requantize: the same, before the second.
        biases: whether the configuration hands the first GEMM, and the second, theirs.
        global_ids: whether a bias is looked up by the number that an expert has among those of all ranks.
        reads: the byte order in which w13 was read.
    """

    given: dict[str, Any]
    activation: str
    takes: torch.dtype = torch.float4_e2m1fn_x2
    quantize: Callable[[Tensor], Tensor] = _as_bfloat16
    requantize: Callable[[Tensor], Tensor] = _as_bfloat16
    biases: tuple[bool, bool] = (False, False)
    global_ids: bool = False
    reads: str = ""

    def run(self, stage1: Callable[..., Tensor], stage2: Callable[..., Tensor]) -> Tensor:
        """Both GEMMs: bfloat16 ``[tokens, H]``."""
        given, x = self.given, self._activations()
        ids, weight, mask, w2 = given["topk_ids"], given["topk_weight"], given["expert_mask"], given["w2"]
        tokens = len(ids) if given["num_local_tokens"] is None else int(given["num_local_tokens"])
        slots = x.new_zeros(*ids.shape, w2.shape[1], dtype=torch.bfloat16)
        for topk_id in ids[:tokens].unique().tolist():
            expert = topk_id if mask is None else int(mask[:topk_id].sum()) if mask[topk_id] else len(w2)
            if expert < len(w2):
                token, slot = (ids[:tokens] == topk_id).nonzero(as_tuple=True)
                factor = weight[token, slot].unsqueeze(1)
                self.expert, self.topk_id, self.factor = expert, topk_id, factor
                out = stage2(self, self.requantize(stage1(self, x[token])))
                slots[token, slot] = (out if given["doweight_stage1"] else out * factor).bfloat16()
        out = torch.zeros_like(slots[:, 0])
        for column in range(slots.shape[1]):
            out += slots[:, column]  # bfloat16 adds, one after the other
        return out

    def _activations(self) -> Tensor:
        """float32 ``[tokens, H]``, as the first GEMM has them."""
        x, scale = self.given["hidden_states"], self.given["a1_scale"]
        if x.dtype is not torch.float4_e2m1fn_x2:
            return self.quantize(x.float())
        if self.takes is not x.dtype or scale is None:
            raise RuntimeError("packed hidden_states are neither bfloat16 nor quantised again")
        return mxfp4.dequantize(x, scale)

    def drop(self, *names: str) -> None:
        """Forget arguments, as kernels do that take none of them."""
        self.given = self.given | dict.fromkeys(names)

    # --- what kernels read

    def weight(self, name: str, reads: str) -> Tensor:
        """The expert's values, float32 ``[rows, columns]``, as a kernel that reads in some order sees them."""
        data, scale = self.given[name], self.given[f"{name}_scale"]
        rows, width = data.shape[1:]
        codes, scales = (
            _raw(part, len(data), self.expert)[_offsets(rows, size, reads, name == "w1", tile).to(part.device)]
            for part, size, tile in ((data, width, _code), (scale, width // 16, _scale))
        )
        if name == "w1":
            self.reads = reads
        return mxfp4.dequantize(codes, scales)

    def bias(self, name: str, expert: int | None = None) -> Tensor | float:
        """The expert's, where the configuration hands it over."""
        bias = self.given[name]
        if bias is None or not self.biases[name == "bias2"]:
            return 0.0
        if bias.dtype is not torch.float32:
            raise TypeError(f"MoE bias must be fp32, got {bias.dtype}")
        row: Tensor = bias[self.expert if expert is None else expert]
        return row

    @property
    def limit(self) -> float | None:
        """As it is told; 0 is none."""
        return self.given["swiglu_limit"] or None

    @property
    def shuffled(self) -> bool:
        """Whether either weight says so, or the call."""
        if self.given.get("is_shuffled") is not None:
            return bool(self.given["is_shuffled"])
        return any(getattr(self.given[name], "is_shuffled", False) for name in ("w1", "w2"))

    @property
    def tiles(self) -> str:
        """What kernels that have both read, by what the weights say."""
        fp4 = self.given["w1"].dtype is torch.float4_e2m1fn_x2
        return PLAIN if self.shuffled and fp4 else ROW_MAJOR


def _raw(data: Tensor, experts: int, expert: int) -> Tensor:
    """One expert's bytes from a tensor's data pointer on, whatever its strides say: what a kernel sees."""
    size = data.numel() // experts
    return data.view(torch.uint8).as_strided((size,), (1,), data.storage_offset() + expert * size)


def _code(n: Tensor, b: Tensor, width: int) -> Tensor:
    return (n // 16) * 16 * width + (b // 16) * 256 + (n % 16) * 16 + b % 16


def _scale(n: Tensor, k: Tensor, width: int) -> Tensor:
    return (n // 32) * 32 * width + (k // 8) * 256 + (k % 4) * 64 + (n % 16) * 4 + (k % 8 // 4) * 2 + (n % 32) // 16


def _offsets(rows: int, width: int, reads: str, gate_up: bool, tile: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Of each byte of logical rows and columns."""
    n, column = torch.arange(rows).unsqueeze(1), torch.arange(width)
    if reads == ROW_MAJOR:
        return n * width + column
    if reads == GUGU and gate_up:
        half, i = n // (rows // 2), n % (rows // 2)
        n = 32 * (i // 16) + 16 * half + i % 16
    return tile(n, column, width)


# --- the first GEMM: ``[rows, I]`` for the rows of one expert


def _flydsl_stage1_wrapper(launch: Launch, x: Tensor, *, kernelName: str) -> Tensor:
    """Any limit; another activation than SwiGLU is SiLU."""
    reads = GUGU if "_gui" in kernelName else PLAIN
    gate, up = (x @ launch.weight("w1", reads).T + launch.bias("bias1")).chunk(2, dim=1)
    return (swiglu if launch.activation == "swiglu" else silu)(gate, up, launch.limit)


def cktile_moe_stage1(
    launch: Launch, x: Tensor, *, split_k: int, n_pad_zeros: int, post_activation_layout: str = "auto"
) -> Tensor:
    """With all of K, rows are gate-up interleaved and SwiGLU's limit is compiled in. With K in parts, rows come as they
    are stored, the last ones without a value where pads are told, and others make gate and up of them."""
    if split_k == 1:
        if launch.given["bias1"] is None:  # there is no such kernel, and an empty one is launched
            return x.new_zeros(len(x), launch.given["w2"].shape[2] * 2)
        gate, up = (x @ launch.weight("w1", GUGU).T + launch.bias("bias1")).chunk(2, dim=1)
        return swiglu(gate, up, None)
    if launch.takes is not torch.bfloat16 or launch.quantize is not _as_bfloat16:
        raise RuntimeError("CK-Tile: there is no kernel with K in parts for activations that are quantised")
    rows = (x @ launch.weight("w1", PLAIN).T).bfloat16().float()
    if n_pad_zeros:
        rows[:, -n_pad_zeros:] = 0
    if post_activation_layout == "auto":
        if launch.given["bias1"] is not None and launch.biases[0]:
            raise ValueError("CK-Tile interleaved split-k bias is not supported")
        launch.reads = GUGU
        gate, up = (half.flatten(1) for half in rows.unflatten(1, (-1, 2, 16)).unbind(2))
    else:
        gate, up = (rows + launch.bias("bias1", launch.topk_id if launch.global_ids else None)).chunk(2, dim=1)
    return _ACTIVATIONS[launch.activation](gate, up, None)


def ck_moe_stage1(launch: Launch, x: Tensor) -> Tensor:
    """No bias, no limit; the weights are as they say."""
    if launch.takes is not torch.float4_e2m1fn_x2:
        raise RuntimeError("ck_moe_stage1: there is no kernel for other activations than MXFP4 with such weights")
    gate, up = (x @ launch.weight("w1", launch.tiles).T).chunk(2, dim=1)
    if launch.given["doweight_stage1"]:
        gate, up = gate * launch.factor, up * launch.factor
    return (gelu if launch.activation == "gelu" else silu)(gate, up, None)


def a4w4_stage1(launch: Launch, x: Tensor, *, reads: str) -> Tensor:
    """SiLU, whatever is asked for."""
    gate, up = (x @ launch.weight("w1", reads).T).chunk(2, dim=1)
    return silu(gate, up, None)


def _mxfp4_a4w4_stage1_fw(launch: Launch, x: Tensor, *, kernelName1: str, interleave: bool = True) -> Tensor:
    return a4w4_stage1(launch, x, reads=GUGU if interleave else PLAIN)


# --- the second: ``[rows, H]``


def a4w4_stage2(launch: Launch, x: Tensor, *, reads: str) -> Tensor:
    return x @ launch.weight("w2", reads).T


def _mxfp4_a4w4_stage2_fw(launch: Launch, x: Tensor, *, kernelName2: str) -> Tensor:
    return a4w4_stage2(launch, x, reads=PLAIN)


def _flydsl_stage2_wrapper(launch: Launch, x: Tensor, *, kernelName: str) -> Tensor:
    return x @ launch.weight("w2", PLAIN).T + launch.bias("bias2")


def cktile_moe_stage2(launch: Launch, x: Tensor, *, n_pad_zeros: int) -> Tensor:
    rows = x @ launch.weight("w2", PLAIN).T
    if n_pad_zeros:
        rows[:, -n_pad_zeros:] = 0
    return rows + launch.bias("bias2")


def ck_moe_stage2_fwd(launch: Launch, x: Tensor) -> Tensor:
    return x @ launch.weight("w2", launch.tiles).T
