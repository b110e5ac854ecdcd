"""Adapt a GPT by LoRA: to answer questions, and then by DPO to prefer some answers to others.

python -m recipes.adapt                                           two ranks here: by DDP, then by zeroopt, side by side
torchrun --nproc-per-node 8 -m recipes.adapt --preset 1.5b --trunk runs/gpt/step-100000     a GPT of recipes.generate
python -m recipes.adapt --peft                                    the same with the adapters of peft
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from recipes.adapt.lora import add_adapters, draw_adapter
from recipes.adapt.preferences import encode_preferences, log_probabilities, margins, preference_loss
from recipes.adapt.presets import LAYERS, PRESETS, Preset
from recipes.adapt.trunk import load_trunk, save_trunk
from recipes.command import main, make_parser, rate_at
from recipes.generate.answers import encode_pairs, pairs_of
from recipes.generate.model import GPT
from recipes.generate.writing import write
from recipes.method import autocast, bare, prepare
from recipes.outcome import Figure, Outcome
from recipes.run import Run, mean_over_ranks
from recipes.sampling import draw, own_part
from recipes.side_by_side import Launch
from recipes.text import corpus, docstrings, encode, every_tenth, train_tokenizer

VALIDATED = 96  # questions at most
AT_ONCE = 16
CHOICE_RATE = 0.2  # of the learning rate
LAUNCHES = (Launch("trunk", arguments=("--part", "trunk")), Launch("adapters", arguments=("--part", "adapters")))

Samples = tuple[Tensor, Tensor]
"""Tokens and targets."""

Reference = dict[str, Tensor]
"""Adapters that stay as they are, by name. With the trunk, which stays as it is anyway, they are a whole model."""


def train(args: Namespace, device: torch.device) -> Outcome:
    """Runs on every rank."""
    part = train_trunk if args.part == "trunk" else adapt
    return part(args, PRESETS[args.preset], Run(args, device))


def train_trunk(args: Namespace, preset: Preset, run: Run) -> Outcome:
    """A GPT that has read Python's documentation and has never been asked anything. recipes.generate says more of this."""
    text, unseen = corpus(args.text)
    tokenizer = train_tokenizer(text, preset.trunk.vocabulary)
    context = preset.trunk.context
    windows, unseen_windows = (encode(tokenizer, part).unfold(0, context + 1, context + 1) for part in (text, unseen))
    torch.manual_seed(args.seed)
    training = Training(args, preset, run, preset.trunk.make().to(run.device), lr=preset.trunk.lr)

    def loss_of(windows: Tensor) -> Tensor:
        loss: Tensor = training(windows[:, :-1], windows[:, 1:])
        return loss

    untrained = training.validate(unseen_windows, loss_of)
    training.learn("text", windows, args.steps or preset.trunk_steps, preset.trunk.batch, loss_of)
    trained = training.validate(unseen_windows, loss_of)
    save_trunk(bare(training.model), trunk_of(args))
    return run.outcome(training.model, [Figure("validation loss", trained, untrained)])


def adapt(args: Namespace, preset: Preset, run: Run) -> Outcome:
    """Its adapters learn to answer; then, with what they have become as the reference, to prefer."""
    text, _ = corpus(args.text)
    pairs, unseen_pairs = (pairs_of(part) for part in every_tenth(docstrings()))
    tokenizer = train_tokenizer(text, preset.trunk.vocabulary)
    context = preset.trunk.context
    answers, unseen_answers = (torch.stack(encode_pairs(tokenizer, part, context), 1) for part in (pairs, unseen_pairs))
    choices, unseen_choices = (
        torch.stack(encode_preferences(tokenizer, part, context), 1) for part in (pairs, unseen_pairs)
    )
    steps = args.steps or preset.steps
    net, options = with_adapters(args, preset, run.device)
    training = Training(args, preset, run, net, lr=preset.lr, **options)

    def answer_loss(rows: Tensor) -> Tensor:
        loss: Tensor = training(rows[:, 0], rows[:, 1])
        return loss

    before = training.validate(unseen_answers, answer_loss)
    training.learn("answers", answers, steps, preset.batch, answer_loss)
    after = training.validate(unseen_answers, answer_loss)

    reference = training.trained_now()

    def margin(rows: Tensor) -> Tensor:
        return margins(training.log_probabilities(rows), training.log_probabilities(rows, reference))

    def choice_loss(rows: Tensor) -> Tensor:
        return preference_loss(margin(rows), preset.beta)

    choice_steps = max(1, preset.choice_steps * steps // preset.steps)
    training.learn("choices", choices, choice_steps, preset.batch, choice_loss, share=CHOICE_RATE)
    chosen = training.validate(unseen_choices, lambda rows: (margin(rows) > 0).float().mean())
    answered = {
        pair.question: f"{write(bare(training.model), tokenizer, pair.prompt, 30)}\n (docstring: {pair.answer})"
        for pair in unseen_pairs[:3]
    }
    figures = (
        Figure("loss of answers", after, before, "the trunk alone"),
        Figure("better chosen", chosen, 0.5, "by chance", higher_is_better=True),
    )
    return run.outcome(training.model, figures, answered)


def with_adapters(args: Namespace, preset: Preset, device: torch.device) -> tuple[GPT, dict[str, Any]]:
    """The net with the trunk's values and new adapters, and by which options zeroopt makes it where no rank is to hold all of it
    before."""
    trunk = trunk_of(args)
    torch.manual_seed(args.seed)
    if preset.trunk.built_by_wrap and args.method == "zeroopt":
        with torch.device("meta"):
            net = preset.make()
        return net, {"init": [draw_adapter, trunk], "device": device}
    net = preset.trunk.make()
    load_trunk(net, trunk)
    torch.manual_seed(args.seed)
    if args.peft:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=preset.rank, lora_alpha=2 * preset.rank, target_modules=list(LAYERS)), net)
    else:
        add_adapters(net, LAYERS, preset.rank, alpha=2 * preset.rank)
    return net.to(device), {}


