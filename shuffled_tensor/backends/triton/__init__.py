# SPDX-License-Identifier: MIT
"""Kernels in Triton."""
