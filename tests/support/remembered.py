"""What zeroopt finds out of an optimizer by trying it, found once in a process: for tests that wrap the same ones many times.

Trying takes a tenth of a second. `tests/probing/` is about what is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

from zeroopt.admission import candidates
from zeroopt.plan.params import Grain
from zeroopt.probing.grains import find_grains

_known: dict[object, list[Grain]] = {}


@contextmanager
def remembered_grains(*case: object) -> Iterator[None]:
    """Within it, wrap by what was found for the same case before.

    Args:
        case: values that say all of the model's parameters, and of the optimizer.
    """

    def find(
        optimizer: torch.optim.Optimizer, groups: Sequence[int] | None = None, home: torch.device | None = None
    ) -> list[Grain]:
        key = (type(optimizer), *case, None if groups is None else tuple(groups), home)
        if key not in _known:
            _known[key] = find_grains(optimizer, groups, home)
        return _known[key]

    with patch.object(candidates, "find_grains", find):
        yield
