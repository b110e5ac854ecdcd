"""The command line: ``python -m zeroopt env``, ``estimate``, ``simulate``, ``checkpoint inspect|export`` and ``elastic
list|remove``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .diagnosis.env import print_environment
from .errors import ConfigError, ZeroOptError
from .named_function import find_function


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

    _add_estimate(commands.add_parser("estimate", help="tell what training will hold, and when most"))
    _add_simulate(
        commands.add_parser("simulate", help="tell how long a training step will take, and for what it waits")
    )

    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints, and convert them")
    of_checkpoint = checkpoint.add_subparsers(metavar="command", required=True)
    inspect = of_checkpoint.add_parser("inspect", help="print what is in a checkpoint, and whether it is whole")
    inspect.add_argument("path", help="the checkpoint's directory")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    export = of_checkpoint.add_parser(
        "export", help="write one file: of model and optimizer for torch.load, or of the model as ONNX"
    )
    export.add_argument("path", help="the checkpoint's directory")
    export.add_argument(
        "--to", required=True, metavar="FILE", help="the file to write; must not exist yet; ONNX if it ends in .onnx"
    )
    export.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="for ONNX: returns a module, what it is called with, and if sizes of that may vary, dynamic_shapes",
    )
    export.set_defaults(run=_export)

    elastic = commands.add_parser("elastic", help="copies that runs keep in memory of this host")
    of_elastic = elastic.add_subparsers(metavar="command", required=True)
    listing = of_elastic.add_parser("list", help="print the jobs that have some, and how many bytes")
    listing.set_defaults(run=_list_copies)
    remove = of_elastic.add_parser("remove", help="remove those of jobs that have ended for good")
    remove.add_argument("jobs", nargs="+", metavar="JOB", help="as `list` names them")
    remove.set_defaults(run=_remove_copies)
    for command in (listing, remove):
        command.add_argument("--memory", default="/dev/shm", metavar="DIRECTORY", help="a file system in memory")
    return parser


def _add_estimate(estimate: argparse.ArgumentParser) -> None:
    estimate.description = (
        "Tell what each rank will hold of a model, phase by phase, and what every stage and tier of precision would hold. Nothing is "
        "computed, and no other rank is needed. The exit code is 1 where it does not fit into --memory."
    )
    _add_model(estimate)
    training = _add_training(estimate)
    training.add_argument("--world-size", type=int, required=True, metavar="RANKS")
    training.add_argument("--host-ranks", type=int, metavar="RANKS", help="on each host; up to 8 by default")
    training.add_argument("--groups", type=int, default=1, help="of so many ranks each that train alone and average")
    training.add_argument("--shard-ranks", type=int, metavar="RANKS", help="in a shard_group; without, there is none")
    training.add_argument(
        "--tokens", type=int, help="of a sequence, a rank and micro-batch; without, activations are not counted"
    )
    training.add_argument(
        "--built-by-wrap", action="store_true", help="the model is on the meta device when it is wrapped"
    )
    training.add_argument("--copies", action="store_true", help="kept in memory by zeroopt.elastic.Guard")
    wanted = estimate.add_argument_group("what to tell")
    wanted.add_argument("--memory", metavar="SIZE", help="of a rank, such as 80GB: what makes it fit?")
    wanted.add_argument(
        "--alone", action="store_true", help="these options alone, not all stages and tiers beside them"
    )
    wanted.add_argument("--json", action="store_true", help="print JSON")
    estimate.set_defaults(run=_estimate)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    simulate.description = (
        "Run the plan of a model through time on a machine that a file describes: the time of a step, its parts, and what waits for what. "
        "Nothing is computed, and no other rank is needed. --measure prints such a file for the machine at hand."
    )
    _add_model(simulate)
    training = _add_training(simulate)
    training.add_argument("--world-size", type=int, nargs="+", metavar="RANKS", help="one or several")
    training.add_argument("--tokens", type=int, help="of a sequence")
    training.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="of a rank and step")
    training.add_argument(
        "--methods", nargs="+", choices=("zeroopt", "DDP", "FSDP2"), default=["zeroopt"], metavar="METHOD"
    )
    training.add_argument(
        "--collectives", metavar="NAME", help="instead of the transport that would be taken: 'two levels'"
    )
    machine = simulate.add_argument_group("the machine")
    machine.add_argument("--machine", metavar="FILE", help="TOML or JSON, or h100: servers of 8, 400 Gb/s each")
    machine.add_argument("--host-ranks", type=int, metavar="RANKS", help="on each host, instead of what the file says")
    machine.add_argument("--measure", action="store_true", help="measure this one, and print what --machine takes")
    machine.add_argument("--network-bits", type=float, default=1e9, help="a second between hosts, for --measure")
    machine.add_argument("--network-delay-ms", type=float, default=0.1, help="between hosts, for --measure")
    simulate.add_argument("--json", action="store_true", help="print JSON")
    simulate.set_defaults(run=_simulate)


def _add_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    training = parser.add_argument_group("its training")
    training.add_argument("--optimizer", default="AdamW", metavar="CLASS", help="or MODULE:FUNCTION that makes one")
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    training.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of zeroopt.wrap, such as stage=1; several times",
    )
    return training


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model, of one's own or a transformer of some size")
    model.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="returns a module, or a module and what it is called with"
    )
    model.add_argument("--params", metavar="N", help="about so many parameters: 17e9, 1.5B")
    model.add_argument("--layers", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--vocabulary", type=int, default=50_304)
    model.add_argument("--checkpointing", action="store_true", help="activation checkpointing of each block")


def _simulate(arguments: argparse.Namespace) -> int:
    from .simulator.command import simulate  # imports what traces models, which takes long

    return simulate(arguments)


def _estimate(arguments: argparse.Namespace) -> int:
    from .planner.command import estimate  # imports what traces models, which takes long

    return estimate(arguments)


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
    if arguments.to.endswith(".onnx"):
        return _export_onnx(arguments)
    if arguments.model is not None:
        raise ConfigError(f"--model is for a file that ends in .onnx, and --to is {arguments.to}")
    from .checkpoint.exporting import export
    from .checkpoint.format.reading import open_checkpoint

    export(open_checkpoint(arguments.path), arguments.to)
    return 0


def _export_onnx(arguments: argparse.Namespace) -> int:
    from .checkpoint.exporting_onnx import export_onnx

    if arguments.model is None:
        raise ConfigError(
            "expected --model: an ONNX file holds what a model computes, and a checkpoint has values alone"
        )
    sys.path.insert(0, str(Path.cwd()))  # where --model is looked for, as scripts are
    export_onnx(arguments.path, arguments.to, find_function("--model", arguments.model))
    return 0


def _list_copies(arguments: argparse.Namespace) -> int:
    from .elastic.place import bytes_of, jobs

    for job in jobs(arguments.memory):
        print(f"{job}  {bytes_of(job, arguments.memory)} bytes")
    return 0


def _remove_copies(arguments: argparse.Namespace) -> int:
    from .elastic.place import directory_of, jobs, remove_job

    unknown = sorted({*arguments.jobs} - {*jobs(arguments.memory)})
    if unknown:
        raise ConfigError(f"no job of this user with the name {unknown[0]!r} has copies in {arguments.memory}")
    for job in arguments.jobs:
        remove_job(directory_of(job, arguments.memory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
