"""Trains a model to find the caption of a picture and to write one, on digits beside and above one another.

    python -m recipes.see_and_read                                    two ranks here: by DDP, then by zeroopt, side by side
    torchrun --nproc-per-node 8 -m recipes.see_and_read --preset coca-base --batch 1024

Each picture is compared with the captions of all ranks, for which their features travel, and gradients travel back.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from recipes.command import main, make_parser, rate_at
from recipes.digits import load_digits
from recipes.method import autocast, prepare
from recipes.outcome import Figure, Outcome
from recipes.run import Run, mean_over_ranks
from recipes.sampling import draw, own_part
from recipes.see_and_read.gathering import contrastive_loss
from recipes.see_and_read.model import CoCa, caption_loss
from recipes.see_and_read.presets import PRESETS
from recipes.see_and_read.scenes import SCENES, Painter, Scene, decode, encode, split_scenes
from recipes.see_and_read.writing import write

CAPTION_WEIGHT = 2.0  # beside the contrastive loss, as in CoCa
TEST_SEED = 1 << 32  # of pictures to test with, away from those of any step
SHOWN = 6  # captions in the output


def train(args: Namespace, device: torch.device) -> Outcome:
    preset = PRESETS[args.preset]
    steps, batch = args.steps or preset.steps, args.batch or preset.batch
    digits, unseen_digits = load_digits()
    scenes, unseen_scenes = split_scenes()
    run = Run(args, device)

    torch.manual_seed(args.seed)
    network = preset.make().to(device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        network.parameters(), lr=preset.rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, steps))
    model, optimizer = prepare(args.method, network, optimizer, **preset.options())

    painter = Painter(digits, preset.size)
    generator = torch.Generator().manual_seed(args.seed * dist.get_world_size() + dist.get_rank())
    for step in run.steps("training", steps):
        shown = [scenes[i] for i in own_part(draw(len(scenes), batch, args.seed, step))]
        pictures, tokens = painter.paint(shown, generator).to(device), describe(shown, generator).to(device)
        with autocast(args.method, device, bfloat16=preset.bfloat16):
            seen = model(pictures, tokens)
        contrast = contrastive_loss(seen.images.float(), seen.texts.float(), seen.scale)
        loss = contrast + CAPTION_WEIGHT * caption_loss(seen.logits, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.note(loss)
    network.eval()
    generator.manual_seed(TEST_SEED + dist.get_rank())
    pictures = Painter(unseen_digits, preset.size).paint(unseen_scenes, generator).to(device)
    figures, examples = examine(network, unseen_scenes, pictures, device)
    return run.outcome(model, figures, {"Captions of scenes that were not in training": examples})


def describe(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """A caption of each, from either side: (scenes, LENGTH) tokens."""
    sides = torch.randint(2, (len(scenes),), generator=generator).tolist()
    return encode(scene.captions()[side] for scene, side in zip(scenes, sides, strict=True))


@torch.no_grad()
def examine(model: CoCa, scenes: list[Scene], pictures: Tensor, device: torch.device) -> tuple[list[Figure], str]:
    """How well captions are found and written. Each rank looks at pictures of its own. Collective."""
    candidates = encode(scene.captions()[0] for scene in scenes).to(device)
    seen = model(pictures, candidates)
    chosen = (seen.images @ seen.texts.T).argmax(1).cpu()
    found = (chosen == torch.arange(len(scenes))).float().mean().item()
    written = [decode(tokens) for tokens in write(model, pictures, candidates.shape[1]).cpu()]
    right = sum(text in scene.captions() for text, scene in zip(written, scenes, strict=True)) / len(scenes)
    found, right = mean_over_ranks([found, right], device)
    figures = [
        Figure(f"caption found among {len(scenes)}", found, 1 / len(scenes), "guessing", higher_is_better=True),
        Figure("caption written", right, 1 / len(SCENES), "guessing", higher_is_better=True),
    ]
    every = max(1, len(scenes) // SHOWN)
    pairs = list(zip(scenes, written, strict=True))[::every]
    return figures, "\n".join(f"{text!r} for {scene.captions()[0]!r}" for scene, text in pairs)


def parser() -> ArgumentParser:
    options = make_parser("see_and_read", __doc__, PRESETS)
    options.add_argument("--batch", type=int, help="pairs of a step, on all ranks together; default: the preset's")
    return options


if __name__ == "__main__":
    sys.exit(main(train, parser()))
