"""Tiers of precision and other options that trade memory for something else, by name."""

from __future__ import annotations

from typing import Any

import torch

Options = dict[str, Any]

_BF16: Options = {"param_dtype": torch.bfloat16}

TIERS: dict[str, Options] = {
    "float32": {},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
    "8-bit moments": {"state_dtype": torch.int8},
    "bfloat16": _BF16,
    "bfloat16, 8-bit moments": {**_BF16, "state_dtype": torch.int8},
    "bfloat16, remainders": {**_BF16, "master_weights": "remainder"},
    "bfloat16, remainders, 8-bit moments": {**_BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    "bfloat16, no masters, 8-bit moments": {**_BF16, "master_weights": "none", "state_dtype": torch.int8},
}
"""From what changes results least to what takes least. float32 is the parameters as the model has them."""

TIER_OPTIONS = ("param_dtype", "master_weights", "state_dtype")
"""The options of `zeroopt.wrap` in which tiers differ."""


def tier_of(options: Options) -> str:
    """The name of the tier that options ask for; what has no name is described."""
    chosen = {name: options[name] for name in TIER_OPTIONS if name in options}
    plain = {"param_dtype": None, "master_weights": "float32", "state_dtype": torch.float32}
    chosen = {name: value for name, value in chosen.items() if value != plain[name]}
    for name, tier in TIERS.items():
        if tier == chosen:
            return name
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def describe(options: Options) -> str:
    """Options as they are written in a call, without "torch."."""
    return ", ".join(f"{name}={_written(value)}" for name, value in options.items())


def _written(value: Any) -> str:
    return str(value) if isinstance(value, torch.dtype) else repr(value)
