# SPDX-License-Identifier: MIT
"""What becomes of a checkpoint's tensors while transformers loads them: its own conversions, with weights of this
package at their end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from shuffled_tensor.integrations.transformers.experts import PROJECTIONS, order_of
from shuffled_tensor.layouts import ROW_MAJOR, layout_or_none
from shuffled_tensor.mxfp4 import quantize
from shuffled_tensor.tensor.checks import check_high_precision, check_parts
from shuffled_tensor.tensor.geometry import ALIGN, Geometry, interleave_rows, part_rows
from shuffled_tensor.tensor.storage import PackedStorage
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor

if TYPE_CHECKING:
    from shuffled_tensor.integrations.transformers.loading import Mxfp4Quantizer

__all__ = ["SUFFIXES", "Pack", "PartBias", "Quantize", "stacks_experts"]

_CODES = (".weight", ".weight_packed")
_SCALES = (".weight_scale", ".scale")
SUFFIXES = (*_CODES, *_SCALES)
"""Of a projection's tensors in a checkpoint: plain values, Quark's, compressed-tensors' and DeepSeek's."""


class _Op(ConversionOps):  # type: ignore[misc]
    def __deepcopy__(self, memo: dict[int, Any]) -> _Op:
        return self  # the loader copies converters, and these share what the quantizer knows


class Pack(_Op):
    """An expert weight of a checkpoint, plain or packed, stacked or one tensor an expert, becomes one of ours."""

    def __init__(self, hf_quantizer: Mxfp4Quantizer, sources: list[str] | None = None) -> None:
        self.hf_quantizer = hf_quantizer  # called so, and the loader leaves bytes in the file's dtype
        self.sources = sources
        """Names of the tensors of each expert, one a half; None where a file has the experts stacked."""

    def convert(
        self, input_dict: dict[str, list[Tensor]], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        experts, projection = get_module_from_name(model, full_layer_name)
        like, order = getattr(experts, projection), order_of(experts, projection)
        shape = like.shape[:1] + like.shape[:0:-1] if experts.is_transposed else like.shape
        if self.sources is None:
            self.hf_quantizer.found.add(full_layer_name)
            blocks, scales = (input_dict[f"{projection}_{part}"][0] for part in ("blocks", "scales"))
            options = {"shuffle_kind": self.hf_quantizer.quantization_config.shuffle_kind, "dtype": like.dtype}
            made: Tensor = ShuffledMXFP4Tensor(
                blocks.flatten(-2) if blocks.dim() == 4 else blocks, scales, **order, **options
            )
        else:
            made = self._stack(input_dict, self.sources, full_layer_name, shape, like.dtype, order["gate_up"])
        if made.shape != shape:
            raise ValueError(f"{full_layer_name} must be {list(shape)}, found {list(made.shape)}")
        return {full_layer_name: made}

    def _stack(
        self,
        found: dict[str, list[Any]],
        sources: list[str],
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        gate_up: bool,
    ) -> Tensor:
        """Expert by expert, each from its own tensors into its place.

        Raises:
            ValueError, TypeError: what is there is not MXFP4, or not of all experts.
        """

        def of(source: str, suffixes: tuple[str, ...]) -> list[Any] | None:
            return next((found.pop(source + suffix) for suffix in suffixes if source + suffix in found), None)

        halves = [(of(source, _CODES), of(source, _SCALES)) for source in sources]
        for source, (codes, scales) in zip(sources, halves, strict=True):
            if codes is None or len(codes) != shape[0]:
                raise ValueError(f"{name} needs {shape[0]} experts' {source}, found {len(codes or [])}")
            if scales is None:
                check_high_precision(codes[0])
            elif len(scales) != shape[0]:
                raise ValueError(f"{name} needs {shape[0]} experts' scales of {source}, found {len(scales)}")
        self.hf_quantizer.found.add(name)
        plain = all(scales is None for _, scales in halves)
        if plain and (self.hf_quantizer.pre_quantized or name.rpartition(".")[0] not in self.hf_quantizer.experts):
            # a layer that the checkpoint has not packed, or that is to stay
            return torch.cat([torch.stack(codes) for codes, _ in halves if codes is not None], dim=1).to(dtype)
        config, experts = self.hf_quantizer.quantization_config, shape[0]
        weight = _empty(shape, gate_up, dtype, halves[0][0][0].device)  # type: ignore[index]
        views, rows = weight.views(), shape[1] // len(halves)
        for half, (codes, scales) in enumerate(halves):
            for expert in range(experts):
                value = codes[expert]  # type: ignore[index]
                if scales is None:
                    pair = quantize(value, scale_rule=config.scale_rule)
                else:
                    pair = value, scales[expert]
                    check_parts(*pair)
                for view, data in zip(views, pair, strict=True):
                    view[expert].narrow(0, half * rows, rows).copy_(data.view(torch.uint8))
                codes[expert] = None  # type: ignore[index]  # one at a time exists twice
        weight._storage.requested_layout = layout_or_none(config.shuffle_kind)
        return weight


def _empty(shape: torch.Size, gate_up: bool, dtype: torch.dtype, device: torch.device) -> ShuffledMXFP4Tensor:
    storage = PackedStorage.empty(shape[0], Geometry(shape[1], shape[2], gate_up, ALIGN), device, ROW_MAJOR)
    return ShuffledMXFP4Tensor._wrap(storage, storage.whole(), 3, dtype)


class Quantize(_Op):
    """A plain expert weight that is stacked already becomes one of ours."""

    def __init__(self, hf_quantizer: Mxfp4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        if isinstance(value, ShuffledMXFP4Tensor):
            return {name: value}
        self.hf_quantizer.found.add(full_layer_name)
        experts, projection = get_module_from_name(model, full_layer_name)
        value = value.transpose(-1, -2) if experts.is_transposed else value
        options = self.hf_quantizer.quantization_config.options
        return {name: ShuffledMXFP4Tensor.from_hp(value, **order_of(experts, projection), **options)}


class PartBias(_Op):
    """The bias of a packed layer that interleaves gate and up gets all of gate's, then all of up's."""

    def __init__(self, quantizer: Mxfp4Quantizer, inverse: bool = False) -> None:
        self.owner, self.inverse = quantizer, inverse

    @property
    def reverse_op(self) -> PartBias:
        return PartBias(self.owner, not self.inverse)

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Tensor]:
        ((name, bias),) = input_dict.items()
        bias = bias[0] if isinstance(bias, list) else bias
        experts = self.owner.experts.get(full_layer_name.rpartition(".")[0])
        if experts is not None and not experts.is_concatenated:
            bias = interleave_rows(bias) if self.inverse else part_rows(bias)
        return {name: bias}


def stacks_experts(converter: WeightConverter) -> bool:
    """Whether one tensor an expert, or one for each half, becomes the weight of all, and nothing else happens to it."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return (
        bool(re.search(rf"experts\.({'|'.join(PROJECTIONS)})$", converter.target_patterns[0]))
        and operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        and all(name.endswith(".weight") for name in converter._original_source_patterns)
    )
