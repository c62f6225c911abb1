# SPDX-License-Identifier: MIT
"""``python -m shuffled_tensor doctor``"""

from __future__ import annotations

import argparse

from shuffled_tensor.report import doctor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shuffled_tensor")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="which backends this machine has, and what to install or change")
    parser.parse_args()
    print(doctor())


if __name__ == "__main__":
    main()
