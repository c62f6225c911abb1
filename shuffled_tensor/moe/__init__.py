# SPDX-License-Identifier: MIT
"""A layer of experts: its call, its operators, and what a call would do."""
