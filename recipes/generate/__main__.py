"""Train a GPT on Python's documentation, let it write, and fine-tune it on questions and answers.

python -m recipes.generate                                        two ranks here: by DDP, then by zeroopt, side by side
torchrun --nproc-per-node 8 -m recipes.generate --preset 1.5b     by zeroopt, on GPUs where there are some
torchrun --nproc-per-node 8 -m recipes.generate --preset 124m --method ddp --text books/*.txt
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import zeroopt
from recipes.command import main, make_parser, rate_at
from recipes.generate.answers import encode_pairs, pairs_of
from recipes.generate.presets import PRESETS, Preset
from recipes.generate.writing import write
from recipes.method import autocast, bare, prepare, resume, save
from recipes.outcome import Figure, Outcome, state_at
from recipes.run import Run, mean_over_ranks
from recipes.sampling import draw, own_part
from recipes.text import corpus, docstrings, encode, every_tenth, train_tokenizer
from recipes.transformer import draw_weights

VALIDATED = 96  # sequences at most
AT_ONCE = 16
VALUES = (zeroopt.reset_parameters, draw_weights)  # of a model that `wrap` builds: those that its constructor gives it
ANSWER_RATE = 0.3  # of the learning rate
PROMPTS = ("The statement", "Return the", "If the argument is")

Samples = tuple[Tensor, Tensor]
"""Tokens and the ones that follow them, [samples, context] each."""


def train(args: Namespace, device: torch.device) -> Outcome:
    """Runs on every rank."""
    preset = PRESETS[args.preset]
    steps = args.steps or preset.steps
    text, unseen_text = corpus(args.text)
    pairs, unseen_pairs = (pairs_of(part) for part in every_tenth(docstrings()))
    tokenizer = train_tokenizer(text, preset.vocabulary)
    windows = cut(encode(tokenizer, text), preset.context, every=1)
    unseen_windows = cut(encode(tokenizer, unseen_text), preset.context, every=preset.context)
    answers = encode_pairs(tokenizer, pairs, preset.context)
    unseen_answers = encode_pairs(tokenizer, unseen_pairs, preset.context)

    training = Training(args, preset, device)
    begin = resume(args.checkpoints, training.model, training.optimizer) if args.checkpoints else 0
    untrained = training.validate(unseen_windows)
    training.learn("text", windows, steps, begin, checkpoints=args.checkpoints)
    trained = training.validate(unseen_windows)
    written = {
        f'"{prompt} …"': write(bare(training.model), tokenizer, prompt, 40, temperature=0.8) for prompt in PROMPTS
    }

    before = training.validate(unseen_answers)
    training.learn("answers", answers, max(1, preset.answer_steps * steps // preset.steps), share=ANSWER_RATE)
    after = training.validate(unseen_answers)
    answered = {
        pair.question: f"{write(bare(training.model), tokenizer, pair.prompt, 30)}\n (docstring: {pair.answer})"
        for pair in unseen_pairs[:3]
    }
    figures = (
        Figure("validation loss", trained, untrained, state_at(begin)),
        Figure("loss of answers", after, before, "before fine-tuning"),
    )
    return training.run.outcome(training.model, figures, {**written, **answered})


class Training:
    """A model, what trains it, and the loop. Collective, as its methods are."""

    def __init__(self, args: Namespace, preset: Preset, device: torch.device) -> None:
        self.args, self.preset, self.device = args, preset, device
        self.run = Run(args, device)
        torch.manual_seed(args.seed)
        by_wrap = preset.built_by_wrap and args.method == "zeroopt"
        with torch.device("meta" if by_wrap else device):
            net = preset.make()
        options = preset.options() | ({"init": VALUES, "device": device} if by_wrap else {})
        self.model, self.optimizer = prepare(args.method, net, make_optimizer(net, preset.lr), **options)

    def learn(
        self,
        phase: str,
        samples: Samples,
        steps: int,
        begin: int = 0,
        share: float = 1.0,
        checkpoints: Path | None = None,
    ) -> None:
        """
        Args:
            begin: the step to go on with.
            share: of the preset's learning rate.
            checkpoints: where to save every so many steps.
        """
        model, optimizer = self.model, self.optimizer
        scheduler = LambdaLR(optimizer, lambda step: share * rate_at(step, steps), last_epoch=begin - 1)
        for step in self.run.steps(phase, steps, begin):
            drawn = own_part(draw(len(samples[0]), self.preset.batch, self.args.seed, step))
            with self.autocast():
                loss = model(*(part[drawn].to(self.device) for part in samples))
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            self.run.note(loss)
            if checkpoints is not None and (step + 1) % self.args.every == 0:
                save(checkpoints, step + 1, model, optimizer)

    @torch.no_grad()
    def validate(self, samples: Samples) -> float:
        """The mean loss of the first samples, of which each rank looks at as many."""
        world_size = dist.get_world_size()
        count = min(VALIDATED, len(samples[0])) // world_size * world_size
        own = (part[:count][dist.get_rank() :: world_size].to(self.device) for part in samples)
        with self.autocast():
            losses = [
                self.model(*batch).item() for batch in zip(*(torch.split(part, AT_ONCE) for part in own), strict=True)
            ]
        return mean_over_ranks([statistics.fmean(losses)], self.device)[0]

    def autocast(self) -> torch.autocast:
        return autocast(self.args.method, self.device, bfloat16=self.preset.bfloat16)


def cut(tokens: Tensor, context: int, every: int) -> Samples:
    """Windows of a text. They share its memory."""
    windows = tokens.unfold(0, context + 1, every)
    return windows[:, :-1], windows[:, 1:]


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, by which vectors do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def parser() -> ArgumentParser:
    options = make_parser("generate", __doc__, PRESETS)
    options.add_argument(
        "--text", type=Path, nargs="+", default=[], help="files to train on; default: Python's documentation"
    )
    options.add_argument("--checkpoints", type=Path, help="a folder to save to, and to go on from")
    options.add_argument("--every", type=int, default=1000, help="steps between checkpoints")
    return options


if __name__ == "__main__":
    sys.exit(main(train, parser()))
