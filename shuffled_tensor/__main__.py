# SPDX-License-Identifier: MIT
"""``python -m shuffled_tensor``."""

import sys

from shuffled_tensor.cli import main

if __name__ == "__main__":
    sys.exit(main())
