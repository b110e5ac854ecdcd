"""The command line: ``python -m zeroopt env``."""

from __future__ import annotations

import argparse

from .env import print_environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zeroopt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, the build of the kernels and the machine")
    parser.parse_args()
    print_environment()


if __name__ == "__main__":
    main()
