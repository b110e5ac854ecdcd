"""`python -m zeroopt simulate`: its arguments, and what they come to."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigError
from ..planner.command import make_model, make_optimizer, parse_options
from .machine import Machine, read_machine
from .measure import measure
from .simulate import Simulated, Simulator


def simulate(arguments: argparse.Namespace) -> int:
    """Print what the arguments ask for; returns the exit code.

    Raises:
        ConfigError: arguments that make no sense.
    """
    if arguments.measure:
        print(_measure(arguments).as_toml(), end="")
        return 0
    sys.path.insert(0, str(Path.cwd()))  # where --model is looked for, as scripts are
    results = _run(arguments)
    if arguments.json:
        print(json.dumps([result.as_json() for result in results], indent=1))
    else:
        print(*results, sep="\n")
    return 0


def _measure(arguments: argparse.Namespace) -> Machine:
    return measure(arguments.host_ranks or 1, arguments.network_bits / 8, arguments.network_delay_ms / 1e3)


def _run(arguments: argparse.Namespace) -> list[Simulated]:
    if arguments.machine is None or not arguments.world_size:
        raise ConfigError("expected --machine and --world-size, or --measure")
    machine = read_machine(arguments.machine)
    if arguments.host_ranks is not None:
        machine = machine.with_host_ranks(arguments.host_ranks)
    model, sample = make_model(arguments)
    if sample is None and arguments.tokens is None:
        raise ConfigError("expected --tokens: what a rank computes depends on it")
    simulator = Simulator(
        model,
        make_optimizer(arguments.optimizer),
        tokens=arguments.tokens if sample is None else None,
        sample=sample,
        batch=arguments.batch,
        device=arguments.device,
    )
    options = parse_options(arguments.option)
    return [
        simulator.run(machine, world_size, method=method, collectives=arguments.collectives, **options)
        for world_size in arguments.world_size
        for method in arguments.methods
    ]
