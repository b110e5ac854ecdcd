"""Trains a residual network or a vision transformer on images, and keeps an average of its weights.

    python -m recipes.see                                             two ranks here: by DDP, then by zeroopt, side by side
    python -m recipes.see --preset vit-tiny                           a vision transformer, instead of a residual network
    torchrun --nproc-per-node 8 -m recipes.see --preset resnet152 --images ~/imagenet

`--images` is a folder that has, in `train` and in `val`, a folder of images for each class. Without it, scikit-learn's digits.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset

from recipes.command import main, make_parser, rate_at
from recipes.method import bare, prepare
from recipes.outcome import Figure, Outcome
from recipes.run import Run, over_ranks
from recipes.see.images import Images, Sample, batches, load_images, vary
from recipes.see.norms import NORMS, on_device
from recipes.see.presets import PRESETS

SMOOTHING = 0.1  # of labels


def train(args: Namespace, device: torch.device) -> Outcome:
    preset = PRESETS[args.preset]
    steps = args.steps or preset.steps
    images = load_images(args.images, preset.size)
    run = Run(args, device)

    torch.manual_seed(args.seed)
    network = preset.make(images.classes, images.channels, preset.size, NORMS[args.norm])
    model = on_device(network, device)
    optimizer = preset.make_optimizer(model)
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, steps))
    model, optimizer = prepare(args.method, model, optimizer, fused=preset.fused)
    average = AveragedModel(bare(model), multi_avg_fn=get_ema_multi_avg_fn(preset.average), use_buffers=True)

    generator = torch.Generator().manual_seed(args.seed * dist.get_world_size() + dist.get_rank())
    own_batches = batches(images.training, preset.batch, args.seed, args.workers)
    for _ in run.steps("training", steps):
        pixels, labels = next(own_batches)
        varied = vary(pixels, generator, mirrored=images.mirrored).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(varied)
        loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(bare(model))
        run.note(loss)
    return run.outcome(model, look_back(bare(model), average, images, device))


def look_back(model: nn.Module, average: nn.Module, images: Images, device: torch.device) -> list[Figure]:
    """Collective."""
    found = {
        "accuracy": accuracy(model, images.test, device),
        "accuracy of the average": accuracy(average, images.test, device),
    }
    return [
        Figure(name, value, images.guess, images.guessed_by, higher_is_better=True) for name, value in found.items()
    ]


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[Sample], device: torch.device) -> float:
    """Each rank looks at some of the images. Collective."""
    count = len(data)  # type: ignore[arg-type]
    own = Subset(data, range(dist.get_rank(), count, dist.get_world_size()))
    model.eval()
    right = 0
    for pixels, labels in DataLoader(own, batch_size=64):
        right += int((model(pixels.to(device)).argmax(1).cpu() == labels).sum())
    model.train()
    return over_ranks([float(right)], device, dist.ReduceOp.SUM)[0] / count


def parser() -> ArgumentParser:
    options = make_parser("see", __doc__, PRESETS)
    options.add_argument("--norm", choices=NORMS, default="sync", help="of a residual network")
    options.add_argument("--images", type=Path, help="a folder of images; default: digits")
    options.add_argument("--workers", type=int, default=0, help="processes of a rank that read images")
    return options


if __name__ == "__main__":
    sys.exit(main(train, parser()))
