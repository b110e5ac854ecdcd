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
from torch.optim.lr_scheduler import LinearLR
from train_gpt import VOCABULARY, draw_batch, load_text

import zeroopt
import zeroopt.checkpoint


def train(args: argparse.Namespace) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    text, _ = load_text()
    torch.manual_seed(args.seed)
    net = GPT(VOCABULARY, args.context, layers=2, width=64, heads=4)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-3), stage=args.stage)
    scheduler = LinearLR(optimizer, total_iters=100)

    first = 0
    newest = zeroopt.checkpoint.latest(args.checkpoints)
    if newest is not None:
        first = zeroopt.checkpoint.load(newest, model, optimizer, {"scheduler": scheduler})["step"]
        if rank == 0:
            print(f"going on from {newest}, step {first}", flush=True)

    saving: Future[None] | None = None
    for step in range(first, args.steps):
        loss = model(*draw_batch(text, args, step * world_size + rank, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % args.every == 0:
            # Returns when this rank's part is copied; the next call waits for what is still being written.
            saving = zeroopt.checkpoint.async_save(
                args.checkpoints / f"step-{step + 1}",
                model,
                optimizer,
                {"scheduler": scheduler, "step": step + 1},
                keep=3,
            )
        if rank == 0:
            print(f"step {step + 1}  loss {loss.item():.6f}", flush=True)
    if saving is not None:
        saving.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/gpt"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--seed", type=int, default=0)
    dist.init_process_group("gloo")
    try:
        train(parser.parse_args())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
