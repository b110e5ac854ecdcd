"""What the ranks do that are killed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

import zeroopt
from bench.kills.marks import Marks
from bench.model import make_model
from zeroopt.checkpoint import RandomState, async_save, resume, save
from zeroopt.data import GlobalBatchSampler
from zeroopt.elastic import Guard

TOKENS, VOCABULARY, BATCH = 16, 64, 8
SAVE_EVERY = 2


@dataclass(frozen=True)
class Task:
    """What to train.

    Attributes:
        folder: for checkpoints or copies, and the marks.
        steps: after which the run ends.
        micro_batches: of a step, of all ranks together, where their number changes and the bits are to be the same; None: each rank has one.
        without_disk: copies in memory instead of checkpoints.
        job: its name, for copies.
    """

    folder: Path
    steps: int
    options: dict[str, Any]
    micro_batches: int | None
    without_disk: bool
    job: str


@dataclass(frozen=True)
class Digests:
    """params: of all that a rank has of the model. state: of the whole state of the optimizer, on the first rank; elsewhere empty."""

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


def make_training(options: dict[str, Any]) -> tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    """The model and its optimizer, wrapped; the same each time."""
    torch.manual_seed(0)
    net = make_model(VOCABULARY, TOKENS, layers=2, width=64)
    noisy = nn.Sequential(net.token_embedding, nn.Dropout(0.1))  # so that random states matter
    net.register_module("token_embedding", noisy)
    return zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-2), **options)


def train(task: Task) -> End:
    """Go on from what there is, to the end of the run. Of one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = 1 if task.micro_batches is None else task.micro_batches // ranks
    options = task.options | ({} if task.micro_batches is None else {"micro_batches": mine})
    marks = Marks(task.folder / "marks", ranks)
    marks.note(rank, "wrap")
    model, optimizer = make_training(options)
    scheduler = LinearLR(optimizer, total_iters=task.steps)
    tokens = torch.randint(VOCABULARY, (96, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    sampler = GlobalBatchSampler(len(tokens), BATCH, micro_batches=mine)
    own = torch.Generator()  # else whoever begins to iterate draws from the one that dropout draws from
    loader: DataLoader[Tensor] = DataLoader(tokens, batch_sampler=sampler, generator=own)  # type: ignore[arg-type]
    torch.manual_seed(rank)
    parts = {"scheduler": scheduler, "sampler": sampler}
    keeping = Copies(task, model, optimizer, parts) if task.without_disk else Checkpoints(task, model, optimizer, parts)
    marks.note(rank, "load")
    begun = step = keeping.begin()
    marks.note_step(rank, step)
    while step < task.steps:
        for number, batch in enumerate(loader):
            micro = number % mine
            is_last = micro == mine - 1
            if task.micro_batches is not None:  # dropout goes by the micro-batch, whoever has it
                torch.manual_seed(step * task.micro_batches + rank * mine + micro)
            with nullcontext() if is_last else model.no_sync():
                with marks.during(rank, "forward"):
                    loss = model(batch[:, :-1], batch[:, 1:]) / mine
                with marks.during(rank, "backward"):
                    loss.backward()
            if not is_last:
                continue
            with marks.during(rank, "first step" if step == begun else "step"):
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            sampler.step()
            step += 1
            marks.note_step(rank, step)
            with marks.during(rank, "save"):
                keeping.keep(step)
            if step == task.steps:
                break
    kept = keeping.end(options)
    marks.note(rank, "ended")
    return End(begun, digests_of(model, optimizer), kept)


class Checkpoints:
    """On a disk, every other one in the background."""

    def __init__(self, task: Task, model: Any, optimizer: Any, parts: dict[str, Any]) -> None:
        self._task, self._held, self._parts = task, (model, optimizer), parts
        self._random = {"random": RandomState()}
        self._saving: Future[None] | None = None

    def begin(self) -> int:
        """From which step the run goes on."""
        found = resume(self._task.folder / "checkpoints", *self._held, self._parts, rank_extra=self._random)
        return int(found.get("step", 0))

    def keep(self, step: int) -> None:
        """Of some steps, a checkpoint."""
        if step % SAVE_EVERY:
            return
        path = self._task.folder / "checkpoints" / f"step-{step}"
        contents = (path, *self._held, {**self._parts, "step": step})
        if step % (2 * SAVE_EVERY):
            self._saving = async_save(*contents, rank_extra=self._random, keep=2)
        else:
            save(*contents, rank_extra=self._random, keep=2)

    def end(self, options: dict[str, Any]) -> None:
        """Nothing is on its way."""
        if self._saving is not None:
            self._saving.result()


class Copies:
    """In memory, of each step."""

    def __init__(self, task: Task, model: Any, optimizer: Any, parts: dict[str, Any]) -> None:
        random = {"random": RandomState()}
        self._job = task.job
        self._guard = Guard(model, optimizer, parts, rank_extra=random, job=task.job)

    def begin(self) -> int:
        """From which step the run goes on."""
        return int(self._guard.restore().get("step", 0))

    def keep(self, step: int) -> None:
        """A copy of each step."""
        self._guard.step(step)

    def end(self, options: dict[str, Any]) -> Digests:
        """What another model would go on from; then the memory is given back."""
        self._guard.wait()
        dist.barrier()
        model, optimizer = make_training(options)
        other = Guard(model, optimizer, job=self._job)
        other.restore()
        self._guard.close()
        other.close()
        return digests_of(model, optimizer)


@torch.no_grad()
def digests_of(model: nn.Module, optimizer: zeroopt.ZeroOptimizer) -> Digests:
    """Of parameters and state, whoever has what of it. Collective."""
    optimizer.consolidate_state_dict()
    state = digest_of(optimizer.full_state_dict()) if dist.get_rank() == 0 else ""
    return Digests(digest_of(model.state_dict()), state)


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
