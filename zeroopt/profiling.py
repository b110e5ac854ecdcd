"""Ranges for torch's profiler: which phase of zeroopt works on which bucket, as `zeroopt::phase bucket 3 (first … last)`.

In the order in which a bucket goes through them:

    pack                gradients that had to wait for a buffer, or that an earlier backward has left, go into the bucket
    reduce_scatter      the bucket starts to travel
    sum                 this rank sums its slice (transports that do so themselves)
    wait_for_reduce     until the sum is there; in it the sum, where nobody has had time for it before
    wait_until_read     until no other rank reads the full buffer any more, which another bucket needs
    step                the optimizer's step on this rank's slice
    all_gather          the updated slice starts to travel
    wait_for_gather     until all slices are there: in the forward, where gathers are lazy

and once a backward or step, `agree_on_used` (which parameters had a gradient on any rank), `wait_for_used`, `clip`,
`check` (with `check_every`), and `replan` when the first backward begins and before the first step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C._autograd import _profiler_enabled

_NO_RANGE: AbstractContextManager[object] = nullcontext()


def named_range(phase: str, name: str = "") -> AbstractContextManager[object]:
    """A context that shows as `zeroopt::phase name` in the traces of a profiler.

    Where none runs in this thread it costs a third of a microsecond. What is asked holds for `torch.profiler` as well as for
    `emit_nvtx` and `emit_itt`, and in the threads of a backward, which inherit it from the one that called it.

    Args:
        phase: one of those above.
        name: the bucket's, as messages call it.
    """
    if not _profiler_enabled():
        return _NO_RANGE
    return torch.autograd.profiler.record_function(f"zeroopt::{phase} {name}" if name else f"zeroopt::{phase}")


def range_of_torch(name: str) -> AbstractContextManager[object]:
    """Likewise under a name that torch gives, for what is done in its place."""
    return torch.autograd.profiler.record_function(name) if _profiler_enabled() else _NO_RANGE