class Training:
    """A model, what trains it, and the loop. Collective, as its methods are.

    Args:
        net: of which what requires gradients is trained.
        options: of `zeroopt.wrap`, besides the preset's.
    """

    def __init__(self, args: Namespace, preset: Preset, run: Run, net: nn.Module, lr: float, **options: Any) -> None:
        self.args, self.preset, self.run, self.device = args, preset, run, run.device
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.model, self.optimizer = prepare(args.method, net, optimizer, **preset.trunk.options(), **options)

    def __call__(self, *inputs: Tensor, reference: Reference | None = None) -> Tensor:
        """The model's output, or that of the reference."""
        inputs = tuple(tensor.to(self.device) for tensor in inputs)
        with autocast(self.args.method, self.device, bfloat16=self.preset.trunk.bfloat16):
            output: Tensor
            if reference is None:
                output = self.model(*inputs)
            else:
                with torch.no_grad():
                    output = functional_call(bare(self.model), reference, inputs)
            return output

    def log_probabilities(self, rows: Tensor, reference: Reference | None = None) -> Tensor:
        """Of both answers of each pair: [pairs, tokens and targets, 2, context] to [pairs, 2]."""
        tokens, targets = rows.unbind(1)
        logits = self(tokens.flatten(0, 1), reference=reference)
        return log_probabilities(logits, targets.flatten(0, 1).to(self.device)).view(-1, 2)

    def trained_now(self) -> Reference:
        """A copy of what is trained."""
        return {name: p.detach().clone() for name, p in bare(self.model).named_parameters() if p.requires_grad}

    def learn(
        self,
        phase: str,
        samples: Tensor,
        steps: int,
        batch: int,
        loss_of: Callable[[Tensor], Tensor],
        share: float = 1.0,
    ) -> None:
        """
        Args:
            loss_of: of some of the samples.
            share: of the learning rate.
        """
        scheduler = LambdaLR(self.optimizer, lambda step: share * rate_at(step, steps))
        for step in self.run.steps(phase, steps):
            loss = loss_of(samples[own_part(draw(len(samples), batch, self.args.seed, step))])
            torch.autograd.backward(loss)
            clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            scheduler.step()
            self.run.note(loss)

    @torch.no_grad()
    def validate(self, samples: Tensor, value_of: Callable[[Tensor], Tensor]) -> float:
        """The mean value of the first samples, of which each rank looks at as many."""
        world_size = dist.get_world_size()
        count = min(VALIDATED, len(samples)) // world_size * world_size
        own = samples[:count][dist.get_rank() :: world_size]
        value = statistics.fmean(value_of(rows).item() for rows in torch.split(own, AT_ONCE))
        return mean_over_ranks([value], self.device)[0]


def trunk_of(args: Namespace) -> Path:
    return Path(args.trunk or args.out / f"trunk-{args.preset}-{args.method}.pt")


def parser() -> ArgumentParser:
    options = make_parser("adapt", __doc__, PRESETS)
    options.add_argument("--part", choices=("trunk", "adapters"), default="adapters", help="of the training")
    options.add_argument(
        "--trunk", type=Path, help="a trained GPT: a checkpoint of recipes.generate; default: what --part trunk left"
    )
    options.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        help="files that the trunk was trained on; default: Python's documentation",
    )
    options.add_argument("--peft", action="store_true", help="adapters of peft, in place of those of this recipe")
    return options


if __name__ == "__main__":
    given = parser().parse_args()
    sys.exit(main(train, parser(), LAUNCHES[1:] if given.trunk else LAUNCHES))
