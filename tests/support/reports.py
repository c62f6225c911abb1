# SPDX-License-Identifier: MIT
"""Reports of `explain` and `doctor`, as they are on every machine."""

from __future__ import annotations

import re


def unversioned(report: str) -> str:
    """Without the versions of what is installed here; a fake aiter's are kept."""
    report = re.sub(r"(?m)^(safetensors|transformers)  .*\n", "", report)  # which a machine may lack
    return re.sub(r"(?m)^(torch|triton)  .*", lambda line: f"{line[1]:14}<version>", report)
