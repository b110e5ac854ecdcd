"""All methods by name, in the order of the rows; a new one is a function `prepare` and an entry here."""

from bench.compare.methods import deepspeed, fairscale, fsdp, replicated, zero, zero_redundancy
from bench.compare.methods.method import Method, Training
from bench.compare.methods.replicated import ALONE, DDP

_MODULES = (replicated, zero, zero_redundancy, fsdp, deepspeed, fairscale)
METHODS: dict[str, Method] = {method.name: method for module in _MODULES for method in module.METHODS}

__all__ = ["ALONE", "DDP", "METHODS", "Method", "Training"]
