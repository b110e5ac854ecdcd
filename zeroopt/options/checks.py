"""What several options are checked for."""

from __future__ import annotations

from ..errors import ConfigError


def check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ConfigError unless an option is one of these values, and of that one's type: 1 is not True."""
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        choices = ", ".join(repr(option) for option in allowed)
        raise ConfigError(f"expected {name} to be one of {choices}, got {value!r}")


def as_text(value: object) -> str:
    """An option as text that is the same on every rank: functions and objects that are called have no addresses in it."""
    if not callable(value):
        return repr(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def check_every_so_many_steps(name: str, value: object) -> None:
    """Raise ConfigError unless an option is a positive number of steps, or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"expected {name} to be a positive number of steps or None, got {value!r}")
