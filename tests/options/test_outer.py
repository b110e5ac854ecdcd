"""The options of outer steps: each by itself, and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import config_with
from torch import nn

from zeroopt import ConfigError
from zeroopt.options.outer import share_kept

OUTER: dict[str, Any] = {"average_every": 4, "outer_optimizer": torch.optim.SGD}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_fragments": 2}, "outer_fragments=2 needs an outer_optimizer"),
        ({"outer_delay": 1}, "outer_delay=1 needs an outer_optimizer"),
        ({"outer_mixing": 0.0}, "outer_mixing=0.0 needs an outer_optimizer"),
        ({"outer_dtype": torch.bfloat16}, "outer_dtype=torch.bfloat16 needs an outer_optimizer"),
        ({"outer_optimizer": torch.optim.SGD}, "outer_optimizer needs average_every"),
        ({**OUTER, "outer_optimizer": "SGD"}, "expected outer_optimizer to be a class or a function .*, got 'SGD'"),
        ({**OUTER, "outer_optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "a class or a function that"),
        ({**OUTER, "outer_fragments": 0}, "expected outer_fragments to be a positive number of fragments, got 0"),
        ({**OUTER, "outer_fragments": True}, "expected outer_fragments to be a positive number of fragments, got True"),
        ({**OUTER, "outer_delay": -1}, "expected outer_delay to be a number of steps, got -1"),
        ({**OUTER, "outer_delay": 4}, "expected outer_delay to be less than average_every=4, got 4"),
        ({**OUTER, "outer_mixing": 1.0}, r"expected outer_mixing to be a number in \[0, 1\) or None, got 1.0"),
        ({**OUTER, "outer_mixing": float("nan")}, r"expected outer_mixing to be a number in \[0, 1\) or None, got nan"),
        (
            {**OUTER, "outer_dtype": torch.int8},
            "expected outer_dtype to be one of None, .*, 'int8', 'int4', got torch.int8",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(**options)


def test_half_is_kept_with_a_delay() -> None:
    """As Douillard et al. 2025 have it, unless something else is asked for."""
    assert share_kept(config_with(**OUTER)) == 0.0
    assert share_kept(config_with(**OUTER, outer_delay=2)) == 0.5
    assert share_kept(config_with(**OUTER, outer_delay=2, outer_mixing=0)) == 0.0
    assert config_with(**OUTER, outer_mixing=0).describe() == config_with(**OUTER, outer_mixing=0.0).describe()
