"""All methods by name, in the order of the rows; a new one is a function `prepare` and an entry here."""

from collections.abc import Sequence

from bench.compare.methods import deepspeed, fairscale, fsdp, replicated, zero, zero_redundancy
from bench.compare.methods.method import Method, Training
from bench.compare.methods.replicated import ALONE, DDP

_MODULES = (replicated, zero, zero_redundancy, fsdp, deepspeed, fairscale)
METHODS: dict[str, Method] = {method.name: method for module in _MODULES for method in module.METHODS}

__all__ = ["ALONE", "DDP", "METHODS", "Method", "Training", "chosen_methods"]


def chosen_methods(parts: Sequence[str]) -> list[str]:
    """Those that are named, or whose name contains what is no name of another."""
    return [name for name in METHODS if any(is_meant(part, name) for part in parts)]


def is_meant(part: str, name: str) -> bool:
    return part == name if part in METHODS else part.lower() in name.lower()
