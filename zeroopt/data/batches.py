"""`GlobalBatchSampler`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from ..collectives.lone import default_group
from ..errors import ConfigError, StateError
from .permutation import shuffled


class GlobalBatchSampler(Sampler[list[int]]):
    """The batch sampler of a DataLoader: this rank's part of the batches that all ranks train on together.

        sampler = GlobalBatchSampler(len(dataset), batch_size=256)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        while sampler.epoch < epochs:
            for batch in loader:  # what is left of the epoch
                ...
                optimizer.step()
                sampler.step()

    Its position is how many samples all ranks together have been trained on. That is counted by `step`, not by what is drawn: the
    workers of a DataLoader are ahead by some batches, which are drawn again when a run goes on. Any number of ranks goes on from
    a position, and with the same `batch_size` they train on the same batches, each rank on its part:

        global batch       │ sample 0   1   2   3   4   5   6   7 │
        1 rank             │ ───────────────── 0 ─────────────── │
        2 ranks            │ ────── 0 ─────── │ ────── 1 ─────── │
        2 ranks, 2 micro-  │ ── 0 ── │ ── 0 ── │ ── 1 ── │ ── 1 ── │
          batches each

    Every epoch has an order of its own, made of the seed and the number of the epoch (`permutation.py`).

    Not collective. All ranks have to be given the same, and call `step` as often.

    Args:
        num_samples: of the dataset.
        batch_size: samples a step of the optimizer, of all ranks and micro-batches together.
        micro_batches: backward passes of a rank a step; as many lists are drawn for it.
        shuffle: False: samples come in their order.
        seed: of the shuffled orders.
        drop_last: leave out samples at the end of an epoch that are too few for a batch; else they are filled up with the first
            ones of the epoch, as torch's DistributedSampler does.
        process_group: ranks that train on different samples: all ranks when None.

    Raises:
        ConfigError: `batch_size` cannot be divided by ranks and micro-batches, or there are too few samples.
        StateError: there are other processes, and no process group.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        micro_batches: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        group = default_group() if process_group is None else process_group
        self._rank, ranks = group.rank(), group.size()
        if min(num_samples, batch_size, micro_batches) < 1:
            raise ConfigError(
                f"num_samples, batch_size and micro_batches have to be at least 1; got {num_samples}, {batch_size} and {micro_batches}"
            )
        if batch_size % (ranks * micro_batches):
            raise ConfigError(
                f"batch_size is that of all ranks together: {batch_size} samples cannot be divided evenly by {ranks} ranks with "
                f"{micro_batches} micro-batches each"
            )
        if drop_last and batch_size > num_samples:
            raise ConfigError(
                f"a batch of {batch_size} samples is more than the dataset's {num_samples}: take a smaller batch_size, or drop_last=False"
            )
        self._num_samples, self._batch_size, self._micro_batches = num_samples, batch_size, micro_batches
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._micro_batch_size = batch_size // (ranks * micro_batches)
        self._position = 0
        self._drawn_from: int | None = None

    @property
    def position(self) -> int:
        """Samples that all ranks have been trained on, those that were left out at the ends of epochs included."""
        return self._position

    @property
    def epoch(self) -> int:
        """The number of the epoch that is drawn from next."""
        return self._position // self._num_samples

    def step(self) -> None:
        """Note that a global batch has been trained on: call it after the optimizer's step."""
        self._go_to(min(self._position + self._batch_size, self._epoch_end))

    def __len__(self) -> int:
        """How many lists of this rank the epoch still has."""
        left = self._epoch_end - self._position
        batches = left // self._batch_size if self._drop_last else -(-left // self._batch_size)
        return batches * self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Samples of one micro-batch of this rank after the other, from the position to the end of the epoch.

        Raises:
            StateError: a whole epoch was drawn, and `step` was not called once.
        """
        begin, epoch = self._position, self.epoch
        if self._drawn_from == begin:
            raise StateError(
                "an epoch was drawn to its end and sampler.step() was not called, so that it would be drawn again: call it after "
                "each optimizer.step()"
            )
        first = epoch * self._num_samples
        per_rank = self._micro_batch_size * self._micro_batches
        for batch in range(len(self) // self._micro_batches):
            start = begin - first + batch * self._batch_size + self._rank * per_rank
            for micro in range(self._micro_batches):
                places = start + micro * self._micro_batch_size + np.arange(self._micro_batch_size)
                places %= self._num_samples
                samples = shuffled(places, self._num_samples, (self._seed, epoch)) if self._shuffle else places
                yield samples.tolist()
        self._drawn_from = begin

    def state_dict(self) -> dict[str, Any]:
        """The position, and of what order it is one. The same on all ranks, and for any number of them."""
        return {"position": self._position, **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, which iterations that begin from now on do.

        Raises:
            StateError: it is one of another order of samples, or of another dataset.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise StateError(
                    f"the position was saved with {name}={state.get(name)}, and this sampler has {name}={value}: samples would come twice, "
                    "or never"
                )
        self._go_to(int(state["position"]))

    @property
    def _order(self) -> dict[str, Any]:
        return {"num_samples": self._num_samples, "shuffle": self._shuffle, "seed": self._seed}

    @property
    def _epoch_end(self) -> int:
        return (self.epoch + 1) * self._num_samples

    def _go_to(self, position: int) -> None:
        self._position = position
        self._drawn_from = None
        if self._drop_last and self._epoch_end - position < self._batch_size:
            self._position = self._epoch_end
