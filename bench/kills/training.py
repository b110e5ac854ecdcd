"""What the ranks do that are killed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from bench.kills.kinds import TOKENS, VOCABULARY, Kind, Training
from bench.kills.marks import Marks
from zeroopt.checkpoint import RandomState, async_save, resume, save
from zeroopt.data import GlobalBatchSampler
from zeroopt.elastic import Guard, guard
from zeroopt.elastic.place import MEMORY

BATCH = 8
SAVE_EVERY = 2


@dataclass(frozen=True)
class Task:
    """What to train.

    Attributes:
        folder: for checkpoints or copies, and the marks.
        steps: after which the run ends.
        kind: of the training.
        micro_batches: of a step, of all ranks together, where their number changes and the bits are to be the same; None: each rank has one.
        without_disk: copies in memory instead of checkpoints.
        hosts: how many hosts ranks are taken to be on, as far as there are so many ranks; for copies.
    """

    folder: Path
    steps: int
    kind: Kind
    micro_batches: int | None
    without_disk: bool
    hosts: int

    def hosts_of(self, ranks: int) -> list[list[int]]:
        """The ranks of each host."""
        hosts = min(self.hosts, ranks)
        return [[rank for rank in range(ranks) if rank * hosts // ranks == host] for host in range(hosts)]

    def memory_of(self, rank: int, ranks: int) -> Path:
        """What stands for the memory of a rank's host."""
        (host,) = (number for number, of_host in enumerate(self.hosts_of(ranks)) if rank in of_host)
        return Path(MEMORY, self.folder.name, f"host-{host}")

    def micro_batches_of(self, ranks: int) -> int | None:
        """Of each of so many ranks."""
        return None if self.micro_batches is None else self.micro_batches // ranks

    def make_training(self, shard_group: dist.ProcessGroup | None) -> Training:
        """Of this rank."""
        return Training(self.kind, self.steps, self.micro_batches_of(dist.get_world_size()), shard_group)


@dataclass(frozen=True)
class Digests:
    """params: of all that a rank has of the model, and of what all ranks together have of it. state: of the whole state of the optimizers, on
    the first rank; elsewhere empty."""

    params: str
    state: str


@dataclass(frozen=True)
class End:
    """How a rank has ended.

    Attributes:
        begun: at which step it went on.
        trained: what it has.
        kept: what it has of the copies of all ranks, in another model; None where there are none.
    """

    begun: int
    trained: Digests
    kept: Digests | None


def train(task: Task) -> End:
    """Go on from what there is, to the end of the run. Of one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = task.micro_batches_of(ranks) or 1
    marks = Marks(task.folder / "marks", ranks)
    shard_group = task.kind.shard_group()  # where torch itself waits for a rank that is killed, for minutes
    marks.note(rank, "wrap")
    training = task.make_training(shard_group)
    tokens = torch.randint(VOCABULARY, (96, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    sampler = GlobalBatchSampler(len(tokens), BATCH, micro_batches=mine)
    own = torch.Generator()  # else whoever begins to iterate draws from the one that dropout draws from
    loader: DataLoader[Tensor] = DataLoader(tokens, batch_sampler=sampler, generator=own)  # type: ignore[arg-type]
    torch.manual_seed(rank)
    extra = {**training.extra, "sampler": sampler}
    keeping = Copies(task, training, extra) if task.without_disk else Checkpoints(task, training, extra)
    marks.note(rank, "load")
    begun = step = keeping.begin()
    marks.note_step(rank, step)
    while step < task.steps:
        for number, batch in enumerate(loader):
            micro = number % mine
            is_last = micro == mine - 1
            if task.micro_batches is not None:  # dropout goes by the micro-batch, whoever has it
                torch.manual_seed(step * task.micro_batches + rank * mine + micro)
            with nullcontext() if is_last else training.model.no_sync():
                with marks.during(rank, "forward"):
                    loss = training.model(batch[:, :-1], batch[:, 1:]) / mine
                with marks.during(rank, "backward"):
                    training.backward(loss)
            if not is_last:
                continue
            with marks.during(rank, "first step" if step == begun else "step"):
                training.step()
            training.end_step()
            sampler.step()
            step += 1
            marks.note_step(rank, step)
            with marks.during(rank, "save"):
                keeping.keep(step)
            if step == task.steps:
                break
    kept = keeping.end()
    marks.note(rank, "ended")
    return End(begun, digests_of(training), kept)


class Checkpoints:
    """On a disk, every other one in the background."""

    def __init__(self, task: Task, training: Training, extra: dict[str, Any]) -> None:
        self._root, self._held, self._extra = task.folder / "checkpoints", (training.model, training.optimizers), extra
        self._options: dict[str, Any] = {
            "rank_extra": {"random": RandomState()},
            "trained_only": task.kind.is_adapted,
        }
        self._saving: Future[None] | None = None

    def begin(self) -> int:
        """From which step the run goes on."""
        return int(resume(self._root, *self._held, self._extra, **self._options).get("step", 0))

    def keep(self, step: int) -> None:
        """Of some steps, a checkpoint."""
        if step % SAVE_EVERY:
            return
        contents = (self._root / f"step-{step}", *self._held, {**self._extra, "step": step})
        if step % (2 * SAVE_EVERY):
            self._saving = async_save(*contents, **self._options, keep=2)
        else:
            save(*contents, **self._options, keep=2)

    def end(self) -> None:
        """Nothing is on its way."""
        if self._saving is not None:
            self._saving.result()


class Copies:
    """In memory, of each step."""

    def __init__(self, task: Task, training: Training, extra: dict[str, Any]) -> None:
        self._task, self._shard_group = task, training.shard_group
        self._guard = self._guarding(training, extra, rank_extra={"random": RandomState()})

    def _guarding(self, training: Training, extra: dict[str, Any], **options: Any) -> Guard:
        rank, ranks, task = dist.get_rank(), dist.get_world_size(), self._task
        options |= {"job": "job", "frozen": not task.kind.is_adapted, "memory": task.memory_of(rank, ranks)}
        options["memory"].mkdir(parents=True, exist_ok=True)
        with patch.object(guard, "ranks_by_host", lambda control: task.hosts_of(control.size)):
            return Guard(training.model, training.optimizers, extra, **options)

    def begin(self) -> int:
        """From which step the run goes on."""
        return int(self._guard.restore().get("step", 0))

    def keep(self, step: int) -> None:
        """A copy of each step."""
        self._guard.step(step)

    def end(self) -> Digests:
        """What another model would go on from; then the memory is given back."""
        self._guard.wait()
        dist.barrier()
        training = self._task.make_training(self._shard_group)
        other = self._guarding(training, training.extra)
        other.restore()
        self._guard.close()
        other.close()
        return digests_of(training)


@torch.no_grad()
def digests_of(training: Training) -> Digests:
    """Of parameters and state, whoever has what of it. Collective."""
    states = []
    for optimizer in training.optimizers:
        optimizer.consolidate_state_dict()
        states.append(optimizer.full_state_dict() if dist.get_rank() == 0 else {})
    params = [training.model.state_dict(), training.exact_parameters()]
    return Digests(digest_of(params), digest_of(states) if dist.get_rank() == 0 else "")


def digest_of(values: Any) -> str:
    """Of the bits of all tensors within whatever containers."""
    digest = hashlib.sha256()
    for tensor in all_tensors(values):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def all_tensors(value: Any) -> Iterator[Tensor]:
    """By their names, whatever order state was made in: that is another where it has been read."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from all_tensors(value[name])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from all_tensors(one)
