"""`python -m zeroopt estimate`: its arguments, and what they come to."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterable
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import optim
from ..errors import ConfigError
from ..named_function import find_function
from ..options.precision import CODE_BITS
from ..wrap import wrap
from .estimate import MemoryEstimate, estimate_memory
from .estimator import MakeOptimizer
from .tiers import Options
from .transformer import transformer_of

_OBJECTS = {
    *("model", "optimizer", "process_group", "norm_group", "average_group", "shard_group", "wire", "features", "init"),
    "device",
}
_OPTIONS = [name for name in inspect.signature(wrap).parameters if name not in _OBJECTS]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def estimate(arguments: argparse.Namespace) -> int:
    """Print what the arguments ask for; returns the exit code, 1 where it does not fit into the memory that was given.

    Raises:
        ConfigError: arguments that make no sense.
    """
    sys.path.insert(0, str(Path.cwd()))  # where --model is looked for, as scripts are
    model, sample = make_model(arguments)
    result = estimate_memory(
        model,
        make_optimizer(arguments.optimizer),
        world_size=arguments.world_size,
        host_ranks=arguments.host_ranks,
        device=arguments.device,
        tokens=arguments.tokens if sample is None else None,
        sample=sample,
        memory=None if arguments.memory is None else _size(arguments.memory),
        built_by_wrap=arguments.built_by_wrap,
        copies=arguments.copies,
        compare=not arguments.alone,
        groups=arguments.groups,
        shard_ranks=arguments.shard_ranks,
        **parse_options(arguments.option),
    )
    print(json.dumps(result.as_json(), indent=1) if arguments.json else result)
    return _code(result)


def _code(result: MemoryEstimate) -> int:
    return int(result.advice is not None and (result.advice.variant is None or bool(result.advice.changes)))


def make_model(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model, and what it is called with where its function says so."""
    if arguments.model is None:
        if arguments.params is None and (arguments.layers is None or arguments.width is None):
            raise ConfigError("expected --model, --params, or --layers and --width: there is no model to estimate")
        for name in ("layers", "width", "vocabulary"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ConfigError(f"expected --{name} to be positive, got {value}")
        parameters = 0.0 if arguments.params is None else _number(arguments.params)
        model = transformer_of(
            parameters,
            arguments.layers,
            arguments.width,
            arguments.vocabulary,
            checkpointed=arguments.checkpointing,
        )
        return model, None
    with torch.device("meta"):
        made = find_function("--model", arguments.model)()
    model, sample = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected {arguments.model} to return a torch.nn.Module, got {type(model).__name__}")
    return model, sample


def make_optimizer(name: str) -> MakeOptimizer:
    """What makes the optimizer of a model's parameters.

    Raises:
        ConfigError: there is nothing of that name; when it is called, it cannot make one.
    """
    found = find_optimizer(name, "--optimizer")

    def make(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            made: torch.optim.Optimizer = found(params)
        except Exception as error:  # whatever it asks of parameters or options
            raise ConfigError(
                f"--optimizer {name} makes none of all parameters alone ({type(error).__name__}: {error}): name a function that does, as "
                "module:function"
            ) from error
        return made

    return make


def find_optimizer(name: str, option: str) -> Any:
    """A class of torch.optim or zeroopt.optim, or a function as `module:function`."""
    if ":" in name:
        return find_function(option, name)
    for module in (torch.optim, optim):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            return found
    raise ConfigError(
        f"expected {option} to be a class of torch.optim or zeroopt.optim, or module:function, got {name!r}"
    )


def parse_options(given: list[str]) -> Options:
    """Options of `zeroopt.wrap` from texts such as "stage=1" and "state_dtype=int8"."""
    options: Options = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"expected an option as name=value, got {text!r}")
        if name not in _OPTIONS:
            raise ConfigError(
                f"expected an option of zeroopt.wrap that can be given as text ({', '.join(_OPTIONS)}), got {name!r}"
            )
        options[name] = _value(name, value)
    return options


def _value(name: str, text: str) -> Any:
    if name == "outer_optimizer":
        return find_optimizer(text, "outer_optimizer")
    if name == "outer_dtype" and text in CODE_BITS:
        return text
    if name.endswith("dtype"):
        if text.removeprefix("torch.") not in _DTYPES:
            raise ConfigError(f"expected {name} to be one of {', '.join(_DTYPES)}, got {text!r}")
        return _DTYPES[text.removeprefix("torch.")]
    try:
        return json.loads(text.lower() if text in ("True", "False") else "null" if text == "None" else text)
    except ValueError:
        return text


def _number(text: str) -> float:
    """Such as 17e9, 1.5B or 350M."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        number = float(text) if factor is None else float(text[:-1]) * factor
    except ValueError:
        number = nan
    if not 0 < number < inf:
        raise ConfigError(f"expected a number such as 17e9, 1.5B or 350M, got {text!r}")
    return number


def _size(text: str) -> float:
    """Bytes, such as 80GB, 24GiB or 8e10."""
    units = {"GIB": 2**30, "MIB": 2**20, "GB": 1e9, "MB": 1e6}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            return _number(text[: -len(unit)]) * factor
    return _number(text)
