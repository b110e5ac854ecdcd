"""The command line: ``python -m zeroopt env`` and ``python -m zeroopt checkpoint inspect|export``."""

from __future__ import annotations

import argparse
import json
import sys

from .diagnosis.env import print_environment
from .errors import ZeroOptError


def main() -> int:
    """Run the command of the arguments; returns the exit code."""
    arguments = _parser().parse_args()
    try:
        code: int = arguments.run(arguments)
    except ZeroOptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zeroopt")
    commands = parser.add_subparsers(metavar="command", required=True)
    env = commands.add_parser("env", help="print versions, the build of the kernels and the machine")
    env.set_defaults(run=_env)

    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints, and convert them")
    of_checkpoint = checkpoint.add_subparsers(metavar="command", required=True)
    inspect = of_checkpoint.add_parser("inspect", help="print what is in a checkpoint, and whether it is whole")
    inspect.add_argument("path", help="the checkpoint's directory")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    export = of_checkpoint.add_parser("export", help="write one file for torch.load, of model and optimizer")
    export.add_argument("path", help="the checkpoint's directory")
    export.add_argument("--to", required=True, metavar="FILE", help="the file to write; must not exist yet")
    export.set_defaults(run=_export)
    return parser


def _env(arguments: argparse.Namespace) -> int:
    print_environment()
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoint.inspection import inspect  # imports torch.distributed.checkpoint, which takes seconds

    report = inspect(arguments.path)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print(*report.lines(), sep="\n")
    return 1 if report.problems else 0


def _export(arguments: argparse.Namespace) -> int:
    from .checkpoint.exporting import export
    from .checkpoint.format.reading import open_checkpoint

    export(open_checkpoint(arguments.path), arguments.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
