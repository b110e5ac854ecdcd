"""Ranks, or groups of ranks, that train alone and average their parameters every k steps.

Local SGD (Stich, 2019, arXiv:1805.09767; post-local: Lin et al., 2020, arXiv:1808.07217) with any optimizer. Whoever trains
alone is one rank, or one `process_group` within which ZeRO is synchronous as ever:

                    process_group   process_group
                      ┌───────┐       ┌───────┐
    average_group     │   0   │ ───── │   2   │        the owners of one slice of every bucket
    average_group     │   1   │ ───── │   3   │        those of the other one
                      └───────┘       └───────┘

Each rank averages what it has just stepped, with the ranks that step the same in the other groups, before the gather within
its group starts, which then spreads the mean. So buckets have to be cut alike in all groups: they are not planned anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ..collectives import ControlGroup
from ..collectives.lone import is_lone
from ..errors import CollectiveError, ConfigError, NotSupportedError, RankMismatchError
from ..feature import Feature, Step
from ..options.config import Config
from ..plan.agreement import agree
from ..plan.dtensors import local_of
from ..storage.bucket import Bucket
from ..streams import is_capturing
from ..trained import Trained


class ParameterAverage:
    """The mean of the parameters over the ranks of a group, every `every` steps.

    Attributes:
        control: of the ranks over which parameters are averaged.
        alone: each rank of it trains alone; else each of them is in a group of its own within which ZeRO is synchronous.
        steps: that have been taken since the last averaging.
    """

    def __init__(self, group: dist.ProcessGroup, every: int, *, alone: bool) -> None:
        self.control = ControlGroup(group)
        self.alone = alone
        self.steps = 0
        self._every = every

    def vary_seed(self, seed: int) -> int:
        """A seed for each rank of the group, so that stochastic rounding errors average out as well."""
        return (seed + self.control.rank) % 2**63

    def sync_states(self, model: nn.Module, within: dist.ProcessGroup) -> None:
        """Overwrite parameters and buffers with those of the first rank. Collective over the average group; where that is not
        all, those who are first in their own group pass them on to that group later.

        Args:
            within: the group within which ZeRO is synchronous.
        """
        if self.alone or within.rank() == 0:
            what = "taking over the parameters and buffers of the first rank of the average group"
            for param in model.parameters():  # one by one: no second copy of the model
                self.control.broadcast([local_of(param.data)], 0, what)
            self.control.broadcast(list(map(local_of, model.buffers())), 0, what)

    def is_due(self) -> bool:
        """Count a step, and say whether parameters are averaged in it."""
        self.check_counts()
        self.steps = (self.steps + 1) % self._every
        return self.steps == 0

    def check_counts(self) -> None:
        """Raise NotSupportedError where a CUDA graph is being captured, whose replays would not be counted."""
        if is_capturing(self.control.device):
            raise NotSupportedError(
                "average_every counts steps, and those of a CUDA graph that is replayed tell nobody of themselves: leave step() out "
                "of the graph"
            )

    def average(self, buckets: Iterable[Bucket], order: Sequence[Sequence[int]]) -> Iterator[Bucket]:
        """Yield each bucket when its own range is the mean over the group. Collective over the group.

        A bucket travels while the next one is stepped.

        Args:
            buckets: yields buckets whose own range has been stepped.
            order: of the parameters in each plan, which all ranks of the group must have alike.

        Raises:
            CollectiveError: buckets are not alike on all ranks, or a rank did not do its part.
        """
        self._check_order(order)
        travelling: _BucketMean | None = None
        for bucket in buckets:
            started = _BucketMean(bucket, self.control)
            if travelling is not None:
                yield travelling.finish()
            travelling = started
        if travelling is not None:
            yield travelling.finish()

    def _check_order(self, order: Sequence[Sequence[int]]) -> None:
        """Groups cut buckets alike when they are made. State that is loaded may bring another plan."""
        digest = int.from_bytes(hashlib.sha256(repr(order).encode()).digest()[:6], "big")
        values = torch.tensor([digest, -digest], dtype=torch.int64, device=self.control.device)
        largest, smallest_negated = self.control.largest(values, "averaging of parameters").tolist()
        if largest != -smallest_negated:
            raise CollectiveError(
                "parameters cannot be averaged: ranks of the average group have buckets in different orders, for they have "
                "loaded states that were saved with different ones. Load states of one run on all ranks"
            )


class Averaging(Feature):
    """Averages parameters in every k-th step of one optimizer."""

    def __init__(self, trained: Trained, average: ParameterAverage) -> None:
        self._trained = trained
        self._average = average

    def on_gradients(self, step: Step) -> None:
        """Count the step, one that is skipped too. Where parameters are averaged, all of them may change."""
        step.changes_all = self._average.is_due()

    def stepped(self, step: Step, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """A bucket is gathered when its own range is the mean."""
        return self._average.average(buckets, self._trained.generations) if step.changes_all else buckets


class _BucketMean:
    """The own range of one bucket on its way; starts when made."""

    def __init__(self, bucket: Bucket, control: ControlGroup) -> None:
        self._bucket = bucket
        self._size = control.size
        exact = bucket.master.exact()
        dtype = torch.float32 if exact.dtype.itemsize == 2 else exact.dtype
        self._values = exact.to(bucket.device, dtype)  # mostly what is stored itself, and no copy
        self._pending = control.start_total(self._values, f"averaging of {bucket.name}")

    def finish(self) -> Bucket:
        self._pending.finish()
        self._bucket.master.write(0, self._values.numel(), self._values.div_(self._size))
        return self._bucket


def average_over(group: dist.ProcessGroup, config: Config) -> ParameterAverage | None:
    """What the options ask for of ranks that train with a process group. Not collective.

    Raises:
        ConfigError: the options or the groups do not fit together.
    """
    average_every, average_group = config.average_every, config.average_group
    if average_every is None:
        return None
    if average_group is None:
        if config.share_parameters:
            raise ConfigError(
                "share_parameters=True with average_every needs an average_group: without one, every rank trains parameters "
                "of its own"
            )
        if is_lone(group) and config.outer_optimizer is None:
            return None
        if config.check_every is not None:
            raise ConfigError("check_every compares parameters between ranks, which average_every lets train alone")
        return ParameterAverage(group, average_every, alone=True)
    if not isinstance(average_group, dist.ProcessGroup):
        raise ConfigError(
            f"expected average_group to be a torch.distributed.ProcessGroup that this rank is in, got {average_group!r}"
        )
    common = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(average_group))
    if common != {dist.get_rank()}:
        raise ConfigError(
            f"expected average_group to have one rank of each process_group; this rank, {dist.get_rank()}, has both groups in "
            f"common with ranks {sorted(common - {dist.get_rank()})}"
        )
    return ParameterAverage(average_group, average_every, alone=False)


def describe_place(average: ParameterAverage | None) -> list[str]:
    """What all ranks of a process group must have in common, beyond what they wrap."""
    if average is None or average.alone:
        return []
    return [f"process_group number {average.control.rank} of the {average.control.size} in average_group"]


@contextmanager
def agreed_across(
    average_group: dist.ProcessGroup | None, group: dist.ProcessGroup, lines: Sequence[str]
) -> Iterator[None]:
    """What ranks of one process group agree on within the context, those of the other ones hear of, and agree on as well.

    Collective over both groups.

    Args:
        lines: the description of what this rank is about to wrap.

    Raises:
        Exception: what was raised within the context.
        RankMismatchError: something was raised on another rank, the groups differ, or the average groups do not connect the
            same process groups for each position.
    """
    if not isinstance(average_group, dist.ProcessGroup):
        yield
        return
    across, within = ControlGroup(average_group), ControlGroup(group)
    place = [*lines, f"rank {within.rank} of {within.size} in process_group"]
    try:
        yield
    except Exception as error:  # which all ranks of this process group have
        agree([(across, place)], error)
        raise
    problem: Exception | None = None
    partners: list[str] = []
    try:
        agree([(across, place)], None)
        partners = [f"average_group connects the process_groups that begin with ranks {_first_ranks(across, group)}"]
    except RankMismatchError as error:
        problem = RankMismatchError(f"across average_group: {error}")
    agree([(within, partners)], problem)


def _first_ranks(across: ControlGroup, group: dist.ProcessGroup) -> list[int]:
    """By which process groups' first ranks, in the job, the members of the average group are known. Collective over it."""
    return [rank for (rank,) in across.numbers([dist.get_global_rank(group, 0)], "comparing average groups")]
