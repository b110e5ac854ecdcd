"""Train a small GPT with Hugging Face Accelerate and zeroopt, save now and then, and go on when it is started again.

    torchrun --nproc-per-node 2 examples/accelerate_gpt.py --folder runs/accelerate --steps 20
    torchrun --nproc-per-node 3 examples/accelerate_gpt.py --folder runs/accelerate --steps 40

`--method ddp` leaves out the one line that names zeroopt; the losses are the same.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from gpt import GPT
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset
from train_gpt import VOCABULARY, load_text

from zeroopt.integrations.accelerate import enable


def train(args: argparse.Namespace) -> None:
    project = ProjectConfiguration(str(args.folder), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2, project_config=project, mixed_precision="bf16"
    )
    if args.method == "zeroopt":
        enable(accelerator, stage=args.stage)

    text, _ = load_text()
    windows = text[: len(text) // (args.context + 1) * (args.context + 1)].long().view(-1, args.context + 1)
    samples = TensorDataset(windows[:, :-1], windows[:, 1:])
    torch.manual_seed(args.seed)
    model = GPT(VOCABULARY, args.context, layers=2, width=64, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, LinearLR(optimizer, total_iters=100), DataLoader(samples, args.batch, shuffle=True)
    )

    if (args.folder / "checkpoints").exists():
        accelerator.load_state()
        accelerator.print(f"going on from step {accelerator.step}")
        project.iteration = accelerator.step // args.every
    for tokens, targets in islice(loader, accelerator.step, args.steps):  # passes over those that it has seen
        with accelerator.accumulate(model):
            loss = model(tokens, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print(
            f"step {accelerator.step}  loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}", flush=True
        )
        if accelerator.step % args.every == 0:
            accelerator.save_state()
    accelerator.save_model(model, args.folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--method", choices=["zeroopt", "ddp"], default="zeroopt")
    parser.add_argument("--steps", type=int, default=40, help="forward and backward passes a rank")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
