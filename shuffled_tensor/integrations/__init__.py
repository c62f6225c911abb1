# SPDX-License-Identifier: MIT
"""Serving engines: one file each, that only its engine imports."""
