"""Pre-train an encoder on masked words, and fine-tune it, on another number of ranks, to tell domains apart from few labels.

python -m recipes.understand                                       pre-trained on two ranks here, fine-tuned on three; by both methods
torchrun --nproc-per-node 8 -m recipes.understand --preset large --checkpoints runs/bert     by zeroopt; again: goes on
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from recipes.command import main, make_parser, rate_at
from recipes.method import autocast, bare, finish, prepare, resume, save
from recipes.outcome import Figure, Outcome
from recipes.run import Run, mean_over_ranks, over_ranks
from recipes.sampling import draw, generator_of, own_part
from recipes.side_by_side import Launch
from recipes.text import MASK, MASK_ID, encode, train_tokenizer
from recipes.understand.domains import DOMAINS, Domains, Labelled, encode_texts, read_domains
from recipes.understand.masking import Masked, mask
from recipes.understand.model import Classifier, Encoder, MaskedWords
from recipes.understand.presets import PRESETS, Preset

WORDS, LABELS, BOTH = "words", "labels", "both"
LAUNCHES = (
    Launch("words", 2, ("--part", WORDS)),
    Launch("labels", 3, ("--part", LABELS)),
)
VALIDATED = 96  # windows of unseen text at most; two ranks and three look at as many
GUESSES = 5
SENTENCES = (
    f"compute the{MASK} of a square matrix.",
    f"the{MASK} response of a digital filter.",
    f"a normal{MASK} random variable.",
)

BatchAt = Callable[[int], tuple[Tensor, ...]]
"""What the model is called with in a step, on this rank."""


def train(args: Namespace, device: torch.device) -> Outcome:
    """Runs on every rank."""
    domains = read_domains()
    training = Training(args, PRESETS[args.preset], device)
    tokenizer = train_tokenizer(domains.unlabelled, training.preset.vocabulary)
    model, missing = pretrain(training, tokenizer, domains)
    guesses = {sentence: guess(bare(model), tokenizer, sentence) for sentence in SENTENCES}
    if args.part == WORDS:
        return training.run.outcome(model, [missing], guesses)
    pretrained = finish(model)
    assert isinstance(pretrained, MaskedWords)
    told = fine_tune(training, pretrained.encoder, tokenizer, domains)
    return training.run.outcome(pretrained, [missing, told], guesses)


class Training:
    """What pre-training and fine-tuning have in common. Collective, as its methods are."""

    def __init__(self, args: Namespace, preset: Preset, device: torch.device) -> None:
        self.args, self.preset, self.device = args, preset, device
        self.run = Run(args, device)

    def prepare(self, net: nn.Module, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = torch.optim.AdamW(net.to(self.device).parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
        return prepare(self.args.method, net, optimizer, **self.preset.options())

    def learn(
        self,
        phase: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch_at: BatchAt,
        steps: int,
        begin: int = 0,
        checkpoints: Path | None = None,
    ) -> None:
        """
        Args:
            begin: the step to go on with.
            checkpoints: where to save every so many steps, and at the end.
        """
        scheduler = LambdaLR(optimizer, lambda step: rate_at(step, steps), last_epoch=begin - 1)
        for step in self.run.steps(phase, steps, begin):
            with self.autocast():
                loss = model(*(part.to(self.device) for part in batch_at(step)))
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            self.run.note(loss)
            if checkpoints is not None and (step + 1 == steps or (step + 1) % self.args.every == 0):
                save(checkpoints, step + 1, model, optimizer)

    def autocast(self) -> torch.autocast:
        return autocast(self.args.method, self.device, bfloat16=self.preset.bfloat16)


def pretrain(training: Training, tokenizer: Tokenizer, domains: Domains) -> tuple[nn.Module, Figure]:
    """Learn to tell missing words, or go on with what has been saved; with LABELS, take what has been saved. Collective.

    Raises:
        FileNotFoundError: with LABELS, nothing has been saved.
    """
    args, preset = training.args, training.preset
    vocabulary = tokenizer.get_vocab_size()
    text, unseen = (encode(tokenizer, part) for part in (domains.unlabelled, [text for text, _ in domains.tested]))
    windows = text.unfold(0, preset.context, 1)
    unseen_windows = unseen.unfold(0, preset.context, preset.context)[:VALIDATED]
    hidden = mask(unseen_windows, preset.missing, vocabulary, generator_of(args.seed + 2, 0))

    def batch_at(step: int) -> Masked:
        drawn = windows[draw(len(windows), preset.batch, args.seed, step)]
        return Masked(*map(own_part, mask(drawn, preset.missing, vocabulary, generator_of(args.seed + 1, step))))

    torch.manual_seed(args.seed)
    model, optimizer = training.prepare(MaskedWords(preset.make_encoder()), preset.lr)
    checkpoints = args.checkpoints or args.out / f"checkpoints-{args.method}"
    if args.checkpoints is None and args.part != LABELS:
        clear(checkpoints)
    begin = resume(checkpoints, model, optimizer)
    if args.part != LABELS:
        training.learn("missing words", model, optimizer, batch_at, args.steps or preset.steps, begin, checkpoints)
    elif not begin:
        raise FileNotFoundError(f"nothing has been pre-trained in {checkpoints}: begin with --part {WORDS}")
    by_frequency = frequency_loss(text, hidden.missing, vocabulary)
    return model, Figure("loss of missing words", loss_of(training, model, hidden), by_frequency, "by frequency")


def fine_tune(training: Training, encoder: Encoder, tokenizer: Tokenizer, domains: Domains) -> Figure:
    """The accuracy after fine-tuning, and that of encoders that begin from nothing: means over several draws of labels. Collective."""
    preset = training.preset
    tested = encode_texts(tokenizer, domains.tested, preset.context)

    def mean_accuracy(phase: str, make_encoder: Callable[[], Encoder]) -> float:
        found = []
        for number in range(preset.draws):
            seed = training.args.seed * preset.draws + number
            labelled = encode_texts(tokenizer, domains.label(preset.labels, seed), preset.context)
            torch.manual_seed(seed)
            net = Classifier(make_encoder(), len(DOMAINS))
            found.append(learn_labels(training, phase, net, labelled, tested, seed))
        return fmean(found)

    pretrained = mean_accuracy("labels", lambda: deepcopy(encoder))
    from_nothing = mean_accuracy("labels, from nothing", preset.make_encoder)
    return Figure("accuracy", pretrained, from_nothing, "from nothing", higher_is_better=True)


def learn_labels(
    training: Training, phase: str, net: Classifier, labelled: Labelled, tested: Labelled, seed: int
) -> float:
    """The share of the tested texts whose domain is told right. Collective."""
    preset = training.preset

    def batch_at(step: int) -> Labelled:
        drawn = own_part(draw(len(labelled.labels), preset.label_batch, seed, step))
        return Labelled(*(part[drawn] for part in labelled))

    model, optimizer = training.prepare(net, preset.label_lr)
    training.learn(phase, model, optimizer, batch_at, preset.label_steps)
    return accuracy(training, bare(model), tested)


@torch.no_grad()
def loss_of(training: Training, model: nn.Module, hidden: Masked) -> float:
    """Of what is missing in some windows, of which each rank looks at as many. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count = len(hidden.tokens) // world_size * world_size
    with training.autocast():
        loss = model(*(part[:count][rank::world_size].to(training.device) for part in hidden))
    return mean_over_ranks([loss.item()], training.device)[0]


