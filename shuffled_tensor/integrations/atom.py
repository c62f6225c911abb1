# SPDX-License-Identifier: MIT
"""ATOM: its MXFP4 expert layers keep their bytes in weights of this package.

ATOM has no plugins, so its classes take these mixins, first among their bases::

    class Mxfp4MoEMethod(OwnedExperts, FusedMoEMethodBase): ...
    class ModelRunner(OwnedMemory, MemoryManagerMixin, ...): ...

The engine makes the parameters, loads them, lays them out and calls the kernel as before. What is added is an owner of
the bytes, ``layer.mxfp4_experts``: loading again writes into the layout that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from shuffled_tensor.integrations.experts import Experts, lay_out, turned_off

__all__ = ["OwnedExperts", "OwnedMemory"]

_log = logging.getLogger("shuffled_tensor")


class OwnedExperts:
    """Of a method: owns the bytes of its layers."""

    def process_weights_after_loading(self, layer: Any) -> None:
        process = partial(super().process_weights_after_loading, layer)  # type: ignore[misc]
        if turned_off():
            process()
            return
        why = lay_out(layer, process)
        if why:
            _log.info("shuffled_tensor leaves experts to ATOM: %s", why)
        else:
            _log.debug("shuffled_tensor owns experts: %s", layer.mxfp4_experts.summary)


class OwnedMemory:
    """Of a model's runner: weights give up their memory when the engine sleeps, and take what it allocates when it
    wakes. They are unusable until they are loaded again."""

    model: nn.Module

    def _release_weights(self) -> None:
        for _, experts in _owned(self.model):
            experts.give_up()
        super()._release_weights()  # type: ignore[misc]

    def _resume_weights(self) -> None:
        super()._resume_weights()  # type: ignore[misc]
        for layer, experts in _owned(self.model):
            experts.take(layer)


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, Experts]]:
    for layer in model.modules():
        experts = getattr(layer, "mxfp4_experts", None)
        if experts is not None:
            yield layer, experts
