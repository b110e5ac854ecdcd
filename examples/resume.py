"""Train a small GPT, save a checkpoint every few steps, and go on from the newest one whenever the script is started again.

    torchrun --nproc-per-node 2 examples/resume.py --checkpoints runs/gpt --steps 20
    torchrun --nproc-per-node 3 examples/resume.py --checkpoints runs/gpt --steps 40

Kill it at any moment: what is in the directory is complete. The second start may have other ranks, stages and options.
"""

import argparse
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from train_gpt import VOCABULARY, load_text

import zeroopt
from zeroopt.checkpoint import RandomState, async_save, resume
from zeroopt.data import GlobalBatchSampler


def train(args: argparse.Namespace) -> None:
    tokens, _ = load_text()
    windows = tokens.unfold(0, args.context + 1, args.context)
    sampler = GlobalBatchSampler(len(windows), args.batch, seed=args.seed)
    own = torch.Generator()  # not torch's, from which dropout would draw
    loader: DataLoader[Tensor] = DataLoader(windows, batch_sampler=sampler, generator=own)  # type: ignore[arg-type]
    torch.manual_seed(args.seed)
    net = GPT(VOCABULARY, args.context, layers=2, width=64, heads=4)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-3), stage=args.stage)
    scheduler = LinearLR(optimizer, total_iters=100)

    extra = {"scheduler": scheduler, "sampler": sampler}
    random = {"random": RandomState()}
    step = resume(args.checkpoints, model, optimizer, extra, rank_extra=random).get("step", 0)
    if step and dist.get_rank() == 0:
        print(f"going on from step {step}", flush=True)

    saving: Future[None] | None = None
    while step < args.steps:
        for batch in loader:  # to the end of an epoch
            loss = model(batch[:, :-1].long(), batch[:, 1:].long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            sampler.step()
            step += 1
            if step % args.every == 0:
                # Returns when this rank's part is copied; the next call waits for what is still being written.
                saving = async_save(
                    args.checkpoints / f"step-{step}",
                    model,
                    optimizer,
                    {**extra, "step": step},
                    rank_extra=random,
                    keep=3,
                )
            if dist.get_rank() == 0:
                print(f"step {step}  loss {loss.item():.6f}", flush=True)
            if step == args.steps:
                break
    if saving is not None:
        saving.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/gpt"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=12, help="sequences a step, of all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    dist.init_process_group("gloo")
    try:
        train(parser.parse_args())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