def frequency_loss(text: Tensor, missing: Tensor, vocabulary: int) -> float:
    """Of missing words, for whoever knows how frequent each word is, and does not look at its neighbours."""
    counts = torch.bincount(text, minlength=vocabulary) + 1.0
    return F.cross_entropy(counts.log().expand(missing.numel(), -1), missing.flatten()).item()


@torch.no_grad()
def accuracy(training: Training, model: nn.Module, tested: Labelled) -> float:
    """Each rank looks at its share. Collective."""
    assert isinstance(model, Classifier)
    tokens, words, labels = (part[dist.get_rank() :: dist.get_world_size()].to(training.device) for part in tested)
    right = (model.logits(tokens, words).argmax(-1) == labels).sum().item()
    return over_ranks([right], training.device, dist.ReduceOp.SUM)[0] / len(tested.labels)


@torch.no_grad()
def guess(model: nn.Module, tokenizer: Tokenizer, sentence: str) -> str:
    """The likeliest words for the one that is missing in a sentence."""
    assert isinstance(model, MaskedWords)
    tokens = torch.tensor([tokenizer.encode(sentence).ids], device=model.encoder.token_embedding.weight.device)
    place = tokens.eq(MASK_ID).nonzero()[:, 1:]
    likeliest = model.logits(tokens, place)[0, 0].topk(GUESSES).indices
    return ", ".join(tokenizer.decode([token]).strip() for token in likeliest.tolist())


def clear(checkpoints: Path) -> None:
    """Begin anew. Collective."""
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    dist.barrier()


def parser() -> ArgumentParser:
    options = make_parser("understand", __doc__, PRESETS)
    options.add_argument("--part", choices=(WORDS, LABELS, BOTH), default=BOTH, help="of the training")
    options.add_argument(
        "--checkpoints", type=Path, help="a folder to save to, and to go on from; default: one of this run within --out"
    )
    options.add_argument("--every", type=int, default=1000, help="steps between checkpoints")
    return options


if __name__ == "__main__":
    sys.exit(main(train, parser(), LAUNCHES))
