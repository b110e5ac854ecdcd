"""Train a small GPT so that the run goes on whatever is killed, with as many ranks as are left.

    torchrun --standalone --nproc-per-node 2 --max-restarts 10 examples/elastic.py --checkpoints runs/elastic
    torchrun --nnodes 1:4 --nproc-per-node 2 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id run1 \
        examples/elastic.py --checkpoints /shared/runs/elastic

It goes on from the newest whole checkpoint, with the samples behind those that it was trained on, whoever has been killed and whether
torchrun starts it again or the cluster does. With --copies, after the loss of a rank it goes on from the last step. On SIGTERM or
SIGUSR1 it saves after the step that is under way, and ends. docs/elastic.md says what to tell SLURM and Kubernetes.
"""

import argparse
import os
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from train_gpt import VOCABULARY, load_text, mean_over_ranks

import zeroopt
from zeroopt.checkpoint import RandomState, StopRequest, async_save, resume, save
from zeroopt.data import GlobalBatchSampler
from zeroopt.elastic import Guard


class Run:
    """A model in training, and where it is."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        tokens, _ = load_text()
        windows = tokens.unfold(0, args.context + 1, args.context)
        self.args, self.device = args, device
        self.sampler = GlobalBatchSampler(len(windows), args.batch, seed=args.seed)
        own = torch.Generator()  # not torch's, from which dropout would draw
        self.loader: DataLoader[Tensor] = DataLoader(windows, batch_sampler=self.sampler, generator=own)  # type: ignore[arg-type]
        torch.manual_seed(args.seed)
        net = GPT(VOCABULARY, args.context, layers=2, width=64, heads=4).to(device)
        self.model, self.optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-3), stage=args.stage)
        self.scheduler = LinearLR(self.optimizer, total_iters=100)
        self.random = {"random": RandomState()}
        self.guard: Guard | None = None
        if args.copies:
            self.guard = Guard(self.model, self.optimizer, self.parts, rank_extra=self.random)
        self.step = 0

    def resume(self) -> None:
        """Go on from the newest checkpoint, or copies of a later step, if there is either."""
        found = resume(self.args.checkpoints, self.model, self.optimizer, self.parts, rank_extra=self.random)
        self.step = found.get("step", 0)
        if self.guard:
            self.step = self.guard.restore(newer_than=self.step).get("step", self.step)
        report(f"beginning at step {self.step} with {dist.get_world_size()} ranks")

    def train(self) -> None:
        """To the last step, or to the step behind a signal."""
        saving: Future[None] | None = None
        with self.guard or nullcontext(), StopRequest() as stop:
            while self.step < self.args.steps:
                for batch in self.loader:  # to the end of an epoch
                    self.train_on(batch.to(self.device).long())
                    if stop.came():
                        self.save()
                        report(f"stopped as asked, and saved step {self.step}")
                        return
                    if self.step % self.args.every == 0:
                        # Returns when this rank's part is copied; the next call waits for what is still being written.
                        saving = async_save(*self.contents, rank_extra=self.random, keep=2)
                    if self.step == self.args.steps:
                        break
            if saving is not None:
                saving.result()
            if self.step % self.args.every:
                self.save()

    def train_on(self, batch: Tensor) -> None:
        """One step."""
        loss = self.model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.sampler.step()
        self.step += 1
        if self.guard:
            self.guard.step(self.step)
        report(f"step {self.step}  loss {mean_over_ranks([loss.item()], self.device)[0]:.6f}")

    def save(self) -> None:
        """A checkpoint of this step."""
        save(*self.contents, rank_extra=self.random, keep=2)

    @property
    def parts(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "sampler": self.sampler}

    @property
    def contents(self) -> tuple[Path, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer, dict[str, Any]]:
        path = self.args.checkpoints / f"step-{self.step}"
        return path, self.model, self.optimizer, {**self.parts, "step": self.step}


def report(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/elastic"), help="where all ranks see it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--copies", action="store_true", help="of each step in memory: a killed rank costs no step")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=24, help="sequences a step, of all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run(args, device)
    run.resume()
    run.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
