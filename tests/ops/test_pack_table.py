"""What goes another way than a table's: nothing has been done then. What it packs, `tests/pretend_cuda/test_pack_table.py` looks at."""

from __future__ import annotations

import torch

from zeroopt import ops


def test_on_the_cpu_nothing_goes_by_a_table() -> None:
    full, source = torch.full((10,), 7.0), torch.ones(4)
    table = ops.PackTable([source.shape], [source.stride()], [2])
    assert not table.pack([source], full)
    assert bool((full == 7).all())
