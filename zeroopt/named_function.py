"""What `module:function` names on a command line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import ConfigError


def find_function(option: str, name: str) -> Any:
    """What a module has under a name, mostly a function.

    Args:
        option: that was given so, for messages.
        name: `module:function`; the module is imported.

    Raises:
        ConfigError: it is not of that form, or there is no such thing.
    """
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ConfigError(f"expected {option} to be module:function, got {name!r}")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {name}: {error}") from error
