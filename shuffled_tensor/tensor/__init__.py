# SPDX-License-Identifier: MIT
"""The tensor: a logical value, the packed bytes that hold it, and what torch may do with it."""
