# SPDX-License-Identifier: MIT
"""Engines' own Python, out of their wheels: see `make test-engines`."""
