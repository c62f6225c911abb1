# SPDX-License-Identifier: MIT
"""Checkpoints: loading every format, saving what can be trusted. Needs the extra ``checkpoint``."""

from shuffled_tensor.checkpoint.conversion import convert
from shuffled_tensor.checkpoint.inspection import Finding, inspect
from shuffled_tensor.checkpoint.load import Experts, load_experts, load_file
from shuffled_tensor.checkpoint.save import save_file
from shuffled_tensor.checkpoint.source import CheckpointError

__all__ = ["CheckpointError", "Experts", "Finding", "convert", "inspect", "load_experts", "load_file", "save_file"]
